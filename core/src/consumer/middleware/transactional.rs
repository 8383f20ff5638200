use super::{Context, HandlerError, HandlerResult, Middleware, Next, Sharing};
use crate::{
    consumer::{context::NoTransaction, error::is_outage},
    log::{Admission, Arrival},
};
use std::num::NonZeroUsize;

/// Exactly-once effects: begins the log's transaction, admits (group, message id), lends the transaction to the handlers
/// ([`Context::tx`]) and to [`Context::publish`], and commits. Then the broker is acknowledged.
///
/// The receipt, what handlers have written and what they have published are committed together or not at all. A message
/// that comes again, after a crash between the commit and the acknowledgement, say, is acknowledged and its handlers do
/// not run. One whose key has an earlier event waiting in the inbox is parked behind that.
///
/// An error, of handlers or of a statement that was swallowed, rolls all of it back. Steps that may
/// [fail](super::super::OnFailure::Ignore) run in a savepoint. What handlers do outside of the transaction is theirs to make
/// repeatable, or to take back: their compensations run after the rollback.
///
/// Each attempt holds a connection of the log's pool: the pool bounds how many handle at once.
#[derive(Debug, Clone, Copy, Default)]
pub struct Transactional {
    batch: Option<NonZeroUsize>,
}

impl Transactional {
    /// A transaction for each attempt.
    #[must_use]
    pub const fn new() -> Self {
        Self { batch: None }
    }

    /// Up to `max` deliveries that are there at once share a transaction, which is begun before any middleware. If one of
    /// them fails, all of it is rolled back and they are handled one by one, so a handler may run twice; compensations do
    /// not run for the try that is rerun.
    #[must_use]
    pub const fn batch(max: NonZeroUsize) -> Self {
        Self { batch: Some(max) }
    }
}

impl<E: Sync + 'static> Middleware<E> for Transactional {
    async fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> HandlerResult {
        if ctx.is_in_batch {
            let result = next.run(ctx, event).await;
            ctx.has_failed_in_batch |= result.is_err();
            return result;
        }
        let Some(log) = ctx.tools().log.clone() else {
            return Err(HandlerError::permanent("`Transactional` needs an event log"));
        };
        let mut tx = ctx.bus().begin().await.map_err(HandlerError::of_the_log)?;
        let message = ctx.message();
        let arrival = if ctx.was_parked {
            Arrival::parked(message)
        } else {
            Arrival::new(message)
        }
        .ordered(ctx.tools().ordered);
        let admitted = tx.admit(&log, ctx.group(), &[arrival]).await;
        match admitted.map_err(HandlerError::of_the_log)?.first() {
            Some(Admission::New) => {}
            Some(Admission::HeldBack) => {
                let _ = tx.rollback().await;
                return Err(HandlerError::held_back());
            }
            known @ (Some(Admission::Duplicate | Admission::Parked) | None) => {
                let waits = known == Some(&Admission::Parked);
                tracing::debug!(message = %ctx.message().id(), group = %ctx.group(), "handled before, or waiting already: dropped");
                let _ = tx.rollback().await;
                ctx.was_dropped = Some(waits);
                return Ok(());
            }
        }
        ctx.lend(tx);
        let bus = ctx.bus().clone();
        let result = bus.in_transaction(next.run(ctx, event)).await;
        let Some(tx) = ctx.take_transaction() else {
            return result;
        };
        let error = match result {
            Ok(()) => {
                // Cut off in the middle of the commit, nothing is taken back: nobody knows whether it was committed, and
                // the next attempt finds out by the receipt.
                let ran = std::mem::take(&mut ctx.ran);
                ctx.no_transaction = NoTransaction::IsOver;
                match tx.commit().await {
                    Ok(()) => return Ok(()),
                    Err(error) if is_outage(&error) => return Err(error.into()),
                    Err(error) => {
                        ctx.ran = ran;
                        HandlerError::transient(error)
                    }
                }
            }
            Err(error) => {
                ctx.lend(tx);
                let error = ctx.rolled_back_after(error).await;
                ctx.judged(error)
            }
        };
        if error.is_outage_of_the_log() {
            return Err(error);
        }
        Err(next.compensate(ctx, event, error).await)
    }

    fn transaction(&self) -> Option<Sharing> {
        Some(Sharing {
            max: self.batch.unwrap_or(NonZeroUsize::MIN),
        })
    }
}
