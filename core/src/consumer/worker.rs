//! The loop of a subscription: take → look → handle → settle.

use super::{
    crew::{Crew, Ended, EndedRun, Job, Run},
    gathering::Gatherings,
    shared::{Finished, Shared},
};
use crate::health::{PartState, Trouble};
use crate::{Delivery, Error, ErrorKind, Intake, Reachability, Settlement, Settling, Taken, log::Admission};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// The longest a settle or a close may take when there is no other deadline.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Outcomes that the broker has not taken for so long are shown.
const LATE: Duration = Duration::from_secs(10);
/// The first pause after an empty batch.
const SHORTEST_PAUSE: Duration = Duration::from_millis(1);
/// And once the deadline of a stop has passed.
const CUT_OFF: Duration = Duration::from_millis(500);
/// Between tries to reach a transport that failed.
const PAUSE: Duration = Duration::from_millis(500);
/// And while a transport fails to take outcomes, which makes messages come again at once: twice as long each time, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) intake: Intake,
    pub(super) settling: Settling,
    pub(super) kill: CancellationToken,
}

/// Parks deliveries of one key behind what waits of it.
type Parking = BoxFuture<'static, Vec<Finished>>;

/// The most messages of a key that are handed over at once.
const RUN: usize = 64;

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkerEnd {
    /// The subscription was stopped.
    Stopped,
    /// The transport ended the feed.
    Closed,
}

/// Deliveries the inbox has been asked about.
struct Looked {
    deliveries: Vec<Delivery>,
    answers: Option<Vec<Admission>>,
}

/// Behind another of its key.
struct Waiting {
    delivery: Delivery,
    /// The inbox holds something of its key that it has to wait for, too.
    is_held_back: bool,
}

/// What a worker has in hand.
#[derive(Default)]
struct InHand {
    parking: FuturesUnordered<Parking>,
    /// With the crew, or being parked.
    handled: usize,
    /// The keys being handled, each with what waits behind.
    keys: FxHashMap<u64, VecDeque<Waiting>>,
    waiting: usize,
    /// Keys whose first message waits to be begun.
    to_start: Vec<u64>,
    /// To be handed to the crew.
    jobs: Vec<Job>,
    /// The inbox is to be asked about them, once it has answered for those before.
    to_look: Vec<Delivery>,
    looked_at: usize,
    /// Keys parked since the inbox was asked: its answer is out of date for them.
    parked_meanwhile: FxHashSet<u64>,
    gatherings: Gatherings,
    settlements: Vec<Settlement>,
    being_settled: usize,
}

impl InHand {
    fn len(&self) -> usize {
        self.handled
            + self.waiting
            + self.to_look.len()
            + self.looked_at
            + self.gatherings.len()
            + self.settlements.len()
            + self.being_settled
    }
}

impl Worker {
    pub(super) async fn run(mut self) -> WorkerEnd {
        let shared = self.shared.clone();
        let mut hand = InHand::default();
        // One that panicked before may have left word of an outage behind, which this one finds out for itself.
        shared.gate.log_is_back();
        let crew = Crew::start(&shared, &self.kill);
        let mut no_news: Vec<Ended> = Vec::new();
        let mut settle: Option<BoxFuture<'static, bool>> = None;
        let mut looking: Option<BoxFuture<'static, Looked>> = None;
        let mut next_pause = PAUSE;
        let mut is_stopping = false;
        let mut end = WorkerEnd::Stopped;
        let mut broker_check: Option<BoxFuture<'static, bool>> = None;
        let mut settle_is_late: Option<BoxFuture<'static, ()>> = None;
        let mut empty_batches: u32 = 0;
        let mut pause: Option<BoxFuture<'static, ()>> = None;
        loop {
            tokio::task::coop::consume_budget().await;
            if settle.is_none() && (!hand.settlements.is_empty() || self.settling.has_dropped()) {
                settle = Some(self.settle(&mut hand));
                let clock = shared.tools.clock.clone();
                settle_is_late = Some(async move { clock.sleep(LATE).await }.boxed());
            }
            if is_stopping && hand.len() == 0 && settle.is_none() {
                break;
            }
            if looking.is_none() && !hand.to_look.is_empty() {
                let deliveries = std::mem::take(&mut hand.to_look);
                hand.looked_at = deliveries.len();
                hand.parked_meanwhile.clear();
                let shared = shared.clone();
                looking = Some(
                    async move {
                        let answers = shared.look(&deliveries).await;
                        Looked { deliveries, answers }
                    }
                    .boxed(),
                );
            }
            let mut changed = std::pin::pin!(shared.gate.changed());
            changed.as_mut().enable();
            let mut gathering = self.start_gathered(&mut hand).map(|wait| {
                let clock = shared.tools.clock.clone();
                async move { clock.sleep(wait).await }.boxed()
            });
            if !hand.jobs.is_empty() {
                crew.add(&mut hand.jobs);
            }
            let mut room = shared.max_in_flight.load(Ordering::Relaxed).saturating_sub(hand.len());
            // While a service is away, one message is taken to find out whether it is back, if none waits for that.
            let mut probing = shared.gate.lacks_probe(&*shared.tools.clock);
            let probes = probing.take_if(|wait| wait.is_zero()).is_some() && hand.len() == hand.settlements.len();
            if probes {
                room = room.min(1);
            }
            let takes = room > 0 && !is_stopping && pause.is_none() && (!shared.gate.is_closed() || probes);
            let mut probing = probing.map(|wait| {
                let clock = shared.tools.clock.clone();
                async move { clock.sleep(wait).await }.boxed()
            });
            tokio::select! {
                biased;
                () = self.kill.cancelled() => break,
                () = shared.stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    for waiting in hand.keys.values_mut() {
                        hand.settlements.extend(waiting.drain(..).map(|waiting| waiting.delivery.release()));
                    }
                    hand.waiting = 0;
                    hand.settlements.extend(hand.to_look.drain(..).map(Delivery::release));
                    for (delivery, key) in hand.gatherings.drain() {
                        hand.settlements.push(delivery.release());
                        key.and_then(|key| hand.keys.remove(&key));
                    }
                    for job in crew.take_back() {
                        self.take_back(&mut hand, job);
                    }
                }
                () = crew.news() => {
                    let mut news = crew.take(std::mem::take(&mut no_news));
                    for ended in news.drain(..) {
                        self.ended(&mut hand, ended);
                    }
                    no_news = news;
                    self.start_keys(&mut hand);
                }
                Some(parked) = hand.parking.next(), if !hand.parking.is_empty() => {
                    self.parked(&mut hand, parked);
                    while let Some(Some(parked)) = hand.parking.next().now_or_never() {
                        self.parked(&mut hand, parked);
                    }
                    self.start_keys(&mut hand);
                }
                failed = ready(&mut settle), if settle.is_some() => {
                    (settle, settle_is_late) = (None, None);
                    hand.being_settled = 0;
                    if failed {
                        let clock = shared.tools.clock.clone();
                        let length = next_pause;
                        next_pause = (next_pause * 2).min(LONGEST_PAUSE);
                        pause = Some(async move { clock.sleep(length).await }.boxed());
                        let text = "the broker does not take the outcomes of deliveries: their messages come again";
                        shared.status.raise(Trouble::Outcomes, PartState::Degraded, text.to_owned(), None);
                    } else {
                        next_pause = PAUSE;
                        shared.status.clear(Trouble::Outcomes);
                    }
                }
                () = ready(&mut settle_is_late), if settle_is_late.is_some() => {
                    settle_is_late = None;
                    let text = format!("the broker has not taken outcomes for {LATE:?}");
                    tracing::warn!(group = %shared.group, "{text}: the subscription waits");
                    shared.status.raise(Trouble::Outcomes, PartState::Degraded, text, None);
                }
                is_up = ready(&mut broker_check), if broker_check.is_some() => {
                    broker_check = match is_up {
                        true => {
                            shared.status.clear(Trouble::Broker);
                            None
                        }
                        false => Some(shared.check_broker()),
                    };
                }
                looked = ready(&mut looking), if looking.is_some() => {
                    looking = None;
                    hand.looked_at = 0;
                    self.begin_looked(&mut hand, looked, is_stopping);
                }
                () = ready(&mut pause), if pause.is_some() => pause = None,
                () = ready(&mut gathering), if gathering.is_some() => {}
                () = ready(&mut probing), if probing.is_some() => {}
                () = changed => {}
                taken = self.intake.next(room), if takes => match taken {
                    // A defect of the driver, which does not make this task spin.
                    Ok(Taken::Batch(batch)) if batch.is_empty() => {
                        if empty_batches == 0 {
                            tracing::warn!(group = %shared.group, "the transport gave an empty batch: it is asked again, ever more slowly");
                        }
                        empty_batches = empty_batches.saturating_add(1);
                        let clock = shared.tools.clock.clone();
                        let wait = SHORTEST_PAUSE.saturating_mul(1 << empty_batches.min(9)).min(PAUSE);
                        pause = Some(async move { clock.sleep(wait).await }.boxed());
                    }
                    Ok(Taken::Batch(batch)) => {
                        empty_batches = 0;
                        if broker_check.take().is_some() {
                            shared.status.clear(Trouble::Broker);
                        }
                        shared.counters.delivered(batch.len());
                        if shared.asks_the_inbox {
                            hand.to_look.extend(batch);
                        } else {
                            for delivery in batch {
                                self.begin(&mut hand, delivery, Admission::New);
                            }
                            self.start_keys(&mut hand);
                        }
                    }
                    Ok(Taken::Gone(assignment)) => drop_gone(&mut hand, assignment),
                    Err(error) if error.kind() == ErrorKind::Closed => {
                        end = WorkerEnd::Closed;
                        is_stopping = true;
                    }
                    Err(error) => {
                        shared.status.raise(Trouble::Broker, PartState::Degraded, error.to_chain(), None);
                        broker_check = Some(shared.check_broker());
                        tracing::warn!(group = %shared.group, error = error.to_chain(), "the subscription cannot receive, it will be tried again");
                        let clock = shared.tools.clock.clone();
                        pause = Some(async move { clock.sleep(PAUSE).await }.boxed());
                    }
                },
            }
        }
        // What is still being handled is dropped, and with it its delivery, which releases it.
        drop(hand);
        drop(looking);
        let last_words = if self.kill.is_cancelled() { CUT_OFF } else { LAST_WORDS };
        crew.end(last_words).await;
        if let Some(settle) = settle {
            let _ = tokio::time::timeout(last_words, settle).await;
        }
        // The limit is the driver's to keep; one that does not is not waited for.
        let close = self.settling.close(last_words);
        let closed = tokio::time::timeout(last_words + CUT_OFF, close).await;
        let closed =
            closed.unwrap_or_else(|_| Err(Error::new(ErrorKind::Unavailable, "the feed did not close in time")));
        if let Err(error) = closed {
            tracing::warn!(group = %shared.group, error = error.to_chain(), "the subscription was not closed cleanly: messages may come again");
        }
        if shared.stop.is_cancelled() {
            WorkerEnd::Stopped
        } else {
            end
        }
    }

    /// Tells the broker the outcomes. Gives whether it failed to do what they say.
    fn settle(&self, hand: &mut InHand) -> BoxFuture<'static, bool> {
        let batch = std::mem::take(&mut hand.settlements);
        hand.being_settled = batch.len();
        let (settling, shared) = (self.settling.clone(), self.shared.clone());
        async move {
            let errors = settling.settle(batch).await;
            shared.counters.unsettled(errors.len());
            if let Some(error) = errors.first() {
                tracing::warn!(group = %shared.group, messages = errors.len(), error = error.to_chain(), "outcomes were not taken: the messages come again");
            }
            // A partition that has gone to somebody else is nobody's failure.
            errors.iter().any(|error| error.kind() != ErrorKind::LeaseLost)
        }
        .boxed()
    }

    fn begin_looked(&self, hand: &mut InHand, looked: Looked, is_stopping: bool) {
        let answers = match looked.answers {
            Some(answers) if !is_stopping => answers,
            _ => {
                hand.settlements
                    .extend(looked.deliveries.into_iter().map(Delivery::release));
                return;
            }
        };
        for (delivery, mut answer) in looked.deliveries.into_iter().zip(answers) {
            // What was before it in its key has been dropped.
            if delivery.is_gone() {
                hand.settlements.push(delivery.release());
                continue;
            }
            let key = delivery.message().key_hash();
            // Those before it in this loop may have been parked at once, too.
            if answer == Admission::New && key.is_some_and(|key| hand.parked_meanwhile.contains(&key)) {
                answer = Admission::HeldBack;
            }
            self.begin(hand, delivery, answer);
        }
        self.start_keys(hand);
    }

    /// Handles a delivery now, or behind those of its key.
    fn begin(&self, hand: &mut InHand, delivery: Delivery, answer: Admission) {
        if matches!(answer, Admission::Duplicate | Admission::Parked) {
            self.shared.counters.dropped(1);
            hand.settlements.push(delivery.ack());
            return;
        }
        let key = if self.shared.ordered {
            delivery.message().key_hash()
        } else {
            None
        };
        let is_held_back = answer == Admission::HeldBack;
        let Some(key) = key else {
            match is_held_back {
                true => self.park(hand, vec![delivery], None),
                false => self.start(hand, delivery, None),
            }
            return;
        };
        let queue = hand.keys.entry(key).or_insert_with(|| {
            hand.to_start.push(key);
            VecDeque::new()
        });
        queue.push_back(Waiting { delivery, is_held_back });
        hand.waiting += 1;
    }

    /// Begins the keys whose turn has come.
    fn start_keys(&self, hand: &mut InHand) {
        // Starting a key puts none in line.
        let mut keys = std::mem::take(&mut hand.to_start);
        for key in keys.drain(..) {
            self.start_key(hand, key);
        }
        hand.to_start = keys;
    }

    /// Begins what waits of a key of which nothing is in work: all of it as one run, as far as it is of one kind.
    fn start_key(&self, hand: &mut InHand, key: u64) {
        let Some(waiting) = hand.keys.get_mut(&key) else { return };
        let mut deliveries = VecDeque::new();
        let takes_part = |waiting: &Waiting| !waiting.is_held_back && self.shared.gathers(&waiting.delivery).is_none();
        while deliveries.len() < RUN
            && let Some(Waiting { delivery, .. }) = waiting.pop_front_if(|waiting| takes_part(waiting))
        {
            deliveries.push_back(delivery);
        }
        hand.waiting -= deliveries.len();
        hand.handled += deliveries.len();
        if deliveries.len() > 1 {
            hand.jobs.push(Job::Run(Run { key, deliveries }));
            return;
        }
        if let Some(delivery) = deliveries.pop_front() {
            hand.jobs.push(Job::One(delivery, Some(key)));
            return;
        }
        match waiting.pop_front() {
            Some(Waiting { delivery, is_held_back }) => {
                hand.waiting -= 1;
                match is_held_back {
                    true => self.park(hand, vec![delivery], Some(key)),
                    false => self.start(hand, delivery, Some(key)),
                }
            }
            None => {
                hand.keys.remove(&key);
            }
        }
    }

    /// Begins one delivery.
    fn start(&self, hand: &mut InHand, delivery: Delivery, key: Option<u64>) {
        if let Some(chain) = self.shared.gathers(&delivery) {
            hand.gatherings.add(chain, delivery, key, &*self.shared.tools.clock);
            return;
        }
        hand.handled += 1;
        hand.jobs.push(Job::One(delivery, key));
    }

    /// Parks deliveries of one key behind what waits of it.
    fn park(&self, hand: &mut InHand, deliveries: Vec<Delivery>, key: Option<u64>) {
        hand.handled += deliveries.len();
        let shared = self.shared.clone();
        hand.parking
            .push(Box::pin(async move { shared.park_behind(deliveries, key).await }));
    }

    /// Handles what has been gathered, as far as it is enough; gives how long it may still gather.
    fn start_gathered(&self, hand: &mut InHand) -> Option<Duration> {
        while let Some((chain, batch)) = hand.gatherings.next(&*self.shared.tools.clock) {
            hand.handled += batch.len();
            hand.jobs.push(Job::Together(chain, batch));
        }
        hand.gatherings.wait(&*self.shared.tools.clock)
    }

    fn ended(&self, hand: &mut InHand, ended: Ended) {
        match ended {
            Ended::Part(finished) => {
                hand.handled -= 1;
                hand.settlements.push(finished.settlement);
            }
            Ended::One(finished) => {
                hand.handled -= 1;
                match finished.key {
                    None => hand.settlements.push(finished.settlement),
                    Some(_) => self.settled(hand, finished.key, Some(finished), VecDeque::new()),
                }
            }
            Ended::Run(run) => {
                let EndedRun { key, last, left } = *run;
                hand.handled -= 1 + left.len();
                self.settled(hand, key, last, left);
            }
            Ended::Together { lost } => {
                hand.gatherings.ended();
                for key in lost {
                    hand.handled -= 1;
                    self.settled(hand, key, None, VecDeque::new());
                }
            }
        }
    }

    /// Of one key, parked together: the last one frees it.
    fn parked(&self, hand: &mut InHand, mut several: Vec<Finished>) {
        let last = several.pop();
        hand.handled -= several.len() + usize::from(last.is_some());
        hand.settlements
            .extend(several.into_iter().map(|finished| finished.settlement));
        if let Some(last) = last {
            self.settled(hand, last.key, Some(last), VecDeque::new());
        }
    }

    /// Takes back what the crew has not begun: the subscription is stopping.
    fn take_back(&self, hand: &mut InHand, job: Job) {
        let deliveries: Vec<(Delivery, Option<u64>)> = match job {
            Job::One(delivery, key) => vec![(delivery, key)],
            Job::Run(Run { key, deliveries }) => deliveries.into_iter().map(|delivery| (delivery, Some(key))).collect(),
            Job::Together(_, batch) => {
                hand.gatherings.ended();
                batch
            }
        };
        for (delivery, key) in deliveries {
            hand.handled -= 1;
            hand.settlements.push(delivery.release());
            key.and_then(|key| hand.keys.remove(&key));
        }
    }

    /// Notes the outcome of the last message of a key, and what comes next of it: first what is `left` of its run. Without an
    /// outcome it was released.
    fn settled(&self, hand: &mut InHand, key: Option<u64>, last: Option<Finished>, left: VecDeque<Delivery>) {
        let (mut comes_again, mut is_parked) = (true, false);
        if let Some(last) = last {
            comes_again = last.settlement.comes_again();
            is_parked = last.is_parked;
            hand.settlements.push(last.settlement);
        }
        let Some(key) = key else { return };
        if is_parked && self.shared.asks_the_inbox {
            hand.parked_meanwhile.insert(key);
        }
        let Some(waiting) = hand.keys.get_mut(&key) else {
            hand.settlements.extend(left.into_iter().map(Delivery::release));
            return;
        };
        hand.waiting += left.len();
        for delivery in left.into_iter().rev() {
            waiting.push_front(Waiting {
                delivery,
                is_held_back: false,
            });
        }
        if comes_again || self.shared.stop.is_cancelled() {
            // What waits behind it comes again behind it.
            hand.waiting -= waiting.len();
            hand.settlements
                .extend(waiting.drain(..).map(|waiting| waiting.delivery.release()));
        }
        if is_parked && !waiting.is_empty() {
            let behind: Vec<Delivery> = waiting.drain(..).map(|waiting| waiting.delivery).collect();
            hand.waiting -= behind.len();
            self.park(hand, behind, Some(key));
            return;
        }
        match waiting.is_empty() {
            true => {
                hand.keys.remove(&key);
            }
            false => hand.to_start.push(key),
        }
    }
}

/// What waits of an assignment that is gone is released unhandled.
fn drop_gone(hand: &mut InHand, assignment: crate::Assignment) {
    for waiting in hand.keys.values_mut() {
        waiting.retain(|waiting| waiting.delivery.assignment() != assignment);
    }
    hand.waiting = hand.keys.values().map(VecDeque::len).sum();
    hand.to_look.retain(|delivery| delivery.assignment() != assignment);
}

async fn ready<T>(job: &mut Option<BoxFuture<'static, T>>) -> T {
    match job {
        Some(job) => job.await,
        None => std::future::pending().await,
    }
}

impl Shared {
    /// Asks after a moment whether the broker is back, once the feed has had an error: it does not say so by itself.
    fn check_broker(self: &Arc<Self>) -> BoxFuture<'static, bool> {
        let shared = self.clone();
        async move {
            shared.tools.clock.sleep(PAUSE).await;
            match shared.tools.bus.transport().publisher() {
                Ok(publisher) => !matches!(publisher.check().await, Reachability::Down(_)),
                Err(_) => true,
            }
        }
        .boxed()
    }
}
