//! What tools and people do with the log.

use crate::{
    SqliteLog,
    append::state,
    error::doing,
    row::{Reader, errors_from_text, micros, time},
};
use async_trait::async_trait;
use postrider_core::{
    Error, ErrorKind, Mailbox, MessageId, Result,
    log::{AttemptError, Cursor, Filter, Listing, LogAdmin, Page, RecordState, Stats, Stored},
};
use sqlx::{Row as _, sqlite::SqliteRow};
use std::collections::BTreeMap;

/// The ids as the statements compare them; `None` is all.
fn hex_ids(ids: &[MessageId]) -> Option<String> {
    let quoted = ids.iter().map(|id| format!("\"{:X}\"", id.as_uuid().as_simple()));
    (!ids.is_empty()).then(|| format!("[{}]", quoted.collect::<Vec<_>>().join(",")))
}

fn position(cursor: &Cursor) -> Result<(i64, i64)> {
    let parsed = cursor
        .0
        .split_once(':')
        .and_then(|(part, id)| Some((part.parse().ok()?, id.parse().ok()?)));
    parsed.ok_or_else(|| {
        Error::new(ErrorKind::Invalid, "not a cursor of a listing").with("cursor", format!("{:?}", cursor.0))
    })
}

// The columns of `list`: part, id, nine of the message, created_at, attempts, errors, due_at, finished_at, state.
fn stored(reader: &mut Reader, row: &SqliteRow) -> Stored {
    let (message, problem) = match reader.message(row, 2) {
        Ok(message) => (message, None),
        Err(error) => (Reader::stand_in(row, 2), Some(error.to_chain())),
    };
    let created_at = time(row.get(11));
    let mut stored = Stored::new(message, created_at);
    stored.attempts = u32::try_from(row.get::<i64, _>(12)).unwrap_or(u32::MAX);
    stored.errors = errors_from_text(row.get(13));
    if let Some(problem) = problem.filter(|_| stored.errors.is_empty()) {
        stored.errors.push(AttemptError::new(created_at, 0, problem));
    }
    stored.due_at = row.get::<Option<i64>, _>(14).map(time);
    stored.finished_at = row.get::<Option<i64>, _>(15).map(time);
    stored.state = match row.get::<i64, _>(16) {
        1 => RecordState::Succeeded,
        2 => RecordState::Failed,
        _ => RecordState::Pending,
    };
    stored
}

impl SqliteLog {
    async fn rows(&self, filter: &Filter, after: Option<(i64, i64)>, limit: usize) -> Result<Vec<SqliteRow>> {
        let Some(mailbox) = self.find_mailbox(&filter.mailbox).await? else {
            return Ok(Vec::new());
        };
        let state = match filter.state {
            None => None,
            Some(RecordState::Pending) => Some(0),
            Some(RecordState::Succeeded) => Some(1),
            Some(RecordState::Failed) => Some(2),
            // Not stored: such a record is listed as pending.
            Some(_) => return Ok(Vec::new()),
        };
        let (part, id) = after.unwrap_or((0, i64::MIN));
        sqlx::query(self.sql().list.clone())
            .bind(mailbox)
            .bind(part)
            .bind(id)
            .bind(filter.topic.as_ref().map(|topic| topic.as_str()))
            .bind(filter.kind.as_deref())
            .bind(filter.key.as_deref())
            .bind(hex_ids(&filter.ids))
            .bind(state)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(self.pool())
            .await
            .map_err(doing("listing records"))
    }

    async fn change_failed(&self, filter: &Filter, max: u64, redrive: bool) -> Result<u64> {
        let Some(mailbox) = self.find_mailbox(&filter.mailbox).await? else {
            return Ok(0);
        };
        let failed = doing(if redrive {
            "redriving dead letters"
        } else {
            "discarding dead letters"
        });
        let now = micros(self.clock().now());
        let mut tx = self.pool().begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        let found = sqlx::query(self.sql().failed.clone())
            .bind(mailbox)
            .bind(filter.topic.as_ref().map(|topic| topic.as_str()))
            .bind(filter.kind.as_deref())
            .bind(filter.key.as_deref())
            .bind(hex_ids(&filter.ids))
            .bind(i64::try_from(max).unwrap_or(i64::MAX))
            .fetch_all(&mut *tx)
            .await
            .map_err(&failed)?;
        for row in &found {
            let id: i64 = row.get(0);
            if !redrive {
                self.remove_failed(&mut tx, mailbox, row, now).await?;
            } else if row.get::<i64, _>(3) == state::FAILED_AND_HOLDING {
                let redrive = sqlx::query(self.sql().redrive_in_place.clone()).bind(id).bind(now);
                redrive.execute(&mut *tx).await.map_err(&failed)?;
            } else {
                let to_queue = matches!(filter.mailbox, Mailbox::Outbox(_));
                self.redrive_at_the_end(&mut tx, mailbox, row, to_queue, now).await?;
            }
        }
        tx.commit().await.map_err(failed)?;
        Ok(found.len() as u64)
    }

    /// It has given up its place: it enters behind everything, in an outbox as an event, in an inbox behind what is parked of its key.
    async fn redrive_at_the_end(
        &self,
        connection: &mut sqlx::SqliteConnection,
        mailbox: i64,
        row: &SqliteRow,
        to_queue: bool,
        now: i64,
    ) -> Result<()> {
        let failed = doing("redriving a dead letter");
        if to_queue {
            let id: i64 = row.get(0);
            let requeue = sqlx::query(self.sql().requeue.clone()).bind(id);
            if requeue
                .execute(&mut *connection)
                .await
                .map_err(&failed)?
                .rows_affected()
                > 0
            {
                let delete = sqlx::query(self.sql().delete_parked.clone()).bind(id);
                delete.execute(&mut *connection).await.map_err(&failed)?;
                return Ok(());
            }
        }
        let (topic, key): (&str, Option<&str>) = (row.get(1), row.get(2));
        let position = self.next_id(connection).await?;
        let redrive = sqlx::query(self.sql().redrive_at_the_end.clone()).bind(row.get::<i64, _>(0));
        redrive
            .bind(now)
            .bind(position)
            .execute(&mut *connection)
            .await
            .map_err(&failed)?;
        match key {
            Some(key) => self.right_key(connection, mailbox, topic, key, now).await,
            None => Ok(()),
        }
    }
}

#[async_trait]
impl LogAdmin for SqliteLog {
    async fn list(&self, filter: &Filter, page: &Page) -> Result<Listing> {
        let after = page.after.as_ref().map(position).transpose()?;
        let mut rows = self.rows(filter, after, page.size() + 1).await?;
        let more = rows.len() > page.size();
        rows.truncate(page.size());
        let at = |row: &SqliteRow| Cursor(format!("{}:{}", row.get::<i64, _>(0), row.get::<i64, _>(1)));
        let next = rows.last().filter(|_| more).map(at);
        let mut reader = Reader::default();
        let entries = rows.iter().map(|row| stored(&mut reader, row)).collect();
        Ok(Listing::new(entries, next))
    }

    async fn show(&self, mailbox: &Mailbox, id: MessageId) -> Result<Option<Stored>> {
        let rows = self.rows(&Filter::of(mailbox.clone()).with_id(id), None, 1).await?;
        Ok(rows.first().map(|row| stored(&mut Reader::default(), row)))
    }

    async fn redrive(&self, filter: &Filter, max: u64) -> Result<u64> {
        self.change_failed(filter, max, true).await
    }

    async fn discard(&self, filter: &Filter, max: u64) -> Result<u64> {
        self.change_failed(filter, max, false).await
    }

    async fn count_failed(&self, filter: &Filter) -> Result<u64> {
        let Some(mailbox) = self.find_mailbox(&filter.mailbox).await? else {
            return Ok(0);
        };
        let count = sqlx::query_scalar::<_, i64>(self.sql().count_failed.clone())
            .bind(mailbox)
            .bind(filter.topic.as_ref().map(|topic| topic.as_str()))
            .bind(filter.kind.as_deref())
            .bind(filter.key.as_deref())
            .bind(hex_ids(&filter.ids))
            .fetch_one(self.pool())
            .await;
        Ok(u64::try_from(count.map_err(doing("counting dead letters"))?).unwrap_or(0))
    }

    async fn mailboxes(&self) -> Result<Vec<Mailbox>> {
        let all = sqlx::query_scalar::<_, String>(self.sql().mailboxes.clone()).fetch_all(self.pool());
        let names = all.await.map_err(doing("listing mailboxes"))?;
        names.iter().map(|name| name.parse()).collect()
    }

    async fn stats(&self) -> Result<BTreeMap<Mailbox, Stats>> {
        let now = micros(self.clock().now());
        let all = sqlx::query(self.sql().stats.clone()).fetch_all(self.pool());
        let rows = all.await.map_err(doing("counting records"))?;
        let count = |row: &SqliteRow, column: usize| u64::try_from(row.get::<i64, _>(column)).unwrap_or(0);
        Ok(rows
            .iter()
            .filter_map(|row| {
                let mut stats = Stats::default();
                stats.parked = count(row, 2);
                stats.scheduled = count(row, 3);
                stats.pending = count(row, 1) + stats.parked + stats.scheduled;
                stats.failed = count(row, 4);
                stats.succeeded = count(row, 5);
                let oldest = [6, 7]
                    .into_iter()
                    .filter_map(|column| row.get::<Option<i64>, _>(column))
                    .min();
                stats.oldest_pending = oldest
                    .map(|at| std::time::Duration::from_micros(u64::try_from(now.saturating_sub(at)).unwrap_or(0)));
                // A name that is none is nobody's of this program.
                Some((row.get::<&str, _>(0).parse().ok()?, stats))
            })
            .collect())
    }
}
