//! Time, injected: what the engine, the memory backends and SQLite ask for the time and wait on.
//!
//! Not tokio's paused clock: paused, it advances while a database driver waits for real I/O and fires its time-outs.

use crate::{Error, ErrorKind, Result};
use async_trait::async_trait;
use std::{
    collections::BTreeMap,
    fmt::Debug,
    ops::{Add, AddAssign, Sub},
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

/// A point of time on the wall clock, in UTC.
pub type Timestamp = chrono::DateTime<chrono::Utc>;

/// The longest duration the engine counts with: a hundred years. A longer one, such as [`Duration::MAX`] for "never", counts
/// as this, so that every clock, database and broker can hold it.
pub const LONGEST: Duration = Duration::from_secs(100 * 365 * 24 * 3600);

/// `duration`, or [`LONGEST`] if that is shorter: what durations pass where they enter the engine, a log or a broker.
#[must_use]
pub fn bounded(duration: Duration) -> Duration {
    duration.min(LONGEST)
}

/// The time on the wall `after` this long. Saturates at the end of the calendar in place of a panic.
#[must_use]
pub fn later(time: Timestamp, after: Duration) -> Timestamp {
    let after = chrono::TimeDelta::from_std(bounded(after)).ok();
    let at = after.and_then(|after| time.checked_add_signed(after));
    at.unwrap_or(Timestamp::MAX_UTC)
}

/// A point of time on a monotonic clock: the time since that clock began. Only comparable within one [`Clock`].
///
/// Adding a duration saturates: a time-out of [`Duration::MAX`] never comes, and nothing panics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Moment(Duration);

impl Moment {
    /// When the clock began.
    pub const ZERO: Self = Self(Duration::ZERO);
    /// Never.
    pub const MAX: Self = Self(Duration::MAX);

    /// The moment `since_the_beginning` after the clock began.
    #[must_use]
    pub const fn new(since_the_beginning: Duration) -> Self {
        Self(since_the_beginning)
    }
    /// The time since the clock began.
    #[must_use]
    pub const fn since_the_beginning(self) -> Duration {
        self.0
    }
    /// The time from `earlier` to this; zero if that is later.
    #[must_use]
    pub const fn saturating_sub(self, earlier: Self) -> Duration {
        self.0.saturating_sub(earlier.0)
    }
    /// The same as `self + duration`.
    #[must_use]
    pub const fn saturating_add(self, duration: Duration) -> Self {
        Self(self.0.saturating_add(duration))
    }
}

impl Add<Duration> for Moment {
    type Output = Self;
    fn add(self, duration: Duration) -> Self {
        self.saturating_add(duration)
    }
}
impl AddAssign<Duration> for Moment {
    fn add_assign(&mut self, duration: Duration) {
        *self = *self + duration;
    }
}
impl Sub for Moment {
    type Output = Duration;
    fn sub(self, earlier: Self) -> Duration {
        self.saturating_sub(earlier)
    }
}

/// Where the time comes from.
#[async_trait]
pub trait Clock: Debug + Send + Sync + 'static {
    /// The time on the wall.
    ///
    /// # Contract
    /// May jump, either way: used for what is stored and shown (when a record is due, when it was published), never
    /// for how long something of this process has lasted.
    ///
    /// Held by `core::a_wall_clock_that_jumps_does_not_matter`.
    fn now(&self) -> Timestamp;

    /// The time since the clock began.
    ///
    /// # Contract
    /// Never goes back and does not jump with the wall clock: leases, time-outs and backoff count on it.
    ///
    /// Held by `core::it_ends_before_it_ends_for_the_others_and_for_good`.
    fn elapsed(&self) -> Moment;

    /// Waits for `duration`.
    ///
    /// # Contract
    /// Returns once [`elapsed`](Clock::elapsed) has advanced by `duration`. Dropping the future ends the wait.
    ///
    /// Held by `core::a_step_and_a_chain_are_cut_off_by_their_time_outs`.
    async fn sleep(&self, duration: Duration);
}

#[async_trait]
impl<C: Clock + ?Sized> Clock for Arc<C> {
    fn now(&self) -> Timestamp {
        (**self).now()
    }
    fn elapsed(&self) -> Moment {
        (**self).elapsed()
    }
    async fn sleep(&self, duration: Duration) {
        (**self).sleep(duration).await;
    }
}

/// The machine's clock, and tokio's timers.
#[derive(Debug)]
pub struct SystemClock {
    began: Instant,
}

impl SystemClock {
    /// A clock that begins now.
    #[must_use]
    pub fn new() -> Self {
        Self { began: Instant::now() }
    }

    /// The same behind an `Arc`, as most of what takes a clock wants it.
    #[must_use]
    pub fn shared() -> Arc<dyn Clock> {
        Arc::new(Self::new())
    }
}

impl Default for SystemClock {
    fn default() -> Self {
        Self::new()
    }
}

/// Checks for a tokio runtime with timers enabled: without them tasks of the bus panic long after its start has returned
/// successfully.
pub(crate) fn check_timers() -> Result<()> {
    let text = match tokio::runtime::Handle::try_current() {
        Err(_) => {
            "the bus cannot start: there is no tokio runtime here; call it in one, such as under `#[tokio::main]`"
        }
        // There is no question that can be asked: whoever makes a timer without a driver panics.
        Ok(_) => match std::panic::catch_unwind(|| drop(tokio::time::sleep(Duration::ZERO))) {
            Ok(()) => return Ok(()),
            Err(_) => "the bus cannot start: the tokio runtime has no timers; build it with `enable_all()`",
        },
    };
    Err(Error::new(ErrorKind::Config, text))
}

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        chrono::Utc::now()
    }
    fn elapsed(&self) -> Moment {
        Moment(self.began.elapsed())
    }
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

/// A clock that stands still until it is told: for tests. Its timers are its own, so tokio's stay real.
///
/// Sleepers wake in the order of their times, and in the order of their calls where the times are equal: a test that seeds
/// everything else repeats exactly.
#[derive(Debug)]
pub struct ManualClock {
    hands: Mutex<Hands>,
}

#[derive(Debug)]
struct Hands {
    now: Timestamp,
    elapsed: Moment,
    last_sleeper: u64,
    sleepers: BTreeMap<(Moment, u64), Waker>,
}

impl ManualClock {
    /// A clock that shows `now`.
    #[must_use]
    pub fn at(now: Timestamp) -> Self {
        let hands = Hands {
            now,
            elapsed: Moment::ZERO,
            last_sleeper: 0,
            sleepers: BTreeMap::new(),
        };
        Self {
            hands: Mutex::new(hands),
        }
    }

    /// A clock that shows the first of January 2026.
    #[must_use]
    pub fn shared() -> Arc<Self> {
        let start = Timestamp::UNIX_EPOCH + chrono::TimeDelta::days(20_454);
        Arc::new(Self::at(start))
    }

    fn hands(&self) -> MutexGuard<'_, Hands> {
        self.hands.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lets `duration` pass, on the wall and on the monotonic clock.
    pub fn advance(&self, duration: Duration) {
        let mut hands = self.hands();
        hands.now = later(hands.now, duration);
        hands.elapsed += duration;
        let behind = (hands.elapsed.saturating_add(Duration::from_nanos(1)), 0);
        let sleeping = hands.sleepers.split_off(&behind);
        let woken = std::mem::replace(&mut hands.sleepers, sleeping);
        drop(hands);
        woken.into_values().for_each(Waker::wake);
    }

    /// Sets the wall clock, as an operator or NTP does; the monotonic clock stays.
    pub fn jump_to(&self, to: Timestamp) {
        self.hands().now = to;
    }

    /// The time until the next sleeper wakes; `None` while nobody sleeps. For a test that lets time pass whenever all its
    /// tasks are idle.
    #[must_use]
    pub fn next_wake(&self) -> Option<Duration> {
        let hands = self.hands();
        let next = hands.sleepers.keys().next();
        next.map(|(at, _)| at.saturating_sub(hands.elapsed))
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        self.hands().now
    }
    fn elapsed(&self) -> Moment {
        self.hands().elapsed
    }
    async fn sleep(&self, duration: Duration) {
        let until = self.elapsed().saturating_add(duration);
        Sleep {
            clock: self,
            until,
            place: None,
        }
        .await;
    }
}

/// A sleeper's place among the others.
struct Sleep<'a> {
    clock: &'a ManualClock,
    until: Moment,
    place: Option<u64>,
}

impl Future for Sleep<'_> {
    type Output = ();

    fn poll(mut self: Pin<&mut Self>, ctx: &mut Context<'_>) -> Poll<()> {
        let mut hands = self.clock.hands();
        if hands.elapsed >= self.until {
            return Poll::Ready(());
        }
        let place = self.place.unwrap_or_else(|| {
            hands.last_sleeper += 1;
            hands.last_sleeper
        });
        hands.sleepers.insert((self.until, place), ctx.waker().clone());
        drop(hands);
        self.place = Some(place);
        Poll::Pending
    }
}

impl Drop for Sleep<'_> {
    fn drop(&mut self) {
        if let Some(place) = self.place {
            self.clock.hands().sleepers.remove(&(self.until, place));
        }
    }
}

const _: fn(&dyn Clock) = |_| {};

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn never_is_a_time_like_any_other() {
        let clock = ManualClock::shared();
        let never = clock.elapsed() + Duration::MAX;
        clock.advance(Duration::from_secs(1));
        assert_eq!((never + Duration::MAX, never > clock.elapsed()), (Moment::MAX, true));
        assert!(later(clock.now(), Duration::MAX) > clock.now());
        assert!(later(Timestamp::MAX_UTC, Duration::MAX) >= clock.now());
        clock.advance(Duration::MAX);
        clock.advance(Duration::MAX);
        assert_eq!(clock.elapsed(), Moment::MAX);
    }
}
