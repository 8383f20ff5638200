//! Rows that cannot be read, written by something else or damaged: they become dead letters, with the reason, so that they
//! stop nobody and a person sees them.

use super::Claiming;
use crate::{
    append::{KeyOf, state},
    error::doing,
    row::{errors_to_text, place, reason},
    session::settle,
};
use postrider_core::{Error, Result, clock::Clock as _, log::AttemptError};
use sqlx::{Connection as _, Row as _, postgres::PgRow};
use std::collections::BTreeSet;

/// What a claim has met.
#[derive(Debug, Default)]
pub(super) struct Unreadable {
    events: Rows,
    parked: Rows,
    /// The keys of those that were parked, which go on without them.
    keys: BTreeSet<KeyOf>,
}

#[derive(Debug, Default)]
struct Rows {
    lanes: Vec<i16>,
    ids: Vec<i64>,
    attempts: Vec<i32>,
    reasons: Vec<String>,
}

impl Rows {
    fn push(&mut self, (lane, id): (i16, i64), attempts: i32, error: &Error) {
        self.lanes.push(lane);
        self.ids.push(id);
        self.attempts.push(attempts);
        self.reasons.push(reason(error));
    }
}

impl Unreadable {
    /// An event.
    pub(super) fn event(&mut self, row: &PgRow, error: &Error) {
        self.events.push(place(row, 0), 0, error);
    }

    /// A row that was parked.
    pub(super) fn parked(&mut self, row: &PgRow, error: &Error) {
        let place = place(row, 0);
        let attempts = row.try_get(11).unwrap_or_default();
        self.parked.push(place, attempts, error);
        let key: Option<String> = row.try_get(6).ok().flatten();
        if let (Ok(topic), Some(key)) = (row.try_get(3), key) {
            self.keys.insert((place.0, topic, key));
        }
    }
}

impl Claiming<'_> {
    /// Makes dead letters of what could not be read. `true` if there was any.
    pub(super) async fn bury(&mut self) -> Result<bool> {
        let Unreadable { events, parked, keys } = std::mem::take(&mut self.unreadable);
        if events.ids.is_empty() && parked.ids.is_empty() {
            return Ok(false);
        }
        let failed = doing("making dead letters of rows that cannot be read");
        let log = &self.shared.log;
        let (owner, fence) = {
            let held = self.shared.held();
            let lanes: BTreeSet<i16> = events.lanes.iter().chain(&parked.lanes).copied().collect();
            let epoch = |lane: &i16| held.lanes.get(lane).map_or(-1, |lane| lane.epoch);
            let fence: (Vec<i16>, Vec<i64>) = lanes.iter().map(|lane| (*lane, epoch(lane))).unzip();
            (held.owner, fence)
        };
        let mut tx = self.connection.begin().await.map_err(&failed)?;
        if settle::standing(self.shared, &mut tx, owner, &fence).await?.len() < fence.0.len() {
            tx.rollback().await.map_err(failed)?;
            self.shared.held().end_tenure();
            return Ok(true);
        }
        log.take_turns(&mut tx, self.shared.mailbox(), &keys, &[]).await?;
        let now = log.clock().now();
        for (statement, rows) in [(&log.sql().park, &events), (&log.sql().set_parked, &parked)] {
            if rows.ids.is_empty() {
                continue;
            }
            let error = |text: &String| errors_to_text(&[AttemptError::new(now, 0, text.as_str())]);
            let errors: Vec<String> = rows.reasons.iter().map(error).collect::<Result<_>>()?;
            let bury = sqlx::query(statement.clone())
                .bind(self.shared.mailbox())
                .bind(&rows.lanes)
                .bind(&rows.ids)
                .bind(&rows.attempts)
                .bind(vec![state::FAILED; rows.ids.len()])
                .bind(vec![0.0_f64; rows.ids.len()])
                .bind(errors);
            bury.execute(&mut *tx).await.map_err(&failed)?;
        }
        // In a later snapshot.
        log.right_keys(&mut tx, self.shared.mailbox(), &keys).await?;
        tx.commit().await.map_err(failed)?;
        self.shared.held().due.checked_at = None;
        let mut all = events
            .ids
            .iter()
            .zip(&events.reasons)
            .chain(parked.ids.iter().zip(&parked.reasons));
        if let Some((id, reason)) = all.next() {
            tracing::error!(
                mailbox = %self.shared.name,
                rows = events.ids.len() + parked.ids.len(),
                first = id,
                reason,
                "rows of the event log cannot be read and are dead letters now: look at them with the log's administration"
            );
        }
        Ok(true)
    }
}
