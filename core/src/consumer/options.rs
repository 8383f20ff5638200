use super::Retry;
use crate::{Error, ErrorKind, Result};
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
            receipts: stronger.receipts.or(self.receipts),
        }
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.max_in_flight == Some(0) {
            return Err(Error::new(
                ErrorKind::Config,
                "max_in_flight is 0: it has to be at least 1",
            ));
        }
        if self.receipts == Some(Duration::ZERO) {
            let text = "receipts is 0s: it has to be longer than the broker may deliver a message again";
            return Err(Error::new(ErrorKind::Config, text));
        }
        self.retry.map_or(Ok(()), |retry| retry.validate())
    }
}
