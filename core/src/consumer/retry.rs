use crate::{Error, ErrorKind, Result};
use std::time::Duration;

/// How a chain is tried again in place: few times and short waits, since the message's key and a slot wait with it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Retry {
    /// Attempts in all. 3.
    pub max_attempts: u32,
    /// The wait after the first attempt; it doubles. 50 ms.
    pub first_wait: Duration,
    /// The longest wait. 2 s.
    pub max_wait: Duration,
}

impl Default for Retry {
    fn default() -> Self {
        Self {
            max_attempts: 3,
            first_wait: Duration::from_millis(50),
            max_wait: Duration::from_secs(2),
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
    /// Sets the first and the longest wait.
    #[must_use]
    pub fn with_waits(mut self, first: Duration, max: Duration) -> Self {
        self.first_wait = first;
        self.max_wait = max;
        self
    }

    pub(super) fn validate(&self) -> Result<()> {
        if self.max_attempts == 0 {
            return Err(Error::new(
                ErrorKind::Config,
                "retry.max_attempts is 0: it has to be at least 1",
            ));
        }
        if self.first_wait.is_zero() || self.max_wait < self.first_wait {
            let text = "retry waits have to be longer than zero, the longest no shorter than the first";
            return Err(Error::new(ErrorKind::Config, text)
                .with("first_wait", format!("{:?}", self.first_wait))
                .with("max_wait", format!("{:?}", self.max_wait)));
        }
        Ok(())
    }

    /// The wait after `attempts` that failed, with half of it left to chance.
    pub(super) fn wait_after(&self, attempts: u32) -> Duration {
        let doubled = self.first_wait.saturating_mul(1 << attempts.saturating_sub(1).min(20));
        let wait = doubled.min(self.max_wait);
        wait / 2 + (wait / 2).mul_f64(fastrand::f64())
    }
}
