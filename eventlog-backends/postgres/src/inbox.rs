//! Receipts, notes, and who waits.

use crate::{PostgresLog, error::doing, log::unexpected};
use async_trait::async_trait;
use postrider_core::{
    GroupName, Mailbox, MessageId, Result,
    log::{Admission, Arrival, GroupMember, InboxLog, Lent, Note, RegisteredMember},
};
use sqlx::{Connection as _, PgConnection, Row as _, types::Uuid};
use std::{collections::HashSet, time::Duration};

/// Arrivals as the statements take them.
struct Asked<'a> {
    ids: Vec<Uuid>,
    topics: Vec<&'a str>,
    keys: Vec<Option<&'a str>>,
}

impl<'a> Asked<'a> {
    fn of(arrivals: &'a [Arrival]) -> Self {
        Self {
            ids: arrivals.iter().map(|a| *a.id().as_uuid()).collect(),
            topics: arrivals.iter().map(|a| a.topic().as_str()).collect(),
            keys: arrivals.iter().map(Arrival::key).collect(),
        }
    }
}

impl PostgresLog {
    /// Asks of every arrival, and writes the receipts of the new ones.
    async fn write_receipts(
        &self,
        connection: &mut PgConnection,
        mailbox: &Mailbox,
        arrivals: &[Arrival],
    ) -> Result<Vec<Admission>> {
        let own: Vec<bool> = arrivals.iter().map(|a| a.was_parked).collect();
        let Asked { ids, topics, keys } = Asked::of(arrivals);
        let (name, mut is_known) = (mailbox.to_string(), false);
        let answers = loop {
            let ask = sqlx::query_scalar::<_, i32>(self.sql().admit.clone())
                .bind(&name)
                .bind(&ids)
                .bind(&topics)
                .bind(&keys)
                .bind(&own);
            let answers = ask.fetch_all(&mut *connection).await;
            let answers = answers.map_err(doing("asking the inbox"))?;
            if is_known || !answers.is_empty() {
                break answers;
            }
            self.mailbox_in(connection, mailbox).await?;
            is_known = true;
        };
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

    /// Asks what is known of arrivals, which is little.
    async fn known(
        &self,
        connection: &mut PgConnection,
        mailbox: &Mailbox,
        arrivals: &[Arrival],
    ) -> Result<Vec<Admission>> {
        let Asked { ids, topics, keys } = Asked::of(arrivals);
        let ask = sqlx::query(self.sql().look.clone())
            .bind(mailbox.to_string())
            .bind(ids)
            .bind(topics)
            .bind(keys);
        let rows = ask.fetch_all(connection).await.map_err(doing("asking the inbox"))?;
        let (mut handled, mut parked, mut busy) = (HashSet::new(), HashSet::new(), HashSet::new());
        for row in &rows {
            match row.get::<i32, _>(0) {
                1 => drop(handled.insert(row.get::<Uuid, _>(1))),
                2 => drop(parked.insert(row.get::<Uuid, _>(1))),
                _ => drop(busy.insert((row.get::<&str, _>(2), row.get::<&str, _>(3)))),
            }
        }
        let admission = |arrival: &Arrival| {
            let id = arrival.id();
            let id = id.as_uuid();
            if handled.contains(id) {
                Admission::Duplicate
            } else if arrival.was_parked {
                Admission::New
            } else if parked.contains(id) {
                Admission::Parked
            } else if arrival
                .key()
                .is_some_and(|key| busy.contains(&(arrival.topic().as_str(), key)))
            {
                Admission::HeldBack
            } else {
                Admission::New
            }
        };
        Ok(arrivals.iter().map(admission).collect())
    }

    async fn read_note(&self, connection: &mut PgConnection, mailbox: &Mailbox, id: MessageId) -> Result<Option<Note>> {
        let read = sqlx::query(self.sql().note.clone())
            .bind(mailbox.to_string())
            .bind(*id.as_uuid());
        let found = read.fetch_optional(connection).await.map_err(doing("reading a note"))?;
        Ok(found.map(|row| Note {
            version: u64::try_from(row.get::<i64, _>(0)).unwrap_or(0),
            text: row.get(1),
        }))
    }

    async fn set_note(
        &self,
        connection: &mut PgConnection,
        mailbox: &Mailbox,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        let failed = doing("writing a note");
        let Ok(version) = i64::try_from(expected) else {
            return Ok(false);
        };
        let name = mailbox.to_string();
        let statement = if version == 0 {
            &self.sql().add_note
        } else {
            &self.sql().set_note
        };
        for is_known in [false, true] {
            let mut write = sqlx::query(statement.clone())
                .bind(&name)
                .bind(*id.as_uuid())
                .bind(text);
            if version > 0 {
                write = write.bind(version);
            }
            let written = write.execute(&mut *connection).await.map_err(&failed)?;
            if written.rows_affected() > 0 {
                return Ok(true);
            }
            if version > 0 || is_known {
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

#[async_trait]
impl InboxLog for PostgresLog {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let connection: &mut PgConnection = tx.get_mut()?;
        crate::transaction::check(connection).await?;
        if arrivals.is_empty() {
            return Ok(Vec::new());
        }
        self.write_receipts(connection, &inbox(group), arrivals).await
    }

    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let mut connection = self.own("asking the inbox").await?;
        self.known(&mut connection, &inbox(group), arrivals).await
    }

    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        if let Some(tx) = tx {
            let connection: &mut PgConnection = tx.get_mut()?;
            return self.read_note(connection, &inbox(group), id).await;
        }
        let mut connection = self.own("reading a note").await?;
        self.read_note(&mut connection, &inbox(group), id).await
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
            return self.set_note(connection, &inbox(group), id, expected, text).await;
        }
        let failed = doing("writing a note");
        let mut connection = self.own_guarded("writing a note").await?;
        let mut tx = connection.begin().await.map_err(&failed)?;
        let is_written = self.set_note(&mut tx, &inbox(group), id, expected, text).await?;
        tx.commit().await.map_err(failed)?;
        connection.give_back();
        Ok(is_written)
    }

    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        self.register_member(group, member, retention).await
    }

    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        self.list_members(group, retention).await
    }
}
