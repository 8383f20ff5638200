//! What becomes due: scheduled events, and those that were parked.

use super::{Claiming, give};
use crate::{
    append::state,
    error::doing,
    row::{place, time},
    session::{Due, lanes, position},
};
use postrider_core::{
    Result,
    clock::{Moment, Timestamp},
};
use sqlx::{Row as _, postgres::PgRow};
use std::{collections::BTreeSet, time::Duration};

/// Due times are not looked up at every claim while there is a stream of events.
const CHECK_DUE_EVERY: Duration = Duration::from_millis(20);
/// Now and then they are looked up from the beginning, whatever the server's clock may have done.
const CHECK_ALL_EVERY: Duration = Duration::from_secs(300);
/// A step back of the server's clock by more than this is noticed; see `floor`.
const CLOCK_STEP_MILLIS: i64 = 100;

impl Claiming<'_> {
    pub(super) fn wants_due_check(&self) -> bool {
        let now = self.shared.elapsed();
        let due = self.shared.held().due.clone();
        due.checked_at.is_none_or(|at| at + CHECK_DUE_EVERY <= now) || due.next.is_some_and(|at| at <= now)
    }

    /// What has become due: scheduled rows enter the event table, parked ones are given. `true` if there is more.
    pub(super) async fn due(&mut self, max_parked: usize) -> Result<bool> {
        let (parked_from, scheduled_from, out) = {
            let mut held = self.shared.held();
            if held
                .due
                .since
                .is_some_and(|at| at + CHECK_ALL_EVERY <= self.shared.elapsed())
            {
                held.due = Due::default();
            }
            let records = held.active().flat_map(|(_, lane)| &lane.records);
            let out: Vec<i64> = records.filter(|(_, out)| out.is_parked).map(|(at, _)| *at).collect();
            let from = |time: Option<Timestamp>| time.unwrap_or(Timestamp::UNIX_EPOCH);
            (from(held.due.parked_from), from(held.due.scheduled_from), out)
        };
        let (sent, lanes) = (self.shared.elapsed(), self.lanes());
        let due = sqlx::query(self.shared.log.sql().next_due.clone())
            .bind(self.shared.mailbox())
            .bind(&lanes)
            .bind(parked_from)
            .bind(scheduled_from)
            .bind(&out);
        let due = due
            .fetch_one(&mut *self.connection)
            .await
            .map_err(doing("looking for what is due"))?;
        let server_now = time(&due, 0).unwrap_or_default();
        let (parked, scheduled) = (time(&due, 1), time(&due, 2));
        if self.clock_stepped_back(server_now, sent) {
            // What was written since may lie before the floor.
            let mut held = self.shared.held();
            held.due = Due {
                server_time: Some((server_now, sent)),
                ..Due::default()
            };
            held.floor.forget_time();
            return Ok(true);
        }
        let is_due = |at: Option<Timestamp>| at.is_some_and(|at| at <= server_now);
        let mut more = false;
        // A writer has its lock on the table before it reads the clock, so the floor is right for due times too.
        let known = self.shared.held().floor.time().map(|time| time.min(server_now));
        if is_due(scheduled) {
            let (moved, last) = self.enter_scheduled(&lanes, scheduled_from, server_now).await?;
            more |= moved >= self.at_most();
            if !more {
                self.shared.held().due.scheduled_from = known;
            } else if let (Some(last), Some(known)) = (last, known) {
                self.shared.held().due.scheduled_from = Some(last.min(known));
            }
        } else if known.is_some() {
            self.shared.held().due.scheduled_from = known;
        }
        if is_due(parked) {
            more |= self
                .parked(&lanes, parked_from, server_now, max_parked, out, known)
                .await?;
        } else if known.is_some() {
            self.shared.held().due.parked_from = known;
        }
        let was_due = is_due(parked) || is_due(scheduled);
        let until = |at: Timestamp| sent.saturating_add((at - server_now).to_std().unwrap_or_default());
        let mut held = self.shared.held();
        held.due.checked_at = Some(sent);
        held.due.since.get_or_insert(sent);
        // What was due has been changed since, or waits for another of its key: it is looked at again soon.
        held.due.next = if was_due {
            Some(sent + CHECK_DUE_EVERY)
        } else {
            parked.into_iter().chain(scheduled).min().map(until)
        };
        Ok(more)
    }

    fn clock_stepped_back(&self, server_now: Timestamp, sent: Moment) -> bool {
        let mut held = self.shared.held();
        let before = held.due.server_time.replace((server_now, sent));
        before.is_some_and(|(server_then, then)| {
            let passed = i64::try_from((sent.saturating_sub(then)).as_millis()).unwrap_or(i64::MAX);
            (server_now - server_then)
                .num_milliseconds()
                .saturating_add(CLOCK_STEP_MILLIS)
                < passed
        })
    }

    fn at_most(&self) -> i64 {
        i64::try_from(self.max.max(100)).unwrap_or(i64::MAX)
    }

    /// Moves scheduled rows whose time has come to the end of the hot table: how many, and up to what time.
    async fn enter_scheduled(
        &mut self,
        lanes: &[i16],
        from: Timestamp,
        to: Timestamp,
    ) -> Result<(i64, Option<Timestamp>)> {
        let (owner, epochs) = {
            let held = self.shared.held();
            let epoch = |lane: &i16| held.lanes.get(lane).map_or(0, |lane| lane.epoch);
            (held.owner, lanes.iter().map(epoch).collect::<Vec<i64>>())
        };
        let moving = sqlx::query(self.shared.log.sql().enter_scheduled.clone())
            .bind(self.shared.mailbox())
            .bind(owner)
            .bind(lanes)
            .bind(epochs)
            .bind(from)
            .bind(to)
            .bind(self.at_most());
        let moved = moving.fetch_one(&mut *self.connection).await;
        let moved = moved.map_err(doing("moving delayed events"))?;
        Ok((moved.get(0), time(&moved, 1)))
    }

    /// Due heads, each with its followers. `true` if there are more.
    async fn parked(
        &mut self,
        lanes: &[i16],
        from: Timestamp,
        to: Timestamp,
        max_runs: usize,
        out: Vec<i64>,
        known: Option<Timestamp>,
    ) -> Result<bool> {
        let failed = doing("looking for parked events");
        let at_most = i64::try_from(max_runs.min(self.room())).unwrap_or(i64::MAX);
        if at_most == 0 {
            return Ok(true);
        }
        let heads = sqlx::query(self.shared.log.sql().due_heads.clone())
            .bind(self.shared.mailbox())
            .bind(lanes)
            .bind(from)
            .bind(to)
            .bind(at_most)
            .bind(out);
        let heads = heads.fetch_all(&mut *self.connection).await.map_err(&failed)?;
        let mut more = i64::try_from(heads.len()).unwrap_or(i64::MAX) >= at_most;
        // Nothing due is left behind but what is skipped, and what the limit cut off.
        let mut reached = if more {
            heads.last().and_then(|row| time(row, 4))
        } else {
            Some(to)
        };
        let (mut in_lanes, mut ids, mut topics, mut keys) = (Vec::new(), Vec::new(), Vec::new(), Vec::new());
        let mut times: Vec<Timestamp> = Vec::new();
        {
            let held = self.shared.held();
            for row in &heads {
                let (lane, at) = place(row, 0);
                let (topic, key): (&str, Option<&str>) = (row.get(2), row.get(3));
                let Some(state) = held.lanes.get(&lane) else { continue };
                let hash = key.map(|key| lanes::key_hash(topic, key));
                if hash.is_some_and(|hash| state.holdings.is_busy(hash)) || state.holdings.is_held(position(at)) {
                    // Another of its key is still out.
                    reached = reached.min(time(row, 4));
                    continue;
                }
                in_lanes.push(lane);
                ids.push(at);
                topics.push(topic);
                keys.push(key);
                times.push(time(row, 4).unwrap_or_default());
            }
        }
        if !ids.is_empty() {
            let each = (self.room() / ids.len()).max(1);
            let runs = sqlx::query(self.shared.log.sql().runs.clone())
                .bind(self.shared.mailbox())
                .bind(&in_lanes)
                .bind(&ids)
                .bind(&topics)
                .bind(&keys)
                .bind(i64::try_from(each).unwrap_or(i64::MAX))
                .bind(i64::try_from(self.bytes_left).unwrap_or(i64::MAX));
            let rows = runs.fetch_all(&mut *self.connection).await.map_err(failed)?;
            let given = self.take_runs(&rows);
            for (n, at) in (1..).zip(times) {
                if !given.contains(&n) {
                    // The bytes were used up, or it has changed meanwhile.
                    reached = reached.min(Some(at));
                    more = true;
                }
            }
        }
        if let (Some(reached), Some(known)) = (reached, known) {
            self.shared.held().due.parked_from = Some(known.min(reached));
        }
        Ok(more)
    }

    /// Gives heads with what waits behind them, and says which heads.
    fn take_runs(&mut self, rows: &[PgRow]) -> BTreeSet<i64> {
        let mut given = BTreeSet::new();
        let (mut run, mut is_open) = (0, false);
        for row in rows {
            let (state, of_run): (i16, i64) = (row.get(12), row.get(13));
            if of_run != run {
                (run, is_open) = (of_run, state == state::DUE);
            } else {
                is_open &= state == state::BEHIND;
            }
            if !is_open || self.room() == 0 {
                continue;
            }
            let message = match self.reader.message(row, 0) {
                Ok(message) => message,
                Err(error) => {
                    // What comes behind it may go once it is a dead letter.
                    is_open = false;
                    self.unreadable.parked(row, &error);
                    continue;
                }
            };
            let attempts = u32::try_from(row.get::<i32, _>(11)).unwrap_or(0);
            let (lane, at) = place(row, 0);
            let mut held = self.shared.held();
            let is_ours = held.tenure == self.tenure;
            if let Some(state) = held.lanes.get_mut(&lane).filter(|_| is_ours) {
                state.holdings.take_run(position(at), message.key_hash());
                self.bytes_left = self.bytes_left.saturating_sub(message.payload().len());
                given.insert(of_run);
                give(
                    state,
                    &mut self.records,
                    self.tenure,
                    (lane, at),
                    message,
                    attempts,
                    None,
                );
                self.given_parked.push((lane, at));
            }
        }
        given
    }
}
