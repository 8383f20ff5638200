//! Taking what is due.

use super::{
    Out, Shared, id,
    lease::{Acquired, acquire},
    position, tag,
};
use crate::{
    error::doing,
    row::{Reader, ids, unpack},
};
use futures_util::TryStreamExt as _;
use postrider_core::{
    Message, Result, Topic,
    log::{Claim, Claimed, Lease, Record},
};
use sqlx::{Row as _, SqliteConnection, sqlite::SqliteRow};
use std::{collections::BTreeSet, sync::Arc, time::Duration};

/// How many rows a claim reads for each one it may give: what it passes over is bounded.
const READ_PER_GIVEN: usize = 8;
/// The column of the payload, behind the id.
const PAYLOAD: usize = 9;

pub(super) async fn claim(shared: &Arc<Shared>, connection: &mut SqliteConnection, request: &Claim) -> Result<Claimed> {
    let acquired = acquire(shared, connection).await?;
    if let Acquired::NotYet(left) = acquired {
        let mut claimed = Claimed::empty(Lease::none(shared.log.clock().clone()));
        claimed.next_due = Some(left);
        return Ok(claimed);
    }
    let (lease, epoch) = {
        let mut held = shared.held();
        held.holdings.begin_claim();
        (held.lease.clone(), held.epoch)
    };
    let mut claimed = Claimed::empty(lease);
    // Told with the first claim of a tenure that succeeds.
    let tells_waiting = !shared.held().waiting_told;
    if tells_waiting {
        claimed.waiting = waiting_topics(shared, connection).await?;
    }
    let mut claiming = Claiming {
        shared,
        connection,
        epoch,
        now: shared.now(),
        max: request.max,
        is_first: tells_waiting,
        has_buried: false,
        bytes: request.max_bytes,
        reader: Reader::default(),
        records: Vec::new(),
    };
    let result = claiming.run(request.max_parked).await;
    let records = claiming.records;
    match result {
        Ok(next_due) => {
            shared.held().waiting_told = true;
            claimed.records = records;
            claimed.next_due = next_due;
            Ok(claimed)
        }
        Err(error) => {
            // Nothing was taken: it is all there for the next claim.
            let mut held = shared.held();
            for record in records {
                let position = record.message.sequence().unwrap_or(0);
                let out = held.records.remove(&position);
                if out.is_some_and(|out| out.is_parked) {
                    held.holdings.let_go(position);
                } else {
                    held.holdings.give_back(position);
                }
            }
            Err(error)
        }
    }
}

async fn waiting_topics(shared: &Shared, connection: &mut SqliteConnection) -> Result<Vec<Topic>> {
    let topics = sqlx::query_scalar(shared.log.sql().waiting_topics.clone()).bind(shared.mailbox());
    let topics: Vec<String> = topics
        .fetch_all(connection)
        .await
        .map_err(doing("looking for waiting topics"))?;
    // One that is none cannot be resumed by name; its rows are dead letters as soon as they are read.
    Ok(topics
        .into_iter()
        .filter_map(|topic| Topic::parse(topic).ok())
        .collect())
}

pub(super) struct Claiming<'a> {
    pub(super) shared: &'a Shared,
    pub(super) connection: &'a mut SqliteConnection,
    pub(super) epoch: i64,
    pub(super) now: i64,
    max: usize,
    /// Whether it is the first of a tenure.
    is_first: bool,
    /// Whether rows that cannot be read have become dead letters: there may be more to give.
    pub(super) has_buried: bool,
    /// How many bytes of payload may still be given.
    bytes: usize,
    reader: Reader,
    records: Vec<Record>,
}

impl Claiming<'_> {
    /// Takes what is due, and says when more will be.
    async fn run(&mut self, max_parked: usize) -> Result<Option<Duration>> {
        let failed = doing("looking for what is due");
        let due = sqlx::query(self.shared.log.sql().next_due.clone()).bind(self.shared.mailbox());
        let due = due.fetch_one(&mut *self.connection).await.map_err(failed)?;
        let mut next_scheduled: Option<i64> = due.get(0);
        let next_head: Option<i64> = due.get(1);
        let has_parked_keys: bool = due.get(2);
        self.look_for_strays(&due).await?;
        if next_scheduled.is_some_and(|at| at <= self.now) {
            next_scheduled = self.enter_scheduled().await?;
        }
        let next_parked = match next_head {
            Some(at) if at <= self.now => self.parked(max_parked).await?,
            later => later,
        };
        self.freed().await?;
        let read_all = self.fresh(has_parked_keys).await?;
        if !read_all || self.has_buried {
            return Ok(Some(Duration::ZERO));
        }
        let next = next_scheduled.into_iter().chain(next_parked).min();
        Ok(next.map(|at| Duration::from_micros(u64::try_from(at.saturating_sub(self.now)).unwrap_or(0))))
    }

    /// Positions are never used again, and everything below the cursor is out, passed over or gone. If somebody has set the
    /// sequence back, what came since is put behind everything.
    async fn look_for_strays(&mut self, found: &SqliteRow) -> Result<()> {
        let (first, sequence, in_use): (Option<i64>, Option<i64>, i64) = (found.get(3), found.get(4), found.get(5));
        let (cursor, is_known) = {
            let held = self.shared.held();
            let known = |at: u64| {
                held.holdings.is_held(at) || held.holdings.known_above(at.saturating_sub(1)).any(|known| known == at)
            };
            (
                held.cursor,
                first.is_none_or(|at| at > held.cursor || known(position(at))),
            )
        };
        let in_use = in_use.max(cursor);
        let mut is_set_back = !is_known || sequence.unwrap_or(0) < in_use;
        if !is_set_back && self.is_first {
            let twice = sqlx::query_scalar(self.shared.log.sql().has_ids_twice.clone());
            let twice = twice.fetch_one(&mut *self.connection).await;
            is_set_back = twice.map_err(doing("looking for ids used twice"))?;
        }
        if !is_set_back {
            return Ok(());
        }
        tracing::warn!(
            mailbox = %self.shared.name,
            "the sequence of the event log's ids was set back: what came since gets ids behind those in use"
        );
        let Some(mut tx) = self.shared.fenced(self.connection, self.epoch).await? else {
            return Ok(());
        };
        let known = ids(self.shared.held().holdings.known_above(0).map(id));
        let behind = self.shared.log.raise_sequence(&mut tx, in_use).await?;
        let failed = doing("giving events other ids");
        let renumber = sqlx::query(self.shared.log.sql().renumber.clone())
            .bind(self.shared.mailbox())
            .bind(known)
            .bind(behind);
        renumber.execute(&mut *tx).await.map_err(&failed)?;
        self.shared.log.raise_sequence(&mut tx, in_use).await?;
        tx.commit().await.map_err(failed)
    }

    fn room(&self) -> usize {
        if self.bytes == 0 {
            0
        } else {
            self.max - self.records.len()
        }
    }

    /// Moves scheduled rows whose time has come to the end of the hot table; gives when the next one's will.
    async fn enter_scheduled(&mut self) -> Result<Option<i64>> {
        let failed = doing("moving delayed events");
        let (sql, mailbox) = (self.shared.log.sql(), self.shared.mailbox());
        let at_most = i64::try_from(self.max.max(100)).unwrap_or(i64::MAX);
        let Some(mut tx) = self.shared.fenced(self.connection, self.epoch).await? else {
            return Ok(None);
        };
        for statement in [&sql.enter_scheduled, &sql.leave_scheduled] {
            let moving = sqlx::query(statement.clone())
                .bind(mailbox)
                .bind(self.now)
                .bind(at_most);
            moving.execute(&mut *tx).await.map_err(&failed)?;
        }
        let next = sqlx::query(sql.next_due.clone())
            .bind(mailbox)
            .fetch_one(&mut *tx)
            .await
            .map_err(&failed)?;
        tx.commit().await.map_err(failed)?;
        Ok(next.get(0))
    }

    /// Due heads, each with its followers. Gives when the next head is due.
    async fn parked(&mut self, max_runs: usize) -> Result<Option<i64>> {
        let failed = doing("looking for parked events");
        let out = self.shared.held().records.values().filter(|out| out.is_parked).count();
        let at_most = i64::try_from(max_runs.saturating_add(out).saturating_add(1)).unwrap_or(i64::MAX);
        let heads = sqlx::query(self.shared.log.sql().due_heads.clone())
            .bind(self.shared.mailbox())
            .bind(at_most);
        let heads = heads.fetch_all(&mut *self.connection).await.map_err(failed)?;
        let mut runs = 0;
        for head in heads {
            let (head, due_at): (i64, i64) = (head.get(0), head.get(1));
            if self.shared.held().holdings.is_held(position(head)) {
                continue;
            }
            if due_at > self.now || runs == max_runs || self.room() == 0 {
                return Ok(Some(due_at));
            }
            runs += 1;
            self.run_behind(head).await?;
        }
        Ok(None)
    }

    async fn run_behind(&mut self, head: i64) -> Result<()> {
        let failed = doing("reading parked events");
        let sql = self.shared.log.sql();
        let first = sqlx::query(sql.parked_by_id.clone()).bind(head);
        let Some(first) = first.fetch_optional(&mut *self.connection).await.map_err(&failed)? else {
            return Ok(());
        };
        let message = match self.reader.message(&first, 1) {
            Ok(message) => message,
            Err(error) => return self.bury_parked(&first, &error).await,
        };
        let Some(key) = message.key_hash() else {
            return self.give_parked(&first);
        };
        if self.shared.held().holdings.is_busy(key) {
            return Ok(());
        }
        let run = sqlx::query(sql.run_of_key.clone())
            .bind(self.shared.mailbox())
            .bind(message.topic().as_str())
            .bind(message.key())
            .bind(head)
            .bind(i64::try_from(self.room()).unwrap_or(i64::MAX));
        let mut rows = run.fetch(&mut *self.connection);
        let (mut fitting, mut bytes) = (Vec::new(), self.bytes);
        while bytes > 0 {
            let Some(row) = rows.try_next().await.map_err(&failed)? else {
                break;
            };
            let is_behind = row.get::<i64, _>(11) == crate::append::state::BEHIND;
            if row.get::<i64, _>(0) != head && !is_behind {
                break;
            }
            bytes = bytes.saturating_sub(row.get::<&[u8], _>(PAYLOAD).len());
            fitting.push(row);
        }
        drop(rows);
        for row in &fitting {
            if let Err(error) = self.give_parked(row) {
                // What comes behind it may go once it is a dead letter.
                return self.bury_parked(row, &error).await;
            }
        }
        Ok(())
    }

    fn give_parked(&mut self, row: &SqliteRow) -> Result<()> {
        let message = self.reader.message(row, 1)?;
        let attempts = u32::try_from(row.get::<i64, _>(10)).unwrap_or(u32::MAX);
        let at = position(row.get(0));
        self.shared.held().holdings.take_run(at, message.key_hash());
        self.give(at, message, attempts, true);
        Ok(())
    }

    fn give(&mut self, at: u64, message: Message, attempts: u32, is_parked: bool) {
        let message = message.with_sequence(at);
        self.bytes = self.bytes.saturating_sub(message.payload().len());
        let out = Out {
            message: message.clone(),
            is_parked,
        };
        self.shared.held().records.insert(at, out);
        self.records.push(Record::new(tag(self.epoch, at), message, attempts));
    }

    /// What was passed over for keys that have become free.
    async fn freed(&mut self) -> Result<()> {
        let freed = self.shared.held().holdings.take_freed(self.room());
        if freed.is_empty() {
            return Ok(());
        }
        let events = sqlx::query(self.shared.log.sql().events_by_id.clone()).bind(ids(freed.iter().map(|p| id(*p))));
        let mut rows = events.fetch(&mut *self.connection);
        let mut messages = Vec::new();
        let (mut bytes, mut unreadable) = (self.bytes, Vec::new());
        let read = loop {
            // One always goes, however large.
            if bytes == 0 {
                break Ok(());
            }
            let row = match rows.try_next().await.map_err(doing("reading events")) {
                Ok(Some(row)) => row,
                Ok(None) => break Ok(()),
                Err(error) => break Err(error),
            };
            match self.reader.message(&row, 1) {
                Ok(message) => {
                    bytes = bytes.saturating_sub(message.payload().len());
                    messages.push((position(row.get(0)), message));
                }
                Err(error) => unreadable.push((row.get(0), error.to_chain())),
            }
        };
        drop(rows);
        let is_cut = bytes == 0 || read.is_err();
        let read_up_to = messages.last().map(|(position, _)| *position);
        for (position, message) in messages {
            self.give(position, message, 0, false);
        }
        {
            let mut held = self.shared.held();
            for position in freed {
                if held.records.contains_key(&position) {
                    continue;
                }
                if is_cut && read_up_to.is_none_or(|last| position > last) {
                    held.holdings.give_back(position);
                } else {
                    // It is gone.
                    held.holdings.let_go(position);
                }
            }
        }
        read?;
        self.bury_events(unreadable).await
    }

    /// What was not read yet. `false` if it stopped before the end for another reason than `max`.
    async fn fresh(&mut self, has_parked_keys: bool) -> Result<bool> {
        let sql = self.shared.log.sql();
        let statement = if has_parked_keys {
            &sql.fresh_and_parked
        } else {
            &sql.fresh
        };
        let mut may_read = self.max.saturating_mul(READ_PER_GIVEN);
        while self.room() > 0 {
            let cursor = self.shared.held().cursor;
            let wanted = self.room().min(may_read);
            if wanted == 0 {
                return Ok(false);
            }
            may_read -= wanted;
            let limit = i64::try_from(wanted).unwrap_or(i64::MAX);
            let up_to = self.up_to(cursor, limit).await?;
            let fresh = sqlx::query_as(statement.clone())
                .bind(self.shared.mailbox())
                .bind(cursor);
            let fresh = fresh.bind(limit).bind(up_to.unwrap_or(i64::MAX));
            let packed: sqlx::Result<Vec<(String, Vec<u8>)>> = fresh.fetch_all(&mut *self.connection).await;
            let read = match packed.map_err(doing("reading events")) {
                Ok(packed) => self.take_fresh(packed).await,
                Err(error) => Err(error),
            };
            let read = match read {
                Ok(read) => read,
                Err(error) => {
                    // One of them cannot be read, perhaps: the others are read again without it.
                    let unreadable = self.unreadable(cursor, up_to.unwrap_or(i64::MAX), limit).await?;
                    if unreadable.is_empty() {
                        return Err(error);
                    }
                    self.bury_events(unreadable).await?;
                    return Ok(false);
                }
            };
            if read == 0 || read < wanted && up_to.is_none() {
                return Ok(true);
            }
        }
        Ok(true)
    }

    /// The last row that may be read if the bytes are limited: the one with which the limit is reached.
    async fn up_to(&mut self, cursor: i64, limit: i64) -> Result<Option<i64>> {
        let Ok(bytes) = i64::try_from(self.bytes) else {
            return Ok(None);
        };
        let up_to = sqlx::query_scalar(self.shared.log.sql().up_to.clone()).bind(self.shared.mailbox());
        let up_to = up_to
            .bind(cursor)
            .bind(limit)
            .bind(bytes)
            .fetch_one(&mut *self.connection)
            .await;
        up_to.map_err(doing("reading the sizes of events"))
    }

    /// Takes what was read, but for what has to be parked behind another of its key. Gives how many were read.
    async fn take_fresh(&mut self, packed: Vec<(String, Vec<u8>)>) -> Result<usize> {
        let (mut taken, mut behind, mut last) = (Vec::new(), Vec::new(), None);
        let mut behind_of = BTreeSet::new();
        for (text, payloads) in packed {
            for (event, payload) in unpack(&text, payloads)? {
                last = last.max(Some(event.0));
                if event.1 == 1 {
                    behind_of.extend(event.topic_and_key());
                    behind.push(event.0);
                } else {
                    taken.push((event.0, self.reader.packed(&event, payload)?));
                }
            }
        }
        // SQLite groups in order today; nothing promises it.
        taken.sort_by_key(|(id, _)| *id);
        let read = taken.len() + behind.len();
        if !behind.is_empty() {
            let failed = doing("parking events behind others of their key");
            let Some(mut tx) = self.shared.fenced(self.connection, self.epoch).await? else {
                return Ok(0);
            };
            let sql = self.shared.log.sql();
            let behind = ids(behind);
            for statement in [&sql.park_behind, &sql.delete_ids] {
                sqlx::query(statement.clone())
                    .bind(&behind)
                    .execute(&mut *tx)
                    .await
                    .map_err(&failed)?;
            }
            // Whatever it was read behind may have gone since.
            for (topic, key) in behind_of {
                self.shared
                    .log
                    .right_key(&mut tx, self.shared.mailbox(), &topic, &key, self.now)
                    .await?;
            }
            tx.commit().await.map_err(failed)?;
        }
        for (row_id, message) in taken {
            let at = position(row_id);
            let is_taken = self.shared.held().holdings.take(at, message.key_hash());
            if is_taken {
                self.give(at, message, 0, false);
            }
        }
        if let Some(last) = last {
            self.shared.held().cursor = last;
        }
        Ok(read)
    }
}
