use super::{Context, HandlerResult, Middleware, Next};
use crate::clock::Moment;
use std::{
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Lets no more than so many attempts begin in a time: a token bucket that is full at first, so a burst of that many
/// passes at once. For this instance of the application; the others have buckets of their own.
#[derive(Debug)]
pub struct Throttle {
    /// Between two.
    interval: Duration,
    /// How far ahead of time they may begin.
    burst: Duration,
    /// When the bucket would be full: the "theoretical arrival time" of the generic cell rate algorithm.
    full_at: Mutex<Moment>,
}

impl Throttle {
    /// At most `attempts` in each `period`.
    #[must_use]
    pub fn new(attempts: NonZeroU32, period: Duration) -> Self {
        let interval = period / attempts.get();
        Self {
            interval,
            burst: period.saturating_sub(interval),
            full_at: Mutex::new(Moment::ZERO),
        }
    }

    /// Takes a token, and gives how long to wait for it.
    fn take(&self, now: Moment) -> Duration {
        let mut full_at = self.full_at.lock().unwrap_or_else(PoisonError::into_inner);
        let at = (*full_at).max(now);
        *full_at = at + self.interval;
        at.saturating_sub(now + self.burst)
    }
}

impl<E: Sync + 'static> Middleware<E> for Throttle {
    async fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> HandlerResult {
        let clock = ctx.tools().clock.clone();
        let wait = self.take(clock.elapsed());
        if !wait.is_zero() {
            clock.sleep(wait).await;
        }
        next.run(ctx, event).await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_burst_passes_and_then_one_at_a_time() {
        let throttle = Throttle::new(NonZeroU32::new(10).unwrap(), Duration::from_secs(1));
        let now = Moment::new(Duration::from_secs(5));
        let waits: Vec<u128> = (0..13).map(|_| throttle.take(now).as_millis()).collect();
        assert_eq!(waits, [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 100, 200, 300]);
        assert_eq!(throttle.take(now + Duration::from_secs(10)), Duration::ZERO);
    }

    #[test]
    fn a_period_without_end_is_no_panic() {
        let throttle = Throttle::new(NonZeroU32::new(2).unwrap(), Duration::MAX);
        let waits: Vec<bool> = (0..4).map(|_| throttle.take(Moment::ZERO).is_zero()).collect();
        assert_eq!(waits[..2], [true, true]);
        assert!(!waits[3]);
    }
}
