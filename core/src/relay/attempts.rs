//! What a relay does with the records it has claimed: an outbox publishes them, an inbox takes them through their chain.

use crate::{
    Message, PublishError, Publisher, Reachability, clock::Clock, log::Lease, message::Text, publisher::Outcomes,
};
use async_trait::async_trait;
use futures_util::FutureExt as _;
use std::{fmt::Debug, panic::AssertUnwindSafe, sync::Arc, time::Duration};

/// Why an attempt on a record did not succeed.
#[derive(Debug, Clone)]
pub(crate) enum Refusal {
    /// The connection is lost, or the outcome unknown. Costs no attempt; the relay stops and probes.
    Connection(PublishError),
    /// No answer in time. The destination is away if others answered meanwhile, else the connection is lost.
    Silent(PublishError),
    /// The topic's destination is away. Costs no attempt; the topic is paused.
    Destination(PublishError),
    /// An attempt is used up. `after` says how long to wait, where the one who refused knows.
    Rejected { why: String, after: Option<Duration> },
    /// It will never succeed.
    Invalid { why: String },
    /// Not now, and nobody's fault: costs no attempt.
    Deferred { why: String, after: Duration },
    /// Another member of the group handles it: given back, and the mailbox left to that one.
    Elsewhere { why: String },
    /// Not tried: given back.
    HeldBack,
}

/// How a relay attempts records.
#[async_trait]
pub(crate) trait Attempts: Debug + Send + Sync {
    /// The most records of one call.
    fn per_call(&self) -> usize {
        usize::MAX
    }
    /// Whether topics are destinations, one of which may be silent while the others answer.
    fn has_destinations(&self) -> bool;
    /// Reports outcomes as they are known; gives that of the messages that it reported none of. `attempts` are those
    /// counted so far; `lease` is what they are held by.
    async fn attempt(
        &self,
        batch: &[Message],
        attempts: &[u32],
        lease: &Lease,
        outcomes: &Outcomes,
    ) -> Result<(), Refusal>;
    /// Waits until the attempts whose futures were dropped have really ended, at most until `limit`. Says whether they have.
    async fn have_ended(&self, _limit: Duration) -> bool {
        true
    }
    /// Whether another process is better left with the mailbox, after this one has stepped aside.
    async fn stands_by(&self) -> bool {
        false
    }
    /// Whether attempts have a chance.
    async fn check(&self) -> Reachability;
}

/// The outbox's: publishes.
#[derive(Debug)]
pub(crate) struct Publishing {
    pub(crate) publisher: Arc<dyn Publisher>,
    /// The source of events that were appended without one, by SQL.
    pub(crate) source: Text,
    pub(crate) clock: Arc<dyn Clock>,
    /// The longest a call may take.
    pub(crate) timeout: Duration,
}

#[async_trait]
impl Attempts for Publishing {
    fn has_destinations(&self) -> bool {
        true
    }

    /// One publish call, whatever the publisher does. It gets no longer than what is left of the lease.
    async fn attempt(&self, batch: &[Message], _: &[u32], lease: &Lease, outcomes: &Outcomes) -> Result<(), Refusal> {
        let mut filled = Vec::new();
        let lacks_source = |message: &Message| message.source().is_none();
        if batch.iter().any(lacks_source) {
            filled.extend(batch.iter().map(|message| match lacks_source(message) {
                true => message.clone().with_source(self.source.clone()),
                false => message.clone(),
            }));
        }
        let batch = if filled.is_empty() { batch } else { &filled };
        let left = lease.remaining().unwrap_or_default();
        let deadline = self.timeout.min(left);
        let call = AssertUnwindSafe(self.publisher.publish(batch, outcomes)).catch_unwind();
        let unknown = tokio::select! {
            biased;
            ended = call => match ended {
                Ok(()) => PublishError::unreported(),
                Err(_) => panicked(),
            },
            () = self.clock.sleep(deadline) => return Err(Refusal::Silent(timed_out(deadline))),
        };
        if !outcomes.is_complete() {
            tracing::error!(
                error = crate::error::chain(&unknown),
                messages = batch.len(),
                "a publisher did not report every outcome: the missing ones count as unknown"
            );
        }
        Err(Refusal::Connection(unknown))
    }

    async fn check(&self) -> Reachability {
        let check = AssertUnwindSafe(self.publisher.check()).catch_unwind();
        tokio::select! {
            biased;
            answer = check => answer.unwrap_or_else(|_| Reachability::Down(panicked())),
            () = self.clock.sleep(self.timeout) => Reachability::Down(timed_out(self.timeout)),
        }
    }
}

fn panicked() -> PublishError {
    PublishError::connection("the publisher panicked")
}

fn timed_out(deadline: Duration) -> PublishError {
    PublishError::connection(format!("no answer within {deadline:?}"))
}
