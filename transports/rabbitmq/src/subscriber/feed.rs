use super::{Change, Handle, Shared, hold::Hold};
use crate::{
    topology::{Copy, Topics, rounded},
    wire,
};
use async_trait::async_trait;
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream::SelectAll};
use lapin::{Consumer, message::Delivery};
use postrider_core::{
    Deliveries, DeliveryTag, Disposition, Error, ErrorKind, Incoming, PublishErrorKind, Received, Result, Settler,
    partition::{Copies, Hold as _, not_outstanding},
    wire::Reader,
};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::mpsc;

/// What comes out of a queue, for as long as its hold hands anything out.
#[derive(Debug)]
struct Coming {
    hold: Arc<Hold>,
    consumer: Consumer,
}

impl Stream for Coming {
    type Item = (Arc<Hold>, Delivery);

    fn poll_next(mut self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Self::Item>> {
        if self.hold.is_leaving() {
            return Poll::Ready(None);
        }
        match self.consumer.poll_next_unpin(cx) {
            Poll::Pending => Poll::Pending,
            Poll::Ready(Some(Ok(delivery))) => Poll::Ready(Some((self.hold.clone(), delivery))),
            // The channel or the consumer has ended: the member notices, and begins anew.
            Poll::Ready(Some(Err(_)) | None) => {
                self.hold.leave();
                Poll::Ready(None)
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct RabbitMqDeliveries {
    handle: Arc<Handle>,
    changes: mpsc::UnboundedReceiver<Change>,
    coming: SelectAll<Coming>,
    reader: Reader,
    topics: Topics,
}

impl RabbitMqDeliveries {
    pub(super) fn new(handle: Arc<Handle>, changes: mpsc::UnboundedReceiver<Change>) -> Self {
        Self {
            topics: Topics::new(&handle.0.subscription.topics),
            handle,
            changes,
            coming: SelectAll::new(),
            reader: Reader::default(),
        }
    }

    fn change(&mut self, change: Change) -> Option<Result<Incoming>> {
        match change {
            Change::Opened(hold, consumer) => {
                self.coming.push(Coming { hold, consumer });
                None
            }
            Change::Closed => None,
            Change::Revoked(assignment) => Some(Ok(Incoming::Revoked(assignment))),
            Change::Lost(assignment) => Some(Ok(Incoming::Lost(assignment))),
            Change::Failed(error) => Some(Err(error)),
        }
    }

    fn take(&mut self, batch: &mut Vec<Received>, (hold, delivery): (Arc<Hold>, Delivery)) {
        let number = delivery.delivery_tag;
        let redelivered = delivery.redelivered;
        let topics = &mut self.topics;
        let (message, count) = wire::read(&mut self.reader, delivery, |name| topics.find(name));
        let count = count.max(1 + u32::from(redelivered));
        if hold.hand_out(number, &message, count, redelivered) {
            batch.push(Received {
                message,
                tag: DeliveryTag::of(hold.assignment(), number),
                delivery_count: count,
                assignment: hold.assignment(),
            });
        }
    }
}

#[async_trait]
impl Deliveries for RabbitMqDeliveries {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        loop {
            if self.handle.0.is_closing() {
                return Err(Error::new(ErrorKind::Closed, "the subscription has been closed"));
            }
            if let Ok(change) = self.changes.try_recv() {
                match self.change(change) {
                    Some(told) => return told,
                    None => continue,
                }
            }
            let mut batch = Vec::new();
            while batch.len() < max
                && let Some(Some(coming)) = self.coming.next().now_or_never()
            {
                self.take(&mut batch, coming);
            }
            if !batch.is_empty() {
                return Ok(Incoming::Batch(batch));
            }
            // Whatever wakes this is taken in the same poll, or left where it is.
            tokio::select! {
                change = self.changes.recv() => {
                    if let Some(told) = change.and_then(|change| self.change(change)) {
                        return told;
                    }
                }
                Some(coming) = self.coming.next(), if !self.coming.is_empty() => {
                    self.take(&mut batch, coming);
                    while batch.len() < max
                        && let Some(Some(coming)) = self.coming.next().now_or_never()
                    {
                        self.take(&mut batch, coming);
                    }
                    if !batch.is_empty() {
                        return Ok(Incoming::Batch(batch));
                    }
                }
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct RabbitMqSettler(pub(super) Arc<Handle>);

#[async_trait]
impl Copies<Hold> for Shared {
    async fn store(&self, hold: &Hold, position: u64, disposition: Disposition) -> Result<()> {
        let group = &self.subscription.group;
        let kind = match disposition {
            Disposition::DeadLetter => "dead",
            _ => "retry",
        };
        let (message, copied) = hold
            .copy(position, kind, group.as_str())
            .ok_or_else(|| not_outstanding(position))?;
        let place = match disposition {
            Disposition::Retry { .. } if hold.ordered && message.key().is_some() => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "a message with a key cannot wait on RabbitMQ without being overtaken: retries of an ordered group need an event log",
                ));
            }
            Disposition::Retry { after } => Copy::Retry(hold.queue.clone(), rounded(after)),
            _ => Copy::Dead,
        };
        let queue = self.copies.queue(&self.broker, group, &place).await?;
        let stored = self.publisher.copy(message, queue, copied).await;
        stored.map_err(|why| {
            // The queue may have been deleted since, or have expired.
            self.copies.forget(&place);
            let kind = match why.kind() {
                PublishErrorKind::Invalid => ErrorKind::Invalid,
                _ => ErrorKind::Unavailable,
            };
            Error::new(kind, "the copy of the message was not stored").because(why)
        })
    }
}

#[async_trait]
impl Settler for RabbitMqSettler {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let shared = &self.0.0;
        let (outcomes, ended) = shared.holds.settle(batch, &**shared).await;
        ended
            .into_iter()
            .for_each(|assignment| shared.tell(Change::Revoked(assignment)));
        shared.stir.notify_one();
        outcomes
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        self.0.0.close(deadline).await
    }
}
