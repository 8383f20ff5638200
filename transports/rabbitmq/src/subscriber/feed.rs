//! The two sides of a feed, as core's [`Membership`](postrider_core::partition::Membership) has them.

use super::{Shared, hold::Hold};
use crate::{
    topology::{Copy, Topics, rounded},
    wire,
};
use async_trait::async_trait;
use futures_util::{Stream, StreamExt as _, stream::SelectAll};
use lapin::{Consumer, message::Delivery};
use postrider_core::{
    Assignment, DeliveryTag, Disposition, Error, ErrorKind, GroupName, PublishErrorKind, Received, Result,
    partition::{Copies, Hold as _, Membership, Source, not_outstanding},
    wire::Reader,
};
use rustc_hash::FxHashSet;
use std::{
    pin::Pin,
    sync::Arc,
    task::{Context, Poll},
};

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
pub(super) struct RabbitMqSource {
    membership: Arc<Membership<Hold>>,
    coming: SelectAll<Coming>,
    /// The holds that are among them, or were, as of a count of changes.
    known: FxHashSet<Assignment>,
    seen: Option<u64>,
    reader: Reader,
    topics: Topics,
    ready: Ready,
}

/// How many bytes lie ready at this member, by the size of messages lately.
#[derive(Debug)]
struct Ready {
    group: GroupName,
    prefetch: usize,
    limit: usize,
    /// Of the last hundred or so.
    average: usize,
    is_much: bool,
}

impl Ready {
    fn note(&mut self, bytes: usize, queues: usize) {
        self.average = (self.average * 63 + bytes).div_ceil(64);
        let ready = self.average.saturating_mul(self.prefetch).saturating_mul(queues);
        let mebibytes = ready >> 20;
        if !self.is_much && ready > self.limit {
            self.is_much = true;
            tracing::warn!(group = %self.group, prefetch = self.prefetch, queues, "up to {mebibytes} MiB of messages lie ready at this member: with such large messages have fewer of them lie ready (`with_prefetch`, the same in all members)");
        } else if self.is_much && ready < self.limit / 2 {
            self.is_much = false;
            tracing::info!(group = %self.group, "no more than {mebibytes} MiB of messages lie ready at this member");
        }
    }
}

impl RabbitMqSource {
    pub(super) fn new(shared: &Shared) -> Self {
        Self {
            topics: Topics::new(&shared.subscription.topics),
            membership: shared.membership.clone(),
            coming: SelectAll::new(),
            known: FxHashSet::default(),
            seen: None,
            reader: Reader::default(),
            ready: Ready {
                group: shared.subscription.group.clone(),
                prefetch: shared.prefetch().into(),
                limit: shared.broker.options().prefetch_memory,
                average: 0,
                is_much: false,
            },
        }
    }

    /// Has what comes out of each hold come here.
    fn look(&mut self) {
        let changes = self.membership.changes();
        if self.seen.replace(changes) == Some(changes) {
            return;
        }
        let holds = self.membership.holds();
        for hold in holds.iter().filter(|hold| !self.known.contains(&hold.assignment())) {
            self.coming.push(Coming {
                consumer: hold.consumer().clone(),
                hold: hold.clone(),
            });
        }
        self.known = holds.iter().map(|hold| hold.assignment()).collect();
    }

    fn take(&mut self, batch: &mut Vec<Received>, (hold, delivery): (Arc<Hold>, Delivery)) {
        self.ready.note(delivery.data.len(), self.known.len());
        let number = delivery.delivery_tag;
        let redelivered = delivery.redelivered;
        let topics = &mut self.topics;
        let (message, count, attempts) = wire::read(&mut self.reader, delivery, |name| topics.find(name));
        let count = count.max(1 + u32::from(redelivered));
        if hold.hand_out(number, &message, count, redelivered) {
            batch.push(Received {
                message,
                tag: DeliveryTag::of(hold.assignment(), number),
                delivery_count: count,
                attempts,
                assignment: hold.assignment(),
            });
        }
    }
}

impl Source for RabbitMqSource {
    fn poll_take(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Vec<Received>> {
        self.look();
        let mut batch = Vec::new();
        while batch.len() < max
            && let Poll::Ready(Some(coming)) = self.coming.poll_next_unpin(cx)
        {
            self.take(&mut batch, coming);
        }
        match batch.is_empty() {
            true => Poll::Pending,
            false => Poll::Ready(batch),
        }
    }
}

#[async_trait]
impl Copies<Hold> for Shared {
    async fn store(&self, hold: &Hold, position: u64, disposition: Disposition) -> Result<()> {
        let group = &self.subscription.group;
        let (kind, attempts) = match disposition {
            Disposition::Retry { attempts, .. } => ("retry", attempts),
            _ => ("dead", 0),
        };
        let (message, copied) = hold
            .copy(position, kind, group.as_str(), attempts)
            .ok_or_else(|| not_outstanding(position))?;
        let place = match disposition {
            Disposition::Retry { .. } if hold.ordered && message.key().is_some() => {
                return Err(Error::new(
                    ErrorKind::Unsupported,
                    "a message with a key cannot wait on RabbitMQ without being overtaken: retries of an ordered group need an event log",
                ));
            }
            Disposition::Retry { after, .. } => Copy::Retry(hold.queue.clone(), rounded(after)),
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_lies_ready_is_much_by_the_size_of_messages_lately() {
        let mut ready = Ready {
            group: GroupName::new("g"),
            prefetch: 256,
            limit: 100 << 20,
            average: 0,
            is_much: false,
        };
        (0..1000).for_each(|_| ready.note(1000, 8));
        assert!(!ready.is_much, "2 MiB");
        (0..300).for_each(|_| ready.note(100_000, 8));
        assert!(ready.is_much, "195 MiB");
        (0..1000).for_each(|_| ready.note(1000, 8));
        assert!(!ready.is_much);
        // One large message is none of many.
        ready.note(1_000_000, 8);
        assert!(!ready.is_much);
    }
}
