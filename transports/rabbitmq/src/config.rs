use postrider_core::{Error, ErrorKind, Result, wire::Format};
use std::{fmt, path::PathBuf, time::Duration};

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

/// Options of the RabbitMQ transport.
#[derive(Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct RabbitMqOptions {
    /// The address: `amqp://user:password@host:5672/vhost`, or `amqps://` for TLS.
    pub url: String,
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
    /// Certificates (PEM) of authorities to trust, in place of the system's.
    pub ca_file: Option<PathBuf>,
    /// What the connections are called in RabbitMQ's own tools; `postrider` by default.
    pub connection_name: String,
}

impl Default for RabbitMqOptions {
    fn default() -> Self {
        Self {
            url: "amqp://guest:guest@localhost:5672/%2f".to_owned(),
            exchange: "postrider".to_owned(),
            wildcards: false,
            partitions: 8,
            declares: true,
            window: 1000,
            prefetch: 256,
            timeout: Duration::from_secs(10),
            confirm_timeout: Duration::from_secs(8),
            heartbeat: Duration::from_secs(10),
            balance_interval: Duration::from_millis(200),
            format: Format::Binary,
            attribute_prefix: AttributePrefix::default(),
            ca_file: None,
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
            .field("exchange", &self.exchange)
            .field("wildcards", &self.wildcards)
            .field("partitions", &self.partitions)
            .field("declares", &self.declares)
            .field("window", &self.window)
            .field("prefetch", &self.prefetch)
            .field("timeout", &self.timeout)
            .field("confirm_timeout", &self.confirm_timeout)
            .field("heartbeat", &self.heartbeat)
            .field("balance_interval", &self.balance_interval)
            .field("format", &self.format)
            .field("attribute_prefix", &self.attribute_prefix)
            .field("ca_file", &self.ca_file)
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
        ] {
            assert!(options.check().unwrap_err().to_string().contains(name));
        }
    }
}
