//! The log's own connections.
//!
//! The driver takes a `BEGIN` whose future was dropped for one that never happened (sqlx 0.9.0, launchbadge/sqlx#4385):
//! the connection goes back to its pool, the server has a transaction open on it, and what the next borrower writes
//! without a transaction of its own is answered with success and lost. So the log writes and reads on a pool that
//! nobody else has, and whatever begins a transaction there is closed rather than given back if it is cut off.

use crate::{PostgresLog, PostgresOptions, error::doing};
use postrider_core::{Error, ErrorKind, Result, clock::LONGEST};
use sqlx::{
    PgConnection, PgPool, Postgres,
    pool::PoolConnection,
    postgres::{PgConnectOptions, PgPoolOptions},
};
use std::{
    ops::{Deref, DerefMut},
    time::Duration,
};

/// How long an idle connection is kept.
const IDLE: Duration = Duration::from_secs(60);
/// A connection that was used so recently is not asked whether it lives.
const FRESH: Duration = Duration::from_secs(1);

/// A pool of the log's own, which connects when it is first used.
pub(crate) fn pool(connect: &PgConnectOptions, options: &PostgresOptions) -> PgPool {
    PgPoolOptions::new()
        .max_connections(options.max_connections)
        .acquire_timeout(options.acquire_timeout.min(LONGEST))
        .idle_timeout(IDLE)
        // As below, but not for each statement.
        .test_before_acquire(false)
        .before_acquire(|connection, of| {
            Box::pin(async move {
                Ok(of.idle_for < FRESH || sqlx::Connection::ping(connection).await.is_ok())
            })
        })
        .connect_lazy_with(connect.clone())
}

impl PostgresLog {
    /// A connection for single statements, each a transaction by itself. Nothing may be begun on it.
    pub(crate) async fn own(&self, doing_what: &'static str) -> Result<PoolConnection<Postgres>> {
        if self.pool().is_closed() {
            // Whoever closes the pool has done with the log.
            self.own_pool().close().await;
            return Err(Error::new(ErrorKind::Closed, "the Postgres pool has been closed").with("doing", doing_what));
        }
        self.own_pool().acquire().await.map_err(doing(doing_what))
    }

    /// A connection on which transactions may be begun.
    pub(crate) async fn own_guarded(&self, doing_what: &'static str) -> Result<Guarded> {
        Ok(Guarded(Some(self.own(doing_what).await?)))
    }
}

/// A connection that is closed when it is dropped, unless it is given back: cut off, it may be in a transaction that
/// the driver knows nothing of.
pub(crate) struct Guarded(Option<PoolConnection<Postgres>>);

impl Guarded {
    /// Every transaction on it has been committed or rolled back.
    pub(crate) fn give_back(mut self) {
        drop(self.0.take());
    }
}

const TAKEN: &str = "the connection is there until the guard is dropped or gives it back, which consumes it";

impl Deref for Guarded {
    type Target = PgConnection;
    #[allow(clippy::expect_used)]
    fn deref(&self) -> &PgConnection {
        self.0.as_ref().expect(TAKEN)
    }
}

impl DerefMut for Guarded {
    #[allow(clippy::expect_used)]
    fn deref_mut(&mut self) -> &mut PgConnection {
        self.0.as_mut().expect(TAKEN)
    }
}

impl Drop for Guarded {
    fn drop(&mut self) {
        if let Some(connection) = self.0.take() {
            // Closing the socket is enough: the server rolls back.
            drop(connection.detach());
        }
    }
}

/// Whether a connection is outside of any transaction, as the server sees it: the answer for a pool's
/// [`after_release`](sqlx::pool::PoolOptions::after_release), so that a `BEGIN` that was cut off does not go back into the
/// pool.
///
/// ```no_run
/// # async fn f() -> Result<(), sqlx::Error> {
/// let pool = sqlx::postgres::PgPoolOptions::new()
///     .after_release(|connection, _| Box::pin(postrider_postgres::is_idle(connection)))
///     .connect("postgres://shop@localhost/shop")
///     .await?;
/// # Ok(()) }
/// ```
///
/// # Errors
/// The driver's, if the connection is lost.
pub async fn is_idle(connection: &mut PgConnection) -> sqlx::Result<bool> {
    // In the simple protocol a statement by itself begins its transaction at the very time it is received.
    let query = sqlx::raw_sql("SELECT now() = statement_timestamp()");
    let row = sqlx::Executor::fetch_one(connection, query).await?;
    sqlx::Row::try_get(&row, 0)
}
