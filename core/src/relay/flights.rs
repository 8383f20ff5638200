//! What is with the client, by topic: so that a destination that does not answer delays only its own topic.

use super::held::Place;
use crate::{Topic, clock::Moment};
use rustc_hash::FxHashMap;
use std::{collections::VecDeque, time::Duration};

/// A topic of which nothing has been answered for so long, though others sent later were, is silent: no more of it is sent.
const SILENT: Duration = Duration::from_millis(100);
/// After so long its messages wait in the log, and it counts as paused.
const PAUSED: Duration = Duration::from_secs(1);
/// Between looks.
const LOOKS: Duration = Duration::from_millis(25);

/// Messages with the client, and topics among them that are silent.
#[derive(Debug, Default)]
pub(super) struct Flights {
    all: Vec<(Topic, Flight)>,
    places: FxHashMap<Topic, usize>,
    /// The one that was asked for last: mostly it is the next one, too.
    hint: usize,
    /// When the newest of the answered messages was sent.
    newest_answered: Moment,
    looked_at: Moment,
    silent_topics: usize,
    silent: usize,
    silent_bytes: usize,
}

#[derive(Debug)]
struct Flight {
    messages: usize,
    bytes: usize,
    /// Since when something of it is with the client and nothing has been answered.
    since: Moment,
    is_silent: bool,
    /// What is not sent while it is silent.
    held: VecDeque<Place>,
}

/// How a message came back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum How {
    /// The broker answered.
    Answered,
    /// The client says that the connection was lost, or did not try.
    Lost,
    /// Nobody said anything in time.
    TimedOut,
}

/// What a topic's silence asks for.
pub(super) struct Overdue {
    pub(super) topic: Topic,
    pub(super) held: VecDeque<Place>,
    pub(super) silent_for: Duration,
}

impl Flights {
    fn find(&mut self, topic: &Topic) -> Option<usize> {
        if self.all.get(self.hint).is_none_or(|(hinted, _)| hinted != topic) {
            self.hint = *self.places.get(topic)?;
        }
        Some(self.hint)
    }

    fn get_mut(&mut self, topic: &Topic) -> Option<&mut Flight> {
        let at = self.find(topic)?;
        self.all.get_mut(at).map(|(_, flight)| flight)
    }

    /// Messages are handed to the client.
    pub(super) fn sent(&mut self, topic: &Topic, messages: usize, bytes: usize, now: Moment) {
        if self.find(topic).is_none() {
            self.hint = self.all.len();
            self.places.insert(topic.clone(), self.hint);
            let flight = Flight {
                messages: 0,
                bytes: 0,
                since: now,
                is_silent: false,
                held: VecDeque::new(),
            };
            self.all.push((topic.clone(), flight));
        }
        let flight = &mut self.all[self.hint].1;
        if flight.messages == 0 {
            flight.since = now;
        }
        flight.messages += messages;
        flight.bytes += bytes;
        if flight.is_silent {
            self.silent += messages;
            self.silent_bytes += bytes;
        }
    }

    /// The client has given its outcome. Whether some of the topic is [kept](Self::take_held) that may be sent again.
    pub(super) fn ended(&mut self, topic: &Topic, bytes: usize, sent_at: Moment, now: Moment, how: How) -> bool {
        let Some(at) = self.find(topic) else { return false };
        let flight = &mut self.all[at].1;
        if how == How::Answered {
            self.newest_answered = self.newest_answered.max(sent_at);
            flight.since = now;
        }
        flight.messages -= 1;
        flight.bytes -= bytes;
        if flight.is_silent {
            self.silent -= 1;
            self.silent_bytes -= bytes;
            if how != How::TimedOut {
                flight.is_silent = false;
                self.silent_topics -= 1;
                self.silent -= flight.messages;
                self.silent_bytes -= flight.bytes;
            }
        }
        let frees = !flight.held.is_empty() && (!flight.is_silent || flight.messages == 0);
        // Few topics stay in the table, of many that come and go.
        if flight.messages == 0 && !flight.is_silent && !frees && self.all.len() > 64 {
            self.forget(at);
        }
        frees
    }

    fn forget(&mut self, at: usize) {
        let (topic, flight) = self.all.swap_remove(at);
        self.silent_topics -= usize::from(flight.is_silent);
        self.places.remove(&topic);
        if let Some((moved, _)) = self.all.get(at) {
            self.places.insert(moved.clone(), at);
        }
    }

    /// Whether nothing more of a topic is to be sent just now: then `place` is kept for later.
    pub(super) fn holds(&mut self, topic: &Topic, place: Place) -> bool {
        if self.silent_topics == 0 {
            return false;
        }
        match self.get_mut(topic) {
            Some(flight) if flight.is_silent && flight.messages > 0 => {
                flight.held.push_back(place);
                true
            }
            // Nothing of it is with the client that could be answered: the next message finds out.
            Some(flight) if flight.is_silent => {
                flight.is_silent = false;
                self.silent_topics -= 1;
                false
            }
            _ => false,
        }
    }

    /// Whether others are answered while this topic is not.
    pub(super) fn is_silent(&self, topic: &Topic, now: Moment) -> bool {
        let flight = self.places.get(topic).and_then(|at| self.all.get(*at));
        flight.is_some_and(|(_, flight)| flight.is_silent || flight.falls_silent(self.newest_answered, now))
    }

    /// A message of the topic was not answered in time: until one is, what is with the client of it keeps nobody waiting.
    pub(super) fn mark_silent(&mut self, topic: &Topic) {
        let Some(at) = self.find(topic) else { return };
        let flight = &mut self.all[at].1;
        if !flight.is_silent {
            flight.is_silent = true;
            self.silent_topics += 1;
            self.silent += flight.messages;
            self.silent_bytes += flight.bytes;
        }
    }

    /// Looks for topics that have fallen silent, and gives those that were for long, or hold more than `room`.
    pub(super) fn look(&mut self, now: Moment, room: usize) -> Vec<Overdue> {
        let mut overdue = Vec::new();
        if self.all.len() < 2 || now < self.looked_at.saturating_add(LOOKS) {
            return overdue;
        }
        self.looked_at = now;
        for (topic, flight) in &mut self.all {
            if !flight.is_silent && flight.falls_silent(self.newest_answered, now) {
                flight.is_silent = true;
                self.silent_topics += 1;
                self.silent += flight.messages;
                self.silent_bytes += flight.bytes;
            }
            let silent_for = now.saturating_sub(flight.since);
            if flight.is_silent && flight.messages > 0 && (silent_for >= PAUSED || flight.held.len() > room) {
                overdue.push(Overdue {
                    topic: topic.clone(),
                    held: std::mem::take(&mut flight.held),
                    silent_for,
                });
            }
        }
        overdue
    }

    /// How many messages are with the client whose topics are silent: nobody waits for them.
    pub(super) fn silent(&self) -> usize {
        self.silent
    }

    /// Their bytes.
    pub(super) fn silent_bytes(&self) -> usize {
        self.silent_bytes
    }

    /// Takes what is kept for later of `topic`.
    pub(super) fn take_held(&mut self, topic: &Topic) -> VecDeque<Place> {
        let flight = self.get_mut(topic);
        flight
            .map(|flight| std::mem::take(&mut flight.held))
            .unwrap_or_default()
    }

    /// Takes all that is kept for later.
    pub(super) fn take_all_held(&mut self) -> Vec<Place> {
        let idle = |(_, flight): &(Topic, Flight)| flight.messages == 0 && flight.held.is_empty();
        while let Some(at) = self.all.iter().position(idle) {
            self.forget(at);
        }
        self.all
            .iter_mut()
            .flat_map(|(_, flight)| flight.held.drain(..))
            .collect()
    }
}

impl Flight {
    fn falls_silent(&self, newest_answered: Moment, now: Moment) -> bool {
        self.messages > 0 && newest_answered > self.since && now.saturating_sub(self.since) >= SILENT
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn ms(n: u64) -> Moment {
        Moment::ZERO + Duration::from_millis(n)
    }

    #[test]
    fn a_topic_is_silent_while_others_are_answered() {
        let (bad, good) = (Topic::new("bad"), Topic::new("good"));
        let mut flights = Flights::default();
        flights.sent(&bad, 1, 5, ms(1));
        flights.sent(&good, 1, 1, ms(1));
        assert!(!flights.ended(&good, 1, ms(1), ms(2), How::Answered));
        assert!(flights.look(ms(200), 10).is_empty());
        assert_eq!(
            flights.silent(),
            0,
            "nothing sent later was answered: the broker may be slow"
        );

        flights.sent(&good, 1, 1, ms(201));
        flights.ended(&good, 1, ms(201), ms(202), How::Answered);
        assert!(flights.is_silent(&bad, ms(202)) && !flights.is_silent(&good, ms(202)));
        assert!(flights.look(ms(240), 10).is_empty());
        assert_eq!((flights.silent(), flights.silent_bytes()), (1, 5));
        assert!(flights.holds(&bad, 7) && !flights.holds(&good, 8));

        let overdue = flights.look(ms(1200), 10);
        assert_eq!((overdue.len(), overdue[0].held.len()), (1, 1));
        assert!(flights.holds(&bad, 9));
        assert!(flights.ended(&bad, 5, ms(1), ms(1300), How::Answered));
        assert_eq!(flights.take_held(&bad), [9]);
        assert_eq!((flights.silent(), flights.silent_bytes()), (0, 0));
        assert!(!flights.holds(&bad, 7));
    }

    #[test]
    fn a_topic_alone_is_never_silent() {
        let topic = Topic::new("slow");
        let mut flights = Flights::default();
        for n in 1..100 {
            flights.sent(&topic, 1, 1, ms(n * 300));
            flights.sent(&topic, 1, 1, ms(n * 300));
            flights.ended(&topic, 1, ms(n * 300), ms((n + 1) * 300), How::Answered);
            assert!(flights.look(ms((n + 1) * 300), 10).is_empty());
        }
        assert_eq!(flights.silent(), 0);
    }
}
