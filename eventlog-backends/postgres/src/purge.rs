//! Cleaning up.

use crate::{
    PostgresLog,
    append::{KeyOf, READ_COMMITTED},
    error::{code, doing, is_refused},
    row::secs,
};
use postrider_core::{Result, log::Purge};
use sqlx::{AssertSqlSafe, Connection as _, PgConnection, Row as _, SqlSafeStr as _};
use std::{collections::BTreeSet, time::Duration};

/// How many slots the history has: part of the schema.
const SLOTS: i16 = 16;
/// A retention is spread over so many of them; the others are being written or emptied.
const SLOTS_OF_A_RETENTION: u64 = 12;

impl PostgresLog {
    pub(crate) async fn purge_old(&self, request: &Purge) -> Result<u64> {
        let Some(mailbox) = self.find_mailbox(&request.mailbox).await? else {
            return Ok(0);
        };
        let mut connection = self.own_guarded("cleaning up").await?;
        let mut removed = 0;
        if let Some(age) = request.succeeded_after {
            removed += self.purge_history(&mut connection, mailbox, age, request.max).await?;
        }
        if let Some(age) = request.failed_after {
            removed += self
                .purge_failed(&mut connection, mailbox, age, request.max.saturating_sub(removed))
                .await?;
        }
        if let Some(age) = request.receipts_after {
            let left = request.max.saturating_sub(removed);
            let receipts = &self.sql().purge_receipts;
            removed += self.execute(&mut connection, receipts, mailbox, age, left).await?;
            let left = request.max.saturating_sub(removed);
            let notes = &self.sql().purge_notes;
            removed += self.execute(&mut connection, notes, mailbox, age, left).await?;
        }
        let unknown = self.unknown_mailboxes(&mut connection).await?;
        connection.give_back();
        if !unknown.is_empty() {
            tracing::error!(
                mailboxes = ?unknown,
                "events lie under mailboxes that do not exist, and nobody claims them: who writes rows must take the id from the table of mailboxes"
            );
        }
        Ok(removed)
    }

    /// Mailboxes that have events and do not exist: something else has written them, or a mailbox's row was lost.
    pub(crate) async fn unknown_mailboxes(&self, connection: &mut PgConnection) -> Result<Vec<i16>> {
        let unknown = sqlx::query_scalar(self.sql().unknown_mailboxes.clone()).fetch_all(connection);
        unknown.await.map_err(doing("looking for events of nobody"))
    }

    async fn execute(
        &self,
        connection: &mut PgConnection,
        statement: &sqlx::SqlStr,
        mailbox: i16,
        age: Duration,
        max: u64,
    ) -> Result<u64> {
        let run = sqlx::query(statement.clone()).bind(mailbox).bind(secs(age));
        let run = run
            .bind(i64::try_from(max).unwrap_or(i64::MAX))
            .execute(connection)
            .await;
        Ok(run.map_err(doing("cleaning up"))?.rows_affected())
    }

    /// Empties slots of which everything is old enough. An age shorter than a slot is taken row by row.
    async fn purge_history(&self, connection: &mut PgConnection, mailbox: i16, age: Duration, max: u64) -> Result<u64> {
        let failed = doing("cleaning up the history");
        let slot = sqlx::query(self.sql().history_slot.clone()).fetch_one(&mut *connection);
        let slot = slot.await.map_err(&failed)?;
        let (width, current): (i64, i16) = (slot.get(0), slot.get(1));
        if age.as_secs() < u64::try_from(width).unwrap_or(0) {
            return self
                .execute(connection, &self.sql().purge_done, mailbox, age, max)
                .await;
        }
        // The ring has to be longer than the retention, and its slots short beside it.
        let fitting = i64::try_from((age.as_secs() / SLOTS_OF_A_RETENTION).max(60)).unwrap_or(i64::MAX);
        if fitting > width || fitting < width / 2 {
            let set = sqlx::query(self.sql().set_history_slot.clone()).bind(fitting);
            set.execute(&mut *connection).await.map_err(&failed)?;
        }
        for slot in (0..SLOTS).filter(|slot| *slot != current) {
            self.empty_slot(connection, slot, age).await?;
        }
        Ok(0)
    }

    async fn empty_slot(&self, connection: &mut PgConnection, slot: i16, age: Duration) -> Result<()> {
        let failed = doing("emptying a slot of the history");
        let table = self.names().qualified(&format!("done_{slot}"));
        let statement = |text: String| AssertSqlSafe(self.names().fill(&text)).into_sql_str();
        // In a slot that is still young this finds a row at once.
        let look = format!(
            "SELECT EXISTS (SELECT 1 FROM {table}), EXISTS (SELECT 1 FROM {table} WHERE finished_at > {{clock}}() - make_interval(secs => $1))"
        );
        let look = statement(look);
        let found = sqlx::query(look.clone()).bind(secs(age)).fetch_one(&mut *connection);
        let found = found.await.map_err(&failed)?;
        if !found.get::<bool, _>(0) || found.get::<bool, _>(1) {
            return Ok(());
        }
        let mut tx = connection.begin().await.map_err(&failed)?;
        // A dump or a report that reads the history must not be waited for, since others would wait behind us.
        let lock = format!("SET LOCAL lock_timeout = '100ms'; LOCK TABLE ONLY {table} IN ACCESS EXCLUSIVE MODE");
        if let Err(error) = sqlx::raw_sql(AssertSqlSafe(lock).into_sql_str())
            .execute(&mut *tx)
            .await
        {
            let is_busy = matches!(code(&error).as_deref(), Some("55P03" | "40P01"));
            let error = failed(error);
            if is_busy {
                tracing::debug!(slot, "a slot of the history is being read: it is emptied the next time");
            } else if is_refused(&error) {
                tracing::warn!(slot, error = error.to_chain(), "a slot of the history was not emptied");
            } else {
                return Err(error);
            }
            return tx.rollback().await.map_err(failed);
        }
        let again = sqlx::query(look)
            .bind(secs(age))
            .fetch_one(&mut *tx)
            .await
            .map_err(&failed)?;
        if !again.get::<bool, _>(1) {
            let truncate = format!("TRUNCATE ONLY {table}");
            let truncate = sqlx::raw_sql(AssertSqlSafe(truncate).into_sql_str()).execute(&mut *tx);
            truncate.await.map_err(&failed)?;
        }
        tx.commit().await.map_err(failed)
    }

    async fn purge_failed(&self, connection: &mut PgConnection, mailbox: i16, age: Duration, max: u64) -> Result<u64> {
        let failed = doing("cleaning up dead letters");
        let mut tx = connection.begin_with(READ_COMMITTED).await.map_err(&failed)?;
        let old = sqlx::query_as(self.sql().old_failed.clone())
            .bind(mailbox)
            .bind(secs(age));
        let old = old
            .bind(i64::try_from(max).unwrap_or(i64::MAX))
            .fetch_all(&mut *tx)
            .await;
        let removed = self
            .change_failed(&mut tx, mailbox, old.map_err(&failed)?, &[&self.sql().discard])
            .await?;
        tx.commit().await.map_err(failed)?;
        Ok(removed)
    }

    /// Removes or redrives dead letters that were found, and lets their keys go on.
    pub(crate) async fn change_failed(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        found: Vec<(i16, i64, String, Option<String>)>,
        statements: &[&sqlx::SqlStr],
    ) -> Result<u64> {
        if found.is_empty() {
            return Ok(0);
        }
        let lanes: Vec<i16> = found.iter().map(|row| row.0).collect();
        let ids: Vec<i64> = found.iter().map(|row| row.1).collect();
        let of_key = |(lane, _, topic, key): (i16, i64, String, Option<String>)| Some((lane, topic, key?));
        let keys: BTreeSet<KeyOf> = found.into_iter().filter_map(of_key).collect();
        self.take_turns(connection, mailbox, &keys, &[]).await?;
        let mut changed = 0;
        for statement in statements {
            let change = sqlx::query((*statement).clone()).bind(mailbox).bind(&lanes).bind(&ids);
            let done = change.execute(&mut *connection).await;
            changed += done.map_err(doing("changing dead letters"))?.rows_affected();
        }
        self.right_keys(connection, mailbox, &keys).await?;
        Ok(changed)
    }
}
