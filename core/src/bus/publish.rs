use crate::{
    AttributeValue, IntoMessage, Message, MessageId, Result, Topic,
    clock::{Clock, SystemClock, Timestamp},
    log::{Lent, NewRecord, TransactionOf},
    message::Text,
};
use async_trait::async_trait;
use futures_util::future::BoxFuture;
use std::{fmt::Debug, sync::Arc, time::Duration};

/// The publishing side of a bus as an object: what application code holds as `Arc<dyn EventBus>`, so that a provider
/// with an outbox of its own, or a test double, replaces the whole bus.
///
/// The object has [`publish`](#method.publish), [`publish_in`](#method.publish_in) and the others that [`Bus`](crate::Bus)
/// has; implement the three below.
#[async_trait]
pub trait EventBus: Debug + Send + Sync + 'static {
    /// Publishes in a transaction of its own.
    ///
    /// # Contract
    /// All or none. Durable when it returns.
    ///
    /// Held by `core::a_double_replaces_the_bus`, `log::append_claim_settle_round_trip`.
    async fn publish_records(&self, batch: Vec<NewRecord>) -> Result<()>;

    /// Publishes in the caller's transaction.
    ///
    /// # Contract
    /// All with its commit, or none.
    ///
    /// Held by `core::a_double_replaces_the_bus`, `log::rollback_leaves_nothing`.
    async fn publish_records_in(&self, tx: Lent<'_>, batch: Vec<NewRecord>) -> Result<()>;

    /// Sends to the broker at once.
    ///
    /// # Contract
    /// `Ok` once the broker has confirmed all; after an error some may have been sent.
    ///
    /// Held by `core::a_double_replaces_the_bus`.
    async fn send_messages(&self, batch: Vec<Message>) -> Result<()>;
}

#[async_trait]
impl<B: EventBus + ?Sized> EventBus for Arc<B> {
    async fn publish_records(&self, batch: Vec<NewRecord>) -> Result<()> {
        (**self).publish_records(batch).await
    }
    async fn publish_records_in(&self, tx: Lent<'_>, batch: Vec<NewRecord>) -> Result<()> {
        (**self).publish_records_in(tx, batch).await
    }
    async fn send_messages(&self, batch: Vec<Message>) -> Result<()> {
        (**self).send_messages(batch).await
    }
}

// Inherent on the object: no extension trait to import.
impl dyn EventBus {
    /// As [`Bus::publish`](crate::Bus::publish).
    pub fn publish<'a>(&'a self, event: impl IntoMessage) -> Publish<'a> {
        Publish::new(self, None, event)
    }

    /// As [`Bus::publish_in`](crate::Bus::publish_in).
    pub fn publish_in<'a, L: ?Sized, T: TransactionOf<L> + ?Sized>(
        &'a self,
        tx: &'a mut T,
        event: impl IntoMessage,
    ) -> Publish<'a> {
        Publish::new(self, Some(tx.lend()), event)
    }

    /// As [`Bus::publish_after`](crate::Bus::publish_after).
    pub fn publish_after<'a>(&'a self, event: impl IntoMessage, delay: Duration) -> Publish<'a> {
        self.publish(event).after(delay)
    }

    /// As [`Bus::publish_at`](crate::Bus::publish_at), by the machine's clock.
    pub fn publish_at<'a>(&'a self, event: impl IntoMessage, time: Timestamp) -> Publish<'a> {
        self.publish(event).at(time, &SystemClock::new())
    }

    /// As [`Bus::publish_all`](crate::Bus::publish_all).
    ///
    /// # Errors
    /// As there.
    pub async fn publish_all<M: IntoMessage>(
        &self,
        events: impl IntoIterator<Item = M> + Send,
    ) -> Result<Vec<MessageId>> {
        let (ids, batch) = records(events)?;
        self.publish_records(batch).await?;
        Ok(ids)
    }

    /// As [`Bus::publish_direct`](crate::Bus::publish_direct).
    ///
    /// # Errors
    /// As there.
    pub async fn publish_direct(&self, event: impl IntoMessage) -> Result<MessageId> {
        let message = event.into_message()?;
        let id = message.id();
        self.send_messages(vec![message]).await?;
        Ok(id)
    }
}

pub(super) fn records<M: IntoMessage>(events: impl IntoIterator<Item = M>) -> Result<(Vec<MessageId>, Vec<NewRecord>)> {
    let records = events
        .into_iter()
        .map(|event| Ok(NewRecord::new(event.into_message()?)));
    let batch: Vec<NewRecord> = records.collect::<Result<_>>()?;
    Ok((batch.iter().map(|record| record.message.id()).collect(), batch))
}

/// An event on its way: options, then `.await`, which gives the message's id.
///
/// Not generic, so that a wrong transaction is one compile error.
#[must_use = "nothing is published until it is awaited"]
#[derive(Debug)]
pub struct Publish<'a> {
    bus: &'a dyn EventBus,
    tx: Option<Lent<'a>>,
    record: Result<NewRecord>,
}

impl<'a> Publish<'a> {
    pub(super) fn new(bus: &'a dyn EventBus, tx: Option<Lent<'a>>, event: impl IntoMessage) -> Self {
        Self {
            bus,
            tx,
            record: event.into_message().map(NewRecord::new),
        }
    }

    fn edit(mut self, change: impl FnOnce(Message) -> Message) -> Self {
        self.record = self.record.map(|mut record| {
            record.message = change(record.message);
            record
        });
        self
    }

    /// Adds a header.
    pub fn header(self, name: impl Into<String>, value: impl Into<String>) -> Self {
        self.edit(|message| message.with_header(name, value))
    }

    /// Sets an attribute of CloudEvents: an extension (`"tenantid"`), or `subject` or `dataschema`. Its name has only the letters
    /// a to z and digits. It goes to the broker as the transport's binding says, and is kept through log, inbox and dead
    /// letters.
    pub fn attribute(self, name: impl Into<Text>, value: impl Into<AttributeValue>) -> Self {
        self.edit(|message| message.with_attribute(name, value))
    }

    /// Sets the ordering key, in place of the event's own.
    pub fn key(self, key: impl Into<String>) -> Self {
        self.edit(|message| message.with_key(key))
    }

    /// Sets the message id. A receiver with an inbox drops the second message of one id.
    pub fn id(self, id: MessageId) -> Self {
        self.edit(|message| message.with_id(id))
    }

    /// Sends it to another topic than the event type's.
    pub fn topic(self, topic: Topic) -> Self {
        self.edit(|message| message.with_topic(topic))
    }

    /// Publishes it at a time on the wall, by this clock: the delay until then is what the log counts.
    pub(super) fn at(self, time: Timestamp, clock: &dyn Clock) -> Self {
        let delay = (time - clock.now()).to_std().unwrap_or_default();
        self.after(delay)
    }

    /// Publishes it after `delay`, counted by the log's clock from now. It gives up its place in its key's order.
    pub fn after(mut self, delay: Duration) -> Self {
        self.record = self.record.map(|record| record.after(delay));
        self
    }
}

impl<'a> IntoFuture for Publish<'a> {
    type Output = Result<MessageId>;
    type IntoFuture = BoxFuture<'a, Result<MessageId>>;

    fn into_future(self) -> Self::IntoFuture {
        Box::pin(async move {
            let record = self.record?;
            let id = record.message.id();
            match self.tx {
                Some(tx) => self.bus.publish_records_in(tx, vec![record]).await?,
                None => self.bus.publish_records(vec![record]).await?,
            }
            Ok(id)
        })
    }
}

const _: fn(&dyn EventBus) = |_| {};
