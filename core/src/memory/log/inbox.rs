//! Receipts and notes in memory.

use super::{MemoryConnection, MemoryLog, queue::Queue};
use crate::{
    GroupName, Mailbox, MessageId, Result,
    clock::Timestamp,
    log::{Admission, Arrival, GroupMember, InboxLog, Lent, Note, RegisteredMember},
};
use async_trait::async_trait;
use std::{sync::Arc, time::Duration};

/// The receipts and notes of a transaction, until it commits. Dropped, they were never there.
#[derive(Debug, Default)]
pub(super) struct Reserved {
    receipts: Vec<(Arc<Queue>, MessageId)>,
    notes: Vec<(Arc<Queue>, MessageId, Note)>,
}

/// How far a transaction has come, for a savepoint.
#[derive(Debug, Clone, Copy)]
pub(super) struct Mark {
    receipts: usize,
    notes: usize,
}

impl Reserved {
    pub(super) fn commit(&mut self, now: Timestamp) {
        for (queue, id) in self.receipts.drain(..) {
            queue.rows().receipts.insert(id, Some(now));
            queue.tell();
        }
        for (queue, id, note) in self.notes.drain(..) {
            queue.rows().notes.insert(id, (note, now));
            queue.rows().locked_notes.remove(&id);
            queue.tell();
        }
    }

    pub(super) fn mark(&self) -> Mark {
        Mark {
            receipts: self.receipts.len(),
            notes: self.notes.len(),
        }
    }

    pub(super) fn return_to(&mut self, mark: Mark) {
        for (queue, id) in self.receipts.drain(mark.receipts..) {
            queue.rows().receipts.remove(&id);
            queue.tell();
        }
        for (queue, id, _) in self.notes.split_off(mark.notes) {
            if !self.writes(&queue, id) {
                queue.rows().locked_notes.remove(&id);
                queue.tell();
            }
        }
    }

    fn holds(&self, id: MessageId) -> bool {
        self.receipts.iter().any(|(_, reserved)| *reserved == id)
    }

    fn writes(&self, queue: &Arc<Queue>, id: MessageId) -> bool {
        self.written(queue, id).is_some()
    }

    /// What this transaction has written.
    fn written(&self, queue: &Arc<Queue>, id: MessageId) -> Option<&Note> {
        let mine = |(of, other, _): &&(Arc<Queue>, MessageId, Note)| Arc::ptr_eq(of, queue) && *other == id;
        self.notes.iter().rev().find(mine).map(|(_, _, note)| note)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        self.return_to(Mark { receipts: 0, notes: 0 });
    }
}

impl MemoryLog {
    fn inbox(&self, group: &GroupName) -> Arc<Queue> {
        self.queue(&Mailbox::Inbox(group.clone()))
    }
}

fn admit(queue: &Arc<Queue>, reserved: &mut Reserved, arrival: &Arrival) -> Option<Admission> {
    let mut rows = queue.rows();
    match rows.receipts.get(&arrival.id()) {
        Some(Some(_)) => return Some(Admission::Duplicate),
        Some(None) if reserved.holds(arrival.id()) => return Some(Admission::Duplicate),
        // Another transaction has it: what becomes of that decides.
        Some(None) => return None,
        None => {}
    }
    if !arrival.was_parked {
        if rows.is_parked_id(arrival.id()) {
            return Some(Admission::Parked);
        }
        if rows.holds_back(arrival.topic(), arrival.key()) {
            return Some(Admission::HeldBack);
        }
    }
    rows.receipts.insert(arrival.id(), None);
    reserved.receipts.push((queue.clone(), arrival.id()));
    Some(Admission::New)
}

#[async_trait]
impl InboxLog for MemoryLog {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let connection: &mut MemoryConnection = tx.get_mut()?;
        let queue = self.inbox(group);
        let mut answers = vec![Admission::New; arrivals.len()];
        // In the order of their ids, so that two transactions do not wait for each other.
        let mut order: Vec<usize> = (0..arrivals.len()).collect();
        order.sort_by_key(|n| arrivals[*n].id());
        for n in order {
            answers[n] = loop {
                let seen = queue.news_count();
                if let Some(answer) = admit(&queue, &mut connection.reserved, &arrivals[n]) {
                    break answer;
                }
                queue.news_after(seen).await;
            };
        }
        Ok(answers)
    }

    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let queue = self.inbox(group);
        let rows = queue.rows();
        let of = |arrival: &Arrival| match rows.receipts.get(&arrival.id()) {
            Some(Some(_)) => Admission::Duplicate,
            _ if arrival.was_parked => Admission::New,
            _ if rows.is_parked_id(arrival.id()) => Admission::Parked,
            _ if rows.holds_back(arrival.topic(), arrival.key()) => Admission::HeldBack,
            _ => Admission::New,
        };
        Ok(arrivals.iter().map(of).collect())
    }

    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        let queue = self.inbox(group);
        if let Some(tx) = tx {
            let connection: &mut MemoryConnection = tx.get_mut()?;
            if let Some(note) = connection.reserved.written(&queue, id) {
                return Ok(Some(note.clone()));
            }
        }
        let note = queue.rows().notes.get(&id).map(|(note, _)| note.clone());
        Ok(note)
    }

    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        let queue = self.inbox(group);
        let mut of_its_own = Reserved::default();
        let is_alone = tx.is_none();
        let reserved = match tx {
            Some(tx) => &mut tx.get_mut::<MemoryConnection>()?.reserved,
            None => &mut of_its_own,
        };
        if !reserved.writes(&queue, id) {
            loop {
                let seen = queue.news_count();
                if queue.rows().locked_notes.insert(id) {
                    break;
                }
                queue.news_after(seen).await;
            }
        }
        let committed = queue.rows().notes.get(&id).map(|(note, _)| note.version);
        let version = reserved.written(&queue, id).map(|note| note.version).or(committed);
        if version.unwrap_or(0) != expected {
            if !reserved.writes(&queue, id) {
                queue.rows().locked_notes.remove(&id);
                queue.tell();
            }
            return Ok(false);
        }
        let note = Note {
            version: expected + 1,
            text: text.to_owned(),
        };
        reserved.notes.push((queue, id, note));
        if is_alone {
            of_its_own.commit(self.now());
        }
        Ok(true)
    }

    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        let (queue, now) = (self.inbox(group), self.now());
        let mut rows = queue.rows();
        rows.members.retain(|_, (_, _, seen)| age(now, *seen) <= retention);
        let owner = *member.owner.as_uuid();
        let first = rows.members.get(&owner).map_or(now, |(_, first, _)| *first);
        rows.members.insert(owner, (member.clone(), first, now));
        Ok(())
    }

    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        let (queue, now) = (self.inbox(group), self.now());
        let rows = queue.rows();
        let mut members: Vec<_> = rows.members.values().collect();
        members.sort_by_key(|(member, first, _)| (*first, *member.owner.as_uuid()));
        let members = members
            .into_iter()
            .map(|(member, first, seen)| RegisteredMember::new(member.clone(), age(now, *first), age(now, *seen)));
        Ok(members.filter(|member| member.unseen_for <= retention).collect())
    }
}

/// How long ago something was; zero if the clock has gone back since.
fn age(now: Timestamp, then: Timestamp) -> Duration {
    (now - then).to_std().unwrap_or_default()
}
