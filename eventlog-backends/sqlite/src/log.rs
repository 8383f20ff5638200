use crate::{
    SqliteOptions,
    error::doing,
    schema,
    session::SqliteSession,
    sql::{Names, Sql},
};
use async_trait::async_trait;
use postrider_core::{
    Error, ErrorKind, EventLog, Mailbox, Result,
    clock::Clock,
    log::{EventLogStore, Lease, LogCapabilities, NewRecord, Purge, Session, SessionOptions},
};
use sqlx::{
    ConnectOptions as _, Connection as _, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqlitePoolOptions, SqliteSynchronous},
};
use std::{
    fmt,
    path::{Path, PathBuf},
    sync::Arc,
    time::{Duration, Instant},
};

/// The longest that SQLite waits for a lock: it counts milliseconds in 32 bits.
const LONGEST_WAIT: Duration = Duration::from_millis(2_147_483_647);

/// The event log in a SQLite file. Clones are handles on the same log.
#[derive(Clone)]
pub struct SqliteLog(Arc<Inner>);

struct Inner {
    pool: SqlitePool,
    /// What a relay's own connection is opened with.
    relay: SqliteConnectOptions,
    sql: Sql,
    options: SqliteOptions,
}

impl SqliteLog {
    /// Opens the file, which comes into being if need be, brings its tables to this version, and keeps a pool on it.
    ///
    /// # Errors
    /// [`ErrorKind::Storage`] if the file cannot be opened or written, is no database, or has tables of a newer version;
    /// [`ErrorKind::Unavailable`] if another process keeps it locked.
    pub async fn open(path: impl AsRef<Path>) -> Result<Self> {
        Self::open_with(path, SqliteOptions::default()).await
    }

    /// [`open`](SqliteLog::open), with options.
    ///
    /// # Errors
    /// As there, and [`ErrorKind::Config`] if the options make no sense.
    pub async fn open_with(path: impl AsRef<Path>, options: SqliteOptions) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        options.validate(&path)?;
        let synchronous = if options.durable {
            SqliteSynchronous::Full
        } else {
            SqliteSynchronous::Normal
        };
        let connect = SqliteConnectOptions::new()
            .filename(&path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(synchronous)
            .busy_timeout(options.busy_timeout.min(LONGEST_WAIT));
        let file = |error: Error| error.with("file", path.display());
        let began = Instant::now();
        loop {
            let pool = SqlitePoolOptions::new()
                .max_connections(options.max_connections)
                .after_release(|connection, _| Box::pin(async move { Ok(!is_stuck(connection).await) }))
                .connect_with(connect.clone());
            let opened = match pool.await.map_err(doing("opening the event log")) {
                Ok(pool) => Self::on_pool(pool, options.clone()).await,
                Err(error) => Err(error),
            };
            match opened {
                // Two processes that open a new file at once: the change to WAL does not wait for a lock by itself.
                Err(error) if error.is_retryable() && began.elapsed() < options.busy_timeout => {
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                opened => return opened.map_err(file),
            }
        }
    }

    /// The log in the database of a pool of yours. The tables are brought to this version.
    ///
    /// The database should be in WAL mode, which is set if it can be, and the pool's connections decide how durable a
    /// commit is. A relay opens a connection of its own with the pool's options.
    ///
    /// # Errors
    /// As [`open_with`](SqliteLog::open_with).
    pub async fn on_pool(pool: SqlitePool, options: SqliteOptions) -> Result<Self> {
        let connect = (*pool.connect_options()).clone();
        let path: PathBuf = connect.get_filename().to_path_buf();
        options.validate(&path)?;
        let names = Names::new(&options.prefix);
        let mut connection = pool.acquire().await.map_err(doing("opening the event log"))?;
        let encoding: String = sqlx::query_scalar("PRAGMA encoding")
            .fetch_one(&mut *connection)
            .await
            .map_err(doing("opening the event log"))?;
        if encoding != "UTF-8" {
            let text = "the event log needs a SQLite database in UTF-8";
            return Err(Error::new(ErrorKind::Config, text).with("encoding", encoding));
        }
        schema::migrate(&mut connection, &names).await?;
        drop(connection);
        let relay = connect
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal)
            .busy_timeout(options.busy_timeout.min(LONGEST_WAIT))
            .row_buffer_size(1024)
            .disable_statement_logging();
        Ok(Self(Arc::new(Inner {
            sql: Sql::new(&names),
            pool,
            relay,
            options,
        })))
    }

    /// The pool: for your own tables, in the same file.
    #[must_use]
    pub fn pool(&self) -> &SqlitePool {
        &self.0.pool
    }

    pub(crate) fn sql(&self) -> &Sql {
        &self.0.sql
    }

    pub(crate) fn options(&self) -> &SqliteOptions {
        &self.0.options
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.options.clock
    }

    /// A connection of a relay's own.
    pub(crate) async fn connect(&self) -> Result<SqliteConnection> {
        let connected = SqliteConnection::connect_with(&self.0.relay).await;
        connected.map_err(doing("opening a connection for the relay"))
    }

    /// The id of a mailbox, which comes into being in the connection's transaction.
    ///
    /// It is asked for each time: the row may go while this process lives, by a restored copy or a test that empties the
    /// tables.
    pub(crate) async fn mailbox_in(&self, connection: &mut SqliteConnection, mailbox: &Mailbox) -> Result<i64> {
        let failed = doing("opening a mailbox");
        let name = mailbox.to_string();
        let find = || sqlx::query_scalar(self.sql().find_mailbox.clone()).bind(&name);
        if let Some(id) = find().fetch_optional(&mut *connection).await.map_err(&failed)? {
            return Ok(id);
        }
        sqlx::query(self.sql().add_mailbox.clone())
            .bind(&name)
            .execute(&mut *connection)
            .await
            .map_err(&failed)?;
        find().fetch_one(connection).await.map_err(failed)
    }

    /// The id of a mailbox, if there is one of this name.
    pub(crate) async fn find_mailbox(&self, mailbox: &Mailbox) -> Result<Option<i64>> {
        let found = sqlx::query_scalar(self.sql().find_mailbox.clone()).bind(mailbox.to_string());
        found
            .fetch_optional(self.pool())
            .await
            .map_err(doing("looking for a mailbox"))
    }
}

impl fmt::Debug for SqliteLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("SqliteLog")
            .field("file", &self.0.relay.get_filename())
            .field("prefix", &self.0.options.prefix)
            .finish_non_exhaustive()
    }
}

impl From<SqliteLog> for EventLog {
    fn from(log: SqliteLog) -> Self {
        Self::new(
            "sqlite",
            log.clone(),
            LogCapabilities::all().with_concurrent_writers(false),
        )
        .with_transactions(log.clone())
        .with_inbox(log.clone())
        .with_admin(log)
    }
}

#[async_trait]
impl EventLogStore for SqliteLog {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let failed = doing("appending events");
        let mut tx = self.pool().begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        self.insert(&mut tx, mailbox, batch).await?;
        tx.commit().await.map_err(failed)
    }

    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        Lease::check(options.lease)?;
        let mut connection = self.connect().await?;
        let failed = doing("opening a mailbox");
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        let id = self.mailbox_in(&mut tx, mailbox).await?;
        tx.commit().await.map_err(failed)?;
        Ok(Box::new(SqliteSession::new(
            self.clone(),
            mailbox.clone(),
            id,
            options.clone(),
            connection,
        )))
    }

    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.purge_old(request).await
    }
}

/// Whether a connection is of no use any more. A full disk makes SQLite roll back by itself; the driver's own rollback
/// then fails, and it goes on believing in a transaction. (sqlx 0.9: every later `begin_with` is refused.)
pub(crate) async fn is_stuck(connection: &mut SqliteConnection) -> bool {
    // A transaction that was dropped is rolled back behind what is queued already: the ping waits for that.
    connection.is_in_transaction() && (connection.ping().await.is_err() || connection.is_in_transaction())
}

/// A mistake in the statements of this crate would show as this.
pub(crate) fn unexpected(what: &'static str) -> Error {
    Error::new(ErrorKind::Unexpected, what)
}
