use crate::clock::bounded;
use std::time::Duration;

/// How long to wait after an attempt that failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, serde::Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Backoff {
    /// Uniformly between `min` and `min(max, 2ⁿ s)` after attempt *n*: exponential with full jitter, as in the AWS
    /// architecture blog's "Exponential Backoff And Jitter".
    FullJitter {
        /// The shortest wait.
        #[serde(with = "humantime_serde")]
        min: Duration,
        /// The longest wait.
        #[serde(with = "humantime_serde")]
        max: Duration,
    },
    /// Always the same.
    Fixed(#[serde(with = "humantime_serde")] Duration),
}

impl Default for Backoff {
    fn default() -> Self {
        Self::FullJitter {
            min: Duration::from_secs(1),
            max: Duration::from_secs(60),
        }
    }
}

impl Backoff {
    /// What is wrong with it, and what it may be.
    pub(crate) fn check(&self) -> Result<(), String> {
        match *self {
            Self::FullJitter { min, max } if min > max || max.is_zero() => Err(format!(
                "{min:?} to {max:?}: it has to be a range that begins before it ends, longer than zero"
            )),
            Self::Fixed(wait) if wait.is_zero() => Err("0s: it has to be longer than zero".to_owned()),
            _ => Ok(()),
        }
    }

    /// How long to wait after attempt `attempt`, from 1.
    #[must_use]
    pub fn after(&self, attempt: u32, rng: &mut fastrand::Rng) -> Duration {
        match *self {
            Self::Fixed(wait) => bounded(wait),
            Self::FullJitter { min, max } => {
                let (min, max) = (bounded(min), bounded(max));
                let ceiling = Duration::from_secs(1u64 << attempt.min(31)).clamp(min, max);
                min + (ceiling - min).mul_f64(rng.f64())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_stays_within_its_bounds_and_uses_them() {
        let mut rng = fastrand::Rng::with_seed(7);
        let backoff = Backoff::default();
        for attempt in [1, 2, 5, 6, 40, u32::MAX] {
            let waits: Vec<f64> = (0..2000)
                .map(|_| backoff.after(attempt, &mut rng).as_secs_f64())
                .collect();
            let ceiling = f64::from(2u32.saturating_pow(attempt).min(60));
            let (least, most) = waits
                .iter()
                .fold((f64::MAX, 0.0f64), |(l, m), w| (l.min(*w), m.max(*w)));
            assert!(least >= 1.0 && most <= ceiling, "{attempt}: {least}–{most}");
            assert!(
                least < 1.0 + (ceiling - 1.0) * 0.1 && most > ceiling * 0.9,
                "{attempt}: {least}–{most}"
            );
        }
    }
}
