//! Writing down what became of records: one transaction, which first checks the fence.

use super::{Held, Out, Shared, id, position, untag};
use crate::{
    append::{later, state},
    error::doing,
    row::{errors_from_text, errors_to_text, ids},
};
use postrider_core::{
    Message, Result,
    log::{AttemptError, Outcome, RecordTag, SettleReport, Settled, Until},
};
use sqlx::{Row as _, SqliteConnection};
use std::sync::Arc;

/// What is to happen in memory once the transaction is committed.
#[derive(Default)]
struct Effects {
    let_go: Vec<u64>,
    give_back: Vec<u64>,
    /// Parked now, and still out.
    kept: Vec<u64>,
    /// Passed over, and parked now behind the head of their key.
    forget: Vec<(u64, Vec<u64>)>,
}

impl Effects {
    fn apply(self, held: &mut Held) {
        for position in self.let_go {
            held.holdings.let_go(position);
            held.records.remove(&position);
        }
        for position in self.give_back {
            held.holdings.give_back(position);
            held.records.remove(&position);
        }
        for position in self.kept {
            if let Some(out) = held.records.get_mut(&position) {
                out.is_parked = true;
            }
        }
        for (key, positions) in self.forget {
            held.holdings.forget_key(key, |position| positions.contains(&position));
        }
    }
}

pub(super) async fn settle(
    shared: &Arc<Shared>,
    connection: &mut SqliteConnection,
    batch: &[Settled],
) -> Result<SettleReport> {
    let epoch = shared.held().epoch;
    let (known, mut lost) = known(shared, epoch, batch);
    if known.is_empty() {
        return Ok(SettleReport::new(lost));
    }
    // The common case at once; the rest one by one.
    let is_plain = |(settled, out): &&(&Settled, Out)| settled.outcome == Outcome::Done && !out.is_parked;
    let plain: Vec<u64> = known
        .iter()
        .filter(is_plain)
        .map(|(settled, _)| untag(settled.tag).1)
        .collect();
    let others: Vec<_> = known.iter().filter(|both| !is_plain(both)).collect();
    if others.is_empty() {
        if !done(shared, connection, epoch, &plain).await? {
            shared.held().lease.end();
            lost.extend(known.iter().map(|(settled, _)| settled.tag));
            return Ok(SettleReport::new(lost));
        }
        let effects = Effects {
            let_go: plain,
            ..Effects::default()
        };
        effects.apply(&mut shared.held());
    } else {
        let Some(mut tx) = shared.fenced(connection, epoch).await? else {
            lost.extend(known.iter().map(|(settled, _)| settled.tag));
            return Ok(SettleReport::new(lost));
        };
        let mut settling = Settling {
            shared,
            connection: &mut tx,
            now: shared.now(),
            effects: Effects::default(),
        };
        settling.done(plain).await?;
        settling.all(&others).await?;
        let effects = settling.effects;
        tx.commit().await.map_err(doing("settling events"))?;
        effects.apply(&mut shared.held());
    }
    let may_claim = !others.is_empty() || shared.held().holdings.has_freed();
    Ok(SettleReport::new(lost).with_may_claim(may_claim))
}

/// Deletes what is done, or moves it to the history, in one round trip. `false` if the lease is lost.
async fn done(shared: &Shared, connection: &mut SqliteConnection, epoch: i64, positions: &[u64]) -> Result<bool> {
    let (sql, keep) = (shared.log.sql(), shared.options.keep_succeeded);
    let owner = &shared.options.owner.as_uuid().as_bytes()[..];
    let settle = match range(positions) {
        Some((first, last)) => {
            let statement = if keep {
                &sql.keep_done_range
            } else {
                &sql.delete_done_range
            };
            let settle = sqlx::query(statement.clone()).bind(shared.mailbox()).bind(first);
            settle.bind(shared.now()).bind(owner).bind(epoch).bind(last)
        }
        None => {
            let statement = if keep { &sql.keep_done } else { &sql.delete_done };
            let list = ids(positions.iter().map(|p| id(*p)));
            let settle = sqlx::query(statement.clone()).bind(shared.mailbox()).bind(list);
            settle.bind(shared.now()).bind(owner).bind(epoch)
        }
    };
    // To the end, or the commit would not be reached; the one row is the fence's.
    match settle.fetch_all(&mut *connection).await {
        Ok(rows) => Ok(rows.first().is_some_and(|row| row.get(0))),
        Err(error) => {
            // It may have stopped in the middle of the transaction.
            let _ = sqlx::raw_sql("ROLLBACK").execute(&mut *connection).await;
            Err(doing("settling events")(error))
        }
    }
}

/// The first and the last id, if there is none between them but these.
fn range(positions: &[u64]) -> Option<(i64, i64)> {
    let (first, last) = (*positions.iter().min()?, *positions.iter().max()?);
    let is_whole = last - first + 1 == positions.len() as u64;
    is_whole.then(|| (id(first), id(last)))
}

type Known<'a> = Vec<(&'a Settled, Out)>;

/// Those that are out under this epoch, and the tags of those that are not.
fn known<'a>(shared: &Shared, epoch: i64, batch: &'a [Settled]) -> (Known<'a>, Vec<RecordTag>) {
    let held = shared.held();
    let (mut known, mut lost) = (Vec::with_capacity(batch.len()), Vec::new());
    for settled in batch {
        let (of_epoch, position) = untag(settled.tag);
        match held.records.get(&position) {
            Some(out) if of_epoch == epoch.unsigned_abs() => known.push((settled, out.clone())),
            _ => lost.push(settled.tag),
        }
    }
    (known, lost)
}

struct Settling<'a> {
    shared: &'a Shared,
    connection: &'a mut SqliteConnection,
    now: i64,
    effects: Effects,
}

impl Settling<'_> {
    async fn done(&mut self, positions: Vec<u64>) -> Result<()> {
        if positions.is_empty() {
            return Ok(());
        }
        let failed = doing("settling events");
        let (sql, list) = (self.shared.log.sql(), ids(positions.iter().map(|p| id(*p))));
        if self.shared.options.keep_succeeded {
            let keep = sqlx::query(sql.keep_events.clone()).bind(&list).bind(self.now);
            keep.execute(&mut *self.connection).await.map_err(&failed)?;
        }
        let delete = sqlx::query(sql.delete_ids.clone()).bind(&list);
        delete.execute(&mut *self.connection).await.map_err(failed)?;
        self.effects.let_go.extend(positions);
        Ok(())
    }

    async fn all(&mut self, known: &[&(&Settled, Out)]) -> Result<()> {
        // What is released comes last: it waits behind what the same batch parks of its key.
        let is_released = |both: &&&(&Settled, Out)| both.0.outcome == Outcome::Released;
        let others = known.iter().filter(|both| !is_released(both));
        for (settled, out) in others.chain(known.iter().filter(is_released)) {
            let at = untag(settled.tag).1;
            match &settled.outcome {
                Outcome::Done => self.done_parked(at, &out.message).await?,
                Outcome::Parked(parking) => {
                    let (state, due_at) = match parking.until {
                        Until::After(delay) => (state::DUE, Some(later(self.now, delay))),
                        _ => (state::FOR_TOPIC, None),
                    };
                    self.park(at, out, state, due_at, parking.attempts, &parking.errors)
                        .await?;
                    let keep = if parking.keep {
                        &mut self.effects.kept
                    } else {
                        &mut self.effects.let_go
                    };
                    keep.push(at);
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
                    self.park(at, out, state, None, *attempts, errors).await?;
                    self.effects.let_go.push(at);
                }
                Outcome::Released => self.release(at, out).await?,
                _ => {
                    return Err(crate::log::unexpected(
                        "the SQLite log does not know this outcome of a record",
                    ));
                }
            }
        }
        Ok(())
    }

    async fn done_parked(&mut self, at: u64, message: &Message) -> Result<()> {
        let failed = doing("settling an event");
        let sql = self.shared.log.sql();
        if self.shared.options.keep_succeeded {
            let keep = sqlx::query(sql.keep_done_parked.clone()).bind(id(at)).bind(self.now);
            keep.execute(&mut *self.connection).await.map_err(&failed)?;
        }
        let delete = sqlx::query(sql.delete_parked.clone()).bind(id(at));
        delete.execute(&mut *self.connection).await.map_err(failed)?;
        self.promote(message).await?;
        self.effects.let_go.push(at);
        Ok(())
    }

    /// The next of a key becomes due.
    async fn promote(&mut self, message: &Message) -> Result<()> {
        let Some(key) = message.key() else { return Ok(()) };
        let promote = sqlx::query(self.shared.log.sql().promote.clone())
            .bind(self.shared.mailbox())
            .bind(message.topic().as_str())
            .bind(key)
            .bind(self.now);
        promote
            .execute(&mut *self.connection)
            .await
            .map_err(doing("letting a key go on"))?;
        Ok(())
    }

    async fn is_one(&mut self, statement: &sqlx::SqlStr, message: &Message, before: Option<u64>) -> Result<bool> {
        let Some(key) = message.key() else { return Ok(false) };
        let mut query = sqlx::query_scalar(statement.clone())
            .bind(self.shared.mailbox())
            .bind(message.topic().as_str())
            .bind(key);
        if let Some(before) = before {
            query = query.bind(id(before));
        }
        query
            .fetch_one(&mut *self.connection)
            .await
            .map_err(doing("looking for what is parked"))
    }

    /// Parks a record, or makes it a dead letter.
    async fn park(
        &mut self,
        at: u64,
        out: &Out,
        mut state: i64,
        mut due_at: Option<i64>,
        attempts: u32,
        new_errors: &[AttemptError],
    ) -> Result<()> {
        let failed = doing("parking an event");
        let (shared, sql) = (self.shared, self.shared.log.sql());
        let waits = matches!(state, state::DUE | state::FOR_TOPIC);
        if waits && self.is_one(&sql.is_behind, &out.message, Some(at)).await? {
            (state, due_at) = (state::BEHIND, None);
        }
        let kept = match out.is_parked {
            true => &sql.parked_errors,
            false => &sql.event_errors,
        };
        let kept = sqlx::query_scalar(kept.clone()).bind(id(at));
        let kept: Option<Option<String>> = kept.fetch_optional(&mut *self.connection).await.map_err(&failed)?;
        let mut errors = errors_from_text(kept.flatten().as_deref().unwrap_or("[]"));
        AttemptError::keep(&mut errors, new_errors);
        let statement = if out.is_parked { &sql.set_parked } else { &sql.park };
        let park = sqlx::query(statement.clone())
            .bind(id(at))
            .bind(i64::from(attempts))
            .bind(state)
            .bind(due_at)
            .bind(errors_to_text(&errors)?)
            .bind((!waits).then_some(self.now));
        let parked = park.execute(&mut *self.connection).await.map_err(&failed)?;
        if parked.rows_affected() == 0 {
            // It is gone: nothing may be put behind it.
            return Ok(());
        }
        if !out.is_parked {
            let delete = sqlx::query(sql.delete_ids.clone()).bind(ids([id(at)]));
            delete.execute(&mut *self.connection).await.map_err(&failed)?;
        }
        let Some(key) = out.message.key() else { return Ok(()) };
        if state == state::FAILED {
            return if out.is_parked {
                self.promote(&out.message).await
            } else {
                Ok(())
            };
        }
        // It keeps its place: what was passed over of its key waits behind it.
        self.park_passed_over(&out.message).await?;
        shared
            .log
            .right_key(
                self.connection,
                shared.mailbox(),
                out.message.topic().as_str(),
                key,
                self.now,
            )
            .await
    }

    async fn park_passed_over(&mut self, message: &Message) -> Result<()> {
        let Some(hash) = message.key_hash() else { return Ok(()) };
        let passed_over = self.shared.held().holdings.passed_over(hash);
        if passed_over.is_empty() {
            return Ok(());
        }
        let failed = doing("parking events behind others of their key");
        let sql = self.shared.log.sql();
        // Hashes collide: only those that are of this key.
        let same = sqlx::query(sql.same_key.clone())
            .bind(ids(passed_over.into_iter().map(id)))
            .bind(message.topic().as_str())
            .bind(message.key());
        let same = same.fetch_all(&mut *self.connection).await.map_err(&failed)?;
        let same: Vec<i64> = same.iter().map(|row| row.get(0)).collect();
        let list = ids(same.iter().copied());
        for statement in [&sql.park_behind, &sql.delete_ids] {
            sqlx::query(statement.clone())
                .bind(&list)
                .execute(&mut *self.connection)
                .await
                .map_err(&failed)?;
        }
        self.effects
            .forget
            .push((hash, same.into_iter().map(position).collect()));
        Ok(())
    }

    async fn release(&mut self, at: u64, out: &Out) -> Result<()> {
        let sql = self.shared.log.sql();
        if out.is_parked {
            self.effects.let_go.push(at);
        } else if self.is_one(&sql.is_parked_key, &out.message, None).await? {
            let failed = doing("parking an event behind another of its key");
            let list = ids([id(at)]);
            for statement in [&sql.park_behind, &sql.delete_ids] {
                sqlx::query(statement.clone())
                    .bind(&list)
                    .execute(&mut *self.connection)
                    .await
                    .map_err(&failed)?;
            }
            if let Some(key) = out.message.key() {
                let (shared, topic) = (self.shared, out.message.topic().as_str());
                shared
                    .log
                    .right_key(self.connection, shared.mailbox(), topic, key, self.now)
                    .await?;
            }
            self.effects.let_go.push(at);
        } else {
            self.effects.give_back.push(at);
        }
        Ok(())
    }
}
