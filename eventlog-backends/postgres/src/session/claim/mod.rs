//! Taking what is due.

mod behind;
mod due;
mod unreadable;

use super::{
    Lane, Out, Shared,
    floor::{Look, Writer},
    id, lanes, position, tag,
};
use crate::{
    append::KeyOf,
    error::doing,
    log::unexpected,
    row::{Reader, Time, is_null, place},
    sql::SMALL_PAYLOAD,
    tid::Tid,
};
use futures_util::TryStreamExt as _;
use postrider_core::{
    Message, Result,
    log::{Claim, Claimed, Lease, Record},
};
use sqlx::{Either, PgConnection, Row as _};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use unreadable::Unreadable;

/// How many rows a claim reads for each one it may give: what it passes over is bounded.
const READ_PER_GIVEN: usize = 8;
/// The fewest rows read of a lane: a claim of all lanes should not come back for a few more of one.
const LEAST_OF_A_LANE: usize = 16;
/// How often it is looked for strays; oftener where the lease is short.
const SWEEP_EVERY: Duration = Duration::from_secs(60);
/// How much of what was passed over for a key is parked at once.
pub(super) const PARKED_AT_ONCE: usize = 1000;
/// Where somebody else was parking the same keys.
const PARK_AGAIN: Duration = Duration::from_millis(10);
/// The column of the payload, of those that make a message.
const PAYLOAD: usize = 10;
/// And that behind them.
const TID: usize = 11;

pub(super) async fn claim(shared: &Arc<Shared>, connection: &mut PgConnection, request: &Claim) -> Result<Claimed> {
    lanes::hold(shared, connection).await?;
    if is_worth_a_look(shared) {
        look(shared, connection).await?;
        look_for_strays(shared, connection).await?;
        if !shared.held().lease.is_held() {
            // Everything is to be read again: at once, since nobody would say that there is something.
            lanes::hold(shared, connection).await?;
        }
    }
    let (tenure, lease, waiting) = {
        let mut held = shared.held();
        if held.active().next().is_none() {
            return Ok(Claimed::empty(Lease::none(shared.log.clock().clone())));
        }
        held.lanes.values_mut().for_each(|lane| lane.holdings.begin_claim());
        (held.tenure, held.lease.clone(), std::mem::take(&mut held.untold))
    };
    let mut claiming = Claiming {
        shared,
        connection,
        tenure,
        max: request.max,
        bytes_left: request.max_bytes,
        reader: Reader::default(),
        records: Vec::new(),
        cursors: BTreeMap::new(),
        given_freed: Vec::new(),
        given_parked: Vec::new(),
        given_fresh: Vec::new(),
        stopped: BTreeMap::new(),
        unreadable: Unreadable::default(),
    };
    match claiming.run(request.max_parked).await {
        Ok(next_due) => {
            let mut held = shared.held();
            if held.tenure == tenure {
                for (lane, cursor) in claiming.cursors {
                    if let Some(lane) = held.lanes.get_mut(&lane) {
                        lane.cursor = cursor;
                    }
                }
            }
            let mut claimed = Claimed::empty(lease);
            claimed.records = claiming.records;
            claimed.next_due = next_due;
            claimed.waiting = waiting;
            Ok(claimed)
        }
        Err(error) => {
            claiming.undo();
            shared.held().untold.extend(waiting);
            Err(error)
        }
    }
}

fn is_worth_a_look(shared: &Shared) -> bool {
    let held = shared.held();
    held.floor.is_due(shared.elapsed())
}

/// Looks up to where everything has been seen.
pub(super) async fn look(shared: &Shared, connection: &mut PgConnection) -> Result<()> {
    let failed = doing("looking for what is being written");
    let mut rows = sqlx::raw_sql(shared.log.sql().probe.clone()).fetch_many(connection);
    let mut look: Option<Look> = None;
    while let Some(part) = rows.try_next().await.map_err(&failed)? {
        let Either::Right(row) = part else { continue };
        match &mut look {
            None => {
                look = Some(Look {
                    position: row.try_get(0).map_err(&failed)?,
                    time: row.try_get::<Time, _>(1).map_err(&failed)?.0,
                    server: row.try_get(2).map_err(&failed)?,
                    is_cached: row.try_get::<Option<bool>, _>(3).map_err(&failed)?.unwrap_or(false),
                    writers: Vec::new(),
                });
            }
            Some(look) => look.writers.push(Writer {
                transaction: row.try_get(0).map_err(&failed)?,
                number: row.try_get(1).map_err(&failed)?,
            }),
        }
    }
    let look = look.ok_or_else(|| unexpected("the position of the event log was not read"))?;
    let now = shared.elapsed();
    if look.is_cached && !shared.told_of_cache.swap(true, Ordering::Relaxed) {
        tracing::warn!(
            mailbox = %shared.name,
            "the sequence of the event log hands out ids in stocks (CACHE), which costs order and speed: run `ALTER SEQUENCE .. CACHE 1` on it"
        );
    }
    let mut held = shared.held();
    if !held.floor.found(look, now) {
        tracing::warn!(
            mailbox = %shared.name,
            "the Postgres server was restarted, or the sequence of the event log was set back or altered: everything is read again"
        );
        held.end_tenure();
    }
    Ok(())
}

/// Looks now and then for what lies below the cursors and nobody knows of: the sequence was set back and has caught up
/// again between two looks, or somebody has chosen ids.
async fn look_for_strays(shared: &Shared, connection: &mut PgConnection) -> Result<()> {
    let (now, every) = (
        shared.elapsed(),
        SWEEP_EVERY.min(shared.options.lease.saturating_mul(4)),
    );
    let (mut in_lanes, mut cursors, mut known) = (Vec::new(), Vec::new(), Vec::new());
    {
        let mut held = shared.held();
        let is_due = held.swept_at.is_some_and(|at| at + every <= now);
        if is_due || held.swept_at.is_none() {
            held.swept_at = Some(now);
        }
        if !is_due {
            return Ok(());
        }
        for (number, lane) in held.active().filter(|(_, lane)| lane.cursor > 0) {
            in_lanes.push(*number);
            cursors.push(lane.cursor);
            known.extend(lane.holdings.known_above(0).map(id));
        }
    }
    let strays = sqlx::query_scalar(shared.log.sql().has_strays.clone())
        .bind(shared.mailbox())
        .bind(in_lanes)
        .bind(cursors)
        .bind(known);
    let has_strays: bool = strays
        .fetch_one(connection)
        .await
        .map_err(doing("looking for events with old ids"))?;
    if has_strays {
        tracing::warn!(
            mailbox = %shared.name,
            "there are events with ids below what was read: was the sequence of the event log set back? Everything is read again"
        );
        shared.held().end_tenure();
    }
    Ok(())
}

struct Claiming<'a> {
    shared: &'a Shared,
    connection: &'a mut PgConnection,
    tenure: u64,
    max: usize,
    bytes_left: usize,
    reader: Reader,
    records: Vec<Record>,
    /// Up to where each lane is known, once this claim has succeeded.
    cursors: BTreeMap<i16, i64>,
    given_freed: Vec<(i16, i64)>,
    given_parked: Vec<(i16, i64)>,
    given_fresh: Vec<(i16, i64)>,
    /// Lanes with something that is to be parked, of which somebody else is just parking something: up to there.
    stopped: BTreeMap<i16, i64>,
    unreadable: Unreadable,
}

impl Claiming<'_> {
    /// Takes what is due, and says when more will be.
    async fn run(&mut self, max_parked: usize) -> Result<Option<Duration>> {
        let checks_first = self.wants_due_check();
        let mut more_due = false;
        if checks_first {
            more_due = self.due(max_parked).await?;
        }
        let freed = self.freed().await?;
        if !freed.is_empty() {
            self.take(freed, true).await?;
        }
        let read_all = self.fresh().await?;
        if self.records.is_empty() && !checks_first {
            more_due = self.due(max_parked).await?;
        }
        more_due |= self.bury().await?;
        let held = self.shared.held();
        let is_stopped = !self.stopped.is_empty();
        let has_freed = !is_stopped && held.active().any(|(_, lane)| lane.holdings.has_freed());
        if !read_all || more_due || has_freed {
            return Ok(Some(Duration::ZERO));
        }
        if is_stopped {
            return Ok(Some(PARK_AGAIN));
        }
        let now = self.shared.elapsed();
        Ok(held.due.next.map(|at| at.saturating_sub(now)))
    }

    /// Nothing was taken: it is all there for the next claim.
    fn undo(self) {
        let mut held = self.shared.held();
        if held.tenure != self.tenure {
            return;
        }
        for (lane, at) in self.given_freed {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.records.remove(&at);
                lane.holdings.give_back(position(at));
            }
        }
        for (lane, at) in self.given_parked.into_iter().chain(self.given_fresh) {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.records.remove(&at);
                lane.holdings.let_go(position(at));
            }
        }
        held.due = super::Due::default();
    }

    fn room(&self) -> usize {
        if self.bytes_left == 0 {
            0
        } else {
            self.max - self.records.len()
        }
    }

    fn lanes(&self) -> Vec<i16> {
        self.shared.held().active().map(|(lane, _)| *lane).collect()
    }

    /// What was passed over for keys that have become free.
    async fn freed(&mut self) -> Result<Vec<Event>> {
        let (mut in_lanes, mut ids) = (Vec::new(), Vec::new());
        {
            let mut room = self.room();
            let mut bytes = self.bytes_left;
            let mut held = self.shared.held();
            for (number, lane) in held.lanes.iter_mut().filter(|(_, lane)| !lane.is_leaving) {
                // They were read before, so none is larger than the largest of the lane.
                let largest = lane.largest.max(1);
                let fitting = if bytes == 0 { 0 } else { (bytes / largest).max(1) };
                for at in lane.holdings.take_freed(room.min(fitting)) {
                    room -= 1;
                    bytes = bytes.saturating_sub(largest);
                    in_lanes.push(*number);
                    ids.push(id(at));
                    self.given_freed.push((*number, id(at)));
                }
            }
        }
        if ids.is_empty() {
            return Ok(Vec::new());
        }
        let events = sqlx::query(self.shared.log.sql().events_by_id.clone()).bind(self.shared.mailbox());
        let events = events.bind(&in_lanes).bind(&ids).fetch_all(&mut *self.connection).await;
        let rows = events.map_err(doing("reading events"))?;
        let mut found = Vec::with_capacity(rows.len());
        for row in &rows {
            let (lane, at) = place(row, 0);
            let message = match self.reader.message(row, 0) {
                Ok(message) => message,
                Err(error) => {
                    self.unreadable.event(row, &error);
                    continue;
                }
            };
            self.bytes_left = self.bytes_left.saturating_sub(message.payload().len());
            found.push(Event {
                lane,
                id: at,
                message,
                at: Tid::get(row, TID),
            });
        }
        // What is gone is held no longer.
        if found.len() < ids.len() {
            let there: BTreeSet<i64> = found.iter().map(|event| event.id).collect();
            let mut held = self.shared.held();
            for (lane, at) in in_lanes.into_iter().zip(ids) {
                if let Some(lane) = held.lanes.get_mut(&lane).filter(|_| !there.contains(&at)) {
                    lane.holdings.let_go(position(at));
                }
            }
        }
        Ok(found)
    }

    /// Gives what was not read yet. `false` if it stopped before the end for another reason than `max`.
    async fn fresh(&mut self) -> Result<bool> {
        let mut may_read = self.max.saturating_mul(READ_PER_GIVEN);
        while self.room() > 0 {
            let wanted = self.room().min(may_read);
            if wanted == 0 {
                return Ok(false);
            }
            let Some(fetched) = self.fetch(wanted).await? else {
                continue;
            };
            may_read = may_read.saturating_sub(fetched.rows.len().max(1));
            let is_last = !fetched.has_more;
            self.take(fetched.rows, false).await?;
            for (lane, mut reached) in fetched.reached {
                if let Some(stopped) = self.stopped.get(&lane) {
                    reached = reached.min(*stopped);
                }
                let cursor = self.cursors.entry(lane).or_insert(reached);
                *cursor = reached.max(*cursor);
            }
            if is_last {
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// Reads rows that are not known, of all lanes.
    /// `None` if they turned out to be large, and are to be read otherwise.
    async fn fetch(&mut self, wanted: usize) -> Result<Option<Fetched>> {
        let (mut in_lanes, mut cursors, mut known) = (Vec::new(), Vec::new(), Vec::new());
        let (certain, of_a_lane, is_large) = {
            let mut held = self.shared.held();
            let first = held.next_lane;
            held.next_lane = (first + 1) % super::LANES;
            let all: Vec<i16> = held.active().map(|(lane, _)| *lane).collect();
            let begin = first % all.len().max(1);
            for number in all[begin..].iter().chain(&all[..begin]) {
                let Some(lane) = held.lanes.get(number) else {
                    continue;
                };
                if self.stopped.contains_key(number) {
                    continue;
                }
                let cursor = self.cursors.get(number).copied().unwrap_or(lane.cursor);
                in_lanes.push(*number);
                cursors.push(cursor);
                known.extend(lane.holdings.known_above(position(cursor)).map(id));
            }
            let of_a_lane = (wanted / held.full_lanes.max(1)).max(LEAST_OF_A_LANE).min(wanted);
            (held.floor.position(), of_a_lane, held.is_large)
        };
        let sql = self.shared.log.sql();
        let limit = |n: usize| i64::try_from(n).unwrap_or(i64::MAX);
        let statement = match (is_large, known.is_empty()) {
            (true, _) => &sql.fetch_large,
            (false, true) => &sql.fetch,
            (false, false) => &sql.fetch_around,
        };
        let mut fetch = sqlx::query(statement.clone())
            .bind(self.shared.mailbox())
            .bind(&in_lanes)
            .bind(&cursors)
            .bind(limit(of_a_lane))
            .bind(limit(wanted));
        if is_large || !known.is_empty() {
            fetch = fetch.bind(&known);
        }
        if is_large {
            fetch = fetch.bind(limit(self.bytes_left));
        }
        let rows = fetch
            .fetch_all(&mut *self.connection)
            .await
            .map_err(doing("reading events"))?;
        if !is_large && rows.iter().any(|row| is_null(row, PAYLOAD)) {
            // Read again, by their bytes.
            self.shared.held().is_large = true;
            return Ok(None);
        }
        // Of each lane, how many came and the last of them.
        let mut seen: BTreeMap<i16, (usize, i64)> = BTreeMap::new();
        let (mut bytes, mut largest, mut messages) = (0, 0, Vec::with_capacity(rows.len()));
        for row in &rows {
            let (lane, at) = place(row, 0);
            let of_lane = seen.entry(lane).or_default();
            *of_lane = (of_lane.0 + 1, at.max(of_lane.1));
            let message = match self.reader.message(row, 0) {
                Ok(message) => message,
                Err(error) => {
                    self.unreadable.event(row, &error);
                    continue;
                }
            };
            bytes += message.payload().len();
            largest = largest.max(message.payload().len());
            messages.push(Event {
                lane,
                id: at,
                message,
                at: Tid::get(row, TID),
            });
        }
        let is_cut = rows.len() >= wanted || is_large && bytes >= self.bytes_left;
        self.bytes_left = self.bytes_left.saturating_sub(bytes);
        let mut full = 0;
        let mut reached = Vec::with_capacity(in_lanes.len());
        for (lane, cursor) in in_lanes.into_iter().zip(cursors) {
            let (count, last) = seen.get(&lane).copied().unwrap_or((0, cursor));
            full += usize::from(count >= of_a_lane);
            // Everything of the lane is known up to the last row, or to the end if there were no more; but an id that
            // was handed out and not yet committed may still appear.
            let complete = if is_cut || count >= of_a_lane { last } else { i64::MAX };
            reached.push((lane, complete.min(certain).max(cursor)));
        }
        let mut held = self.shared.held();
        for (lane, _) in seen {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.largest = largest.max(lane.largest);
            }
        }
        held.full_lanes = full.max(1);
        held.is_large = largest > SMALL_PAYLOAD;
        Ok(Some(Fetched {
            has_more: is_cut || full > 0,
            rows: messages,
            reached,
        }))
    }

    /// Gives events, but for those whose key is busy and those that have to be parked behind others of their key.
    async fn take(&mut self, events: Vec<Event>, were_freed: bool) -> Result<()> {
        let with_keys: BTreeSet<i16> = events
            .iter()
            .filter(|e| e.message.key().is_some())
            .map(|e| e.lane)
            .collect();
        if !with_keys.is_empty() {
            self.learn_parked(with_keys).await?;
        }
        let mut behind: Vec<(i16, i64, u64, KeyOf)> = Vec::new();
        {
            let mut held = self.shared.held();
            if held.tenure != self.tenure {
                return Ok(());
            }
            for Event {
                lane: number,
                id: at,
                message,
                at: tid,
            } in events
            {
                let Some(lane) = held.lanes.get_mut(&number) else {
                    continue;
                };
                let hash = message.key_hash();
                if let (Some(hash), Some(key)) = (hash, message.key())
                    && lane.parked.contains_key(&hash)
                {
                    let key = (number, message.topic().as_str().to_owned(), key.to_owned());
                    // What was passed over comes before it: while a settle was parking the key, or more than is parked at once.
                    let before = lane.holdings.first_passed_over(hash, PARKED_AT_ONCE + 1);
                    let is_next = were_freed || before.len() <= PARKED_AT_ONCE;
                    for passed_over in before.into_iter().take(PARKED_AT_ONCE) {
                        if lane.moving.insert(passed_over) {
                            behind.push((number, id(passed_over), hash, key.clone()));
                        }
                    }
                    if is_next || lane.holdings.take(position(at), Some(hash)) {
                        behind.push((number, at, hash, key));
                    }
                    continue;
                }
                if were_freed || lane.holdings.take(position(at), hash) {
                    if !were_freed {
                        self.given_fresh.push((number, at));
                    }
                    give(
                        lane,
                        &mut self.records,
                        self.tenure,
                        (number, at),
                        message,
                        0,
                        Some(tid),
                    );
                }
            }
        }
        if behind.is_empty() {
            return Ok(());
        }
        let parked = self.park_behind(&behind).await;
        let mut held = self.shared.held();
        for (number, at, hash, key) in behind {
            let Some(lane) = held.lanes.get_mut(&number) else {
                continue;
            };
            let was_passed_over = lane.moving.remove(&position(at));
            let Ok(parked) = &parked else { continue };
            if !parked.contains(&key) {
                // Somebody else was parking the key: once more with the next claim.
                let stopped = self.stopped.entry(number).or_insert(i64::MAX);
                if were_freed && !was_passed_over {
                    lane.holdings.give_back(position(at));
                } else if !was_passed_over {
                    *stopped = at.saturating_sub(1).min(*stopped);
                }
                continue;
            }
            let last = lane.parked.entry(hash).or_default();
            *last = at.max(*last);
            if was_passed_over {
                lane.holdings.forget_key(hash, |other| other == position(at));
            } else if were_freed {
                lane.holdings.let_go(position(at));
            }
        }
        parked.map(drop)
    }
}

/// An event that was read.
struct Event {
    lane: i16,
    id: i64,
    message: Message,
    at: Tid,
}

struct Fetched {
    rows: Vec<Event>,
    /// Up to where each lane is known now.
    reached: Vec<(i16, i64)>,
    has_more: bool,
}

fn give(
    lane: &mut Lane,
    records: &mut Vec<Record>,
    tenure: u64,
    (number, at): (i16, i64),
    message: Message,
    attempts: u32,
    tid: Option<Tid>,
) {
    let out = Out {
        message: message.clone(),
        at: tid,
        is_parked: tid.is_none(),
    };
    lane.records.insert(at, out);
    records.push(Record::new(tag(tenure, number, at), message, attempts));
}
