//! Messages that this member has done with, and whose acknowledgement the broker did not take: the connection was lost, the
//! partition had gone to another member, or the handler took longer than the broker waits for an outcome. When they come again they
//! are acknowledged at once, in place of being handled for a second time.

use crate::{
    MessageId,
    clock::{Clock, Moment},
};
use rustc_hash::FxHashMap;
use std::{
    collections::VecDeque,
    sync::{
        Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// The most that are remembered: the oldest are forgotten first.
const MOST: usize = 10_000;
/// And for how long: twice the longest that brokers wait for an outcome as they come (RabbitMQ's `consumer_timeout`).
const REMEMBERED: Duration = Duration::from_secs(60 * 60);

#[derive(Debug, Default)]
pub(super) struct Unacknowledged {
    /// Whether there are any: seldom, so that nobody waits for the lock.
    any: AtomicBool,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    since: FxHashMap<MessageId, Moment>,
    /// As they came; of those that were taken out since, too.
    order: VecDeque<(MessageId, Moment)>,
}

impl Unacknowledged {
    /// Remembers messages.
    pub(super) fn add(&self, messages: Vec<MessageId>, now: Moment) {
        if messages.is_empty() {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for id in messages {
            known.since.insert(id, now);
            known.order.push_back((id, now));
        }
        while known.order.len() > MOST {
            if let Some((id, since)) = known.order.pop_front()
                && known.since.get(&id) == Some(&since)
            {
                known.since.remove(&id);
            }
        }
        self.any.store(true, Ordering::Release);
    }

    /// Whether this message is one of them. It counts for one delivery.
    pub(super) fn take(&self, id: MessageId, clock: &dyn Clock) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let since = known.since.remove(&id);
        if known.since.is_empty() {
            known.order.clear();
            self.any.store(false, Ordering::Release);
        }
        since.is_some_and(|since| clock.elapsed().saturating_sub(since) < REMEMBERED)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    #[test]
    fn they_are_known_once_for_a_while_and_not_without_bound() {
        let clock = ManualClock::shared();
        let unacknowledged = Unacknowledged::default();
        let ids: Vec<MessageId> = (0..=MOST).map(|_| MessageId::new()).collect();
        assert!(!unacknowledged.take(ids[1], &*clock));
        unacknowledged.add(ids.clone(), clock.elapsed());
        assert!(!unacknowledged.take(ids[0], &*clock), "more than are remembered");
        assert!(unacknowledged.take(ids[1], &*clock));
        assert!(!unacknowledged.take(ids[1], &*clock), "twice");
        clock.advance(REMEMBERED);
        assert!(!unacknowledged.take(ids[2], &*clock), "it is too long ago");
    }
}
