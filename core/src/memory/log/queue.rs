//! The rows of one mailbox, and every move they make.

use super::locked;
use crate::{
    Message, MessageId, Topic,
    clock::{Moment, Timestamp, later},
    log::{AttemptError, GroupMember, NewRecord, Note, Owner, Placement, Purge},
};
use std::{
    collections::{BTreeMap, BTreeSet, HashMap, HashSet, VecDeque},
    sync::{
        Mutex, MutexGuard,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;
use uuid::Uuid;

#[derive(Debug, Default)]
pub(super) struct Queue {
    rows: Mutex<Rows>,
    news: Notify,
    /// Counts the news, so that a session that was busy does not miss any.
    news_count: AtomicU64,
}

impl Queue {
    pub(super) fn tell(&self) {
        self.news_count.fetch_add(1, Ordering::AcqRel);
        self.news.notify_waiters();
    }

    pub(super) fn news_count(&self) -> u64 {
        self.news_count.load(Ordering::Acquire)
    }

    /// Waits until there are more news than `seen`.
    pub(super) async fn news_after(&self, seen: u64) {
        let mut news = std::pin::pin!(self.news.notified());
        news.as_mut().enable();
        if self.news_count() == seen {
            news.await;
        }
    }

    pub(super) fn rows(&self) -> MutexGuard<'_, Rows> {
        locked(&self.rows)
    }
}

#[derive(Debug)]
pub(super) struct Row {
    pub(super) message: Message,
    pub(super) created_at: Timestamp,
    pub(super) errors: Vec<AttemptError>,
}

/// A row that is out of the hot table.
#[derive(Debug)]
pub(super) struct Parked {
    pub(super) row: Row,
    pub(super) state: ParkedState,
    pub(super) attempts: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ParkedState {
    /// The head of its key, due then.
    Due(Timestamp),
    /// Behind another of its key.
    Behind,
    /// The head of its key, until its topic is resumed.
    ForTopic,
    /// A dead letter since then.
    Failed { at: Timestamp, holds_key: bool },
}

impl ParkedState {
    fn keeps_place(self) -> bool {
        !matches!(self, Self::Failed { holds_key: false, .. })
    }
}

#[derive(Debug)]
pub(super) struct Done {
    pub(super) row: Row,
    pub(super) attempts: u32,
    pub(super) at: Timestamp,
}

/// The rows by position. Positions ascend and most rows go in order, so this is a deque with gaps.
#[derive(Debug, Default)]
pub(super) struct Hot {
    /// The position of the first slot.
    first: u64,
    slots: VecDeque<Option<Row>>,
    len: usize,
}

impl Hot {
    fn index(&self, position: u64) -> Option<usize> {
        usize::try_from(position.checked_sub(self.first)?).ok()
    }

    /// Puts a row at the end.
    fn push(&mut self, position: u64, row: Row) {
        if self.slots.is_empty() {
            self.first = position;
        }
        while self.index(position).is_some_and(|index| index > self.slots.len()) {
            self.slots.push_back(None);
        }
        self.slots.push_back(Some(row));
        self.len += 1;
    }

    fn remove(&mut self, position: u64) -> Option<Row> {
        let index = self.index(position)?;
        let row = self.slots.get_mut(index)?.take()?;
        self.len -= 1;
        while let Some(None) = self.slots.front() {
            self.slots.pop_front();
            self.first += 1;
        }
        Some(row)
    }

    pub(super) fn get(&self, position: u64) -> Option<&Row> {
        self.slots.get(self.index(position)?)?.as_ref()
    }

    /// The first row behind `position`.
    pub(super) fn next_after(&self, position: u64) -> Option<(u64, &Row)> {
        let from = (position + 1).max(self.first);
        let index = self.index(from)?;
        (index..self.slots.len()).find_map(|i| Some((self.first + i as u64, self.slots[i].as_ref()?)))
    }

    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn iter(&self) -> impl Iterator<Item = (u64, &Row)> {
        (self.first..)
            .zip(&self.slots)
            .filter_map(|(position, row)| Some((position, row.as_ref()?)))
    }
}

type Key = (Topic, String);

#[derive(Debug, Default)]
pub(super) struct Rows {
    last_position: u64,
    pub(super) hot: Hot,
    pub(super) parked: BTreeMap<u64, Parked>,
    /// The parked rows of a key that keep its place, in order: the first is the head.
    by_key: HashMap<Key, BTreeSet<u64>>,
    /// The heads that wait for a time.
    due: BTreeSet<(Timestamp, u64)>,
    /// The ids of parked and failed rows, which are unique.
    parked_ids: HashSet<MessageId>,
    pub(super) scheduled: BTreeMap<(Timestamp, u64), Row>,
    pub(super) done: BTreeMap<u64, Done>,
    /// The messages handled, and when; `None` while the transaction is open.
    pub(super) receipts: HashMap<MessageId, Option<Timestamp>>,
    /// The notes, and when each was written last.
    pub(super) notes: HashMap<MessageId, (Note, Timestamp)>,
    /// The notes that an open transaction has written.
    pub(super) locked_notes: HashSet<MessageId>,
    /// The members of the group, each with the times it was seen first and last.
    pub(super) members: BTreeMap<Uuid, (GroupMember, Timestamp, Timestamp)>,
    pub(super) lease: Option<Holder>,
    pub(super) epoch: u64,
}

#[derive(Debug, Clone, Copy)]
pub(super) struct Holder {
    pub(super) owner: Owner,
    pub(super) until: Moment,
}

fn key_of(message: &Message) -> Option<Key> {
    let key = message.key()?;
    Some((message.topic().clone(), key.to_owned()))
}

impl Rows {
    fn next_position(&mut self) -> u64 {
        self.last_position += 1;
        self.last_position
    }

    pub(super) fn append(&mut self, batch: &[NewRecord], now: Timestamp) {
        for record in batch {
            let position = self.next_position();
            let mut row = Row {
                message: record.message.clone(),
                created_at: now,
                errors: Vec::new(),
            };
            let (state, attempts, errors) = match &record.placement {
                Placement::Due => {
                    self.hot.push(position, row);
                    continue;
                }
                Placement::Scheduled { after } => {
                    self.scheduled.insert((later(now, *after), position), row);
                    continue;
                }
                Placement::Parked {
                    after,
                    attempts,
                    errors,
                } => (ParkedState::Due(later(now, *after)), *attempts, errors),
                Placement::Failed {
                    attempts,
                    errors,
                    hold_key,
                } => {
                    let state = ParkedState::Failed {
                        at: now,
                        holds_key: *hold_key,
                    };
                    (state, *attempts, errors)
                }
            };
            if !self.parked_ids.contains(&row.message.id()) {
                AttemptError::keep(&mut row.errors, errors);
                self.park(position, Parked { row, state, attempts }, now);
            }
        }
    }

    /// Moves the scheduled rows whose time has come to the end of the hot table.
    pub(super) fn enter_scheduled(&mut self, now: Timestamp) {
        while let Some(first) = self.scheduled.first_entry() {
            if first.key().0 > now {
                break;
            }
            let row = first.remove();
            let position = self.next_position();
            self.hot.push(position, row);
        }
    }

    /// Whether something parked of this message's key keeps its place.
    pub(super) fn is_parked_key(&self, message: &Message) -> bool {
        !self.by_key.is_empty() && key_of(message).is_some_and(|key| self.by_key.contains_key(&key))
    }

    /// Whether this message waits, or is a dead letter.
    pub(super) fn is_parked_id(&self, id: MessageId) -> bool {
        self.parked_ids.contains(&id)
    }

    /// Whether something parked keeps the place of this key.
    pub(super) fn holds_back(&self, topic: &Topic, key: Option<&str>) -> bool {
        !self.by_key.is_empty() && key.is_some_and(|key| self.by_key.contains_key(&(topic.clone(), key.to_owned())))
    }

    /// Puts a row among the parked ones, and sees to it that of its key the first and only the first is a head.
    pub(super) fn park(&mut self, position: u64, parked: Parked, now: Timestamp) {
        self.parked_ids.insert(parked.row.message.id());
        if let ParkedState::Due(at) = parked.state {
            self.due.insert((at, position));
        }
        let key = if parked.state.keeps_place() {
            key_of(&parked.row.message)
        } else {
            None
        };
        self.parked.insert(position, parked);
        let Some(key) = key else { return };
        let of_key = self.by_key.entry(key).or_default();
        of_key.insert(position);
        let mut firsts = of_key.iter().copied().take(2);
        let (first, second) = (firsts.next(), firsts.next());
        // Only one was inserted, so one of the first two rows may be wrong: a head that has got one before it, or
        // this row, parked as a head behind another.
        if let Some(first) = first
            && self.parked.get(&first).is_some_and(|p| p.state == ParkedState::Behind)
        {
            self.set_state(first, ParkedState::Due(now));
        }
        for behind in [second, Some(position)].into_iter().flatten() {
            let is_head = Some(behind) == first;
            let holds = self
                .parked
                .get(&behind)
                .is_some_and(|p| matches!(p.state, ParkedState::Failed { .. }));
            if !is_head && !holds {
                self.set_state(behind, ParkedState::Behind);
            }
        }
    }

    /// Whether anything is parked that is not a dead letter without a place.
    pub(super) fn has_parked(&self) -> bool {
        !self.by_key.is_empty() || !self.due.is_empty()
    }

    /// Whether nothing of its key is before it.
    pub(super) fn is_head(&self, position: u64) -> bool {
        let key = self.parked.get(&position).and_then(|p| key_of(&p.row.message));
        let of_key = key.and_then(|key| self.by_key.get(&key));
        of_key.is_none_or(|of_key| of_key.first() == Some(&position))
    }

    pub(super) fn set_state(&mut self, position: u64, state: ParkedState) {
        let Some(parked) = self.parked.get_mut(&position) else {
            return;
        };
        if let ParkedState::Due(at) = std::mem::replace(&mut parked.state, state) {
            self.due.remove(&(at, position));
        }
        if let ParkedState::Due(at) = state {
            self.due.insert((at, position));
        }
    }

    /// Takes a row out of the parked ones. If it was the head of its key, the next becomes due.
    pub(super) fn unpark(&mut self, position: u64, now: Timestamp) -> Option<Parked> {
        let parked = self.parked.remove(&position)?;
        self.parked_ids.remove(&parked.row.message.id());
        if let ParkedState::Due(at) = parked.state {
            self.due.remove(&(at, position));
        }
        if parked.state.keeps_place()
            && let Some(key) = key_of(&parked.row.message)
            && let Some(of_key) = self.by_key.get_mut(&key)
        {
            of_key.remove(&position);
            match of_key.first().copied() {
                None => {
                    self.by_key.remove(&key);
                }
                Some(next) if self.parked.get(&next).is_some_and(|p| p.state == ParkedState::Behind) => {
                    self.set_state(next, ParkedState::Due(now));
                }
                Some(_) => {}
            }
        }
        Some(parked)
    }

    /// Takes a row out of wherever it is claimed from: the hot table or the parked ones.
    pub(super) fn remove(&mut self, position: u64, now: Timestamp) -> Option<(Row, u32)> {
        match self.hot.remove(position) {
            Some(row) => Some((row, 0)),
            None => {
                let parked = self.unpark(position, now)?;
                Some((parked.row, parked.attempts))
            }
        }
    }

    /// Moves rows of the hot table behind the head of their key.
    pub(super) fn park_behind(&mut self, position: u64, now: Timestamp) {
        if let Some(row) = self.hot.remove(position) {
            let parked = Parked {
                row,
                state: ParkedState::Behind,
                attempts: 0,
            };
            self.park(position, parked, now);
        }
    }

    /// The heads that are due, earliest first.
    pub(super) fn due_heads(&self, now: Timestamp) -> impl Iterator<Item = u64> {
        self.due
            .iter()
            .take_while(move |(at, _)| *at <= now)
            .map(|(_, position)| *position)
    }

    /// A head with the rows behind it.
    pub(super) fn run_of(&self, head: u64) -> Vec<u64> {
        let key = self.parked.get(&head).and_then(|p| key_of(&p.row.message));
        match key.and_then(|key| self.by_key.get(&key)) {
            Some(of_key) => of_key
                .iter()
                .copied()
                .take_while(|p| *p == head || self.parked.get(p).is_some_and(|p| p.state == ParkedState::Behind))
                .collect(),
            None => vec![head],
        }
    }

    /// How long until something becomes due that is not among the `held`.
    pub(super) fn next_due(&self, now: Timestamp, held: impl Fn(u64) -> bool) -> Option<Duration> {
        let head = self
            .due
            .iter()
            .find(|(_, position)| !held(*position))
            .map(|(at, _)| *at);
        let scheduled = self.scheduled.keys().next().map(|(at, _)| *at);
        let at = head.into_iter().chain(scheduled).min()?;
        Some((at - now).to_std().unwrap_or_default())
    }

    /// The topics that rows wait for.
    pub(super) fn waiting_topics(&self) -> Vec<Topic> {
        let waiting = self.parked.values().filter(|p| p.state == ParkedState::ForTopic);
        let topics: BTreeSet<&Topic> = waiting.map(|p| p.row.message.topic()).collect();
        topics.into_iter().cloned().collect()
    }

    pub(super) fn resume(&mut self, topic: &Topic, max: usize, now: Timestamp) -> u64 {
        let waits = |p: &Parked| p.state == ParkedState::ForTopic && p.row.message.topic() == topic;
        let found: Vec<u64> = self
            .parked
            .iter()
            .filter(|(_, p)| waits(p))
            .map(|(p, _)| *p)
            .take(max)
            .collect();
        for position in &found {
            self.set_state(*position, ParkedState::Due(now));
        }
        found.len() as u64
    }

    /// A dead letter waits again: in its place, if it kept that, and else at the end, in the queue or among the parked.
    pub(super) fn redrive(&mut self, position: u64, to_queue: bool, now: Timestamp) {
        match self.parked.get_mut(&position) {
            Some(parked) if parked.state.keeps_place() => {
                parked.attempts = 0;
                self.set_state(position, ParkedState::Due(now));
            }
            Some(_) => {
                if let Some(mut parked) = self.unpark(position, now) {
                    let at_the_end = self.next_position();
                    if to_queue {
                        self.hot.push(at_the_end, parked.row);
                    } else {
                        parked.attempts = 0;
                        parked.state = ParkedState::Due(now);
                        self.park(at_the_end, parked, now);
                    }
                }
            }
            None => {}
        }
    }

    pub(super) fn purge(&mut self, request: &Purge, now: Timestamp) -> u64 {
        let before = |age: Duration| {
            chrono::TimeDelta::from_std(age)
                .ok()
                .and_then(|age| now.checked_sub_signed(age))
        };
        let max = usize::try_from(request.max).unwrap_or(usize::MAX);
        let mut removed = 0;
        if let Some(before) = request.succeeded_after.and_then(before) {
            let old: Vec<u64> = self
                .done
                .iter()
                .filter(|(_, d)| d.at <= before)
                .map(|(p, _)| *p)
                .take(max)
                .collect();
            removed += old.len();
            for position in old {
                self.done.remove(&position);
            }
        }
        if let Some(before) = request.failed_after.and_then(before) {
            let is_old = |p: &Parked| matches!(p.state, ParkedState::Failed { at, .. } if at <= before);
            let old = self.parked.iter().filter(|(_, p)| is_old(p)).map(|(p, _)| *p);
            let old: Vec<u64> = old.take(max - removed).collect();
            removed += old.len();
            for position in old {
                self.unpark(position, now);
            }
        }
        if let Some(before) = request.receipts_after.and_then(before) {
            let is_old = |at: &Option<Timestamp>| at.is_some_and(|at| at <= before);
            let old = self.receipts.iter().filter(|(_, at)| is_old(at)).map(|(id, _)| *id);
            let old: Vec<MessageId> = old.take(max - removed).collect();
            removed += old.len();
            for id in old {
                self.receipts.remove(&id);
            }
            let old = self
                .notes
                .iter()
                // Not of what waits: it is to go on from there.
                .filter(|(id, (_, at))| *at <= before && !self.parked_ids.contains(id))
                .map(|(id, _)| *id);
            let old: Vec<MessageId> = old.take(max - removed).collect();
            removed += old.len();
            for id in old {
                self.notes.remove(&id);
            }
        }
        removed as u64
    }
}
