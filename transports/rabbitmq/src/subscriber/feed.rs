use super::{
    Change, Shared,
    hold::{Hold, not_outstanding},
};
use crate::{
    connection,
    topology::{Declaring, Topics, rounded},
    wire,
};
use async_trait::async_trait;
use futures_util::{FutureExt as _, Stream, StreamExt as _, stream::SelectAll};
use lapin::{Consumer, message::Delivery};
use postrider_core::{
    Assignment, Deliveries, DeliveryTag, Disposition, Error, ErrorKind, Incoming, PublishError, PublishErrorKind,
    Received, Result, Settler, wire::Reader,
};
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::mpsc;

fn tag(assignment: Assignment, tag: u64) -> DeliveryTag {
    DeliveryTag(u128::from(assignment.0) << 64 | u128::from(tag))
}

#[allow(clippy::cast_possible_truncation)]
fn untag(tag: DeliveryTag) -> (Assignment, u64) {
    (Assignment((tag.0 >> 64) as u64), tag.0 as u64)
}

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
    shared: Arc<Shared>,
    changes: mpsc::UnboundedReceiver<Change>,
    coming: SelectAll<Coming>,
    reader: Reader,
    topics: Topics,
}

impl RabbitMqDeliveries {
    pub(super) fn new(shared: Arc<Shared>, changes: mpsc::UnboundedReceiver<Change>) -> Self {
        Self {
            topics: Topics::new(&shared.subscription.topics),
            shared,
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
            Change::Revoked(Assignment(0)) => None,
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
                tag: tag(hold.assignment, number),
                delivery_count: count,
                assignment: hold.assignment,
            });
        }
    }
}

#[async_trait]
impl Deliveries for RabbitMqDeliveries {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        loop {
            if self.shared.is_closing() {
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
pub(super) struct RabbitMqSettler(pub(super) Arc<Shared>);

impl RabbitMqSettler {
    /// Stores a copy where it waits, or lies for good; then the original may be acknowledged.
    async fn store(&self, hold: &Hold, number: u64, disposition: Disposition) -> Result<()> {
        let shared = &self.0;
        let group = &shared.subscription.group;
        let kind = if disposition == Disposition::DeadLetter {
            "dead"
        } else {
            "retry"
        };
        let Some((message, copied)) = hold.copy(number, kind, group.as_str()) else {
            return Err(not_outstanding(number));
        };
        if let Disposition::Retry { .. } = disposition
            && hold.partition.is_some()
            && message.key().is_some()
        {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "a message with a key cannot wait on RabbitMQ without being overtaken: retries of an ordered group need an event log",
            ));
        }
        let queue = shared.copies(hold, disposition).await?;
        let stored = shared.publisher.copy(message, queue, copied).await;
        stored.map_err(|why: PublishError| {
            let kind = match why.kind() {
                PublishErrorKind::Invalid => ErrorKind::Invalid,
                _ => ErrorKind::Unavailable,
            };
            Error::new(kind, "the copy of the message was not stored").because(why)
        })
    }
}

impl Shared {
    /// The queue of copies, declared.
    async fn copies(&self, hold: &Hold, disposition: Disposition) -> Result<String> {
        self.broker
            .in_time("declaring a queue for copies", async {
                let connection = self.broker.connect("copies").await?;
                let declaring = Declaring::on(&connection, &self.broker).await?;
                let group = &self.subscription.group;
                let queue = match disposition {
                    Disposition::Retry { after } => declaring.retries(group, &hold.queue, rounded(after)).await,
                    _ => declaring.dead_letters(group).await,
                };
                connection::close_soon(Arc::new(connection));
                queue
            })
            .await
    }
}

#[async_trait]
impl Settler for RabbitMqSettler {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let mut outcomes: Vec<Option<Result<()>>> = (0..batch.len()).map(|_| None).collect();
        // By hold, each in the order given.
        let mut by_hold: Vec<(Arc<Hold>, Vec<usize>, Vec<(u64, Disposition)>)> = Vec::new();
        for (n, (tag, disposition)) in batch.iter().enumerate() {
            let (assignment, number) = untag(*tag);
            let Some(hold) = self.0.hold(assignment) else {
                outcomes[n] = Some(Err(not_outstanding(number)));
                continue;
            };
            let said = match disposition {
                Disposition::Ack | Disposition::Release => *disposition,
                Disposition::Retry { .. } | Disposition::DeadLetter => {
                    match self.store(&hold, number, *disposition).await {
                        Ok(()) => Disposition::Ack,
                        Err(error) => {
                            outcomes[n] = Some(Err(error));
                            // It is not done with: it comes again.
                            Disposition::Release
                        }
                    }
                }
                _ => {
                    outcomes[n] = Some(Err(Error::new(
                        ErrorKind::Unsupported,
                        "RabbitMQ does not know this outcome",
                    )));
                    Disposition::Release
                }
            };
            match by_hold.iter_mut().find(|(other, ..)| Arc::ptr_eq(other, &hold)) {
                Some((_, places, said_of)) => {
                    places.push(n);
                    said_of.push((number, said));
                }
                None => by_hold.push((hold, vec![n], vec![(number, said)])),
            }
        }
        for (hold, places, said) in by_hold {
            let (settled, restarts) = hold.settle(&said).await;
            for (n, outcome) in places.into_iter().zip(settled) {
                outcomes[n].get_or_insert(outcome);
            }
            if restarts {
                self.0.tell(Change::Revoked(hold.assignment));
            }
            if hold.is_leaving() || hold.has_acked() {
                self.0.stir.notify_one();
            }
        }
        let unknown = || Err(Error::new(ErrorKind::Unexpected, "a delivery was not settled"));
        outcomes
            .into_iter()
            .map(|outcome| outcome.unwrap_or_else(unknown))
            .collect()
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        self.0.close(deadline).await
    }
}
