use super::{GroupMember, Lent, RegisteredMember};
use crate::{GroupName, Message, MessageId, Result, Topic};
use async_trait::async_trait;
use std::{fmt::Debug, sync::Arc, time::Duration};

/// A message that has reached a group, as [`InboxLog::admit`] asks about it.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct Arrival {
    /// The message: its id, topic and key count.
    pub message: Message,
    /// Whether it is what the inbox itself had parked, on its way to be tried again: then it does not wait for itself.
    pub was_parked: bool,
    /// Whether the order of its key counts: then it waits behind another of its key.
    pub ordered: bool,
}

impl Arrival {
    /// A message from the broker.
    #[must_use]
    pub fn new(message: &Message) -> Self {
        Self {
            message: message.clone(),
            was_parked: false,
            ordered: true,
        }
    }
    /// A message that the inbox had parked, and that a session has claimed.
    #[must_use]
    pub fn parked(message: &Message) -> Self {
        Self {
            was_parked: true,
            ..Self::new(message)
        }
    }
    /// Sets whether the order of its key counts.
    #[must_use]
    pub fn ordered(mut self, ordered: bool) -> Self {
        self.ordered = ordered;
        self
    }
    /// Its id.
    #[must_use]
    pub fn id(&self) -> MessageId {
        self.message.id()
    }
    /// Its topic.
    #[must_use]
    pub fn topic(&self) -> &Topic {
        self.message.topic()
    }
    /// Its ordering key, if that counts.
    #[must_use]
    pub fn key(&self) -> Option<&str> {
        self.message.key().filter(|_| self.ordered)
    }
}

/// What is to be done with a message that has reached a group.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Admission {
    /// Its receipt is written in the transaction: handle it, and commit.
    New,
    /// Handled before: acknowledge it and drop it.
    Duplicate,
    /// It waits in the inbox already, or is a dead letter there: acknowledge it and drop it.
    Parked,
    /// Another of its key waits in the inbox: park it too. No receipt is written.
    HeldBack,
}

/// A small text that is kept for a message of a group: how far its chain has come, or what has been taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
#[allow(clippy::exhaustive_structs)]
pub struct Note {
    /// Counts the writes, from 1: what the next write names.
    pub version: u64,
    /// What was written last.
    pub text: String,
}

/// The inbox's part of a log: receipts, written in the transaction that holds a handler's effects. Optional, attached to
/// [`EventLog`](super::EventLog). What has to wait is parked by an append with
/// [`Placement::Parked`](super::Placement::Parked), a dead letter by one with
/// [`Placement::Failed`](super::Placement::Failed).
#[async_trait]
pub trait InboxLog: Debug + Send + Sync + 'static {
    /// Asks of many messages at once what is to be done with each, and writes the receipts of the new ones; one answer
    /// each, in order.
    ///
    /// # Contract
    /// - A receipt appears with the transaction's commit, or never. Of two transactions that admit one message at once,
    ///   the second waits for the first; if that commits it is a `Duplicate`, else `New`.
    /// - Named twice in one batch, the second is a `Duplicate`.
    /// - Batches that name the same ids in other orders do not deadlock.
    /// - The mailbox of the group's inbox need not be there: receipts and notes may be older than anything appended to it.
    /// - `HeldBack` may be out of date when it arrives: parking decides by itself whether there is still something to
    ///   wait behind.
    ///
    /// Held by `log::messages_are_admitted_once`, `log::admission_knows_what_waits`.
    ///
    /// # Errors
    /// [`ErrorKind::WrongTransaction`](crate::ErrorKind::WrongTransaction) as for
    /// [`append_in`](super::TransactionalLog::append_in).
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>>;

    /// Asks the same outside of any transaction, and writes nothing: for groups whose handlers keep no receipts, so that
    /// what waits is not overtaken and what was parked is not handled twice.
    ///
    /// # Contract
    /// Answers for what is committed when it is called. A message is `New` unless there is a receipt of it (`Duplicate`),
    /// it waits or is a dead letter itself (`Parked`), or another of its key waits (`HeldBack`).
    ///
    /// Held by `log::a_look_writes_nothing`.
    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>>;

    /// The note kept for a message of the group.
    ///
    /// # Contract
    /// In a transaction it sees that transaction's own writes; without one, what is committed.
    ///
    /// Held by `log::notes_are_compared_and_set`.
    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>>;

    /// Writes a note if its version still is `expected` (0: there is none), and says whether it did.
    ///
    /// # Contract
    /// Of two writers that expect one version, one succeeds: the second waits for the first one's transaction, and is
    /// told `false` if that commits. Without a transaction it is committed when it returns. Notes are purged with the
    /// [receipts](super::Purge::receipts_after), by the age of their last write, but not while their message is in the inbox.
    ///
    /// Held by `log::notes_are_compared_and_set`, `log::notes_are_kept_while_their_message_waits`.
    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool>;

    /// Registers a member of the group, or renews its registration, and forgets the members of the group that have been
    /// unseen for longer than `retention`.
    ///
    /// # Contract
    /// - Committed when it returns: every later call of [`members`](InboxLog::members), on any handle, sees it.
    /// - A member is known by its [`Owner`](super::Owner) within the group. Registering again replaces its types and
    ///   topics and sets its last-seen time by the log's clock; the time of its first registration stays. A member that
    ///   was unseen for longer than `retention` starts anew.
    /// - Groups do not see each other's members.
    /// - Cancelled, it has happened or it has not.
    ///
    /// Held by `log::members_know_each_other`.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) if the log cannot be reached; the call may be repeated.
    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()>;

    /// Lists the members of the group that were seen within `retention`, oldest registration first.
    ///
    /// # Contract
    /// Answers for what is committed when it is called, with one cheap read: a consumer asks it for a batch that
    /// contains a type it does not handle.
    ///
    /// Held by `log::members_know_each_other`.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) if the log cannot be reached.
    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<S: InboxLog + ?Sized> InboxLog for $pointer<S> {
            async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
                (**self).admit(tx, group, arrivals).await
            }
            async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
                (**self).look(group, arrivals).await
            }
            async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
                (**self).note(tx, group, id).await
            }
            async fn write_note(
                &self,
                tx: Option<Lent<'_>>,
                group: &GroupName,
                id: MessageId,
                expected: u64,
                text: &str,
            ) -> Result<bool> {
                (**self).write_note(tx, group, id, expected, text).await
            }
            async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
                (**self).register(group, member, retention).await
            }
            async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
                (**self).members(group, retention).await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

const _: fn(&dyn InboxLog) = |_| {};
