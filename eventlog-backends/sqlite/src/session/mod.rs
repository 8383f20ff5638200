//! A relay's hold on a mailbox.

mod claim;
mod lease;
mod settle;
mod unreadable;

use crate::{SqliteLog, error::doing, log::is_stuck, row::micros};
use async_trait::async_trait;
use lease::Observed;
use postrider_core::{
    Error, ErrorKind, Mailbox, Message, Result, Topic,
    clock::Moment,
    log::{Claim, Claimed, Holdings, Lease, RecordTag, Renewal, Session, SessionOptions, SettleReport, Settled},
};
use sqlx::{Connection as _, Sqlite, SqliteConnection, Transaction};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex as StdMutex, MutexGuard as StdMutexGuard, PoisonError,
        atomic::{AtomicI64, Ordering},
    },
    time::Duration,
};
use tokio::sync::Mutex;

pub(crate) struct SqliteSession {
    shared: Arc<Shared>,
}

/// What the session shares with the task that renews its lease.
struct Shared {
    log: SqliteLog,
    name: Mailbox,
    /// The mailbox's id, as it was found when the lease was taken.
    mailbox: AtomicI64,
    options: SessionOptions,
    /// The relay's own connection; whoever has it may change what is held. `None` after it was lost.
    connection: Mutex<Option<SqliteConnection>>,
    /// Never locked across an await.
    held: StdMutex<Held>,
}

struct Held {
    lease: Lease,
    epoch: i64,
    holdings: Holdings,
    /// The records that are out, by position.
    records: HashMap<u64, Out>,
    /// Everything up to here has been read.
    cursor: i64,
    renewal: Option<Renewal>,
    observed: Option<Observed>,
    /// Whether the engine knows which topics are waited for.
    waiting_told: bool,
    data_version: Option<i64>,
    closed: bool,
}

#[derive(Clone)]
struct Out {
    message: Message,
    is_parked: bool,
}

fn tag(epoch: i64, position: u64) -> RecordTag {
    RecordTag((epoch.unsigned_abs() as u128) << 64 | u128::from(position))
}

#[allow(clippy::cast_possible_truncation)]
fn untag(tag: RecordTag) -> (u64, u64) {
    ((tag.0 >> 64) as u64, tag.0 as u64)
}

/// Positions are ids, which SQLite counts from 1.
fn id(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

fn position(id: i64) -> u64 {
    id.unsigned_abs()
}

impl SqliteSession {
    pub(crate) fn new(
        log: SqliteLog,
        name: Mailbox,
        mailbox: i64,
        options: SessionOptions,
        connection: SqliteConnection,
    ) -> Self {
        let held = Held {
            lease: Lease::none(log.clock().clone()),
            epoch: 0,
            holdings: Holdings::default(),
            records: HashMap::new(),
            cursor: 0,
            renewal: None,
            observed: None,
            waiting_told: false,
            data_version: None,
            closed: false,
        };
        Self {
            shared: Arc::new(Shared {
                log,
                name,
                mailbox: AtomicI64::new(mailbox),
                options,
                connection: Mutex::new(Some(connection)),
                held: StdMutex::new(held),
            }),
        }
    }
}

impl Shared {
    fn held(&self) -> StdMutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn now(&self) -> i64 {
        micros(self.log.clock().now())
    }

    fn mailbox(&self) -> i64 {
        self.mailbox.load(Ordering::Acquire)
    }

    fn elapsed(&self) -> Moment {
        self.log.clock().elapsed()
    }

    fn check_open(&self) -> Result<()> {
        if self.held().closed {
            return Err(Error::new(ErrorKind::Closed, "the session has been closed"));
        }
        Ok(())
    }

    /// Runs `work` on the connection, which is opened anew if it was lost.
    async fn with_connection<T>(&self, work: impl AsyncFnOnce(&mut SqliteConnection) -> Result<T>) -> Result<T> {
        let mut guard = self.connection.lock().await;
        self.check_open()?;
        let mut connection = match guard.take() {
            Some(connection) => connection,
            None => self.log.connect().await?,
        };
        // Taken out for the time of the work: if this is cancelled in the middle, the connection is dropped with
        // whatever it was doing, and the next one is opened anew.
        let result = work(&mut connection).await;
        let is_lost = match &result {
            Ok(_) => false,
            Err(error) => {
                (error.kind() == ErrorKind::Unavailable && !is_busy(error)) || is_stuck(&mut connection).await
            }
        };
        if !is_lost {
            *guard = Some(connection);
        }
        result
    }

    /// A transaction that writes, if the lease is still ours by the log's own account.
    async fn fenced<'c>(
        &self,
        connection: &'c mut SqliteConnection,
        epoch: i64,
    ) -> Result<Option<Transaction<'c, Sqlite>>> {
        let failed = doing("checking the lease");
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        let fence = sqlx::query(self.log.sql().fence.clone())
            .bind(self.mailbox())
            .bind(&self.options.owner.as_uuid().as_bytes()[..])
            .bind(epoch);
        if fence.fetch_optional(&mut *tx).await.map_err(&failed)?.is_some() {
            return Ok(Some(tx));
        }
        tx.rollback().await.map_err(failed)?;
        self.held().lease.end();
        Ok(None)
    }
}

fn is_busy(error: &Error) -> bool {
    let source = std::error::Error::source(error).and_then(|source| source.downcast_ref::<sqlx::Error>());
    source.is_some_and(|error| crate::error::code(error).is_some())
}

#[async_trait]
impl Session for SqliteSession {
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        let shared = &self.shared;
        shared
            .with_connection(async |connection| claim::claim(shared, connection, request).await)
            .await
    }

    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        let shared = &self.shared;
        shared
            .with_connection(async |connection| settle::settle(shared, connection, batch).await)
            .await
    }

    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        let shared = &self.shared;
        shared
            .with_connection(async |connection| {
                let failed = doing("resuming a topic");
                let epoch = shared.held().epoch;
                let Some(mut tx) = shared.fenced(connection, epoch).await? else {
                    return Ok(0);
                };
                let resume = sqlx::query(shared.log.sql().resume.clone())
                    .bind(shared.mailbox())
                    .bind(topic.as_str());
                let max = i64::try_from(max).unwrap_or(i64::MAX);
                let resumed = resume
                    .bind(max)
                    .bind(shared.now())
                    .execute(&mut *tx)
                    .await
                    .map_err(&failed)?;
                tx.commit().await.map_err(failed)?;
                Ok(resumed.rows_affected())
            })
            .await
    }

    async fn wait(&self, at_most: Duration) -> Result<()> {
        let (shared, clock) = (&self.shared, self.shared.log.clock());
        let every = shared.log.options().watch_interval;
        let until = clock.elapsed().saturating_add(at_most);
        loop {
            let left = until.saturating_sub(clock.elapsed());
            if left.is_zero() || shared.held().closed {
                return Ok(());
            }
            clock.sleep(left.min(every)).await;
            // It changes when another connection has written: of this process or another.
            let version: i64 = shared
                .with_connection(async |connection| {
                    let version = sqlx::query_scalar("PRAGMA data_version").fetch_one(connection);
                    version.await.map_err(doing("looking for news"))
                })
                .await?;
            let seen = shared.held().data_version.replace(version);
            if seen.is_some_and(|seen| seen != version) {
                return Ok(());
            }
        }
    }

    async fn close(&self) -> Result<()> {
        let shared = &self.shared;
        let mut guard = shared.connection.lock().await;
        let epoch = {
            let mut held = shared.held();
            if held.closed {
                return Ok(());
            }
            held.closed = true;
            held.lease.end();
            held.renewal = None;
            held.holdings.clear();
            held.records.clear();
            held.epoch
        };
        let connection = match guard.take() {
            // What was using it has been cut off; the lease is to be handed back all the same.
            None if epoch > 0 => Some(shared.log.connect().await?),
            connection => connection,
        };
        if let Some(mut connection) = connection {
            let free = sqlx::query(shared.log.sql().free_lease.clone())
                .bind(shared.mailbox())
                .bind(&shared.options.owner.as_uuid().as_bytes()[..])
                .bind(epoch);
            free.execute(&mut connection)
                .await
                .map_err(doing("handing back the lease"))?;
            connection
                .close()
                .await
                .map_err(doing("closing the relay's connection"))?;
        }
        Ok(())
    }
}

impl std::fmt::Debug for SqliteSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SqliteSession")
            .field("mailbox", &self.shared.name)
            .field("owner", &self.shared.options.owner)
            .finish_non_exhaustive()
    }
}
