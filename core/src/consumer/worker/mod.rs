//! The loop of a subscription: take → look → handle → settle.

mod hand;

use super::{
    crew::{Crew, Ended},
    shared::Shared,
};
use crate::health::{PartState, Trouble};
use crate::{Delivery, Error, ErrorKind, Intake, Reachability, Settling, Taken, log::Admission};
use futures_util::{FutureExt as _, StreamExt as _, future::BoxFuture};
use hand::{InHand, Looked, drop_gone};
use std::{
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
/// After so long without another word of it the group is open to this member again. Transports repeat it more often.
const REFUSED: Duration = Duration::from_secs(25);
/// How long health stays degraded after the broker deleted unread messages.
const MISSED: Duration = Duration::from_secs(10 * 60);
const MISSED_FIX: &str = "have the broker keep messages for longer than a group may be behind or away; what is missing has to be had from its source";
const REFUSED_FIX: &str =
    "give the user the rights that the error names, or make the settings of the group's members the same";

pub(super) struct Worker {
    pub(super) shared: Arc<Shared>,
    pub(super) intake: Intake,
    pub(super) settling: Settling,
    pub(super) kill: CancellationToken,
}

/// How a worker ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum WorkerEnd {
    /// The subscription was stopped.
    Stopped,
    /// The transport ended the feed.
    Closed,
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
        // Until the group counts as open to this member again, if the transport does not say once more that it is not.
        let mut refused: Option<BoxFuture<'static, ()>> = None;
        // Until health no longer shows that messages were missed; those of a worker before this one, too.
        let mut missed = shared.status.has(Trouble::Missed).map(|_| shared.wait(MISSED));
        let mut settle_is_late: Option<BoxFuture<'static, ()>> = None;
        let mut empty_batches: u32 = 0;
        let mut pause: Option<BoxFuture<'static, ()>> = None;
        loop {
            tokio::task::coop::consume_budget().await;
            if settle.is_none() && (!hand.settlements.is_empty() || self.settling.has_dropped()) {
                settle = Some(self.settle(&mut hand));
                settle_is_late = Some(shared.wait(LATE));
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
            let mut gathering = self.start_gathered(&mut hand).map(|wait| shared.wait(wait));
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
            let mut probing = probing.map(|wait| shared.wait(wait));
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
                        pause = Some(shared.wait(next_pause));
                        next_pause = (next_pause * 2).min(LONGEST_PAUSE);
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
                () = ready(&mut refused), if refused.is_some() => {
                    refused = None;
                    shared.is_let_in();
                }
                () = ready(&mut missed), if missed.is_some() => {
                    missed = None;
                    shared.status.clear(Trouble::Missed);
                    tracing::info!(group = %shared.group, "the broker has deleted nothing unread for {MISSED:?}");
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
                        pause = Some(shared.wait(SHORTEST_PAUSE.saturating_mul(1 << empty_batches.min(9)).min(PAUSE)));
                    }
                    Ok(Taken::Batch(batch)) => {
                        empty_batches = 0;
                        if broker_check.take().is_some() {
                            shared.status.clear(Trouble::Broker);
                        }
                        if refused.take().is_some() {
                            shared.is_let_in();
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
                    Ok(Taken::Missed { messages, why }) => {
                        shared.counters.missed(usize::try_from(messages).unwrap_or(usize::MAX));
                        let text = format!("the broker has deleted {messages} messages that the group had not read: {why}");
                        tracing::warn!(group = %shared.group, messages, "{text}");
                        shared.status.raise(Trouble::Missed, PartState::Degraded, text, Some(MISSED_FIX));
                        missed = Some(shared.wait(MISSED));
                    }
                    Err(error) if error.kind() == ErrorKind::Closed => {
                        end = WorkerEnd::Closed;
                        is_stopping = true;
                    }
                    // Nothing that a broker which comes back would mend.
                    Err(error) if error.kind() == ErrorKind::Config => {
                        if refused.is_none() {
                            tracing::warn!(group = %shared.group, error = error.to_chain(), "the broker does not let the group take what it asks for: it is tried again");
                        }
                        shared.status.raise(Trouble::Group, PartState::Degraded, error.to_chain(), Some(REFUSED_FIX));
                        refused = Some(shared.wait(REFUSED));
                        pause = Some(shared.wait(PAUSE));
                    }
                    Err(error) => {
                        shared.status.raise(Trouble::Broker, PartState::Degraded, error.to_chain(), None);
                        broker_check = Some(shared.check_broker());
                        tracing::warn!(group = %shared.group, error = error.to_chain(), "the subscription cannot receive, it will be tried again");
                        pause = Some(shared.wait(PAUSE));
                    }
                },
            }
        }
        // What is still being handled is dropped, and with it its delivery, which releases it.
        drop(hand);
        drop(looking);
        let last_words = if self.kill.is_cancelled() { CUT_OFF } else { LAST_WORDS };
        let late = || Err(Error::new(ErrorKind::Unavailable, "the feed did not close in time"));
        let closing = async {
            crew.end(last_words).await;
            if let Some(settle) = settle {
                let _ = tokio::time::timeout(last_words, settle).await;
            }
            // The limit is the driver's to keep; one that does not is not waited for.
            let close = self.settling.close(last_words);
            tokio::time::timeout(last_words + CUT_OFF, close)
                .await
                .unwrap_or_else(|_| late())
        };
        // The deadline of a stop may pass meanwhile.
        let cut_off = async {
            self.kill.cancelled().await;
            tokio::time::sleep(2 * CUT_OFF).await;
        };
        let closed = tokio::select! {
            biased;
            closed = closing => closed,
            () = cut_off => late(),
        };
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
            let (errors, unacknowledged) = settling.settle_each(batch).await;
            shared.counters.unsettled(errors.len());
            shared.unacknowledged.add(unacknowledged, shared.tools.clock.elapsed());
            if let Some(error) = errors.first() {
                tracing::warn!(group = %shared.group, messages = errors.len(), error = error.to_chain(), "outcomes were not taken: the messages come again");
            }
            // A partition that has gone to somebody else is nobody's failure.
            errors.iter().any(|error| error.kind() != ErrorKind::LeaseLost)
        }
        .boxed()
    }
}

async fn ready<T>(job: &mut Option<BoxFuture<'static, T>>) -> T {
    match job {
        Some(job) => job.await,
        None => std::future::pending().await,
    }
}

impl Shared {
    fn wait(&self, length: Duration) -> BoxFuture<'static, ()> {
        let clock = self.tools.clock.clone();
        async move { clock.sleep(length).await }.boxed()
    }

    /// The broker has nothing against the group any more.
    fn is_let_in(&self) {
        if self.status.clear(Trouble::Group) {
            tracing::info!(group = %self.group, "the broker lets the group take what it asks for");
        }
    }

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
