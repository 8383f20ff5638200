//! A chain of steps for one event type, and what becomes of a message that goes through it.

use super::{Context, HandlerError, HandlerErrorKind, HandlerResult, Retry, handler::Run};
use crate::{
    Codec as _, Event, Message, Topic,
    clock::{Clock, Timestamp},
    log::AttemptError,
};
use async_trait::async_trait;
use futures_util::FutureExt as _;
use std::{any::type_name, fmt, marker::PhantomData, panic::AssertUnwindSafe};
use tokio_util::sync::CancellationToken;

/// One step: a handler and how it is taken back.
pub(super) struct Step<E> {
    pub(super) name: &'static str,
    pub(super) run: Box<dyn Run<E>>,
    pub(super) compensate: Option<Box<dyn Run<E>>>,
}

/// The steps of one event type.
pub(super) struct Chain<E> {
    steps: Vec<Step<E>>,
    event: PhantomData<fn() -> E>,
}

/// What became of a message.
#[derive(Debug)]
pub(super) enum Handled {
    Done,
    /// Not finished when the subscription was stopped.
    Released,
    /// A dead letter, with its attempts and errors.
    Dead {
        attempts: u32,
        errors: Vec<AttemptError>,
    },
}

/// What a chain is tried again by.
#[derive(Debug, Clone, Copy)]
pub(super) struct HandledBy<'a> {
    pub(super) retry: &'a Retry,
    pub(super) clock: &'a dyn Clock,
    /// Ends the waits between attempts, never an attempt.
    pub(super) stop: &'a CancellationToken,
}

/// A chain as a subscription holds it.
#[async_trait]
pub(super) trait AnyChain: fmt::Debug + Send + Sync {
    fn kind(&self) -> std::borrow::Cow<'static, str>;
    fn name(&self) -> &'static str;
    fn topic(&self) -> Topic;
    fn keyed(&self) -> bool;
    /// Decodes the message and takes it through the steps, until they have succeeded or the attempts are used up.
    async fn handle(&self, ctx: &mut Context, by: &HandledBy<'_>) -> Handled;
}

impl<E: Event> Chain<E> {
    pub(super) fn new(steps: Vec<Step<E>>) -> Self {
        Self {
            steps,
            event: PhantomData,
        }
    }

    /// The steps in order; if one fails, the compensations of those before it in reverse.
    async fn attempt(&self, event: &E, ctx: &mut Context) -> HandlerResult {
        for (at, step) in self.steps.iter().enumerate() {
            let Err(error) = guarded(step.name, &*step.run, event, ctx).await else {
                continue;
            };
            for done in self.steps[..at].iter().rev() {
                let Some(compensation) = &done.compensate else { continue };
                if let Err(second) = guarded(done.name, &**compensation, event, ctx).await {
                    let message = ctx.message().id();
                    tracing::error!(%message, group = %ctx.group(), step = done.name, error = second.to_chain(), "a compensation failed; the others run all the same");
                }
            }
            return Err(error);
        }
        Ok(())
    }
}

/// Runs a step; its panic is a failure like any other.
async fn guarded<E>(name: &'static str, step: &dyn Run<E>, event: &E, ctx: &mut Context) -> HandlerResult {
    // What a panicking handler leaves behind is its own state, which it shares with its other calls anyway.
    let run = AssertUnwindSafe(async { step.run(event, ctx).await });
    run.catch_unwind().await.unwrap_or_else(|panic| {
        let text = panic
            .downcast_ref::<&str>()
            .map(|s| (*s).to_owned())
            .or_else(|| panic.downcast_ref::<String>().cloned());
        let text = text.unwrap_or_else(|| "no text".to_owned());
        Err(HandlerError::from(format!("{name} panicked: {text}")))
    })
}

fn decode<E: Event>(message: &Message) -> Result<E, String> {
    let decoded = std::panic::catch_unwind(|| E::Codec::decode(message.payload()));
    match decoded {
        Ok(Ok(event)) => Ok(event),
        Ok(Err(error)) => Err(error.to_chain()),
        Err(_) => Err(format!("the decoder of {} panicked", type_name::<E>())),
    }
}

impl Handled {
    pub(super) fn dead(at: Timestamp, why: impl Into<String>) -> Self {
        Self::Dead {
            attempts: 0,
            errors: vec![AttemptError::new(at, 0, why)],
        }
    }
}

#[async_trait]
impl<E: Event> AnyChain for Chain<E> {
    fn kind(&self) -> std::borrow::Cow<'static, str> {
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

    async fn handle(&self, ctx: &mut Context, by: &HandledBy<'_>) -> Handled {
        let HandledBy { retry, clock, stop } = *by;
        let event: E = match decode(ctx.message()) {
            Ok(event) => event,
            Err(why) => return Handled::dead(clock.now(), why),
        };
        let (mut attempts, mut outages) = (0, 0);
        let mut errors = Vec::new();
        loop {
            ctx.begin_attempt();
            let Err(error) = self.attempt(&event, ctx).await else {
                return Handled::Done;
            };
            let (message, group) = (ctx.message().id(), ctx.group());
            let wait = match error.kind() {
                HandlerErrorKind::Unavailable => {
                    outages += 1;
                    tracing::warn!(%message, %group, error = error.to_chain(), "a service is unavailable: no attempt is counted");
                    retry.wait_after(outages)
                }
                kind => {
                    attempts += 1;
                    errors.push(AttemptError::new(clock.now(), attempts, error.to_chain()));
                    tracing::debug!(%message, %group, attempts, error = error.to_chain(), "the chain failed");
                    if kind == HandlerErrorKind::Permanent || attempts >= retry.max_attempts {
                        return Handled::Dead { attempts, errors };
                    }
                    match kind {
                        HandlerErrorKind::RetryAfter(wait) => wait,
                        _ => retry.wait_after(attempts),
                    }
                }
            };
            if stop.run_until_cancelled(clock.sleep(wait)).await.is_none() {
                return Handled::Released;
            }
        }
    }
}

impl<E> fmt::Debug for Chain<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.steps.iter().map(|step| step.name)).finish()
    }
}
