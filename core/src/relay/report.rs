use crate::{
    Topic,
    health::{PartState, Status, Trouble},
};
use std::sync::{
    Arc, Mutex, PoisonError,
    atomic::{AtomicU64, Ordering},
};

/// How a relay is doing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct RelayReport {
    /// What it has done since it was started.
    pub counts: Counts,
    /// Why the broker counts as away, while it does.
    pub broker_away: Option<String>,
    /// Why the log counts as away, while it does.
    pub log_away: Option<String>,
    /// The topics whose destination is away, and why.
    pub paused_topics: Vec<(Topic, String)>,
}

impl RelayReport {
    /// Whether nothing is away.
    #[must_use]
    pub fn is_healthy(&self) -> bool {
        self.broker_away.is_none() && self.log_away.is_none() && self.paused_topics.is_empty()
    }
}

/// What a relay has done.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Counts {
    /// Claimed records, repeated ones included.
    pub claimed: u64,
    /// Messages the broker confirmed.
    pub published: u64,
    /// Messages dropped because their topic leads nowhere and says so.
    pub dropped: u64,
    /// Tries that were refused.
    pub refused: u64,
    /// Records that became dead letters.
    pub failed: u64,
    /// Records whose lease was lost before they were settled: others may publish them once more.
    pub lost: u64,
}

/// What to do about a topic that leads nowhere.
const UNROUTABLE: &str = "no group wants the topic yet: declare the group that is to have it (`bus.declare::<E>(group)`), \
    or say `unroutable = \"drop\"` for the topic; its messages wait in the log until then";

/// Where the engine writes it down.
#[derive(Debug)]
pub(crate) struct Reporter {
    pub(super) claimed: AtomicU64,
    pub(super) published: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) lost: AtomicU64,
    away: Mutex<Away>,
    status: Arc<Status>,
}

#[derive(Debug, Default)]
struct Away {
    broker: Option<String>,
    log: Option<String>,
    topics: Vec<(Topic, String)>,
}

impl Reporter {
    pub(crate) fn new(status: Arc<Status>) -> Self {
        let counter = AtomicU64::default;
        Self {
            claimed: counter(),
            published: counter(),
            dropped: counter(),
            refused: counter(),
            failed: counter(),
            lost: counter(),
            away: Mutex::default(),
            status,
        }
    }

    pub(crate) fn status(&self) -> &Arc<Status> {
        &self.status
    }

    pub(super) fn count(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    pub(super) fn broker_away(&self, why: Option<String>) {
        self.tell(Trouble::Broker, why.as_deref(), None);
        self.away().broker = why;
    }

    fn tell(&self, trouble: Trouble, why: Option<&str>, fix: Option<&str>) {
        match why {
            Some(why) => self.status.raise(trouble, PartState::Degraded, why.to_owned(), fix),
            None => {
                self.status.clear(trouble);
            }
        }
    }

    /// Whether it was away until now.
    pub(super) fn broker_is_back(&self) -> bool {
        self.status.clear(Trouble::Broker);
        self.away().broker.take().is_some()
    }

    pub(crate) fn log_away(&self, why: Option<String>) {
        self.tell(Trouble::Log, why.as_deref(), None);
        self.away().log = why;
    }

    pub(super) fn topics_away(&self, topics: Vec<(Topic, String)>, are_unroutable: bool) {
        let why = topics.first().map(|(topic, why)| match topics.len() {
            1 => format!("topic `{topic}` is paused: {why}"),
            n => format!("{n} topics are paused, `{topic}` among them: {why}"),
        });
        let fix = are_unroutable.then_some(UNROUTABLE);
        self.tell(Trouble::Destinations, why.as_deref(), fix);
        self.away().topics = topics;
    }

    fn away(&self) -> std::sync::MutexGuard<'_, Away> {
        self.away.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn report(&self) -> RelayReport {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        let away = self.away();
        RelayReport {
            counts: Counts {
                claimed: read(&self.claimed),
                published: read(&self.published),
                dropped: read(&self.dropped),
                refused: read(&self.refused),
                failed: read(&self.failed),
                lost: read(&self.lost),
            },
            broker_away: away.broker.clone(),
            log_away: away.log.clone(),
            paused_topics: away.topics.clone(),
        }
    }
}
