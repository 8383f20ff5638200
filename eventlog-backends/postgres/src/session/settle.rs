//! Writing down what became of records.

use super::{Held, Out, Shared, id, position, untag};
use crate::{
    append::{KeyOf, state},
    error::{doing, is_refused},
    log::unexpected,
    row::{errors_to_text, secs},
    tid::Tid,
};
use postrider_core::{
    Result, Topic,
    log::{AttemptError, Outcome, RecordTag, SettleReport, Settled, Until},
};
use rustc_hash::FxHashSet;
use sqlx::{Connection as _, PgConnection};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use uuid::Uuid;

/// Which of the lanes are still the owner's; nobody takes them before the end of the transaction.
pub(super) async fn standing(
    shared: &Shared,
    connection: &mut PgConnection,
    owner: Uuid,
    (lanes, epochs): &(Vec<i16>, Vec<i64>),
) -> Result<Vec<i16>> {
    let fence = sqlx::query_scalar(shared.log.sql().lock_fence.clone())
        .bind(shared.mailbox)
        .bind(owner)
        .bind(lanes)
        .bind(epochs);
    fence.fetch_all(connection).await.map_err(doing("checking the lease"))
}

pub(super) async fn resume(shared: &Shared, connection: &mut PgConnection, topic: &Topic, max: usize) -> Result<u64> {
    let failed = doing("resuming a topic");
    let (tenure, owner, fence) = {
        let held = shared.held();
        (held.tenure, held.owner, held.fence())
    };
    if fence.0.is_empty() {
        return Ok(0);
    }
    let mut tx = connection.begin().await.map_err(&failed)?;
    let standing = standing(shared, &mut tx, owner, &fence).await?;
    if standing.len() < fence.0.len() {
        // A lane may have been handed back meanwhile; one that is still ours here is lost.
        let mut held = shared.held();
        let is_lost = |lane: &i16| held.lanes.contains_key(lane) && !standing.contains(lane);
        if held.tenure == tenure && fence.0.iter().any(is_lost) {
            held.end_tenure();
        }
    }
    let resume = sqlx::query(shared.log.sql().resume.clone())
        .bind(shared.mailbox)
        .bind(topic.as_str())
        .bind(standing);
    let resume = resume
        .bind(i64::try_from(max).unwrap_or(i64::MAX))
        .execute(&mut *tx)
        .await;
    let resumed = resume.map_err(&failed)?;
    tx.commit().await.map_err(failed)?;
    shared.held().due.checked_at = None;
    Ok(resumed.rows_affected())
}

pub(super) async fn settle(shared: &Shared, connection: &mut PgConnection, batch: &[Settled]) -> Result<SettleReport> {
    let (plan, mut lost) = {
        let held = shared.held();
        Plan::of(&held, batch)?
    };
    if plan.known.is_empty() {
        return Ok(SettleReport::new(lost));
    }
    let keep = shared.options.keep_succeeded;
    let written = match plan.write(shared, connection, keep).await {
        // Whatever is wrong with the history, the events are done.
        Err(error) if keep && is_refused(&error) => {
            let written = plan.write(shared, connection, false).await?;
            if plan.has_done() && shared.log.count_history_failure() == 0 {
                tracing::warn!(
                    error = error.to_chain(),
                    "what succeeded could not be kept in the history and was deleted (said once; `history_failures` counts)"
                );
            }
            written
        }
        written => written?,
    };
    let mut held = shared.held();
    let Some(still_parked) = written else {
        if held.tenure == plan.tenure {
            held.end_tenure();
        }
        lost.extend(plan.known);
        return Ok(SettleReport::new(lost));
    };
    let is_plain = plan.is_plain();
    if held.tenure == plan.tenure {
        plan.apply(&mut held, &still_parked);
    }
    let may_claim = !is_plain || held.active().any(|(_, lane)| lane.holdings.has_freed());
    Ok(SettleReport::new(lost).with_may_claim(may_claim))
}

/// Records, by lane and id.
#[derive(Debug, Default)]
struct Places {
    lanes: Vec<i16>,
    ids: Vec<i64>,
}

impl Places {
    fn push(&mut self, (lane, at): (i16, i64)) {
        self.lanes.push(lane);
        self.ids.push(at);
    }
    fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Records that are parked, or dead letters.
#[derive(Debug, Default)]
struct Parkings {
    places: Places,
    attempts: Vec<i32>,
    states: Vec<i16>,
    after: Vec<f64>,
    errors: Vec<String>,
}

/// What a settle is to do: worked out in memory, written in one transaction, and then done in memory.
struct Plan {
    tenure: u64,
    owner: Uuid,
    fence: (Vec<i16>, Vec<i64>),
    /// The records that are ours to settle.
    known: Vec<RecordTag>,
    done: Places,
    /// Where they lay.
    done_at: Vec<Tid>,
    done_parked: Places,
    park: Parkings,
    set_parked: Parkings,
    park_behind: Places,
    give_back_parked: Places,
    /// Keys of which what is parked changes.
    keys: BTreeSet<KeyOf>,
    effects: Effects,
}

/// What is to happen in memory once it is written.
#[derive(Default)]
struct Effects {
    let_go: Vec<(i16, i64)>,
    give_back: Vec<(i16, i64)>,
    /// Parked now, and still out.
    kept: Vec<(i16, i64)>,
    /// Passed over, and parked now behind the head of their key.
    forget: Vec<(i16, u64, FxHashSet<u64>)>,
    /// Parked of a key, up to a position.
    parked: Vec<(i16, u64, i64)>,
    /// No longer parked.
    unparked: Vec<(i16, u64, i64)>,
}

impl Plan {
    fn of(held: &Held, batch: &[Settled]) -> Result<(Self, Vec<RecordTag>)> {
        let mut plan = Self {
            tenure: held.tenure,
            owner: held.owner,
            fence: (Vec::new(), Vec::new()),
            known: Vec::with_capacity(batch.len()),
            done: Places::default(),
            done_at: Vec::new(),
            done_parked: Places::default(),
            park: Parkings::default(),
            set_parked: Parkings::default(),
            park_behind: Places::default(),
            give_back_parked: Places::default(),
            keys: BTreeSet::new(),
            effects: Effects::default(),
        };
        let (mut lost, mut released, mut lanes) = (Vec::new(), Vec::new(), BTreeMap::new());
        for settled in batch {
            let (tenure, lane, at) = untag(settled.tag);
            let state = held.lanes.get(&lane).filter(|_| tenure == held.tenure);
            let Some((state, out)) = state.and_then(|state| Some((state, state.records.get(&at)?))) else {
                lost.push(settled.tag);
                continue;
            };
            plan.known.push(settled.tag);
            lanes.insert(lane, state.epoch);
            match &settled.outcome {
                Outcome::Done => plan.done((lane, at), out),
                Outcome::Parked(parking) => {
                    let (state, after) = match parking.until {
                        Until::After(delay) => (state::DUE, delay),
                        _ => (state::FOR_TOPIC, Duration::ZERO),
                    };
                    plan.park(held, (lane, at), out, state, after, parking.attempts, &parking.errors)?;
                    if parking.keep {
                        plan.effects.kept.push((lane, at));
                    } else {
                        plan.effects.let_go.push((lane, at));
                    }
                }
                Outcome::Failed {
                    attempts,
                    errors,
                    hold_key,
                } => {
                    let holds = *hold_key && out.message.key().is_some();
                    let state = if holds {
                        state::FAILED_AND_HOLDING
                    } else {
                        state::FAILED
                    };
                    plan.park(held, (lane, at), out, state, Duration::ZERO, *attempts, errors)?;
                    plan.effects.let_go.push((lane, at));
                }
                // Last: what is released waits behind what the same batch parks of its key.
                Outcome::Released => released.push(((lane, at), out)),
                _ => return Err(unexpected("the Postgres log does not know this outcome of a record")),
            }
        }
        for (place, out) in released {
            plan.release(held, place, out);
        }
        plan.fence = lanes.into_iter().unzip();
        Ok((plan, lost))
    }

    fn done(&mut self, place: (i16, i64), out: &Out) {
        match out.at.filter(|_| !out.is_parked) {
            Some(at) => {
                self.done.push(place);
                self.done_at.push(at);
            }
            None => {
                self.done_parked.push(place);
                self.unpark(place, out);
            }
        }
        self.effects.let_go.push(place);
    }

    /// A parked row goes: the next of its key may go on.
    fn unpark(&mut self, (lane, at): (i16, i64), out: &Out) {
        if let (Some(key), Some(hash)) = (key_of(lane, out), out.message.key_hash()) {
            self.keys.insert(key);
            self.effects.unparked.push((lane, hash, at));
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn park(
        &mut self,
        held: &Held,
        place: (i16, i64),
        out: &Out,
        state: i16,
        after: Duration,
        attempts: u32,
        errors: &[AttemptError],
    ) -> Result<()> {
        let parkings = if out.is_parked {
            &mut self.set_parked
        } else {
            &mut self.park
        };
        parkings.places.push(place);
        parkings.attempts.push(i32::try_from(attempts).unwrap_or(i32::MAX));
        parkings.states.push(state);
        parkings.after.push(secs(after));
        parkings.errors.push(errors_to_text(errors)?);
        let (Some(key), Some(hash)) = (key_of(place.0, out), out.message.key_hash()) else {
            return Ok(());
        };
        if state == state::FAILED {
            if out.is_parked {
                self.unpark(place, out);
            }
            return Ok(());
        }
        self.keys.insert(key);
        self.effects.parked.push((place.0, hash, place.1));
        // It keeps its place: what was passed over of its key waits behind it. (Of keys that collide too: they then wait
        // for nobody, and go on at once.)
        let Some(lane) = held.lanes.get(&place.0) else {
            return Ok(());
        };
        let passed_over = lane.holdings.passed_over(hash);
        if passed_over.is_empty() || self.effects.forget.iter().any(|(_, other, _)| *other == hash) {
            return Ok(());
        }
        for at in &passed_over {
            self.park_behind.push((place.0, id(*at)));
            self.effects.parked.push((place.0, hash, id(*at)));
        }
        self.effects
            .forget
            .push((place.0, hash, passed_over.into_iter().collect()));
        Ok(())
    }

    fn release(&mut self, held: &Held, place: (i16, i64), out: &Out) {
        if out.is_parked {
            // If it is a head it is due again; behind one it waits as before.
            self.give_back_parked.push(place);
            self.effects.let_go.push(place);
            return;
        }
        let (Some(key), Some(hash)) = (key_of(place.0, out), out.message.key_hash()) else {
            self.effects.give_back.push(place);
            return;
        };
        let is_parked = held
            .lanes
            .get(&place.0)
            .is_some_and(|lane| lane.parked.contains_key(&hash));
        if is_parked
            || self
                .effects
                .parked
                .iter()
                .any(|(lane, other, _)| (*lane, *other) == (place.0, hash))
        {
            self.park_behind.push(place);
            self.keys.insert(key);
            self.effects.parked.push((place.0, hash, place.1));
            self.effects.let_go.push(place);
        } else {
            self.effects.give_back.push(place);
        }
    }

    /// Whether there is nothing but events that are done.
    fn is_plain(&self) -> bool {
        self.known.len() == self.done.ids.len()
    }

    fn has_done(&self) -> bool {
        !self.done.is_empty() || !self.done_parked.is_empty()
    }

    /// Writes first what is done and then all the rest, or nothing of it: `None` if the fence is down, else the keys that are still parked.
    async fn write(
        &self,
        shared: &Shared,
        connection: &mut PgConnection,
        keep: bool,
    ) -> Result<Option<BTreeSet<KeyOf>>> {
        if self.is_plain() {
            let stands = self.write_done(shared, connection, keep).await?;
            return Ok(stands.then(BTreeSet::new));
        }
        // By itself, since the rest may have to wait for others who park the same keys.
        if !self.done.is_empty() && !self.write_done(shared, connection, keep).await? {
            return Ok(None);
        }
        let failed = doing("settling events");
        let (log, sql, mailbox) = (&shared.log, shared.log.sql(), shared.mailbox);
        let mut tx = connection.begin().await.map_err(&failed)?;
        if standing(shared, &mut tx, self.owner, &self.fence).await?.len() < self.fence.0.len() {
            tx.rollback().await.map_err(failed)?;
            return Ok(None);
        }
        log.take_turns(&mut tx, mailbox, &self.keys, &[]).await?;
        let done_parked = if keep {
            &sql.keep_done_parked
        } else {
            &sql.delete_done_parked
        };
        for (statement, places) in [
            (done_parked, &self.done_parked),
            (&sql.give_back_parked, &self.give_back_parked),
        ] {
            if !places.is_empty() {
                let write = sqlx::query(statement.clone()).bind(mailbox);
                let write = write.bind(&places.lanes).bind(&places.ids).execute(&mut *tx).await;
                write.map_err(&failed)?;
            }
        }
        for (statement, parkings) in [(&sql.park, &self.park), (&sql.set_parked, &self.set_parked)] {
            if !parkings.places.is_empty() {
                let write = sqlx::query(statement.clone())
                    .bind(mailbox)
                    .bind(&parkings.places.lanes)
                    .bind(&parkings.places.ids)
                    .bind(&parkings.attempts)
                    .bind(&parkings.states)
                    .bind(&parkings.after)
                    .bind(&parkings.errors);
                write.execute(&mut *tx).await.map_err(&failed)?;
            }
        }
        let mut keys = self.keys.clone();
        if !self.park_behind.is_empty() {
            keys.extend(
                log.park_behind(&mut tx, mailbox, &self.park_behind.lanes, &self.park_behind.ids, &keys)
                    .await?,
            );
        }
        // Behind all of it, in a later snapshot.
        log.right_keys(&mut tx, mailbox, &keys).await?;
        let still_parked = if self.effects.unparked.is_empty() {
            BTreeSet::new()
        } else {
            log.still_parked(&mut tx, mailbox, &keys).await?
        };
        tx.commit().await.map_err(failed)?;
        Ok(Some(still_parked))
    }

    async fn write_done(&self, shared: &Shared, connection: &mut PgConnection, keep: bool) -> Result<bool> {
        let sql = shared.log.sql();
        let (in_place, moved) = if keep {
            (&sql.keep_done, &sql.keep_done_moved)
        } else {
            (&sql.delete_done, &sql.delete_done_moved)
        };
        // Rows move when somebody rewrites the table: those that were not where they lay are looked for.
        let mut found = 0;
        for is_moved in [false, true] {
            let statement = if is_moved { moved } else { in_place };
            let done = sqlx::query(statement.clone())
                .bind(shared.mailbox)
                .bind(self.owner)
                .bind(&self.fence.0)
                .bind(&self.fence.1)
                .bind(&self.done.ids);
            let done = if is_moved {
                done.bind(&self.done.lanes)
            } else {
                done.bind(&self.done_at)
            };
            let done = done.execute(&mut *connection).await.map_err(doing("settling events"))?;
            found += usize::try_from(done.rows_affected()).unwrap_or(0);
            if found >= self.done.ids.len() {
                return Ok(true);
            }
            let fence = sqlx::query_scalar(sql.fence.clone())
                .bind(shared.mailbox)
                .bind(self.owner);
            let fence = fence
                .bind(&self.fence.0)
                .bind(&self.fence.1)
                .fetch_one(&mut *connection)
                .await;
            if !fence.map_err(doing("checking the lease"))? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    fn apply(self, held: &mut Held, still_parked: &BTreeSet<KeyOf>) {
        held.floor.settled();
        if !self.is_plain() {
            held.due.checked_at = None;
        }
        let effects = self.effects;
        for (lane, key, last) in effects.parked {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                let known = lane.parked.entry(key).or_default();
                *known = last.max(*known);
            }
        }
        let still_parked: FxHashSet<(i16, u64)> = still_parked
            .iter()
            .filter_map(|(lane, topic, key)| Some((*lane, super::lanes::key_hash(topic, key).ok()?)))
            .collect();
        for (lane, key, at) in effects.unparked {
            // Not all before it need be done: a topic may have a key's records sent at once.
            if still_parked.contains(&(lane, key)) {
                continue;
            }
            if let Some(lane) = held.lanes.get_mut(&lane)
                && lane.parked.get(&key) == Some(&at)
            {
                lane.parked.remove(&key);
            }
        }
        for (lane, at) in effects.kept {
            if let Some(out) = held.lanes.get_mut(&lane).and_then(|lane| lane.records.get_mut(&at)) {
                out.is_parked = true;
            }
        }
        for (lane, key, positions) in effects.forget {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.holdings.forget_key(key, |position| positions.contains(&position));
            }
        }
        for (lane, at) in effects.let_go {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.holdings.let_go(position(at));
                lane.records.remove(&at);
            }
        }
        for (lane, at) in effects.give_back {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.holdings.give_back(position(at));
                lane.records.remove(&at);
            }
        }
    }
}

fn key_of(lane: i16, out: &Out) -> Option<KeyOf> {
    Some((
        lane,
        out.message.topic().as_str().to_owned(),
        out.message.key()?.to_owned(),
    ))
}
