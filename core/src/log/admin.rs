use super::{AttemptError, Mailbox, RecordState};
use crate::{Message, MessageId, Result, Topic, clock::Timestamp};
use async_trait::async_trait;
use std::{collections::BTreeMap, fmt::Debug, sync::Arc, time::Duration};

/// Which records of a mailbox are meant. Every condition given must hold.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Filter {
    /// The mailbox.
    pub mailbox: Mailbox,
    /// In this state. Redrive and discard look at failed records only, whatever it says.
    pub state: Option<RecordState>,
    /// Of this topic.
    pub topic: Option<Topic>,
    /// Of this type, such as `order.placed.v1`.
    pub kind: Option<String>,
    /// Of this key.
    pub key: Option<String>,
    /// One of these; all if empty.
    pub ids: Vec<MessageId>,
}

impl Filter {
    /// Every record of `mailbox`.
    #[must_use]
    pub fn of(mailbox: Mailbox) -> Self {
        Self {
            mailbox,
            state: None,
            topic: None,
            kind: None,
            key: None,
            ids: Vec::new(),
        }
    }
    /// In this state.
    #[must_use]
    pub fn with_state(mut self, state: RecordState) -> Self {
        self.state = Some(state);
        self
    }
    /// Of this topic.
    #[must_use]
    pub fn with_topic(mut self, topic: Topic) -> Self {
        self.topic = Some(topic);
        self
    }
    /// Of this type.
    #[must_use]
    pub fn with_kind(mut self, kind: impl Into<String>) -> Self {
        self.kind = Some(kind.into());
        self
    }
    /// Of this key.
    #[must_use]
    pub fn with_key(mut self, key: impl Into<String>) -> Self {
        self.key = Some(key.into());
        self
    }
    /// This one, beside those already named.
    #[must_use]
    pub fn with_id(mut self, id: MessageId) -> Self {
        self.ids.push(id);
        self
    }
    /// Whether a message passes all conditions but the state: for logs that filter in memory.
    #[must_use]
    pub fn matches(&self, message: &Message) -> bool {
        self.topic.as_ref().is_none_or(|t| t == message.topic())
            && self.kind.as_deref().is_none_or(|k| k == message.kind())
            && self.key.as_deref().is_none_or(|k| message.key() == Some(k))
            && (self.ids.is_empty() || self.ids.contains(&message.id()))
    }
}

/// A page of a listing.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Page {
    /// Behind this; `None` begins.
    pub after: Option<Cursor>,
    /// The most entries; 100 if 0.
    pub limit: u32,
}

impl Page {
    /// The first page, of up to `limit` entries.
    #[must_use]
    pub fn first(limit: u32) -> Self {
        Self { after: None, limit }
    }
    /// The page behind `cursor`.
    #[must_use]
    pub fn after(cursor: Cursor, limit: u32) -> Self {
        Self {
            after: Some(cursor),
            limit,
        }
    }
    /// The limit, with its default and its upper bound of 1000.
    #[must_use]
    pub fn size(&self) -> usize {
        match self.limit {
            0 => 100,
            limit => limit.min(1000) as usize,
        }
    }
}

/// Where a page ended: opaque, and good for a later call on the same mailbox.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Cursor(pub String);

/// A page's entries, and where the next one begins.
#[derive(Debug, Clone, Default)]
#[non_exhaustive]
pub struct Listing {
    /// The entries, oldest first.
    pub entries: Vec<Stored>,
    /// Where the next page begins; `None` at the end.
    pub next: Option<Cursor>,
}

impl Listing {
    /// A page.
    #[must_use]
    pub fn new(entries: Vec<Stored>, next: Option<Cursor>) -> Self {
        Self { entries, next }
    }
}

/// A record as it is stored, for a person to look at.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Stored {
    /// What it carries. Known by [`Message::id`].
    pub message: Message,
    /// Where it is in its life.
    pub state: RecordState,
    /// The attempts counted.
    pub attempts: u32,
    /// When it was appended.
    pub created_at: Timestamp,
    /// When it is due; `None` if it is due already, waits for something else than time, or is finished.
    pub due_at: Option<Timestamp>,
    /// When it succeeded or failed.
    pub finished_at: Option<Timestamp>,
    /// The last errors, oldest first.
    pub errors: Vec<AttemptError>,
}

impl Stored {
    /// A pending record without history.
    #[must_use]
    pub fn new(message: Message, created_at: Timestamp) -> Self {
        Self {
            message,
            state: RecordState::Pending,
            attempts: 0,
            created_at,
            due_at: None,
            finished_at: None,
            errors: Vec::new(),
        }
    }
}

/// The numbers of a mailbox.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Stats {
    /// Pending in all, those below included.
    pub pending: u64,
    /// Of these, parked: refused at least once, or behind one that was.
    pub parked: u64,
    /// Of these, scheduled: their time has not come.
    pub scheduled: u64,
    /// Dead letters.
    pub failed: u64,
    /// Kept in the history.
    pub succeeded: u64,
    /// How long the oldest pending record has been there, scheduled ones aside.
    pub oldest_pending: Option<Duration>,
}

/// What tools and people do with a log, attached to [`EventLog`](super::EventLog). The same for all mailboxes.
///
/// A log has to have it: dead letters that nobody can see, redrive or discard are lost, and the conformance kit looks at records
/// through it. It is a part of its own so that wrappers can replace it.
#[async_trait]
pub trait LogAdmin: Debug + Send + Sync + 'static {
    /// A page of records, oldest first.
    ///
    /// # Contract
    /// Stable under writes: a record that stays what it is, is seen exactly once, whatever comes, goes or changes
    /// beside it. A mailbox that does not exist is empty.
    ///
    /// Held by `log::pages_are_stable_under_writes`.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`](crate::ErrorKind::Invalid) for a cursor that is none.
    async fn list(&self, filter: &Filter, page: &Page) -> Result<Listing>;

    /// One record.
    ///
    /// # Contract
    /// Finds it in whatever state it is, with up to ten errors; `None` if it is not there (any more).
    ///
    /// Held by `log::failed_records_are_redriven_and_discarded`, `log::errors_are_kept_the_last_ten`.
    async fn show(&self, mailbox: &Mailbox, id: MessageId) -> Result<Option<Stored>>;

    /// Makes up to `max` failed records pending again, oldest first, and says how many.
    ///
    /// # Contract
    /// Their attempts begin anew, their errors are kept. One that held its key goes on in its place; another enters
    /// at the end, behind what waits of its key, and nothing of the key overtakes another for it. Records that are not
    /// failed are left alone.
    ///
    /// Held by `log::failed_records_are_redriven_and_discarded`, `log::a_redriven_record_may_be_refused_again`,
    /// `log::a_redriven_record_lets_nothing_overtake`, `log::a_redriven_record_lets_nothing_overtake_after_a_take_over`.
    async fn redrive(&self, filter: &Filter, max: u64) -> Result<u64>;

    /// Removes up to `max` failed records, oldest first, and says how many. They are lost.
    ///
    /// # Contract
    /// If one held its key, the next of that key becomes due. Records that are not failed are left alone.
    ///
    /// Held by `log::failed_records_are_redriven_and_discarded`.
    async fn discard(&self, filter: &Filter, max: u64) -> Result<u64>;

    /// How many failed records the filter names: what [`redrive`](LogAdmin::redrive) and [`discard`](LogAdmin::discard)
    /// would take.
    ///
    /// # Contract
    /// Whatever the filter says of the state.
    ///
    /// Held by `log::failed_records_are_redriven_and_discarded`.
    async fn count_failed(&self, filter: &Filter) -> Result<u64>;

    /// The mailboxes there are: those something was appended to, or that a session was opened on.
    ///
    /// # Contract
    /// Reading, counting, redriving and discarding bring none into being. Cheap where it is implemented; the default asks
    /// for all [`stats`](LogAdmin::stats).
    ///
    /// Held by `log::mailboxes_are_known_by_name`.
    async fn mailboxes(&self) -> Result<Vec<Mailbox>> {
        Ok(self.stats().await?.into_keys().collect())
    }

    /// The numbers of every mailbox there is.
    ///
    /// # Contract
    /// Exact at one instant. It may count every record: not for a hot path.
    ///
    /// Held by `log::stats_count`.
    async fn stats(&self) -> Result<BTreeMap<Mailbox, Stats>>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<S: LogAdmin + ?Sized> LogAdmin for $pointer<S> {
            async fn list(&self, filter: &Filter, page: &Page) -> Result<Listing> {
                (**self).list(filter, page).await
            }
            async fn show(&self, mailbox: &Mailbox, id: MessageId) -> Result<Option<Stored>> {
                (**self).show(mailbox, id).await
            }
            async fn redrive(&self, filter: &Filter, max: u64) -> Result<u64> {
                (**self).redrive(filter, max).await
            }
            async fn discard(&self, filter: &Filter, max: u64) -> Result<u64> {
                (**self).discard(filter, max).await
            }
            async fn count_failed(&self, filter: &Filter) -> Result<u64> {
                (**self).count_failed(filter).await
            }
            async fn mailboxes(&self) -> Result<Vec<Mailbox>> {
                (**self).mailboxes().await
            }
            async fn stats(&self) -> Result<BTreeMap<Mailbox, Stats>> {
                (**self).stats().await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

const _: fn(&dyn LogAdmin) = |_| {};
