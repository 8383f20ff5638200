//! Getting lanes, keeping them, and giving them back.

use super::{Due, Held, LANES, Lane, Shared};
use crate::{error::doing, row::secs};
use postrider_core::{
    Message, Result, Topic,
    clock::Moment,
    log::{Holdings, Lease, Owner, Renewal},
};
use rustc_hash::{FxHashMap, FxHashSet};
use sqlx::{Connection as _, PgConnection, Row as _, postgres::PgRow};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use uuid::Uuid;

/// How often a session that does not own every lane looks for others at a claim.
const LOOK_EVERY: Duration = Duration::from_millis(250);
/// How long a lane that was handed back is left to those that have less than their part.
const GRACE: Duration = Duration::from_secs(2);

/// Sees to it that the session has the lanes it may have.
pub(super) async fn hold(shared: &Arc<Shared>, connection: &mut PgConnection) -> Result<()> {
    let now = shared.elapsed();
    let (is_held, wants_more) = {
        let held = shared.held();
        let looks_again = held.looked_for_lanes_at + LOOK_EVERY <= now || held.lanes.is_empty();
        (
            held.tenure > 0 && held.lease.is_held(),
            held.lanes.len() < LANES && looks_again,
        )
    };
    if !is_held {
        begin_tenure(shared, connection).await?;
    } else {
        give_back(shared, connection).await?;
        if wants_more {
            let owner = shared.held().owner;
            take(shared, connection, owner, None).await?;
        }
    }
    Ok(())
}

async fn begin_tenure(shared: &Arc<Shared>, connection: &mut PgConnection) -> Result<()> {
    let (owner, owners) = {
        let mut held = shared.held();
        held.end_tenure();
        let owners = held.owners.clone();
        // The name of a tenure that is over is never used again, so nothing of it can be taken for this one's.
        if held.tenure > 0 {
            held.owner = *Owner::new().as_uuid();
        }
        held.tenure += 1;
        let owner = held.owner;
        held.owners.push(owner);
        (owner, owners)
    };
    let sent = shared.elapsed();
    take(shared, connection, owner, Some((sent, owners))).await
}

/// Takes what may be taken: lanes whose owner is gone at once, those handed back up to the session's part.
async fn take(
    shared: &Arc<Shared>,
    connection: &mut PgConnection,
    owner: Uuid,
    begins: Option<(Moment, Vec<Uuid>)>,
) -> Result<()> {
    let log = &shared.log;
    let (sql, failed) = (log.sql(), doing("taking lanes"));
    let mut tx = connection.begin().await.map_err(&failed)?;
    if begins.is_some() {
        // Whatever has become of it: a failover to a standby that is behind, a restore, a test that empties the tables.
        let id = log.mailbox_in(&mut tx, &shared.name).await?;
        shared.mailbox.store(id, Ordering::Release);
        let restore = sqlx::query(sql.add_lanes.clone()).bind(id);
        restore.execute(&mut *tx).await.map_err(&failed)?;
    }
    let mailbox = shared.mailbox();
    // Those who take lanes take turns, so that one sees what the other has registered and taken.
    let lock = sqlx::query(sql.lock_mailbox.clone()).bind(mailbox);
    lock.execute(&mut *tx).await.map_err(&failed)?;
    // Waits for a renewal that is being committed, and sees it: nothing is taken from the living.
    let previous: &[Uuid] = begins.as_ref().map_or(&[], |(_, owners)| owners);
    let forget = sqlx::query(sql.forget_expired.clone()).bind(mailbox).bind(previous);
    forget.execute(&mut *tx).await.map_err(&failed)?;
    if begins.is_some() {
        let register = sqlx::query(sql.register.clone()).bind(mailbox).bind(owner);
        let register = register.bind(secs(shared.options.lease)).execute(&mut *tx).await;
        register.map_err(&failed)?;
    }
    let relays = sqlx::query_scalar::<_, i64>(sql.count_relays.clone()).bind(mailbox);
    let relays = usize::try_from(relays.fetch_one(&mut *tx).await.map_err(&failed)?).unwrap_or(1);
    let takeable = sqlx::query(sql.takeable.clone()).bind(mailbox).bind(secs(GRACE));
    let takeable = takeable.fetch_all(&mut *tx).await.map_err(&failed)?;
    let has = if begins.is_some() { 0 } else { shared.held().lanes.len() };
    let share = LANES.div_ceil(relays.max(1));
    let (mut wanted, mut free) = (Vec::new(), Vec::new());
    for row in &takeable {
        let (lane, is_free, is_stale): (i16, bool, bool) = (row.get(0), row.get(1), row.get(2));
        if !is_free || is_stale {
            wanted.push(lane);
        } else {
            free.push(lane);
        }
    }
    let room = share.saturating_sub(has + wanted.len());
    wanted.extend(free.into_iter().take(room));
    let mut taken: Vec<(i16, i64)> = Vec::new();
    if !wanted.is_empty() {
        let take = sqlx::query_as(sql.take.clone()).bind(mailbox).bind(owner).bind(wanted);
        taken = take.fetch_all(&mut *tx).await.map_err(&failed)?;
    }
    tx.commit().await.map_err(&failed)?;

    let lanes: Vec<i16> = taken.iter().map(|(lane, _)| *lane).collect();
    {
        let mut held = shared.held();
        if let Some((sent, _)) = &begins {
            held.lease = Lease::new(log.clock().clone(), *sent, shared.options.lease);
            held.renewal = Some(renewal(shared, &held.lease, owner));
            held.owners = vec![owner];
        }
        held.relays = relays;
        held.looked_for_lanes_at = shared.elapsed();
    }
    if lanes.is_empty() {
        return Ok(());
    }
    match load(shared, connection, &lanes).await {
        Ok(loaded) => loaded.enter(shared, taken, owner),
        Err(error) => {
            // The lanes are ours and nothing is known of them: to be taken again.
            shared.held().end_tenure();
            Err(error)
        }
    }
}

/// What has to be known of a lane before anything of it is given.
struct Loaded {
    parked: Vec<PgRow>,
    topics: Vec<String>,
    certain: i64,
}

/// In later snapshots than the one that took the lanes: whoever had them can write nothing that is not in it.
async fn load(shared: &Shared, connection: &mut PgConnection, lanes: &[i16]) -> Result<Loaded> {
    let (sql, mailbox, failed) = (shared.log.sql(), shared.mailbox(), doing("reading what is parked"));
    let mut tx = connection.begin().await.map_err(&failed)?;
    let raise = sqlx::query(sql.raise_position.clone()).fetch_optional(&mut *tx);
    if let Some(row) = raise.await.map_err(&failed)? {
        tracing::warn!("the sequence of the event log was set back: it goes on behind the ids that are in use");
        let renumber = sqlx::query(sql.renumber.clone())
            .bind(row.get::<i64, _>(0))
            .execute(&mut *tx);
        renumber.await.map_err(&failed)?;
    }
    tx.commit().await.map_err(&failed)?;
    super::claim::look(shared, connection).await?;
    let certain = shared.held().floor.position();
    let keys = sqlx::query(sql.parked_keys.clone()).bind(mailbox).bind(lanes);
    let parked = keys.fetch_all(&mut *connection).await.map_err(&failed)?;
    let waiting = sqlx::query_scalar(sql.waiting_topics.clone()).bind(mailbox).bind(lanes);
    let topics = waiting.fetch_all(connection).await.map_err(failed)?;
    Ok(Loaded {
        parked,
        topics,
        certain,
    })
}

impl Loaded {
    fn enter(self, shared: &Shared, taken: Vec<(i16, i64)>, owner: Uuid) -> Result<()> {
        let mut held = shared.held();
        if held.owner != owner || !held.lease.is_held() {
            return Ok(());
        }
        // What is due in them has not been looked for.
        held.due = Due::default();
        for (lane, epoch) in taken {
            let lane_state = Lane {
                epoch,
                cursor: 0,
                holdings: Holdings::default(),
                records: FxHashMap::default(),
                parked: FxHashMap::default(),
                moving: FxHashSet::default(),
                largest: 0,
                parked_cursor: self.certain,
                is_leaving: false,
            };
            held.lanes.insert(lane, lane_state);
        }
        for row in self.parked {
            let (lane, last): (i16, i64) = (row.get(0), row.get(1));
            let key = key_hash(row.get(2), row.get(3));
            if let Some(lane) = held.lanes.get_mut(&lane) {
                let known = lane.parked.entry(key).or_default();
                *known = last.max(*known);
            }
        }
        for topic in self.topics {
            // One that is none cannot be resumed by name; its rows are dead letters as soon as they are read.
            held.untold.extend(Topic::parse(topic));
        }
        held.shrink();
        Ok(())
    }
}

/// As [`Message::key_hash`].
pub(super) fn key_hash(topic: &str, key: &str) -> u64 {
    Message::hash_of_key(topic, key)
}

/// Hands back lanes that are beyond the session's part, once nothing of them is out.
async fn give_back(shared: &Shared, connection: &mut PgConnection) -> Result<()> {
    let (owner, leaving) = {
        let mut held = shared.held();
        held.shrink();
        let leaves = |lane: &Lane| lane.is_leaving && lane.records.is_empty();
        let leaving: Vec<i16> = held
            .lanes
            .iter()
            .filter(|(_, lane)| leaves(lane))
            .map(|(n, _)| *n)
            .collect();
        // Forgotten before they are handed back, so that nothing is given of them in between.
        leaving.iter().for_each(|lane| {
            held.lanes.remove(lane);
        });
        (held.owner, leaving)
    };
    if leaving.is_empty() {
        return Ok(());
    }
    let free = sqlx::query(shared.log.sql().free.clone())
        .bind(shared.mailbox())
        .bind(owner)
        .bind(leaving);
    if let Err(error) = free.execute(connection).await {
        shared.held().end_tenure();
        return Err(doing("handing back lanes")(error));
    }
    Ok(())
}

fn renewal(shared: &Arc<Shared>, lease: &Lease, owner: Uuid) -> Renewal {
    // A session that is dropped takes the task with it, so the task may hold what the session holds only weakly.
    let (session, length) = (Arc::downgrade(shared), shared.options.lease);
    lease.keep_renewed(length, move || {
        let session = session.clone();
        async move {
            let Some(shared) = session.upgrade() else {
                return Ok(false);
            };
            let log = &shared.log;
            let relays: Option<i64> = log
                .watch()
                .with_connection(log, length / 4, async |connection| {
                    let renew = sqlx::query_scalar(log.sql().renew.clone())
                        .bind(shared.mailbox())
                        .bind(owner);
                    let renew = renew
                        .bind(secs(length))
                        .bind(shared.name.to_string())
                        .fetch_optional(connection)
                        .await;
                    renew.map_err(doing("renewing the lease"))
                })
                .await?;
            if let Some(relays) = relays {
                let mut held = shared.held();
                if held.owner == owner {
                    held.relays = usize::try_from(relays).unwrap_or(1);
                    if held.shrink() {
                        shared.tell();
                    }
                }
            }
            Ok(relays.is_some())
        }
    })
}

impl Held {
    /// The lanes and epochs of a tenure, as the fence takes them.
    pub(super) fn fence(&self) -> (Vec<i16>, Vec<i64>) {
        self.lanes.iter().map(|(lane, state)| (*lane, state.epoch)).unzip()
    }
}
