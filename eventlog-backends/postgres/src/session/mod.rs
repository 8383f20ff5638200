//! A relay's hold on a mailbox.
//!
//! A session works in *tenures*. A tenure has a fresh owner's name in the database, a [`Lease`] that is renewed on a
//! connection of its own, and lanes, which come and go as relays do. Whatever is known of what lies in the tables
//! belongs to one tenure: it ends with the lease, with a fence that was down, and with the loss of a connection, since
//! the server may have crashed and forgotten what it had handed out.

mod claim;
mod floor;
mod lanes;
mod settle;
#[cfg(test)]
mod tests;

use crate::{
    PostgresLog,
    error::{doing, is_lost},
    log::Role,
    tid::Tid,
};
use async_trait::async_trait;
use floor::Floor;
use postrider_core::{
    Error, ErrorKind, Mailbox, Message, Result, Topic,
    clock::{Moment, Timestamp},
    log::{Claim, Claimed, Holdings, Lease, RecordTag, Renewal, Session, SessionOptions, SettleReport, Settled},
};
use rustc_hash::{FxHashMap, FxHashSet};
use sqlx::{Connection as _, PgConnection};
use std::{
    collections::BTreeMap,
    sync::{
        Arc, Mutex as StdMutex, MutexGuard as StdMutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicI16, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Mutex, Notify};
use uuid::Uuid;

/// How many lanes a mailbox has: part of the format.
const LANES: usize = 64;

pub(crate) struct PostgresSession {
    shared: Arc<Shared>,
}

/// What the session shares with the task that renews its lease, and with the look for news.
pub(crate) struct Shared {
    pub(crate) log: PostgresLog,
    name: Mailbox,
    /// The mailbox's id, as the tenure that began last found it.
    mailbox: AtomicI16,
    options: SessionOptions,
    /// Claims and settles overlap, so each has a connection. `None` after it was lost.
    claim: Mutex<Option<PgConnection>>,
    settle: Mutex<Option<PgConnection>>,
    /// Never locked across an await.
    held: StdMutex<Held>,
    news: Notify,
    is_waiting: AtomicBool,
    told_of_cache: AtomicBool,
}

struct Held {
    tenure: u64,
    /// This tenure's name in the database.
    owner: Uuid,
    /// Those of tenures that may still have lanes, which are ours to take.
    owners: Vec<Uuid>,
    lease: Lease,
    renewal: Option<Renewal>,
    lanes: BTreeMap<i16, Lane>,
    /// How many sessions share the mailbox.
    relays: usize,
    looked_for_lanes_at: Moment,
    floor: Floor,
    due: Due,
    /// How many lanes had more than they gave at the last claim, and where the next one begins.
    full_lanes: usize,
    next_lane: usize,
    /// Whether large payloads were among the last that were read.
    is_large: bool,
    /// Topics that wait, in lanes newly come to: told with the next claim.
    untold: Vec<Topic>,
    /// When it was last looked for events below the cursors.
    swept_at: Option<Moment>,
    closed: bool,
}

/// What is known of due times.
#[derive(Debug, Clone, Default)]
struct Due {
    /// Nothing that is not known is due before these.
    parked_from: Option<Timestamp>,
    scheduled_from: Option<Timestamp>,
    checked_at: Option<Moment>,
    /// Since when not everything has been looked up.
    since: Option<Moment>,
    /// When the next thing known becomes due.
    next: Option<Moment>,
    /// The server's clock at the last check, to notice a step of it.
    server_time: Option<(Timestamp, Moment)>,
}

/// A part of a mailbox.
struct Lane {
    epoch: i64,
    /// Everything up to here is known: out, passed over, or gone.
    cursor: i64,
    holdings: Holdings,
    /// The records that are out.
    records: FxHashMap<i64, Out>,
    /// Keys of which something is parked, by [`Message::key_hash`], with the last position parked.
    parked: FxHashMap<u64, i64>,
    /// The largest payload that was read of it.
    largest: usize,
    /// Passed over, and just being parked by a claim.
    moving: FxHashSet<u64>,
    /// Everything parked up to here is known.
    parked_cursor: i64,
    /// To be handed back as soon as nothing of it is out.
    is_leaving: bool,
}

#[derive(Clone)]
struct Out {
    message: Message,
    /// Where its row lay in the event table.
    at: Option<Tid>,
    is_parked: bool,
}

/// What the look for news goes by.
pub(crate) struct Outlook {
    pub(crate) cursors: Vec<(i16, i64)>,
    pub(crate) parked_from: Timestamp,
    pub(crate) scheduled_from: Timestamp,
}

fn tag(tenure: u64, lane: i16, id: i64) -> RecordTag {
    RecordTag(u128::from(tenure) << 72 | u128::from(lane.unsigned_abs()) << 64 | u128::from(id.unsigned_abs()))
}

#[allow(clippy::cast_possible_truncation, clippy::cast_possible_wrap)]
fn untag(tag: RecordTag) -> (u64, i16, i64) {
    ((tag.0 >> 72) as u64, (tag.0 >> 64) as u8 as i16, tag.0 as u64 as i64)
}

/// Positions are ids, which Postgres counts from 1.
fn position(id: i64) -> u64 {
    id.unsigned_abs()
}

fn id(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

impl Held {
    /// Nothing that was known holds any more; the next claim begins a new tenure.
    fn end_tenure(&mut self) {
        self.lease.end();
        self.renewal = None;
        self.lanes.clear();
        self.floor = Floor::default();
        self.due = Due::default();
        self.untold.clear();
        self.swept_at = None;
    }

    /// How many lanes are this session's part.
    fn share(&self) -> usize {
        LANES.div_ceil(self.relays.max(1))
    }

    /// Marks what is beyond this session's part to be handed back, the idle ones first. `true` if there is any.
    fn shrink(&mut self) -> bool {
        let keep = self.share();
        let staying = self.lanes.values().filter(|lane| !lane.is_leaving).count();
        let mut excess = staying.saturating_sub(keep);
        if excess > 0 {
            let mut by_load: Vec<_> = self.lanes.values_mut().filter(|lane| !lane.is_leaving).collect();
            by_load.sort_by_key(|lane| lane.records.len());
            for lane in by_load {
                if excess == 0 {
                    break;
                }
                lane.is_leaving = true;
                excess -= 1;
            }
        }
        self.lanes.values().any(|lane| lane.is_leaving)
    }

    fn active(&self) -> impl Iterator<Item = (&i16, &Lane)> {
        self.lanes.iter().filter(|(_, lane)| !lane.is_leaving)
    }
}

impl PostgresSession {
    pub(crate) fn new(
        log: PostgresLog,
        name: Mailbox,
        mailbox: i16,
        options: SessionOptions,
        connection: PgConnection,
    ) -> Self {
        let held = Held {
            tenure: 0,
            owner: *options.owner.as_uuid(),
            owners: Vec::new(),
            lease: Lease::none(log.clock().clone()),
            renewal: None,
            lanes: BTreeMap::new(),
            relays: 1,
            looked_for_lanes_at: Moment::ZERO,
            floor: Floor::default(),
            due: Due::default(),
            full_lanes: LANES,
            next_lane: 0,
            is_large: false,
            untold: Vec::new(),
            swept_at: None,
            closed: false,
        };
        let shared = Arc::new(Shared {
            log,
            name,
            mailbox: AtomicI16::new(mailbox),
            options,
            claim: Mutex::new(Some(connection)),
            settle: Mutex::new(None),
            held: StdMutex::new(held),
            news: Notify::new(),
            is_waiting: AtomicBool::new(false),
            told_of_cache: AtomicBool::new(false),
        });
        shared.log.watch().register(&shared);
        Self { shared }
    }
}

impl Shared {
    fn held(&self) -> StdMutexGuard<'_, Held> {
        self.held.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn mailbox(&self) -> i16 {
        self.mailbox.load(Ordering::Acquire)
    }

    fn elapsed(&self) -> Moment {
        self.log.clock().elapsed()
    }

    pub(crate) fn is_waiting(&self) -> bool {
        self.is_waiting.load(Ordering::Acquire)
    }

    /// There is something to claim.
    pub(crate) fn tell(&self) {
        self.news.notify_one();
    }

    pub(crate) fn outlook(&self) -> Outlook {
        let held = self.held();
        let from = |time: Option<Timestamp>| time.unwrap_or(Timestamp::UNIX_EPOCH);
        Outlook {
            cursors: held.active().map(|(lane, state)| (*lane, state.cursor)).collect(),
            parked_from: from(held.due.parked_from),
            scheduled_from: from(held.due.scheduled_from),
        }
    }

    fn check_open(&self) -> Result<()> {
        if self.held().closed {
            return Err(Error::new(ErrorKind::Closed, "the session has been closed"));
        }
        Ok(())
    }

    /// Runs `work` on one of the two connections, which is opened anew if it was lost. If it is lost now, or `work` is
    /// cut off, the tenure ends.
    async fn with_connection<T>(
        &self,
        connection: &Mutex<Option<PgConnection>>,
        role: Role,
        work: impl AsyncFnOnce(&mut PgConnection) -> Result<T>,
    ) -> Result<T> {
        let mut guard = connection.lock().await;
        self.check_open()?;
        let mut connection = match guard.take() {
            Some(connection) => connection,
            None => self.log.own_connection(role).await?,
        };
        let mut tenure = EndTenure(Some(self));
        let result = work(&mut connection).await;
        if !result.as_ref().is_err_and(is_lost) {
            tenure.0 = None;
            *guard = Some(connection);
        }
        result
    }
}

/// Ends the tenure when it is dropped, unless told not to.
struct EndTenure<'a>(Option<&'a Shared>);

impl Drop for EndTenure<'_> {
    fn drop(&mut self) {
        if let Some(shared) = self.0 {
            shared.held().end_tenure();
        }
    }
}

#[async_trait]
impl Session for PostgresSession {
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        let shared = &self.shared;
        shared
            .with_connection(&shared.claim, Role::Claim, async |connection| {
                claim::claim(shared, connection, request).await
            })
            .await
    }

    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        let shared = &self.shared;
        shared
            .with_connection(&shared.settle, Role::Settle, async |connection| {
                settle::settle(shared, connection, batch).await
            })
            .await
    }

    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        let shared = &self.shared;
        shared
            .with_connection(&shared.settle, Role::Settle, async |connection| {
                settle::resume(shared, connection, topic, max).await
            })
            .await
    }

    async fn wait(&self, at_most: Duration) -> Result<()> {
        let (shared, clock) = (&self.shared, self.shared.log.clock());
        let until = clock.elapsed().saturating_add(at_most);
        let _waiting = Waiting::begin(&shared.is_waiting);
        loop {
            let now = clock.elapsed();
            let left = until.saturating_sub(now);
            if left.is_zero() || shared.held().closed {
                return Ok(());
            }
            let (tidy, lease) = {
                let held = shared.held();
                if held.lanes.is_empty() {
                    (None, None)
                } else {
                    // Dead rows behind the cursor cost every look: one more claim moves it on.
                    let lease = held.lease.remaining().unwrap_or_default();
                    (held.floor.tidy_in(now), Some(lease))
                }
            };
            if [tidy, lease].into_iter().flatten().any(|left| left.is_zero()) {
                return Ok(());
            }
            let next_look = shared.log.watch().due_in(now, shared.options.poll_interval);
            if next_look.is_zero() {
                let log = shared.log.clone();
                // A task of its own, since this may be cut off at any time.
                tokio::spawn(async move { log.watch().poll(&log).await });
                continue;
            }
            let pause = [Some(left), Some(next_look), tidy, lease].into_iter().flatten().min();
            tokio::select! {
                () = clock.sleep(pause.unwrap_or(left)) => {}
                () = shared.news.notified() => return Ok(()),
            }
        }
    }

    async fn close(&self) -> Result<()> {
        let shared = &self.shared;
        let (mut claim, mut settle) = (shared.claim.lock().await, shared.settle.lock().await);
        let owners = {
            let mut held = shared.held();
            held.closed = true;
            held.end_tenure();
            held.owners.clone()
        };
        shared.tell();
        if !owners.is_empty() {
            let handed_back = match claim.as_mut().or(settle.as_mut()) {
                Some(connection) => shared.hand_back(connection, &owners).await,
                // What was using them has been cut off.
                None => shared.hand_back_anew(&owners).await,
            };
            match handed_back {
                Err(error) if is_lost(&error) => shared.hand_back_anew(&owners).await?,
                handed_back => handed_back?,
            }
            shared.held().owners.clear();
        }
        for connection in [claim.take(), settle.take()].into_iter().flatten() {
            // There is nothing left to be said on it.
            let _ = connection.close().await;
        }
        Ok(())
    }
}

impl Shared {
    async fn hand_back(&self, connection: &mut PgConnection, owners: &[Uuid]) -> Result<()> {
        for owner in owners {
            for statement in [&self.log.sql().free_all, &self.log.sql().unregister] {
                let free = sqlx::query(statement.clone()).bind(self.mailbox()).bind(owner);
                let free = free.execute(&mut *connection).await;
                free.map_err(doing("handing back the lanes"))?;
            }
        }
        Ok(())
    }

    async fn hand_back_anew(&self, owners: &[Uuid]) -> Result<()> {
        let mut connection = self.log.own_connection(Role::Claim).await?;
        self.hand_back(&mut connection, owners).await?;
        let closed = connection.close().await;
        closed.map_err(doing("closing the relay's connection"))
    }
}

/// Says that a session waits, for as long as it does.
struct Waiting<'a>(&'a AtomicBool);

impl<'a> Waiting<'a> {
    fn begin(flag: &'a AtomicBool) -> Self {
        flag.store(true, Ordering::Release);
        Self(flag)
    }
}

impl Drop for Waiting<'_> {
    fn drop(&mut self) {
        self.0.store(false, Ordering::Release);
    }
}

impl std::fmt::Debug for PostgresSession {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("PostgresSession")
            .field("mailbox", &self.shared.name)
            .field("owner", &self.shared.options.owner)
            .finish_non_exhaustive()
    }
}
