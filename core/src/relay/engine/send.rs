//! Calls to the client: what goes with which, and what comes back of each message.

use super::{Engine, Event};
use crate::{
    clock::Moment,
    publisher::{Outcomes, PublishError, PublishErrorKind, Report, Scope},
    relay::{Reporter, attempts::Refusal, flights::How, held::Place},
};
use std::time::Duration;

/// How long messages that are ready wait for more to go with them, at most, while others are with the client.
const GATHERS_FOR: Duration = Duration::from_millis(20);
/// They wait while fewer are ready than this part of what is with the client.
const GATHERS_PART: usize = 3;

/// In place of an answered message.
const ANSWERED: Place = Place::MAX;

/// A call that the client works on.
pub(super) struct Call {
    /// By position in the batch; [`ANSWERED`] once that is so.
    places: Vec<Place>,
    sent_at: Moment,
}

impl Engine {
    /// Hands ready messages to the client, as far as the link and the lease allow.
    pub(super) fn send_ready(&mut self, now: Moment) {
        self.look_for_silence(now);
        while self.may_call() && !self.gathers(now) {
            let with_client = self.with_client();
            let room = self.link.window().min(self.options.max_publishing);
            let room = room
                .saturating_sub(with_client)
                .min(self.options.batch_size)
                .min(self.attempts.per_call());
            if room == 0 {
                return;
            }
            if !self.lease.is_held() {
                self.lose_lease();
                return;
            }
            let mut places = Vec::with_capacity(room.min(self.ready.len()));
            let mut probes = 0;
            while places.len() + probes < room
                && let Some(place) = self.ready.pop_front()
            {
                let Some(held) = self.in_hand.get(place) else { continue };
                let topic = held.record.message.topic();
                match self.destinations.may_send(topic, now) {
                    Some(is_probe) if is_probe => {
                        probes += 1;
                        self.call(vec![place], now);
                    }
                    Some(_) if self.flights.holds(topic, place) => {}
                    Some(_) => places.push(place),
                    None => self.park_for_topic(place, None),
                }
            }
            if places.is_empty() && probes == 0 {
                return;
            }
            if !places.is_empty() {
                self.call(places, now);
            }
        }
    }

    fn call(&mut self, places: Vec<Place>, now: Moment) {
        let mut messages = Vec::with_capacity(places.len());
        let mut counts = Vec::with_capacity(places.len());
        for place in &places {
            let Some(held) = self.in_hand.get(*place) else { continue };
            messages.push(held.record.message.clone());
            counts.push(held.record.attempts);
        }
        if self.has_destinations {
            for of_topic in messages.chunk_by(|one, next| one.topic() == next.topic()) {
                let bytes = of_topic.iter().map(|message| message.payload().len()).sum();
                self.flights.sent(of_topic[0].topic(), of_topic.len(), bytes, now);
            }
        }
        self.in_flight += places.len();
        self.last_call += 1;
        let number = self.last_call;
        let outcomes = Outcomes::new(number, places.len(), self.reports.clone());
        self.calls.insert(number, Call { places, sent_at: now });
        let (attempts, lease) = (self.attempts.clone(), self.lease.clone());
        self.job(async move {
            let rest = attempts.attempt(&messages, &counts, &lease, &outcomes).await;
            Event::Ended { call: number, rest }
        });
    }

    fn may_call(&self) -> bool {
        !self.ready.is_empty() && self.with_client() < self.options.max_publishing
    }

    /// Messages with the client that an answer is expected of: silent topics keep nobody waiting.
    fn with_client(&self) -> usize {
        self.in_flight.saturating_sub(self.flights.silent())
    }

    /// Whether little is ready beside what is with the client, and more may be soon: a broker takes one call of many
    /// messages far sooner than many of few, and where each waits for the one before it in its key, calls would fall to
    /// pieces.
    fn gathers(&mut self, now: Moment) -> bool {
        let enough = (self.with_client() / GATHERS_PART)
            .min(self.options.batch_size)
            .min(self.attempts.per_call());
        let is_gathering =
            self.ready.len() < enough && now < self.gathering_since.get_or_insert(now).saturating_add(GATHERS_FOR);
        if !is_gathering {
            self.gathering_since = None;
        }
        is_gathering
    }

    /// When what is ready has waited long enough for more.
    pub(super) fn gathered_at(&self) -> Option<Moment> {
        let since = self.gathering_since.filter(|_| self.may_call())?;
        Some(since.saturating_add(GATHERS_FOR))
    }

    /// Topics that stay silent while others are answered wait in the log, as those whose destinations are away.
    fn look_for_silence(&mut self, now: Moment) {
        if self.in_flight == 0 {
            return;
        }
        for overdue in self.flights.look(now, self.options.max_in_flight / 4) {
            let topic = overdue.topic;
            let why = format!(
                "no answer for {:?}, while other topics are answered",
                overdue.silent_for
            );
            if self.destinations.fall_silent(&topic, &why) {
                tracing::warn!(%topic, error = why, "the topic is paused: its messages wait in the log");
                self.tell_topics_away();
            }
            for place in overdue.held {
                self.park_for_topic(place, None);
            }
        }
    }

    pub(super) fn tell_topics_away(&self) {
        let (list, any_unroutable) = (self.destinations.list(), self.destinations.any_unroutable());
        self.reporter.topics_away(list, any_unroutable);
    }

    /// Takes the outcomes that have been reported.
    pub(super) fn take_reports(&mut self, now: Moment) {
        let empty = std::mem::take(&mut self.empty_reports);
        let mut reports = self.reports.take(empty);
        if !reports.is_empty() {
            self.heard_at = now;
            let was_alone = self.in_flight == 1;
            let mut news = News::default();
            for Report {
                call: number,
                at,
                outcome,
            } in reports.drain(..)
            {
                let Some(mut call) = self.calls.remove(&number) else {
                    continue;
                };
                for place in call.places.get_mut(at).unwrap_or_default() {
                    let place = std::mem::replace(place, ANSWERED);
                    if place != ANSWERED {
                        let outcome = outcome.clone().map_err(Refusal::from);
                        self.came_back(place, call.sent_at, outcome, now, &mut news);
                    }
                }
                self.calls.insert(number, call);
            }
            self.draw_conclusions(news, was_alone, now);
        }
        self.empty_reports = reports;
    }

    /// A call has ended: `rest` is the outcome of the messages that none was reported of.
    pub(super) fn call_ended(&mut self, call: u64, rest: &Result<(), Refusal>, now: Moment) {
        self.take_reports(now);
        let Some(call) = self.calls.remove(&call) else { return };
        let was_alone = self.in_flight == 1;
        let mut news = News::default();
        for place in call.places.into_iter().filter(|place| *place != ANSWERED) {
            self.came_back(place, call.sent_at, rest.clone(), now, &mut news);
        }
        self.draw_conclusions(news, was_alone, now);
    }

    /// The outcome of one message.
    fn came_back(&mut self, place: Place, sent_at: Moment, outcome: Result<(), Refusal>, now: Moment, news: &mut News) {
        self.in_flight -= 1;
        let Some(held) = self.in_hand.get(place) else { return };
        let is_ours = held.tenure == self.tenure;
        let refusal = match outcome {
            Ok(()) => {
                self.landed(place, sent_at, now, How::Answered);
                if is_ours {
                    news.confirmed += 1;
                    self.confirmed(place);
                    return;
                }
                None
            }
            Err(Refusal::Silent(error)) if self.has_destinations => {
                let topic = held.record.message.topic();
                // Without others that are answered it may be the connection: that is found out, and the message is not blamed.
                if !self.flights.is_silent(topic, now) {
                    self.flights.mark_silent(topic);
                    news.loss = Some(error.clone());
                }
                self.landed(place, sent_at, now, How::TimedOut);
                Some(Refusal::Destination(PublishError::destination(error)))
            }
            Err(refusal) => {
                let how = match refusal {
                    Refusal::Connection(_) | Refusal::HeldBack => How::Lost,
                    _ => How::Answered,
                };
                self.landed(place, sent_at, now, how);
                Some(refusal)
            }
        };
        let Some(refusal) = refusal.filter(|_| is_ours) else {
            // What this tenure knows of the topic may count on it.
            self.probe_lost(place, now);
            self.forget_run(place);
            return;
        };
        match refusal {
            Refusal::Connection(error) | Refusal::Silent(error) => {
                news.lost.push(place);
                news.loss = Some(error);
            }
            Refusal::Destination(error) => self.destination_away(place, &error, now),
            Refusal::Rejected { why, after } => self.refused(place, why, after, now),
            Refusal::Invalid { why } => self.fail(place, 0, Some(why)),
            Refusal::Deferred { why, after } => self.deferred(place, why, after),
            Refusal::Elsewhere { why } => {
                tracing::debug!(error = why, "left to another member of the group");
                self.release_run(place);
                self.step_aside();
            }
            Refusal::HeldBack => {
                self.probe_lost(place, now);
                self.release_run(place);
            }
        }
    }

    /// A message is with the client no more.
    fn landed(&mut self, place: Place, sent_at: Moment, now: Moment, how: How) {
        let Some(held) = self.in_hand.get(place).filter(|_| self.has_destinations) else {
            return;
        };
        let message = &held.record.message;
        let (topic, bytes) = (message.topic(), message.payload().len());
        if self.flights.ended(topic, bytes, sent_at, now, how) {
            let held = self.flights.take_held(topic);
            held.into_iter().rev().for_each(|place| self.ready.push_front(place));
        }
    }

    /// It was to find out about its destination, and has not.
    fn probe_lost(&mut self, place: Place, now: Moment) {
        if let Some(held) = self.in_hand.get(place) {
            self.destinations.probe_lost(held.record.message.topic(), now);
        }
    }

    fn draw_conclusions(&mut self, news: News, was_alone: bool, now: Moment) {
        Reporter::count(&self.reporter.published, news.confirmed);
        if news.confirmed > 0 {
            self.link_carries();
        }
        if let Some(error) = news.loss {
            self.link_lost(news.lost, &error, was_alone, now);
        }
    }
}

/// What several outcomes together say of the link.
#[derive(Default)]
struct News {
    confirmed: usize,
    lost: Vec<Place>,
    loss: Option<PublishError>,
}

impl From<PublishError> for Refusal {
    fn from(error: PublishError) -> Self {
        let why = || crate::error::chain(&error);
        match error.kind() {
            PublishErrorKind::Unavailable(Scope::Connection) => Self::Connection(error),
            PublishErrorKind::Unavailable(Scope::Destination) => Self::Destination(error),
            PublishErrorKind::Rejected => Self::Rejected {
                why: why(),
                after: None,
            },
            PublishErrorKind::Invalid => Self::Invalid { why: why() },
            PublishErrorKind::HeldBack => Self::HeldBack,
        }
    }
}
