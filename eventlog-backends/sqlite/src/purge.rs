//! Cleaning up.

use crate::{SqliteLog, append::state, error::doing, row::micros};
use postrider_core::{Result, log::Purge};
use sqlx::{Row as _, SqliteConnection};
use std::time::Duration;

impl SqliteLog {
    pub(crate) async fn purge_old(&self, request: &Purge) -> Result<u64> {
        let Some(mailbox) = self.find_mailbox(&request.mailbox).await? else {
            return Ok(0);
        };
        let failed = doing("cleaning up");
        let now = micros(self.clock().now());
        let before = |age: Duration| now.saturating_sub(i64::try_from(age.as_micros()).unwrap_or(i64::MAX));
        let mut left = i64::try_from(request.max).unwrap_or(i64::MAX);
        let mut removed = 0;
        let mut tx = self.pool().begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        if let Some(age) = request.succeeded_after {
            let purge = sqlx::query(self.sql().purge_done.clone())
                .bind(mailbox)
                .bind(before(age))
                .bind(left);
            let rows = purge.execute(&mut *tx).await.map_err(&failed)?.rows_affected();
            removed += rows;
            left = left.saturating_sub(i64::try_from(rows).unwrap_or(i64::MAX));
        }
        if let Some(age) = request.failed_after {
            let old = sqlx::query(self.sql().old_failed.clone())
                .bind(mailbox)
                .bind(before(age))
                .bind(left);
            for row in old.fetch_all(&mut *tx).await.map_err(&failed)? {
                self.remove_failed(&mut tx, mailbox, &row, now).await?;
                removed += 1;
            }
        }
        if let Some(age) = request.receipts_after {
            for statement in [&self.sql().purge_receipts, &self.sql().purge_notes] {
                let left = i64::try_from(request.max.saturating_sub(removed)).unwrap_or(i64::MAX);
                let purge = sqlx::query(statement.clone()).bind(mailbox).bind(before(age));
                let purged = purge.bind(left).execute(&mut *tx).await;
                removed += purged.map_err(&failed)?.rows_affected();
            }
        }
        tx.commit().await.map_err(failed)?;
        Ok(removed)
    }

    /// Removes a failed record, given as (id, topic, key, state), and lets its key go on if it held it.
    pub(crate) async fn remove_failed(
        &self,
        connection: &mut SqliteConnection,
        mailbox: i64,
        row: &sqlx::sqlite::SqliteRow,
        now: i64,
    ) -> Result<()> {
        let failed = doing("removing a dead letter");
        let delete = sqlx::query(self.sql().delete_parked.clone()).bind(row.get::<i64, _>(0));
        delete.execute(&mut *connection).await.map_err(&failed)?;
        let key: Option<&str> = row.get(2);
        if let Some(key) = key.filter(|_| row.get::<i64, _>(3) == state::FAILED_AND_HOLDING) {
            let promote = sqlx::query(self.sql().promote.clone())
                .bind(mailbox)
                .bind(row.get::<&str, _>(1));
            promote.bind(key).bind(now).execute(connection).await.map_err(failed)?;
        }
        Ok(())
    }
}
