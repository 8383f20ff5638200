//! Receipts, notes, and who waits.

use crate::{PostgresLog, error::doing, log::unexpected, row::lane_of};
use async_trait::async_trait;
use postrider_core::{
    GroupName, Mailbox, MessageId, Result,
    log::{Admission, Arrival, InboxLog, Lent, Note},
};
use sqlx::{Connection as _, PgConnection, Row as _, SqlStr};

impl PostgresLog {
    /// Asks of every arrival, with `admit` or `look`.
    async fn ask(
        &self,
        connection: &mut PgConnection,
        statement: &SqlStr,
        mailbox: i16,
        arrivals: &[Arrival],
    ) -> Result<Vec<Admission>> {
        let ids: Vec<_> = arrivals.iter().map(|a| *a.id().as_uuid()).collect();
        let lanes: Vec<i16> = arrivals.iter().map(|a| lane_of(a.key(), a.id())).collect();
        let topics: Vec<&str> = arrivals.iter().map(|a| a.topic().as_str()).collect();
        let keys: Vec<Option<&str>> = arrivals.iter().map(|a| a.key()).collect();
        let own: Vec<bool> = arrivals.iter().map(|a| a.was_parked).collect();
        let ask = sqlx::query_scalar::<_, i32>(statement.clone())
            .bind(mailbox)
            .bind(ids)
            .bind(lanes)
            .bind(topics)
            .bind(keys)
            .bind(own);
        let answers = ask.fetch_all(connection).await.map_err(doing("asking the inbox"))?;
        if answers.len() != arrivals.len() {
            return Err(unexpected("the inbox did not answer for every message"));
        }
        let admission = |answer| match answer {
            0 => Admission::New,
            1 => Admission::Duplicate,
            2 => Admission::Parked,
            _ => Admission::HeldBack,
        };
        Ok(answers.into_iter().map(admission).collect())
    }

    async fn read_note(&self, connection: &mut PgConnection, mailbox: i16, id: MessageId) -> Result<Option<Note>> {
        let read = sqlx::query(self.sql().note.clone()).bind(mailbox).bind(*id.as_uuid());
        let found = read.fetch_optional(connection).await.map_err(doing("reading a note"))?;
        Ok(found.map(|row| Note {
            version: u64::try_from(row.get::<i64, _>(0)).unwrap_or(0),
            text: row.get(1),
        }))
    }

    async fn set_note(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        let write = match i64::try_from(expected) {
            Ok(0) => sqlx::query(self.sql().add_note.clone())
                .bind(mailbox)
                .bind(*id.as_uuid())
                .bind(text),
            Ok(expected) => sqlx::query(self.sql().set_note.clone())
                .bind(mailbox)
                .bind(*id.as_uuid())
                .bind(text)
                .bind(expected),
            Err(_) => return Ok(false),
        };
        let written = write.execute(connection).await.map_err(doing("writing a note"))?;
        Ok(written.rows_affected() > 0)
    }
}

fn inbox(group: &GroupName) -> Mailbox {
    Mailbox::Inbox(group.clone())
}

#[async_trait]
impl InboxLog for PostgresLog {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let connection: &mut PgConnection = tx.get_mut()?;
        crate::transaction::check(connection).await?;
        if arrivals.is_empty() {
            return Ok(Vec::new());
        }
        let mailbox = self.mailbox_in(connection, &inbox(group)).await?;
        self.ask(connection, &self.sql().admit, mailbox, arrivals).await
    }

    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let Some(mailbox) = self.find_mailbox(&inbox(group)).await? else {
            return Ok(vec![Admission::New; arrivals.len()]);
        };
        let mut connection = self.pool().acquire().await.map_err(doing("asking the inbox"))?;
        self.ask(&mut connection, &self.sql().look, mailbox, arrivals).await
    }

    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        if let Some(tx) = tx {
            let connection: &mut PgConnection = tx.get_mut()?;
            let mailbox = self.mailbox_in(connection, &inbox(group)).await?;
            return self.read_note(connection, mailbox, id).await;
        }
        let Some(mailbox) = self.find_mailbox(&inbox(group)).await? else {
            return Ok(None);
        };
        let mut connection = self.pool().acquire().await.map_err(doing("reading a note"))?;
        self.read_note(&mut connection, mailbox, id).await
    }

    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        if let Some(tx) = tx {
            let connection: &mut PgConnection = tx.get_mut()?;
            crate::transaction::check(connection).await?;
            let mailbox = self.mailbox_in(connection, &inbox(group)).await?;
            return self.set_note(connection, mailbox, id, expected, text).await;
        }
        let failed = doing("writing a note");
        let mut connection = self.pool().acquire().await.map_err(&failed)?;
        let mut tx = connection.begin().await.map_err(&failed)?;
        let mailbox = self.mailbox_in(&mut tx, &inbox(group)).await?;
        let is_written = self.set_note(&mut tx, mailbox, id, expected, text).await?;
        tx.commit().await.map_err(failed)?;
        Ok(is_written)
    }
}
