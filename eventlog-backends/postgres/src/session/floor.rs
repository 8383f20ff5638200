//! The settled floor: up to where everything has been seen.
//!
//! Ids are handed out before their transactions commit, so an id below those read may still appear. What is read is
//! known to be complete up to the id that was the last handed out at some time, once every transaction that was writing
//! at that time is over: an INSERT takes its lock on the table before its id. So first the position is read, then who
//! holds such a lock.
//!
//! All of it rests on a sequence that only goes forward, by one. One that was set back (`TRUNCATE .. RESTART IDENTITY`, a
//! restore) is noticed by the next look, and everything is read again. One of which connections keep ids in store (`CACHE`)
//! has no floor: everything is read each time.

use postrider_core::clock::{Moment, Timestamp};
use std::time::Duration;

/// How far due times are looked for behind the floor: a step of the server's clock that is smaller goes unnoticed.
const CLOCK_MARGIN_MICROS: i64 = 250_000;
/// Between two looks, after settles.
const PROBE_EVERY: Duration = Duration::from_millis(200);
/// For a claim, whether anything was settled or not: somebody may have set the sequence back.
const PROBE_ANYWAY: Duration = Duration::from_secs(1);
/// While transactions of the look before are still open.
const PROBE_AGAIN: Duration = Duration::from_millis(20);

/// Who was writing: a transaction, and its number once it has one.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Writer {
    pub(super) transaction: String,
    pub(super) number: Option<String>,
}

impl Writer {
    /// A transaction that has been prepared for a commit in two phases goes on under another name.
    fn is_prepared(&self) -> bool {
        self.transaction.starts_with("-1/")
    }

    fn is_among(&self, others: &[Self]) -> bool {
        others.iter().any(|other| {
            other.transaction == self.transaction
                || other.is_prepared() && self.number.as_ref().is_none_or(|n| other.transaction[3..] == *n)
        })
    }
}

/// What a look found.
#[derive(Debug, Clone)]
pub(super) struct Look {
    /// The last id handed out.
    pub(super) position: i64,
    pub(super) time: Timestamp,
    /// When the server was started: positions are forgotten by a crash.
    pub(super) server: String,
    /// Whether connections keep ids in store, which they use when others have long used higher ones.
    pub(super) is_cached: bool,
    pub(super) writers: Vec<Writer>,
}

#[derive(Debug, Default)]
pub(super) struct Floor {
    server: Option<String>,
    /// Every id up to here is visible or never will be.
    position: i64,
    /// Every due time up to here likewise.
    time: Option<Timestamp>,
    /// What holds once its writers are gone.
    pending: Option<Look>,
    looked_at: Option<Moment>,
    /// Whether something was settled since, and left dead rows behind.
    is_stale: bool,
}

impl Floor {
    pub(super) fn settled(&mut self) {
        self.is_stale = true;
    }

    /// How long until it is worth to look again; `None` if it is not.
    pub(super) fn due_in(&self, now: Moment) -> Option<Duration> {
        let Some(looked_at) = self.looked_at else {
            return Some(Duration::ZERO);
        };
        let every = if self.pending.is_some() {
            PROBE_AGAIN
        } else {
            PROBE_EVERY
        };
        self.is_stale.then(|| (looked_at + every).saturating_sub(now))
    }

    /// How long until a session that has nothing else to do should look again.
    pub(super) fn tidy_in(&self, now: Moment) -> Option<Duration> {
        self.due_in(now).filter(|_| self.pending.is_none())
    }

    /// Whether a claim should look.
    pub(super) fn is_due(&self, now: Moment) -> bool {
        self.due_in(now).is_some_and(|left| left.is_zero()) || self.looked_at.is_some_and(|at| at + PROBE_ANYWAY <= now)
    }

    /// Takes what was found. `false` if the server is another one than before, or has lost what it had handed out: then
    /// nothing that was known holds.
    pub(super) fn found(&mut self, mut look: Look, now: Moment) -> bool {
        if look.is_cached && self.position == 0 {
            look.position = 0;
            self.pending = self.pending.take().filter(|pending| pending.position == 0);
        }
        let is_same = self.server.as_ref().is_none_or(|server| *server == look.server);
        let pending = self.pending.as_ref().map_or(0, |pending| pending.position);
        if !is_same || look.position < self.position.max(pending) || look.is_cached && look.position > 0 {
            *self = Self::default();
            return false;
        }
        self.server = Some(look.server.clone());
        self.looked_at = Some(now);
        self.is_stale = false;
        if let Some(pending) = self.pending.take() {
            if pending.writers.iter().any(|writer| writer.is_among(&look.writers)) {
                self.pending = Some(pending);
                self.is_stale = true;
                return true;
            }
            self.reach(&pending);
        }
        if look.writers.is_empty() {
            self.reach(&look);
        } else {
            self.pending = Some(look);
            self.is_stale = true;
        }
        true
    }

    /// The server's clock has gone back: what was known of times does not hold.
    pub(super) fn forget_time(&mut self) {
        self.time = None;
        self.pending = None;
        self.looked_at = None;
    }

    fn reach(&mut self, look: &Look) {
        self.position = self.position.max(look.position);
        let time = look.time.timestamp_micros().saturating_sub(CLOCK_MARGIN_MICROS);
        self.time = Timestamp::from_timestamp_micros(time);
    }

    pub(super) fn position(&self) -> i64 {
        self.position
    }

    pub(super) fn time(&self) -> Option<Timestamp> {
        self.time
    }
}
