//! Writing new records.

use crate::{
    SqliteLog,
    error::{NOT_NULL, code, doing},
    row::{errors_to_text, micros, time},
};
use postrider_core::{
    Mailbox, Message, Result,
    log::{AttemptError, Headers, NewRecord, Placement},
};
use sqlx::{Sqlite, SqliteConnection, query::Query, sqlite::SqliteArguments};
use std::time::Duration;

/// The states of the table of parked records.
pub(crate) mod state {
    pub(crate) const DUE: i64 = 0;
    pub(crate) const BEHIND: i64 = 1;
    pub(crate) const FOR_TOPIC: i64 = 2;
    pub(crate) const FAILED: i64 = 3;
    pub(crate) const FAILED_AND_HOLDING: i64 = 4;
}

type Statement<'q> = Query<'q, Sqlite, SqliteArguments>;

/// Binds what makes a message, and when it was appended: ten values.
fn bind<'q>(statement: Statement<'q>, message: &'q Message, now: i64) -> Result<Statement<'q>> {
    Ok(statement
        .bind(&message.id().as_uuid().as_bytes()[..])
        .bind(message.topic().as_str())
        .bind(message.kind())
        .bind(message.source())
        .bind(message.key())
        .bind(message.content_type())
        .bind(Headers::to_text(message)?)
        .bind(message.time().map(micros))
        .bind(&message.payload()[..])
        .bind(now))
}

impl SqliteLog {
    /// Writes records in the connection's transaction, in their order.
    pub(crate) async fn insert(
        &self,
        connection: &mut SqliteConnection,
        mailbox: &Mailbox,
        batch: &[NewRecord],
    ) -> Result<()> {
        let now = micros(self.clock().now());
        let mut rest = batch;
        while let Some(first) = rest.first() {
            let due = rest.iter().take_while(|r| r.placement == Placement::Due).count();
            if due > 0 {
                self.insert_due(connection, mailbox, &rest[..due], now).await?;
                rest = &rest[due..];
                continue;
            }
            let id = self.mailbox_in(connection, mailbox).await?;
            self.insert_placed(connection, id, first, now).await?;
            rest = &rest[1..];
        }
        Ok(())
    }

    /// Many rows a statement; only four sizes, so that each is prepared once.
    async fn insert_due(
        &self,
        connection: &mut SqliteConnection,
        mailbox: &Mailbox,
        batch: &[NewRecord],
        now: i64,
    ) -> Result<()> {
        let (sql, name) = (self.sql(), mailbox.to_string());
        let (mut rest, mut is_known) = (batch, false);
        while !rest.is_empty() {
            let (statement, rows) = match rest.len() {
                64.. => (&sql.append_64, 64),
                16.. => (&sql.append_16, 16),
                4.. => (&sql.append_4, 4),
                _ => (&sql.append_1, 1),
            };
            let mut query = sqlx::query(statement.clone());
            for record in &rest[..rows] {
                query = bind(query.bind(&name), &record.message, now)?;
            }
            match query.execute(&mut *connection).await {
                Ok(_) => rest = &rest[rows..],
                // The mailbox is missing: new, or lost with a restored copy or by hand. The statement has done nothing.
                Err(error) if !is_known && code(&error) == Some(NOT_NULL) => {
                    self.mailbox_in(connection, mailbox).await?;
                    is_known = true;
                }
                Err(error) => return Err(doing("appending events")(error)),
            }
        }
        Ok(())
    }

    async fn insert_placed(
        &self,
        connection: &mut SqliteConnection,
        mailbox: i64,
        record: &NewRecord,
        now: i64,
    ) -> Result<()> {
        match &record.placement {
            Placement::Scheduled { after } => {
                let query = sqlx::query(self.sql().schedule.clone()).bind(mailbox);
                let query = bind(query, &record.message, now)?.bind(later(now, *after));
                query
                    .execute(connection)
                    .await
                    .map_err(doing("appending a delayed event"))?;
                Ok(())
            }
            Placement::Parked {
                after,
                attempts,
                errors,
            } => {
                self.insert_parked(
                    connection,
                    mailbox,
                    record,
                    now,
                    *attempts,
                    errors,
                    (state::DUE, Some(later(now, *after))),
                )
                .await
            }
            Placement::Failed {
                attempts,
                errors,
                hold_key,
            } => {
                let state = if *hold_key {
                    state::FAILED_AND_HOLDING
                } else {
                    state::FAILED
                };
                self.insert_parked(connection, mailbox, record, now, *attempts, errors, (state, None))
                    .await
            }
            _ => Err(crate::log::unexpected(
                "the SQLite log does not know this placement of a record",
            )),
        }
    }

    /// Parks a record on arrival, or makes it a dead letter where there is no time it is due; once for each message id.
    #[allow(clippy::too_many_arguments)]
    async fn insert_parked(
        &self,
        connection: &mut SqliteConnection,
        mailbox: i64,
        record: &NewRecord,
        now: i64,
        attempts: u32,
        errors: &[AttemptError],
        (state, due_at): (i64, Option<i64>),
    ) -> Result<()> {
        let failed = doing("parking a message");
        let (sql, message) = (self.sql(), &record.message);
        let message_id = message.id();
        let known = sqlx::query_scalar(sql.is_parked_message.clone()).bind(mailbox);
        let known = known.bind(&message_id.as_uuid().as_bytes()[..]);
        if known.fetch_one(&mut *connection).await.map_err(&failed)? {
            return Ok(());
        }
        let id = self.next_id(connection).await?;
        let is_behind = match (message.key(), due_at) {
            (Some(key), Some(_)) => {
                let waits = sqlx::query_scalar(sql.is_parked_key.clone())
                    .bind(mailbox)
                    .bind(message.topic().as_str());
                waits.bind(key).fetch_one(&mut *connection).await.map_err(&failed)?
            }
            _ => false,
        };
        let mut kept = Vec::new();
        AttemptError::keep(&mut kept, errors);
        let state = if is_behind { state::BEHIND } else { state };
        bind(sqlx::query(sql.park_new.clone()).bind(mailbox), message, now)?
            .bind(id)
            .bind(i64::from(attempts))
            .bind(state)
            .bind(due_at.filter(|_| !is_behind))
            .bind(errors_to_text(&kept)?)
            .bind(due_at.is_none().then_some(now))
            .execute(connection)
            .await
            .map_err(failed)?;
        Ok(())
    }

    /// Sees to it that of what is parked of a key the first, and only the first, is a head. Whatever parks a row of a
    /// key calls it, since the row may be before the head there is, or behind one that is none.
    pub(crate) async fn right_key(
        &self,
        connection: &mut SqliteConnection,
        mailbox: i64,
        topic: &str,
        key: &str,
        now: i64,
    ) -> Result<()> {
        let failed = doing("letting a key go on");
        let promote = sqlx::query(self.sql().promote.clone())
            .bind(mailbox)
            .bind(topic)
            .bind(key)
            .bind(now);
        promote.execute(&mut *connection).await.map_err(&failed)?;
        let demote = sqlx::query(self.sql().demote.clone())
            .bind(mailbox)
            .bind(topic)
            .bind(key);
        demote.execute(connection).await.map_err(failed)?;
        Ok(())
    }

    /// A position at the end.
    pub(crate) async fn next_id(&self, connection: &mut SqliteConnection) -> Result<i64> {
        let failed = doing("taking a position");
        let next = || sqlx::query_scalar(self.sql().next_id.clone());
        if let Some(id) = next().fetch_optional(&mut *connection).await.map_err(&failed)? {
            return Ok(id);
        }
        self.raise_sequence(connection, 0).await?;
        next().fetch_one(connection).await.map_err(failed)
    }

    /// Puts the sequence of positions behind every one that is in use, and `at_least` there. Gives where it stands.
    pub(crate) async fn raise_sequence(&self, connection: &mut SqliteConnection, at_least: i64) -> Result<i64> {
        let failed = doing("restoring the sequence of positions");
        let add = sqlx::query(self.sql().add_sequence.clone()).execute(&mut *connection);
        add.await.map_err(&failed)?;
        let raise = sqlx::query_scalar(self.sql().raise_sequence.clone()).bind(at_least);
        raise.fetch_one(connection).await.map_err(failed)
    }
}

/// `now` and a delay, in microseconds.
pub(crate) fn later(now: i64, delay: Duration) -> i64 {
    micros(postrider_core::clock::later(time(now), delay))
}
