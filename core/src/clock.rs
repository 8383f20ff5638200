//! Time, injected: what the engine, the memory backends and SQLite ask for the time and wait on.
//!
//! Not tokio's paused clock: paused, it advances while a database driver waits for real I/O and fires its time-outs.

use async_trait::async_trait;
use std::{
    fmt::Debug,
    sync::Arc,
    time::{Duration, Instant},
};

/// A point of time on the wall clock, in UTC.
pub type Timestamp = chrono::DateTime<chrono::Utc>;

/// A point of time on a monotonic clock: the time since that clock began. Only comparable within one [`Clock`].
pub type Moment = Duration;

/// Where the time comes from.
#[async_trait]
pub trait Clock: Debug + Send + Sync + 'static {
    /// The time on the wall.
    ///
    /// # Contract
    /// May jump, either way: used for what is stored and shown (when a record is due, when it was published), never
    /// for how long something of this process has lasted.
    fn now(&self) -> Timestamp;

    /// The time since the clock began.
    ///
    /// # Contract
    /// Never goes back and does not jump with the wall clock: leases, time-outs and backoff count on it.
    fn elapsed(&self) -> Moment;

    /// Waits for `duration`.
    ///
    /// # Contract
    /// Returns once [`elapsed`](Clock::elapsed) has advanced by `duration`. Dropping the future ends the wait.
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

#[async_trait]
impl Clock for SystemClock {
    fn now(&self) -> Timestamp {
        chrono::Utc::now()
    }
    fn elapsed(&self) -> Moment {
        self.began.elapsed()
    }
    async fn sleep(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
}

/// A clock that stands still until it is told: for tests. Its timers are its own, so tokio's stay real.
#[derive(Debug)]
pub struct ManualClock {
    time: tokio::sync::watch::Sender<(Timestamp, Moment)>,
}

impl ManualClock {
    /// A clock that shows `now`.
    #[must_use]
    pub fn at(now: Timestamp) -> Self {
        Self {
            time: tokio::sync::watch::Sender::new((now, Moment::ZERO)),
        }
    }

    /// A clock that shows the first of January 2026.
    #[must_use]
    pub fn shared() -> Arc<Self> {
        let start = Timestamp::UNIX_EPOCH + chrono::TimeDelta::days(20_454);
        Arc::new(Self::at(start))
    }

    /// Lets `duration` pass, on the wall and on the monotonic clock.
    pub fn advance(&self, duration: Duration) {
        self.time.send_modify(|(now, elapsed)| {
            *now += duration;
            *elapsed += duration;
        });
    }

    /// Sets the wall clock, as an operator or NTP does; the monotonic clock stays.
    pub fn jump_to(&self, to: Timestamp) {
        self.time.send_modify(|(now, _)| *now = to);
    }
}

#[async_trait]
impl Clock for ManualClock {
    fn now(&self) -> Timestamp {
        self.time.borrow().0
    }
    fn elapsed(&self) -> Moment {
        self.time.borrow().1
    }
    async fn sleep(&self, duration: Duration) {
        let until = self.elapsed() + duration;
        // The sender lives as long as `self`, so this ends only when the time has come.
        let _ = self.time.subscribe().wait_for(|(_, elapsed)| *elapsed >= until).await;
    }
}

const _: fn(&dyn Clock) = |_| {};
