//! Writing new records.

use crate::{
    PostgresLog,
    error::doing,
    row::{errors_to_text, lane_of, secs},
};
use md5::{Digest as _, Md5};
use postrider_core::{
    Error, ErrorKind, Mailbox, Message, Result,
    clock::Timestamp,
    log::{Headers, NewRecord, Placement},
};
use sqlx::{PgConnection, Postgres, query::Query};
use std::{collections::BTreeSet, time::Duration};
use uuid::Uuid;

/// The states of the table of parked records.
pub(crate) mod state {
    pub(crate) const DUE: i16 = 0;
    pub(crate) const BEHIND: i16 = 1;
    pub(crate) const FOR_TOPIC: i16 = 2;
    pub(crate) const FAILED: i16 = 3;
    pub(crate) const FAILED_AND_HOLDING: i16 = 4;
}

/// How a transaction begins that takes turns, whatever the database has for a default.
pub(crate) const READ_COMMITTED: &str = "BEGIN ISOLATION LEVEL READ COMMITTED";

/// The key of a record with its lane, topic and text: what turns are taken by.
pub(crate) type KeyOf = (i16, String, String);

/// The columns of a batch.
#[derive(Default)]
struct Columns<'a> {
    lane: Vec<i16>,
    message_id: Vec<Uuid>,
    topic: Vec<&'a str>,
    kind: Vec<&'a str>,
    source: Vec<Option<&'a str>>,
    key: Vec<Option<&'a str>>,
    content_type: Vec<&'a str>,
    headers: Vec<String>,
    time: Vec<Option<Timestamp>>,
    payload: Vec<&'a [u8]>,
}

impl<'a> Columns<'a> {
    fn push(&mut self, message: &'a Message) -> Result<()> {
        self.lane.push(lane_of(message.key(), message.id()));
        self.message_id.push(*message.id().as_uuid());
        self.topic.push(message.topic().as_str());
        self.kind.push(message.kind());
        self.source.push(message.source());
        self.key.push(message.key());
        self.content_type.push(message.content_type());
        self.headers.push(Headers::to_text(message)?);
        self.time.push(message.time());
        self.payload.push(message.payload());
        Ok(())
    }

    fn bind<'q>(
        self,
        query: Query<'q, Postgres, sqlx::postgres::PgArguments>,
    ) -> Query<'q, Postgres, sqlx::postgres::PgArguments>
    where
        'a: 'q,
    {
        query
            .bind(self.lane)
            .bind(self.message_id)
            .bind(self.topic)
            .bind(self.kind)
            .bind(self.source)
            .bind(self.key)
            .bind(self.content_type)
            .bind(self.headers)
            .bind(self.time)
            .bind(self.payload)
    }
}

impl PostgresLog {
    /// Writes records in the connection's transaction; those of one placement keep their order.
    pub(crate) async fn insert(
        &self,
        connection: &mut PgConnection,
        mailbox: &Mailbox,
        batch: &[NewRecord],
    ) -> Result<()> {
        if self.try_insert(connection, mailbox, batch).await? {
            return Ok(());
        }
        // The mailbox is missing: new, or lost with a failover or by hand.
        self.mailbox_in(connection, mailbox).await?;
        if self.try_insert(connection, mailbox, batch).await? {
            return Ok(());
        }
        let error = Error::new(
            ErrorKind::Unavailable,
            "appending events failed: the mailbox was removed meanwhile; try again",
        );
        Err(error.with("mailbox", mailbox))
    }

    /// `false` if there is no such mailbox: then nothing was written.
    pub(crate) async fn try_insert(
        &self,
        connection: &mut PgConnection,
        mailbox: &Mailbox,
        batch: &[NewRecord],
    ) -> Result<bool> {
        let name = mailbox.to_string();
        if let [record] = batch
            && record.placement == Placement::Due
        {
            return self.insert_one(connection, &name, &record.message).await;
        }
        let (mut due, mut later, mut parked) = (Columns::default(), Columns::default(), Columns::default());
        let (mut delays, mut parked_rest) = (Vec::new(), ParkedColumns::default());
        for record in batch {
            match &record.placement {
                Placement::Due => due.push(&record.message)?,
                Placement::Scheduled { after } => {
                    later.push(&record.message)?;
                    delays.push(secs(*after));
                }
                Placement::Parked {
                    after,
                    attempts,
                    errors,
                } => {
                    parked.push(&record.message)?;
                    parked_rest.push(state::DUE, *after, *attempts, errors)?;
                }
                Placement::Failed {
                    attempts,
                    errors,
                    hold_key,
                } => {
                    parked.push(&record.message)?;
                    let state = if *hold_key {
                        state::FAILED_AND_HOLDING
                    } else {
                        state::FAILED
                    };
                    parked_rest.push(state, Duration::ZERO, *attempts, errors)?;
                }
                _ => return Err(crate::log::unexpected("the Postgres log does not know this placement")),
            }
        }
        if !due.lane.is_empty() {
            let many = due.bind(sqlx::query(self.sql().append_many.clone()).bind(&name));
            let appended = many.execute(&mut *connection).await;
            if appended.map_err(doing("appending events"))?.rows_affected() == 0 {
                return Ok(false);
            }
        }
        if !later.lane.is_empty() {
            let many = later.bind(sqlx::query(self.sql().schedule.clone()).bind(&name));
            let appended = many.bind(delays).execute(&mut *connection).await;
            if appended.map_err(doing("appending delayed events"))?.rows_affected() == 0 {
                return Ok(false);
            }
        }
        if !parked.lane.is_empty() {
            let id = self.mailbox_in(connection, mailbox).await?;
            self.insert_parked(connection, id, parked, parked_rest).await?;
        }
        Ok(true)
    }

    async fn insert_one(&self, connection: &mut PgConnection, mailbox: &str, message: &Message) -> Result<bool> {
        let appended = sqlx::query(self.sql().append_one.clone())
            .bind(mailbox)
            .bind(lane_of(message.key(), message.id()))
            .bind(message.id().as_uuid())
            .bind(message.topic().as_str())
            .bind(message.kind())
            .bind(message.source())
            .bind(message.key())
            .bind(message.content_type())
            .bind(Headers::to_text(message)?)
            .bind(message.time())
            .bind(&message.payload()[..])
            .execute(connection)
            .await
            .map_err(doing("appending an event"))?;
        Ok(appended.rows_affected() > 0)
    }

    async fn insert_parked(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        columns: Columns<'_>,
        rest: ParkedColumns,
    ) -> Result<()> {
        let failed = doing("parking messages");
        let mut keys = BTreeSet::new();
        for (n, state) in rest.state.iter().enumerate() {
            if let Some(key) = columns.key[n].filter(|_| *state != state::FAILED) {
                keys.insert((columns.lane[n], columns.topic[n].to_owned(), key.to_owned()));
            }
        }
        self.take_turns(connection, mailbox, &keys, &columns.message_id).await?;
        let park = columns.bind(sqlx::query(self.sql().park_new.clone()).bind(mailbox));
        let park = park
            .bind(rest.after)
            .bind(rest.attempts)
            .bind(rest.state)
            .bind(rest.errors);
        park.execute(&mut *connection).await.map_err(failed)?;
        self.right_keys(connection, mailbox, &keys).await
    }

    /// Waits until nobody else is parking or unparking these keys and messages, in one order everywhere. Until the end
    /// of the transaction nobody will, so the server ends that transaction if it is idle for half a
    /// minute, unless the connection says otherwise.
    pub(crate) async fn take_turns(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        keys: &BTreeSet<KeyOf>,
        messages: &[Uuid],
    ) -> Result<()> {
        let of_keys = keys.iter().map(|key| key_turn(mailbox, key));
        let of_messages = messages.iter().map(|id| turn(mailbox, &[id.as_bytes()]));
        let locks: BTreeSet<i32> = of_keys.chain(of_messages).collect();
        if locks.is_empty() {
            return Ok(());
        }
        let locks: Vec<i32> = locks.into_iter().collect();
        let lock = sqlx::query_scalar(self.sql().lock.clone())
            .bind(locks)
            .fetch_one(connection);
        let isolation: String = lock.await.map_err(doing("waiting for others who park the same keys"))?;
        if isolation != "read committed" {
            // Whoever had the turn before has changed what an older snapshot does not show.
            let text = "messages are parked in a transaction of isolation `read committed` only";
            return Err(Error::new(ErrorKind::WrongTransaction, text).with("isolation", isolation));
        }
        Ok(())
    }

    /// As [`take_turns`](Self::take_turns), on a connection of a relay, but waits for nobody: gives the keys whose turn
    /// it is.
    pub(crate) async fn try_turns(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        mut keys: BTreeSet<KeyOf>,
    ) -> Result<BTreeSet<KeyOf>> {
        let locks: BTreeSet<i32> = keys.iter().map(|key| key_turn(mailbox, key)).collect();
        let locks: Vec<i32> = locks.into_iter().collect();
        let tried = sqlx::query_scalar(self.sql().try_lock.clone())
            .bind(locks)
            .fetch_all(connection);
        let had: Vec<i32> = tried.await.map_err(doing("looking who else parks the same keys"))?;
        keys.retain(|key| had.contains(&key_turn(mailbox, key)));
        Ok(keys)
    }

    /// Parks events behind others of their keys, whose turns have been taken. Gives the keys that were not among
    /// `expected` (hashes collide), with their turns taken too.
    pub(crate) async fn park_behind(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        lanes: &[i16],
        ids: &[i64],
        expected: &BTreeSet<KeyOf>,
    ) -> Result<BTreeSet<KeyOf>> {
        let park = sqlx::query_as(self.sql().park_behind.clone())
            .bind(mailbox)
            .bind(lanes)
            .bind(ids);
        let parked: Vec<KeyOf> = park
            .fetch_all(&mut *connection)
            .await
            .map_err(doing("parking events behind others of their key"))?;
        let others: BTreeSet<KeyOf> = parked.into_iter().filter(|key| !expected.contains(key)).collect();
        self.take_turns(connection, mailbox, &others, &[]).await?;
        Ok(others)
    }

    /// Which of the keys have something parked that keeps their place.
    pub(crate) async fn still_parked(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        keys: &BTreeSet<KeyOf>,
    ) -> Result<BTreeSet<KeyOf>> {
        let lanes: Vec<i16> = keys.iter().map(|key| key.0).collect();
        let topics: Vec<&str> = keys.iter().map(|key| key.1.as_str()).collect();
        let texts: Vec<&str> = keys.iter().map(|key| key.2.as_str()).collect();
        let still = sqlx::query_as(self.sql().still_parked.clone())
            .bind(mailbox)
            .bind(lanes)
            .bind(topics);
        let still: Vec<KeyOf> = still
            .bind(texts)
            .fetch_all(connection)
            .await
            .map_err(doing("looking for what is parked"))?;
        Ok(still.into_iter().collect())
    }

    /// Sees to it that of what is parked of a key the first, and only the first, is a head. Whatever parks or unparks a
    /// row of a key calls it, behind [`take_turns`](Self::take_turns) and in a later statement.
    pub(crate) async fn right_keys(
        &self,
        connection: &mut PgConnection,
        mailbox: i16,
        keys: &BTreeSet<KeyOf>,
    ) -> Result<()> {
        if keys.is_empty() {
            return Ok(());
        }
        let failed = doing("letting keys go on");
        for statement in [&self.sql().demote, &self.sql().promote] {
            let lanes: Vec<i16> = keys.iter().map(|key| key.0).collect();
            let topics: Vec<&str> = keys.iter().map(|key| key.1.as_str()).collect();
            let texts: Vec<&str> = keys.iter().map(|key| key.2.as_str()).collect();
            let right = sqlx::query(statement.clone()).bind(mailbox).bind(lanes).bind(topics);
            right.bind(texts).execute(&mut *connection).await.map_err(&failed)?;
        }
        Ok(())
    }
}

fn key_turn(mailbox: i16, (_, topic, key): &KeyOf) -> i32 {
    turn(mailbox, &[topic.as_bytes(), b"/", key.as_bytes()])
}

/// The number of a lock: the same in every version, and few, since the server's table of locks is small. Two that are
/// equal only wait for each other.
fn turn(mailbox: i16, parts: &[&[u8]]) -> i32 {
    let mut digest = Md5::new_with_prefix(mailbox.to_be_bytes());
    parts.iter().for_each(|part| digest.update(part));
    let digest = digest.finalize();
    i32::from(u16::from_be_bytes([digest[0], digest[1]]) % 1024)
}

#[derive(Default)]
struct ParkedColumns {
    after: Vec<f64>,
    attempts: Vec<i32>,
    state: Vec<i16>,
    errors: Vec<String>,
}

impl ParkedColumns {
    fn push(
        &mut self,
        state: i16,
        after: Duration,
        attempts: u32,
        errors: &[postrider_core::log::AttemptError],
    ) -> Result<()> {
        self.state.push(state);
        self.after.push(secs(after));
        self.attempts.push(i32::try_from(attempts).unwrap_or(i32::MAX));
        self.errors.push(errors_to_text(errors)?);
        Ok(())
    }
}
