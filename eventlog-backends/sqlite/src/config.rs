use postrider_core::{
    Error, ErrorKind, Result,
    clock::{Clock, SystemClock},
};
use std::{path::Path, sync::Arc, time::Duration};

/// How a [`SqliteLog`](crate::SqliteLog) is opened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SqliteOptions {
    /// What the names of its tables begin with; `postrider_` unless set. Quoted, so any text but NUL will do.
    pub prefix: String,
    /// The most connections of the pool; 4 unless set. The relay has one of its own beside it.
    pub max_connections: u32,
    /// How long a writer waits for another before it is [`Unavailable`](ErrorKind::Unavailable); 5 s unless set.
    pub busy_timeout: Duration,
    /// Whether a commit is flushed to the disk (`synchronous=FULL`), so that it survives a power failure. It is, unless
    /// set; without it a commit still survives the end of the process.
    pub durable: bool,
    /// How often a relay looks whether another process has written; 50 ms unless set. It costs some microseconds.
    pub watch_interval: Duration,
    pub(crate) clock: Arc<dyn Clock>,
}

impl Default for SqliteOptions {
    fn default() -> Self {
        Self {
            prefix: "postrider_".to_owned(),
            max_connections: 4,
            busy_timeout: Duration::from_secs(5),
            durable: true,
            watch_interval: Duration::from_millis(50),
            clock: SystemClock::shared(),
        }
    }
}

impl SqliteOptions {
    /// Sets what the names of the tables begin with.
    #[must_use]
    pub fn with_prefix(mut self, prefix: impl Into<String>) -> Self {
        self.prefix = prefix.into();
        self
    }
    /// Sets the most connections of the pool.
    #[must_use]
    pub fn with_max_connections(mut self, connections: u32) -> Self {
        self.max_connections = connections;
        self
    }
    /// Sets how long a writer waits for another.
    #[must_use]
    pub fn with_busy_timeout(mut self, timeout: Duration) -> Self {
        self.busy_timeout = timeout;
        self
    }
    /// Sets whether a commit survives a power failure.
    #[must_use]
    pub fn with_durable(mut self, durable: bool) -> Self {
        self.durable = durable;
        self
    }
    /// Sets how often a relay looks whether another process has written.
    #[must_use]
    pub fn with_watch_interval(mut self, interval: Duration) -> Self {
        self.watch_interval = interval;
        self
    }
    /// Sets the clock, for tests.
    #[must_use]
    pub fn with_clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = clock;
        self
    }

    pub(crate) fn validate(&self, path: &Path) -> Result<()> {
        let wrong = |text: &'static str| Err(Error::new(ErrorKind::Config, text).with("file", path.display()));
        if self.prefix.is_empty() || self.prefix.len() > 100 || self.prefix.contains('\0') {
            return wrong("the table prefix of the SQLite log has to have 1 to 100 bytes, and no NUL");
        }
        if self.prefix.to_ascii_lowercase().starts_with("sqlite_") {
            return wrong("the table prefix of the SQLite log begins with `sqlite_`, which SQLite keeps for itself");
        }
        if self.max_connections == 0 {
            return wrong("the SQLite log's max_connections is 0: it has to be at least 1");
        }
        if self.watch_interval.is_zero() {
            return wrong("the SQLite log's watch_interval is 0s: it has to be longer than zero");
        }
        Ok(())
    }
}
