//! What a worker has in hand, and what comes next of it: of each key one at a time, in order.

use super::{
    super::{
        crew::{Ended, EndedRun, Job, Run},
        gathering::Gatherings,
        shared::Finished,
    },
    Worker,
};
use crate::{Delivery, Settlement, log::Admission};
use futures_util::{future::BoxFuture, stream::FuturesUnordered};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{collections::VecDeque, time::Duration};

/// Parks deliveries of one key behind what waits of it.
type Parking = BoxFuture<'static, Vec<Finished>>;

/// The most messages of a key that are handed over at once.
const RUN: usize = 64;

/// Deliveries the inbox has been asked about.
pub(super) struct Looked {
    pub(super) deliveries: Vec<Delivery>,
    pub(super) answers: Option<Vec<Admission>>,
}

/// Behind another of its key.
pub(super) struct Waiting {
    pub(super) delivery: Delivery,
    /// The inbox holds something of its key that it has to wait for, too.
    is_held_back: bool,
}

/// What a worker has in hand.
#[derive(Default)]
pub(super) struct InHand {
    pub(super) parking: FuturesUnordered<Parking>,
    /// With the crew, or being parked.
    pub(super) handled: usize,
    /// The keys being handled, each with what waits behind.
    pub(super) keys: FxHashMap<u64, VecDeque<Waiting>>,
    pub(super) waiting: usize,
    /// Keys whose first message waits to be begun.
    pub(super) to_start: Vec<u64>,
    /// To be handed to the crew.
    pub(super) jobs: Vec<Job>,
    /// The inbox is to be asked about them, once it has answered for those before.
    pub(super) to_look: Vec<Delivery>,
    pub(super) looked_at: usize,
    /// Keys parked since the inbox was asked: its answer is out of date for them.
    pub(super) parked_meanwhile: FxHashSet<u64>,
    pub(super) gatherings: Gatherings,
    pub(super) settlements: Vec<Settlement>,
    pub(super) being_settled: usize,
}

impl InHand {
    pub(super) fn len(&self) -> usize {
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
    pub(super) fn begin_looked(&self, hand: &mut InHand, looked: Looked, is_stopping: bool) {
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
    pub(super) fn begin(&self, hand: &mut InHand, delivery: Delivery, answer: Admission) {
        if matches!(answer, Admission::Duplicate | Admission::Parked) || self.was_handled(&delivery) {
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

    /// Whether this member handled the message before and could not acknowledge it. Where the broker counts deliveries, a first
    /// delivery never matches, so a message that is published again on purpose is handled.
    fn was_handled(&self, delivery: &Delivery) -> bool {
        let shared = &self.shared;
        let may_be = !shared.counts_deliveries || delivery.delivery_count() > 1;
        let message = delivery.message();
        let was_handled = may_be && shared.unacknowledged.take(message, &*shared.tools.clock);
        if was_handled {
            tracing::debug!(group = %shared.group, message = %message.id(), topic = %message.topic(), "it was handled before, and is acknowledged now");
        }
        was_handled
    }

    /// Begins the keys whose turn has come.
    pub(super) fn start_keys(&self, hand: &mut InHand) {
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
    pub(super) fn start_gathered(&self, hand: &mut InHand) -> Option<Duration> {
        while let Some((chain, batch)) = hand.gatherings.next(&*self.shared.tools.clock) {
            hand.handled += batch.len();
            hand.jobs.push(Job::Together(chain, batch));
        }
        hand.gatherings.wait(&*self.shared.tools.clock)
    }

    pub(super) fn ended(&self, hand: &mut InHand, ended: Ended) {
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
    pub(super) fn parked(&self, hand: &mut InHand, mut several: Vec<Finished>) {
        let last = several.pop();
        hand.handled -= several.len() + usize::from(last.is_some());
        hand.settlements
            .extend(several.into_iter().map(|finished| finished.settlement));
        if let Some(last) = last {
            self.settled(hand, last.key, Some(last), VecDeque::new());
        }
    }

    /// Takes back what the crew has not begun: the subscription is stopping.
    pub(super) fn take_back(&self, hand: &mut InHand, job: Job) {
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
pub(super) fn drop_gone(hand: &mut InHand, assignment: crate::Assignment) {
    for waiting in hand.keys.values_mut() {
        waiting.retain(|waiting| waiting.delivery.assignment() != assignment);
    }
    hand.waiting = hand.keys.values().map(VecDeque::len).sum();
    hand.to_look.retain(|delivery| delivery.assignment() != assignment);
}
