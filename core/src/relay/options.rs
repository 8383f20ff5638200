use super::Backoff;
use crate::{
    Error, ErrorKind, Result, Topic,
    log::{Lease, Stored},
};
use std::{fmt, sync::Arc, time::Duration};

/// What to do when a record has failed for good.
pub type ExhaustedFn = Arc<dyn Fn(&Stored) + Send + Sync>;

/// How a relay works. Every default is in the table of `docs::options` of the facade.
#[derive(Clone)]
#[non_exhaustive]
pub struct RelayOptions {
    /// The most records of one claim and of one publish call. 1000.
    pub batch_size: usize,
    /// The most records the relay holds at once: claimed and not yet settled. 8000.
    pub max_in_flight: usize,
    /// The most bytes of payload the relay holds at once; a claim may go beyond it by one message. 64 MiB.
    pub max_in_flight_bytes: usize,
    /// The most messages with the publisher at once. Default: 4000. Messages that are ready wait up to 20 ms for more to go
    /// with them while fewer are ready than a third of these. Topics that do not answer while others do are left out.
    pub max_publishing: usize,
    /// How often to look for records nobody told of: what other processes have written. 500 ms. A log may look for all
    /// mailboxes of the process at once.
    pub poll_interval: Duration,
    /// How long the others wait for a relay that fell silent. 15 s, at least 300 ms; renewed every third of it, and
    /// counted here as held for four fifths of it.
    pub lease: Duration,
    /// The longest a publish call may take before its outcome counts as unknown. 10 s, and never beyond the lease.
    pub publish_timeout: Duration,
    /// Tries of one attempt: the first and those of the local tier. 3.
    pub local_max_attempts: u32,
    /// Between the tries of one attempt. 3 s.
    pub local_interval: Duration,
    /// The longest a record stays in the local tier. 60 s.
    pub local_queue_expiry: Duration,
    /// Attempts before a record is a dead letter. 10.
    pub max_attempts: u32,
    /// Between attempts. Full jitter from 1 s to 60 s.
    pub backoff: Backoff,
    /// How long after its first refusal a record is left to the relay that was refused, should that one die. 60 s.
    pub min_retry_interval: Duration,
    /// The most parked records, each with its followers, in one claim. 100.
    pub retry_batch: usize,
    /// How long what succeeded is kept; zero deletes it at once. 24 h.
    pub retention: Duration,
    /// How long dead letters are kept. For ever, unless set.
    pub failed_retention: Option<Duration>,
    /// How often to clean up. 300 s.
    pub cleanup_interval: Duration,
    /// How many records one step of the clean-up removes; repeated until done. 1000.
    pub cleanup_batch: u64,
    /// Between probes of a broker or destination that is away: doubling from 100 ms up to this. 10 s.
    pub max_probe_interval: Duration,
    /// Told of each record that has become a dead letter, after that is stored. Must not block; a panic is caught.
    pub on_exhausted: Option<ExhaustedFn>,
    /// What a topic does otherwise. The first pattern that matches counts.
    pub topics: Vec<(TopicPattern, TopicOptions)>,
}

impl Default for RelayOptions {
    fn default() -> Self {
        Self {
            batch_size: 1000,
            max_in_flight: 8000,
            max_in_flight_bytes: 64 * 1024 * 1024,
            max_publishing: 4000,
            poll_interval: Duration::from_millis(500),
            lease: Duration::from_secs(15),
            publish_timeout: Duration::from_secs(10),
            local_max_attempts: 3,
            local_interval: Duration::from_secs(3),
            local_queue_expiry: Duration::from_secs(60),
            max_attempts: 10,
            backoff: Backoff::default(),
            min_retry_interval: Duration::from_secs(60),
            retry_batch: 100,
            retention: Duration::from_secs(24 * 3600),
            failed_retention: None,
            cleanup_interval: Duration::from_secs(300),
            cleanup_batch: 1000,
            max_probe_interval: Duration::from_secs(10),
            on_exhausted: None,
            topics: Vec::new(),
        }
    }
}

macro_rules! setters {
    ($($(#[$doc:meta])* $with:ident, $field:ident: $type:ty;)*) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $with(mut self, $field: $type) -> Self {
            self.$field = $field;
            self
        }
    )*};
}

impl RelayOptions {
    setters! {
        /// Sets the most records of one claim and of one publish call.
        with_batch_size, batch_size: usize;
        /// Sets the most records held at once.
        with_max_in_flight, max_in_flight: usize;
        /// Sets the most bytes of payload held at once.
        with_max_in_flight_bytes, max_in_flight_bytes: usize;
        /// Sets the most messages with the publisher at once.
        with_max_publishing, max_publishing: usize;
        /// Sets how often to look for records nobody told of.
        with_poll_interval, poll_interval: Duration;
        /// Sets how long the others wait for a relay that fell silent.
        with_lease, lease: Duration;
        /// Sets the longest a publish call may take.
        with_publish_timeout, publish_timeout: Duration;
        /// Sets the tries of one attempt.
        with_local_max_attempts, local_max_attempts: u32;
        /// Sets the time between the tries of one attempt.
        with_local_interval, local_interval: Duration;
        /// Sets the longest a record stays in the local tier.
        with_local_queue_expiry, local_queue_expiry: Duration;
        /// Sets the attempts before a record is a dead letter.
        with_max_attempts, max_attempts: u32;
        /// Sets the time between attempts.
        with_backoff, backoff: Backoff;
        /// Sets how long a refused record is left to the relay that was refused.
        with_min_retry_interval, min_retry_interval: Duration;
        /// Sets the most parked records in one claim.
        with_retry_batch, retry_batch: usize;
        /// Sets how long what succeeded is kept.
        with_retention, retention: Duration;
        /// Sets how often to clean up.
        with_cleanup_interval, cleanup_interval: Duration;
        /// Sets how many records one step of the clean-up removes.
        with_cleanup_batch, cleanup_batch: u64;
        /// Sets the longest time between probes.
        with_max_probe_interval, max_probe_interval: Duration;
    }

    /// Removes dead letters after this long. They are lost by it.
    #[must_use]
    pub fn with_failed_retention(mut self, retention: Duration) -> Self {
        self.failed_retention = Some(retention);
        self
    }

    /// Tells `callback` of each record that has become a dead letter. At most once each: a crash in between loses the
    /// call, the log still has the record.
    #[must_use]
    pub fn on_exhausted(mut self, callback: impl Fn(&Stored) + Send + Sync + 'static) -> Self {
        self.on_exhausted = Some(Arc::new(callback));
        self
    }

    /// Lets the topics that match `pattern` do otherwise.
    #[must_use]
    pub fn topic(mut self, pattern: TopicPattern, options: TopicOptions) -> Self {
        self.topics.push((pattern, options));
        self
    }

    /// Whether the options make sense.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] that names the option, its value and what it may be.
    pub fn validate(&self) -> Result<()> {
        let counts = [
            ("batch_size", self.batch_size),
            ("max_in_flight_bytes", self.max_in_flight_bytes),
            ("max_publishing", self.max_publishing),
            ("retry_batch", self.retry_batch),
            ("local_max_attempts", self.local_max_attempts as usize),
            ("max_attempts", self.max_attempts as usize),
            (
                "cleanup_batch",
                usize::try_from(self.cleanup_batch).unwrap_or(usize::MAX),
            ),
        ];
        for (name, count) in counts {
            if count == 0 {
                return Err(wrong(name, "0", "at least 1"));
            }
        }
        let times = [
            ("poll_interval", self.poll_interval),
            ("publish_timeout", self.publish_timeout),
            ("local_interval", self.local_interval),
            ("local_queue_expiry", self.local_queue_expiry),
            ("min_retry_interval", self.min_retry_interval),
            ("cleanup_interval", self.cleanup_interval),
            ("max_probe_interval", self.max_probe_interval),
        ];
        for (name, time) in times {
            if time.is_zero() {
                return Err(wrong(name, "0s", "longer than zero"));
            }
        }
        if self.failed_retention == Some(Duration::ZERO) {
            return Err(wrong(
                "failed_retention",
                "0s",
                "longer than zero; leave it out to keep dead letters",
            ));
        }
        if self.max_in_flight < self.batch_size {
            let least = format!("at least batch_size, {}", self.batch_size);
            return Err(wrong("max_in_flight", self.max_in_flight, least));
        }
        check_backoff(self.backoff)?;
        for (pattern, options) in &self.topics {
            if options.max_attempts == Some(0) || options.local_max_attempts == Some(0) {
                return Err(wrong("max_attempts", "0", "at least 1").with("topics", &pattern.0));
            }
            if let Some(backoff) = options.backoff {
                check_backoff(backoff).map_err(|e| e.with("topics", &pattern.0))?;
            }
        }
        Lease::check(self.lease).map_err(|e| e.with("option", "relay.lease"))
    }

    /// What becomes of a key of `topic` whose record failed.
    pub(crate) fn holds_key(&self, topic: &Topic) -> bool {
        self.of(topic).on_failed == OnFailed::HoldKey
    }

    /// What of the topics' options holds for inboxes, too: what becomes of keys. The rest is about publishing.
    pub(crate) fn topics_of_inbox(&self) -> Vec<(TopicPattern, TopicOptions)> {
        let of_inbox = |options: &TopicOptions| TopicOptions::default().with_on_failed(options.on_failed);
        let topics = self.topics.iter();
        topics
            .map(|(pattern, options)| (pattern.clone(), of_inbox(options)))
            .collect()
    }

    /// What holds for `topic`.
    pub(super) fn of(&self, topic: &Topic) -> OfTopic {
        let found = self.topics.iter().find(|(pattern, _)| pattern.matches(topic));
        let options = found.map(|(_, options)| *options).unwrap_or_default();
        OfTopic {
            max_attempts: options.max_attempts.unwrap_or(self.max_attempts),
            local_max_attempts: options.local_max_attempts.unwrap_or(self.local_max_attempts),
            backoff: options.backoff.unwrap_or(self.backoff),
            order: options.order,
            on_failed: options.on_failed,
            unroutable: options.unroutable,
        }
    }
}

fn check_backoff(backoff: Backoff) -> Result<()> {
    let wrong = |wrong| Error::new(ErrorKind::Config, format!("relay.backoff is {wrong}"));
    backoff.check().map_err(wrong)
}

fn wrong(option: &str, given: impl fmt::Display, may_be: impl fmt::Display) -> Error {
    Error::new(
        ErrorKind::Config,
        format!("relay.{option} is {given}: it has to be {may_be}"),
    )
}

impl fmt::Debug for RelayOptions {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("RelayOptions")
            .field("batch_size", &self.batch_size)
            .field("max_in_flight", &self.max_in_flight)
            .field("poll_interval", &self.poll_interval)
            .field("lease", &self.lease)
            .field("local_max_attempts", &self.local_max_attempts)
            .field("max_attempts", &self.max_attempts)
            .field("backoff", &self.backoff)
            .field("retention", &self.retention)
            .field("topics", &self.topics)
            .finish_non_exhaustive()
    }
}

/// Some topics: a name, or a beginning followed by `*`, such as `orders.*`.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct TopicPattern(String);

impl TopicPattern {
    /// A pattern.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if it is empty, or has a `*` elsewhere than at its end.
    pub fn parse(pattern: impl Into<String>) -> Result<Self> {
        let pattern = pattern.into();
        match pattern.find('*') {
            None if !pattern.is_empty() => Ok(Self(pattern)),
            Some(at) if at + 1 == pattern.len() => Ok(Self(pattern)),
            _ => Err(Error::new(
                ErrorKind::Config,
                "not a pattern of topics: expected a name, or a beginning followed by `*`, such as `orders.*`",
            )
            .with("pattern", format!("{pattern:?}"))),
        }
    }

    /// As it was written.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// The topic, if it names one.
    #[must_use]
    pub fn as_topic(&self) -> Option<Topic> {
        let name = Some(&self.0).filter(|name| !name.ends_with('*'))?;
        Topic::parse(name.clone()).ok()
    }

    /// Whether a topic is one of them.
    #[must_use]
    pub fn matches(&self, topic: &Topic) -> bool {
        match self.0.strip_suffix('*') {
            Some(beginning) => topic.as_str().starts_with(beginning),
            None => topic.as_str() == self.0,
        }
    }
}

impl From<Topic> for TopicPattern {
    fn from(topic: Topic) -> Self {
        Self(topic.as_str().to_owned())
    }
}

impl fmt::Display for TopicPattern {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

/// What some topics do otherwise; what is left out is as for the others.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct TopicOptions {
    /// Attempts before a record is a dead letter.
    pub max_attempts: Option<u32>,
    /// Tries of one attempt.
    pub local_max_attempts: Option<u32>,
    /// Between attempts.
    pub backoff: Option<Backoff>,
    /// How a key's messages are sent.
    pub order: SendOrder,
    /// What becomes of a key whose record failed.
    pub on_failed: OnFailed,
    /// What becomes of messages that lead nowhere.
    pub unroutable: Unroutable,
}

impl TopicOptions {
    /// Sets the attempts before a record is a dead letter.
    #[must_use]
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = Some(attempts);
        self
    }
    /// Sets the tries of one attempt.
    #[must_use]
    pub fn with_local_max_attempts(mut self, tries: u32) -> Self {
        self.local_max_attempts = Some(tries);
        self
    }
    /// Sets the time between attempts.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = Some(backoff);
        self
    }
    /// Sets how a key's messages are sent.
    #[must_use]
    pub fn with_order(mut self, order: SendOrder) -> Self {
        self.order = order;
        self
    }
    /// Sets what becomes of a key whose record failed.
    #[must_use]
    pub fn with_on_failed(mut self, on_failed: OnFailed) -> Self {
        self.on_failed = on_failed;
        self
    }
    /// Sets what becomes of messages that lead nowhere.
    #[must_use]
    pub fn with_unroutable(mut self, unroutable: Unroutable) -> Self {
        self.unroutable = unroutable;
        self
    }
}

/// How the messages of one key are sent.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum SendOrder {
    /// One at a time: a refusal is never overtaken.
    #[default]
    Strict,
    /// A key's run at once: faster on one hot key, and a refused message may be overtaken by those behind it.
    Pipelined,
}

/// What becomes of a key whose record failed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFailed {
    /// The next of the key goes on.
    #[default]
    ReleaseKey,
    /// The key waits until a person has redriven or discarded the failed record: in the outbox, and in the inboxes of groups that
    /// ask for order.
    HoldKey,
}

/// What becomes of messages whose topic leads nowhere.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum Unroutable {
    /// They wait until it leads somewhere.
    #[default]
    Wait,
    /// They count as sent, and are counted as dropped.
    Drop,
}

/// The options as they hold for one topic.
#[derive(Debug, Clone, Copy)]
pub(super) struct OfTopic {
    pub(super) max_attempts: u32,
    pub(super) local_max_attempts: u32,
    pub(super) backoff: Backoff,
    pub(super) order: SendOrder,
    pub(super) on_failed: OnFailed,
    pub(super) unroutable: Unroutable,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_makes_no_sense_is_named() {
        RelayOptions::default().validate().unwrap();
        let zero = Duration::ZERO;
        let base = RelayOptions::default;
        for (options, says) in [
            (
                base().with_batch_size(0),
                "relay.batch_size is 0: it has to be at least 1",
            ),
            (
                base().with_max_in_flight(10),
                "relay.max_in_flight is 10: it has to be at least batch_size",
            ),
            (base().with_poll_interval(zero), "relay.poll_interval is 0s"),
            (base().with_lease(Duration::from_millis(50)), "option: relay.lease"),
            (base().with_backoff(Backoff::Fixed(zero)), "relay.backoff is 0s"),
            (base().with_failed_retention(zero), "relay.failed_retention is 0s"),
            (
                base().topic(
                    TopicPattern::parse("a").unwrap(),
                    TopicOptions::default().with_backoff(Backoff::Fixed(zero)),
                ),
                "relay.backoff is 0s",
            ),
            (base().with_max_attempts(0), "relay.max_attempts is 0"),
        ] {
            let error = options.validate().unwrap_err();
            assert!(error.to_string().contains(says), "{error}");
        }
        base().with_retention(zero).validate().unwrap();
    }

    #[test]
    fn the_first_pattern_that_matches_counts() {
        let options = RelayOptions::default()
            .topic(
                TopicPattern::parse("a.b").unwrap(),
                TopicOptions::default().with_max_attempts(1),
            )
            .topic(
                TopicPattern::parse("a.*").unwrap(),
                TopicOptions::default().with_max_attempts(2),
            );
        let attempts = |topic| options.of(&Topic::new(topic)).max_attempts;
        assert_eq!((attempts("a.b"), attempts("a.c"), attempts("ab")), (1, 2, 10));
        assert!(TopicPattern::parse("*.a").is_err() && TopicPattern::parse("").is_err());
    }
}
