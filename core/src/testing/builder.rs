use super::{Describe, Life, Records, TestBus, WireFn, build};
use crate::{
    Bus, BusBuilder, EventLog, Result,
    clock::ManualClock,
    memory::{MemoryLog, MemoryTransport},
};
use std::{fmt, sync::Arc, time::Duration};

/// How long nothing may change in memory until all is quiet.
const IN_MEMORY: u32 = 5;
/// The same on a database, whose files take their time.
const ON_A_DATABASE: u32 = 20;

/// A [`TestBus`] being described.
///
/// ```ignore
/// let dir = tempfile::tempdir()?;
/// let clock = ManualClock::shared();
/// let options = SqliteOptions::default().with_clock(clock.clone());
/// let log = SqliteLog::open_with(dir.path().join("test.db"), options).await?;
/// sqlx::raw_sql(SCHEMA).execute(log.pool()).await?;
/// let app = TestBus::builder().log(log, clock).start(wire).await?;
/// ```
#[must_use = "a test begins with `.start(wire).await`"]
pub struct TestBusBuilder {
    log: Option<(EventLog, Arc<ManualClock>)>,
    describe: Describe,
    quiet: Option<Duration>,
}

impl Default for TestBusBuilder {
    fn default() -> Self {
        Self {
            log: None,
            describe: Box::new(|builder| builder),
            quiet: None,
        }
    }
}

impl TestBusBuilder {
    /// Runs on this log in place of one in memory: a fresh one, that was given the same clock. It needs transactions and an
    /// inbox.
    pub fn log(mut self, log: impl Into<EventLog>, clock: Arc<ManualClock>) -> Self {
        self.log = Some((log.into(), clock));
        self
    }

    /// Describes the bus further: its source, limits, middleware.
    pub fn describe(mut self, describe: impl Fn(BusBuilder) -> BusBuilder + Send + Sync + 'static) -> Self {
        self.describe = Box::new(describe);
        self
    }

    /// Sets how long nothing may change until [`settle`](TestBus::settle) believes that nothing will. Default: 5 ms in memory,
    /// 20 ms on another log.
    pub fn quiet(mut self, quiet: Duration) -> Self {
        self.quiet = Some(quiet);
        self
    }

    /// Starts the bus and wires it up by the application's own function, which makes its subscriptions. It is called again by
    /// [`restart`](TestBus::restart).
    ///
    /// # Errors
    /// Of `wire`, or if the description makes no sense.
    pub async fn start<W>(self, wire: W) -> Result<TestBus>
    where
        W: AsyncFn(&Bus) -> Result<()> + WireFn + Send + Sync + 'static,
    {
        let usual = if self.log.is_none() { IN_MEMORY } else { ON_A_DATABASE };
        let (log, clock) = self.log.unwrap_or_else(|| {
            let clock = ManualClock::shared();
            (MemoryLog::on_clock(clock.clone()).into(), clock)
        });
        let transport = MemoryTransport::on_clock(clock.clone());
        let (records, life) = (Arc::new(Records::default()), Arc::new(Life::default()));
        let bus = build(&life, &clock, &log, &transport, &records, &self.describe)?;
        let millis = |quiet: Duration| u32::try_from(quiet.as_millis()).unwrap_or(u32::MAX).max(1);
        let app = TestBus {
            bus,
            life,
            clock,
            log,
            transport,
            records,
            quiet: self.quiet.map_or(usual, millis),
            describe: self.describe,
            wire: wire.erased(),
        };
        app.begin().await?;
        Ok(app)
    }
}

impl fmt::Debug for TestBusBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestBusBuilder")
            .field("log", &self.log)
            .field("quiet", &self.quiet)
            .finish_non_exhaustive()
    }
}
