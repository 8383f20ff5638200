//! The loop of a subscription: take → look → handle → settle.

use super::{
    Context, Retry, Verdict,
    chain::{AnyChain, Handled, HandledBy, Origin},
    context::Tools,
    gate::Gate,
    gathering::Gatherings,
    inbox::{behind, record},
    running::Counters,
};
use crate::{
    Delivery, ErrorKind, GroupName, Intake, Message, Settlement, Settling, Taken,
    log::{Admission, AttemptError, Placement},
    relay::Wake,
};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    task::{Context as TaskContext, Poll, Waker},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// What the handling of a message needs: shared by those in flight, and by the relay of the inbox.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) group: Arc<GroupName>,
    pub(super) tools: Arc<Tools>,
    pub(super) chains: FxHashMap<String, Arc<dyn AnyChain>>,
    pub(super) retry: Retry,
    pub(super) gate: Gate,
    /// Wakes the relay of the inbox.
    pub(super) wake: Arc<Wake>,
    pub(super) counters: Arc<Counters>,
    pub(super) stop: CancellationToken,
    pub(super) max_in_flight: AtomicUsize,
    pub(super) ordered: bool,
    /// There is an inbox that messages can wait in.
    pub(super) parks: bool,
    /// The broker itself can deliver again after a delay.
    pub(super) delays: bool,
    /// Some chains handle several messages together.
    pub(super) any_gathers: bool,
    /// Deliveries are looked up in the inbox before they are handled.
    pub(super) asks_the_inbox: bool,
    /// What becomes of a message whose attempts are exhausted, unless a middleware says something else.
    pub(super) on_exhausted: Verdict,
    /// Messages of types nobody handles become dead letters, in place of being acknowledged.
    pub(super) dead_letter_unknown: bool,
}

/// The longest a settle or a close may take when there is no other deadline.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Between tries to reach a transport that failed.
const PAUSE: Duration = Duration::from_millis(500);
/// And while a transport fails to take outcomes, which makes messages come again at once: twice as long each time, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);
/// How long a message of another version of a known type waits in the inbox, for a process that handles it.
const ANOTHER_VERSION: Duration = Duration::from_secs(5);

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) intake: Intake,
    pub(super) settling: Settling,
    pub(super) kill: CancellationToken,
}

/// A message that has been handled, and its key.
pub(super) struct Finished {
    pub(super) settlement: Settlement,
    pub(super) key: Option<u64>,
    /// It waits in the inbox, and those of its key with it.
    pub(super) is_parked: bool,
}

pub(super) enum Ended {
    One(Finished),
    Parked(Vec<Finished>),
    /// What was gathered and handled together.
    Gathered(Vec<Finished>),
}

type Handling = BoxFuture<'static, Ended>;

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
    handling: FuturesUnordered<Handling>,
    handled: usize,
    /// The keys being handled, each with what waits behind.
    keys: FxHashMap<u64, VecDeque<Waiting>>,
    waiting: usize,
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
    pub(super) async fn run(mut self) {
        let shared = self.shared.clone();
        let mut hand = InHand::default();
        let mut settle: Option<BoxFuture<'static, bool>> = None;
        let mut looking: Option<BoxFuture<'static, Looked>> = None;
        let mut next_pause = PAUSE;
        let mut is_stopping = false;
        let mut pause: Option<BoxFuture<'static, ()>> = None;
        loop {
            tokio::task::coop::consume_budget().await;
            if settle.is_none() && (!hand.settlements.is_empty() || self.settling.has_dropped()) {
                settle = Some(self.settle(&mut hand));
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
            let room = shared.max_in_flight.load(Ordering::Relaxed).saturating_sub(hand.len());
            let takes = room > 0 && !is_stopping && pause.is_none() && !shared.gate.is_closed();
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
                }
                Some(ended) = hand.handling.next(), if !hand.handling.is_empty() => {
                    self.ended(&mut hand, ended);
                    while let Some(Some(ended)) = hand.handling.next().now_or_never() {
                        self.ended(&mut hand, ended);
                    }
                }
                failed = ready(&mut settle), if settle.is_some() => {
                    settle = None;
                    hand.being_settled = 0;
                    if failed {
                        let clock = shared.tools.clock.clone();
                        let length = next_pause;
                        next_pause = (next_pause * 2).min(LONGEST_PAUSE);
                        pause = Some(async move { clock.sleep(length).await }.boxed());
                    } else {
                        next_pause = PAUSE;
                    }
                }
                looked = ready(&mut looking), if looking.is_some() => {
                    looking = None;
                    hand.looked_at = 0;
                    self.begin_looked(&mut hand, looked, is_stopping);
                }
                () = ready(&mut pause), if pause.is_some() => pause = None,
                () = ready(&mut gathering), if gathering.is_some() => {}
                () = changed => {}
                taken = self.intake.next(room), if takes => match taken {
                    Ok(Taken::Batch(batch)) => {
                        shared.counters.delivered(batch.len());
                        if shared.asks_the_inbox {
                            hand.to_look.extend(batch);
                        } else {
                            for delivery in batch {
                                self.begin(&mut hand, delivery, Admission::New);
                            }
                        }
                    }
                    Ok(Taken::Gone(assignment)) => drop_gone(&mut hand, assignment),
                    Err(error) if error.kind() == ErrorKind::Closed => is_stopping = true,
                    Err(error) => {
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
        if let Some(settle) = settle {
            let _ = tokio::time::timeout(LAST_WORDS, settle).await;
        }
        if let Err(error) = self.settling.close(LAST_WORDS).await {
            tracing::warn!(group = %shared.group, error = error.to_chain(), "the subscription was not closed cleanly: messages may come again");
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
        let stale = std::mem::take(&mut hand.parked_meanwhile);
        for (delivery, mut answer) in looked.deliveries.into_iter().zip(answers) {
            let key = delivery.message().key_hash();
            if answer == Admission::New && key.is_some_and(|key| stale.contains(&key)) {
                answer = Admission::HeldBack;
            }
            self.begin(hand, delivery, answer);
        }
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
        if let Some(key) = key {
            match hand.keys.entry(key) {
                std::collections::hash_map::Entry::Occupied(mut busy) => {
                    let is_held_back = answer == Admission::HeldBack;
                    busy.get_mut().push_back(Waiting { delivery, is_held_back });
                    hand.waiting += 1;
                    return;
                }
                std::collections::hash_map::Entry::Vacant(free) => {
                    free.insert(VecDeque::new());
                }
            }
        }
        if answer == Admission::HeldBack {
            self.park(hand, vec![delivery], key);
        } else {
            self.start(hand, delivery, key);
        }
    }

    /// Handles a delivery, and those of its key behind it for as long as handlers have nothing to wait for.
    fn start(&self, hand: &mut InHand, delivery: Delivery, key: Option<u64>) {
        let mut next = Some(delivery);
        while let Some(delivery) = next.take() {
            if let Some(chain) = self.shared.gathers(delivery.message()) {
                hand.gatherings.add(chain, delivery, key, &*self.shared.tools.clock);
                return;
            }
            let shared = self.shared.clone();
            let mut handling: Handling = Box::pin(async move { Ended::One(shared.handle(delivery, key).await) });
            // Most handlers of a busy group are quick: the set of futures, which costs more than they do, is for those
            // that wait. What is put in it is polled again, so the waker of this first poll need not wake anybody.
            match handling.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())) {
                Poll::Ready(Ended::One(finished)) => next = self.settled(hand, finished),
                Poll::Ready(_) => {}
                Poll::Pending => {
                    hand.handled += 1;
                    hand.handling.push(handling);
                }
            }
        }
    }

    /// Parks deliveries of one key behind what waits of it.
    fn park(&self, hand: &mut InHand, deliveries: Vec<Delivery>, key: Option<u64>) {
        hand.handled += deliveries.len();
        let shared = self.shared.clone();
        hand.handling.push(Box::pin(async move {
            Ended::Parked(shared.park_behind(deliveries, key).await)
        }));
    }

    /// Handles what has been gathered, as far as it is enough; gives how long it may still gather.
    fn start_gathered(&self, hand: &mut InHand) -> Option<Duration> {
        while let Some((chain, batch)) = hand.gatherings.next(&*self.shared.tools.clock) {
            hand.handled += batch.len();
            let shared = self.shared.clone();
            hand.handling.push(Box::pin(async move {
                Ended::Gathered(shared.handle_together(&*chain, batch).await)
            }));
        }
        hand.gatherings.wait(&*self.shared.tools.clock)
    }

    fn ended(&self, hand: &mut InHand, ended: Ended) {
        match ended {
            Ended::One(finished) => self.one_ended(hand, finished),
            // Of one key, parked together: the last one frees it.
            Ended::Parked(mut several) => {
                let last = several.pop();
                hand.handled -= several.len();
                hand.settlements
                    .extend(several.into_iter().map(|finished| finished.settlement));
                if let Some(last) = last {
                    self.one_ended(hand, last);
                }
            }
            Ended::Gathered(several) => {
                hand.gatherings.ended();
                for finished in several {
                    self.one_ended(hand, finished);
                }
            }
        }
    }

    fn one_ended(&self, hand: &mut InHand, finished: Finished) {
        hand.handled -= 1;
        let key = finished.key;
        if let Some(next) = self.settled(hand, finished) {
            self.start(hand, next, key);
        }
    }

    /// Notes the outcome, and gives the next of the key.
    fn settled(&self, hand: &mut InHand, finished: Finished) -> Option<Delivery> {
        let comes_again = finished.settlement.comes_again();
        hand.settlements.push(finished.settlement);
        let key = finished.key?;
        if finished.is_parked {
            hand.parked_meanwhile.insert(key);
        }
        let waiting = hand.keys.get_mut(&key)?;
        if comes_again {
            // What waits behind it comes again behind it.
            hand.waiting -= waiting.len();
            hand.settlements
                .extend(waiting.drain(..).map(|waiting| waiting.delivery.release()));
        }
        if finished.is_parked && !waiting.is_empty() {
            let behind: Vec<Delivery> = waiting.drain(..).map(|waiting| waiting.delivery).collect();
            hand.waiting -= behind.len();
            self.park(hand, behind, Some(key));
            return None;
        }
        match waiting.pop_front() {
            Some(Waiting { delivery, is_held_back }) => {
                hand.waiting -= 1;
                if !is_held_back {
                    return Some(delivery);
                }
                self.park(hand, vec![delivery], Some(key));
            }
            None => {
                hand.keys.remove(&key);
            }
        }
        None
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
    fn gathers(&self, message: &Message) -> Option<Arc<dyn AnyChain>> {
        if !self.any_gathers {
            return None;
        }
        let chain = self.chains.get(message.kind())?;
        chain.gathering()?;
        Some(chain.clone())
    }

    fn by<'a>(&'a self, delivery: &Delivery) -> HandledBy<'a> {
        // Where only the broker can let a message wait there is nobody to count attempts but the broker.
        let waits_with_broker = !self.parks && self.delays && !self.ordered;
        let before = if waits_with_broker {
            delivery.delivery_count().saturating_sub(1)
        } else {
            0
        };
        HandledBy {
            retry: &self.retry,
            tools: &self.tools,
            gate: &self.gate,
            on_exhausted: self.on_exhausted,
            stop: &self.stop,
            origin: Origin::Broker {
                parks: self.parks,
                delays: self.delays,
                ordered: self.ordered,
            },
            attempts: before,
        }
    }

    /// Takes a message through its chain, and says what the broker is to be told.
    async fn handle(&self, delivery: Delivery, key: Option<u64>) -> Finished {
        let message = delivery.message();
        let handled = match self.chains.get(message.kind()) {
            Some(chain) if chain.is_durable() => Handled::Parked {
                after: Some(Duration::ZERO),
                attempts: 0,
                errors: Vec::new(),
            },
            Some(chain) => {
                let mut ctx = Context::new(message.clone(), self.tools.clone());
                chain.handle(&mut ctx, &self.by(&delivery)).await
            }
            None => match self.without_chain(message) {
                Some(handled) => handled,
                None => {
                    self.counters.ignored(1);
                    return Finished {
                        settlement: delivery.ack(),
                        key,
                        is_parked: false,
                    };
                }
            },
        };
        self.finish(delivery, key, handled).await
    }

    /// Several messages through one chain, together.
    async fn handle_together(&self, chain: &dyn AnyChain, batch: Vec<(Delivery, Option<u64>)>) -> Vec<Finished> {
        let contexts = batch.iter().map(|(delivery, _)| {
            let ctx = Context::new(delivery.message().clone(), self.tools.clone());
            (ctx, self.by(delivery))
        });
        let outcomes = chain.handle_together(contexts.collect()).await;
        let mut finished = Vec::with_capacity(batch.len());
        for ((delivery, key), handled) in batch.into_iter().zip(outcomes) {
            finished.push(self.finish(delivery, key, handled).await);
        }
        finished
    }

    /// What becomes of a message nobody here handles: `None` if it is not for this group.
    fn without_chain(&self, message: &Message) -> Option<Handled> {
        let known = message.kind().rsplit_once(".v").and_then(|(name, _)| {
            let known = self.chains.iter().find(|(_, chain)| chain.name() == name);
            known.map(|(kind, _)| kind.as_str())
        });
        let now = self.tools.clock.now();
        match known {
            Some(known) => {
                let why = format!("this process handles {known}, not {}", message.kind());
                if !self.parks {
                    return Some(Handled::dead(now, why));
                }
                // A rolling deploy: another process, or this one's next version, will handle it.
                tracing::warn!(group = %self.group, message = %message.id(), "{why}: it waits for one that does");
                Some(Handled::Parked {
                    after: Some(ANOTHER_VERSION),
                    attempts: 0,
                    errors: vec![AttemptError::new(now, 0, why)],
                })
            }
            None if self.dead_letter_unknown => {
                let why = format!("this group has no handler for {}", message.kind());
                Some(Handled::dead(now, why))
            }
            None => None,
        }
    }

    /// Does what has become of a message, and says what the broker is to be told: nothing is acknowledged before it is
    /// stored.
    async fn finish(&self, delivery: Delivery, key: Option<u64>, handled: Handled) -> Finished {
        let placement = match handled {
            Handled::Done => {
                self.counters.handled(1);
                let settlement = delivery.ack();
                return Finished {
                    settlement,
                    key,
                    is_parked: false,
                };
            }
            Handled::Released => {
                let settlement = delivery.release();
                return Finished {
                    settlement,
                    key,
                    is_parked: false,
                };
            }
            Handled::Retried { after } => {
                let settlement = delivery.retry(after);
                return Finished {
                    settlement,
                    key,
                    is_parked: false,
                };
            }
            Handled::Dead { attempts, errors } => return self.bury(delivery, key, attempts, errors).await,
            Handled::HeldBack => behind(),
            Handled::Parked {
                after,
                attempts,
                errors,
            } => Placement::Parked {
                after: after.unwrap_or_else(|| self.retry.backoff.after(attempts, &mut fastrand::Rng::new())),
                attempts,
                errors,
            },
        };
        let record = record(delivery.message(), placement);
        // Without an inbox there is nobody who would ever look there again.
        let is_parked = self.parks && self.store(std::slice::from_ref(&record)).await;
        let settlement = if is_parked {
            self.counters.parked(1);
            delivery.ack()
        } else {
            delivery.release()
        };
        Finished {
            settlement,
            key,
            is_parked,
        }
    }

    /// Parks deliveries behind what waits of their key.
    async fn park_behind(&self, deliveries: Vec<Delivery>, key: Option<u64>) -> Vec<Finished> {
        let records: Vec<_> = deliveries.iter().map(|d| record(d.message(), behind())).collect();
        let is_parked = self.store(&records).await;
        if is_parked {
            self.counters.parked(records.len());
        }
        let settle = |delivery: Delivery| if is_parked { delivery.ack() } else { delivery.release() };
        let finished = |delivery| Finished {
            settlement: settle(delivery),
            key,
            is_parked,
        };
        deliveries.into_iter().map(finished).collect()
    }

    /// Makes a dead letter: in the log's inbox of the group, and only then is the broker's copy acknowledged.
    async fn bury(&self, delivery: Delivery, key: Option<u64>, attempts: u32, errors: Vec<AttemptError>) -> Finished {
        let message = delivery.message();
        tracing::error!(message = %message.id(), topic = %message.topic(), group = %self.group, attempts, error = errors.last().map(|e| &*e.text), "the message could not be handled: it is a dead letter");
        let settlement = if self.tools.log.is_none() {
            self.counters.dead_lettered(1);
            delivery.dead_letter()
        } else {
            let record = record(message, Placement::Failed { attempts, errors });
            if self.store(std::slice::from_ref(&record)).await {
                self.counters.dead_lettered(1);
                delivery.ack()
            } else {
                delivery.release()
            }
        };
        Finished {
            settlement,
            key,
            is_parked: false,
        }
    }
}
