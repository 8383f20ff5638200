//! The sending side of a transport.

mod calls;

pub use calls::{Calls, Outcome, Place};

use crate::Message;
use async_trait::async_trait;
use futures_util::StreamExt as _;
use std::{error::Error as StdError, fmt, fmt::Debug, sync::Arc};

/// What a refusal means for the relay. The outcome of a message, not of the call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum PublishErrorKind {
    /// Nobody's fault: try again later. Costs no attempt.
    Unavailable(Scope),
    /// The broker refused this message, and might take it another time. Costs an attempt.
    Rejected,
    /// The broker will never take this message. It fails at once.
    Invalid,
    /// Not tried, because one before it in its key was refused. Costs nothing.
    HeldBack,
}

/// How far an [unavailability](PublishErrorKind::Unavailable) reaches.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Scope {
    /// Everything: the connection is lost. The relay stops, and probes until it is back.
    Connection,
    /// The topic: its destination is missing, full or under-replicated. The relay pauses the topic only.
    Destination,
}

/// Why a message was not published. Cheap to clone: a lost connection is one error for many messages.
#[derive(Clone)]
pub struct PublishError {
    kind: PublishErrorKind,
    unroutable: bool,
    source: Arc<dyn StdError + Send + Sync>,
}

type Cause = Box<dyn StdError + Send + Sync>;

impl PublishError {
    fn new(kind: PublishErrorKind, cause: impl Into<Cause>) -> Self {
        Self {
            kind,
            unroutable: false,
            source: cause.into().into(),
        }
    }

    /// The connection is lost, or the outcome is unknown.
    pub fn connection(cause: impl Into<Cause>) -> Self {
        Self::new(PublishErrorKind::Unavailable(Scope::Connection), cause)
    }

    /// The topic's destination cannot take it now: full, out of memory, too few replicas.
    pub fn destination(cause: impl Into<Cause>) -> Self {
        Self::new(PublishErrorKind::Unavailable(Scope::Destination), cause)
    }

    /// The topic leads nowhere: no such destination, or nobody bound to it. An unavailable destination, but one that
    /// a topic may be told to drop (`unroutable = "drop"`).
    pub fn unroutable(cause: impl Into<Cause>) -> Self {
        Self {
            unroutable: true,
            ..Self::destination(cause)
        }
    }

    /// The broker refused this message.
    pub fn rejected(cause: impl Into<Cause>) -> Self {
        Self::new(PublishErrorKind::Rejected, cause)
    }

    /// The broker will never take this message.
    pub fn invalid(cause: impl Into<Cause>) -> Self {
        Self::new(PublishErrorKind::Invalid, cause)
    }

    /// One before it in its key was refused.
    #[must_use]
    pub fn held_back() -> Self {
        Self::new(
            PublishErrorKind::HeldBack,
            "held back behind a refused message of its key",
        )
    }

    /// What it means.
    #[must_use]
    pub fn kind(&self) -> PublishErrorKind {
        self.kind
    }

    /// Whether the topic leads nowhere.
    #[must_use]
    pub fn is_unroutable(&self) -> bool {
        self.unroutable
    }

    /// The same outcome for every message of a batch: how a lost connection is reported.
    #[must_use]
    pub fn for_all(self, batch: &[Message]) -> Vec<Result<(), Self>> {
        batch.iter().map(|_| Err(self.clone())).collect()
    }
}

impl fmt::Display for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.kind {
            PublishErrorKind::Unavailable(Scope::Connection) => "the broker is unavailable",
            PublishErrorKind::Unavailable(Scope::Destination) if self.unroutable => "the topic leads nowhere",
            PublishErrorKind::Unavailable(Scope::Destination) => "the topic's destination is unavailable",
            PublishErrorKind::Rejected => "the broker refused the message",
            PublishErrorKind::Invalid => "the broker cannot take the message",
            PublishErrorKind::HeldBack => "not published",
        })
    }
}

impl Debug for PublishError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?}: {}", self.kind, crate::error::chain(self))
    }
}

impl StdError for PublishError {
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        Some(&*self.source)
    }
}

/// Whether a broker can be reached.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub enum Reachability {
    /// It answered.
    Up,
    /// It did not, and this is why.
    Down(PublishError),
    /// There is no way to tell but to publish. The relay then never blames a lost connection on a message.
    Unknown,
}

/// Sends messages to a broker.
#[async_trait]
pub trait Publisher: Debug + Send + Sync + 'static {
    /// Publishes a batch.
    ///
    /// # Contract
    /// - One outcome per message, in the order of the batch. `Ok` only once the broker has *confirmed* that message as
    ///   stored, or that nobody needs it; a message that reaches no queue is not a success.
    /// - Resolves once every message is confirmed or refused; pipelines within the batch. Calls may overlap.
    /// - Messages of one key are sent in the order of the batch. The relay has at most one of a key in flight unless the
    ///   topic asks for `order = "pipelined"`.
    /// - A refused message does not fail its neighbours, but for a lost connection, which is the outcome of all that was
    ///   not yet confirmed.
    /// - Cancelled, or past its deadline, what was sent may still arrive: the relay repeats it under the same id. A
    ///   publisher hands nothing to the broker after the future has been dropped.
    /// - After `Unavailable` it recovers by itself.
    ///
    /// Held by `transport::every_message_once_to_each_group`, `transport::content_is_intact`.
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), PublishError>>;

    /// Asks whether the broker can be reached, without publishing anything.
    ///
    /// # Contract
    /// Connects if there is no connection. [`Reachability::Unknown`] where there is no way to ask.
    async fn check(&self) -> Reachability;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<P: Publisher + ?Sized> Publisher for $pointer<P> {
            async fn publish(&self, batch: &[Message]) -> Vec<Result<(), PublishError>> {
                (**self).publish(batch).await
            }
            async fn check(&self) -> Reachability {
                (**self).check().await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

/// The simple shape for an author: one message at a time. [`EachOf`] makes a [`Publisher`] of it.
pub trait PublishOne: Debug + Send + Sync + 'static {
    /// Publishes one message.
    ///
    /// # Contract
    /// As [`Publisher::publish`] for a batch of one. Calls overlap, for messages of different keys.
    fn publish_one(&self, message: &Message) -> impl Future<Output = Result<(), PublishError>> + Send;

    /// Asks whether the broker can be reached; [`Reachability::Unknown`] unless the author knows better.
    ///
    /// # Contract
    /// As [`Publisher::check`].
    fn check(&self) -> impl Future<Output = Reachability> + Send {
        std::future::ready(Reachability::Unknown)
    }
}

/// A [`Publisher`] out of a [`PublishOne`]: overlaps up to a window of messages of different keys, and holds back what
/// follows a refused message in its key.
#[derive(Debug, Clone)]
pub struct EachOf<P> {
    one: P,
    window: usize,
}

impl<P: PublishOne> EachOf<P> {
    /// With a window of 64 messages.
    pub fn new(one: P) -> Self {
        Self { one, window: 64 }
    }

    /// Sets how many messages of a batch may be on their way at once; at least 1.
    #[must_use]
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = window.max(1);
        self
    }

    /// Publishes the messages at `run`, which share a key, one after the other.
    async fn publish_run(&self, batch: &[Message], run: Vec<usize>) -> Vec<(usize, Result<(), PublishError>)> {
        let mut outcomes = Vec::with_capacity(run.len());
        let mut refused = false;
        for at in run {
            let outcome = if refused {
                Err(PublishError::held_back())
            } else {
                self.one.publish_one(&batch[at]).await
            };
            refused |= outcome.is_err();
            outcomes.push((at, outcome));
        }
        outcomes
    }
}

#[async_trait]
impl<P: PublishOne> Publisher for EachOf<P> {
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), PublishError>> {
        let runs = runs(batch);
        let mut sent = futures_util::stream::iter(runs)
            .map(|run| self.publish_run(batch, run))
            .buffer_unordered(self.window);
        let mut outcomes: Vec<_> = batch.iter().map(|_| Err(PublishError::held_back())).collect();
        while let Some(run) = sent.next().await {
            for (at, outcome) in run {
                outcomes[at] = outcome;
            }
        }
        outcomes
    }

    async fn check(&self) -> Reachability {
        self.one.check().await
    }
}

/// The positions of a batch's messages, by key, each in order.
fn runs(batch: &[Message]) -> Vec<Vec<usize>> {
    let mut by_key = rustc_hash::FxHashMap::default();
    let mut runs: Vec<Vec<usize>> = Vec::with_capacity(batch.len());
    for (at, message) in batch.iter().enumerate() {
        match message.key_hash() {
            None => runs.push(vec![at]),
            Some(key) => match by_key.entry(key) {
                std::collections::hash_map::Entry::Occupied(run) => {
                    let run: &usize = run.get();
                    runs[*run].push(at);
                }
                std::collections::hash_map::Entry::Vacant(slot) => {
                    slot.insert(runs.len());
                    runs.push(vec![at]);
                }
            },
        }
    }
    runs
}

const _: fn(&dyn Publisher) = |_| {};

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Topic;
    use std::sync::Mutex;

    #[derive(Debug, Default)]
    struct RefusesB(Mutex<Vec<String>>);
    impl PublishOne for RefusesB {
        async fn publish_one(&self, message: &Message) -> Result<(), PublishError> {
            tokio::task::yield_now().await;
            let text = String::from_utf8_lossy(message.payload()).into_owned();
            self.0.lock().unwrap().push(text.clone());
            if text == "b" {
                Err(PublishError::rejected("b"))
            } else {
                Ok(())
            }
        }
    }

    #[tokio::test]
    async fn each_of_keeps_a_key_in_order_and_holds_back_behind_a_refusal() {
        let publisher = EachOf::new(RefusesB::default()).with_window(4);
        let message = |text: &'static str| Message::new(Topic::new("t"), "e.v1", text);
        let batch = [
            message("a").with_key("k"),
            message("x"),
            message("b").with_key("k"),
            message("c").with_key("k"),
            message("d").with_key("other"),
        ];
        let outcomes = publisher.publish(&batch).await;
        let kinds: Vec<_> = outcomes
            .iter()
            .map(|o| o.as_ref().err().map(PublishError::kind))
            .collect();
        assert_eq!(
            kinds,
            [
                None,
                None,
                Some(PublishErrorKind::Rejected),
                Some(PublishErrorKind::HeldBack),
                None
            ]
        );
        assert!(!publisher.one.0.lock().unwrap().contains(&"c".to_owned()));
        assert!(matches!(publisher.check().await, Reachability::Unknown));
    }
}
