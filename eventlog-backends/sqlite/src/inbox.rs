//! Receipts, notes, and who waits.

use crate::{SqliteLog, error::doing, row::micros};
use async_trait::async_trait;
use postrider_core::{
    GroupName, Mailbox, MessageId, Result,
    log::{Admission, Arrival, GroupMember, InboxLog, Lent, Note, RegisteredMember},
};
use sqlx::{Row as _, SqliteConnection};
use std::time::Duration;

impl SqliteLog {
    /// What is known of every arrival.
    async fn ask(
        &self,
        connection: &mut SqliteConnection,
        mailbox: &str,
        arrivals: &[Arrival],
    ) -> Result<Vec<Admission>> {
        let asked = arrivals.iter().map(|arrival| {
            let id = hex(arrival.id());
            serde_json::json!([id, arrival.topic().as_str(), arrival.key(), arrival.was_parked])
        });
        let asked = serde_json::Value::Array(asked.collect()).to_string();
        let answers = sqlx::query_scalar::<_, i64>(self.sql().admit.clone())
            .bind(mailbox)
            .bind(asked);
        let answers = answers.fetch_all(connection).await.map_err(doing("asking the inbox"))?;
        let admission = |answer| match answer {
            0 => Admission::New,
            1 => Admission::Duplicate,
            2 => Admission::Parked,
            _ => Admission::HeldBack,
        };
        Ok(answers.into_iter().map(admission).collect())
    }

    async fn read_note(&self, connection: &mut SqliteConnection, mailbox: &str, id: MessageId) -> Result<Option<Note>> {
        let read = sqlx::query(self.sql().note.clone()).bind(mailbox).bind(bytes(id));
        let found = read.fetch_optional(connection).await.map_err(doing("reading a note"))?;
        Ok(found.map(|row| Note {
            version: u64::try_from(row.get::<i64, _>(0)).unwrap_or(0),
            text: row.get(1),
        }))
    }

    async fn set_note(
        &self,
        connection: &mut SqliteConnection,
        mailbox: &Mailbox,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        let (now, name) = (micros(self.clock().now()), mailbox.to_string());
        let statement = if expected == 0 {
            &self.sql().add_note
        } else {
            &self.sql().set_note
        };
        for is_known in [false, true] {
            let mut write = sqlx::query(statement.clone())
                .bind(&name)
                .bind(bytes(id))
                .bind(text)
                .bind(now);
            if expected > 0 {
                write = write.bind(i64::try_from(expected).unwrap_or(i64::MAX));
            }
            let written = write.execute(&mut *connection).await;
            if written.map_err(doing("writing a note"))?.rows_affected() > 0 {
                return Ok(true);
            }
            if expected > 0 || is_known {
                break;
            }
            // There is one, or there is no mailbox yet.
            self.mailbox_in(connection, mailbox).await?;
        }
        Ok(false)
    }
}

fn inbox(group: &GroupName) -> Mailbox {
    Mailbox::Inbox(group.clone())
}

fn hex(id: MessageId) -> String {
    format!("{:X}", id.as_uuid().as_simple())
}

fn bytes(id: MessageId) -> Vec<u8> {
    id.as_uuid().as_bytes().to_vec()
}

#[async_trait]
impl InboxLog for SqliteLog {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let connection: &mut SqliteConnection = tx.get_mut()?;
        crate::transaction::check(connection)?;
        if arrivals.is_empty() {
            return Ok(Vec::new());
        }
        let mailbox = inbox(group);
        let answers = self.ask(connection, &mailbox.to_string(), arrivals).await?;
        // One writer at a time: nothing comes between the answers and the receipts.
        let new = arrivals.iter().zip(&answers);
        let new: Vec<String> = new
            .filter(|(_, answer)| **answer == Admission::New)
            .map(|(arrival, _)| hex(arrival.id()))
            .collect();
        if !new.is_empty() {
            let ids = serde_json::json!(new).to_string();
            for is_known in [false, true] {
                let receipts = sqlx::query(self.sql().add_receipts.clone())
                    .bind(mailbox.to_string())
                    .bind(&ids)
                    .bind(micros(self.clock().now()));
                let written = receipts.execute(&mut *connection).await;
                let written = written.map_err(doing("admitting messages"))?;
                if is_known || written.rows_affected() > 0 {
                    break;
                }
                self.mailbox_in(connection, &mailbox).await?;
            }
        }
        Ok(answers)
    }

    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let mut connection = self.pool().acquire().await.map_err(doing("asking the inbox"))?;
        self.ask(&mut connection, &inbox(group).to_string(), arrivals).await
    }

    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        if let Some(tx) = tx {
            let connection: &mut SqliteConnection = tx.get_mut()?;
            return self.read_note(connection, &inbox(group).to_string(), id).await;
        }
        let mut connection = self.pool().acquire().await.map_err(doing("reading a note"))?;
        self.read_note(&mut connection, &inbox(group).to_string(), id).await
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
            let connection: &mut SqliteConnection = tx.get_mut()?;
            crate::transaction::check(connection)?;
            return self.set_note(connection, &inbox(group), id, expected, text).await;
        }
        let failed = doing("writing a note");
        let mut tx = self.pool().begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        let is_written = self.set_note(&mut tx, &inbox(group), id, expected, text).await?;
        tx.commit().await.map_err(failed)?;
        Ok(is_written)
    }

    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        self.register_member(group, member, retention).await
    }

    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        self.list_members(group, retention).await
    }
}
