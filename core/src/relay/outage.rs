//! What is away: the broker, or the destination of a topic.

use crate::{PublishError, Topic, clock::Moment};
use std::{collections::BTreeMap, time::Duration};

/// The first wait before a probe.
const FIRST: Duration = Duration::from_millis(100);

/// Waits that double up to a bound, with jitter so that many relays do not probe at once.
#[derive(Debug, Clone, Copy)]
pub(super) struct Probing {
    wait: Duration,
    max: Duration,
}

impl Probing {
    pub(super) fn new(max: Duration) -> Self {
        Self {
            wait: FIRST.min(max),
            max,
        }
    }

    pub(super) fn next(&mut self, rng: &mut fastrand::Rng) -> Duration {
        let wait = self.wait;
        self.wait = self.wait.saturating_mul(2).min(self.max);
        wait / 2 + (wait / 2).mul_f64(rng.f64())
    }
}

/// The connection to the broker.
#[derive(Debug)]
pub(super) enum Link {
    /// Nothing is known against it.
    Up,
    /// Lost: to be probed at that time.
    Down { probe_at: Moment },
    /// Being probed.
    Checking,
    /// Back: at most `window` messages at once, doubling with each success.
    Slow {
        window: usize,
        /// Whether a loss may be blamed on a single message in flight: the broker was seen to answer.
        may_blame: bool,
    },
}

impl Link {
    /// The most messages that may be with the client.
    pub(super) fn window(&self) -> usize {
        match self {
            Self::Up => usize::MAX,
            Self::Down { .. } | Self::Checking => 0,
            Self::Slow { window, .. } => *window,
        }
    }
}

/// A topic whose destination is away.
#[derive(Debug)]
struct Paused {
    probing: Probing,
    probe: Probe,
    why: String,
    is_unroutable: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Probe {
    /// To be sent at that time.
    At(Moment),
    /// The log has been asked for a message; asked again if none has come by then.
    Asked(Moment),
    /// With the client.
    Out,
}

/// How long to wait for the log to give the message it was asked for as a probe.
const ASK_AGAIN: Duration = Duration::from_secs(5);

/// The topics whose destinations are away, and those that are back and have records waiting in the log.
#[derive(Debug)]
pub(super) struct Destinations {
    paused: BTreeMap<Topic, Paused>,
    /// To be resumed, in batches.
    pub(super) resuming: Vec<Topic>,
    max_probe_interval: Duration,
}

impl Destinations {
    pub(super) fn new(max_probe_interval: Duration) -> Self {
        Self {
            paused: BTreeMap::new(),
            resuming: Vec::new(),
            max_probe_interval,
        }
    }

    /// Whether a message of this topic may be sent now, and whether it is the probe of a paused one.
    pub(super) fn may_send(&mut self, topic: &Topic, now: Moment) -> Option<bool> {
        if self.paused.is_empty() {
            return Some(false);
        }
        let Some(paused) = self.paused.get_mut(topic) else {
            return Some(false);
        };
        let may = match paused.probe {
            Probe::At(at) => at <= now,
            Probe::Asked(_) => true,
            Probe::Out => false,
        };
        may.then(|| {
            paused.probe = Probe::Out;
            true
        })
    }

    /// Messages of the topic are with the client and not answered while others are: they are its probe. `true` if it was
    /// not paused before.
    pub(super) fn fall_silent(&mut self, topic: &Topic, why: &str) -> bool {
        if self.paused.contains_key(topic) {
            return false;
        }
        let paused = Paused {
            probing: Probing::new(self.max_probe_interval),
            probe: Probe::Out,
            why: why.to_owned(),
            is_unroutable: false,
        };
        self.paused.insert(topic.clone(), paused);
        self.resuming.retain(|t| t != topic);
        true
    }

    /// A message of the topic was refused by its destination. `true` if it was not paused before.
    pub(super) fn pause(&mut self, topic: &Topic, error: &PublishError, now: Moment, rng: &mut fastrand::Rng) -> bool {
        let new = !self.paused.contains_key(topic);
        let probing = Probing::new(self.max_probe_interval);
        let paused = self.paused.entry(topic.clone()).or_insert_with(|| Paused {
            probing,
            probe: Probe::Out,
            why: String::new(),
            is_unroutable: false,
        });
        // Several messages of one batch are refused at once: that is one failed probe, not many.
        if paused.probe == Probe::Out {
            paused.probe = Probe::At(now + paused.probing.next(rng));
        }
        paused.why = crate::error::chain(error);
        paused.is_unroutable = error.is_unroutable();
        self.resuming.retain(|t| t != topic);
        new
    }

    /// The log holds records that wait for this topic, and nobody knows why: probe at once.
    pub(super) fn found_waiting(&mut self, topic: Topic, now: Moment) {
        let probing = Probing::new(self.max_probe_interval);
        self.paused.entry(topic).or_insert_with(|| Paused {
            probing,
            probe: Probe::At(now),
            why: "records were found waiting for it".to_owned(),
            is_unroutable: false,
        });
    }

    /// The destination answered. `true` if it was paused: its records are to be resumed.
    pub(super) fn answered(&mut self, topic: &Topic) -> bool {
        if self.paused.is_empty() || self.paused.remove(topic).is_none() {
            return false;
        }
        self.resume(topic);
        true
    }

    /// More of it may wait in the log, unless it is away again.
    pub(super) fn resume(&mut self, topic: &Topic) {
        if !self.paused.contains_key(topic) && !self.resuming.contains(topic) {
            self.resuming.push(topic.clone());
        }
    }

    /// The probe did not reach the broker: it says nothing about the destination.
    pub(super) fn probe_lost(&mut self, topic: &Topic, now: Moment) {
        if let Some(paused) = self.paused.get_mut(topic) {
            paused.probe = Probe::At(now);
        }
    }

    /// The log was asked for a probe and nothing waits: forgets the topic, unless something of it was sent or parked since.
    pub(super) fn forget_asked(&mut self, topic: &Topic) -> bool {
        let paused = self.paused.get(topic);
        paused.is_some_and(|paused| matches!(paused.probe, Probe::Asked(_))) && self.paused.remove(topic).is_some()
    }

    /// A topic for whose probe the log is to be asked; it counts as asked from now on.
    ///
    /// `may` says which topics: those whose parkings are all written.
    pub(super) fn ask_for_probe(&mut self, now: Moment, may: impl Fn(&Topic) -> bool) -> Option<Topic> {
        let due = |p: &Paused| matches!(p.probe, Probe::At(at) | Probe::Asked(at) if at <= now);
        let (topic, paused) = self.paused.iter_mut().find(|(topic, p)| due(p) && may(topic))?;
        paused.probe = Probe::Asked(now + ASK_AGAIN);
        Some(topic.clone())
    }

    pub(super) fn next_probe(&self) -> Option<Moment> {
        let at = |p: &Paused| match p.probe {
            Probe::At(at) | Probe::Asked(at) => Some(at),
            Probe::Out => None,
        };
        self.paused.values().filter_map(at).min()
    }

    pub(super) fn list(&self) -> Vec<(Topic, String)> {
        self.paused
            .iter()
            .map(|(topic, p)| (topic.clone(), p.why.clone()))
            .collect()
    }

    /// Whether a topic is among them that leads nowhere.
    pub(super) fn any_unroutable(&self) -> bool {
        self.paused.values().any(|paused| paused.is_unroutable)
    }

    /// The lease is lost: whoever has it now finds the waiting records itself.
    pub(super) fn clear(&mut self) {
        self.paused.clear();
        self.resuming.clear();
    }
}
