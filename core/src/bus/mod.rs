//! The bus: an event log, a transport, the relay between them, and the subscriptions.

mod accepting;
mod builder;
mod handling;
mod lifecycle;
mod publish;
mod tasks;

pub use builder::BusBuilder;
pub use publish::{EventBus, Publish};
pub use tasks::TaskContext;

use crate::{
    AnyEvent, Error, ErrorKind, Event, EventLog, GroupName, IntoMessage, Limits, Mailbox, Message, MessageId, Result,
    Transport,
    clock::{Clock, Timestamp},
    consumer::{Empty, Layer, NoState, Subscribing, SubscriptionOptions},
    health::{Board, Health, Part, PartHealth, PartState},
    log::{DeadLetters, Filter, Lent, LogTx, NewRecord, TransactionOf},
    message::Text,
    publisher::PublisherExt as _,
    relay::{RelayOptions, RelayReport, Reporter, Wake},
};
use accepting::Accepting;
use async_trait::async_trait;
use lifecycle::Lifecycle;
use std::{
    collections::{HashMap, HashSet},
    fmt,
    sync::{Arc, Mutex, PoisonError},
    time::Duration,
};

/// The bus. Clones are handles on the same bus.
///
/// The relay runs from [`start`](Bus::start) on; publishing needs only the log. A process that only
/// publishes says so ([`without_relay`](BusBuilder::without_relay)), or a bus that was never started is told of in the log file.
#[derive(Debug, Clone)]
pub struct Bus(Arc<Inner>);

struct Inner {
    log: Option<EventLog>,
    transport: Transport,
    clock: Arc<dyn Clock>,
    limits: Limits,
    source: Text,
    relay: Arc<RelayOptions>,
    seed: Option<u64>,
    wake: Arc<Wake>,
    reporter: Arc<Reporter>,
    board: Board,
    /// The groups that have a live subscription on this bus.
    groups: Arc<Mutex<HashSet<GroupName>>>,
    built_at: Timestamp,
    lifecycle: Lifecycle,
    accepting: Accepting,
    /// Relays published events in this process. Default: true.
    relays: bool,
    layers: Vec<Layer<AnyEvent>>,
    subscriptions: HashMap<String, SubscriptionOptions>,
}

impl fmt::Debug for Inner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Bus")
            .field("source", &self.source)
            .field("log", &self.log)
            .field("transport", &self.transport)
            .finish_non_exhaustive()
    }
}

impl Bus {
    /// Describes a bus.
    pub fn builder() -> BusBuilder {
        BusBuilder::default()
    }

    /// Publishes an event through the log, in a transaction of its own. Await what it returns.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the event cannot be encoded or is over the [limits](Limits); [`ErrorKind::Unsupported`]
    /// without a log; [`ErrorKind::Closed`] after the [shutdown](Bus::shutdown); otherwise of the log. Whether it happened is
    /// unknown only if the log's connection was lost in the middle of the commit.
    pub fn publish<'a>(&'a self, event: impl IntoMessage) -> Publish<'a> {
        Publish::new(self, None, event)
    }

    /// Publishes an event in your transaction: it goes out if that commits, and never if it does not.
    ///
    /// # Errors
    /// As [`publish`](Bus::publish), and [`ErrorKind::WrongTransaction`] if the transaction is of another database than
    /// the log, or the connection is in none.
    pub fn publish_in<'a, L: ?Sized, T: TransactionOf<L> + ?Sized>(
        &'a self,
        tx: &'a mut T,
        event: impl IntoMessage,
    ) -> Publish<'a> {
        Publish::new(self, Some(tx.lend()), event)
    }

    /// Publishes an event after a delay, counted by the log's clock: `publish(event).after(delay)`.
    pub fn publish_after<'a>(&'a self, event: impl IntoMessage, delay: Duration) -> Publish<'a> {
        self.publish(event).after(delay)
    }

    /// Publishes an event at a time on the wall: `publish(event).at(time)`. At once if that has passed.
    pub fn publish_at<'a>(&'a self, event: impl IntoMessage, time: Timestamp) -> Publish<'a> {
        self.publish(event).at(time, &*self.0.clock)
    }

    /// Publishes several events, of one type or of several as `&dyn DynEvent`, all or none, in a transaction of its own.
    ///
    /// # Errors
    /// As [`publish`](Bus::publish); nothing is published then.
    pub async fn publish_all<M: IntoMessage>(
        &self,
        events: impl IntoIterator<Item = M> + Send,
    ) -> Result<Vec<MessageId>> {
        let (ids, batch) = publish::records(events)?;
        self.publish_records(batch).await?;
        Ok(ids)
    }

    /// Publishes several events in your transaction.
    ///
    /// # Errors
    /// As [`publish_in`](Bus::publish_in).
    pub async fn publish_all_in<L: ?Sized, T: TransactionOf<L> + ?Sized, M: IntoMessage>(
        &self,
        tx: &mut T,
        events: impl IntoIterator<Item = M> + Send,
    ) -> Result<Vec<MessageId>> {
        let (ids, batch) = publish::records(events)?;
        self.publish_records_in(tx.lend(), batch).await?;
        Ok(ids)
    }

    /// Sends an event to the broker at once, without the log: it is lost if the broker does not take it now, and sent
    /// though your transaction may roll back.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] if the broker will never take it, else [`ErrorKind::Unavailable`].
    pub async fn publish_direct(&self, event: impl IntoMessage) -> Result<MessageId> {
        let message = event.into_message()?;
        let id = message.id();
        self.send_messages(vec![message]).await?;
        Ok(id)
    }

    /// Makes the log's tables, or brings them to this program's version; nothing where they are, or where the log has none.
    /// Safe on several nodes at once. Call it before [`start`](Bus::start), as a role that may create tables.
    ///
    /// # Errors
    /// Of the log; [`ErrorKind::Config`] says what to do if the right to create tables is lacking.
    pub async fn migrate(&self) -> Result<()> {
        match self.need_log()?.schema() {
            Some(schema) => schema.migrate().await,
            None => Ok(()),
        }
    }

    /// Begins a transaction on the log's database, whatever it is: its connection is for your own rows, events published
    /// in it are written just before its commit, and its commit wakes the relay.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if the log has no transactions; otherwise of the database.
    pub async fn begin(&self) -> Result<LogTx> {
        let log = self.need_log()?;
        if !log.capabilities().concurrent_writers {
            self.not_beside_a_transaction("begin")?;
        }
        let log = log.transactions()?;
        let bus = Arc::downgrade(&self.0);
        let wake = move |_: &Mailbox| {
            if let Some(inner) = bus.upgrade() {
                inner.wake.committed();
            }
        };
        Ok(LogTx {
            inner: log.begin().await?,
            log: log.clone(),
            collected: Vec::new(),
            wake: Arc::new(wake),
        })
    }

    /// Describes a subscription of `group` to events of type `E`.
    pub fn subscribe<E: Event>(&self, group: impl Into<String>) -> Subscribing<E, NoState, Empty> {
        Subscribing::new(self.clone(), group)
    }

    /// Declares the queue of `group` for events of type `E`, and consumes nothing: what is published from then on waits for the
    /// group's first member. For a deploy that publishes before its consumers are there: on brokers that route, such as RabbitMQ, an
    /// event that no group wants yet waits in the outbox, and its topic counts as paused.
    ///
    /// For a group of several types call it for each. The order of keys is asked for where `E` has a key, or as the configuration
    /// of [`subscription`](BusBuilder::subscription) says: it has to be what the group will ask for itself, which for a group that
    /// handles types with and without keys is order.
    ///
    /// # Errors
    /// [`ErrorKind::Invalid`] for a group that is no name; [`ErrorKind::Unsupported`] if the transport cannot give what is asked
    /// for; otherwise of the broker.
    pub async fn declare<E: Event>(&self, group: impl Into<String>) -> Result<()> {
        let group = GroupName::parse(group.into())?;
        let options = self.subscription_options(&group).cloned().unwrap_or_default();
        let subscription = options.describe(group, vec![E::TOPIC], E::KEYED)?;
        self.0.transport.subscriber(&subscription)?.declare(&subscription).await
    }

    /// The dead letters of a mailbox: `Mailbox::outbox()`, or `Mailbox::Inbox(group)`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] without a log, or if it has no administration.
    pub fn dead_letters(&self, mailbox: Mailbox) -> Result<DeadLetters> {
        let admin = self.need_log()?.admin()?.clone();
        Ok(DeadLetters::new(admin, self.0.clock.clone(), Filter::of(mailbox)))
    }

    /// The bus as an object, for application code that is not to know which bus it has.
    #[must_use]
    pub fn as_dyn(&self) -> Arc<dyn EventBus> {
        Arc::new(self.clone())
    }

    /// The event log, if there is one: its administration, say.
    #[must_use]
    pub fn log(&self) -> Option<&EventLog> {
        self.0.log.as_ref()
    }

    /// The transport.
    #[must_use]
    pub fn transport(&self) -> &Transport {
        &self.0.transport
    }

    /// How the relay is doing.
    #[must_use]
    pub fn relay_report(&self) -> RelayReport {
        self.0.reporter.report()
    }

    /// The health of the whole bus: whether it is live and ready, and the state of each part with its last error.
    ///
    /// ```
    /// # use postrider_core::{Bus, memory::{MemoryLog, MemoryTransport}};
    /// # tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap().block_on(async {
    /// let bus = Bus::builder().log(MemoryLog::new()).transport(MemoryTransport::new()).build()?;
    /// bus.start().await?;
    /// let health = bus.health();
    /// assert!(health.live && health.ready);
    /// for part in &health.parts {
    ///     println!("{}: {:?} since {}", part.part, part.state, part.since);
    /// }
    /// # Ok::<(), postrider_core::Error>(()) }).unwrap();
    /// ```
    #[must_use]
    pub fn health(&self) -> Health {
        let parts = self.0.board.parts(self.0.log.is_some(), self.0.built_at);
        let log_answers = |health: &PartHealth| health.part != Part::Log || health.state == PartState::Running;
        Health {
            live: parts.iter().all(|health| health.state != PartState::Failed),
            ready: self.is_started() && parts.iter().all(log_answers),
            parts,
        }
    }

    pub(crate) fn board(&self) -> &Board {
        &self.0.board
    }

    /// Notes that a group has a live subscription on this bus, for as long as what it gives is kept; `None` if it has one
    /// already.
    pub(crate) fn enter_group(&self, group: &GroupName) -> Option<InGroup> {
        let groups = self.0.groups.clone();
        let is_new = groups
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .insert(group.clone());
        is_new.then(|| InGroup {
            groups,
            group: group.clone(),
        })
    }

    pub(crate) fn layers(&self) -> &[Layer<AnyEvent>] {
        &self.0.layers
    }

    pub(crate) fn subscription_options(&self, group: &GroupName) -> Option<&SubscriptionOptions> {
        self.0.subscriptions.get(group.as_str())
    }

    pub(crate) fn relay_options(&self) -> &RelayOptions {
        &self.0.relay
    }

    pub(crate) fn clock(&self) -> &Arc<dyn Clock> {
        &self.0.clock
    }

    fn need_log(&self) -> Result<&EventLog> {
        self.0.log.as_ref().ok_or_else(|| {
            let text = "this bus has no event log: build it with `.log(…)`, or go round the log with `publish_direct`";
            Error::new(ErrorKind::Unsupported, text)
        })
    }

    /// Completes a message and checks it.
    fn complete(&self, mut message: Message) -> Result<Message> {
        if message.source().is_none() {
            message = message.with_source(self.0.source.clone());
        }
        if message.time().is_none() {
            message = message.with_time(self.0.clock.now());
        }
        self.0.limits.check(&message)?;
        Ok(message)
    }

    fn complete_all(&self, batch: Vec<NewRecord>) -> Result<Vec<NewRecord>> {
        let can = self.need_log()?.capabilities();
        batch
            .into_iter()
            .map(|mut record| {
                record.message = self.complete(record.message)?;
                if record.message.key().is_some() && !can.order_by_key {
                    return Err(self
                        .need_log()?
                        .lacks("the order of keys, which a message with a key asks for"));
                }
                if record.placement != crate::log::Placement::Due && !can.scheduling {
                    return Err(self.need_log()?.lacks("delayed publishing"));
                }
                Ok(record)
            })
            .collect()
    }
}

/// A group has a live subscription on a bus.
#[derive(Debug)]
pub(crate) struct InGroup {
    groups: Arc<Mutex<HashSet<GroupName>>>,
    group: GroupName,
}

impl Drop for InGroup {
    fn drop(&mut self) {
        let mut groups = self.groups.lock().unwrap_or_else(PoisonError::into_inner);
        groups.remove(&self.group);
    }
}

#[async_trait]
impl EventBus for Bus {
    async fn publish_records(&self, batch: Vec<NewRecord>) -> Result<()> {
        self.check_open()?;
        self.not_beside_a_transaction("publish")?;
        let batch = self.complete_all(batch)?;
        self.need_log()?.store().append(&Mailbox::outbox(), &batch).await?;
        self.0.wake.committed();
        self.watch_for_start();
        Ok(())
    }

    async fn publish_records_in(&self, tx: Lent<'_>, batch: Vec<NewRecord>) -> Result<()> {
        self.check_open()?;
        let batch = self.complete_all(batch)?;
        self.watch_for_start();
        let Some((tx, batch)) = tx.collect(&Mailbox::outbox(), batch) else {
            return Ok(());
        };
        self.need_log()?
            .transactions()?
            .append_in(tx, &Mailbox::outbox(), &batch)
            .await?;
        self.0.wake.commit_to_come();
        Ok(())
    }

    async fn send_messages(&self, batch: Vec<Message>) -> Result<()> {
        self.check_open()?;
        let batch: Vec<Message> = batch.into_iter().map(|m| self.complete(m)).collect::<Result<_>>()?;
        let outcomes = self.0.transport.publisher()?.publish_all(&batch).await;
        match batch
            .iter()
            .zip(outcomes)
            .find_map(|(message, outcome)| Some((message, outcome.err()?)))
        {
            None => Ok(()),
            Some((message, error)) => {
                let kind = match error.kind() {
                    crate::PublishErrorKind::Invalid => ErrorKind::Invalid,
                    _ => ErrorKind::Unavailable,
                };
                Err(Error::new(kind, "the event was not published")
                    .with("topic", message.topic())
                    .with("message", message.id())
                    .because(error))
            }
        }
    }
}
