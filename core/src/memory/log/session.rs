use super::{
    closed, locked,
    queue::{Done, Holder, Parked, ParkedState, Queue, Rows},
};
use crate::{
    Message, Result, Topic,
    clock::{Clock, Timestamp, later},
    log::{
        AttemptError, Claim, Claimed, Holdings, Lease, Outcome, Record, RecordTag, Renewal, Session, SessionOptions,
        SettleReport, Settled, Until,
    },
};
use async_trait::async_trait;
use std::{
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};

/// How many rows a claim looks at for each one it may give: what it passes over is bounded.
const SCANNED_PER_GIVEN: usize = 8;

#[derive(Debug)]
pub(super) struct MemorySession {
    queue: Arc<Queue>,
    options: SessionOptions,
    clock: Arc<dyn Clock>,
    held: Mutex<Held>,
}

#[derive(Debug)]
struct Held {
    lease: Lease,
    epoch: u64,
    holdings: Holdings,
    /// Everything up to here has been read.
    cursor: u64,
    renewal: Option<Renewal>,
    news_seen: u64,
    closed: bool,
}

fn tag(epoch: u64, position: u64) -> RecordTag {
    RecordTag(u128::from(epoch) << 64 | u128::from(position))
}

#[allow(clippy::cast_possible_truncation)]
fn untag(tag: RecordTag) -> (u64, u64) {
    ((tag.0 >> 64) as u64, tag.0 as u64)
}

impl MemorySession {
    pub(super) fn new(queue: Arc<Queue>, options: SessionOptions, clock: Arc<dyn Clock>) -> Self {
        let held = Held {
            lease: Lease::none(clock.clone()),
            epoch: 0,
            holdings: Holdings::default(),
            cursor: 0,
            renewal: None,
            news_seen: 0,
            closed: false,
        };
        Self {
            queue,
            options,
            clock,
            held: Mutex::new(held),
        }
    }

    fn held(&self) -> MutexGuard<'_, Held> {
        locked(&self.held)
    }

    /// Gets the lease if it can be had. `true` if this call got it.
    fn acquire(&self, held: &mut Held, rows: &mut Rows) -> bool {
        let now = self.clock.elapsed();
        let mine = rows.lease.is_some_and(|h| h.owner == self.options.owner) && rows.epoch == held.epoch;
        if mine && held.lease.is_held() {
            return false;
        }
        if !mine && rows.lease.is_some_and(|h| h.until > now) {
            return false;
        }
        rows.epoch += 1;
        rows.lease = Some(Holder {
            owner: self.options.owner,
            until: now + self.options.lease,
        });
        held.epoch = rows.epoch;
        held.lease = Lease::new(self.clock.clone(), now, self.options.lease);
        held.holdings.clear();
        held.cursor = 0;
        held.renewal = Some(self.renewal(held));
        true
    }

    fn renewal(&self, held: &Held) -> Renewal {
        let (queue, clock, options) = (self.queue.clone(), self.clock.clone(), self.options.clone());
        let epoch = held.epoch;
        held.lease.keep_renewed(self.options.lease, move || {
            let mut rows = queue.rows();
            let (now, mine) = (clock.elapsed(), rows.epoch == epoch);
            let renewed = match &mut rows.lease {
                Some(holder) if mine && holder.until > now => {
                    holder.until = now + options.lease;
                    true
                }
                _ => false,
            };
            std::future::ready(Ok(renewed))
        })
    }

    /// Whether this session may write: by its own count and by the log's.
    fn may_write(&self, held: &Held, rows: &Rows) -> bool {
        rows.epoch == held.epoch
            && rows
                .lease
                .is_some_and(|h| h.owner == self.options.owner && h.until > self.clock.elapsed())
    }
}

/// One claim, in steps.
struct Claiming<'a> {
    held: &'a mut Held,
    rows: &'a mut Rows,
    now: Timestamp,
    max: usize,
    /// How many bytes of payload may still be given.
    bytes: usize,
    records: Vec<Record>,
}

impl Claiming<'_> {
    fn room(&self) -> usize {
        if self.bytes == 0 {
            0
        } else {
            self.max - self.records.len()
        }
    }

    fn give(&mut self, position: u64) {
        let epoch = self.held.epoch;
        let (message, attempts) = match self.rows.hot.get(position) {
            Some(row) => (row.message.clone(), 0),
            None => match self.rows.parked.get(&position) {
                Some(parked) => (parked.row.message.clone(), parked.attempts),
                None => {
                    self.held.holdings.let_go(position);
                    return;
                }
            },
        };
        let message = message.with_sequence(position);
        self.bytes = self.bytes.saturating_sub(message.payload().len());
        self.records.push(Record::new(tag(epoch, position), message, attempts));
    }

    /// Due heads, each with its followers.
    fn parked(&mut self, max_runs: usize) {
        let heads: Vec<u64> = {
            let holdings = &self.held.holdings;
            let free = self.rows.due_heads(self.now).filter(|head| !holdings.is_held(*head));
            free.take(max_runs).collect()
        };
        for head in heads {
            if self.room() == 0 {
                return;
            }
            let Some(key) = self.rows.parked.get(&head).map(|p| p.row.message.key_hash()) else {
                continue;
            };
            if key.is_some_and(|key| self.held.holdings.is_busy(key)) {
                continue;
            }
            let run = self.rows.run_of(head);
            for position in run {
                if self.room() == 0 {
                    return;
                }
                self.held.holdings.take_run(position, key);
                self.give(position);
            }
        }
    }

    /// What was passed over for keys that have become free.
    fn freed(&mut self) {
        while self.room() > 0 {
            let Some(position) = self.held.holdings.take_freed(1).pop() else {
                return;
            };
            self.give(position);
        }
    }

    /// What was not read yet. `false` if it stopped before the end for another reason than `max`.
    fn fresh(&mut self) -> bool {
        let mut looks = self.max.saturating_mul(SCANNED_PER_GIVEN);
        while self.room() > 0 {
            let Some((position, row)) = self.rows.hot.next_after(self.held.cursor) else {
                return true;
            };
            if looks == 0 {
                return false;
            }
            looks -= 1;
            self.held.cursor = position;
            if self.rows.is_parked_key(&row.message) {
                self.rows.park_behind(position, self.now);
            } else if self.held.holdings.take(position, row.message.key_hash()) {
                self.give(position);
            }
        }
        true
    }
}

#[async_trait]
impl Session for MemorySession {
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        let mut held = self.held();
        if held.closed {
            return Err(closed());
        }
        held.news_seen = self.queue.news_count();
        let mut rows = self.queue.rows();
        let now = self.clock.now();
        let acquired = self.acquire(&mut held, &mut rows);
        if !held.lease.is_held() || !self.may_write(&held, &rows) {
            let mut claimed = Claimed::empty(Lease::none(self.clock.clone()));
            let free_at = rows.lease.map(|holder| holder.until);
            claimed.next_due = free_at.map(|at| at.saturating_sub(self.clock.elapsed()));
            return Ok(claimed);
        }
        let mut claimed = Claimed::empty(held.lease.clone());
        if acquired {
            claimed.waiting = rows.waiting_topics();
        }
        held.holdings.begin_claim();
        rows.enter_scheduled(now);
        let mut claiming = Claiming {
            held: &mut held,
            rows: &mut rows,
            now,
            max: request.max,
            bytes: request.max_bytes,
            records: Vec::with_capacity(request.max.min(1024)),
        };
        claiming.parked(request.max_parked);
        claiming.freed();
        let read_all = claiming.fresh();
        claimed.records = claiming.records;
        claimed.next_due = if read_all {
            rows.next_due(now, |position| held.holdings.is_held(position))
        } else {
            Some(Duration::ZERO)
        };
        Ok(claimed)
    }

    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        let mut held = self.held();
        if held.closed {
            return Err(closed());
        }
        let mut rows = self.queue.rows();
        if !self.may_write(&held, &rows) {
            held.lease.end();
            return Ok(SettleReport::new(batch.iter().map(|s| s.tag).collect()));
        }
        let now = self.clock.now();
        let mut lost = Vec::new();
        for settled in batch {
            let (epoch, position) = untag(settled.tag);
            if epoch != held.epoch || !held.holdings.is_held(position) {
                lost.push(settled.tag);
                continue;
            }
            let known = match &settled.outcome {
                Outcome::Released => release(&mut held, &mut rows, position, now),
                Outcome::Done => {
                    held.holdings.let_go(position);
                    let removed = rows.remove(position, now);
                    let known = removed.is_some();
                    if let Some((row, attempts)) = removed
                        && self.options.keep_succeeded
                    {
                        let at = now;
                        rows.done.insert(position, Done { row, attempts, at });
                    }
                    known
                }
                Outcome::Parked(parking) => {
                    let state = match parking.until {
                        Until::After(delay) => ParkedState::Due(later(now, delay)),
                        Until::Resumed => ParkedState::ForTopic,
                    };
                    if !parking.keep {
                        held.holdings.let_go(position);
                    }
                    park(
                        &mut held,
                        &mut rows,
                        position,
                        state,
                        parking.attempts,
                        &parking.errors,
                        now,
                    )
                }
                Outcome::Failed {
                    attempts,
                    errors,
                    hold_key,
                } => {
                    let state = ParkedState::Failed {
                        at: now,
                        holds_key: *hold_key,
                    };
                    held.holdings.let_go(position);
                    park(&mut held, &mut rows, position, state, *attempts, errors, now)
                }
            };
            if !known {
                held.holdings.let_go(position);
                lost.push(settled.tag);
            }
        }
        let may_claim = held.holdings.has_freed() || rows.has_parked();
        Ok(SettleReport::new(lost).with_may_claim(may_claim))
    }

    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        let held = self.held();
        let mut rows = self.queue.rows();
        if held.closed || !self.may_write(&held, &rows) {
            return Ok(0);
        }
        Ok(rows.resume(topic, max, self.clock.now()))
    }

    async fn wait(&self, at_most: Duration) -> Result<()> {
        let seen = self.held().news_seen;
        tokio::select! {
            biased;
            () = self.queue.news_after(seen) => {}
            () = self.clock.sleep(at_most) => {}
        }
        Ok(())
    }

    async fn close(&self) -> Result<()> {
        let mut held = self.held();
        let mut rows = self.queue.rows();
        if !held.closed && self.may_write(&held, &rows) {
            rows.lease = None;
        }
        held.closed = true;
        held.lease.end();
        held.renewal = None;
        held.holdings.clear();
        drop(rows);
        self.queue.tell();
        Ok(())
    }
}

fn release(held: &mut Held, rows: &mut Rows, position: u64, now: Timestamp) -> bool {
    if let Some(row) = rows.hot.get(position) {
        if rows.is_parked_key(&row.message) {
            rows.park_behind(position, now);
            held.holdings.let_go(position);
        } else {
            held.holdings.give_back(position);
        }
        return true;
    }
    held.holdings.let_go(position);
    rows.parked.contains_key(&position)
}

/// Parks a row (or makes it a dead letter), and what was passed over of its key behind it.
fn park(
    held: &mut Held,
    rows: &mut Rows,
    position: u64,
    state: ParkedState,
    attempts: u32,
    new_errors: &[AttemptError],
    now: Timestamp,
) -> bool {
    let holds_key = !matches!(state, ParkedState::Failed { holds_key: false, .. });
    // A parked row changes in place: taking it out would make the next of its key due for a moment.
    if let Some(parked) = rows.parked.get_mut(&position)
        && holds_key
    {
        parked.attempts = attempts;
        AttemptError::keep(&mut parked.row.errors, new_errors);
        let message = parked.row.message.clone();
        let stays = rows.is_head(position) || matches!(state, ParkedState::Failed { .. });
        rows.set_state(position, if stays { state } else { ParkedState::Behind });
        park_passed_over(held, rows, &message, now);
        return true;
    }
    let Some((mut row, _)) = rows.remove(position, now) else {
        return false;
    };
    AttemptError::keep(&mut row.errors, new_errors);
    let message = row.message.clone();
    rows.park(position, Parked { row, state, attempts }, now);
    if holds_key {
        park_passed_over(held, rows, &message, now);
    }
    true
}

/// Parks what was passed over of a message's key.
fn park_passed_over(held: &mut Held, rows: &mut Rows, message: &Message, now: Timestamp) {
    let Some(hash) = message.key_hash() else { return };
    let same_key = |p: u64| {
        let row = rows.hot.get(p).or_else(|| Some(&rows.parked.get(&p)?.row));
        row.is_some_and(|r| r.message.topic() == message.topic() && r.message.key() == message.key())
    };
    for behind in held.holdings.forget_key(hash, same_key) {
        rows.park_behind(behind, now);
    }
}
