//! What a group has still to do.

use crate::{Message, MessageId, clock::Moment};
use rustc_hash::FxHashMap;
use std::{
    collections::{BTreeMap, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
};
use tokio::sync::Notify;

#[derive(Debug, Default)]
pub(super) struct Group {
    state: Mutex<GroupState>,
    pub(super) news: Notify,
}

impl Group {
    pub(super) fn state(&self) -> MutexGuard<'_, GroupState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// How many deliveries a publish call still waits for.
#[derive(Debug, Default)]
pub(super) struct Handled {
    left: AtomicUsize,
    none_left: Notify,
}

impl Handled {
    fn one_less(&self) {
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.none_left.notify_waiters();
        }
    }

    /// Waits until every group has settled its deliveries.
    pub(super) async fn all(&self) {
        let mut none_left = std::pin::pin!(self.none_left.notified());
        none_left.as_mut().enable();
        if self.left.load(Ordering::Acquire) > 0 {
            none_left.await;
        }
    }
}

#[derive(Debug, Clone)]
pub(super) struct Entry {
    pub(super) offset: u64,
    pub(super) message: Message,
    pub(super) delivery_count: u32,
    /// Made before it was retried.
    pub(super) attempts: u32,
}

#[derive(Debug, Default)]
pub(super) struct GroupState {
    /// By offset, ascending. What arrives goes to the end; what comes back, seldom, to its place.
    ready: VecDeque<Entry>,
    keys: FxHashMap<u64, Key>,
    delayed: BTreeMap<(Moment, u64), Entry>,
    out: FxHashMap<u64, Out>,
    last_tag: u64,
    pub(super) last_member: u64,
    pub(super) dead: Vec<Message>,
    /// Who waits for a message to be settled: one publish call, or several that repeat it.
    awaited: FxHashMap<MessageId, Vec<Arc<Handled>>>,
}

#[derive(Debug)]
struct Out {
    entry: Entry,
    member: u64,
    /// The key whose order it counts in; `None` without a key, or for a member that does without order.
    key: Option<u64>,
}

/// A key of which something is out or waits.
#[derive(Debug, Default)]
struct Key {
    member: u64,
    out: usize,
    delayed: usize,
    /// Something of it came back: what is out must be settled before the next is given.
    broken: bool,
    waiting: BTreeMap<u64, Entry>,
}

impl Key {
    fn may_go_to(&self, member: u64) -> bool {
        self.delayed == 0 && (self.out == 0 || (self.member == member && !self.broken))
    }
}

impl GroupState {
    /// Changes when something happens.
    #[cfg(feature = "testing")]
    pub(super) fn marks(&self) -> [usize; 5] {
        let given = usize::try_from(self.last_tag).unwrap_or(usize::MAX);
        [
            self.ready.len(),
            self.out.len(),
            self.delayed.len(),
            given,
            self.dead.len(),
        ]
    }

    /// A message for the group; `handled` is told when it has been settled. One that is awaited already is not queued
    /// twice.
    pub(super) fn arrive(&mut self, offset: u64, message: Message, handled: Option<&Arc<Handled>>) {
        if let Some(handled) = handled {
            handled.left.fetch_add(1, Ordering::AcqRel);
            let waiting = self.awaited.entry(message.id()).or_default();
            waiting.push(handled.clone());
            if waiting.len() > 1 {
                return;
            }
        }
        let entry = Entry {
            offset,
            message,
            delivery_count: 0,
            attempts: 0,
        };
        self.make_ready(entry);
    }

    fn make_ready(&mut self, entry: Entry) {
        if self.ready.back().is_none_or(|last| last.offset < entry.offset) {
            self.ready.push_back(entry);
        } else {
            let at = self.ready.partition_point(|other| other.offset < entry.offset);
            self.ready.insert(at, entry);
        }
    }

    pub(super) fn next_delayed(&self) -> Option<Moment> {
        self.delayed.keys().next().map(|(at, _)| *at)
    }

    /// Gives `member` up to `max` entries, in order, each with its tag.
    pub(super) fn take(&mut self, member: u64, ordered: bool, max: usize, now: Moment) -> Vec<(u64, Entry)> {
        self.end_delays(now);
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some(mut entry) = self.ready.pop_front() else {
                break;
            };
            let key = if ordered { entry.message.key_hash() } else { None };
            if let Some(hash) = key {
                let key = self.keys.entry(hash).or_default();
                if !key.may_go_to(member) {
                    key.waiting.insert(entry.offset, entry);
                    continue;
                }
                // Another member looked meanwhile, and what it could not have waits: that goes first.
                if key.waiting.keys().next().is_some_and(|first| *first < entry.offset) {
                    let mut waiting = std::mem::take(&mut key.waiting);
                    waiting.insert(entry.offset, entry);
                    waiting.into_values().for_each(|entry| self.make_ready(entry));
                    continue;
                }
                key.member = member;
                key.out += 1;
            }
            entry.delivery_count += 1;
            self.last_tag += 1;
            let out = Out {
                entry: entry.clone(),
                member,
                key,
            };
            self.out.insert(self.last_tag, out);
            taken.push((self.last_tag, entry));
        }
        taken
    }

    fn end_delays(&mut self, now: Moment) {
        while let Some(first) = self.delayed.first_entry() {
            if first.key().0 > now {
                return;
            }
            let entry = first.remove();
            let hash = entry.message.key_hash();
            match hash.and_then(|hash| self.keys.get_mut(&hash)) {
                Some(key) if key.delayed > 0 => {
                    key.delayed -= 1;
                    key.waiting.insert(entry.offset, entry);
                    self.free(hash);
                }
                _ => {
                    self.make_ready(entry);
                }
            }
        }
    }

    /// Takes an entry out of the hands of `member`; `None` if it is not in them.
    fn take_back(&mut self, tag: u64, member: u64) -> Option<(Entry, Option<u64>)> {
        if self.out.get(&tag)?.member != member {
            return None;
        }
        let out = self.out.remove(&tag)?;
        if let Some(key) = out.key.and_then(|hash| self.keys.get_mut(&hash)) {
            key.out -= 1;
        }
        Some((out.entry, out.key))
    }

    fn settled(&mut self, message: &Message) {
        if self.awaited.is_empty() {
            return;
        }
        let waiting = self.awaited.remove(&message.id()).unwrap_or_default();
        waiting.iter().for_each(|handled| handled.one_less());
    }

    pub(super) fn ack(&mut self, tag: u64, member: u64) -> bool {
        let Some((entry, key)) = self.take_back(tag, member) else {
            return false;
        };
        self.settled(&entry.message);
        self.free(key);
        true
    }

    pub(super) fn dead_letter(&mut self, tag: u64, member: u64) -> bool {
        let Some((entry, key)) = self.take_back(tag, member) else {
            return false;
        };
        self.settled(&entry.message);
        self.dead.push(entry.message);
        self.free(key);
        true
    }

    pub(super) fn release(&mut self, tag: u64, member: u64) -> bool {
        let Some((entry, hash)) = self.take_back(tag, member) else {
            return false;
        };
        match hash.and_then(|hash| self.keys.get_mut(&hash)) {
            Some(key) => {
                key.broken = true;
                key.waiting.insert(entry.offset, entry);
            }
            None => {
                self.make_ready(entry);
            }
        }
        self.free(hash);
        true
    }

    pub(super) fn retry(&mut self, tag: u64, member: u64, at: Moment, attempts: u32) -> bool {
        let Some((mut entry, hash)) = self.take_back(tag, member) else {
            return false;
        };
        if let Some(key) = hash.and_then(|hash| self.keys.get_mut(&hash)) {
            key.broken = true;
            key.delayed += 1;
        }
        entry.attempts = attempts;
        self.delayed.insert((at, entry.offset), entry);
        self.free(hash);
        true
    }

    /// Whoever waits for messages to be settled waits no longer.
    pub(super) fn abandon(&mut self) {
        for waiting in std::mem::take(&mut self.awaited).into_values() {
            waiting.iter().for_each(|handled| handled.one_less());
        }
    }

    /// Everything in the hands of `member` comes back.
    pub(super) fn release_all(&mut self, member: u64) {
        let mut tags: Vec<u64> = self
            .out
            .iter()
            .filter(|(_, o)| o.member == member)
            .map(|(t, _)| *t)
            .collect();
        tags.sort_unstable();
        for tag in tags {
            self.release(tag, member);
        }
    }

    /// If nothing of a key is out or delayed, what waits of it is ready.
    fn free(&mut self, hash: Option<u64>) {
        let Some(hash) = hash else { return };
        let Some(key) = self.keys.get_mut(&hash) else { return };
        let is_free = key.out == 0 && key.delayed == 0;
        // What was kept from another member may go to the one that has the key.
        if !is_free && !key.may_go_to(key.member) {
            return;
        }
        let waiting = std::mem::take(&mut key.waiting);
        if is_free {
            self.keys.remove(&hash);
        }
        waiting.into_values().for_each(|entry| self.make_ready(entry));
    }
}
