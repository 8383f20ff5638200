use postrider_core::{Error, ErrorKind, GroupName, Result, Topic, clock::Timestamp, relay::TopicPattern, wire::Format};
use std::{fmt, sync::Arc, time::Duration};

/// Options of the Kafka transport.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct KafkaOptions {
    /// Where brokers are: `host:port,host:port`.
    pub brokers: String,
    /// Whether topics are declared, the default, or only looked for.
    pub declares: bool,
    /// How many partitions a topic is declared with; 12 by default.
    pub partitions: i32,
    /// How many brokers keep each partition of a topic that is declared; the brokers' own default if left out.
    pub replication: Option<i32>,
    /// Messages that may be on their way unconfirmed; 10,000 by default.
    pub window: usize,
    /// The most bytes of a record; 1 MiB by default, as brokers have it.
    pub max_message_bytes: u32,
    /// The most bytes of records that a subscription has fetched ahead of its handlers, all partitions together; 96 MiB by default. At
    /// least 64 KiB a partition, and one record.
    pub fetch_memory: usize,
    /// Where a group begins that has read nothing of a partition yet; with the earliest message by default.
    pub start: Start,
    /// How long the client waits for more to send with a message; 1 ms by default.
    pub linger: Duration,
    /// How long a message may be on its way, retries included; 8 s by default, less than the relay waits for a call.
    pub delivery_timeout: Duration,
    /// The most time that connecting, declaring and closing may take, each; 10 s by default.
    pub timeout: Duration,
    /// How long a member may be silent before its partitions go to others; 10 s by default. With the new group protocol the
    /// brokers say how long.
    pub session_timeout: Duration,
    /// Between offsets' commits; 1 s by default.
    pub commit_interval: Duration,
    /// How long a member may take to finish what it has of a partition that goes to another; 10 s by default.
    pub handover_timeout: Duration,
    /// Whether groups use the protocol of KIP-848, which Kafka has from 4.0 on; not by default.
    pub new_group_protocol: bool,
    /// How messages are laid out; [`Format::Binary`] by default. Both are read.
    pub format: Format,
    /// What the client is called in Kafka's own tools; `postrider` by default.
    pub client_id: String,
    /// Whether to use TLS. Needs the feature `kafka-tls`.
    pub tls: bool,
    /// Certificates (PEM) of authorities to trust, in place of the system's.
    pub ca_file: Option<String>,
    /// User and password, and how they are told: `PLAIN`, `SCRAM-SHA-256`, `SCRAM-SHA-512`.
    pub login: Option<Login>,
    /// How topics are declared that are not like the others: the first that matches counts.
    pub topics: Vec<(TopicPattern, TopicOptions)>,
    /// Whether a message that has a key and no payload is a record without a value, which deletes what a compacted topic has of the
    /// key; no by default. Such records of others are read as messages without a payload, either way.
    pub tombstones: bool,
    /// What the clients of single groups are told beside [`properties`](Self::properties): group, name, value.
    pub group_properties: Vec<(String, String, String)>,
    token: Option<TokenSource>,
    /// Anything else that librdkafka can be told, such as `compression.type`: names and values as its documentation has them.
    /// What an option of this transport says, or a promise rests on, is refused. Values are never shown.
    pub properties: Vec<(String, String)>,
}

/// What this transport says itself.
const OWN: [&str; 32] = [
    "acks",
    "auto.commit.interval.ms",
    "auto.offset.reset",
    "bootstrap.servers",
    "client.id",
    "delivery.timeout.ms",
    "enable.auto.commit",
    "enable.auto.offset.store",
    "enable.idempotence",
    "enable.partition.eof",
    "fetch.max.bytes",
    "fetch.queue.backoff.ms",
    "group.id",
    "group.protocol",
    "heartbeat.interval.ms",
    "linger.ms",
    "message.timeout.ms",
    "message.max.bytes",
    "metadata.broker.list",
    "partition.assignment.strategy",
    "partitioner",
    "queue.buffering.max.messages",
    "queue.buffering.max.ms",
    "request.required.acks",
    "sasl.mechanism",
    "sasl.mechanisms",
    "sasl.password",
    "sasl.username",
    "security.protocol",
    "session.timeout.ms",
    "ssl.ca.location",
    "transactional.id",
];

/// Where a group begins that has read nothing of a partition yet.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Start {
    /// With the earliest message there is.
    #[default]
    Earliest,
    /// With what is published from the time it joins. A partition that is added later, and one whose offsets the brokers have
    /// forgotten, begins with its latest, too: what lay there before is passed over.
    Latest,
    /// With the first message that brokers have stored at this time or later.
    At(Timestamp),
}

/// How a topic is declared; of what is left out, as the others.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicOptions {
    /// How many partitions it has.
    pub partitions: Option<i32>,
    /// How many brokers keep each of them.
    pub replication: Option<i32>,
    /// Its configuration, as Kafka's documentation has it: `retention.ms`, `cleanup.policy`, …
    pub config: Vec<(String, String)>,
}

impl TopicOptions {
    /// Sets how many partitions it has.
    #[must_use]
    pub fn with_partitions(mut self, count: i32) -> Self {
        self.partitions = Some(count);
        self
    }
    /// Sets how many brokers keep each partition.
    #[must_use]
    pub fn with_replication(mut self, brokers: i32) -> Self {
        self.replication = Some(brokers);
        self
    }
    /// Adds to its configuration.
    #[must_use]
    pub fn with_config(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.config.push((name.into(), value.into()));
        self
    }
}

/// A token for `OAUTHBEARER`.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Token {
    /// The token itself. Never shown.
    pub value: String,
    /// Whom it is about.
    pub principal: String,
    /// Until when it counts: the next one is asked for after four fifths of that time.
    pub expires_at: Timestamp,
}

impl Token {
    /// A token for `principal` that counts until then.
    #[must_use]
    pub fn new(value: impl Into<String>, principal: impl Into<String>, expires_at: Timestamp) -> Self {
        Self {
            value: value.into(),
            principal: principal.into(),
            expires_at,
        }
    }
}

impl fmt::Debug for Token {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Token");
        shown
            .field("principal", &self.principal)
            .field("expires_at", &self.expires_at)
            .finish_non_exhaustive()
    }
}

/// Gives tokens.
#[derive(Clone)]
pub(crate) struct TokenSource(pub(crate) Arc<dyn Fn() -> Result<Token> + Send + Sync>);

impl PartialEq for TokenSource {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
impl Eq for TokenSource {}

/// Who to be.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Login {
    /// `PLAIN`, `SCRAM-SHA-256` or `SCRAM-SHA-512`.
    pub mechanism: String,
    /// The user.
    pub user: String,
    /// The password. Never shown.
    pub password: String,
}

impl Login {
    /// A user, with a password that is told by `mechanism`.
    #[must_use]
    pub fn new(mechanism: impl Into<String>, user: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            mechanism: mechanism.into(),
            user: user.into(),
            password: password.into(),
        }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut shown = f.debug_struct("Login");
        shown
            .field("mechanism", &self.mechanism)
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

impl Default for KafkaOptions {
    fn default() -> Self {
        Self {
            brokers: "localhost:9092".to_owned(),
            declares: true,
            partitions: 12,
            replication: None,
            window: 10_000,
            max_message_bytes: 1024 * 1024,
            fetch_memory: 96 * 1024 * 1024,
            start: Start::Earliest,
            linger: Duration::from_millis(1),
            delivery_timeout: Duration::from_secs(8),
            timeout: Duration::from_secs(10),
            session_timeout: Duration::from_secs(10),
            commit_interval: Duration::from_secs(1),
            handover_timeout: Duration::from_secs(10),
            new_group_protocol: false,
            format: Format::Binary,
            client_id: "postrider".to_owned(),
            tls: false,
            ca_file: None,
            login: None,
            topics: Vec::new(),
            tombstones: false,
            group_properties: Vec::new(),
            token: None,
            properties: Vec::new(),
        }
    }
}

impl KafkaOptions {
    /// The defaults, for these brokers.
    #[must_use]
    pub fn new(brokers: impl Into<String>) -> Self {
        Self {
            brokers: brokers.into(),
            ..Self::default()
        }
    }
    /// Declares nothing: a missing topic is an error.
    #[must_use]
    pub fn without_declaring(mut self) -> Self {
        self.declares = false;
        self
    }
    /// Sets how many partitions a topic is declared with.
    #[must_use]
    pub fn with_partitions(mut self, count: i32) -> Self {
        self.partitions = count;
        self
    }
    /// Sets how many brokers keep each partition of a topic that is declared.
    #[must_use]
    pub fn with_replication(mut self, brokers: i32) -> Self {
        self.replication = Some(brokers);
        self
    }
    /// Sets how many messages may be unconfirmed.
    #[must_use]
    pub fn with_window(mut self, messages: usize) -> Self {
        self.window = messages;
        self
    }
    /// Sets the most bytes of a record. Brokers and topics have limits of their own (`message.max.bytes`, `max.message.bytes`), and so has
    /// the bus ([`Limits`](postrider_core::Limits)).
    #[must_use]
    pub fn with_max_message_bytes(mut self, bytes: u32) -> Self {
        self.max_message_bytes = bytes;
        self
    }
    /// Sets where a group begins that has read nothing yet.
    #[must_use]
    pub fn with_start(mut self, start: Start) -> Self {
        self.start = start;
        self
    }
    /// Sets how many bytes of records a subscription may have fetched ahead of its handlers, all partitions together.
    #[must_use]
    pub fn with_fetch_memory(mut self, bytes: usize) -> Self {
        self.fetch_memory = bytes;
        self
    }
    /// Sets how long the client waits for more to send with a message.
    #[must_use]
    pub fn with_linger(mut self, linger: Duration) -> Self {
        self.linger = linger;
        self
    }
    /// Sets how long a message may be on its way.
    #[must_use]
    pub fn with_delivery_timeout(mut self, timeout: Duration) -> Self {
        self.delivery_timeout = timeout;
        self
    }
    /// Sets the most time that connecting, declaring and closing may take.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
    /// Sets how long a member may be silent.
    #[must_use]
    pub fn with_session_timeout(mut self, timeout: Duration) -> Self {
        self.session_timeout = timeout;
        self
    }
    /// Sets how long a member may take to finish what it has of a partition that goes to another.
    #[must_use]
    pub fn with_handover_timeout(mut self, timeout: Duration) -> Self {
        self.handover_timeout = timeout;
        self
    }
    /// Uses the group protocol of KIP-848.
    #[must_use]
    pub fn with_new_group_protocol(mut self) -> Self {
        self.new_group_protocol = true;
        self
    }
    /// Sets how messages are laid out.
    #[must_use]
    pub fn with_format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }
    /// Uses TLS, and trusts the authorities in this file, or the system's.
    #[must_use]
    pub fn with_tls(mut self, ca_file: Option<String>) -> Self {
        self.tls = true;
        self.ca_file = ca_file;
        self
    }
    /// Sets who to be.
    #[must_use]
    pub fn with_login(mut self, login: Login) -> Self {
        self.login = Some(login);
        self
    }
    /// Logs in with tokens (`OAUTHBEARER`), which this is asked for: at the start, and before one expires. It runs on threads of the
    /// client's own, and may take its time. Needs the feature `kafka-tls`, and [`without_declaring`](Self::without_declaring): the client
    /// declares no topics with a token.
    #[must_use]
    pub fn with_token(mut self, token: impl Fn() -> Result<Token> + Send + Sync + 'static) -> Self {
        self.token = Some(TokenSource(Arc::new(token)));
        self
    }
    pub(crate) fn token(&self) -> Option<&TokenSource> {
        self.token.as_ref()
    }
    /// Sets how the topics of this pattern are declared. Those that are there already stay as they are.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](postrider_core::ErrorKind::Config) for what is no topic and no pattern of topics.
    pub fn with_topic(mut self, pattern: &str, options: TopicOptions) -> Result<Self> {
        self.topics.push((TopicPattern::parse(pattern)?, options));
        Ok(self)
    }
    /// How a topic is declared: partitions, replication, configuration.
    pub(crate) fn of_topic(&self, topic: &str) -> (i32, Option<i32>, &[(String, String)]) {
        let topic = Topic::parse(topic.to_owned()).ok();
        let matching = |(pattern, _): &&(TopicPattern, _)| topic.as_ref().is_some_and(|topic| pattern.matches(topic));
        let Some((_, special)) = self.topics.iter().find(matching) else {
            return (self.partitions, self.replication, &[]);
        };
        let replication = special.replication.or(self.replication);
        (
            special.partitions.unwrap_or(self.partitions),
            replication,
            &special.config,
        )
    }
    /// Writes messages that have a key and no payload as records without a value.
    #[must_use]
    pub fn with_tombstones(mut self) -> Self {
        self.tombstones = true;
        self
    }
    /// Tells the client of one group something else, as [`with_property`](Self::with_property) tells all clients.
    #[must_use]
    pub fn with_group_property(
        mut self,
        group: impl Into<String>,
        name: impl Into<String>,
        value: impl Into<String>,
    ) -> Self {
        self.group_properties.push((group.into(), name.into(), value.into()));
        self
    }
    /// What the client of a group is told beside what all are.
    pub(crate) fn of_group(&self, group: &GroupName) -> impl Iterator<Item = (&str, &str)> {
        let of = self
            .group_properties
            .iter()
            .filter(move |(of, _, _)| of == group.as_str());
        of.map(|(_, name, value)| (name.as_str(), value.as_str()))
    }

    /// Tells librdkafka something else: a name and a value as its documentation has them. It counts for publishing and
    /// receiving alike. What is not known, or may not be said, is refused when the transport is made.
    #[must_use]
    pub fn with_property(mut self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.properties.push((name.into(), value.into()));
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |option: &'static str, why: &str| {
            Err(
                Error::new(ErrorKind::Config, "an option of the Kafka transport is wrong")
                    .with("option", option)
                    .with("why", why),
            )
        };
        if self.brokers.trim().is_empty() {
            return wrong("brokers", "empty: host:port,host:port");
        }
        if self.partitions < 1 {
            return wrong("partitions", "at least 1");
        }
        if self.replication.is_some_and(|brokers| brokers < 1) {
            return wrong("replication", "at least 1");
        }
        if !(1..=90_000).contains(&self.window) {
            return wrong("window", "between 1 and 90,000");
        }
        if self.delivery_timeout < self.linger + Duration::from_millis(10) {
            return wrong("delivery_timeout", "longer than linger");
        }
        if !(10_000..=1_000_000_000).contains(&self.max_message_bytes) {
            return wrong("max_message_bytes", "between 10,000 and 1,000,000,000");
        }
        let mechanisms = ["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"];
        if self
            .login
            .as_ref()
            .is_some_and(|login| !mechanisms.contains(&login.mechanism.as_str()))
        {
            return wrong(
                "login",
                "the mechanism is one of PLAIN, SCRAM-SHA-256 and SCRAM-SHA-512",
            );
        }
        if self.timeout.is_zero() {
            return wrong("timeout", "more than nothing");
        }
        if self.handover_timeout > Duration::from_secs(240) {
            return wrong("handover_timeout", "at most 4 minutes, since Kafka waits for 5");
        }
        for (pattern, topic) in &self.topics {
            if topic.partitions.is_some_and(|count| count < 1) || topic.replication.is_some_and(|brokers| brokers < 1) {
                return wrong(
                    "topics",
                    &format!("`{pattern}` has less than one partition, or less than one replica"),
                );
            }
        }
        if self.token.is_some() && self.login.is_some() {
            return wrong("login", "there is a token, too: one of them can be the login");
        }
        if self.token.is_some() && self.declares {
            return wrong(
                "token",
                "the client cannot declare topics with one: use `without_declaring`, too",
            );
        }
        let told = self.properties.iter().map(|(name, _)| name);
        let mut told = told.chain(self.group_properties.iter().map(|(_, name, _)| name));
        if let Some(name) = told.find(|name| OWN.contains(&name.as_str())) {
            let why = format!("`{name}` is an option of the transport, or what its promises rest on");
            return wrong("properties", &why);
        }
        let needs_tls = self.tls
            || self.token.is_some()
            || self
                .login
                .as_ref()
                .is_some_and(|login| login.mechanism.starts_with("SCRAM"));
        if needs_tls && !cfg!(feature = "tls") {
            return wrong(
                "tls, login",
                "TLS, SCRAM and tokens are not compiled in: build with the feature `kafka-tls`",
            );
        }
        Ok(())
    }
}

impl fmt::Debug for KafkaOptions {
    /// Everything but the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("KafkaOptions")
            .field("brokers", &self.brokers)
            .field("declares", &self.declares)
            .field("partitions", &self.partitions)
            .field("replication", &self.replication)
            .field("window", &self.window)
            .field("max_message_bytes", &self.max_message_bytes)
            .field("fetch_memory", &self.fetch_memory)
            .field("start", &self.start)
            .field("linger", &self.linger)
            .field("delivery_timeout", &self.delivery_timeout)
            .field("timeout", &self.timeout)
            .field("session_timeout", &self.session_timeout)
            .field("commit_interval", &self.commit_interval)
            .field("handover_timeout", &self.handover_timeout)
            .field("new_group_protocol", &self.new_group_protocol)
            .field("format", &self.format)
            .field("client_id", &self.client_id)
            .field("tls", &self.tls)
            .field("ca_file", &self.ca_file)
            .field("login", &self.login)
            .field("token", &self.token.as_ref().map(|_| "…"))
            .field("topics", &self.topics)
            .field("tombstones", &self.tombstones)
            .field(
                "properties",
                &self.properties.iter().map(|(name, _)| name).collect::<Vec<_>>(),
            )
            .finish()
    }
}
