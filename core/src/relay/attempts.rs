//! What a relay does with the records it has claimed: an outbox publishes them, an inbox takes them through their chain.

use crate::{Message, PublishError, PublishErrorKind, Publisher, Reachability, Scope, clock::Clock};
use async_trait::async_trait;
use futures_util::FutureExt as _;
use std::{fmt::Debug, panic::AssertUnwindSafe, sync::Arc, time::Duration};

/// Why an attempt on a record did not succeed.
#[derive(Debug)]
pub(crate) enum Refusal {
    /// The connection is lost, or the outcome unknown. Costs no attempt; the relay stops and probes.
    Connection(PublishError),
    /// The topic's destination is away. Costs no attempt; the topic is paused.
    Destination(PublishError),
    /// An attempt is used up. `after` says how long to wait, where the one who refused knows.
    Rejected { why: String, after: Option<Duration> },
    /// It will never succeed.
    Invalid { why: String },
    /// Not now, and nobody's fault: costs no attempt.
    Deferred { why: String, after: Duration },
    /// Not tried: given back.
    HeldBack,
}

impl From<PublishError> for Refusal {
    fn from(error: PublishError) -> Self {
        let why = || crate::error::chain(&error);
        match error.kind() {
            PublishErrorKind::Unavailable(Scope::Connection) => Self::Connection(error),
            PublishErrorKind::Unavailable(Scope::Destination) => Self::Destination(error),
            PublishErrorKind::Rejected => Self::Rejected {
                why: why(),
                after: None,
            },
            PublishErrorKind::Invalid => Self::Invalid { why: why() },
            PublishErrorKind::HeldBack => Self::HeldBack,
        }
    }
}

/// How a relay attempts records.
#[async_trait]
pub(crate) trait Attempts: Debug + Send + Sync {
    /// The most records of one call.
    fn per_call(&self) -> usize {
        usize::MAX
    }
    /// One outcome for each message. `attempts` are those counted so far; `left` is what is left of the lease.
    async fn attempt(&self, batch: &[Message], attempts: &[u32], left: Duration) -> Vec<Result<(), Refusal>>;
    /// Whether attempts have a chance.
    async fn check(&self) -> Reachability;
}

/// The outbox's: publishes.
#[derive(Debug)]
pub(crate) struct Publishing {
    pub(crate) publisher: Arc<dyn Publisher>,
    pub(crate) clock: Arc<dyn Clock>,
    /// The longest a call may take.
    pub(crate) timeout: Duration,
}

#[async_trait]
impl Attempts for Publishing {
    /// One publish call, whatever the publisher does. It gets no longer than what is left of the lease.
    async fn attempt(&self, batch: &[Message], _: &[u32], left: Duration) -> Vec<Result<(), Refusal>> {
        let deadline = self.timeout.min(left);
        let call = AssertUnwindSafe(self.publisher.publish(batch)).catch_unwind();
        let mut outcomes = tokio::select! {
            biased;
            outcomes = call => outcomes.unwrap_or_else(|_| panicked().for_all(batch)),
            () = self.clock.sleep(deadline) => timed_out(deadline).for_all(batch),
        };
        if outcomes.len() != batch.len() {
            let error = PublishError::connection(format!(
                "a defect of the publisher: {} outcomes for {} messages",
                outcomes.len(),
                batch.len()
            ));
            tracing::error!(error = crate::error::chain(&error), "all of them count as unknown");
            outcomes = error.for_all(batch);
        }
        outcomes
            .into_iter()
            .map(|outcome| outcome.map_err(Refusal::from))
            .collect()
    }

    async fn check(&self) -> Reachability {
        let check = AssertUnwindSafe(self.publisher.check()).catch_unwind();
        tokio::select! {
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
