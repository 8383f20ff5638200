use crate::{Assignment, Disposition, Error, ErrorKind, Result};
use async_trait::async_trait;
use std::fmt::Debug;

/// A partition, or a queue, that a member of a group has for a while: what a driver hands messages out of.
#[async_trait]
pub trait Hold: Debug + Send + Sync + 'static {
    /// Which stretch of having it this is.
    fn assignment(&self) -> Assignment;

    /// Hands out nothing more; what is out can still be settled. `false` if it did not before.
    fn leave(&self) -> bool;

    /// It is somebody else's, or its connection is lost: nothing more is handed out, and what is settled from now on is in vain.
    fn lose(&self);

    /// Notes what became of messages by their positions: `Ack` and `Release` only. One outcome each, and whether the hold
    /// hands out nothing more until everything that is not settled can be handed out again, in order.
    async fn settle(&self, batch: &[(u64, Disposition)]) -> (Vec<Result<()>>, bool);
}

/// Where a driver puts messages that are to be tried later, or never again.
#[async_trait]
pub trait Copies<H>: Debug + Send + Sync + 'static {
    /// Stores a copy of what is out at `position`, for `Retry` or as a `DeadLetter`; the original is acknowledged after it.
    ///
    /// # Errors
    /// If the copy is not stored for certain: then the original comes again.
    async fn store(&self, hold: &H, position: u64, disposition: Disposition) -> Result<()>;
}

/// The error of a delivery that cannot be settled any more.
#[must_use]
pub fn not_outstanding(position: u64) -> Error {
    let text = "the delivery is not outstanding: its partition has gone to somebody else, or its connection is lost";
    Error::new(ErrorKind::LeaseLost, text).with("position", position)
}
