//! The sending side of a transport.

mod calls;
mod each_of;
mod outcomes;

pub use calls::{Calls, Place};
pub use each_of::{EachOf, PublishOne};
pub use outcomes::{Outcomes, PublisherExt};
pub(crate) use outcomes::{Report, Reports};

use crate::Message;
use async_trait::async_trait;
use std::{error::Error as StdError, fmt, fmt::Debug, sync::Arc};

/// The outcome of one message: `Ok` once the broker has confirmed it as stored.
pub type Outcome = Result<(), PublishError>;

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

    /// A publisher ended a call without an outcome for the message.
    pub(crate) fn unreported() -> Self {
        Self::connection("the publisher ended without an outcome for the message: a defect of the publisher")
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

/// Sends messages to a broker. [`PublishOne`] is the simple shape for an author: one message at a time.
#[async_trait]
pub trait Publisher: Debug + Send + Sync + 'static {
    /// Publishes a batch and reports the outcome of each message as soon as it is known.
    ///
    /// # Contract
    /// - One outcome per message, in any order. `Ok` only once the broker has *confirmed* that message as stored, or that
    ///   nobody needs it; a message that reaches no queue is not a success. The first outcome of a message is final.
    /// - An outcome is reported when it is known, never later because of a neighbour: the relay sends a key's next message
    ///   as soon as the one before it is confirmed.
    /// - Resolves once every message has its outcome. A message without one then counts as unknown.
    /// - Pipelines within the batch. Calls overlap, and there may be as many as messages: a publisher bounds what it has
    ///   in flight itself.
    /// - Messages of one key are sent in the order of the batch. The relay has at most one of a key in flight unless the
    ///   topic asks for `order = "pipelined"`.
    /// - A refused message does not fail its neighbours, but for a lost connection, which is the outcome of all that was
    ///   not yet confirmed.
    /// - A destination that does not answer delays only its own topic. Within about 8 s the publisher reports
    ///   [`Scope::Destination`] for what it did not answer; past the relay's `publish_timeout` (10 s) the call is dropped
    ///   and its missing outcomes count as unknown.
    /// - Cancelled, or past its deadline, what was sent may still arrive: the relay repeats it under the same id. A
    ///   publisher hands nothing to the broker after the future has been dropped.
    /// - After `Unavailable` it recovers by itself.
    ///
    /// Held by `transport::every_message_once_to_each_group`, `transport::content_is_intact`,
    /// `transport::each_message_has_one_outcome`, `transport::publishing_nothing_is_fine`,
    /// `transport::what_was_confirmed_outlives_the_broker`, `transport::what_was_confirmed_outlives_its_connection`.
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes);

    /// Asks whether the broker can be reached, without publishing anything.
    ///
    /// # Contract
    /// Connects if there is no connection. [`Reachability::Unknown`] where there is no way to ask.
    ///
    /// Held by `transport::a_broker_that_stands_still_is_told`.
    async fn check(&self) -> Reachability;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<P: Publisher + ?Sized> Publisher for $pointer<P> {
            async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
                (**self).publish(batch, outcomes).await;
            }
            async fn check(&self) -> Reachability {
                (**self).check().await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

const _: fn(&dyn Publisher) = |_| {};
