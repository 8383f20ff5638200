//! What the handlings of a subscription share, and what they make of a message: nothing is acknowledged before it is stored.

use super::{
    Context, Retry, Verdict,
    chain::AnyChain,
    context::Tools,
    gate::Gate,
    handled::{Handled, HandledBy, Origin},
    inbox::{ANOTHER_VERSION, Stored, behind, record},
    members::{Members, Who},
    running::Counters,
    unacknowledged::Unacknowledged,
};
use crate::{
    Delivery, GroupName, Message, Settlement, Topic,
    health::{PartState, Status, Trouble},
    log::{AttemptError, Placement},
    relay::Wake,
    subscriber::Lag,
};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

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
    /// The transport keeps dead letters of its own.
    pub(super) has_dead_letters: bool,
    /// The broker counts how often it delivers a message.
    pub(super) counts_deliveries: bool,
    /// How many of the next deliveries may have ended the process before, where the broker does not count.
    pub(super) young: AtomicUsize,
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
    /// The group's members, where there is an inbox.
    pub(super) members: Option<Members>,
    /// The handlings of messages from the inbox.
    pub(super) from_inbox: TaskTracker,
    /// Messages that are suspected of ending the process are handled one at a time, so that only the culprit is counted.
    pub(super) suspects: tokio::sync::Semaphore,
    /// Types and topics that were warned of.
    pub(super) warned: Mutex<FxHashSet<(String, Topic)>>,
    /// How many messages wait with the broker. It comes from the current feed, or from the last one.
    pub(super) lag: Mutex<Lag>,
    /// Done with, though the broker does not know.
    pub(super) unacknowledged: Unacknowledged,
    pub(super) status: Arc<Status>,
    /// Whether it has ever been connected.
    pub(super) connected: tokio::sync::watch::Sender<bool>,
}

/// Processes die for other reasons, too: fewer starts say nothing against a message, however few attempts it has.
const FEWEST_STARTS: u32 = 3;

/// So many deliveries after a join may have ended the process before, where the broker does not count: those at the front.
const MOST_YOUNG: usize = 64;

/// After so many starts that did not end, a message is handled alone among those.
const SUSPECTED: u32 = 2;

/// The most types and topics that are warned of.
const MOST_WARNED: usize = 1000;

/// A message that has been handled, and its key.
pub(super) struct Finished {
    pub(super) settlement: Settlement,
    pub(super) key: Option<u64>,
    /// It waits in the inbox, and those of its key with it.
    pub(super) is_parked: bool,
}

impl Shared {
    pub(super) fn gathers(&self, delivery: &Delivery) -> Option<Arc<dyn AnyChain>> {
        // One that came before is handled by itself: it may be what ended the process.
        if !self.any_gathers || (self.counts_deliveries && self.parks && delivery.delivery_count() > 1) {
            return None;
        }
        let message = delivery.message();
        let chain = self.chains.get(message.kind())?;
        chain.gathering()?;
        Some(chain.clone())
    }

    fn by<'a>(&'a self, delivery: &Delivery) -> HandledBy<'a> {
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
            attempts: delivery.attempts(),
        }
    }

    /// Takes a message through its chain, and says what the broker is to be told.
    pub(super) async fn handle(&self, delivery: Delivery, key: Option<u64>) -> Finished {
        let message = delivery.message();
        let handled = match self.chains.get(message.kind()) {
            Some(chain) if chain.is_durable() => Handled::Parked {
                after: Some(Duration::ZERO),
                attempts: 0,
                errors: Vec::new(),
            },
            Some(chain) if self.is_suspicious(&delivery) => Box::pin(self.handle_counted(&**chain, &delivery)).await,
            Some(chain) => {
                let mut ctx = Context::new(message.clone(), self.tools.clone());
                chain.handle(&mut ctx, &self.by(&delivery)).await
            }
            None => Box::pin(self.without_chain(message)).await,
        };
        self.finish(delivery, key, handled).await
    }

    /// The same for a message that may have ended the process before: so often, and it is a dead letter.
    async fn handle_counted(&self, chain: &dyn AnyChain, delivery: &Delivery) -> Handled {
        let message = delivery.message();
        // Not while it would only wait for an outage to end.
        if self.gate.pass(&*self.tools.clock, &self.stop).await.is_none() {
            return Handled::Released;
        }
        let start = self.starts(message).await;
        let is_suspected = start.as_ref().is_some_and(|start| start.before >= SUSPECTED);
        let _alone = match is_suspected {
            true => self.stop.run_until_cancelled(self.suspects.acquire()).await,
            false => None,
        };
        let start = match start {
            Some(start) => self.begin_start(start).await,
            None => None,
        };
        if let Some(start) = &start
            && start.before >= self.retry.max_attempts.max(FEWEST_STARTS)
        {
            let why = format!(
                "the process ended, or was cut off, {} times while it handled this message",
                start.before
            );
            return Handled::dead(self.tools.clock.now(), why);
        }
        let mut ctx = Context::new(message.clone(), self.tools.clone());
        let handled = chain.handle(&mut ctx, &self.by(delivery)).await;
        if let Some(start) = start {
            self.end_start(start).await;
        }
        handled
    }

    /// Several messages through one chain, together: `each` is given what became of each, by its place, when it is known.
    pub(super) async fn handle_together(
        &self,
        chain: &dyn AnyChain,
        batch: Vec<(Delivery, Option<u64>)>,
        each: impl Fn(usize, Finished),
    ) {
        let contexts = batch.iter().map(|(delivery, _)| {
            let ctx = Context::new(delivery.message().clone(), self.tools.clone());
            (ctx, self.by(delivery))
        });
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        let contexts = contexts.collect();
        let mut batch: Vec<_> = batch.into_iter().map(Some).collect();
        let finish = async {
            while let Some((at, handled)) = told.recv().await {
                if let Some((delivery, key)) = batch.get_mut(at).and_then(Option::take) {
                    each(at, self.finish(delivery, key, handled).await);
                }
            }
        };
        futures_util::future::join(chain.handle_together(contexts, tell), finish).await;
        // Those that nothing was told of were not finished when the subscription was stopped.
        for (at, left) in batch.into_iter().enumerate() {
            if let Some((delivery, key)) = left {
                each(at, self.finish(delivery, key, Handled::Released).await);
            }
        }
    }

    /// Whether it is in its group, as far as it knows.
    pub(super) fn is_joined(&self) -> bool {
        *self.connected.borrow() && self.status.has(Trouble::Broker).is_none()
    }

    /// Why the broker counts as away, if it does.
    pub(super) fn broker_away(&self) -> Option<String> {
        self.status.has(Trouble::Broker)?;
        self.status.health().error.map(|error| error.text)
    }

    /// It has joined its group.
    pub(super) fn is_connected(&self) {
        if !self.gate.is_paused() {
            self.status.is(PartState::Running);
        }
        if !self.counts_deliveries {
            let young = self.max_in_flight.load(Ordering::Relaxed).min(MOST_YOUNG);
            self.young.store(young, Ordering::Relaxed);
        }
        self.connected.send_replace(true);
    }

    /// A handling panicked outside of what catches the panics of handlers and middleware: a defect of this crate.
    pub(super) fn panicked(&self) {
        tracing::error!(group = %self.group, "the handling of a message panicked: the message is released and comes again");
    }

    /// The type of this subscription that a message is another version of.
    pub(super) fn another_version(&self, message: &Message) -> Option<&str> {
        let (name, _) = message.kind().rsplit_once(".v")?;
        let known = self.chains.iter().find(|(_, chain)| chain.name() == name);
        known.map(|(kind, _)| kind.as_str())
    }

    /// Whether no message of this type and topic was seen before. At most [`MOST_WARNED`] pairs are remembered.
    fn is_new(&self, message: &Message) -> bool {
        let mut warned = self.warned.lock().unwrap_or_else(PoisonError::into_inner);
        warned.len() < MOST_WARNED && warned.insert((message.kind().to_owned(), message.topic().clone()))
    }

    /// Warns once of each type that this member does not handle.
    pub(super) fn warn_once(&self, message: &Message, what: &str) {
        if self.is_new(message) {
            tracing::warn!(group = %self.group, kind = message.kind(), topic = %message.topic(), message = %message.id(), "this member of the group does not handle the type: {what}");
        }
    }

    /// What becomes of a message whose type this member does not handle. It is acknowledged only if nobody in the group
    /// handles the type, and it comes from a topic this member has asked for.
    async fn without_chain(&self, message: &Message) -> Handled {
        let now = self.tools.clock.now();
        if message.content_type().starts_with("application/cloudevents-batch") {
            let why = "a batch of CloudEvents is not taken apart: have its events sent one by one";
            return Handled::dead(now, why.to_owned());
        }
        let parked = |after, why| Handled::Parked {
            after: Some(after),
            attempts: 0,
            errors: vec![AttemptError::new(now, 0, why)],
        };
        if let Some(known) = self.another_version(message) {
            let why = format!("this process handles {known}, not {}", message.kind());
            if !self.parks {
                return Handled::dead(now, why);
            }
            // A rolling deploy: another process, or this one's next version, will handle it.
            self.warn_once(
                message,
                "it waits in the inbox for a member that handles this version of the type",
            );
            return parked(ANOTHER_VERSION, why);
        }
        let mut is_asked_for = true;
        if let Some(members) = &self.members {
            let why = format!("this member of the group does not handle {}", message.kind());
            match self.who_handles(members, message).await {
                None => return Handled::Released,
                Some(Who::Running) => {
                    // As in each rolling deploy; members that disagree for long are warned of.
                    if self.is_new(message) {
                        tracing::info!(group = %self.group, kind = message.kind(), topic = %message.topic(), message = %message.id(), "this member of the group does not handle the type: it waits in the inbox for a member that does");
                    }
                    return parked(Duration::ZERO, why);
                }
                Some(Who::Recent) => {
                    self.warn_once(message, "it waits in the inbox for a member that did, within a day");
                    return parked(ANOTHER_VERSION, why);
                }
                Some(Who::Nobody { .. }) => is_asked_for = members.asks_for(message.topic()),
            }
        }
        if !is_asked_for {
            self.warn_once(
                message,
                "nor has it asked for the topic, so the message waits in the inbox",
            );
            let why = format!("this member of the group has not asked for topic `{}`", message.topic());
            return parked(ANOTHER_VERSION, why);
        }
        if self.dead_letter_unknown {
            let why = format!("this group has no handler for {}", message.kind());
            return Handled::dead(now, why);
        }
        self.warn_once(message, "no member does, so it is acknowledged and counted as ignored");
        Handled::Ignored
    }

    /// Does what has become of a message, and says what the broker is to be told: nothing is acknowledged before it is
    /// stored.
    async fn finish(&self, delivery: Delivery, key: Option<u64>, handled: Handled) -> Finished {
        let settlement = match handled {
            Handled::Done => {
                self.counters.handled(1);
                delivery.ack()
            }
            Handled::Dropped { waits } => {
                self.counters.dropped(1);
                return Finished {
                    settlement: delivery.ack(),
                    key,
                    is_parked: waits,
                };
            }
            Handled::Ignored => {
                self.counters.ignored(1);
                delivery.ack()
            }
            Handled::Deferred { after, attempts, error } => {
                let errors = vec![error];
                let placement = Placement::Parked {
                    after,
                    attempts,
                    errors,
                };
                return Box::pin(self.park(delivery, key, placement)).await;
            }
            Handled::Released => delivery.release(),
            Handled::Retried { after, attempts } => delivery.retry(after, attempts),
            // Seldom, and large: apart.
            Handled::Dead { attempts, errors } => return Box::pin(self.bury(delivery, key, attempts, errors)).await,
            Handled::HeldBack => return Box::pin(self.park(delivery, key, behind())).await,
            Handled::Parked {
                after,
                attempts,
                errors,
            } => {
                let placement = Placement::Parked {
                    after: after.unwrap_or_else(|| self.retry.backoff.after(attempts, &mut fastrand::Rng::new())),
                    attempts,
                    errors,
                };
                return Box::pin(self.park(delivery, key, placement)).await;
            }
        };
        Finished {
            settlement,
            key,
            is_parked: false,
        }
    }

    async fn park(&self, delivery: Delivery, key: Option<u64>, placement: Placement) -> Finished {
        let record = record(delivery.message(), placement);
        // Without an inbox there is nobody who would ever look there again.
        let stored = match self.parks {
            true => self.store(std::slice::from_ref(&record)).await,
            false => Stored::Stopped,
        };
        if stored == Stored::Yes {
            self.counters.parked(1);
        }
        self.stored(delivery, key, stored)
    }

    /// What the broker is told of a message that was to be stored in the inbox.
    fn stored(&self, delivery: Delivery, key: Option<u64>, stored: Stored) -> Finished {
        let settlement = match stored {
            Stored::Yes => delivery.ack(),
            // The log never takes it: the transport may. Where that cannot either, the message comes again.
            Stored::Refused if self.has_dead_letters => {
                self.counters.dead_lettered(1);
                delivery.dead_letter()
            }
            Stored::Refused | Stored::Stopped => delivery.release(),
        };
        Finished {
            settlement,
            key,
            is_parked: stored == Stored::Yes,
        }
    }

    /// Parks deliveries behind what waits of their key.
    pub(super) async fn park_behind(&self, deliveries: Vec<Delivery>, key: Option<u64>) -> Vec<Finished> {
        let records: Vec<_> = deliveries.iter().map(|d| record(d.message(), behind())).collect();
        let mut all = self.store(&records).await;
        let mut finished = Vec::with_capacity(deliveries.len());
        for (delivery, record) in deliveries.into_iter().zip(&records) {
            let mut stored = all;
            if all == Stored::Refused && records.len() > 1 {
                stored = self.store(std::slice::from_ref(record)).await;
                if stored == Stored::Stopped {
                    all = Stored::Stopped;
                }
            }
            if stored == Stored::Yes {
                self.counters.parked(1);
            }
            finished.push(self.stored(delivery, key, stored));
        }
        finished
    }

    /// Makes a dead letter: in the log's inbox of the group, and only then is the broker's copy acknowledged.
    async fn bury(&self, delivery: Delivery, key: Option<u64>, attempts: u32, errors: Vec<AttemptError>) -> Finished {
        let message = delivery.message();
        tracing::error!(message = %message.id(), topic = %message.topic(), group = %self.group, attempts, error = errors.last().map(|e| &*e.text), "the message could not be handled: it is a dead letter");
        // Where its key waits for a person, so does what is in hand of it.
        let hold_key = self.parks && key.is_some() && self.tools.bus.relay_options().holds_key(message.topic());
        let mut is_parked = false;
        let settlement = if self.tools.log.is_none() {
            self.counters.dead_lettered(1);
            delivery.dead_letter()
        } else {
            let placement = Placement::Failed {
                attempts,
                errors,
                hold_key,
            };
            let record = record(message, placement);
            let stored = self.store(std::slice::from_ref(&record)).await;
            if stored == Stored::Yes {
                self.counters.dead_lettered(1);
                is_parked = hold_key;
            }
            self.stored(delivery, key, stored).settlement
        };
        Finished {
            settlement,
            key,
            is_parked,
        }
    }
}
