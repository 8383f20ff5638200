use super::{Context, HandlerError, HandlerResult, Middleware, Next};
use futures_util::FutureExt as _;
use std::panic::AssertUnwindSafe;

/// Makes a failed attempt of a panic in the middleware behind it. (Of a panic in a handler the chain does that by itself,
/// and of one anywhere else the subscription: this says what it *means*.)
#[derive(Debug, Clone, Copy, Default)]
pub struct CatchPanic {
    is_permanent: bool,
}

impl CatchPanic {
    /// A panic is a failed attempt like any other.
    #[must_use]
    pub fn new() -> Self {
        Self::default()
    }

    /// A panic, also one of a handler, is a defect that another attempt will meet again: the message is a dead letter at
    /// once.
    #[must_use]
    pub fn permanent() -> Self {
        Self { is_permanent: true }
    }
}

impl<E: Sync + 'static> Middleware<E> for CatchPanic {
    async fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> HandlerResult {
        // What a panicking handler leaves behind is its own state, which it shares with its other calls anyway.
        let result = AssertUnwindSafe(next.run(ctx, event)).catch_unwind().await;
        let result = result.unwrap_or_else(|panic| Err(Panicked::error("a middleware", &*panic)));
        match result {
            Err(error) if self.is_permanent && error.downcast_ref::<Panicked>().is_some() => {
                let text = error.to_chain();
                Err(HandlerError::permanent(text))
            }
            result => result,
        }
    }
}

/// What somebody said when they panicked.
#[derive(Debug)]
pub(in crate::consumer) struct Panicked(String);

impl Panicked {
    pub(in crate::consumer) fn error(who: &str, panic: &(dyn std::any::Any + Send)) -> HandlerError {
        let text = crate::error::panic_text(panic);
        HandlerError::from(Self(format!("{who} panicked: {text}")))
    }
}

impl std::fmt::Display for Panicked {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Panicked {}
