//! Messages that this member has done with, and whose acknowledgement the broker did not take: the connection was lost, the
//! partition had gone to another member, or the handler took longer than the broker waits for an outcome. When they come again they
//! are acknowledged at once, in place of being handled for a second time.

use crate::{
    Message, MessageId, Topic,
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

/// A handled message. The topic is part of it because one event may be sent to several topics.
type Handled = (Topic, MessageId);

#[derive(Debug, Default)]
pub(super) struct Unacknowledged {
    /// Whether `known` holds anything. It seldom does, so most calls read this flag and skip the lock.
    any: AtomicBool,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    since: FxHashMap<Handled, Moment>,
    /// The same messages in the order they were added. Messages that were taken out are still in it.
    order: VecDeque<(Handled, Moment)>,
}

impl Unacknowledged {
    /// Remembers messages.
    pub(super) fn add(&self, messages: Vec<Handled>, now: Moment) {
        if messages.is_empty() {
            return;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        for handled in messages {
            known.since.insert(handled.clone(), now);
            known.order.push_back((handled, now));
        }
        while known.order.len() > MOST {
            if let Some((handled, since)) = known.order.pop_front()
                && known.since.get(&handled) == Some(&since)
            {
                known.since.remove(&handled);
            }
        }
        self.any.store(true, Ordering::Release);
    }

    /// Returns whether this message is remembered, and forgets it.
    pub(super) fn take(&self, message: &Message, clock: &dyn Clock) -> bool {
        if !self.any.load(Ordering::Acquire) {
            return false;
        }
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        let since = known.since.remove(&(message.topic().clone(), message.id()));
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
        let message = |topic| Message::new(Topic::new(topic), "t.v1", "");
        let messages: Vec<Message> = (0..=MOST).map(|_| message("t")).collect();
        assert!(!unacknowledged.take(&messages[1], &*clock));
        let handled = messages.iter().map(|message| (message.topic().clone(), message.id()));
        unacknowledged.add(handled.collect(), clock.elapsed());
        assert!(!unacknowledged.take(&messages[0], &*clock), "more than are remembered");
        let elsewhere = messages[1].clone().with_topic(Topic::new("other"));
        assert!(
            !unacknowledged.take(&elsewhere, &*clock),
            "the same event on another topic"
        );
        assert!(unacknowledged.take(&messages[1], &*clock));
        assert!(!unacknowledged.take(&messages[1], &*clock), "twice");
        clock.advance(REMEMBERED);
        assert!(!unacknowledged.take(&messages[2], &*clock), "it is too long ago");
    }
}
