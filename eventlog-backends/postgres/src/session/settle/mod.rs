//! Writing down what became of records.

mod plan;

use super::Shared;
use crate::{
    append::KeyOf,
    error::{doing, is_refused},
};
use plan::Plan;
use postrider_core::{
    Result, Topic,
    log::{SettleReport, Settled},
};
use sqlx::{Connection as _, PgConnection};
use std::collections::BTreeSet;
use uuid::Uuid;

/// Which of the lanes are still the owner's; nobody takes them before the end of the transaction.
pub(super) async fn standing(
    shared: &Shared,
    connection: &mut PgConnection,
    owner: Uuid,
    (lanes, epochs): &(Vec<i16>, Vec<i64>),
) -> Result<Vec<i16>> {
    let fence = sqlx::query_scalar(shared.log.sql().lock_fence.clone())
        .bind(shared.mailbox())
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
        .bind(shared.mailbox())
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

impl Plan {
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
        let (log, sql, mailbox) = (&shared.log, shared.log.sql(), shared.mailbox());
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
                .bind(shared.mailbox())
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
                .bind(shared.mailbox())
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
}
