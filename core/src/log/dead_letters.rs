use super::{Cursor, Filter, Listing, LogAdmin, Page, RecordState, Stored};
use crate::{Error, ErrorKind, Mailbox, MessageId, Result, clock::Clock};
use std::{fmt, num::NonZeroU32, sync::Arc, time::Duration};

/// The dead letters of a mailbox, as a person works with them: count, look, then redrive or discard. The same for outboxes
/// and inboxes. From [`Bus::dead_letters`](crate::Bus::dead_letters).
#[derive(Clone)]
pub struct DeadLetters {
    admin: Arc<dyn LogAdmin>,
    clock: Arc<dyn Clock>,
    filter: Filter,
}

/// How fast dead letters are redriven.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Pace {
    /// All at once, in batches of 1000.
    AtOnce,
    /// So many a second, so that what failed because of too much load does not fail again.
    PerSecond(NonZeroU32),
}

impl DeadLetters {
    pub(crate) fn new(admin: Arc<dyn LogAdmin>, clock: Arc<dyn Clock>, filter: Filter) -> Self {
        let filter = filter.with_state(RecordState::Failed);
        Self { admin, clock, filter }
    }

    /// Only those that pass further conditions: `.only(|f| f.with_topic(orders))`.
    #[must_use]
    pub fn only(mut self, narrow: impl FnOnce(Filter) -> Filter) -> Self {
        let mailbox = self.filter.mailbox.clone();
        self.filter = narrow(self.filter).with_state(RecordState::Failed);
        self.filter.mailbox = mailbox;
        self
    }

    /// How many there are.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the log has no such inbox: no group of that name has ever subscribed on it. Otherwise of the
    /// log.
    pub async fn count(&self) -> Result<u64> {
        match self.admin.count_failed(&self.filter).await? {
            0 => self.check_mailbox().await.map(|()| 0),
            count => Ok(count),
        }
    }

    /// Tells an inbox without dead letters from a misspelt one.
    async fn check_mailbox(&self) -> Result<()> {
        let mailbox = &self.filter.mailbox;
        if *mailbox == Mailbox::outbox() {
            return Ok(());
        }
        let known = self.admin.mailboxes().await?;
        if known.contains(mailbox) {
            return Ok(());
        }
        let known: Vec<String> = known.iter().map(ToString::to_string).collect();
        let text = "the event log has no such mailbox: is the name of the group misspelt, or has it never subscribed on this log?";
        Err(Error::new(ErrorKind::Invalid, text).with("mailbox", mailbox).with(
            "there are",
            if known.is_empty() {
                "none".to_owned()
            } else {
                known.join(", ")
            },
        ))
    }

    /// A page of them, oldest first, each with its message, its attempts and the last ten errors.
    ///
    /// # Errors
    /// As [`count`](DeadLetters::count).
    pub async fn list(&self, after: Option<Cursor>, limit: u32) -> Result<Listing> {
        let listing = self.admin.list(&self.filter, &Page { after, limit }).await?;
        if listing.entries.is_empty() {
            self.check_mailbox().await?;
        }
        Ok(listing)
    }

    /// One of them; `None` if it is none, or none any more.
    ///
    /// # Errors
    /// As [`count`](DeadLetters::count).
    pub async fn show(&self, id: MessageId) -> Result<Option<Stored>> {
        let found = self.admin.show(&self.filter.mailbox, id).await?;
        if found.is_none() {
            self.check_mailbox().await?;
        }
        Ok(found.filter(|stored| stored.state == RecordState::Failed && self.filter.matches(&stored.message)))
    }

    /// Makes them pending again, with their attempts begun anew, oldest first, and says how many. Those that fail again
    /// meanwhile are not redriven twice. Dropping the future ends it; what has been redriven stays so.
    ///
    /// # Errors
    /// As [`count`](DeadLetters::count); what came before has been redriven.
    pub async fn redrive(&self, pace: Pace) -> Result<u64> {
        let total = self.count().await?;
        let (step, wait) = match pace {
            Pace::AtOnce => (1000, Duration::ZERO),
            // Ten times a second is even enough.
            Pace::PerSecond(n) if n.get() >= 10 => (u64::from(n.get() / 10), Duration::from_millis(100)),
            Pace::PerSecond(n) => (1, Duration::from_secs(1) / n.get()),
        };
        let mut redriven = 0;
        while redriven < total {
            let now = self.admin.redrive(&self.filter, step.min(total - redriven)).await?;
            redriven += now;
            if now == 0 {
                break;
            }
            if redriven < total && !wait.is_zero() {
                self.clock.sleep(wait).await;
            }
        }
        Ok(redriven)
    }

    /// Removes them, and says how many. They are lost.
    ///
    /// # Errors
    /// As [`count`](DeadLetters::count); what came before has been removed.
    pub async fn discard(&self) -> Result<u64> {
        let total = self.count().await?;
        let mut removed = 0;
        while removed < total {
            match self.admin.discard(&self.filter, (total - removed).min(1000)).await? {
                0 => break,
                now => removed += now,
            }
        }
        Ok(removed)
    }
}

impl fmt::Debug for DeadLetters {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("DeadLetters")
            .field("filter", &self.filter)
            .finish_non_exhaustive()
    }
}
