use crate::{Error, ErrorKind, Result, relay::Backoff};
use std::time::Duration;

/// How a message is tried again: a few times in place, then from the inbox, which it waits in while others pass.
///
/// Each run of the chain is an attempt. In place means few and short waits, since the message's key and a slot wait with it;
/// parked in the inbox it holds up nobody but later ones of its key, for as long as it takes, also through restarts. Without
/// an inbox (no event log, or a broadcast) all attempts are made in place, or with the broker where that can wait
/// ([`delayed_retry`](crate::Capabilities::delayed_retry), unordered groups).
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(default, deny_unknown_fields)]
#[non_exhaustive]
pub struct Retry {
    /// Attempts in all, before the message is a dead letter. 10.
    pub max_attempts: u32,
    /// How many of them in place. 3.
    pub in_place: u32,
    /// The wait after the first attempt in place; it doubles. 50 ms.
    #[serde(with = "humantime_serde")]
    pub first_wait: Duration,
    /// The longest wait in place. 2 s.
    #[serde(with = "humantime_serde")]
    pub max_wait: Duration,
    /// The waits in the inbox. Full jitter from 1 s to 60 s.
    pub backoff: Backoff,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_attempts: 10,
            in_place: 3,
            first_wait: Duration::from_millis(50),
            max_wait: Duration::from_secs(2),
            backoff: Backoff::default(),
        }
    }
}

impl Retry {
    /// One attempt.
    #[must_use]
    pub fn none() -> Self {
        Self::default().with_max_attempts(1)
    }
    /// Sets the attempts in all.
    #[must_use]
    pub fn with_max_attempts(mut self, attempts: u32) -> Self {
        self.max_attempts = attempts;
        self
    }
    /// Sets how many of them are made in place; at least 1.
    #[must_use]
    pub fn with_in_place(mut self, attempts: u32) -> Self {
        self.in_place = attempts;
        self
    }
    /// Sets the first and the longest wait in place.
    #[must_use]
    pub fn with_waits(mut self, first: Duration, max: Duration) -> Self {
        self.first_wait = first;
        self.max_wait = max;
        self
    }
    /// Sets the waits in the inbox.
    #[must_use]
    pub fn with_backoff(mut self, backoff: Backoff) -> Self {
        self.backoff = backoff;
        self
    }

    pub(super) fn validate(&self) -> Result<()> {
        for (name, count) in [("max_attempts", self.max_attempts), ("in_place", self.in_place)] {
            if count == 0 {
                let text = format!("retry.{name} is 0: it has to be at least 1");
                return Err(Error::new(ErrorKind::Config, text));
            }
        }
        if self.first_wait.is_zero() || self.max_wait < self.first_wait {
            let text = "retry waits have to be longer than zero, the longest no shorter than the first";
            return Err(Error::new(ErrorKind::Config, text)
                .with("first_wait", format!("{:?}", self.first_wait))
                .with("max_wait", format!("{:?}", self.max_wait)));
        }
        self.backoff
            .check()
            .map_err(|wrong| Error::new(ErrorKind::Config, format!("retry.backoff is {wrong}")))
    }

    /// The wait after `attempts` in place that failed, with half of it left to chance.
    pub(super) fn wait_after(&self, attempts: u32) -> Duration {
        let doubled = self.first_wait.saturating_mul(1 << attempts.saturating_sub(1).min(20));
        let wait = doubled.min(self.max_wait);
        wait / 2 + (wait / 2).mul_f64(fastrand::f64())
    }
}
