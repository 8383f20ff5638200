use crate::{
    PostgresOptions,
    error::doing,
    own, schema,
    session::PostgresSession,
    sql::{Names, Sql},
    watch::Watch,
};
use async_trait::async_trait;
use postrider_core::{
    Error, ErrorKind, EventLog, Mailbox, Result,
    clock::{Clock, LONGEST, SystemClock},
    log::{EventLogStore, Lease, LogCapabilities, LogSchema, NewRecord, Purge, Session, SessionOptions},
};
use sqlx::{
    ConnectOptions as _, Connection as _, PgConnection, PgPool,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
};

/// The most milliseconds that Postgres takes for a setting.
const LONGEST_SETTING: u128 = 2_147_483_647;

/// The event log in a Postgres database. Clones are handles on the same log.
#[derive(Clone)]
pub struct PostgresLog(Arc<Inner>);

struct Inner {
    pool: PgPool,
    /// What the log reads and writes on: see `own`.
    own: PgPool,
    connect: PgConnectOptions,
    names: Names,
    sql: Sql,
    options: PostgresOptions,
    clock: Arc<dyn Clock>,
    watch: Watch,
    /// Whether the schema was found to be one this program can work with.
    is_checked: AtomicBool,
    history_failures: AtomicU64,
}

/// What a relay's own connection does.
pub(crate) enum Role {
    /// Reads, and takes lanes.
    Claim,
    /// Settles: a commit that a crash of the server forgets is a repeat, no loss, so it need not be flushed.
    Settle,
    /// Renews leases and looks for news.
    Heart,
}

impl PostgresLog {
    /// Connects to the server at `url`, such as `postgres://user@host/shop`, and keeps a pool on it.
    ///
    /// Its tables have to be there: [`Bus::migrate`](postrider_core::Bus::migrate) makes them, or the SQL of
    /// [`migration_sql`](PostgresLog::migration_sql).
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the address makes no sense or the server refuses the user; [`ErrorKind::Unavailable`] if
    /// it cannot be reached.
    pub async fn connect(url: &str) -> Result<Self> {
        Self::connect_with(url, PostgresOptions::default()).await
    }

    /// [`connect`](PostgresLog::connect), with options.
    ///
    /// # Errors
    /// As there, and [`ErrorKind::Config`] if the options make no sense.
    pub async fn connect_with(url: &str, options: PostgresOptions) -> Result<Self> {
        options.validate()?;
        if !url.starts_with("postgres://") && !url.starts_with("postgresql://") {
            // Without the address itself, which may hold a password.
            let text = "the address of the Postgres server has to begin with `postgres://`";
            return Err(Error::new(ErrorKind::Config, text));
        }
        let connect: PgConnectOptions = url
            .parse()
            .map_err(doing("reading the address of the Postgres server"))?;
        let pool = PgPoolOptions::new()
            .max_connections(options.max_connections)
            .acquire_timeout(options.acquire_timeout.min(LONGEST))
            .after_release(|connection, _| Box::pin(own::is_idle(connection)))
            .connect_with(connect)
            .await
            .map_err(doing("connecting to Postgres"))?;
        Self::on_pool(pool, options)
    }

    /// The log in the database of a pool of yours. The log opens connections of its own with the pool's options.
    ///
    /// Transactions begin on your pool. Let it check what is released, so that a `BEGIN` that was cut off does no harm to
    /// your own statements: see [`is_idle`](crate::is_idle).
    ///
    /// # Errors
    /// [`ErrorKind::Config`] if the options make no sense.
    pub fn on_pool(pool: PgPool, options: PostgresOptions) -> Result<Self> {
        options.validate()?;
        let names = Names::new(&options.schema, &options.prefix);
        let connect = (*pool.connect_options()).clone().disable_statement_logging();
        Ok(Self(Arc::new(Inner {
            sql: Sql::new(&names),
            names,
            own: own::pool(&connect, &options),
            pool,
            connect,
            options,
            clock: SystemClock::shared(),
            watch: Watch::default(),
            is_checked: AtomicBool::new(false),
            history_failures: AtomicU64::new(0),
        })))
    }

    /// The pool: for your own tables, in the same database.
    #[must_use]
    pub fn pool(&self) -> &PgPool {
        &self.0.pool
    }

    /// The SQL that makes the tables, for an administrator to read and run. (On a schema of an older version
    /// [`LogSchema::migrate`] runs only what is missing.)
    #[must_use]
    pub fn migration_sql(options: &PostgresOptions) -> String {
        schema::migration(&Names::new(&options.schema, &options.prefix), 0)
    }

    /// The SQL that grants `role` what a program needs at run time: no right to create or drop anything.
    #[must_use]
    pub fn grants_sql(options: &PostgresOptions, role: &str) -> String {
        schema::grants(&Names::new(&options.schema, &options.prefix), role)
    }

    /// How often what succeeded could not be kept in the history since this handle was made, and was deleted instead.
    #[must_use]
    pub fn history_failures(&self) -> u64 {
        self.0.history_failures.load(Ordering::Relaxed)
    }

    pub(crate) fn count_history_failure(&self) -> u64 {
        self.0.history_failures.fetch_add(1, Ordering::Relaxed)
    }

    pub(crate) fn own_pool(&self) -> &PgPool {
        &self.0.own
    }

    pub(crate) fn sql(&self) -> &Sql {
        &self.0.sql
    }

    pub(crate) fn names(&self) -> &Names {
        &self.0.names
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    pub(crate) fn watch(&self) -> &Watch {
        &self.0.watch
    }

    /// A connection of a relay's own. Its plans do not depend on statistics, which an emptied queue has wrong: there is
    /// an index for everything that is looked for.
    pub(crate) async fn own_connection(&self, role: Role) -> Result<PgConnection> {
        let failed = doing("opening a connection for the relay");
        let lock_timeout = format!("{}ms", self.0.options.lock_timeout.as_millis().min(LONGEST_SETTING));
        let of_role: &[(&str, &str)] = match role {
            Role::Claim => &[("lock_timeout", &lock_timeout)],
            Role::Settle => &[("synchronous_commit", "off"), ("lock_timeout", &lock_timeout)],
            Role::Heart => &[("lock_timeout", "1s"), ("statement_timeout", "2s")],
        };
        let always = [
            ("enable_seqscan", "off"),
            ("enable_bitmapscan", "off"),
            ("enable_hashjoin", "off"),
            ("enable_mergejoin", "off"),
            ("enable_sort", "off"),
            ("enable_incremental_sort", "off"),
            ("jit", "off"),
            ("default_transaction_isolation", "read committed"),
            ("plan_cache_mode", "force_generic_plan"),
            // One that is stopped in the middle holds up those who take over.
            ("idle_in_transaction_session_timeout", "10s"),
        ];
        // Said once it is there: poolers take no options with the greeting.
        let settings = always.iter().chain(of_role);
        let say: String = settings
            .map(|(name, value)| format!("SET {name} = '{value}';"))
            .collect();
        let connect = self.0.connect.clone().application_name("postrider relay");
        let mut connection = PgConnection::connect_with(&connect).await.map_err(&failed)?;
        let said = sqlx::raw_sql(sqlx::AssertSqlSafe(say)).execute(&mut connection).await;
        said.map_err(failed)?;
        Ok(connection)
    }

    /// Whether the schema is one this program can work with: asked once.
    pub(crate) async fn check_schema(&self, connection: &mut PgConnection) -> Result<()> {
        if self.0.is_checked.load(Ordering::Acquire) {
            return Ok(());
        }
        schema::check(connection, &self.0.names, &self.0.options).await?;
        self.0.is_checked.store(true, Ordering::Release);
        Ok(())
    }

    /// The id of a mailbox, which comes into being in the connection's transaction.
    ///
    /// It is asked for each time: the row may go while this process lives, by a failover to a standby that is behind, a
    /// restore, or a test that empties the tables.
    pub(crate) async fn mailbox_in(&self, connection: &mut PgConnection, mailbox: &Mailbox) -> Result<i16> {
        let failed = doing("opening a mailbox");
        let name = mailbox.to_string();
        let find = || sqlx::query_scalar(self.sql().find_mailbox.clone()).bind(&name);
        if let Some(id) = find().fetch_optional(&mut *connection).await.map_err(&failed)? {
            return Ok(id);
        }
        let add = sqlx::query_scalar(self.sql().add_mailbox.clone()).bind(&name);
        if let Some(id) = add.fetch_optional(&mut *connection).await.map_err(&failed)? {
            let id: i16 = id;
            let lanes = sqlx::query(self.sql().add_lanes.clone()).bind(id);
            lanes.execute(connection).await.map_err(failed)?;
            return Ok(id);
        }
        // Somebody else has made it meanwhile.
        find().fetch_one(connection).await.map_err(failed)
    }

    /// The id of a mailbox, if there is one of this name.
    pub(crate) async fn find_mailbox(&self, mailbox: &Mailbox) -> Result<Option<i16>> {
        let found = sqlx::query_scalar(self.sql().find_mailbox.clone()).bind(mailbox.to_string());
        let mut connection = self.own("looking for a mailbox").await?;
        let found = found.fetch_optional(&mut *connection).await;
        found.map_err(doing("looking for a mailbox"))
    }
}

impl fmt::Debug for PostgresLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("PostgresLog")
            .field("host", &self.0.connect.get_host())
            .field("port", &self.0.connect.get_port())
            .field("database", &self.0.connect.get_database())
            .field("schema", &self.0.options.schema)
            .field("prefix", &self.0.options.prefix)
            .finish_non_exhaustive()
    }
}

impl From<PostgresLog> for EventLog {
    fn from(log: PostgresLog) -> Self {
        Self::new("postgres", log.clone(), LogCapabilities::all())
            .with_transactions(log.clone())
            .with_inbox(log.clone())
            .with_schema(log.clone())
            .with_admin(log)
    }
}

#[async_trait]
impl EventLogStore for PostgresLog {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        if batch.is_empty() {
            return Ok(());
        }
        let failed = doing("appending events");
        let is_plain = batch
            .iter()
            .all(|record| record.placement == postrider_core::log::Placement::Due);
        if is_plain {
            // One statement is a transaction by itself.
            let mut connection = self.own("appending events").await?;
            if self.try_insert(&mut connection, mailbox, batch).await? {
                return Ok(());
            }
        }
        let mut own = self.own_guarded("appending events").await?;
        let begun = own.begin_with(crate::append::READ_COMMITTED).await;
        let mut tx = begun.map_err(&failed)?;
        self.insert(&mut tx, mailbox, batch).await?;
        tx.commit().await.map_err(failed)?;
        own.give_back();
        Ok(())
    }

    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        Lease::check(options.lease)?;
        let mut connection = self.own_connection(Role::Claim).await?;
        self.check_schema(&mut connection).await?;
        let failed = doing("opening a mailbox");
        let mut tx = connection.begin().await.map_err(&failed)?;
        let id = self.mailbox_in(&mut tx, mailbox).await?;
        tx.commit().await.map_err(failed)?;
        Ok(Box::new(PostgresSession::new(
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

#[async_trait]
impl LogSchema for PostgresLog {
    async fn migrate(&self) -> Result<()> {
        let mut connection = self.own_connection(Role::Claim).await?;
        schema::migrate(&mut connection, &self.0.names).await?;
        connection.close().await.map_err(doing("migrating the event log"))
    }

    async fn check(&self) -> Result<()> {
        let mut connection = self.own("checking the event log").await?;
        schema::check(&mut connection, &self.0.names, &self.0.options).await
    }
}

/// A mistake in the statements of this crate would show as this.
pub(crate) fn unexpected(what: &'static str) -> Error {
    Error::new(ErrorKind::Unexpected, what)
}
