use super::{Mailbox, NewRecord};
use crate::{Error, ErrorKind, Result};
use async_trait::async_trait;
use std::{
    any::{Any, type_name},
    fmt::{self, Debug},
    sync::Arc,
};

/// A transaction of the caller's that an event can be written in: implemented, in the log's crate, on the transaction
/// types of its driver.
///
/// `Log` only says whose implementation it is: it lets a log's crate implement this on a driver's type (the orphan rule
/// asks for a local type) and is inferred at the call.
#[diagnostic::on_unimplemented(
    message = "`{Self}` is not a transaction that an event can be written in",
    label = "expected an open transaction, as `&mut tx`",
    note = "pass the transaction your own data is written in:\n    let mut tx = pool.begin().await?;\n    bus.publish_in(&mut tx, &event).await?;\n    tx.commit().await?;",
    note = "or begin one on the event log, whatever its database: `let mut tx = bus.begin().await?;`",
    note = "to publish without a transaction of yours, say so: `bus.publish(&event).await?`",
    note = "if it is a transaction: the event log for its driver is a feature of `postrider`, such as `sqlite`"
)]
pub trait TransactionOf<Log: ?Sized>: Send {
    /// Lends the connection inside.
    ///
    /// # Contract
    /// The connection on which the caller's own statements run, as the type the log's `append_in` recovers. It touches
    /// no database and never begins, commits or ends anything.
    ///
    /// Held by `log::rollback_leaves_nothing`.
    fn lend(&mut self) -> Lent<'_>;

    /// Lends the connection for statements that have to run now: what was lent, unless that puts events aside until the
    /// commit.
    #[doc(hidden)]
    fn lend_connection(&mut self) -> Lent<'_> {
        self.lend()
    }
}

impl<L: ?Sized, T: TransactionOf<L> + ?Sized> TransactionOf<L> for &mut T {
    fn lend(&mut self) -> Lent<'_> {
        (**self).lend()
    }
    fn lend_connection(&mut self) -> Lent<'_> {
        (**self).lend_connection()
    }
}

/// The driver's connection inside a transaction, lent for one call.
///
/// A transaction type carries a lifetime; the connection in it is `'static`, so it can pass through an object-safe call
/// as an `Any` and be recovered by the log, whatever wraps that log.
pub struct Lent<'a> {
    connection: Connection<'a>,
    type_name: &'static str,
}

enum Connection<'a> {
    Exclusive(&'a mut (dyn Any + Send)),
    Shared(&'a (dyn Any + Send + Sync)),
    Collecting(&'a mut Vec<(Mailbox, NewRecord)>),
}

impl<'a> Lent<'a> {
    /// Lends a connection that is used through `&mut`.
    pub fn exclusive<C: Any + Send>(connection: &'a mut C) -> Self {
        Self {
            connection: Connection::Exclusive(connection),
            type_name: type_name::<C>(),
        }
    }

    /// Lends a connection that is used through `&`.
    pub fn shared<C: Any + Send + Sync>(connection: &'a C) -> Self {
        Self {
            connection: Connection::Shared(connection),
            type_name: type_name::<C>(),
        }
    }

    fn collecting(records: &'a mut Vec<(Mailbox, NewRecord)>) -> Self {
        Self {
            connection: Connection::Collecting(records),
            type_name: type_name::<LogTx>(),
        }
    }

    /// Puts the records aside for [`LogTx::commit`], if that is what was lent; else gives them back.
    pub(crate) fn collect(self, mailbox: &Mailbox, batch: Vec<NewRecord>) -> Option<(Self, Vec<NewRecord>)> {
        match self.connection {
            Connection::Collecting(records) => {
                records.extend(batch.into_iter().map(|record| (mailbox.clone(), record)));
                None
            }
            _ => Some((self, batch)),
        }
    }

    /// Whether a `C` was lent.
    #[must_use]
    pub fn is<C: Any>(&self) -> bool {
        match &self.connection {
            Connection::Exclusive(connection) => (**connection).is::<C>(),
            Connection::Shared(connection) => (**connection).is::<C>(),
            Connection::Collecting(_) => false,
        }
    }

    /// The connection, if a `C` was lent for exclusive use.
    ///
    /// # Errors
    /// [`ErrorKind::WrongTransaction`] that names the type expected and the one found.
    pub fn get_mut<C: Any>(self) -> Result<&'a mut C> {
        let found = self.type_name;
        match self.connection {
            Connection::Exclusive(connection) => connection.downcast_mut::<C>(),
            _ => None,
        }
        .ok_or_else(|| wrong::<C>(found))
    }

    /// The connection, if a `C` was lent.
    ///
    /// # Errors
    /// [`ErrorKind::WrongTransaction`] that names the type expected and the one found.
    pub fn get_ref<C: Any>(self) -> Result<&'a C> {
        let found = self.type_name;
        match self.connection {
            Connection::Exclusive(connection) => connection.downcast_ref::<C>(),
            Connection::Shared(connection) => connection.downcast_ref::<C>(),
            Connection::Collecting(_) => None,
        }
        .ok_or_else(|| wrong::<C>(found))
    }
}

fn wrong<C>(found: &'static str) -> Error {
    Error::new(
        ErrorKind::WrongTransaction,
        "the transaction belongs to another database than the event log",
    )
    .with("expected", type_name::<C>())
    .with("found", found)
}

impl Debug for Lent<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lent({})", self.type_name)
    }
}

/// A transaction that a log began.
#[async_trait]
pub trait LogTransaction: Debug + Send {
    /// Lends the connection inside.
    ///
    /// # Contract
    /// As [`TransactionOf::lend`]: of the type that this log's own `append_in` takes.
    ///
    /// Held by `log::rollback_leaves_nothing`.
    fn lend(&mut self) -> Lent<'_>;

    /// Commits.
    ///
    /// # Contract
    /// Durable when it returns `Ok`. It is an error if the database answered with a rollback, as it does after an error
    /// in the transaction that somebody swallowed. Dropping it uncommitted rolls back.
    ///
    /// Held by `log::rollback_leaves_nothing`.
    async fn commit(self: Box<Self>) -> Result<()>;

    /// Commits just behind an append that went well: so no statement of the transaction has failed, and a log that would
    /// have to ask its database for that need not.
    ///
    /// # Contract
    /// As [`commit`](LogTransaction::commit).
    ///
    /// Held by `log::rollback_leaves_nothing`.
    #[allow(clippy::must_use_candidate)] // it is a future, which has to be used
    async fn commit_appended(self: Box<Self>) -> Result<()> {
        self.commit().await
    }

    /// Rolls back.
    ///
    /// # Contract
    /// Nothing written in it remains, events included.
    ///
    /// Held by `log::rollback_leaves_nothing`.
    async fn rollback(self: Box<Self>) -> Result<()>;

    /// Sets, releases or goes back to the savepoint.
    ///
    /// # Contract
    /// There is one at a time. Going back undoes what was written since it was set, also where a statement has failed
    /// since, and the transaction goes on; setting it again is allowed after a release or a return.
    ///
    /// Held by `log::a_savepoint_undoes_a_part`.
    async fn savepoint(&mut self, step: Savepoint) -> Result<()>;
}

/// What to do with a [savepoint](LogTransaction::savepoint).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[allow(clippy::exhaustive_enums)]
pub enum Savepoint {
    /// Remember how it is now.
    Set,
    /// Keep what was written since.
    Release,
    /// Undo what was written since.
    Return,
}

/// The part of a log that writes events in transactions: optional, attached to [`EventLog`](super::EventLog).
#[async_trait]
pub trait TransactionalLog: Debug + Send + Sync + 'static {
    /// Begins a transaction on the log's database.
    ///
    /// # Contract
    /// A transaction that can write: it does not fail later because it began as a reader.
    ///
    /// Held by `log::rollback_leaves_nothing`, `log::an_append_after_a_cancelled_begin_is_durable`.
    async fn begin(&self) -> Result<Box<dyn LogTransaction>>;

    /// Appends records in the caller's transaction.
    ///
    /// # Contract
    /// The records appear with that transaction's commit, or never; the order of [`append`](super::EventLogStore::append)
    /// applies. The connection must be in a transaction, which is checked at run time. Cancelled, the transaction may
    /// hold part of the batch and is to be rolled back.
    ///
    /// Held by `log::rollback_leaves_nothing`.
    ///
    /// # Errors
    /// [`ErrorKind::WrongTransaction`] if the connection is of another driver, or in no transaction.
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<S: TransactionalLog + ?Sized> TransactionalLog for $pointer<S> {
            async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
                (**self).begin().await
            }
            async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
                (**self).append_in(tx, mailbox, batch).await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

/// A transaction begun by [`Bus::begin`](crate::Bus::begin), on whatever log is configured.
///
/// Events published in it are collected, and written as the last statement before the commit: one round trip, with the
/// locks on the caller's rows already held. Its commit wakes the relay. Dropping it rolls back.
#[must_use = "dropping it rolls back"]
pub struct LogTx {
    pub(crate) inner: Box<dyn LogTransaction>,
    pub(crate) log: Arc<dyn TransactionalLog>,
    pub(crate) collected: Vec<(Mailbox, NewRecord)>,
    pub(crate) wake: Arc<dyn Fn(&Mailbox) + Send + Sync>,
}

impl LogTx {
    /// The driver's connection, to write your own rows with: `let db: &mut SqliteConnection = tx.connection()?;`
    ///
    /// # Errors
    /// [`ErrorKind::WrongTransaction`] if the log's database uses another type of connection.
    pub fn connection<C: Any>(&mut self) -> Result<&mut C> {
        self.inner.lend().get_mut()
    }

    /// Writes the events collected and commits.
    ///
    /// # Errors
    /// Of the write or the commit. After [`ErrorKind::Unavailable`] from the commit itself it may have happened.
    pub async fn commit(mut self) -> Result<()> {
        let mut mailboxes: Vec<Mailbox> = Vec::new();
        for (mailbox, _) in &self.collected {
            if !mailboxes.contains(mailbox) {
                mailboxes.push(mailbox.clone());
            }
        }
        let mut collected = std::mem::take(&mut self.collected);
        for mailbox in &mailboxes {
            let of_it = collected.extract_if(.., |(m, _)| m == mailbox);
            let batch: Vec<_> = of_it.map(|(_, record)| record).collect();
            self.log.append_in(self.inner.lend(), mailbox, &batch).await?;
        }
        if mailboxes.is_empty() {
            self.inner.commit().await?;
        } else {
            self.inner.commit_appended().await?;
        }
        mailboxes.iter().for_each(|mailbox| (self.wake)(mailbox));
        Ok(())
    }

    /// As [`InboxLog::admit`](super::InboxLog::admit), in this transaction.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the log has no inbox; otherwise of the database.
    pub async fn admit(
        &mut self,
        log: &super::EventLog,
        group: &crate::GroupName,
        arrivals: &[super::Arrival],
    ) -> Result<Vec<super::Admission>> {
        log.inbox()?.admit(self.inner.lend(), group, arrivals).await
    }

    /// Sets the savepoint; what it gives goes back to [`LogTx::return_to`].
    pub(crate) async fn set_savepoint(&mut self) -> Result<usize> {
        self.inner.savepoint(Savepoint::Set).await?;
        Ok(self.collected.len())
    }

    pub(crate) async fn release_savepoint(&mut self) -> Result<()> {
        self.inner.savepoint(Savepoint::Release).await
    }

    /// Undoes what was written since, events included.
    pub(crate) async fn return_to(&mut self, savepoint: usize) -> Result<()> {
        self.collected.truncate(savepoint);
        self.inner.savepoint(Savepoint::Return).await
    }

    /// Rolls back, events included.
    ///
    /// # Errors
    /// Of the database; the transaction is gone all the same.
    pub async fn rollback(self) -> Result<()> {
        self.inner.rollback().await
    }
}

impl Debug for LogTx {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("LogTx")
            .field("transaction", &self.inner)
            .field("events", &self.collected.len())
            .finish()
    }
}

/// Stands for whatever log a [`LogTx`] was begun on.
#[derive(Debug)]
pub enum AnyLog {}

impl TransactionOf<AnyLog> for LogTx {
    fn lend(&mut self) -> Lent<'_> {
        Lent::collecting(&mut self.collected)
    }
    fn lend_connection(&mut self) -> Lent<'_> {
        self.inner.lend()
    }
}

impl TransactionOf<AnyLog> for Box<dyn LogTransaction> {
    fn lend(&mut self) -> Lent<'_> {
        (**self).lend()
    }
}

const _: fn(&dyn LogTransaction, &dyn TransactionalLog) = |_, _| {};
