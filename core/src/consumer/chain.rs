//! A chain of steps for one event type with the middleware around it, and the attempts of a message that goes through it.

use super::{
    Context, HandlerError, HandlerErrorKind, HandlerResult, Verdict, durable,
    gate::Away,
    gathering::Gathering,
    handled::{After, Handled, HandledBy},
    middleware::{Endpoint, Layer, Next, Panicked, ask, tell},
    steps::Steps,
};
use crate::{AnyEvent, Codec as _, Error, ErrorKind, Event, Message, Result, Topic, log::AttemptError};
use async_trait::async_trait;
use futures_util::{FutureExt as _, future::BoxFuture};
use std::{any::type_name, borrow::Cow, fmt, num::NonZeroUsize, panic::AssertUnwindSafe, time::Duration};

/// The pause before the next try when no connection of the log's pool was free.
const BUSY: Duration = Duration::from_millis(100);

/// The channel for the outcomes of a batch, each with its place.
pub(super) type Tell = tokio::sync::mpsc::UnboundedSender<(usize, Handled)>;

/// A chain as a subscription holds it.
#[async_trait]
pub(super) trait AnyChain: fmt::Debug + Send + Sync {
    fn kind(&self) -> Cow<'static, str>;
    fn name(&self) -> &'static str;
    fn topic(&self) -> Topic;
    fn keyed(&self) -> bool;
    /// Whether it asks the inbox by itself.
    fn admits(&self) -> bool {
        false
    }
    /// Whether its messages are taken into the inbox first, and handled from there.
    fn is_durable(&self) -> bool {
        false
    }
    /// How deliveries are handled together, if they are.
    fn gathering(&self) -> Option<Gathering> {
        None
    }
    /// Decodes the message and takes it through the steps, until they have succeeded, or it has to wait, or it is dead.
    async fn handle(&self, ctx: &mut Context, by: &HandledBy<'_>) -> Handled;
    /// Several together: one outcome each, told by its place as soon as it is known.
    async fn handle_together(&self, batch: Vec<(Context, HandledBy<'_>)>, tell: Tell) {
        for (at, (mut ctx, by)) in batch.into_iter().enumerate() {
            let _ = tell.send((at, self.handle(&mut ctx, &by).await));
        }
    }
}

/// An event as the middleware around its chain needs it.
enum Decoded<E> {
    Plain(E),
    Any(AnyEvent),
}

impl<E: Event> Decoded<E> {
    fn typed(&self) -> Option<&E> {
        match self {
            Self::Plain(event) => Some(event),
            Self::Any(event) => event.downcast_ref(),
        }
    }
}

/// The attempts so far, those before this delivery too, and the errors of those since.
struct Tried {
    attempts: u32,
    errors: Vec<AttemptError>,
}

/// The chain of one event type.
pub(super) struct Chain<E: Event> {
    /// Around every event of the bus or subscription: the outermost.
    for_all: Vec<Layer<AnyEvent>>,
    stack: Vec<Layer<E>>,
    steps: Steps<E>,
}

impl<E: Event> Chain<E> {
    pub(super) fn new(for_all: Vec<Layer<AnyEvent>>, stack: Vec<Layer<E>>, steps: Steps<E>) -> Self {
        Self { for_all, stack, steps }
    }

    /// Whether what was said of it can be had together.
    pub(super) fn checked(self) -> Result<Self> {
        self.for_all.iter().try_for_each(|layer| layer.check())?;
        self.stack.iter().try_for_each(|layer| layer.check())?;
        if self.steps.is_durable && self.sharing().is_some() {
            let text = "a durable chain has a transaction for each step: `Transactional` cannot go around it";
            return Err(Error::new(ErrorKind::Config, text).with("type", E::kind()));
        }
        Ok(self)
    }

    /// How many share a transaction, if there is one at all.
    fn sharing(&self) -> Option<NonZeroUsize> {
        let of_all = self.for_all.iter().filter_map(|layer| layer.transaction());
        let typed = self.stack.iter().filter_map(|layer| layer.transaction());
        of_all.chain(typed).map(|sharing| sharing.max).max()
    }

    fn decode(&self, message: &Message) -> Result<Decoded<E>, HandlerError> {
        let event: E = decode(message).map_err(HandlerError::permanent)?;
        Ok(match self.for_all.is_empty() {
            true => Decoded::Plain(event),
            false => Decoded::Any(AnyEvent::new(event)),
        })
    }

    /// One attempt, through the middleware and the steps. Nothing of it is left open.
    async fn attempt(&self, event: &Decoded<E>, ctx: &mut Context) -> HandlerResult {
        let run = async {
            match event {
                Decoded::Plain(event) if self.stack.is_empty() => self.steps.run(ctx, event).await,
                Decoded::Plain(event) => Next::new(&self.stack, &self.steps).run(ctx, event).await,
                Decoded::Any(event) => {
                    Next::new(&self.for_all, self as &dyn Endpoint<AnyEvent>)
                        .run(ctx, event)
                        .await
                }
            }
        };
        let result = AssertUnwindSafe(run).catch_unwind().await;
        let result = result.unwrap_or_else(|panic| Err(Panicked::error("a middleware", &*panic)));
        let result = match result {
            Ok(()) if ctx.has_transaction() && !ctx.is_in_batch => {
                Err("a middleware left a transaction open: it is rolled back".into())
            }
            result => result,
        };
        let Err(error) = result else {
            ctx.ran.clear();
            return Ok(());
        };
        if ctx.is_in_batch {
            // All of the batch is rolled back and run again, one by one: nothing is taken back for this try.
            ctx.ran.clear();
            return Err(error);
        }
        let error = ctx.rolled_back_after(error).await;
        let error = ctx.judged(error);
        match event
            .typed()
            .filter(|_| !ctx.ran.is_empty() && !error.is_outage_of_the_log())
        {
            Some(event) => Err(Box::pin(self.steps.take_back(ctx, event, error)).await),
            None => Err(error),
        }
    }

    /// Tells the middleware of a failed attempt, the innermost first.
    async fn tell(&self, ctx: &mut Context, error: &HandlerError, attempt: u32) {
        tell(&self.stack, ctx, error, attempt).await;
        tell(&self.for_all, ctx, error, attempt).await;
    }

    /// Asks the middleware what is to become of the message, the innermost first.
    async fn verdict(
        &self,
        ctx: &mut Context,
        event: Option<&Decoded<E>>,
        error: &HandlerError,
        otherwise: Verdict,
    ) -> Verdict {
        let (typed, any) = match event {
            Some(Decoded::Any(any)) => (any.downcast_ref(), Some(any)),
            Some(Decoded::Plain(event)) => (Some(event), None),
            None => (None, None),
        };
        let verdict = match ask(&self.stack, ctx, typed, error).await {
            None => ask(&self.for_all, ctx, any, error).await,
            verdict => verdict,
        };
        let _ = ctx.roll_back().await;
        verdict.unwrap_or(otherwise)
    }

    async fn handle_event(&self, ctx: &mut Context, by: &HandledBy<'_>) -> Handled {
        // What seldom happens is apart, and boxed: the future of a handling is kept small.
        let event = match self.decode(ctx.message()) {
            Ok(event) => event,
            Err(error) => return Box::pin(self.undecoded(ctx, by, error)).await,
        };
        let mut tried = Tried {
            attempts: by.attempts,
            errors: Vec::new(),
        };
        loop {
            let Some(pass) = by.gate.pass(&*by.tools.clock, by.stop).await else {
                return Handled::Released;
            };
            ctx.begin_attempt(tried.attempts + 1);
            let message = ctx.message().id();
            let Err(error) = self.attempt(&event, ctx).await else {
                pass.answered(message);
                if let Some(waits) = ctx.was_dropped {
                    return Handled::Dropped { waits };
                }
                by.tell_of_recovery(ctx.message(), tried.attempts);
                return Handled::Done;
            };
            if error.is_busy() {
                // By its own handlers, as a rule: no outage, and no attempt.
                drop(pass);
                let slept = Box::pin(by.stop.run_until_cancelled(by.tools.clock.sleep(BUSY)));
                if slept.await.is_none() {
                    return Handled::Released;
                }
                continue;
            }
            if error.kind() == HandlerErrorKind::Unavailable {
                let why = error.to_chain();
                match pass.unavailable(&*by.tools.clock, message, why.clone()) {
                    Away::All => continue,
                    Away::Alone(wait) => match by.after_unavailable(wait, tried.attempts, why) {
                        After::Ends(handled) => return handled,
                        After::Here(wait) => {
                            let slept = Box::pin(by.stop.run_until_cancelled(by.tools.clock.sleep(wait)));
                            if slept.await.is_none() {
                                return Handled::Released;
                            }
                            continue;
                        }
                    },
                }
            }
            pass.answered(message);
            match Box::pin(self.failed(ctx, by, &event, &error, &mut tried)).await {
                After::Here(wait) => {
                    let slept = Box::pin(by.stop.run_until_cancelled(by.tools.clock.sleep(wait)));
                    if slept.await.is_none() {
                        return Handled::Released;
                    }
                }
                After::Ends(handled) => return handled,
            }
        }
    }

    async fn undecoded(&self, ctx: &mut Context, by: &HandledBy<'_>, error: HandlerError) -> Handled {
        let errors = vec![AttemptError::new(by.tools.clock.now(), by.attempts, error.to_chain())];
        let verdict = self.verdict(ctx, None, &error, Verdict::DeadLetter).await;
        by.carry_out_undecoded(ctx.message(), &error, verdict, errors)
    }

    /// What comes after an attempt that failed.
    async fn failed(
        &self,
        ctx: &mut Context,
        by: &HandledBy<'_>,
        event: &Decoded<E>,
        error: &HandlerError,
        tried: &mut Tried,
    ) -> After {
        match error.kind() {
            HandlerErrorKind::HeldBack => return After::Ends(Handled::HeldBack),
            HandlerErrorKind::TakenOver => return After::Ends(Handled::Released),
            _ => {}
        }
        tried.attempts += 1;
        let attempts = tried.attempts;
        let (message, group) = (ctx.message().id(), ctx.group());
        tracing::debug!(%message, %group, attempts, error = error.to_chain(), "the attempt failed");
        let now = by.tools.clock.now();
        tried.errors.push(AttemptError::new(now, attempts, error.to_chain()));
        self.tell(ctx, error, attempts).await;
        let is_permanent = error.kind() == HandlerErrorKind::Permanent;
        let mut verdict = None;
        if is_permanent || attempts >= by.retry.max_attempts {
            if self.steps.is_durable && !durable::is_settled(&self.steps, ctx).await {
                // Cut off in the middle: it comes once more, to be taken back, before it may be a dead letter.
                let parked = Handled::Parked {
                    after: Some(by.backoff(attempts)),
                    attempts,
                    errors: std::mem::take(&mut tried.errors),
                };
                by.tell_of_waiting(ctx.message(), &parked, error);
                return After::Ends(parked);
            }
            let otherwise = match is_permanent {
                true => Verdict::DeadLetter,
                false => by.on_exhausted,
            };
            verdict = Some(self.verdict(ctx, Some(event), error, otherwise).await);
        }
        by.after_failure(ctx.message(), error, attempts, &mut tried.errors, verdict)
    }

    /// Several deliveries in one transaction. `None` if that failed, and they are to be handled one by one.
    async fn handle_in_one_transaction(&self, batch: &mut [(Context, HandledBy<'_>)]) -> Option<Vec<Handled>> {
        use crate::log::{Admission, Arrival};
        let tools = batch.first()?.0.tools().clone();
        let log = tools.log.clone()?;
        let mut events = Vec::with_capacity(batch.len());
        for (ctx, _) in batch.iter() {
            events.push(self.decode(ctx.message()).ok()?);
        }
        // Not while the transaction is open: whoever is to open the gate may need what it holds.
        let by = batch.first()?.1;
        let pass = by.gate.pass(&*tools.clock, by.stop).await?;
        let mut tx = tools.bus.begin().await.ok()?;
        let arrivals: Vec<Arrival> = batch
            .iter()
            .map(|(ctx, _)| Arrival::new(ctx.message()).ordered(tools.ordered))
            .collect();
        let admissions = tx.admit(&log, &tools.group, &arrivals).await.ok()?;
        let mut outcomes = Vec::with_capacity(batch.len());
        for (((ctx, by), event), admission) in batch.iter_mut().zip(&events).zip(admissions) {
            match admission {
                Admission::New => {}
                Admission::HeldBack => {
                    outcomes.push(Handled::HeldBack);
                    continue;
                }
                Admission::Duplicate | Admission::Parked => {
                    let waits = admission == Admission::Parked;
                    outcomes.push(Handled::Dropped { waits });
                    continue;
                }
            }
            ctx.begin_attempt(by.attempts + 1);
            ctx.lend(tx);
            ctx.is_in_batch = true;
            let result = tools.bus.in_transaction(self.attempt(event, ctx)).await;
            tx = ctx.take_transaction()?;
            let result = match result {
                Ok(()) if ctx.has_failed_in_batch => Err("a run of it has failed in the batch's transaction".into()),
                result => result,
            };
            if let Err(error) = result {
                tracing::debug!(message = %ctx.message().id(), error = error.to_chain(), "a batch is rolled back, and handled one by one");
                let _ = tx.rollback().await;
                return None;
            }
            outcomes.push(Handled::Done);
        }
        if let Err(error) = tx.commit().await {
            // Whether it was committed or not, the receipts tell those who are now handled one by one.
            tracing::debug!(group = %tools.group, error = error.to_chain(), "the commit of a batch failed: it is handled one by one");
            return None;
        }
        if let Some((ctx, _)) = batch.first() {
            pass.answered(ctx.message().id());
        }
        for ((ctx, by), outcome) in batch.iter().zip(&outcomes) {
            if matches!(outcome, Handled::Done) {
                by.tell_of_recovery(ctx.message(), by.attempts);
            }
        }
        Some(outcomes)
    }
}

pub(super) fn decode<E: Event>(message: &Message) -> Result<E, String> {
    let decoded = std::panic::catch_unwind(|| E::Codec::decode(message.payload()));
    match decoded {
        Ok(Ok(event)) => Ok(event),
        Ok(Err(error)) => Err(error.to_chain()),
        Err(_) => Err(format!("the decoder of {} panicked", type_name::<E>())),
    }
}

/// From the middleware for all events to that of this type.
impl<E: Event> Endpoint<AnyEvent> for Chain<E> {
    fn call<'a>(&'a self, ctx: &'a mut Context, event: &'a AnyEvent) -> BoxFuture<'a, HandlerResult> {
        Box::pin(async move {
            match event.downcast_ref::<E>() {
                Some(event) => Next::new(&self.stack, &self.steps).run(ctx, event).await,
                None => Err(HandlerError::permanent(
                    "a middleware handed on an event of another type",
                )),
            }
        })
    }
    fn compensate<'a>(
        &'a self,
        ctx: &'a mut Context,
        event: &'a AnyEvent,
        error: HandlerError,
    ) -> BoxFuture<'a, HandlerError> {
        Box::pin(async move {
            match event.downcast_ref::<E>() {
                Some(event) => self.steps.take_back(ctx, event, error).await,
                None => error,
            }
        })
    }
}

#[async_trait]
impl<E: Event> AnyChain for Chain<E> {
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
    fn admits(&self) -> bool {
        self.sharing().is_some()
    }
    fn is_durable(&self) -> bool {
        self.steps.is_durable
    }
    fn gathering(&self) -> Option<Gathering> {
        let max = self.sharing().filter(|max| max.get() > 1)?;
        let wait = Duration::ZERO;
        Some(Gathering { max, wait })
    }

    async fn handle(&self, ctx: &mut Context, by: &HandledBy<'_>) -> Handled {
        self.handle_event(ctx, by).await
    }

    async fn handle_together(&self, mut batch: Vec<(Context, HandledBy<'_>)>, tell: Tell) {
        if batch.len() > 1
            && let Some(outcomes) = self.handle_in_one_transaction(&mut batch).await
        {
            for outcome in outcomes.into_iter().enumerate() {
                let _ = tell.send(outcome);
            }
            return;
        }
        let tell = &tell;
        let each = batch.into_iter().enumerate().map(|(at, (mut ctx, by))| async move {
            let _ = ctx.roll_back().await;
            let _ = tell.send((at, self.handle(&mut ctx, &by).await));
        });
        futures_util::future::join_all(each).await;
    }
}

impl<E: Event> fmt::Debug for Chain<E> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let names = self.steps.steps.iter().map(|step| &step.name);
        f.debug_list().entries(names).finish()
    }
}
