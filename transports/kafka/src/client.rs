//! What producers and consumers have in common.

use crate::config::KafkaOptions;
use postrider_core::{Error, ErrorKind, Result};
use rdkafka::{
    ClientConfig, ClientContext,
    client::OAuthToken,
    config::RDKafkaLogLevel,
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::ProducerContext,
};
use std::{
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Where the brokers are, and how to talk to them.
#[derive(Debug, Clone)]
pub(crate) struct Cluster(Arc<Inner>);

#[derive(Debug)]
struct Inner {
    options: KafkaOptions,
    /// Why a broker could not be reached the last time, and when that was: with an error the client says only that it was so.
    trouble: Mutex<Option<(Instant, String)>>,
}

/// For so long what was said of a broker explains errors.
const RECENT: Duration = Duration::from_secs(30);

/// What brokers say to a way of telling the password that they do not have.
const NO_MECHANISM: &str = "Unsupported SASL mechanism";

impl Cluster {
    pub(crate) fn new(options: KafkaOptions) -> Self {
        Self(Arc::new(Inner {
            options,
            trouble: Mutex::default(),
        }))
    }

    pub(crate) fn options(&self) -> &KafkaOptions {
        &self.0.options
    }

    fn trouble(&self) -> MutexGuard<'_, Option<(Instant, String)>> {
        self.0.trouble.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What a client says of itself, in one of its threads: it goes to `tracing`.
    pub(crate) fn said(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        match level {
            RDKafkaLogLevel::Emerg | RDKafkaLogLevel::Alert | RDKafkaLogLevel::Critical | RDKafkaLogLevel::Error => {
                tracing::warn!(facility, "librdkafka: {text}");
            }
            // Whatever it cannot reach it says again and again.
            _ => tracing::debug!(facility, "librdkafka: {text}"),
        }
        if facility == "FAIL" {
            *self.trouble() = Some((Instant::now(), text.to_owned()));
        }
    }

    /// A token to log in with.
    pub(crate) fn token(&self) -> std::result::Result<OAuthToken, Box<dyn std::error::Error>> {
        let source = self.options().token().ok_or("there is no token")?;
        // It runs on the client's own threads, which nobody would start again.
        let asked = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| (source.0)()));
        let panicked = |_| Err(Error::new(ErrorKind::Unexpected, "what gives tokens has panicked"));
        let token = asked.unwrap_or_else(panicked).inspect_err(|error| {
            *self.trouble() = Some((Instant::now(), format!("no token: {}", error.to_chain())));
        })?;
        Ok(OAuthToken {
            token: token.value,
            principal_name: token.principal,
            lifetime_ms: token.expires_at.timestamp_millis(),
        })
    }

    /// Why a broker could not be reached, if that was lately.
    fn recent_trouble(&self) -> Option<String> {
        let trouble = self.trouble();
        let recent = trouble.as_ref().filter(|(at, _)| at.elapsed() < RECENT);
        recent.map(|(_, reason)| reason.clone())
    }

    /// Why no broker answers, as far as is known.
    pub(crate) fn why_silent(&self) -> String {
        let why = self.recent_trouble();
        why.unwrap_or_else(|| format!("no broker answers of {}", self.options().brokers))
    }

    /// What whoever joins a group is told: of a login that brokers can never take, that it is no outage.
    pub(crate) fn while_joining(&self, error: Error) -> Error {
        let is_login = self.recent_trouble().is_some_and(|why| why.contains(NO_MECHANISM));
        match &self.options().login {
            Some(login) if is_login && error.kind() == ErrorKind::Unavailable => {
                let text = "the brokers of Kafka do not take a login by this mechanism: use one of theirs";
                Error::new(ErrorKind::Config, text)
                    .with("mechanism", &login.mechanism)
                    .because(error)
            }
            _ => error,
        }
    }

    /// What went wrong while `doing` something.
    pub(crate) fn failed(&self, doing: &'static str) -> impl Fn(KafkaError) -> Error {
        move |why| {
            let kind = kind_of(&why);
            let error = Error::new(kind, "Kafka failed").with("doing", doing);
            let error = match kind {
                ErrorKind::Unavailable => error.with("brokers", &self.options().brokers),
                _ => error,
            };
            let error = error.because(why);
            match self.recent_trouble().filter(|_| kind == ErrorKind::Unavailable) {
                Some(reason) => error.with("reason", reason),
                None => error,
            }
        }
    }

    /// The same, and what else the client is to be told: last, so that it counts.
    pub(crate) fn with_properties(&self, mut config: ClientConfig) -> ClientConfig {
        for (name, value) in &self.options().properties {
            config.set(name, value);
        }
        config
    }

    /// Whether the client knows what it is told, and can read what it is to read.
    pub(crate) fn check(&self) -> Result<()> {
        if let Some(file) = &self.options().ca_file {
            std::fs::File::open(file).map_err(|why| {
                Error::new(ErrorKind::Config, "the certificates to trust cannot be read")
                    .with("ca_file", file)
                    .because(why)
            })?;
        }
        let mut config = self.with_properties(self.config());
        for (_, name, value) in &self.options().group_properties {
            config.set(name, value);
        }
        config.create_native_config().map(drop).map_err(|why| {
            let text = "librdkafka does not know a property, or takes no such value for it";
            let error = Error::new(ErrorKind::Config, text);
            // Not its own words, which have the value in them.
            match why {
                KafkaError::ClientConfig(_, _, name, _) => error.with("property", name),
                _ => error,
            }
        })
    }

    pub(crate) fn config(&self) -> ClientConfig {
        let options = self.options();
        let mut config = ClientConfig::new();
        config
            .set("bootstrap.servers", &options.brokers)
            .set("client.id", &options.client_id)
            .set("socket.nagle.disable", "true")
            .set("reconnect.backoff.ms", "50")
            .set("reconnect.backoff.max.ms", "2000")
            // A topic that is missing is told of soon; one that was just made is waited for.
            .set("topic.metadata.propagation.max.ms", "3000")
            .set("topic.metadata.refresh.fast.interval.ms", "50");
        let protocol = match (options.tls, options.login.is_some() || options.token().is_some()) {
            (false, false) => "plaintext",
            (true, false) => "ssl",
            (false, true) => "sasl_plaintext",
            (true, true) => "sasl_ssl",
        };
        config.set("security.protocol", protocol);
        if let Some(login) = &options.login {
            config
                .set("sasl.mechanism", &login.mechanism)
                .set("sasl.username", &login.user)
                .set("sasl.password", &login.password);
        }
        if options.token().is_some() {
            config.set("sasl.mechanism", "OAUTHBEARER");
        }
        if let Some(file) = &options.ca_file {
            config.set("ssl.ca.location", file);
        }
        config.set_log_level(RDKafkaLogLevel::Warning);
        config
    }
}

/// What a client that needs no more tells.
#[derive(Debug, Clone)]
pub(crate) struct Quiet(pub(crate) Cluster);

impl ClientContext for Quiet {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, _: Option<&str>) -> std::result::Result<OAuthToken, Box<dyn std::error::Error>> {
        self.0.token()
    }
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.0.said(level, facility, text);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, "librdkafka: {reason}");
    }
}

impl ProducerContext for Quiet {
    type DeliveryOpaque = ();

    fn delivery(&self, _: &DeliveryResult<'_>, (): ()) {}
}

/// Runs what blocks on a thread for it.
pub(crate) async fn off_thread<T: Send + 'static>(work: impl FnOnce() -> T + Send + 'static) -> Result<T> {
    let done = tokio::task::spawn_blocking(work).await;
    done.map_err(|why| Error::new(ErrorKind::Unexpected, "a thread for Kafka has ended").because(why))
}

fn kind_of(error: &KafkaError) -> ErrorKind {
    match error.rdkafka_error_code() {
        Some(
            RDKafkaErrorCode::TopicAuthorizationFailed
            | RDKafkaErrorCode::GroupAuthorizationFailed
            | RDKafkaErrorCode::ClusterAuthorizationFailed
            | RDKafkaErrorCode::InvalidConfig
            | RDKafkaErrorCode::UnknownTopicOrPartition
            | RDKafkaErrorCode::UnknownTopic,
        ) => ErrorKind::Config,
        _ if matches!(error, KafkaError::ClientConfig(..)) => ErrorKind::Config,
        _ => ErrorKind::Unavailable,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_else_the_client_is_told_counts() {
        let options = KafkaOptions::new("h:1").with_property("reconnect.backoff.ms", "7");
        let cluster = Cluster::new(options);
        assert_eq!(cluster.config().get("reconnect.backoff.ms"), Some("50"));
        let config = cluster.with_properties(cluster.config());
        assert_eq!(config.get("reconnect.backoff.ms"), Some("7"));
    }
}
