//! Outcomes: what they mean for a message, its key and its topic.

use super::{Engine, Event};
use crate::{
    clock::Moment,
    log::{AttemptError, Outcome, Parking, RecordState, RecordTag, Stored, Until},
    publisher::{PublishError, Reachability},
    relay::{
        OnFailed, Reporter, SendOrder, Unroutable,
        held::{Held, Place},
        outage::{Link, Probing},
    },
};
use std::{cmp::Reverse, panic::AssertUnwindSafe, sync::Arc, time::Duration};

/// How often a connection may die with one message alone in flight before the message is blamed.
const DEATHS_BLAMED: u8 = 2;

/// The time between two reachability checks while the relay has nothing to send.
const ASK_EVERY: Duration = Duration::from_secs(5);

impl Engine {
    pub(super) fn confirmed(&mut self, place: Place) {
        let Some(held) = self.in_hand.take(place) else { return };
        self.topic_answered(&held);
        self.settle_held(&held, Outcome::Done);
        self.follow(held.next);
    }

    fn settle_held(&mut self, held: &Held, outcome: Outcome) {
        match held.kept_since {
            None => self.settle(held.record.tag, outcome),
            Some(_) => self.settle_again(held.record.tag, outcome),
        }
    }

    /// The next of a key may be sent.
    pub(super) fn follow(&mut self, next: Option<Place>) {
        match next {
            Some(next) if self.is_stopping => self.release_run(next),
            Some(next) => self.ready.push_back(next),
            None => {}
        }
    }

    fn topic_answered(&mut self, held: &Held) {
        if self.destinations.answered(held.record.message.topic()) {
            tracing::info!(topic = %held.record.message.topic(), "the topic's destination is back");
            self.tell_topics_away();
        }
    }

    /// The message was refused: one try of an attempt is used up.
    pub(super) fn refused(&mut self, place: Place, why: String, after: Option<Duration>, now: Moment) {
        Reporter::count(&self.reporter.refused, 1);
        self.release_followers(place);
        let Some(held) = self.in_hand.get_mut(place) else {
            return;
        };
        let of_topic = self.options.of(held.record.message.topic());
        let attempt = held.record.attempts + 1;
        held.tries += 1;
        tracing::debug!(message = %held.record.message.id(), attempt, tries = held.tries, error = why, "refused");
        held.errors.push(AttemptError::new(self.clock.now(), attempt, why));
        if let Some(held) = self.in_hand.get(place) {
            let message = held.record.message.clone();
            if self.destinations.answered(message.topic()) {
                self.tell_topics_away();
            }
        }
        let Some(held) = self.in_hand.get_mut(place) else {
            return;
        };
        // The local tier has room beside what is claimed, for half as much, and always for one: the rest waits in the log.
        let bytes = held.record.message.payload().len();
        let is_crowded = !self.local.is_empty()
            && (self.local.len() >= self.options.max_in_flight / 2
                || self.local_bytes + bytes > self.options.max_in_flight_bytes / 2);
        if held.tries >= of_topic.local_max_attempts || self.is_stopping || is_crowded || after.is_some() {
            if attempt >= of_topic.max_attempts {
                self.fail(place, attempt, None);
            } else {
                self.park_for_later(place, after);
            }
            return;
        }
        if held.kept_since.is_none() {
            held.kept_since = Some(now);
            let until = Until::After(self.options.min_retry_interval);
            let parking = Parking::new(until, attempt, std::mem::take(&mut held.errors)).kept();
            let tag = held.record.tag;
            self.settle(tag, Outcome::Parked(parking));
        }
        self.local_bytes += bytes;
        self.local.push(Reverse((now + self.options.local_interval, place)));
    }

    /// Those of the local tier whose time has come are ready.
    pub(super) fn end_local_waits(&mut self, now: Moment) {
        while let Some(Reverse((at, place))) = self.local.peek().copied()
            && at <= now
        {
            self.pop_local();
            let since = self.in_hand.get(place).and_then(|held| held.kept_since);
            if since.is_some_and(|since| now.saturating_sub(since) > self.options.local_queue_expiry) {
                self.end_attempt(place);
            } else {
                self.ready.push_back(place);
            }
        }
    }

    /// Takes the record that is due first out of the local tier.
    pub(super) fn pop_local(&mut self) -> Option<Place> {
        let Reverse((_, place)) = self.local.pop()?;
        let held = self.in_hand.get(place);
        self.local_bytes -= held.map_or(0, |held| held.record.message.payload().len());
        Some(place)
    }

    /// The attempt is over, with tries left that came too late: if it was the last, the record is a dead letter.
    fn end_attempt(&mut self, place: Place) {
        let Some(held) = self.in_hand.get(place) else { return };
        let attempt = held.record.attempts + 1;
        if attempt >= self.options.of(held.record.message.topic()).max_attempts {
            self.fail(place, attempt, None);
        } else {
            self.leave_local_tier(place);
        }
    }

    /// The attempt is cut off: the record waits in the log.
    pub(super) fn leave_local_tier(&mut self, place: Place) {
        self.park_for_later(place, None);
    }

    fn park_for_later(&mut self, place: Place, after: Option<Duration>) {
        let Some(mut held) = self.in_hand.take(place) else {
            return;
        };
        let outcome = self.parked_for_later(&mut held, after);
        self.settle_held(&held, outcome);
    }

    fn parked_for_later(&mut self, held: &mut Held, after: Option<Duration>) -> Outcome {
        let attempt = held.record.attempts + 1;
        let backoff = self.options.of(held.record.message.topic()).backoff;
        let after = after.unwrap_or_else(|| backoff.after(attempt, &mut self.rng));
        Outcome::Parked(Parking::new(
            Until::After(after),
            attempt,
            std::mem::take(&mut held.errors),
        ))
    }

    /// Nobody's fault: the record waits in the log, with the attempts it had.
    pub(super) fn deferred(&mut self, place: Place, why: String, after: Duration) {
        self.release_followers(place);
        let Some(mut held) = self.in_hand.take(place) else {
            return;
        };
        tracing::debug!(message = %held.record.message.id(), error = why, ?after, "deferred");
        held.errors.push(AttemptError::new(self.clock.now(), 0, why));
        let errors = std::mem::take(&mut held.errors);
        let parking = Parking::new(Until::After(after), held.record.attempts, errors);
        self.settle_held(&held, Outcome::Parked(parking));
    }

    /// The message becomes a dead letter.
    pub(super) fn fail(&mut self, place: Place, attempts: u32, why: Option<String>) {
        let Some(mut held) = self.in_hand.take(place) else {
            return;
        };
        Reporter::count(&self.reporter.failed, 1);
        if let Some(why) = why {
            held.errors
                .push(AttemptError::new(self.clock.now(), held.record.attempts + 1, why));
            self.topic_answered(&held);
        }
        let attempts = attempts.max(held.record.attempts + 1);
        let message = &held.record.message;
        tracing::error!(message = %message.id(), topic = %message.topic(), attempts, error = held.errors.last().map(|e| &*e.text), "the message failed for good: it is a dead letter");
        let hold_key = self.options.of(message.topic()).on_failed == OnFailed::HoldKey;
        if self.options.on_exhausted.is_some() {
            let mut failed = Stored::new(message.clone(), message.time().unwrap_or_else(|| self.clock.now()));
            failed.state = RecordState::Failed;
            failed.attempts = attempts;
            failed.finished_at = Some(self.clock.now());
            failed.errors.clone_from(&held.errors);
            self.exhausted.push((held.record.tag, failed));
        }
        let errors = std::mem::take(&mut held.errors);
        self.settle_held(
            &held,
            Outcome::Failed {
                attempts,
                errors,
                hold_key,
            },
        );
        match held.next {
            Some(next) if hold_key => self.release_run(next),
            next => self.follow_once_written(held.record.tag, next),
        }
    }

    /// The next of a key may be sent once the end of the one before it is stored: until then, whoever takes over would send
    /// that one after it.
    fn follow_once_written(&mut self, tag: RecordTag, next: Option<Place>) {
        match next {
            Some(next) if self.is_stopping => self.release_run(next),
            Some(next) => {
                self.behind_unwritten.insert(tag, next);
            }
            None => {}
        }
    }

    /// The topic's destination is missing, full or under-replicated: costs no attempt.
    pub(super) fn destination_away(&mut self, place: Place, error: &PublishError, now: Moment) {
        let Some(held) = self.in_hand.get(place) else { return };
        let topic = held.record.message.topic().clone();
        if error.is_unroutable() && self.options.of(&topic).unroutable == Unroutable::Drop {
            Reporter::count(&self.reporter.dropped, 1);
            if let Some(held) = self.in_hand.take(place) {
                // A probe that is dropped has been answered all the same.
                self.topic_answered(&held);
                self.settle_held(&held, Outcome::Done);
                self.follow_once_written(held.record.tag, held.next);
            }
            return;
        }
        if self.destinations.pause(&topic, error, now, &mut self.rng) {
            tracing::warn!(%topic, error = crate::error::chain(error), "the topic is paused: its messages wait in the log");
            self.tell_topics_away();
        }
        for place in self.flights.take_held(&topic) {
            self.park_for_topic(place, None);
        }
        self.park_for_topic(place, Some(error));
    }

    pub(super) fn park_for_topic(&mut self, place: Place, error: Option<&PublishError>) {
        self.release_followers(place);
        let Some(mut held) = self.in_hand.take(place) else {
            return;
        };
        if let Some(error) = error {
            held.errors
                .push(AttemptError::new(self.clock.now(), 0, crate::error::chain(error)));
        }
        let errors = std::mem::take(&mut held.errors);
        self.unwritten
            .insert(held.record.tag, held.record.message.topic().clone());
        let parking = Parking::new(Until::Resumed, held.record.attempts, errors);
        self.settle_held(&held, Outcome::Parked(parking));
    }

    /// The client confirmed something: more may be in flight.
    pub(super) fn link_carries(&mut self) {
        let Link::Slow { window, .. } = &mut self.link else {
            return;
        };
        *window = window.saturating_mul(2);
        if *window > self.options.batch_size {
            self.link = Link::Up;
            self.link_probing = Probing::new(self.options.max_probe_interval);
        }
        // One confirmed message is enough to say so: what comes slowly at first is no outage.
        self.broker_is_back();
    }

    /// The connection was lost with these messages in flight: none of them has used an attempt, unless one is to blame.
    pub(super) fn link_lost(&mut self, places: Vec<Place>, error: &PublishError, was_alone: bool, now: Moment) {
        for place in &places {
            if let Some(held) = self.in_hand.get(*place) {
                self.destinations.probe_lost(held.record.message.topic(), now);
            }
        }
        let was_seen_up = matches!(self.link, Link::Slow { may_blame: true, .. });
        if matches!(self.link, Link::Up) {
            tracing::warn!(mailbox = %self.mailbox, error = crate::error::chain(error), "the broker is away: the relay waits, no attempt is counted");
        }
        if matches!(self.link, Link::Up | Link::Slow { .. }) {
            let wait = self.link_probing.next(&mut self.rng);
            self.link = Link::Down { probe_at: now + wait };
            self.reporter.broker_away(Some(crate::error::chain(error)));
        }
        let blamed = places.first().copied().filter(|_| was_alone && was_seen_up);
        if let Some(held) = blamed.and_then(|place| self.in_hand.get_mut(place)) {
            held.deaths += 1;
            if held.deaths >= DEATHS_BLAMED {
                held.deaths = 0;
                let text = "the connection was lost twice with only this message in flight";
                let place = places[0];
                tracing::warn!(message = %held.record.message.id(), text);
                let blame = PublishError::rejected(format!("{text}: {}", crate::error::chain(error)));
                self.refused(place, crate::error::chain(&blame), None, now);
                return;
            }
        }
        for place in places {
            if self.is_stopping {
                self.release_run(place);
            } else {
                self.ready.push_front(place);
            }
        }
        let in_hand = &self.in_hand;
        let order = |place: &Place| in_hand.get(*place).and_then(|held| held.record.message.sequence());
        self.ready.make_contiguous().sort_by_key(order);
    }

    pub(super) fn check_link(&mut self, now: Moment) {
        if matches!(self.link, Link::Down { probe_at } if probe_at <= now) && !self.is_stopping {
            self.link = Link::Checking;
            let attempts = self.attempts.clone();
            self.job(async move { Event::Checked(attempts.check().await) });
        }
    }

    /// When to ask the broker whether it is there, while nothing is with it that would tell.
    pub(super) fn asks_at(&self) -> Option<Moment> {
        let is_idle = matches!(self.link, Link::Up) && self.in_flight == 0 && !self.is_asking && !self.is_stopping;
        (self.has_destinations && self.has_lease && is_idle).then(|| self.heard_at + ASK_EVERY)
    }

    /// An outage shows although nobody publishes.
    pub(super) fn ask_while_idle(&mut self, now: Moment) {
        if self.asks_at().is_some_and(|at| at <= now) {
            self.is_asking = true;
            let attempts = self.attempts.clone();
            self.job(async move { Event::Asked(attempts.check().await) });
        }
    }

    pub(super) fn asked(&mut self, reachability: &Reachability, now: Moment) {
        (self.is_asking, self.heard_at) = (false, now);
        // What is with the client by now finds out for itself.
        if let Reachability::Down(error) = reachability
            && matches!(self.link, Link::Up)
            && self.in_flight == 0
        {
            self.link_lost(Vec::new(), error, false, now);
        }
    }

    /// The broker answers again, and there is nothing to be sent.
    pub(super) fn is_idle_again(&mut self) {
        let is_seen_up = matches!(self.link, Link::Slow { may_blame: true, .. });
        if is_seen_up && self.in_flight == 0 && self.ready.is_empty() {
            self.link = Link::Up;
            self.link_probing = Probing::new(self.options.max_probe_interval);
            self.broker_is_back();
        }
    }

    fn broker_is_back(&self) {
        if self.reporter.broker_is_back() {
            tracing::info!(mailbox = %self.mailbox, "the broker is back");
        }
    }

    pub(super) fn checked(&mut self, reachability: &Reachability, now: Moment) {
        self.heard_at = now;
        self.link = match reachability {
            Reachability::Up => Link::Slow {
                window: 1,
                may_blame: true,
            },
            Reachability::Unknown => Link::Slow {
                window: 1,
                may_blame: false,
            },
            Reachability::Down(error) => {
                self.reporter.broker_away(Some(crate::error::chain(error)));
                let wait = self.link_probing.next(&mut self.rng);
                Link::Down { probe_at: now + wait }
            }
        };
        self.wants_claim |= self.link.window() > 0;
    }

    /// Gives a record back to the log, and its followers.
    pub(super) fn release_run(&mut self, place: Place) {
        let mut next = Some(place);
        while let Some(mut held) = next.and_then(|place| self.in_hand.take(place)) {
            let outcome = match held.kept_since {
                None => Outcome::Released,
                Some(_) => self.parked_for_later(&mut held, None),
            };
            self.settle_held(&held, outcome);
            next = held.next;
        }
    }

    fn release_followers(&mut self, place: Place) {
        let next = self.in_hand.get_mut(place).and_then(|held| held.next.take());
        if let Some(next) = next {
            self.release_run(next);
        }
    }

    /// Puts what was claimed in line: of each key the first, the others behind it.
    pub(super) fn line_up(&mut self, records: Vec<crate::log::Record>) {
        let mut last_of_key: rustc_hash::FxHashMap<u64, Place> = rustc_hash::FxHashMap::default();
        for record in records {
            let key = record.message.key_hash();
            let strict = key.is_some()
                && (self.options.topics.is_empty()
                    || self.options.of(record.message.topic()).order == SendOrder::Strict);
            let place = self.in_hand.put(record, self.tenure);
            let before = match key {
                Some(key) if strict => last_of_key.insert(key, place),
                _ => None,
            };
            match before.and_then(|before| self.in_hand.get_mut(before)) {
                Some(before) => before.next = Some(place),
                None => self.ready.push_back(place),
            }
        }
    }
}

/// Calls the callback of the options; its panic is its own affair.
pub(super) fn tell(callback: &Arc<dyn Fn(&Stored) + Send + Sync>, failed: &Stored) {
    if std::panic::catch_unwind(AssertUnwindSafe(|| callback(failed))).is_err() {
        tracing::error!(message = %failed.message.id(), "the on_exhausted callback panicked");
    }
}
