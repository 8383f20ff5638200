use crate::Topic;
use std::sync::{
    Mutex, PoisonError,
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

/// Where the engine writes it down.
#[derive(Debug, Default)]
pub(crate) struct Reporter {
    pub(super) claimed: AtomicU64,
    pub(super) published: AtomicU64,
    pub(super) dropped: AtomicU64,
    pub(super) refused: AtomicU64,
    pub(super) failed: AtomicU64,
    pub(super) lost: AtomicU64,
    away: Mutex<Away>,
}

#[derive(Debug, Default)]
struct Away {
    broker: Option<String>,
    log: Option<String>,
    topics: Vec<(Topic, String)>,
}

impl Reporter {
    pub(super) fn count(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }

    pub(super) fn broker_away(&self, why: Option<String>) {
        self.away().broker = why;
    }

    /// Whether it was away until now.
    pub(super) fn broker_is_back(&self) -> bool {
        self.away().broker.take().is_some()
    }

    pub(super) fn log_away(&self, why: Option<String>) {
        self.away().log = why;
    }

    pub(super) fn topics_away(&self, topics: Vec<(Topic, String)>) {
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
