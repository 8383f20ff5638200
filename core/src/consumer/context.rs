use super::{HandlerError, HandlerErrorKind, error::is_outage};
use crate::{
    AttributeValue, Error, ErrorKind, EventBus, EventLog, GroupName, IntoMessage, Message, MessageId, Result,
    clock::Clock,
    log::{Lease, LogTx},
};
use std::{
    any::{Any, TypeId},
    collections::HashMap,
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// What the handlings of a subscription share.
#[derive(Debug)]
pub(super) struct Tools {
    pub(super) group: GroupName,
    pub(super) bus: crate::Bus,
    pub(super) log: Option<EventLog>,
    pub(super) clock: Arc<dyn Clock>,
    /// The order of keys counts.
    pub(super) ordered: bool,
}

/// What publishes in the name of a message: middleware (0), a step forwards or its compensation, in a round if that matters.
/// A part of derived ids, so never to be changed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Author {
    slot: u32,
    round: u32,
}

impl Author {
    /// A step: what it publishes when it is run again is the same.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn step(at: usize, round: u64) -> Self {
        let (slot, round) = (1 + 2 * at as u32, round as u32);
        Self { slot, round }
    }
    /// Its compensation: what that publishes is another event each round.
    #[allow(clippy::cast_possible_truncation)]
    pub(super) fn compensation(at: usize, round: u64) -> Self {
        let (slot, round) = (2 + 2 * at as u32, round as u32);
        Self { slot, round }
    }

    fn id(self, handled: MessageId, group: &GroupName, n: u32) -> MessageId {
        let mut id = handled;
        for part in [self.slot, self.round].into_iter().filter(|part| *part > 0) {
            id = MessageId::derived(id, group, part);
        }
        MessageId::derived(id, group, n)
    }
}

/// Why no transaction is lent.
#[derive(Debug, Clone, Copy)]
pub(super) enum NoTransaction {
    NotAskedFor,
    IsOver,
    BatchHandler,
}

impl NoTransaction {
    fn text(self) -> &'static str {
        match self {
            Self::NotAskedFor => "add the `Transactional` middleware to this subscription",
            Self::IsOver => {
                "it has been rolled back, and with it what the steps wrote in it. Compensations run after that, for effects \
                 outside of it; for writes of their own, begin one with `ctx.bus().begin()`"
            }
            Self::BatchHandler => "batch handlers are not run in one; begin one with `ctx.bus().begin()`",
        }
    }
}

/// What a handler knows beside the event.
pub struct Context {
    message: Message,
    tools: Arc<Tools>,
    attempt: u32,
    /// The beginnings of the chain, where it counts them itself.
    pub(super) beginnings: Option<u64>,
    /// The rounds of this attempt's barriers, by step.
    pub(super) rounds: HashMap<String, u64>,
    /// What publishes just now: its events have ids of their own.
    author: Author,
    /// How many it has published.
    published: u32,
    /// Never locked, only reached through `&mut`: so that a context can be shared by reference, which a transaction cannot.
    tx: Mutex<Option<LogTx>>,
    has_tx: bool,
    /// Why there is none, where there is none.
    pub(super) no_transaction: NoTransaction,
    /// The transaction is the batch's, which has admitted this message and commits.
    pub(super) is_in_batch: bool,
    /// A run in the batch's transaction has failed, whatever became of its error: all of it is to be rolled back.
    pub(super) has_failed_in_batch: bool,
    /// The version of a durable chain's note that says that a step has begun which this process has rolled back.
    pub(super) rolled_back: Option<u64>,
    /// The log was away when this attempt asked something of it, whatever the handler has made of that error.
    log_was_away: Option<String>,
    /// It was parked in the inbox, and comes from there.
    pub(super) was_parked: bool,
    /// The inbox knew it, and whether it waits there: its handlers were not called.
    pub(super) was_dropped: Option<bool>,
    /// What the inbox's relay holds it by.
    pub(super) lease: Option<Lease>,
    /// The steps that have run and would have to be taken back, in order.
    pub(super) ran: Vec<usize>,
    values: HashMap<TypeId, Box<dyn Any + Send + Sync>>,
}

impl Context {
    pub(super) fn new(message: Message, tools: Arc<Tools>) -> Self {
        Self {
            message,
            tools,
            attempt: 0,
            beginnings: None,
            rounds: HashMap::new(),
            author: Author::default(),
            published: 0,
            tx: Mutex::new(None),
            has_tx: false,
            no_transaction: NoTransaction::NotAskedFor,
            is_in_batch: false,
            has_failed_in_batch: false,
            rolled_back: None,
            log_was_away: None,
            was_parked: false,
            was_dropped: None,
            lease: None,
            ran: Vec::new(),
            values: HashMap::new(),
        }
    }

    pub(super) fn begin_attempt(&mut self, attempt: u32) {
        self.attempt = attempt;
        self.beginnings = None;
        self.rounds.clear();
        self.publishes_as(Author::default());
        self.ran.clear();
        self.is_in_batch = false;
        self.has_failed_in_batch = false;
        self.log_was_away = None;
        self.no_transaction = NoTransaction::NotAskedFor;
    }

    /// The error of an attempt: that of the log where the log was away, though a handler may have made a text of it.
    pub(super) fn judged(&mut self, error: HandlerError) -> HandlerError {
        match self.log_was_away.take() {
            Some(why) if error.kind() == HandlerErrorKind::Transient => {
                let away = Error::new(ErrorKind::Unavailable, "the event log was away during the attempt");
                HandlerError::unavailable(away.because(why))
            }
            _ => error,
        }
    }

    /// What is published from now on is published by `author`, and has the ids it had when that published before.
    pub(super) fn publishes_as(&mut self, author: Author) {
        self.author = author;
        self.published = 0;
    }

    pub(super) fn tools(&self) -> &Arc<Tools> {
        &self.tools
    }

    /// The message the event came in: its id, headers, time.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.message
    }
    /// The group that handles it.
    #[must_use]
    pub fn group(&self) -> &GroupName {
        &self.tools.group
    }
    /// Which attempt this is, from 1. Those before a message was parked in the inbox, or waited with the broker, are counted;
    /// those before a crash, or before it went to another member without waiting, are not.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }
    /// The bus it came over, for what has no shortcut here. What is published there is not part of the transaction.
    #[must_use]
    pub fn bus(&self) -> &crate::Bus {
        &self.tools.bus
    }

    /// The connection of the transaction lent by the [`Transactional`](super::Transactional) middleware:
    /// `let db: &mut PgConnection = ctx.tx()?;`. What is written with it is committed together with the receipt of the
    /// message and what [`publish`](Context::publish) publishes, or not at all.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without that middleware, and in compensations, which run after the rollback;
    /// [`ErrorKind::WrongTransaction`] if the log's database uses another type of connection.
    pub fn tx<C: Any>(&mut self) -> Result<&mut C> {
        self.transaction()?.connection()
    }

    /// The transaction itself.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if there is none.
    pub fn transaction(&mut self) -> Result<&mut LogTx> {
        let why = self.no_transaction;
        self.lent().as_mut().ok_or_else(|| {
            Error::new(
                ErrorKind::Unsupported,
                format!("there is no transaction: {}", why.text()),
            )
        })
    }

    /// Whether a transaction is lent.
    #[must_use]
    pub fn has_transaction(&self) -> bool {
        self.has_tx
    }

    pub(super) fn lent(&mut self) -> &mut Option<LogTx> {
        self.tx.get_mut().unwrap_or_else(PoisonError::into_inner)
    }

    /// Lends a transaction to what comes behind, for middleware that begins one. Take it back with
    /// [`take_transaction`](Context::take_transaction); one that is left is rolled back.
    pub fn lend(&mut self, tx: LogTx) {
        *self.lent() = Some(tx);
        self.has_tx = true;
    }

    /// Takes back the transaction that was lent.
    pub fn take_transaction(&mut self) -> Option<LogTx> {
        self.has_tx = false;
        self.lent().take()
    }

    /// Publishes an event through the log: in the transaction that is lent, else in one of its own.
    ///
    /// Its id follows from the message's, the group, the step and how many that has published before it: a second attempt
    /// publishes the same event under the same id, so a receiver with an inbox drops the repeat. What a compensation
    /// publishes is another event each time. Its attribute `correlationid` is that
    /// of the message handled, or that message's CloudEvents id; its `causationid` is that id. Attributes it has already stay.
    ///
    /// # Errors
    /// As [`Bus::publish`](crate::Bus::publish).
    pub async fn publish(&mut self, event: impl IntoMessage) -> Result<MessageId> {
        self.publish_after(event, Duration::ZERO).await
    }

    /// The same after a delay, counted by the log's clock.
    ///
    /// # Errors
    /// As [`publish`](Context::publish).
    pub async fn publish_after(&mut self, event: impl IntoMessage, delay: Duration) -> Result<MessageId> {
        let n = self.published;
        self.published = n.checked_add(1).ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                "a handler published more events than can be counted",
            )
        })?;
        let handled = self.message.id();
        let mut message = event.into_message()?;
        let cause = || AttributeValue::from(&*self.message.event_id());
        if message.attribute(CORRELATION).is_none() {
            let correlation = self.message.attribute(CORRELATION).cloned();
            message = message.with_attribute(CORRELATION, correlation.unwrap_or_else(cause));
        }
        if message.attribute(CAUSATION).is_none() {
            message = message.with_attribute(CAUSATION, cause());
        }
        let message = message.with_id(self.author.id(handled, &self.tools.group, n));
        let bus: &dyn EventBus = &self.tools.bus;
        let published = match self.tx.get_mut().unwrap_or_else(PoisonError::into_inner) {
            Some(tx) => bus.publish_in(tx, message).after(delay).await,
            None => bus.publish(message).after(delay).await,
        };
        if let Err(error) = &published
            && is_outage(error)
        {
            self.log_was_away = Some(error.to_chain());
        }
        published
    }

    /// Keeps a value for what comes behind: middleware hands the tenant, the user, a span to handlers by it. One of each
    /// type; it lasts until the message is done with.
    pub fn insert<T: Send + Sync + 'static>(&mut self, value: T) {
        self.values.insert(TypeId::of::<T>(), Box::new(value));
    }

    /// The value of this type that was kept.
    #[must_use]
    pub fn get<T: Send + Sync + 'static>(&self) -> Option<&T> {
        self.values.get(&TypeId::of::<T>())?.downcast_ref()
    }

    /// Rolls back what is still open after `error`. Gives that error, or the database's if that turns out to be away: then
    /// nothing can be said of the message, whatever a driver made of it in the middle of a statement.
    pub(super) async fn rolled_back_after(&mut self, error: HandlerError) -> HandlerError {
        match self.roll_back().await {
            Err(away) if is_outage(&away) => HandlerError::unavailable(away),
            _ => error,
        }
    }

    /// Rolls back what is still open.
    pub(super) async fn roll_back(&mut self) -> Result<()> {
        let Some(tx) = self.take_transaction() else {
            return Ok(());
        };
        self.no_transaction = NoTransaction::IsOver;
        let rolled_back = tx.rollback().await;
        if let Err(error) = &rolled_back {
            tracing::debug!(message = %self.message.id(), error = error.to_chain(), "the rollback failed: the transaction is gone all the same");
        }
        rolled_back
    }

    /// Sets a savepoint in the transaction that is lent, if there is one.
    pub(super) async fn set_savepoint(&mut self) -> Result<Option<usize>, HandlerError> {
        match self.lent() {
            Some(tx) => Ok(Some(tx.set_savepoint().await?)),
            None => Ok(None),
        }
    }

    pub(super) async fn release(&mut self, savepoint: Option<usize>) -> Result<(), HandlerError> {
        match (self.lent(), savepoint) {
            (Some(tx), Some(_)) => Ok(tx.release_savepoint().await?),
            _ => Ok(()),
        }
    }

    pub(super) async fn return_to(&mut self, savepoint: Option<usize>) -> Result<(), HandlerError> {
        match (self.lent(), savepoint) {
            (Some(tx), Some(savepoint)) => Ok(tx.return_to(savepoint).await?),
            _ => Ok(()),
        }
    }
}

const CORRELATION: &str = "correlationid";
const CAUSATION: &str = "causationid";

impl fmt::Debug for Context {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Context")
            .field("message", &self.message)
            .field("group", &self.tools.group)
            .field("attempt", &self.attempt)
            .field("transaction", &self.has_tx)
            .finish_non_exhaustive()
    }
}
