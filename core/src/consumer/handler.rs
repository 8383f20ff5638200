use super::{Context, HandlerResult, OnFailure};
use futures_util::future::BoxFuture;
use std::sync::Arc;

/// A step as a type, with its compensation: goes in by `.step`. Plain `async fn`s in the implementation.
///
/// # Contract
/// At least once: a step may see an event again, after a failure or a crash.
pub trait Handler<E>: Send + Sync + 'static {
    /// Does its part.
    fn execute(&self, event: &E, ctx: &mut Context) -> impl Future<Output = HandlerResult> + Send;

    /// Takes its part back, because a later step failed. Nothing, unless said otherwise.
    fn compensate(&self, event: &E, ctx: &mut Context) -> impl Future<Output = HandlerResult> + Send {
        let _ = (event, ctx);
        async { Ok(()) }
    }

    /// Where it stands in its chain: the lowest first. All steps of a chain declare it, or none, and then they run as they
    /// were written.
    fn order(&self) -> Option<i32> {
        None
    }

    /// What its failure means for its chain.
    fn on_failure(&self) -> OnFailure {
        OnFailure::Stop
    }
}

// The `AsyncFn` bound infers a closure's arguments and gives its good errors; the `Fn` bound beside it names the future,
// so that it can be required to be `Send`.
macro_rules! handler_fn {
    ($name:ident; $($argument:ident),*) => {
        #[doc(hidden)]
        pub trait $name<$($argument),*>:
            AsyncFn($($argument),*) -> HandlerResult + Fn($($argument),*) -> <Self as $name<$($argument),*>>::Future
        {
            type Future: Future<Output = HandlerResult>;
        }
        impl<F, Fut, $($argument),*> $name<$($argument),*> for F
        where
            F: AsyncFn($($argument),*) -> HandlerResult + Fn($($argument),*) -> Fut,
            Fut: Future<Output = HandlerResult>,
        {
            type Future = Fut;
        }
    };
}
handler_fn!(Call2; A, B);
handler_fn!(Call3; A, B, C);

/// `async fn(&E, &mut Context) -> HandlerResult` with a future that is `Send`: every such function, and every async
/// closure that captures nothing. Never implemented by hand.
pub trait HandlerFn<E: 'static>: for<'a> Call2<&'a E, &'a mut Context, Future: Send> + Send + Sync + 'static {}

impl<E: 'static, F> HandlerFn<E> for F where
    F: for<'a> Call2<&'a E, &'a mut Context, Future: Send> + Send + Sync + 'static
{
}

/// The same with the subscription's state first, so that methods of the state are handlers.
pub trait StatefulHandlerFn<S: 'static, E: 'static>:
    for<'a> Call3<&'a S, &'a E, &'a mut Context, Future: Send> + Send + Sync + 'static
{
}

impl<S: 'static, E: 'static, F> StatefulHandlerFn<S, E> for F where
    F: for<'a> Call3<&'a S, &'a E, &'a mut Context, Future: Send> + Send + Sync + 'static
{
}

/// A step erased. A trait, not a boxed closure: the future may borrow what the step holds.
pub(super) trait Run<E>: Send + Sync {
    fn run<'a>(&'a self, event: &'a E, ctx: &'a mut Context) -> BoxFuture<'a, HandlerResult>;
}

pub(super) struct Plain<F>(pub(super) F);

impl<E: Sync + 'static, F: HandlerFn<E>> Run<E> for Plain<F> {
    fn run<'a>(&'a self, event: &'a E, ctx: &'a mut Context) -> BoxFuture<'a, HandlerResult> {
        Box::pin((self.0)(event, ctx))
    }
}

pub(super) struct Bound<S, F>(pub(super) Arc<S>, pub(super) F);

impl<E: Sync + 'static, S: Send + Sync + 'static, F: StatefulHandlerFn<S, E>> Run<E> for Bound<S, F> {
    fn run<'a>(&'a self, event: &'a E, ctx: &'a mut Context) -> BoxFuture<'a, HandlerResult> {
        Box::pin((self.1)(&self.0, event, ctx))
    }
}

pub(super) struct Execute<H>(pub(super) Arc<H>);

impl<E: Sync, H: Handler<E>> Run<E> for Execute<H> {
    fn run<'a>(&'a self, event: &'a E, ctx: &'a mut Context) -> BoxFuture<'a, HandlerResult> {
        Box::pin(self.0.execute(event, ctx))
    }
}

pub(super) struct Compensate<H>(pub(super) Arc<H>);

impl<E: Sync, H: Handler<E>> Run<E> for Compensate<H> {
    fn run<'a>(&'a self, event: &'a E, ctx: &'a mut Context) -> BoxFuture<'a, HandlerResult> {
        Box::pin(self.0.compensate(event, ctx))
    }
}
