//! What tools and people do with the log.

use crate::{
    PostgresLog,
    append::READ_COMMITTED,
    error::doing,
    row::{Reader, errors_from_text, reason, time},
};
use async_trait::async_trait;
use postrider_core::{
    Error, ErrorKind, Mailbox, MessageId, Result,
    log::{AttemptError, Cursor, Filter, Listing, LogAdmin, Page, RecordState, Stats, Stored},
};
use sqlx::{Connection as _, Row as _, postgres::PgRow};
use std::{collections::BTreeMap, time::Duration};
use uuid::Uuid;

/// `None` is all.
fn ids(filter: &Filter) -> Option<Vec<Uuid>> {
    (!filter.ids.is_empty()).then(|| filter.ids.iter().map(|id| *id.as_uuid()).collect())
}

fn position(cursor: &Cursor) -> Result<(i32, i64)> {
    let parsed = cursor
        .0
        .split_once(':')
        .and_then(|(part, id)| Some((part.parse().ok()?, id.parse().ok()?)));
    parsed.ok_or_else(|| {
        Error::new(ErrorKind::Invalid, "not a cursor of a listing").with("cursor", format!("{:?}", cursor.0))
    })
}

// The columns of `list`: part, eleven of the message with lane and id, created_at, attempts, errors, due_at, finished_at, state.
fn stored(reader: &mut Reader, row: &PgRow) -> Stored {
    let (message, problem) = match reader.message(row, 1) {
        Ok(message) => (message, None),
        Err(error) => (Reader::stand_in(row, 1), Some(reason(&error))),
    };
    let created_at = time(row, 12).unwrap_or_default();
    let mut stored = Stored::new(message, created_at);
    stored.attempts = u32::try_from(row.get::<i32, _>(13)).unwrap_or(u32::MAX);
    stored.errors = errors_from_text(row.get(14));
    if let Some(problem) = problem.filter(|_| stored.errors.is_empty()) {
        stored.errors.push(AttemptError::new(created_at, 0, problem));
    }
    stored.due_at = time(row, 15);
    stored.finished_at = time(row, 16);
    stored.state = match row.get::<i32, _>(17) {
        1 => RecordState::Succeeded,
        2 => RecordState::Failed,
        _ => RecordState::Pending,
    };
    stored
}

impl PostgresLog {
    async fn rows(&self, filter: &Filter, after: Option<(i32, i64)>, limit: usize) -> Result<Vec<PgRow>> {
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
        let mut connection = self.own("listing records").await?;
        sqlx::query(self.sql().list.clone())
            .bind(mailbox)
            .bind(part)
            .bind(id)
            .bind(filter.topic.as_ref().map(|topic| topic.as_str()))
            .bind(filter.kind.as_deref())
            .bind(filter.key.as_deref())
            .bind(ids(filter))
            .bind(state)
            .bind(i64::try_from(limit).unwrap_or(i64::MAX))
            .fetch_all(&mut *connection)
            .await
            .map_err(doing("listing records"))
    }

    async fn change(&self, filter: &Filter, max: u64, statements: &[&sqlx::SqlStr]) -> Result<u64> {
        let Some(mailbox) = self.find_mailbox(&filter.mailbox).await? else {
            return Ok(0);
        };
        let failed = doing("changing dead letters");
        let mut own = self.own_guarded("changing dead letters").await?;
        let mut tx = own.begin_with(READ_COMMITTED).await.map_err(&failed)?;
        let found = sqlx::query_as(self.sql().failed.clone())
            .bind(mailbox)
            .bind(filter.topic.as_ref().map(|topic| topic.as_str()))
            .bind(filter.kind.as_deref())
            .bind(filter.key.as_deref())
            .bind(ids(filter))
            .bind(i64::try_from(max).unwrap_or(i64::MAX))
            .fetch_all(&mut *tx)
            .await
            .map_err(&failed)?;
        let changed = self.change_failed(&mut tx, mailbox, found, statements).await?;
        tx.commit().await.map_err(failed)?;
        own.give_back();
        Ok(changed)
    }
}

#[async_trait]
impl LogAdmin for PostgresLog {
    async fn list(&self, filter: &Filter, page: &Page) -> Result<Listing> {
        let after = page.after.as_ref().map(position).transpose()?;
        let mut rows = self.rows(filter, after, page.size() + 1).await?;
        let more = rows.len() > page.size();
        rows.truncate(page.size());
        let at = |row: &PgRow| Cursor(format!("{}:{}", row.get::<i32, _>(0), row.get::<i64, _>(2)));
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
        let sql = self.sql();
        match filter.mailbox {
            Mailbox::Outbox(_) => self.change(filter, max, &[&sql.requeue, &sql.redrive]).await,
            _ => self.change(filter, max, &[&sql.redrive]).await,
        }
    }

    async fn discard(&self, filter: &Filter, max: u64) -> Result<u64> {
        self.change(filter, max, &[&self.sql().discard]).await
    }

    async fn count_failed(&self, filter: &Filter) -> Result<u64> {
        let Some(mailbox) = self.find_mailbox(&filter.mailbox).await? else {
            return Ok(0);
        };
        let mut connection = self.own("counting dead letters").await?;
        let count = sqlx::query_scalar::<_, i64>(self.sql().count_failed.clone())
            .bind(mailbox)
            .bind(filter.topic.as_ref().map(|topic| topic.as_str()))
            .bind(filter.kind.as_deref())
            .bind(filter.key.as_deref())
            .bind(ids(filter))
            .fetch_one(&mut *connection)
            .await;
        Ok(u64::try_from(count.map_err(doing("counting dead letters"))?).unwrap_or(0))
    }

    async fn mailboxes(&self) -> Result<Vec<Mailbox>> {
        let all = sqlx::query_scalar::<_, String>(self.sql().mailboxes.clone()).fetch_all(self.pool());
        let names = all.await.map_err(doing("listing mailboxes"))?;
        names.iter().map(|name| name.parse()).collect()
    }

    async fn stats(&self) -> Result<BTreeMap<Mailbox, Stats>> {
        let mut connection = self.own("counting records").await?;
        let all = sqlx::query(self.sql().stats.clone()).fetch_all(&mut *connection);
        let rows = all.await.map_err(doing("counting records"))?;
        let count = |row: &PgRow, column: usize| u64::try_from(row.get::<i64, _>(column)).unwrap_or(0);
        Ok(rows
            .iter()
            .filter_map(|row| {
                let mut stats = Stats::default();
                stats.parked = count(row, 2);
                stats.scheduled = count(row, 3);
                stats.pending = count(row, 1) + stats.parked + stats.scheduled;
                stats.failed = count(row, 4);
                stats.succeeded = count(row, 5);
                let oldest: Option<f64> = row.get(6);
                stats.oldest_pending = oldest.map(|secs| Duration::try_from_secs_f64(secs).unwrap_or_default());
                // A name that is none is nobody's of this program.
                Some((row.get::<&str, _>(0).parse().ok()?, stats))
            })
            .collect())
    }
}
