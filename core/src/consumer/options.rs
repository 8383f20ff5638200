use super::Retry;
use crate::{Error, ErrorKind, GroupName, Result, Subscription, Topic, clock::LONGEST, subscriber::QueueOptions};
use serde::Deserialize;
use std::time::Duration;

/// What becomes of messages of types that a group does not handle.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Unknown {
    /// They are acknowledged, and counted as ignored.
    #[default]
    Ack,
    /// They are dead letters.
    DeadLetter,
}

/// What becomes of a message whose attempts are exhausted, unless a middleware has a verdict.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum OnExhausted {
    /// It is a dead letter.
    #[default]
    DeadLetter,
    /// As the verdict [`Requeue`](super::Verdict::Requeue) says: it is tried for ever.
    Requeue,
}

/// How a subscription works: in code by [`Subscribing::options`](super::Subscribing::options), in a configuration file as
/// `[subscriptions.<group>]`, which counts where both say something. What is left out is as the default says.
#[derive(Debug, Clone, Default, PartialEq, Eq, Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct SubscriptionOptions {
    /// How many messages may be taken from the broker and not yet settled. 256.
    pub max_in_flight: Option<usize>,
    /// How messages are tried again.
    pub retry: Option<Retry>,
    /// Whether the order of keys is asked for. By default it is where an event type has a key.
    pub ordered: Option<bool>,
    /// Whether each instance gets every event. Not by default.
    pub broadcast: Option<bool>,
    /// What becomes of messages of types that the group does not handle.
    pub unknown: Option<Unknown>,
    /// What becomes of a message whose attempts are exhausted. A dead letter, unless told otherwise.
    pub on_exhausted: Option<OnExhausted>,
    /// Removes the group's queue when nobody has used it for so long. This and the four below are the broker's affair: where
    /// a transport does not [honour](crate::Capabilities::queue_options) one, the start is refused.
    #[serde(with = "humantime_serde")]
    pub queue_expiry: Option<Duration>,
    /// Removes messages that have waited so long.
    #[serde(with = "humantime_serde")]
    pub message_expiry: Option<Duration>,
    /// Where messages go that expire, and dead letters where there is no event log.
    pub dead_letter_to: Option<String>,
    /// The exchange or stream to take from, in place of the transport's own: it has to be there.
    pub bind: Option<String>,
    /// Whether the group's queue is declared, or has to be there.
    pub declare: Option<bool>,
    /// How long the receipts of handled messages are kept: longer than the broker may deliver a message again. 7 days.
    #[serde(with = "humantime_serde")]
    pub receipts: Option<Duration>,
}

macro_rules! setters {
    ($($(#[$doc:meta])* $with:ident, $field:ident: $type:ty;)*) => {$(
        $(#[$doc])*
        #[must_use]
        pub fn $with(mut self, $field: $type) -> Self {
            self.$field = Some($field);
            self
        }
    )*};
}

impl SubscriptionOptions {
    setters! {
        /// Sets how many messages may be taken and not yet settled.
        with_max_in_flight, max_in_flight: usize;
        /// Sets how messages are tried again.
        with_retry, retry: Retry;
        /// Sets whether the order of keys is asked for.
        with_ordered, ordered: bool;
        /// Sets whether each instance gets every event.
        with_broadcast, broadcast: bool;
        /// Sets what becomes of messages of types that the group does not handle.
        with_unknown, unknown: Unknown;
        /// Sets what becomes of a message whose attempts are exhausted.
        with_on_exhausted, on_exhausted: OnExhausted;
        /// Sets when the group's queue is removed that nobody uses.
        with_queue_expiry, queue_expiry: Duration;
        /// Sets when messages are removed that wait.
        with_message_expiry, message_expiry: Duration;
        /// Sets where messages go that expire, and dead letters where there is no event log.
        with_dead_letter_to, dead_letter_to: String;
        /// Sets the exchange or stream to take from.
        with_bind, bind: String;
        /// Sets whether the group's queue is declared.
        with_declare, declare: bool;
        /// Sets how long the receipts of handled messages are kept.
        with_receipts, receipts: Duration;
    }

    /// These, with what `stronger` says in their place.
    #[must_use]
    pub(super) fn overridden_by(self, stronger: &Self) -> Self {
        Self {
            max_in_flight: stronger.max_in_flight.or(self.max_in_flight),
            retry: stronger.retry.or(self.retry),
            ordered: stronger.ordered.or(self.ordered),
            broadcast: stronger.broadcast.or(self.broadcast),
            unknown: stronger.unknown.or(self.unknown),
            on_exhausted: stronger.on_exhausted.or(self.on_exhausted),
            queue_expiry: stronger.queue_expiry.or(self.queue_expiry),
            message_expiry: stronger.message_expiry.or(self.message_expiry),
            dead_letter_to: stronger.dead_letter_to.clone().or(self.dead_letter_to),
            bind: stronger.bind.clone().or(self.bind),
            declare: stronger.declare.or(self.declare),
            receipts: stronger.receipts.or(self.receipts),
        }
    }

    /// What is the broker's affair.
    pub(super) fn queue(&self) -> QueueOptions {
        QueueOptions {
            // "Never" is what the broker does without being told.
            expiry: self.queue_expiry.filter(|expiry| *expiry < LONGEST),
            message_expiry: self.message_expiry.filter(|expiry| *expiry < LONGEST),
            dead_letter_to: self.dead_letter_to.clone(),
            bind: self.bind.clone(),
            declare: self.declare,
        }
    }

    /// What these make of a group's topics for the broker; `keyed` says whether an event type has a key.
    pub(crate) fn describe(&self, group: GroupName, topics: Vec<Topic>, keyed: bool) -> Result<Subscription> {
        self.validate().map_err(|error| error.with("group", &group))?;
        let max_in_flight = self.max_in_flight.unwrap_or(256);
        let mut subscription = Subscription::new(group, topics).with_max_in_flight(max_in_flight);
        subscription.ordered = self.ordered.unwrap_or(keyed);
        subscription.broadcast = self.broadcast.unwrap_or(false);
        subscription.queue = self.queue();
        Ok(subscription)
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.max_in_flight == Some(0) {
            return Err(Error::new(
                ErrorKind::Config,
                "max_in_flight is 0: it has to be at least 1",
            ));
        }
        for (name, time) in [
            ("queue_expiry", self.queue_expiry),
            ("message_expiry", self.message_expiry),
        ] {
            if time.is_some_and(|time| time < Duration::from_millis(1)) {
                let text = format!("{name} is {:?}: it has to be at least 1 ms", time.unwrap_or_default());
                return Err(Error::new(ErrorKind::Config, text));
            }
        }
        if self.receipts == Some(Duration::ZERO) {
            let text = "receipts is 0s: it has to be longer than the broker may deliver a message again";
            return Err(Error::new(ErrorKind::Config, text));
        }
        self.retry.map_or(Ok(()), |retry| retry.validate())
    }
}
