//! The loop: wake → claim → attempt → settle.
//!
//! One task; everything slow is a job in one set, so nothing is shared and nothing is locked. A step starts whatever
//! may be started, then waits for the first thing that happens.

mod attempt;
mod journal;
mod send;

use super::{
    RelayOptions, Reporter, Wake,
    attempts::{Attempts, Refusal},
    flights::Flights,
    held::{InHand, Place},
    outage::{Destinations, Link, Probing},
};
use crate::{
    EventLog, Mailbox, Reachability, Result, Topic,
    clock::{Clock, Moment},
    log::{Claimed, Lease, RecordTag, Session, SettleReport, Settled, Stored},
    publisher::{Report, Reports},
};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::FxHashMap;
use send::Call;
use std::{
    cmp::Reverse,
    collections::{BinaryHeap, VecDeque},
    sync::Arc,
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// What an engine works with, beside its session.
#[derive(Clone)]
pub(crate) struct Parts {
    pub(crate) mailbox: Mailbox,
    pub(crate) options: Arc<RelayOptions>,
    pub(crate) log: EventLog,
    pub(crate) attempts: Arc<dyn Attempts>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) wake: Arc<Wake>,
    pub(crate) reporter: Arc<Reporter>,
    pub(crate) rng: fastrand::Rng,
}

pub(crate) struct Engine {
    mailbox: Mailbox,
    options: Arc<RelayOptions>,
    log: EventLog,
    session: Arc<dyn Session>,
    attempts: Arc<dyn Attempts>,
    /// As the attempts say.
    has_destinations: bool,
    clock: Arc<dyn Clock>,
    wake: Arc<Wake>,
    reporter: Arc<Reporter>,
    rng: fastrand::Rng,

    lease: Lease,
    /// Whether `lease` was held when last looked at: its loss is dealt with once.
    has_lease: bool,
    tenure: u64,
    in_hand: InHand,
    /// To be sent, in order.
    ready: VecDeque<Place>,
    /// The local tier, by the time of the next try.
    local: BinaryHeap<Reverse<(Moment, Place)>>,
    /// The bytes of payload in it.
    local_bytes: usize,
    settling: Vec<Settled>,
    /// Parkings for a topic that are not written yet: until they are, the topic is neither probed nor resumed.
    unwritten: FxHashMap<RecordTag, Topic>,
    /// Those behind a dead letter, or behind one dropped, that is not written yet.
    behind_unwritten: FxHashMap<RecordTag, Place>,
    /// Dead letters to tell of, once they are stored.
    exhausted: Vec<(RecordTag, Stored)>,

    jobs: FuturesUnordered<BoxFuture<'static, Event>>,
    /// Messages with the client.
    in_flight: usize,
    calls: FxHashMap<u64, Call>,
    last_call: u64,
    /// Where the outcomes of calls arrive.
    reports: Arc<Reports>,
    /// An empty vector, to be used again.
    empty_reports: Vec<Report>,
    flights: Flights,
    /// Since when what is ready waits for more to go with it.
    gathering_since: Option<Moment>,
    is_claiming: bool,
    is_settling: bool,
    being_settled: usize,
    is_resuming: bool,

    wants_claim: bool,
    claimed_at: Moment,
    /// When something is due, or a commit is expected.
    due_at: Option<Moment>,
    /// Polls come quickly for a while: a commit is expected that nobody will tell of.
    quick_poll: Option<Duration>,
    link: Link,
    link_probing: Probing,
    /// When the broker last answered anything, and whether it is asked just now though nothing is to be sent.
    heard_at: Moment,
    is_asking: bool,
    destinations: Destinations,
    log_probing: Probing,
    /// The log failed; it is asked again then.
    log_retry_at: Option<Moment>,
    is_stopping: bool,
    /// Another member of the group handles what this one met: it is to have the mailbox.
    steps_aside: bool,
    /// The least time between idle claims that gave nothing, though the session's wait called for them.
    idle_floor: Duration,
}

/// How an engine ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum End {
    /// It was stopped.
    Stopped,
    /// It left the mailbox to another member of the group, which handles what this one does not.
    Aside,
}

/// What a job ended with.
enum Event {
    Claimed {
        asked: (usize, usize),
        result: Result<Claimed>,
    },
    Ended {
        call: u64,
        rest: Result<(), Refusal>,
    },
    Settled {
        batch: Vec<Settled>,
        result: Result<SettleReport>,
    },
    Resumed {
        topic: Topic,
        asked: usize,
        result: Result<u64>,
    },
    Checked(Reachability),
    Asked(Reachability),
    Told,
}

/// How quickly a poll may follow the one before.
const SHORTEST_POLL: Duration = Duration::from_millis(1);

/// The longest that attempts which were cut off may take to end.
const LONGEST_END: Duration = Duration::from_millis(500);

/// The longest that handing back a lease may take.
const LONGEST_CLOSE: Duration = Duration::from_secs(3);

/// An idle relay claims for itself after so many poll intervals, whatever the session's wait says.
const IDLE_POLLS: u32 = 60;

impl Engine {
    pub(crate) fn new(parts: Parts, session: Box<dyn Session>) -> Self {
        let max_probe = parts.options.max_probe_interval;
        Self {
            lease: Lease::none(parts.clock.clone()),
            has_lease: false,
            tenure: 0,
            in_hand: InHand::default(),
            ready: VecDeque::new(),
            local: BinaryHeap::new(),
            local_bytes: 0,
            settling: Vec::new(),
            unwritten: FxHashMap::default(),
            behind_unwritten: FxHashMap::default(),
            exhausted: Vec::new(),
            jobs: FuturesUnordered::new(),
            in_flight: 0,
            calls: FxHashMap::default(),
            last_call: 0,
            reports: Arc::default(),
            empty_reports: Vec::new(),
            flights: Flights::default(),
            gathering_since: None,
            is_claiming: false,
            is_settling: false,
            being_settled: 0,
            is_resuming: false,
            wants_claim: true,
            claimed_at: Moment::ZERO,
            due_at: None,
            quick_poll: None,
            link: Link::Up,
            link_probing: Probing::new(max_probe),
            heard_at: Moment::ZERO,
            is_asking: false,
            destinations: Destinations::new(max_probe),
            log_probing: Probing::new(max_probe),
            log_retry_at: None,
            is_stopping: false,
            steps_aside: false,
            idle_floor: Duration::ZERO,
            mailbox: parts.mailbox,
            options: parts.options,
            log: parts.log,
            session: session.into(),
            has_destinations: parts.attempts.has_destinations(),
            attempts: parts.attempts,
            clock: parts.clock,
            wake: parts.wake,
            reporter: parts.reporter,
            rng: parts.rng,
        }
    }

    /// Runs until `stop`, then finishes what is in flight, settles, and hands back the lease. `kill` ends the finishing:
    /// what is unsettled then is left to the next holder.
    pub(crate) async fn run(mut self, stop: CancellationToken, kill: CancellationToken) -> End {
        loop {
            // Jobs that are always ready (memory, in a test) must not starve the other tasks of the thread.
            tokio::task::coop::consume_budget().await;
            let now = self.clock.elapsed();
            self.start_what_may(now);
            if self.is_stopping && self.is_idle() && self.settling.is_empty() {
                break;
            }
            let until = self.next_timer().saturating_sub(now);
            // A claim that cannot be made now is none to hear of again and again.
            let listens = self.is_idle() && !self.wants_claim;
            let patience = (self.idle_floor, self.options.poll_interval);
            tokio::select! {
                biased;
                () = kill.cancelled() => break,
                () = stop.cancelled(), if !self.is_stopping => self.stop(),
                () = self.reports.arrived() => self.take_reports(self.clock.elapsed()),
                Some(event) = self.jobs.next(), if !self.jobs.is_empty() => {
                    self.handle(event);
                    while let Some(Some(event)) = self.jobs.next().now_or_never() {
                        self.handle(event);
                    }
                }
                to_come = self.wake.called() => {
                    self.idle_floor = Duration::ZERO;
                    self.called(to_come);
                }
                lasted = idle(&self.session, &self.clock, until, listens, patience) => {
                    self.wants_claim |= listens;
                    // A wait that lasted is no reason to be careful; one that did not may be told of nothing, over and over.
                    self.idle_floor = match listens && !lasted {
                        true => (self.idle_floor * 2).clamp(SHORTEST_POLL, self.options.poll_interval),
                        false => Duration::ZERO,
                    };
                }
            }
        }
        // What the client still has is given up: the future is dropped, and with it the right to send.
        self.jobs.clear();
        // Nor may a handler that blocks run on beside the next holder's: then the lease is left to expire.
        if !self.attempts.have_ended(LONGEST_END).await {
            tracing::warn!(mailbox = %self.mailbox, "a handler cannot be ended: the lease is not handed back, others wait until it expires");
            return End::Stopped;
        }
        // A log that hangs is not waited for: the lease expires.
        let closed = tokio::time::timeout(LONGEST_CLOSE, self.session.close()).await;
        let closed = closed.unwrap_or_else(|_| {
            let text = format!("the session did not close within {LONGEST_CLOSE:?}");
            Err(crate::Error::new(crate::ErrorKind::Unavailable, text))
        });
        if let Err(error) = closed {
            tracing::warn!(error = error.to_chain(), mailbox = %self.mailbox, "the lease was not handed back: others wait until it expires");
        }
        match self.steps_aside && !stop.is_cancelled() {
            true => End::Aside,
            false => End::Stopped,
        }
    }

    /// Leaves the mailbox to another member of the group.
    pub(super) fn step_aside(&mut self) {
        if !self.is_stopping {
            tracing::info!(mailbox = %self.mailbox, "another member of the group handles what waits here: the relay hands the mailbox over");
            self.steps_aside = true;
            self.stop();
        }
    }

    /// Starts every job that may be started.
    fn start_what_may(&mut self, now: Moment) {
        if self.has_lease && !self.lease.is_held() {
            self.lose_lease();
        }
        self.end_local_waits(now);
        self.check_link(now);
        self.ask_while_idle(now);
        self.send_ready(now);
        if self.log_retry_at.is_some_and(|at| at > now) {
            return;
        }
        self.start_settle();
        if !self.is_stopping && self.link.window() > 0 {
            self.start_resume(now);
            self.wants_claim |= self.poll_at() <= now;
            self.start_claim();
        }
    }

    /// When to look again if nothing happens.
    fn next_timer(&self) -> Moment {
        let now = self.clock.elapsed();
        // A timer counts only if there is something to be done when it ends.
        let link = match &self.link {
            Link::Down { probe_at } if !self.is_stopping => Some(*probe_at),
            _ => self.asks_at(),
        };
        let local = self.local.peek().map(|Reverse((at, _))| *at);
        let log_retry = self.log_retry_at.filter(|_| self.wants_log());
        let may_ask = self.log_retry_at.is_none_or(|at| at <= now) && self.link.window() > 0 && !self.is_stopping;
        let may_probe = may_ask && !self.is_resuming && self.unwritten.is_empty();
        let probe = self.destinations.next_probe().filter(|_| may_probe);
        let may_poll = may_ask && !self.is_claiming && !self.wants_claim;
        let poll = Some(self.poll_at()).filter(|_| may_poll);
        let lease = self.lease.remaining().map(|left| now + left).filter(|_| self.has_lease);
        let timers = [link, local, log_retry, probe, poll, lease, self.gathered_at()];
        let next = timers.into_iter().flatten().min();
        let soonest = now + SHORTEST_POLL;
        next.map_or(soonest.saturating_add(self.options.poll_interval), |at| at.max(soonest))
    }

    /// When to claim though nobody told of anything. While the relay is idle that is the session's business, which looks
    /// for what others have written every `poll_interval`, for all mailboxes of the process together.
    fn poll_at(&self) -> Moment {
        let every = if self.is_idle() {
            self.options.poll_interval.saturating_mul(IDLE_POLLS)
        } else {
            self.options.poll_interval
        };
        let look = self.claimed_at + every;
        self.due_at.map_or(look, |due| due.min(look))
    }

    /// Whether no job is running. A reachability check does not count, because nothing waits for it.
    fn is_idle(&self) -> bool {
        self.jobs.len() <= usize::from(self.is_asking)
    }

    fn wants_log(&self) -> bool {
        self.wants_claim || !self.settling.is_empty() || self.destinations.next_probe().is_some()
    }

    fn handle(&mut self, event: Event) {
        let now = self.clock.elapsed();
        match event {
            Event::Claimed { asked, result } => self.claimed(asked, result, now),
            Event::Ended { call, rest } => self.call_ended(call, &rest, now),
            Event::Settled { batch, result } => self.settled(batch, result, now),
            Event::Resumed { topic, asked, result } => self.resumed(&topic, asked, result, now),
            Event::Checked(reachability) => self.checked(&reachability, now),
            Event::Asked(reachability) => self.asked(&reachability, now),
            Event::Told => {}
        }
    }

    fn called(&mut self, commit_to_come: bool) {
        if commit_to_come {
            // Not yet: the commit takes a moment.
            self.quick_poll = Some(SHORTEST_POLL);
            let soon = self.clock.elapsed() + SHORTEST_POLL;
            self.due_at = Some(self.due_at.map_or(soon, |at| at.min(soon)));
        } else {
            self.wants_claim = true;
        }
    }

    /// No more claims; what is not with the client goes back to the log.
    fn stop(&mut self) {
        self.is_stopping = true;
        while let Some(place) = self.ready.pop_front() {
            self.release_run(place);
        }
        for place in self.flights.take_all_held() {
            self.release_run(place);
        }
        while let Some(place) = self.pop_local() {
            self.leave_local_tier(place);
        }
    }

    /// The records in hand are not ours any more, but for those with the client, whose outcome is then ignored.
    fn lose_lease(&mut self) {
        let lost = self.in_hand.len().saturating_sub(self.in_flight) + self.settling.len();
        Reporter::count(&self.reporter.lost, lost);
        tracing::warn!(mailbox = %self.mailbox, records = lost, "the lease is lost: its records are left to the next holder");
        self.tenure += 1;
        self.has_lease = false;
        while let Some(place) = self.ready.pop_front() {
            self.forget_run(place);
        }
        for place in self.flights.take_all_held() {
            self.forget_run(place);
        }
        while let Some(place) = self.pop_local() {
            self.forget_run(place);
        }
        for place in std::mem::take(&mut self.behind_unwritten).into_values() {
            self.forget_run(place);
        }
        self.settling.clear();
        self.unwritten.clear();
        self.exhausted.clear();
        self.destinations.clear();
        self.tell_topics_away();
        self.lease = Lease::none(self.clock.clone());
        self.wants_claim = true;
    }

    fn forget_run(&mut self, place: Place) {
        let mut next = Some(place);
        while let Some(held) = next.and_then(|place| self.in_hand.take(place)) {
            next = held.next;
        }
    }

    fn job(&self, job: impl Future<Output = Event> + Send + 'static) {
        self.jobs.push(job.boxed());
    }
}

/// Waits for time to pass, or, when there is nothing else to do, for news from the log. `floor` is waited in any case: a
/// wait that calls for claims which give nothing does not make the engine spin. After an error it is asked again `soon`.
/// Says whether the wait for news took any time.
async fn idle(
    session: &Arc<dyn Session>,
    clock: &Arc<dyn Clock>,
    until: Duration,
    listens: bool,
    (floor, soon): (Duration, Duration),
) -> bool {
    if !listens {
        clock.sleep(until).await;
        return true;
    }
    if !floor.is_zero() {
        clock.sleep(floor.min(until)).await;
    }
    let left = until.saturating_sub(floor);
    let began = clock.elapsed();
    if let Err(error) = session.wait(left).await {
        tracing::debug!(error = error.to_chain(), "the wait for news from the log failed");
        clock.sleep(left.min(soon)).await;
    }
    clock.elapsed().saturating_sub(began) > SHORTEST_POLL
}
