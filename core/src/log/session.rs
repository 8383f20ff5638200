use super::{AttemptError, Lease, Owner, Record, RecordTag};
use crate::{Result, Topic, clock::bounded};
use async_trait::async_trait;
use std::{fmt::Debug, sync::Arc, time::Duration};

/// How a session is opened.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct SessionOptions {
    /// Who it is: fresh for each session.
    pub owner: Owner,
    /// How long the others must wait after this process fell silent; at least [`Lease::SHORTEST`]. 15 s by default.
    pub lease: Duration,
    /// Whether records that succeeded are kept in the history, or deleted. Kept by default.
    pub keep_succeeded: bool,
    /// How long it may take until [`Session::wait`] notices what another process has written. 500 ms by default.
    pub poll_interval: Duration,
}

impl SessionOptions {
    /// A session of `owner` with the default lease, which keeps what succeeded.
    #[must_use]
    pub fn new(owner: Owner) -> Self {
        Self {
            owner,
            lease: Duration::from_secs(15),
            keep_succeeded: true,
            poll_interval: Duration::from_millis(500),
        }
    }
    /// Sets the lease.
    #[must_use]
    pub fn with_lease(mut self, lease: Duration) -> Self {
        self.lease = bounded(lease);
        self
    }
    /// Sets whether records that succeeded are kept.
    #[must_use]
    pub fn with_keep_succeeded(mut self, keep: bool) -> Self {
        self.keep_succeeded = keep;
        self
    }
    /// Sets how long it may take until it is noticed what another process has written.
    #[must_use]
    pub fn with_poll_interval(mut self, interval: Duration) -> Self {
        self.poll_interval = bounded(interval);
        self
    }
}

/// What to claim.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Claim {
    /// The most records to give.
    pub max: usize,
    /// The most runs of parked records among them, so that retries do not starve what is new.
    pub max_parked: usize,
    /// How many bytes of payload to give: nothing more is given once so many are.
    pub max_bytes: usize,
}

impl Claim {
    /// Up to `max` records, of which all may have been parked.
    #[must_use]
    pub fn new(max: usize) -> Self {
        Self {
            max,
            max_parked: max,
            max_bytes: usize::MAX,
        }
    }
    /// Limits the runs of parked records.
    #[must_use]
    pub fn with_max_parked(mut self, max: usize) -> Self {
        self.max_parked = max;
        self
    }
    /// Limits the bytes of payload.
    #[must_use]
    pub fn with_max_bytes(mut self, bytes: usize) -> Self {
        self.max_bytes = bytes;
        self
    }
}

/// What a claim gave.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Claimed {
    /// The records: for each key a contiguous run from its head, in order.
    pub records: Vec<Record>,
    /// The lease they are held under; not held, and no records, while somebody else has the mailbox.
    pub lease: Lease,
    /// How long until something that waits becomes due; `None` if nothing waits for a time.
    pub next_due: Option<Duration>,
    /// Topics with records that [wait for them](Until::Resumed) which this session has come to hold since the claim
    /// before: nobody else will resume them.
    pub waiting: Vec<Topic>,
}

impl Claimed {
    /// Nothing, under `lease`.
    #[must_use]
    pub fn empty(lease: Lease) -> Self {
        Self {
            records: Vec::new(),
            lease,
            next_due: None,
            waiting: Vec::new(),
        }
    }
}

/// A record and what became of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Settled {
    /// Which record.
    pub tag: RecordTag,
    /// What became of it.
    pub outcome: Outcome,
}

/// What became of a record.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Outcome {
    /// Confirmed by the broker, or handled.
    Done,
    /// Refused, to be tried again: it leaves the hot table and keeps its place; later ones of its key wait behind it.
    Parked(Parking),
    /// A dead letter.
    Failed {
        /// The attempts counted.
        attempts: u32,
        /// Errors to add to those kept.
        errors: Vec<AttemptError>,
        /// Whether later ones of its key wait until a person has redriven or discarded it.
        hold_key: bool,
    },
    /// Not attempted: given back as it was, in its place. Behind a parked one of its key it waits with it.
    Released,
}

/// How a record is parked.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Parking {
    /// What it waits for.
    pub until: Until,
    /// The attempts counted so far, stored with it.
    pub attempts: u32,
    /// Errors to add to those kept.
    pub errors: Vec<AttemptError>,
    /// Stored as parked, and still held by this session, which will settle it again: the local tier of retries. A claim
    /// does not give it, nor anything of its key, until then.
    pub keep: bool,
}

impl Parking {
    /// Parked until `until`, and not kept. A wait is at most [`LONGEST`](crate::clock::LONGEST).
    #[must_use]
    pub fn new(until: Until, attempts: u32, errors: Vec<AttemptError>) -> Self {
        let until = match until {
            Until::After(wait) => Until::After(bounded(wait)),
            Until::Resumed => Until::Resumed,
        };
        Self {
            until,
            attempts,
            errors,
            keep: false,
        }
    }
    /// Keeps it in this session's hands.
    #[must_use]
    pub fn kept(mut self) -> Self {
        self.keep = true;
        self
    }
}

/// What a parked record waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Until {
    /// For this long, by the log's clock.
    After(Duration),
    /// For [`Session::resume`] of its topic: the destination is missing, full or unroutable.
    Resumed,
}

/// What a settle did.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SettleReport {
    /// The records that were not settled, because the lease they were claimed under is lost or they are gone.
    pub lost: Vec<RecordTag>,
    /// Whether something may be claimed now that could not before: a key has become free, or the next of it due. A log
    /// that does not know says `true`.
    pub may_claim: bool,
}

impl SettleReport {
    /// A report of these losses; `may_claim` unless said otherwise.
    #[must_use]
    pub fn new(lost: Vec<RecordTag>) -> Self {
        Self { lost, may_claim: true }
    }
    /// Sets whether something may be claimed now that could not before.
    #[must_use]
    pub fn with_may_claim(mut self, may_claim: bool) -> Self {
        self.may_claim = may_claim;
        self
    }
}

/// A relay's hold on a mailbox. Dropping it without [`close`](Session::close) is a crash: the others wait for the lease.
///
/// Calls may overlap: an engine claims while it settles. Renewal of the lease is the session's own work, in a task of
/// its own that ends with the session.
#[async_trait]
pub trait Session: Debug + Send + Sync {
    /// Takes what is due.
    ///
    /// # Contract
    /// - Gets the lease first where it is free or has expired; gives nothing while it is somebody else's. An expired
    ///   lease is taken at once, by anyone.
    /// - For each (topic, key) it gives a contiguous run from its head, in the order of commits as far as committers
    ///   serialised on the key. A key of which anything is unsettled in this session, or parked and not due, is passed
    ///   over, and what is passed over hinders no other key.
    /// - A due parked record comes with its followers behind it. Scheduled records whose time has come enter first.
    /// - Two sessions with a live lease never hold one record.
    /// - Cancelling it may leave records held that nobody got; they come back with the end of the session.
    ///
    /// Held by `log::claims_are_exclusive`, `log::order_survives_failure`, `log::due_times_are_kept`, `log::never_is_a_time_like_any_other`,
    /// `log::nothing_waiting_stops_a_neighbour`, `log::a_backlog_of_one_key_hinders_no_other`,
    /// `log::a_long_run_waits_behind_its_head_in_order`, `log::an_expired_lease_is_taken_over`,
    /// `log::a_busy_key_is_passed_over_and_given_later`, `log::a_key_waits_for_whatever_is_parked_of_it`,
    /// `log::order_survives_a_take_over`, `log::keyless_records_are_not_held_back`,
    /// `log::topics_that_wait_are_told_to_the_next_holder`, `log::retries_do_not_starve_what_is_new`,
    /// `log::claims_are_bounded_by_bytes`, `log::random_histories_lose_nothing_and_keep_order`,
    /// `log::calls_overlap_and_keys_keep_their_order`.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable): nothing was taken.
    async fn claim(&self, request: &Claim) -> Result<Claimed>;

    /// Writes down what became of records.
    ///
    /// # Contract
    /// - Fenced by owner *and* epoch: what was claimed under a lease since lost is left alone and reported as lost. It
    ///   is checked in the transaction that writes.
    /// - All or nothing but for the lost. After an error nothing is settled, and the same call may be made again.
    /// - Parking or failing with `hold_key` puts what the log holds of that key behind the record; settling the head
    ///   of a parked key otherwise makes the next of it due. A record that is released keeps its place and attempts.
    /// - A record parked with `keep` may be settled again, by the same tag, in a later call: a batch names a record once.
    /// - Settles of one session take effect in the order they were called in.
    ///
    /// Held by `log::a_stale_settle_changes_nothing`, `log::a_parked_record_is_settled_again`,
    /// `log::released_records_keep_their_place`, `log::a_failed_record_can_hold_its_key`,
    /// `log::what_succeeded_is_kept_only_if_asked`, `log::errors_are_kept_the_last_ten`.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable).
    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport>;

    /// Makes up to `max` records that [wait for](Until::Resumed) `topic` due, oldest first, and says how many it made.
    ///
    /// # Contract
    /// Fenced as a settle is: without the lease it does nothing and returns 0. The engine probes a missing destination
    /// with `max` 1 and releases the rest in batches once a probe succeeded.
    ///
    /// Held by `log::a_topic_is_resumed`.
    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64>;

    /// Waits for something to claim that this session was not told of: what another process has committed, what has
    /// become due through it, a lane or a lease that is to be had; or for the loss of the lease.
    ///
    /// # Contract
    /// Returns within about [`poll_interval`](SessionOptions::poll_interval) of it, at the latest after `at_most` by the
    /// log's clock, and may return for no reason. Cancel-safe. (Events published in this process wake the engine without
    /// it; what the last claim said of [`next_due`](Claimed::next_due) the engine counts itself.)
    ///
    /// Held by `log::a_wait_ends_with_news_or_with_its_time`.
    async fn wait(&self, at_most: Duration) -> Result<()>;

    /// Gives back everything and the lease, so that others go on at once.
    ///
    /// # Contract
    /// What was not settled is pending again, in its place, with the attempts stored. Nothing can be claimed or settled
    /// afterwards: both answer [`ErrorKind::Closed`](crate::ErrorKind::Closed). A second call does nothing.
    ///
    /// Held by `log::close_hands_over_at_once`.
    async fn close(&self) -> Result<()>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<S: Session + ?Sized> Session for $pointer<S> {
            async fn claim(&self, request: &Claim) -> Result<Claimed> {
                (**self).claim(request).await
            }
            async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
                (**self).settle(batch).await
            }
            async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
                (**self).resume(topic, max).await
            }
            async fn wait(&self, at_most: Duration) -> Result<()> {
                (**self).wait(at_most).await
            }
            async fn close(&self) -> Result<()> {
                (**self).close().await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

const _: fn(&dyn Session) = |_| {};
