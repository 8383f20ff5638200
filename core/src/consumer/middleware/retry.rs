use super::{Context, HandlerResult, Middleware, Next};
use crate::consumer::{HandlerErrorKind, Retry};

/// Runs what is behind it again when it fails, in place and within one attempt: for the part of a chain that is known to
/// fail now and then, where the attempts of the subscription would be too much. Outside of [`Transactional`](super::Transactional):
/// behind it, a run that failed has left something in the transaction, so it is not run again there.
#[derive(Debug, Clone, Copy)]
pub struct RetryInside(Retry);

impl RetryInside {
    /// Up to `in_place` runs with the waits of `retry`; its other figures do not count here.
    #[must_use]
    pub const fn new(retry: Retry) -> Self {
        Self(retry)
    }
}

impl<E: Sync + 'static> Middleware<E> for RetryInside {
    async fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> HandlerResult {
        let clock = ctx.tools().clock.clone();
        let mut runs = 0;
        loop {
            let result = next.run(ctx, event).await;
            runs += 1;
            match result {
                Err(error)
                    if error.kind() == HandlerErrorKind::Transient
                        && runs < self.0.in_place
                        && !ctx.has_transaction() =>
                {
                    tracing::debug!(message = %ctx.message().id(), runs, error = error.to_chain(), "run again");
                    clock.sleep(self.0.wait_after(runs)).await;
                }
                result => return result,
            }
        }
    }
}
