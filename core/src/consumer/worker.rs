//! The loop of a subscription: take → look → handle → settle.

use super::{
    gathering::Gatherings,
    shared::{Finished, Shared},
};
use crate::{Delivery, ErrorKind, Intake, Settlement, Settling, Taken, log::Admission};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    collections::VecDeque,
    sync::{Arc, atomic::Ordering},
    task::{Context as TaskContext, Poll, Waker},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// The longest a settle or a close may take when there is no other deadline.
const LAST_WORDS: Duration = Duration::from_secs(5);
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
        for (delivery, mut answer) in looked.deliveries.into_iter().zip(answers) {
            let key = delivery.message().key_hash();
            // Those before it in this loop may have been parked at once, too.
            if answer == Admission::New && key.is_some_and(|key| hand.parked_meanwhile.contains(&key)) {
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
        if finished.is_parked && self.shared.asks_the_inbox {
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
