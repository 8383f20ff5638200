use super::{Mailbox, NewRecord, Session, SessionOptions};
use crate::{Result, clock::bounded};
use async_trait::async_trait;
use std::{fmt::Debug, sync::Arc, time::Duration};

/// What to clean up in a mailbox. A log may keep its history for all mailboxes together: then the age asked for last is that
/// of all, and it may keep what succeeded a little longer.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Purge {
    /// The mailbox.
    pub mailbox: Mailbox,
    /// Removes what succeeded at least this long ago.
    pub succeeded_after: Option<Duration>,
    /// Removes what failed at least this long ago. `None`, the default, keeps dead letters for ever.
    pub failed_after: Option<Duration>,
    /// Removes the receipts of messages handled at least this long ago; see [`InboxLog`](super::InboxLog).
    pub receipts_after: Option<Duration>,
    /// The most records to remove in this call.
    pub max: u64,
}

impl Purge {
    /// Removes nothing yet, at most `max` records a call.
    #[must_use]
    pub fn new(mailbox: Mailbox, max: u64) -> Self {
        Self {
            mailbox,
            succeeded_after: None,
            failed_after: None,
            receipts_after: None,
            max,
        }
    }
    /// Removes what succeeded at least `age` ago.
    #[must_use]
    pub fn succeeded_after(mut self, age: Duration) -> Self {
        self.succeeded_after = Some(bounded(age));
        self
    }
    /// Removes what failed at least `age` ago: dead letters are lost by it.
    #[must_use]
    pub fn failed_after(mut self, age: Duration) -> Self {
        self.failed_after = Some(bounded(age));
        self
    }
    /// Removes the receipts of messages handled at least `age` ago: a message that the broker delivers again later than
    /// that is handled again.
    #[must_use]
    pub fn receipts_after(mut self, age: Duration) -> Self {
        self.receipts_after = Some(bounded(age));
        self
    }
}

/// What every log can do. Appending in a caller's transaction and administration are
/// [optional parts](super::EventLog), attached beside it.
#[async_trait]
pub trait EventLogStore: Debug + Send + Sync + 'static {
    /// Appends records in a transaction of its own.
    ///
    /// # Contract
    /// - All or nothing; durable when it returns. An empty batch does nothing.
    /// - Records of one call and one key keep their order.
    /// - Parked and failed records are unique by (mailbox, message id): a second one changes nothing and is no error.
    /// - One that failed with `hold_key` holds its key as a settled one does: later ones of it wait.
    /// - Every byte of payload, headers and key comes back as it was.
    /// - Cancelled, it has happened or it has not.
    ///
    /// Held by `log::append_claim_settle_round_trip`, `log::bytes_come_back_as_they_were`,
    /// `log::parked_and_failed_are_unique`, `log::a_record_parked_on_arrival_keeps_its_place`, `log::a_record_that_failed_on_arrival_can_hold_its_key`.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable): whether it happened is unknown where the connection
    /// was lost in the middle. [`ErrorKind::Storage`](crate::ErrorKind::Storage): full, read-only or corrupt.
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()>;

    /// Opens a session on a mailbox, which comes into being with it.
    ///
    /// # Contract
    /// Takes no lease yet: a session that never claims holds nobody back. Mailboxes know nothing of each other.
    ///
    /// Held by `log::an_expired_lease_is_taken_over`, `log::a_live_lease_is_renewed`, `log::mailboxes_are_apart`.
    ///
    /// # Errors
    /// [`ErrorKind::Config`](crate::ErrorKind::Config) for a lease shorter than
    /// [`Lease::SHORTEST`](super::Lease::SHORTEST).
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>>;

    /// Removes up to `request.max` finished records, and says how many.
    ///
    /// # Contract
    /// Removes only what is past its age; never a record that is pending. Safe on many nodes at once: none waits for
    /// another and none removes twice. The caller repeats it until it returns less than `max`.
    ///
    /// Held by `log::purge_is_bounded_and_takes_only_what_is_due`.
    async fn purge(&self, request: &Purge) -> Result<u64>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<S: EventLogStore + ?Sized> EventLogStore for $pointer<S> {
            async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
                (**self).append(mailbox, batch).await
            }
            async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
                (**self).open(mailbox, options).await
            }
            async fn purge(&self, request: &Purge) -> Result<u64> {
                (**self).purge(request).await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

const _: fn(&dyn EventLogStore) = |_| {};
