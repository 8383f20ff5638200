use postrider_core::{Error, ErrorKind, Result};
use std::time::Duration;

/// How a [`PostgresLog`](crate::PostgresLog) is opened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct PostgresOptions {
    /// The schema its tables are in; `postrider` unless set. Quoted.
    pub schema: String,
    /// What the names of its tables begin with; nothing unless set. Quoted.
    pub prefix: String,
    /// The most connections of each of two pools: the one that transactions use, and the one that the log appends and reads
    /// on by itself. Relays have their own beside them: two a mailbox, and one for all. Default: 10.
    pub max_connections: u32,
    /// How long a caller waits for a connection of the pool; 5 s unless set.
    pub acquire_timeout: Duration,
    /// How long a settle waits for a lock before it gives up and is tried again; 2 s unless set. A history that cannot be
    /// written in that time is done without.
    pub lock_timeout: Duration,
}

impl Default for PostgresOptions {
    fn default() -> Self {
        Self {
            schema: "postrider".to_owned(),
            prefix: String::new(),
            max_connections: 10,
            acquire_timeout: Duration::from_secs(5),
            lock_timeout: Duration::from_secs(2),
        }
    }
}

impl PostgresOptions {
    /// Sets the schema.
    #[must_use]
    pub fn with_schema(mut self, schema: impl Into<String>) -> Self {
        self.schema = schema.into();
        self
    }
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
    /// Sets how long a caller waits for a connection of the pool.
    #[must_use]
    pub fn with_acquire_timeout(mut self, timeout: Duration) -> Self {
        self.acquire_timeout = timeout;
        self
    }
    /// Sets how long a settle waits for a lock.
    #[must_use]
    pub fn with_lock_timeout(mut self, timeout: Duration) -> Self {
        self.lock_timeout = timeout;
        self
    }

    /// Postgres cuts longer names off, silently.
    const MAX_NAME_BYTES: usize = 63;
    const LONGEST_NAME: &str = "parked_message";

    pub(crate) fn validate(&self) -> Result<()> {
        let wrong =
            |what: &'static str, text: String| Err(Error::new(ErrorKind::Config, text).with(what, "PostgresOptions"));
        for (what, name, most) in [
            ("schema", &self.schema, Self::MAX_NAME_BYTES),
            ("prefix", &self.prefix, Self::MAX_NAME_BYTES - Self::LONGEST_NAME.len()),
        ] {
            if name.len() > most || name.contains('\0') {
                return wrong(
                    what,
                    format!("the {what} of the Postgres log has to have at most {most} bytes, and no NUL"),
                );
            }
            // The bodies of its functions are quoted by this.
            if name.contains("$postrider") {
                return wrong(what, format!("the {what} of the Postgres log contains `$postrider`"));
            }
        }
        if self.schema.is_empty() || self.schema.starts_with("pg_") {
            return wrong(
                "schema",
                "the schema of the Postgres log is empty, or begins with `pg_`, which Postgres keeps for itself"
                    .to_owned(),
            );
        }
        if self.max_connections == 0 {
            return wrong(
                "max_connections",
                "the Postgres log's max_connections is 0: it has to be at least 1".to_owned(),
            );
        }
        if self.lock_timeout < Duration::from_millis(1) {
            return wrong(
                "lock_timeout",
                "the Postgres log's lock_timeout has to be at least 1ms".to_owned(),
            );
        }
        Ok(())
    }
}
