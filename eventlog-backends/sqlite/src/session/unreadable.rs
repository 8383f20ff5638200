//! Rows that cannot be read, written by something else or damaged: they become dead letters, with the reason, so that they
//! stop nobody and a person sees them.

use super::claim::Claiming;
use crate::{
    append::state,
    error::doing,
    row::{Reader, errors_to_text, ids},
};
use postrider_core::{Error, Result, log::AttemptError};
use sqlx::{Row as _, sqlite::SqliteRow};

impl Claiming<'_> {
    /// Which events of a part of the mailbox cannot be read, and why.
    pub(super) async fn unreadable(&mut self, after: i64, up_to: i64, limit: i64) -> Result<Vec<(i64, String)>> {
        let events = sqlx::query(self.shared.log.sql().events_after.clone())
            .bind(self.shared.mailbox())
            .bind(after)
            .bind(up_to)
            .bind(limit);
        let rows = events.fetch_all(&mut *self.connection).await;
        let rows = rows.map_err(doing("reading events one by one"))?;
        let mut reader = Reader::default();
        let problem = |row: &SqliteRow| {
            let error = reader.message(row, 1).err()?;
            Some((row.try_get(0).ok()?, error.to_chain()))
        };
        Ok(rows.iter().filter_map(problem).collect())
    }

    /// Makes dead letters of events.
    pub(super) async fn bury_events(&mut self, unreadable: Vec<(i64, String)>) -> Result<()> {
        let Some((first, reason)) = unreadable.first() else {
            return Ok(());
        };
        let failed = doing("making dead letters of rows that cannot be read");
        let Some(mut tx) = self.shared.fenced(self.connection, self.epoch).await? else {
            return Ok(());
        };
        let sql = self.shared.log.sql();
        for (id, reason) in &unreadable {
            let error = AttemptError::new(self.shared.log.clock().now(), 0, reason.as_str());
            let park = sqlx::query(sql.park.clone())
                .bind(id)
                .bind(0)
                .bind(state::FAILED)
                .bind(None::<i64>)
                .bind(errors_to_text(&[error])?)
                .bind(self.now);
            park.execute(&mut *tx).await.map_err(&failed)?;
        }
        let gone = sqlx::query(sql.delete_ids.clone()).bind(ids(unreadable.iter().map(|(id, _)| *id)));
        gone.execute(&mut *tx).await.map_err(&failed)?;
        tx.commit().await.map_err(failed)?;
        self.has_buried = true;
        tracing::error!(
            mailbox = %self.shared.name,
            rows = unreadable.len(),
            first,
            reason,
            "rows of the event log cannot be read and are dead letters now: look at them with the log's administration"
        );
        Ok(())
    }

    /// Makes a dead letter of a row that was parked, and lets its key go on.
    pub(super) async fn bury_parked(&mut self, row: &SqliteRow, error: &Error) -> Result<()> {
        let failed = doing("making dead letters of rows that cannot be read");
        let Some(mut tx) = self.shared.fenced(self.connection, self.epoch).await? else {
            return Ok(());
        };
        let id: i64 = row.try_get(0).map_err(&failed)?;
        let attempts: i64 = row.try_get(10).unwrap_or_default();
        let kept = AttemptError::new(self.shared.log.clock().now(), 0, error.to_chain());
        let bury = sqlx::query(self.shared.log.sql().set_parked.clone())
            .bind(id)
            .bind(attempts)
            .bind(state::FAILED)
            .bind(None::<i64>)
            .bind(errors_to_text(&[kept])?)
            .bind(self.now);
        bury.execute(&mut *tx).await.map_err(&failed)?;
        let key: Option<&str> = row.try_get(5).ok().flatten();
        if let (Ok(topic), Some(key)) = (row.try_get(2), key) {
            let (log, mailbox) = (&self.shared.log, self.shared.mailbox());
            log.right_key(&mut tx, mailbox, topic, key, self.now).await?;
        }
        tx.commit().await.map_err(failed)?;
        self.has_buried = true;
        tracing::error!(
            mailbox = %self.shared.name,
            id,
            reason = error.to_chain(),
            "a parked row of the event log cannot be read and is a dead letter now: look at it with the log's administration"
        );
        Ok(())
    }
}
