//! Handlers that take several events at once.

use super::{
    Context, HandlerError, HandlerErrorKind, HandlerResult, Verdict,
    chain::{AnyChain, Tell, decode},
    context::NoTransaction,
    gate::Away,
    gathering::Gathering,
    handled::{After, Handled, HandledBy},
    handler::{Call2, Call3},
    middleware::{Layer, Panicked, ask, tell},
};
use crate::{AnyEvent, Event, Message, MessageId, Topic, log::AttemptError};
use async_trait::async_trait;
use futures_util::{FutureExt as _, future::BoxFuture};
use std::{borrow::Cow, fmt, num::NonZeroUsize, panic::AssertUnwindSafe, sync::Arc, time::Duration};

/// How events are gathered for a handler that takes several at once.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub struct Batch {
    /// The most events of one call. 100.
    pub max: NonZeroUsize,
    /// How long the first of them waits for more. 10 ms.
    pub wait: Duration,
}

impl Default for Batch {
    fn default() -> Self {
        Self {
            max: NonZeroUsize::MIN.saturating_add(99),
            wait: Duration::from_millis(10),
        }
    }
}

impl Batch {
    /// Up to `max` events.
    #[must_use]
    pub fn of(max: NonZeroUsize) -> Self {
        Self { max, ..Self::default() }
    }
    /// Sets how long the first event of a batch waits for more.
    #[must_use]
    pub fn waiting(mut self, wait: Duration) -> Self {
        self.wait = wait;
        self
    }
}

/// What a handler of several events knows beside them.
#[derive(Debug)]
pub struct BatchContext {
    contexts: Vec<Context>,
}

impl BatchContext {
    /// What is known of the event at this place of the batch: its message, its attempt; publish in its name there.
    ///
    /// # Panics
    /// If the batch is shorter.
    #[must_use]
    pub fn of(&mut self, place: usize) -> &mut Context {
        &mut self.contexts[place]
    }
    /// The messages the events came in, in the same order.
    pub fn messages(&self) -> impl Iterator<Item = &Message> {
        self.contexts.iter().map(Context::message)
    }
}

/// What a handler of several events returns: one outcome each, in order.
pub type BatchResult = Vec<HandlerResult>;

/// `async fn(&[E], &mut BatchContext) -> Vec<HandlerResult>` with a future that is `Send`. Never implemented by hand.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler of batches of `{E}`",
    label = "expected an `async fn(&[{E}], &mut BatchContext) -> Vec<HandlerResult>`",
    note = "what a closure captures goes to it by `.state(value)`: `.state(value).batch_handler(how, async |value, events, ctx| …)`"
)]
pub trait BatchHandlerFn<E: 'static>:
    for<'a> Call2<&'a [E], &'a mut BatchContext, BatchResult, Future: Send> + Send + Sync + 'static
{
}
impl<E: 'static, F> BatchHandlerFn<E> for F where
    F: for<'a> Call2<&'a [E], &'a mut BatchContext, BatchResult, Future: Send> + Send + Sync + 'static
{
}

/// The same with the subscription's state first, so that methods of the state handle batches.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a handler of batches of `{E}` with the state `{S}`",
    label = "expected an `async fn(&{S}, &[{E}], &mut BatchContext) -> Vec<HandlerResult>`",
    note = "behind `.state(value)` a handler takes the state first: `async |state, events, ctx| …`"
)]
pub trait StatefulBatchHandlerFn<S: 'static, E: 'static>:
    for<'a> Call3<&'a S, &'a [E], &'a mut BatchContext, BatchResult, Future: Send> + Send + Sync + 'static
{
}
impl<S: 'static, E: 'static, F> StatefulBatchHandlerFn<S, E> for F where
    F: for<'a> Call3<&'a S, &'a [E], &'a mut BatchContext, BatchResult, Future: Send> + Send + Sync + 'static
{
}

/// Erased, as [`Run`](super::handler::Run) is.
pub(super) trait RunBatch<E>: Send + Sync {
    fn run<'a>(&'a self, events: &'a [E], ctx: &'a mut BatchContext) -> BoxFuture<'a, BatchResult>;
}

pub(super) struct PlainBatch<F>(pub(super) F);

impl<E: Sync + 'static, F: BatchHandlerFn<E>> RunBatch<E> for PlainBatch<F> {
    fn run<'a>(&'a self, events: &'a [E], ctx: &'a mut BatchContext) -> BoxFuture<'a, BatchResult> {
        Box::pin((self.0)(events, ctx))
    }
}

pub(super) struct BoundBatch<S, F>(pub(super) Arc<S>, pub(super) F);

impl<E, S, F> RunBatch<E> for BoundBatch<S, F>
where
    E: Sync + 'static,
    S: Send + Sync + 'static,
    F: StatefulBatchHandlerFn<S, E>,
{
    fn run<'a>(&'a self, events: &'a [E], ctx: &'a mut BatchContext) -> BoxFuture<'a, BatchResult> {
        Box::pin((self.1)(&self.0, events, ctx))
    }
}

pub(super) struct BatchChain<E> {
    how: Batch,
    name: &'static str,
    run: Box<dyn RunBatch<E>>,
    /// Told of failures and asked for verdicts, event by event. Nothing of it goes around a call.
    for_all: Vec<Layer<AnyEvent>>,
}

impl<E: Event> BatchChain<E> {
    pub(super) fn new(
        how: Batch,
        name: &'static str,
        run: Box<dyn RunBatch<E>>,
        for_all: Vec<Layer<AnyEvent>>,
    ) -> Self {
        Self {
            how,
            name,
            run,
            for_all,
        }
    }

    /// Asks the middleware what is to become of a message.
    async fn verdict(&self, ctx: &mut Context, error: &HandlerError, otherwise: Verdict) -> Verdict {
        // It is seldom asked: the event of the call is in a row with others, and cannot be lent.
        let event = match self.for_all.is_empty() {
            true => None,
            false => decode::<E>(ctx.message()).ok().map(AnyEvent::new),
        };
        let verdict = ask(&self.for_all, ctx, event.as_ref(), error).await;
        verdict.unwrap_or(otherwise)
    }

    /// One call: an outcome for each event, whatever the handler does.
    async fn call(&self, events: &[E], ctx: &mut BatchContext) -> BatchResult {
        let call = AssertUnwindSafe(async { self.run.run(events, ctx).await }).catch_unwind();
        let outcomes = match call.await {
            Ok(outcomes) if outcomes.len() == events.len() => return outcomes,
            Ok(outcomes) => format!(
                "{} gave {} outcomes for {} events",
                self.name,
                outcomes.len(),
                events.len()
            ),
            Err(panic) => Panicked::error(self.name, &*panic).to_chain(),
        };
        events
            .iter()
            .map(|_| Err(HandlerError::from(outcomes.clone())))
            .collect()
    }
}

/// An event of a batch on its way.
struct Item<'a, E> {
    place: usize,
    event: E,
    ctx: Context,
    by: HandledBy<'a>,
    attempts: u32,
    errors: Vec<AttemptError>,
}

#[async_trait]
impl<E: Event> AnyChain for BatchChain<E> {
    fn kind(&self) -> Cow<'static, str> {
        E::kind()
    }
    fn name(&self) -> &'static str {
        E::NAME
    }
    fn topic(&self) -> Topic {
        E::TOPIC
    }
    fn keyed(&self) -> bool {
        E::KEYED
    }
    fn gathering(&self) -> Option<Gathering> {
        Some(Gathering {
            max: self.how.max,
            wait: self.how.wait,
        })
    }

    async fn handle(&self, ctx: &mut Context, by: &HandledBy<'_>) -> Handled {
        let own = Context::new(ctx.message().clone(), ctx.tools().clone());
        let (tell, mut told) = tokio::sync::mpsc::unbounded_channel();
        self.handle_together(vec![(own, *by)], tell).await;
        told.try_recv().map_or(Handled::Released, |(_, handled)| handled)
    }

    /// Those that fail are tried again in place, without the others, and then wait one by one.
    async fn handle_together(&self, batch: Vec<(Context, HandledBy<'_>)>, told: Tell) {
        let ended = |place: usize, handled: Handled| {
            let _ = told.send((place, handled));
        };
        let mut left = Vec::with_capacity(batch.len());
        for (place, (mut ctx, by)) in batch.into_iter().enumerate() {
            match decode::<E>(ctx.message()) {
                Ok(event) => left.push(Item {
                    place,
                    event,
                    ctx,
                    attempts: by.attempts,
                    by,
                    errors: Vec::new(),
                }),
                Err(why) => {
                    let error = HandlerError::permanent(why);
                    let errors = vec![AttemptError::new(by.tools.clock.now(), by.attempts, error.to_chain())];
                    let verdict = self.verdict(&mut ctx, &error, Verdict::DeadLetter).await;
                    ended(place, by.carry_out_undecoded(ctx.message(), &error, verdict, errors));
                }
            }
        }
        while let Some(by) = left.first().map(|item| item.by) {
            let Some(pass) = by.gate.pass(&*by.tools.clock, by.stop).await else {
                break;
            };
            let mut items = Vec::with_capacity(left.len());
            let (mut events, mut contexts) = (Vec::with_capacity(left.len()), Vec::with_capacity(left.len()));
            for Item {
                place,
                event,
                mut ctx,
                by,
                attempts,
                errors,
            } in left.drain(..)
            {
                ctx.begin_attempt(attempts + 1);
                ctx.no_transaction = NoTransaction::BatchHandler;
                events.push(event);
                contexts.push(ctx);
                items.push((place, by, attempts, errors));
            }
            let mut ctx = BatchContext { contexts };
            let results = self.call(&events, &mut ctx).await;
            let judged = results.into_iter().zip(&mut ctx.contexts);
            let results: BatchResult = judged
                .map(|(result, ctx)| result.map_err(|error| ctx.judged(error)))
                .collect();
            // A service that answered for one event of the call is not away: those that miss it wait by themselves.
            let ids: Vec<MessageId> = ctx.messages().map(Message::id).collect();
            let is_away = |result: &HandlerResult| match result {
                Err(error) if error.kind() == HandlerErrorKind::Unavailable => Some(error.to_chain()),
                _ => None,
            };
            let all_wait = match results.iter().position(|result| is_away(result).is_none()) {
                Some(answered) => {
                    pass.answered(ids[answered]);
                    None
                }
                None => results
                    .first()
                    .and_then(is_away)
                    .map(|why| pass.unavailable(&*by.tools.clock, ids[0], why)),
            };
            let mut longest = Duration::ZERO;
            for (((result, event), mut ctx), (place, by, mut attempts, mut errors)) in
                results.into_iter().zip(events).zip(ctx.contexts).zip(items)
            {
                let Err(error) = result else {
                    by.tell_of_recovery(ctx.message(), attempts);
                    ended(place, Handled::Done);
                    continue;
                };
                if error.kind() == HandlerErrorKind::Unavailable {
                    let wait = match all_wait {
                        Some(Away::All) => None,
                        Some(Away::Alone(wait)) => Some(wait),
                        None => Some(by.gate.alone(ctx.message().id())),
                    };
                    match wait.map(|wait| by.after_unavailable(wait, attempts, error.to_chain())) {
                        None => {}
                        Some(After::Here(wait)) => longest = longest.max(wait),
                        Some(After::Ends(handled)) => {
                            ended(place, handled);
                            continue;
                        }
                    }
                } else {
                    attempts += 1;
                    errors.push(AttemptError::new(by.tools.clock.now(), attempts, error.to_chain()));
                    tell(&self.for_all, &mut ctx, &error, attempts).await;
                    let otherwise = match error.kind() {
                        HandlerErrorKind::Permanent => Some(Verdict::DeadLetter),
                        _ => (attempts >= by.retry.max_attempts).then_some(by.on_exhausted),
                    };
                    let verdict = match otherwise {
                        Some(otherwise) => Some(self.verdict(&mut ctx, &error, otherwise).await),
                        None => None,
                    };
                    match by.after_failure(ctx.message(), &error, attempts, &mut errors, verdict) {
                        After::Here(wait) => longest = longest.max(wait),
                        After::Ends(handled) => {
                            ended(place, handled);
                            continue;
                        }
                    }
                }
                left.push(Item {
                    place,
                    event,
                    ctx,
                    by,
                    attempts,
                    errors,
                });
            }
            if !longest.is_zero()
                && by
                    .stop
                    .run_until_cancelled(by.tools.clock.sleep(longest))
                    .await
                    .is_none()
            {
                break;
            }
        }
    }
}

impl<E> fmt::Debug for BatchChain<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} of up to {}", self.name, self.how.max)
    }
}
