use postrider_core::{AttributeValue, Error, ErrorKind, Result, wire::Format};
use std::{fmt, path::PathBuf, sync::Arc, time::Duration};

/// What the names of the headers begin with that hold attributes. All are read, whatever is written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum AttributePrefix {
    /// `cloudEvents_`, as the AMQP binding of CloudEvents has it for those who cannot write colons.
    #[default]
    CloudEventsUnderscore,
    /// `cloudEvents:`, as the AMQP binding has it.
    CloudEventsColon,
    /// `ce-`, which the RabbitMQ binding of the official Python SDK reads and writes.
    CeDash,
}

/// Who to be.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Login {
    /// The user.
    pub user: String,
    /// The password. Never shown.
    pub password: String,
}

impl Login {
    /// A user with a password.
    #[must_use]
    pub fn new(user: impl Into<String>, password: impl Into<String>) -> Self {
        Self {
            user: user.into(),
            password: password.into(),
        }
    }
}

impl fmt::Debug for Login {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Login")
            .field("user", &self.user)
            .finish_non_exhaustive()
    }
}

/// Gives the login of each connection.
#[derive(Clone)]
pub(crate) struct LoginSource(pub(crate) Arc<dyn Fn() -> Result<Login> + Send + Sync>);

impl PartialEq for LoginSource {
    fn eq(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.0, &other.0)
    }
}
impl Eq for LoginSource {}

/// Arguments of queues that order, safety, or another option rests on.
const OWN_ARGUMENTS: [&str; 9] = [
    "x-queue-type",
    "x-delivery-limit",
    "x-single-active-consumer",
    "x-dead-letter-exchange",
    "x-dead-letter-routing-key",
    "x-dead-letter-strategy",
    "x-overflow",
    "x-expires",
    "x-message-ttl",
];

/// Options of the RabbitMQ transport.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RabbitMqOptions {
    /// The address: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS.
    pub url: String,
    /// Addresses of further nodes of the cluster, tried in turn where one does not answer. None by default.
    pub further_urls: Vec<String>,
    /// The durable exchange that everything is published to; `postrider` by default.
    pub exchange: String,
    /// Whether groups may subscribe to patterns of topics; no by default. It makes the exchange a topic exchange in place of a
    /// direct one, so that whoever uses it has to say the same; matching costs RabbitMQ 3.10 about a third of what it can
    /// publish.
    pub wildcards: bool,
    /// How many queues an ordered group has, each with one consumer at a time; 8 by default, 1 to 64. Fixed once a group
    /// has been declared: another number is refused.
    pub partitions: usize,
    /// Whether exchange and queues are declared, the default, or only looked for.
    pub declares: bool,
    /// Messages that may be on their way unconfirmed; 1000 by default.
    pub window: usize,
    /// How many messages of each partition of an ordered group lie ready at the member that has it; 256 by default, 1 to 2000. With
    /// large messages, or slow handlers, fewer: times the partitions and the size of messages it is a member's memory. All members
    /// of a group have to have the same, or order is lost when a partition changes hands: change it while none of them runs.
    pub prefetch: u16,
    /// How many bytes of messages may lie ready at a member before it warns that they are many; 256 MiB by default. RabbitMQ counts
    /// messages, not bytes, and quorum queues lose their order if a member takes fewer than the one before it, so that this cannot be
    /// a bound: that is partitions, times `prefetch`, times the size of the largest message.
    pub prefetch_memory: usize,
    /// The most time that connecting, declaring and closing may take, each; 10 s by default.
    pub timeout: Duration,
    /// How long the broker may take to confirm a message; 8 s by default, less than the relay waits for a call, and 100 ms at
    /// least. After that its destination counts as unavailable; it may be stored all the same. A queue that has
    /// lost its majority confirms nothing.
    pub confirm_timeout: Duration,
    /// Between heartbeats, which tell a hung peer from a quiet one; 10 s by default. A paused member keeps its partitions
    /// for up to twice as long.
    pub heartbeat: Duration,
    /// Between two looks at who else is a member of an ordered group; 200 ms by default.
    pub balance_interval: Duration,
    /// How messages are laid out; [`Format::Binary`] by default. Both are read.
    pub format: Format,
    /// What the names of attributes begin with in binary mode; `cloudEvents_` by default. All are read.
    pub attribute_prefix: AttributePrefix,
    /// What the names of groups' queues begin with, so that environments can share a broker; nothing by default. Exchanges are
    /// named by [`exchange`](Self::exchange).
    pub queue_prefix: String,
    /// Further arguments that the queues of groups are declared with, such as `x-max-length` or `x-queue-leader-locator`.
    pub queue_arguments: Vec<(String, AttributeValue)>,
    /// Whether messages go out under the routing key `<topic>`, as a plain client publishes, in place of `<topic>.@.<slot>`; no by
    /// default. An ordered group then gets all of them in its first partition.
    pub plain_routing_keys: bool,
    /// Certificates (PEM) of authorities to trust, in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// A certificate and its key (PEM, PKCS#8) to show to brokers that ask for one; read again for each connection. With
    /// `?auth_mechanism=external` in the address it is the login, too.
    pub client_certificate: Option<(PathBuf, PathBuf)>,
    login: Option<LoginSource>,
    /// What the connections are called in RabbitMQ's own tools; `postrider` by default.
    pub connection_name: String,
}

impl Default for RabbitMqOptions {
    fn default() -> Self {
        Self {
            url: "amqp://guest:guest@localhost:5672/%2f".to_owned(),
            further_urls: Vec::new(),
            exchange: "postrider".to_owned(),
            wildcards: false,
            partitions: 8,
            declares: true,
            window: 1000,
            prefetch: 256,
            prefetch_memory: 256 * 1024 * 1024,
            timeout: Duration::from_secs(10),
            confirm_timeout: Duration::from_secs(8),
            heartbeat: Duration::from_secs(10),
            balance_interval: Duration::from_millis(200),
            format: Format::Binary,
            attribute_prefix: AttributePrefix::default(),
            queue_prefix: String::new(),
            queue_arguments: Vec::new(),
            plain_routing_keys: false,
            ca_file: None,
            client_certificate: None,
            login: None,
            connection_name: "postrider".to_owned(),
        }
    }
}

impl RabbitMqOptions {
    /// The defaults, for the broker at this address.
    #[must_use]
    pub fn new(url: impl Into<String>) -> Self {
        Self {
            url: url.into(),
            ..Self::default()
        }
    }
    /// Adds the address of another node of the cluster: connections are made to any that answers.
    #[must_use]
    pub fn with_further_url(mut self, url: impl Into<String>) -> Self {
        self.further_urls.push(url.into());
        self
    }
    /// Asks for user and password whenever a connection is made, in place of those in the address: for passwords that change. It may
    /// read a file; it runs on a thread for what blocks.
    #[must_use]
    pub fn with_login(mut self, login: impl Fn() -> Result<Login> + Send + Sync + 'static) -> Self {
        self.login = Some(LoginSource(Arc::new(login)));
        self
    }
    pub(crate) fn login(&self) -> Option<&LoginSource> {
        self.login.as_ref()
    }
    /// Sets the exchange.
    #[must_use]
    pub fn with_exchange(mut self, name: impl Into<String>) -> Self {
        self.exchange = name.into();
        self
    }
    /// Lets groups subscribe to patterns of topics.
    #[must_use]
    pub fn with_wildcards(mut self) -> Self {
        self.wildcards = true;
        self
    }
    /// Sets how many queues an ordered group has.
    #[must_use]
    pub fn with_partitions(mut self, count: usize) -> Self {
        self.partitions = count;
        self
    }
    /// Declares nothing: a missing exchange or queue is an error.
    #[must_use]
    pub fn without_declaring(mut self) -> Self {
        self.declares = false;
        self
    }
    /// Sets how many messages may be unconfirmed.
    #[must_use]
    pub fn with_window(mut self, messages: usize) -> Self {
        self.window = messages;
        self
    }
    /// Sets how many messages of each partition of an ordered group lie ready at its member.
    #[must_use]
    pub fn with_prefetch(mut self, messages: u16) -> Self {
        self.prefetch = messages;
        self
    }
    /// Sets how many bytes of messages may lie ready at a member before it warns.
    #[must_use]
    pub fn with_prefetch_memory(mut self, bytes: usize) -> Self {
        self.prefetch_memory = bytes;
        self
    }
    /// Sets the most time that connecting, declaring and closing may take.
    #[must_use]
    pub fn with_timeout(mut self, timeout: Duration) -> Self {
        self.timeout = timeout;
        self
    }
    /// Sets how long the broker may take to confirm a message.
    #[must_use]
    pub fn with_confirm_timeout(mut self, timeout: Duration) -> Self {
        self.confirm_timeout = timeout;
        self
    }
    /// Sets the time between heartbeats.
    #[must_use]
    pub fn with_heartbeat(mut self, every: Duration) -> Self {
        self.heartbeat = every;
        self
    }
    /// Sets the time between two looks at who else is a member.
    #[must_use]
    pub fn with_balance_interval(mut self, every: Duration) -> Self {
        self.balance_interval = every;
        self
    }
    /// Sets how messages are laid out.
    #[must_use]
    pub fn with_format(mut self, format: Format) -> Self {
        self.format = format;
        self
    }
    /// Sets what the names of attributes begin with.
    #[must_use]
    pub fn with_attribute_prefix(mut self, prefix: AttributePrefix) -> Self {
        self.attribute_prefix = prefix;
        self
    }
    /// Sets what the names of groups' queues begin with.
    #[must_use]
    pub fn with_queue_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.queue_prefix = prefix.into();
        self
    }
    /// Declares the queues of groups with this argument, too. Those that order, safety or another option rests on are refused, and
    /// RabbitMQ refuses a queue that is there already with others.
    #[must_use]
    pub fn with_queue_argument(mut self, name: impl Into<String>, value: impl Into<AttributeValue>) -> Self {
        self.queue_arguments.push((name.into(), value.into()));
        self
    }
    /// Publishes under the routing key `<topic>`.
    #[must_use]
    pub fn with_plain_routing_keys(mut self) -> Self {
        self.plain_routing_keys = true;
        self
    }
    /// Shows this certificate, whose key is in the other file, to brokers that ask for one.
    #[must_use]
    pub fn with_client_certificate(mut self, certificate: impl Into<PathBuf>, key: impl Into<PathBuf>) -> Self {
        self.client_certificate = Some((certificate.into(), key.into()));
        self
    }
    /// Trusts the authorities in this file in place of the system's.
    #[must_use]
    pub fn with_ca_file(mut self, file: impl Into<PathBuf>) -> Self {
        self.ca_file = Some(file.into());
        self
    }
    /// Sets what the connections are called.
    #[must_use]
    pub fn with_connection_name(mut self, name: impl Into<String>) -> Self {
        self.connection_name = name.into();
        self
    }

    pub(crate) fn check(&self) -> Result<()> {
        let wrong = |option: &'static str, why: String| {
            Err(
                Error::new(ErrorKind::Config, "an option of the RabbitMQ transport is wrong")
                    .with("option", option)
                    .with("why", why),
            )
        };
        if self.exchange.is_empty() || self.exchange.len() > 200 || self.exchange.starts_with("amq.") {
            return wrong(
                "exchange",
                "a name of 1 to 200 bytes that does not begin with `amq.`".to_owned(),
            );
        }
        if let Some((name, _)) = self
            .queue_arguments
            .iter()
            .find(|(name, _)| OWN_ARGUMENTS.contains(&name.as_str()))
        {
            return wrong("queue_arguments", format!("`{name}` is the transport's own"));
        }
        let is_known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
        if self.queue_prefix.len() > 50 || !self.queue_prefix.chars().all(is_known) {
            return wrong(
                "queue_prefix",
                "up to 50 letters, digits, dots, dashes and underscores".to_owned(),
            );
        }
        if !(1..=64).contains(&self.partitions) {
            return wrong("partitions", format!("{} is not between 1 and 64", self.partitions));
        }
        if self.window == 0 {
            return wrong("window", "at least 1".to_owned());
        }
        if !(1..=2000).contains(&self.prefetch) {
            return wrong("prefetch", "between 1 and 2000".to_owned());
        }
        if self.timeout.is_zero() {
            return wrong("timeout", "more than nothing".to_owned());
        }
        if self.confirm_timeout < Duration::from_millis(100) {
            return wrong("confirm_timeout", "at least 100 ms".to_owned());
        }
        let seconds = self.heartbeat.as_secs();
        if !(1..=3600).contains(&seconds) {
            return wrong("heartbeat", "between 1 s and an hour".to_owned());
        }
        if self.balance_interval < Duration::from_millis(10) {
            return wrong("balance_interval", "at least 10 ms".to_owned());
        }
        Ok(())
    }
}

impl fmt::Debug for RabbitMqOptions {
    /// Everything but the password.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RabbitMqOptions")
            .field("url", &without_password(&self.url))
            .field(
                "further_urls",
                &self
                    .further_urls
                    .iter()
                    .map(|url| without_password(url))
                    .collect::<Vec<_>>(),
            )
            .field("exchange", &self.exchange)
            .field("wildcards", &self.wildcards)
            .field("partitions", &self.partitions)
            .field("declares", &self.declares)
            .field("window", &self.window)
            .field("prefetch", &self.prefetch)
            .field("prefetch_memory", &self.prefetch_memory)
            .field("timeout", &self.timeout)
            .field("confirm_timeout", &self.confirm_timeout)
            .field("heartbeat", &self.heartbeat)
            .field("balance_interval", &self.balance_interval)
            .field("format", &self.format)
            .field("attribute_prefix", &self.attribute_prefix)
            .field("queue_prefix", &self.queue_prefix)
            .field("queue_arguments", &self.queue_arguments)
            .field("plain_routing_keys", &self.plain_routing_keys)
            .field("ca_file", &self.ca_file)
            .field("client_certificate", &self.client_certificate)
            .field("login", &self.login.as_ref().map(|_| "…"))
            .field("connection_name", &self.connection_name)
            .finish()
    }
}

/// An address as an error shows it.
pub(crate) fn without_password(url: &str) -> String {
    let Some((scheme, rest)) = url.split_once("://") else {
        return "(not an address)".to_owned();
    };
    // The last @: a password may hold one that is not escaped.
    match rest.rsplit_once('@') {
        Some((user, place)) => {
            let user = user.split_once(':').map_or(user, |(user, _)| user);
            format!("{scheme}://{user}@{place}")
        }
        None => url.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn passwords_are_not_shown() {
        for (url, shown) in [
            ("amqp://u:secret@h:1/v", "amqp://u@h:1/v"),
            ("amqp://u:sec@ret@h/v", "amqp://u@h/v"),
            ("amqp://h", "amqp://h"),
            ("secret", "(not an address)"),
        ] {
            assert_eq!(without_password(url), shown);
            assert!(!format!("{:?}", RabbitMqOptions::new(url)).contains("sec"));
        }
    }

    #[test]
    fn what_is_wrong_is_named() {
        RabbitMqOptions::default().check().unwrap();
        for (options, name) in [
            (RabbitMqOptions::default().with_partitions(0), "partitions"),
            (RabbitMqOptions::default().with_partitions(65), "partitions"),
            (RabbitMqOptions::default().with_exchange("amq.topic"), "exchange"),
            (RabbitMqOptions::default().with_window(0), "window"),
            (RabbitMqOptions::default().with_prefetch(0), "prefetch"),
            (RabbitMqOptions::default().with_heartbeat(Duration::ZERO), "heartbeat"),
            (
                RabbitMqOptions::default().with_queue_argument("x-overflow", "drop-head"),
                "x-overflow",
            ),
            (RabbitMqOptions::default().with_queue_prefix("a:b"), "queue_prefix"),
        ] {
            assert!(options.check().unwrap_err().to_string().contains(name));
        }
    }
}
