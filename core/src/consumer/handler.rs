use super::{Context, HandlerError, HandlerResult, OnFailure};
use futures_util::{TryFutureExt as _, future::BoxFuture};
use std::{marker::PhantomData, sync::Arc};

/// A step as a type, with its compensation: goes in by `.step`. Plain `async fn`s in the implementation.
///
/// # Contract
/// At least once: a step may see an event again, after a failure or a crash.
///
/// Held by `core::a_chain_is_tried_again_and_publishes_under_the_same_id`.
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
        pub trait $name<$($argument,)* R = HandlerResult>:
            AsyncFn($($argument),*) -> R + Fn($($argument),*) -> <Self as $name<$($argument,)* R>>::Future
        {
            type Future: Future<Output = R>;
        }
        impl<F, Fut, R, $($argument),*> $name<$($argument,)* R> for F
        where
            F: AsyncFn($($argument),*) -> R + Fn($($argument),*) -> Fut,
            Fut: Future<Output = R>,
        {
            type Future = Fut;
        }
    };
}
handler_fn!(Call2; A, B);
handler_fn!(Call3; A, B, C);

/// `async fn(&E, &mut Context) -> HandlerResult` with a future that is `Send`: every such function, and every async
/// closure that captures nothing. Never implemented by hand.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler of `{E}`",
    label = "expected an `async fn(&{E}, &mut Context) -> HandlerResult`",
    note = "what a closure captures goes to all handlers of the subscription by `.state(value)`: `.state(value).handler(async |value, event, ctx| …)`",
    note = "a function that returns another `Result`, such as `anyhow::Result<()>`, goes in by `.handler_returning(…)`"
)]
pub trait HandlerFn<E: 'static>: for<'a> Call2<&'a E, &'a mut Context, Future: Send> + Send + Sync + 'static {}

impl<E: 'static, F> HandlerFn<E> for F where
    F: for<'a> Call2<&'a E, &'a mut Context, Future: Send> + Send + Sync + 'static
{
}

/// The same with the subscription's state first, so that methods of the state are handlers.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler of `{E}` with the state `{S}`",
    label = "expected an `async fn(&{S}, &{E}, &mut Context) -> HandlerResult`",
    note = "behind `.state(value)` every handler takes the state first: `async |state, event, ctx| …`",
    note = "a function that returns another `Result`, such as `anyhow::Result<()>`, goes in by `.handler_returning(…)`"
)]
pub trait StatefulHandlerFn<S: 'static, E: 'static>:
    for<'a> Call3<&'a S, &'a E, &'a mut Context, Future: Send> + Send + Sync + 'static
{
}

impl<S: 'static, E: 'static, F> StatefulHandlerFn<S, E> for F where
    F: for<'a> Call3<&'a S, &'a E, &'a mut Context, Future: Send> + Send + Sync + 'static
{
}

/// A [`HandlerFn`] with an error of its own, such as `async fn(&E, &mut Context) -> anyhow::Result<()>`. Never implemented by
/// hand.
pub trait ReturningFn<E: 'static, R>:
    for<'a> Call2<&'a E, &'a mut Context, Result<(), R>, Future: Send> + Send + Sync + 'static
{
}

impl<E: 'static, R, F> ReturningFn<E, R> for F where
    F: for<'a> Call2<&'a E, &'a mut Context, Result<(), R>, Future: Send> + Send + Sync + 'static
{
}

/// A [`StatefulHandlerFn`] with an error of its own. Never implemented by hand.
pub trait StatefulReturningFn<S: 'static, E: 'static, R>:
    for<'a> Call3<&'a S, &'a E, &'a mut Context, Result<(), R>, Future: Send> + Send + Sync + 'static
{
}

impl<S: 'static, E: 'static, R, F> StatefulReturningFn<S, E, R> for F where
    F: for<'a> Call3<&'a S, &'a E, &'a mut Context, Result<(), R>, Future: Send> + Send + Sync + 'static
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

/// A step with an error of its own.
pub(super) struct Returning<F, R>(pub(super) F, pub(super) PhantomData<fn() -> R>);

impl<E, R, F> Run<E> for Returning<F, R>
where
    E: Sync + 'static,
    R: Into<HandlerError> + 'static,
    F: ReturningFn<E, R>,
{
    fn run<'a>(&'a self, event: &'a E, ctx: &'a mut Context) -> BoxFuture<'a, HandlerResult> {
        Box::pin((self.0)(event, ctx).map_err(Into::into))
    }
}

pub(super) struct BoundReturning<S, F, R>(pub(super) Arc<S>, pub(super) F, pub(super) PhantomData<fn() -> R>);

impl<E, S, R, F> Run<E> for BoundReturning<S, F, R>
where
    E: Sync + 'static,
    S: Send + Sync + 'static,
    R: Into<HandlerError> + 'static,
    F: StatefulReturningFn<S, E, R>,
{
    fn run<'a>(&'a self, event: &'a E, ctx: &'a mut Context) -> BoxFuture<'a, HandlerResult> {
        Box::pin((self.1)(&self.0, event, ctx).map_err(Into::into))
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
