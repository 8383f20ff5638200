//! The health of a bus, part by part.

use crate::{
    GroupName, Mailbox,
    clock::{Clock, Timestamp},
};
use std::{
    collections::BTreeMap,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// The health of a bus, as [`Bus::health`](crate::Bus::health) answers it: for liveness and readiness probes, and to show.
///
/// Outages that the bus is built to ride out (of the broker, a destination, the log, a service that handlers need) make a
/// part [degraded](PartState::Degraded), never the bus not live.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Health {
    /// Whether the process is worth keeping: nothing has failed that only a restart of the process mends.
    pub live: bool,
    /// Whether the bus takes events: it has been started, is not shutting down, and its event log answers.
    pub ready: bool,
    /// Every part: the log, the broker, the relay of each mailbox, each subscription, each background task.
    pub parts: Vec<PartHealth>,
}

impl Health {
    /// The part, if the bus has it.
    #[must_use]
    pub fn part(&self, part: &Part) -> Option<&PartHealth> {
        self.parts.iter().find(|health| health.part == *part)
    }
    /// The worst state of a part.
    #[must_use]
    pub fn worst(&self) -> PartState {
        let states = self.parts.iter().map(|part| part.state);
        states.max().unwrap_or(PartState::Running)
    }
}

/// A part of a bus.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Part {
    /// The event log.
    Log,
    /// The broker.
    Broker,
    /// The relay of a mailbox: the outbox, or the inbox of a group.
    Relay(Mailbox),
    /// The subscription of a group.
    Subscription(GroupName),
    /// A background task of the application's, or of the bus.
    Task(String),
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Log => f.write_str("event log"),
            Self::Broker => f.write_str("broker"),
            Self::Relay(mailbox) => write!(f, "relay of {mailbox}"),
            Self::Subscription(group) => write!(f, "subscription of {group}"),
            Self::Task(name) => write!(f, "task {name}"),
        }
    }
}

/// The state of a part, from best to worst.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[non_exhaustive]
pub enum PartState {
    /// It works.
    Running,
    /// It was stopped, or has done its work.
    Stopped,
    /// It was paused by a person.
    Paused,
    /// It has not been connected yet.
    Connecting,
    /// Something it needs is away, or it has been restarted: it continues by itself.
    Degraded,
    /// It has ended by a defect and does not continue.
    Failed,
}

/// The health of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartHealth {
    /// The part.
    pub part: Part,
    /// Its state.
    pub state: PartState,
    /// The time since which it has been in that state.
    pub since: Timestamp,
    /// Its last error; one that is over is kept.
    pub error: Option<PartError>,
}

/// An error of a part.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct PartError {
    /// When it began.
    pub at: Timestamp,
    /// What went wrong.
    pub text: String,
    /// What to do about it, where a person can do something.
    pub fix: Option<String>,
}

/// What may be wrong with a part; several things at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Trouble {
    /// It panicked.
    Crash,
    /// The log is away.
    Log,
    /// The broker is away.
    Broker,
    /// Destinations of topics are away.
    Destinations,
    /// A service that handlers need is away.
    Services,
    /// The broker does not let the group, or this member of it, take anything: rights, or settings that do not match.
    Group,
    /// The broker does not take outcomes.
    Outcomes,
    /// The broker has deleted what the group had not read.
    Missed,
    /// The members of the group disagree about what they handle.
    Members,
}

/// What is known of a part: written by the part, read by whoever asks for its health.
#[derive(Debug)]
pub(crate) struct Status {
    part: Part,
    clock: Arc<dyn Clock>,
    state: Mutex<State>,
}

#[derive(Debug)]
struct State {
    /// Its state but for troubles, since when.
    base: (PartState, Timestamp),
    troubles: BTreeMap<Trouble, (PartState, Timestamp)>,
    last: Option<PartError>,
}

impl Status {
    pub(crate) fn new(part: Part, clock: Arc<dyn Clock>, base: PartState) -> Arc<Self> {
        let state = State {
            base: (base, clock.now()),
            troubles: BTreeMap::new(),
            last: None,
        };
        Arc::new(Self {
            part,
            clock,
            state: Mutex::new(state),
        })
    }

    pub(crate) fn part(&self) -> &Part {
        &self.part
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its state but for troubles.
    pub(crate) fn is(&self, base: PartState) {
        let mut state = self.state();
        if state.base.0 != base {
            state.base = (base, self.clock.now());
        }
    }

    /// Something is wrong: from now on, or still.
    pub(crate) fn raise(&self, trouble: Trouble, means: PartState, text: String, fix: Option<&str>) {
        let now = self.clock.now();
        let mut state = self.state();
        let (of, since) = state.troubles.entry(trouble).or_insert((means, now));
        *of = means;
        let at = *since;
        let fix = fix.map(str::to_owned);
        state.last = Some(PartError { at, text, fix });
    }

    /// It is not wrong any more. Says whether it was.
    pub(crate) fn clear(&self, trouble: Trouble) -> bool {
        let mut state = self.state();
        let was = state.troubles.remove(&trouble).is_some();
        if was {
            state.base.1 = self.clock.now();
        }
        was
    }

    /// Since when this has been wrong, if it is.
    pub(crate) fn has(&self, trouble: Trouble) -> Option<Timestamp> {
        self.state().troubles.get(&trouble).map(|(_, since)| *since)
    }

    pub(crate) fn health(&self) -> PartHealth {
        let state = self.state();
        // What was stopped has no troubles any more.
        let worst = match state.base.0 {
            PartState::Stopped => None,
            _ => state.troubles.values().max_by_key(|(means, _)| *means),
        };
        let (means, since) = match worst {
            Some(worst) if worst.0 > state.base.0 => *worst,
            _ => state.base,
        };
        PartHealth {
            part: self.part.clone(),
            state: means,
            since,
            error: state.last.clone(),
        }
    }
}

/// The parts of a bus.
#[derive(Debug, Default)]
pub(crate) struct Board {
    parts: Mutex<BTreeMap<Part, Arc<Status>>>,
}

impl Board {
    /// Shows a part; one of the same name that was there before has ended.
    pub(crate) fn show(&self, status: Arc<Status>) {
        let mut parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
        parts.insert(status.part.clone(), status);
    }

    /// Every part, and the log and the broker as the parts see them.
    pub(crate) fn parts(&self, has_log: bool, began: Timestamp) -> Vec<PartHealth> {
        let statuses: Vec<Arc<Status>> = {
            let parts = self.parts.lock().unwrap_or_else(PoisonError::into_inner);
            parts.values().cloned().collect()
        };
        let mut all: Vec<PartHealth> = statuses.iter().map(|status| status.health()).collect();
        let shared = [
            (Part::Broker, Trouble::Broker, true),
            (Part::Log, Trouble::Log, has_log),
        ];
        for (part, trouble, exists) in shared {
            if !exists {
                continue;
            }
            let seen = statuses
                .iter()
                .filter_map(|status| Some((status.has(trouble)?, status)));
            let health = match seen.min_by_key(|(since, _)| *since) {
                None => PartHealth {
                    part,
                    state: PartState::Running,
                    since: began,
                    error: None,
                },
                Some((since, status)) => PartHealth {
                    part,
                    state: PartState::Degraded,
                    since,
                    error: status.health().error,
                },
            };
            all.insert(0, health);
        }
        all
    }
}
