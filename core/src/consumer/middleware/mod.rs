//! What goes around a chain.

mod catch_panic;
mod circuit_breaker;
mod retry;
mod throttle;
mod timeout;
mod tracing;
mod transactional;

pub use catch_panic::CatchPanic;
pub(super) use catch_panic::Panicked;
pub use circuit_breaker::CircuitBreaker;
pub use retry::RetryInside;
pub use throttle::Throttle;
pub use timeout::Timeout;
pub use tracing::Tracing;
pub use transactional::Transactional;

use super::{Context, HandlerError, HandlerResult};
use crate::{AnyEvent, Result};
use futures_util::{FutureExt as _, future::BoxFuture};
use std::{fmt, num::NonZeroUsize, panic::AssertUnwindSafe, sync::Arc, time::Duration};

/// What is to become of a message whose attempts are exhausted, or that cannot be decoded. The table of
/// `docs::handlers` in the facade says what each does on each transport.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Verdict {
    /// It counts as handled.
    Ack,
    /// Once more, after a delay: parked in the inbox, which later ones of its key wait behind.
    Retry {
        /// How long to wait.
        after: Duration,
    },
    /// Back to the broker, to be handled by whoever gets it. Where the order of its key counts, or it comes from the inbox
    /// already, it waits in the inbox, as long as the backoff says.
    Requeue,
    /// A dead letter. What happens if nobody says anything else.
    DeadLetter,
}

/// Around the chain of one event type (`impl Middleware<OrderPlaced> for …`), or of all (`impl Middleware for …`, which
/// is `Middleware<AnyEvent>`). Implement it for every `E` to offer both. Plain `async fn`s in the implementation.
///
/// The first one added is the outermost. All of it happens within an attempt: the next attempt goes through them again.
pub trait Middleware<E: Sync + 'static = AnyEvent>: Send + Sync + 'static {
    /// Does something around what is [`next`](Next): skips it, times it, opens a transaction, calls it again.
    fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> impl Future<Output = HandlerResult> + Send {
        next.run(ctx, event)
    }

    /// Told of each failed attempt, after compensations have run. Not of outages, which are no attempts.
    fn on_failure(&self, ctx: &mut Context, error: &HandlerError, attempt: u32) -> impl Future<Output = ()> + Send {
        let _ = (ctx, error, attempt);
        async {}
    }

    /// Asked, the innermost first, when attempts are exhausted or the error is permanent, or when the payload cannot be
    /// decoded (then without an event). `None`: no opinion, ask the next one outwards. If nobody has one, it is a dead
    /// letter.
    fn fallback(
        &self,
        ctx: &mut Context,
        event: Option<&E>,
        error: &HandlerError,
    ) -> impl Future<Output = Option<Verdict>> + Send {
        let _ = (ctx, event, error);
        async { None }
    }

    /// Whether its settings make sense: asked when a subscription starts.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) that names the setting: the start is refused.
    fn check(&self) -> Result<()> {
        Ok(())
    }

    /// Whether deliveries may share a transaction, and how many: said by [`Transactional`] alone.
    #[doc(hidden)]
    fn transaction(&self) -> Option<Sharing> {
        None
    }
}

/// How many deliveries share a transaction.
#[doc(hidden)]
#[derive(Debug, Clone, Copy)]
#[non_exhaustive]
pub struct Sharing {
    /// At most.
    pub max: NonZeroUsize,
}

/// Middleware erased.
pub(crate) trait Around<E>: Send + Sync {
    fn execute<'a>(&'a self, ctx: &'a mut Context, event: &'a E, next: Next<'a, E>) -> BoxFuture<'a, HandlerResult>;
    fn on_failure<'a>(&'a self, ctx: &'a mut Context, error: &'a HandlerError, attempt: u32) -> BoxFuture<'a, ()>;
    fn fallback<'a>(
        &'a self,
        ctx: &'a mut Context,
        event: Option<&'a E>,
        error: &'a HandlerError,
    ) -> BoxFuture<'a, Option<Verdict>>;
    fn check(&self) -> Result<()>;
    fn transaction(&self) -> Option<Sharing>;
}

impl<E: Sync + 'static, M: Middleware<E>> Around<E> for M {
    fn execute<'a>(&'a self, ctx: &'a mut Context, event: &'a E, next: Next<'a, E>) -> BoxFuture<'a, HandlerResult> {
        Box::pin(Middleware::execute(self, ctx, event, next))
    }
    fn on_failure<'a>(&'a self, ctx: &'a mut Context, error: &'a HandlerError, attempt: u32) -> BoxFuture<'a, ()> {
        Box::pin(Middleware::on_failure(self, ctx, error, attempt))
    }
    fn fallback<'a>(
        &'a self,
        ctx: &'a mut Context,
        event: Option<&'a E>,
        error: &'a HandlerError,
    ) -> BoxFuture<'a, Option<Verdict>> {
        Box::pin(Middleware::fallback(self, ctx, event, error))
    }
    fn check(&self) -> Result<()> {
        Middleware::check(self)
    }
    fn transaction(&self) -> Option<Sharing> {
        Middleware::transaction(self)
    }
}

/// Middleware as it is kept: shared by the chains of a subscription, or of a bus.
pub(crate) type Layer<E> = Arc<dyn Around<E>>;

/// Tells them of a failed attempt, the innermost first.
pub(super) async fn tell<E>(layers: &[Layer<E>], ctx: &mut Context, error: &HandlerError, attempt: u32) {
    let told = async {
        for layer in layers.iter().rev() {
            layer.on_failure(ctx, error, attempt).await;
        }
    };
    if AssertUnwindSafe(told).catch_unwind().await.is_err() {
        ::tracing::error!("a middleware panicked when it was told of a failed attempt");
    }
}

/// Asks them what is to become of the message, the innermost first.
pub(super) async fn ask<E>(
    layers: &[Layer<E>],
    ctx: &mut Context,
    event: Option<&E>,
    error: &HandlerError,
) -> Option<Verdict> {
    let asked = async {
        for layer in layers.iter().rev() {
            let verdict = layer.fallback(ctx, event, error).await;
            if verdict.is_some() {
                return verdict;
            }
        }
        None
    };
    AssertUnwindSafe(asked).catch_unwind().await.unwrap_or_else(|_| {
        ::tracing::error!("a middleware panicked when it was asked for a verdict: the message is a dead letter");
        Some(Verdict::DeadLetter)
    })
}

/// What a stack of middleware ends in.
pub(super) trait Endpoint<E>: Send + Sync {
    fn call<'a>(&'a self, ctx: &'a mut Context, event: &'a E) -> BoxFuture<'a, HandlerResult>;
    /// Takes back what has run, and gives the error with what failed in that beside it.
    fn compensate<'a>(&'a self, ctx: &'a mut Context, event: &'a E, error: HandlerError)
    -> BoxFuture<'a, HandlerError>;
}

/// The rest of the chain. `Copy`: it may be run again.
pub struct Next<'a, E: 'static = AnyEvent> {
    rest: &'a [Layer<E>],
    last: &'a dyn Endpoint<E>,
}

impl<E> Clone for Next<'_, E> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<E> Copy for Next<'_, E> {}

impl<E> fmt::Debug for Next<'_, E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Next({} more around it)", self.rest.len())
    }
}

impl<'a, E: Sync + 'static> Next<'a, E> {
    pub(super) fn new(rest: &'a [Layer<E>], last: &'a dyn Endpoint<E>) -> Self {
        Self { rest, last }
    }

    /// Goes on inwards, to the handlers in the end. Dropped before its end, handlers are cut off where they wait.
    ///
    /// # Errors
    /// Of the handlers.
    pub async fn run(self, ctx: &mut Context, event: &E) -> HandlerResult {
        match self.rest.split_first() {
            Some((next, rest)) => next.execute(ctx, event, Self { rest, ..self }).await,
            None => self.last.call(ctx, event).await,
        }
    }

    /// For middleware that has rolled back a transaction it lent: runs the compensations of the steps that had succeeded
    /// in it, which wait for that, and gives back the error with those that failed beside it.
    pub async fn compensate(self, ctx: &mut Context, event: &E, error: HandlerError) -> HandlerError {
        if ctx.ran.is_empty() {
            return error;
        }
        self.last.compensate(ctx, event, error).await
    }
}
