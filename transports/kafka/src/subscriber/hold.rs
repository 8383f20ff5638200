use super::member::Consumer;
use async_trait::async_trait;
use postrider_core::{
    Assignment, Disposition, Message, Result, Topic,
    partition::{self, Prefix, not_outstanding},
};
use rdkafka::{
    consumer::{Consumer as _, base_consumer::PartitionQueue},
    error::{KafkaError, RDKafkaErrorCode},
};
use std::{
    collections::BTreeSet,
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError, Weak},
};

pub(super) type Queue = PartitionQueue<super::member::Rebalances>;

/// A partition that this member has: its queue, and what is out of it.
pub(super) struct Hold {
    assignment: Assignment,
    pub(super) topic: Topic,
    pub(super) partition: i32,
    /// Until it is lost. A queue keeps the client, and whoever has the last handle on that waits for its end: the member's thread does.
    queue: Mutex<Option<Arc<Queue>>>,
    consumer: Weak<Consumer>,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    out: Prefix<Message>,
    /// The last that was handed out.
    last: Option<i64>,
    /// Settled in the assignment before this one, behind what was not: not to be handed out again.
    settled_before: BTreeSet<i64>,
    /// Where to begin again: the first that was released.
    released_from: Option<i64>,
    /// The partition's messages are others than those before.
    is_another_log: bool,
    /// The brokers do not have what comes next.
    lost_place: bool,
    /// They have said that this member may not have it,
    refused: Option<RDKafkaErrorCode>,
    /// and say it once: to hear of it again they have to be asked again.
    is_refused: bool,
    is_leaving: bool,
    is_gone: bool,
}

impl fmt::Debug for Hold {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Hold")
            .field("assignment", &self.assignment)
            .field("topic", &self.topic)
            .field("partition", &self.partition)
            .finish_non_exhaustive()
    }
}

fn position(offset: i64) -> u64 {
    offset.unsigned_abs()
}

fn offset(position: u64) -> i64 {
    i64::try_from(position).unwrap_or(i64::MAX)
}

impl Hold {
    pub(super) fn new(
        topic: Topic,
        partition: i32,
        queue: Arc<Queue>,
        consumer: &Arc<Consumer>,
        settled_before: BTreeSet<i64>,
    ) -> Self {
        let state = State {
            settled_before,
            ..State::default()
        };
        Self {
            assignment: Assignment::fresh(),
            topic,
            partition,
            queue: Mutex::new(Some(queue)),
            consumer: Arc::downgrade(consumer),
            state: Mutex::new(state),
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What comes of it, for a moment: nobody keeps that.
    pub(super) fn queue(&self) -> Option<Arc<Queue>> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Whether this offset is not behind all those before: then the hold begins anew from there, once nothing is out of it.
    pub(super) fn goes_back(&self, at: i64) -> bool {
        let mut state = self.state();
        let goes_back = state.last.is_some_and(|last| at <= last);
        if goes_back {
            state.is_leaving = true;
            state.released_from = Some(state.released_from.map_or(at, |from| from.min(at)));
            // Other messages have these offsets now.
            state.settled_before.clear();
            state.is_another_log = true;
        }
        goes_back
    }

    /// The brokers do not have what comes next: the hold begins anew elsewhere, once nothing is out of it. `false` if it was known.
    pub(super) fn lose_place(&self) -> bool {
        let mut state = self.state();
        state.is_leaving = true;
        !std::mem::replace(&mut state.lost_place, true)
    }

    pub(super) fn has_lost_place(&self) -> bool {
        self.state().lost_place
    }

    /// Notes that brokers do not give this member what it asks for.
    pub(super) fn refuse(&self, error: &KafkaError) {
        let mut state = self.state();
        state.refused = error.rdkafka_error_code();
        state.is_refused = true;
    }

    /// Whether they have said so since this was last called.
    pub(super) fn take_refusal(&self) -> Option<RDKafkaErrorCode> {
        self.state().refused.take()
    }

    /// Whether they are to be asked again.
    pub(super) fn asks_again(&self) -> bool {
        let mut state = self.state();
        state.out.outstanding() == 0 && std::mem::take(&mut state.is_refused)
    }

    /// Notes that a message is handed out. `false` if it must not be, any more or once more.
    pub(super) fn hand_out(&self, at: i64, message: &Message) -> bool {
        let mut state = self.state();
        if state.is_leaving {
            return false;
        }
        state.last = Some(at);
        let is_settled = !state.settled_before.is_empty() && state.settled_before.remove(&at);
        state.out.push(position(at), message.clone());
        if is_settled {
            state.out.settle(position(at));
            self.store(&mut state);
        }
        !is_settled
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.state().is_leaving
    }

    pub(super) fn is_idle(&self) -> bool {
        self.state().out.outstanding() == 0
    }

    /// Where to begin again, and what of that is settled.
    pub(super) fn begins_again(&self) -> Option<(i64, BTreeSet<i64>)> {
        let mut state = self.state();
        if state.lost_place {
            return None;
        }
        let from = state.released_from?;
        let mut settled = std::mem::take(&mut state.settled_before);
        if state.is_another_log {
            return Some((from, settled));
        }
        settled.extend(state.out.settled().map(offset));
        Some((from, settled.split_off(&from)))
    }

    /// What has to be handed out next, if anything was handed out.
    pub(super) fn next_offset(&self) -> Option<i64> {
        let state = self.state();
        let first = state.out.first_unsettled().map(offset);
        first.or_else(|| state.last.map(|last| last + 1))
    }

    pub(super) fn message(&self, at: u64) -> Option<Message> {
        self.state().out.get(at).cloned()
    }

    /// Notes in the client up to where everything is settled, to be committed. `false` if the partition is another's.
    fn store(&self, state: &mut State) -> bool {
        let Some(last) = state.out.advance() else { return true };
        let Some(consumer) = self.consumer.upgrade() else {
            return false;
        };
        match consumer.store_offset(self.topic.as_str(), self.partition, offset(last)) {
            Ok(()) => true,
            Err(error) => {
                tracing::debug!(%error, topic = %self.topic, self.partition, "the offset is not noted");
                false
            }
        }
    }
}

#[async_trait]
impl partition::Hold for Hold {
    fn assignment(&self) -> Assignment {
        self.assignment
    }

    fn leave(&self) -> bool {
        !std::mem::replace(&mut self.state().is_leaving, true)
    }

    fn lose(&self) {
        {
            let mut state = self.state();
            state.is_leaving = true;
            state.is_gone = true;
        }
        self.queue.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    async fn settle(&self, batch: &[(u64, Disposition)]) -> (Vec<Result<()>>, bool) {
        let mut state = self.state();
        let mut restarts = false;
        let is_gone = state.is_gone;
        let mut outcomes: Vec<Result<()>> = batch
            .iter()
            .map(|(at, disposition)| {
                let known = match disposition {
                    _ if is_gone => None,
                    Disposition::Ack => state.out.settle(*at),
                    _ => {
                        let released = state.out.release(*at);
                        if released.is_some() {
                            let from = state.released_from.map_or(offset(*at), |from| from.min(offset(*at)));
                            state.released_from = Some(from);
                            restarts = true;
                        }
                        released
                    }
                };
                known.map(drop).ok_or_else(|| not_outstanding(*at))
            })
            .collect();
        if restarts {
            state.is_leaving = true;
        }
        if !self.store(&mut state) {
            let lost = batch.iter().zip(&mut outcomes);
            for ((at, _), outcome) in lost.filter(|((_, disposition), _)| *disposition == Disposition::Ack) {
                *outcome = Err(not_outstanding(*at));
            }
        }
        (outcomes, restarts)
    }
}
