//! The steps of a chain, and what the failure of one means.

use super::{
    Context, HandlerError, HandlerResult,
    context::Author,
    durable,
    handler::Run,
    middleware::{Endpoint, Panicked},
};
use crate::{Error, ErrorKind, Result};
use futures_util::{FutureExt as _, future::BoxFuture};
use std::{borrow::Cow, panic::AssertUnwindSafe, time::Duration};

/// What the failure of a step means for its chain.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub enum OnFailure {
    /// The attempt has failed: the steps before it are compensated, in reverse.
    #[default]
    Stop,
    /// The same, and the step itself is compensated first: for one that may have done a part.
    StopAndCompensateSelf,
    /// It is logged, and the chain goes on. In a transaction its writes are undone, by a savepoint.
    Ignore,
}

/// One step: a handler and how it is taken back.
pub(super) struct Step<E> {
    pub(super) name: Cow<'static, str>,
    pub(super) run: Box<dyn Run<E>>,
    pub(super) compensate: Option<Box<dyn Run<E>>>,
    pub(super) timeout: Option<Duration>,
    pub(super) order: Option<i32>,
    pub(super) on_failure: OnFailure,
}

impl<E> Step<E> {
    /// Runs it, or its compensation; a panic is a failure like any other.
    pub(super) async fn guarded(&self, run: &dyn Run<E>, event: &E, ctx: &mut Context) -> HandlerResult {
        // What a panicking handler leaves behind is its own state, which it shares with its other calls anyway.
        let clock = self.timeout.map(|_| ctx.tools().clock.clone());
        let call = AssertUnwindSafe(async { run.run(event, ctx).await }).catch_unwind();
        let ended = match (self.timeout, clock) {
            (Some(longest), Some(clock)) => tokio::select! {
                biased;
                ended = call => ended,
                () = clock.sleep(longest) => {
                    let text = format!("the step {} took longer than {longest:?}", self.name);
                    return Err(HandlerError::from(text));
                }
            },
            _ => call.await,
        };
        ended.unwrap_or_else(|panic| Err(Panicked::error(&self.name, &*panic)))
    }
}

/// The steps of a chain, in order.
pub(super) struct Steps<E> {
    pub(super) steps: Vec<Step<E>>,
    pub(super) is_durable: bool,
}

impl<E: Sync + 'static> Steps<E> {
    /// In the order that is declared, or else as they were written.
    pub(super) fn new(mut steps: Vec<Step<E>>, is_durable: bool) -> Result<Self> {
        if let Some(step) = steps.iter().find(|step| step.timeout == Some(Duration::ZERO)) {
            let text = "the time-out of a step is 0s: it has to be longer than zero; leave it out for none";
            return Err(Error::new(ErrorKind::Config, text).with("step", &step.name));
        }
        let declared = steps.iter().filter(|step| step.order.is_some()).count();
        if declared > 0 && declared < steps.len() {
            let without = steps.iter().find(|step| step.order.is_none());
            let text =
                "some steps of a chain declare their order and others do not: declare all, or write them in order";
            return Err(Error::new(ErrorKind::Config, text).with("without", without.map_or("", |step| &step.name)));
        }
        steps.sort_by_key(|step| step.order);
        if let Some(two) = steps
            .windows(2)
            .find(|two| declared > 0 && two[0].order == two[1].order)
        {
            let text = "two steps of a chain declare the same order";
            return Err(Error::new(ErrorKind::Config, text)
                .with("order", two[0].order.unwrap_or_default())
                .with("steps", format!("{}, {}", two[0].name, two[1].name)));
        }
        Ok(Self { steps, is_durable })
    }

    /// The steps in order; if one fails, what ran is compensated, now or after the rollback of the transaction.
    pub(super) async fn run(&self, ctx: &mut Context, event: &E) -> HandlerResult {
        if self.is_durable {
            return Box::pin(durable::run(self, ctx, event)).await;
        }
        ctx.ran.clear();
        // A middleware may run the steps again within an attempt, when they have been taken back.
        ctx.rounds.clear();
        for (at, step) in self.steps.iter().enumerate() {
            ctx.publishes_as(Author::step(at, 0));
            let is_optional = step.on_failure == OnFailure::Ignore;
            let takes_itself_back = step.on_failure == OnFailure::StopAndCompensateSelf;
            if takes_itself_back {
                // Also if it is cut off.
                ctx.ran.push(at);
            }
            let savepoint = if is_optional { ctx.set_savepoint().await? } else { None };
            let Err(error) = step.guarded(&*step.run, event, ctx).await else {
                ctx.release(savepoint).await?;
                if !takes_itself_back {
                    ctx.ran.push(at);
                }
                continue;
            };
            let error = ctx.judged(error);
            if error.is_outage_of_the_log() {
                return Err(error);
            }
            if is_optional {
                let (message, group) = (ctx.message().id(), ctx.group());
                tracing::warn!(%message, %group, step = %step.name, error = error.to_chain(), "a step failed that may: the chain goes on");
                ctx.return_to(savepoint).await?;
                continue;
            }
            // In a transaction it is for whoever rolls back to call for the compensations.
            return Err(match ctx.has_transaction() {
                true => error,
                false => Box::pin(self.take_back(ctx, event, error)).await,
            });
        }
        Ok(())
    }

    /// The compensations of what ran, in reverse. One that fails stops no other.
    pub(super) async fn take_back(&self, ctx: &mut Context, event: &E, mut error: HandlerError) -> HandlerError {
        let round = u64::from(ctx.attempt());
        // Taken off the list once it is over: one that is cut off is run again by whoever goes on.
        while let Some(at) = ctx.ran.last().copied() {
            if let Some((step, compensation)) = self.steps.get(at).and_then(|s| Some((s, s.compensate.as_ref()?))) {
                ctx.publishes_as(Author::compensation(at, round));
                if let Err(second) = step.guarded(&**compensation, event, ctx).await {
                    let (message, group) = (ctx.message().id(), ctx.group());
                    tracing::error!(%message, %group, step = %step.name, error = second.to_chain(), "a compensation failed; the others run all the same");
                    error.add(format!(
                        "the compensation of {} failed: {}",
                        step.name,
                        second.to_chain()
                    ));
                }
            }
            ctx.ran.pop();
        }
        error
    }
}

impl<E: Sync + 'static> Endpoint<E> for Steps<E> {
    fn call<'a>(&'a self, ctx: &'a mut Context, event: &'a E) -> BoxFuture<'a, HandlerResult> {
        Box::pin(self.run(ctx, event))
    }
    fn compensate<'a>(
        &'a self,
        ctx: &'a mut Context,
        event: &'a E,
        error: HandlerError,
    ) -> BoxFuture<'a, HandlerError> {
        Box::pin(self.take_back(ctx, event, error))
    }
}
