//! A process that dies at a point: from then on nothing of it reaches the log or the broker.

use crate::{
    Deliveries, DeliveryTag, Disposition, Error, ErrorKind, EventLog, Feed, GroupName, Incoming, Mailbox, Message,
    MessageId, PublishError, Publisher, Reachability, Result, Settler, Subscriber, Subscription, Topic, Transport,
    log::{
        Admission, Arrival, Claim, Claimed, EventLogStore, GroupMember, InboxLog, Lent, LogTransaction, NewRecord,
        Note, Purge, RegisteredMember, Savepoint, Session, SessionOptions, SettleReport, Settled, TransactionalLog,
    },
    publisher::{Outcomes, PublisherExt as _},
};
use async_trait::async_trait;
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// Where a process can be made to die.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum CrashPoint {
    /// A transaction has done its work and is about to be committed.
    BeforeCommit,
    /// It has been committed, and nobody has been told.
    AfterCommit,
    /// A message is about to be parked in an inbox, or to become a dead letter there.
    BeforePark,
    /// It has been, and the broker has not been told.
    AfterPark,
    /// Messages are about to be acknowledged.
    BeforeAck,
    /// They have been.
    AfterAck,
    /// The relay is about to publish.
    BeforePublish,
    /// The broker has what was published, and the log has not been told.
    AfterPublish,
}

/// The life of one process.
#[derive(Debug, Default)]
pub(super) struct Life {
    is_dead: AtomicBool,
    dies_at: Mutex<Option<CrashPoint>>,
}

impl Life {
    pub(super) fn dies_at(&self, point: CrashPoint) {
        *self.dies_at.lock().unwrap_or_else(PoisonError::into_inner) = Some(point);
    }

    pub(super) fn is_over(&self) -> bool {
        self.is_dead.load(Ordering::SeqCst)
    }

    /// Whether it goes on beyond this point.
    fn passes(&self, point: CrashPoint) -> Result<()> {
        let mut dies_at = self.dies_at.lock().unwrap_or_else(PoisonError::into_inner);
        if *dies_at == Some(point) {
            *dies_at = None;
            self.is_dead.store(true, Ordering::SeqCst);
        }
        drop(dies_at);
        self.goes_on()
    }

    fn goes_on(&self) -> Result<()> {
        if self.is_over() {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "the process has died, as the test asked for",
            ));
        }
        Ok(())
    }
}

/// A log and a transport as a process with this life reaches them.
pub(super) fn reached_by(life: &Arc<Life>, log: EventLog, transport: Transport) -> Result<(EventLog, Transport)> {
    let (transactions, inbox) = (log.transactions()?.clone(), log.inbox()?.clone());
    let log = log
        .map_store(|inner| Mortal::new(inner, life))
        .with_transactions(Mortal::new(transactions, life))
        .with_inbox(Mortal::new(inbox, life));
    let transport = transport
        .map_publisher(|inner| Mortal::new(inner, life))
        .map_subscriber(|inner| Mortal::new(inner, life));
    Ok((log, transport))
}

/// Something that is out of reach once the life is over.
#[derive(Debug)]
struct Mortal<T> {
    inner: T,
    life: Arc<Life>,
}

impl<T> Mortal<T> {
    fn new(inner: T, life: &Arc<Life>) -> Self {
        let life = life.clone();
        Self { inner, life }
    }

    fn reach(&self) -> Result<&T> {
        self.life.goes_on().map(|()| &self.inner)
    }
}

#[async_trait]
impl EventLogStore for Mortal<Arc<dyn EventLogStore>> {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        let parks = matches!(mailbox, Mailbox::Inbox(_));
        if parks {
            self.life.passes(CrashPoint::BeforePark)?;
        }
        self.reach()?.append(mailbox, batch).await?;
        if parks {
            self.life.passes(CrashPoint::AfterPark)?;
        }
        Ok(())
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        let inner = self.reach()?.open(mailbox, options).await?;
        Ok(Box::new(Mortal::new(inner, &self.life)))
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.reach()?.purge(request).await
    }
}

#[async_trait]
impl Session for Mortal<Box<dyn Session>> {
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        self.reach()?.claim(request).await
    }
    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        self.reach()?.settle(batch).await
    }
    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        self.reach()?.resume(topic, max).await
    }
    async fn wait(&self, at_most: Duration) -> Result<()> {
        self.reach()?.wait(at_most).await
    }
    /// The dead hand nothing back: their lease runs out.
    async fn close(&self) -> Result<()> {
        match self.reach() {
            Ok(session) => session.close().await,
            Err(_) => Ok(()),
        }
    }
}

#[async_trait]
impl TransactionalLog for Mortal<Arc<dyn TransactionalLog>> {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        let inner = self.reach()?.begin().await?;
        Ok(Box::new(Mortal::new(inner, &self.life)))
    }
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.reach()?.append_in(tx, mailbox, batch).await
    }
}

#[async_trait]
impl LogTransaction for Mortal<Box<dyn LogTransaction>> {
    fn lend(&mut self) -> Lent<'_> {
        self.inner.lend()
    }
    async fn commit(self: Box<Self>) -> Result<()> {
        self.life.passes(CrashPoint::BeforeCommit)?;
        self.inner.commit().await?;
        self.life.passes(CrashPoint::AfterCommit)
    }
    async fn rollback(self: Box<Self>) -> Result<()> {
        self.inner.rollback().await
    }
    async fn savepoint(&mut self, step: Savepoint) -> Result<()> {
        self.life.goes_on()?;
        self.inner.savepoint(step).await
    }
}

#[async_trait]
impl InboxLog for Mortal<Arc<dyn InboxLog>> {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        self.reach()?.admit(tx, group, arrivals).await
    }
    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        self.reach()?.look(group, arrivals).await
    }
    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        self.reach()?.note(tx, group, id).await
    }
    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        self.reach()?.write_note(tx, group, id, expected, text).await
    }
    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        self.reach()?.register(group, member, retention).await
    }
    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        self.reach()?.members(group, retention).await
    }
}

#[async_trait]
impl Publisher for Mortal<Arc<dyn Publisher>> {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        if let Err(error) = self.life.passes(CrashPoint::BeforePublish) {
            return outcomes.report_rest(Err(PublishError::connection(error)));
        }
        let published = self.inner.publish_all(batch).await;
        match self.life.passes(CrashPoint::AfterPublish) {
            Ok(()) => outcomes.report_each(published),
            Err(error) => outcomes.report_rest(Err(PublishError::connection(error))),
        }
    }
    async fn check(&self) -> Reachability {
        match self.reach() {
            Ok(publisher) => publisher.check().await,
            Err(error) => Reachability::Down(PublishError::connection(error)),
        }
    }
}

#[async_trait]
impl Subscriber for Mortal<Arc<dyn Subscriber>> {
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        let feed = self.reach()?.subscribe(subscription).await?;
        let (deliveries, settler) = feed.into_parts();
        Ok(Feed::new(
            Mortal::new(deliveries, &self.life),
            Mortal::new(settler, &self.life),
        ))
    }
    async fn declare(&self, subscription: &Subscription) -> Result<()> {
        self.reach()?.declare(subscription).await
    }
}

#[async_trait]
impl Deliveries for Mortal<Box<dyn Deliveries>> {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        self.life.goes_on()?;
        self.inner.next(max).await
    }
}

#[async_trait]
impl Settler for Mortal<Arc<dyn Settler>> {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let dead = || batch.iter().map(|_| self.life.goes_on()).collect();
        if self.life.passes(CrashPoint::BeforeAck).is_err() {
            return dead();
        }
        let outcomes = self.inner.settle(batch).await;
        match self.life.passes(CrashPoint::AfterAck) {
            Ok(()) => outcomes,
            Err(_) => dead(),
        }
    }
    /// The dead do not say good-bye: what they had not settled comes again.
    async fn close(&self, deadline: Duration) -> Result<()> {
        match self.reach() {
            Ok(settler) => settler.close(deadline).await,
            Err(_) => Ok(()),
        }
    }
}
