use super::{Context, HandlerError, HandlerResult, Middleware, Next};
use crate::{Error, ErrorKind, Result};
use std::time::Duration;

/// Ends an attempt that takes too long: handlers are cut off where they wait, what succeeded before is compensated, and
/// the attempt has failed. By the bus's clock. A handler that blocks its thread cannot be cut off.
#[derive(Debug, Clone, Copy)]
pub struct Timeout(Duration);

impl Timeout {
    /// After this long.
    #[must_use]
    pub const fn after(longest: Duration) -> Self {
        Self(longest)
    }
}

impl<E: Sync + 'static> Middleware<E> for Timeout {
    async fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> HandlerResult {
        let clock = ctx.tools().clock.clone();
        tokio::select! {
            biased;
            result = next.run(ctx, event) => result,
            () = clock.sleep(self.0) => Err(HandlerError::from(format!("the chain took longer than {:?}", self.0))),
        }
    }

    fn check(&self) -> Result<()> {
        if self.0.is_zero() {
            let text = "the time-out of the `Timeout` middleware is 0s: it has to be longer than zero";
            return Err(Error::new(ErrorKind::Config, text));
        }
        Ok(())
    }
}
