//! The loop of a subscription: take → handle → settle.

use super::{
    Context, Retry,
    chain::{AnyChain, Handled, HandledBy},
    running::Counters,
};
use crate::{
    Delivery, ErrorKind, EventBus, EventLog, GroupName, Intake, Mailbox, Message, Settlement, Settling, Taken,
    clock::Clock,
    log::{AttemptError, NewRecord, Placement},
};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::FxHashMap;
use std::{
    collections::VecDeque,
    sync::Arc,
    task::{Context as TaskContext, Poll, Waker},
    time::Duration,
};
use tokio_util::sync::CancellationToken;

/// What the handling of a message needs: shared by those in flight.
#[derive(Debug)]
pub(super) struct Shared {
    pub(super) group: Arc<GroupName>,
    pub(super) chains: FxHashMap<String, Box<dyn AnyChain>>,
    pub(super) retry: Retry,
    pub(super) bus: Arc<dyn EventBus>,
    pub(super) log: Option<EventLog>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) counters: Arc<Counters>,
    pub(super) stop: CancellationToken,
}

/// The longest a settle or a close may take when there is no other deadline.
const LAST_WORDS: Duration = Duration::from_secs(5);
/// Between tries to reach a transport or a log that failed.
const PAUSE: Duration = Duration::from_millis(500);
/// And while a transport fails to take outcomes, which makes messages come again at once: twice as long each time, up to this.
const LONGEST_PAUSE: Duration = Duration::from_secs(30);

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) intake: Intake,
    pub(super) settling: Settling,
    pub(super) max_in_flight: usize,
    pub(super) ordered: bool,
    pub(super) kill: CancellationToken,
}

struct Finished {
    settlement: Settlement,
    key: Option<u64>,
}

type Handling = BoxFuture<'static, Finished>;

/// What a worker has in hand.
#[derive(Default)]
struct InHand {
    handling: FuturesUnordered<Handling>,
    /// The keys being handled, each with what waits behind.
    keys: FxHashMap<u64, VecDeque<Delivery>>,
    waiting: usize,
    settlements: Vec<Settlement>,
    being_settled: usize,
}

impl InHand {
    fn len(&self) -> usize {
        self.handling.len() + self.waiting + self.settlements.len() + self.being_settled
    }
}

impl Worker {
    pub(super) async fn run(mut self) {
        let mut hand = InHand::default();
        let mut settle: Option<BoxFuture<'static, bool>> = None;
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
            let room = self.max_in_flight.saturating_sub(hand.len());
            let takes = room > 0 && !is_stopping && pause.is_none();
            tokio::select! {
                biased;
                () = self.kill.cancelled() => break,
                () = self.shared.stop.cancelled(), if !is_stopping => {
                    is_stopping = true;
                    for waiting in hand.keys.values_mut() {
                        hand.settlements.extend(waiting.drain(..).map(Delivery::release));
                    }
                    hand.waiting = 0;
                }
                Some(finished) = hand.handling.next(), if !hand.handling.is_empty() => {
                    self.finished(&mut hand, finished);
                    while let Some(Some(finished)) = hand.handling.next().now_or_never() {
                        self.finished(&mut hand, finished);
                    }
                }
                failed = ready(&mut settle), if settle.is_some() => {
                    settle = None;
                    hand.being_settled = 0;
                    if failed {
                        let clock = self.shared.clock.clone();
                        let length = next_pause;
                        next_pause = (next_pause * 2).min(LONGEST_PAUSE);
                        pause = Some(async move { clock.sleep(length).await }.boxed());
                    } else {
                        next_pause = PAUSE;
                    }
                }
                () = ready(&mut pause), if pause.is_some() => pause = None,
                taken = self.intake.next(room), if takes => match taken {
                    Ok(Taken::Batch(batch)) => {
                        Counters::add(&self.shared.counters.delivered, batch.len());
                        for delivery in batch {
                            self.begin(&mut hand, delivery);
                        }
                    }
                    Ok(Taken::Gone(assignment)) => drop_gone(&mut hand, assignment),
                    Err(error) if error.kind() == ErrorKind::Closed => is_stopping = true,
                    Err(error) => {
                        tracing::warn!(group = %self.shared.group, error = error.to_chain(), "the subscription cannot receive, it will be tried again");
                        let clock = self.shared.clock.clone();
                        pause = Some(async move { clock.sleep(PAUSE).await }.boxed());
                    }
                },
            }
        }
        // What is still being handled is dropped, and with it its delivery, which releases it.
        drop(hand);
        if let Some(settle) = settle {
            let _ = tokio::time::timeout(LAST_WORDS, settle).await;
        }
        if let Err(error) = self.settling.close(LAST_WORDS).await {
            tracing::warn!(group = %self.shared.group, error = error.to_chain(), "the subscription was not closed cleanly: messages may come again");
        }
    }

    /// Tells the broker the outcomes. Gives whether it failed to do what they say.
    fn settle(&self, hand: &mut InHand) -> BoxFuture<'static, bool> {
        let batch = std::mem::take(&mut hand.settlements);
        hand.being_settled = batch.len();
        let (settling, shared) = (self.settling.clone(), self.shared.clone());
        async move {
            let errors = settling.settle(batch).await;
            Counters::add(&shared.counters.unsettled, errors.len());
            if let Some(error) = errors.first() {
                tracing::warn!(group = %shared.group, messages = errors.len(), error = error.to_chain(), "outcomes were not taken: the messages come again");
            }
            // A partition that has gone to somebody else is nobody's failure.
            errors.iter().any(|error| error.kind() != ErrorKind::LeaseLost)
        }
        .boxed()
    }

    /// Handles a delivery now, or behind those of its key.
    fn begin(&self, hand: &mut InHand, delivery: Delivery) {
        let key = if self.ordered {
            delivery.message().key_hash()
        } else {
            None
        };
        if let Some(key) = key {
            match hand.keys.entry(key) {
                std::collections::hash_map::Entry::Occupied(mut busy) => {
                    busy.get_mut().push_back(delivery);
                    hand.waiting += 1;
                    return;
                }
                std::collections::hash_map::Entry::Vacant(free) => {
                    free.insert(VecDeque::new());
                }
            }
        }
        self.start(hand, delivery, key);
    }

    /// Handles a delivery, and those of its key behind it for as long as handlers have nothing to wait for.
    fn start(&self, hand: &mut InHand, delivery: Delivery, key: Option<u64>) {
        let mut next = Some(delivery);
        while let Some(delivery) = next.take() {
            let shared = self.shared.clone();
            let mut handling: Handling = Box::pin(async move {
                let settlement = shared.handle(delivery).await;
                Finished { settlement, key }
            });
            // Most handlers of a busy group are quick: the set of futures, which costs more than they do, is for those
            // that wait. What is put in it is polled again, so the waker of this first poll need not wake anybody.
            match handling.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())) {
                Poll::Ready(finished) => next = Self::settled(hand, finished),
                Poll::Pending => hand.handling.push(handling),
            }
        }
    }

    fn finished(&self, hand: &mut InHand, finished: Finished) {
        let key = finished.key;
        if let Some(next) = Self::settled(hand, finished) {
            self.start(hand, next, key);
        }
    }

    /// Notes the outcome, and gives the next of the key.
    fn settled(hand: &mut InHand, finished: Finished) -> Option<Delivery> {
        let comes_again = finished.settlement.comes_again();
        hand.settlements.push(finished.settlement);
        let key = finished.key?;
        let waiting = hand.keys.get_mut(&key)?;
        if comes_again {
            // What waits behind it comes again behind it.
            hand.waiting -= waiting.len();
            hand.settlements.extend(waiting.drain(..).map(Delivery::release));
        }
        let next = waiting.pop_front();
        if next.is_some() {
            hand.waiting -= 1;
        } else {
            hand.keys.remove(&key);
        }
        next
    }
}

/// What waits of an assignment that is gone is released unhandled.
fn drop_gone(hand: &mut InHand, assignment: crate::Assignment) {
    for waiting in hand.keys.values_mut() {
        waiting.retain(|delivery| delivery.assignment() != assignment);
    }
    hand.waiting = hand.keys.values().map(VecDeque::len).sum();
}

async fn ready<T>(job: &mut Option<BoxFuture<'static, T>>) -> T {
    match job {
        Some(job) => job.await,
        None => std::future::pending().await,
    }
}

impl Shared {
    /// Takes a message through its chain, and says what the broker is to be told.
    async fn handle(&self, delivery: Delivery) -> Settlement {
        let message = delivery.message();
        let handled = match self.chains.get(message.kind()) {
            Some(chain) => {
                let mut ctx = Context::new(message.clone(), self.group.clone(), self.bus.clone());
                let by = HandledBy {
                    retry: &self.retry,
                    clock: &*self.clock,
                    stop: &self.stop,
                };
                chain.handle(&mut ctx, &by).await
            }
            None => match self.other_version(message) {
                Some(known) => {
                    let why = format!("this group handles {known}, not {}", message.kind());
                    Handled::dead(self.clock.now(), why)
                }
                None => {
                    Counters::add(&self.counters.ignored, 1);
                    return delivery.ack();
                }
            },
        };
        match handled {
            Handled::Done => {
                Counters::add(&self.counters.handled, 1);
                delivery.ack()
            }
            Handled::Released => delivery.release(),
            Handled::Dead { attempts, errors } => self.bury(delivery, attempts, errors).await,
        }
    }

    /// The type of a chain with the name of this message's type and another version.
    fn other_version(&self, message: &Message) -> Option<&str> {
        let (name, _) = message.kind().rsplit_once(".v")?;
        let known = self.chains.iter().find(|(_, chain)| chain.name() == name);
        known.map(|(kind, _)| kind.as_str())
    }

    /// Makes a dead letter: in the log's inbox of the group, and only then is the broker's copy acknowledged.
    async fn bury(&self, delivery: Delivery, attempts: u32, errors: Vec<AttemptError>) -> Settlement {
        let message = delivery.message();
        tracing::error!(message = %message.id(), topic = %message.topic(), group = %self.group, attempts, error = errors.last().map(|e| &*e.text), "the message could not be handled: it is a dead letter");
        let Some(log) = &self.log else {
            Counters::add(&self.counters.dead_lettered, 1);
            return delivery.dead_letter();
        };
        let inbox = Mailbox::Inbox((*self.group).clone());
        let record = NewRecord::new(message.clone()).placed(Placement::Failed { attempts, errors });
        // The log being away costs nothing but time: nothing is acknowledged before it is written.
        while let Err(error) = log.store().append(&inbox, std::slice::from_ref(&record)).await {
            tracing::warn!(group = %self.group, error = error.to_chain(), "the dead letter cannot be stored, it will be tried again");
            if self.stop.run_until_cancelled(self.clock.sleep(PAUSE)).await.is_none() {
                return delivery.release();
            }
        }
        Counters::add(&self.counters.dead_lettered, 1);
        delivery.ack()
    }
}
