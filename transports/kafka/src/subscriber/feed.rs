//! The two sides of a feed, as core's [`Membership`] has them.

use super::{Shared, beginning, hold::Hold, member::is_refusal};
use crate::wire;
use async_trait::async_trait;
use postrider_core::{
    DeliveryTag, Disposition, Error, ErrorKind, Incoming, Outcomes, Received, Result,
    partition::{Copies, Hold as _, Membership, Source, not_outstanding},
};
use rdkafka::Message as _;
use std::{
    sync::Arc,
    task::{Context, Poll},
    time::Duration,
};

#[derive(Debug)]
pub(super) struct KafkaSource {
    membership: Arc<Membership<Hold>>,
    /// Those that hand out messages, as of a count of changes.
    holds: Vec<Arc<Hold>>,
    seen: Option<u64>,
    /// Which comes first, so that none is left behind.
    first: usize,
    records: wire::Records,
}

impl KafkaSource {
    pub(super) fn new(membership: Arc<Membership<Hold>>) -> Self {
        Self {
            membership,
            holds: Vec::new(),
            seen: None,
            first: 0,
            records: wire::Records::default(),
        }
    }
}

impl Source for KafkaSource {
    fn poll_take(&mut self, _: &mut Context<'_>, max: usize) -> Poll<Vec<Received>> {
        let changes = self.membership.changes();
        if self.seen.replace(changes) != Some(changes) {
            self.holds = self.membership.holds();
        }
        let mut batch = Vec::new();
        let count = self.holds.len();
        self.first = (self.first + 1) % count.max(1);
        for n in 0..count {
            let hold = &self.holds[(self.first + n) % count];
            let Some(queue) = hold.queue() else { continue };
            while batch.len() < max && !hold.is_leaving() {
                match queue.poll(Duration::ZERO) {
                    None => break,
                    Some(Ok(record)) => {
                        let message = wire::read(&mut self.records, &record, &hold.topic);
                        let at = record.offset();
                        if hold.goes_back(at) {
                            tracing::warn!(topic = %hold.topic, partition = hold.partition, offset = at, "the partition's messages begin again: it was truncated, or made anew");
                            self.membership.tell(Ok(Incoming::Revoked(hold.assignment())));
                            break;
                        }
                        if hold.hand_out(at, &message) {
                            batch.push(Received {
                                message,
                                tag: DeliveryTag::of(hold.assignment(), at.unsigned_abs()),
                                delivery_count: 1,
                                attempts: 0,
                                assignment: hold.assignment(),
                            });
                        }
                    }
                    Some(Err(error)) if beginning::is_lost(&error) => {
                        if hold.lose_place() {
                            self.membership.tell(Ok(Incoming::Revoked(hold.assignment())));
                        }
                        break;
                    }
                    Some(Err(error)) if is_refusal(&error) => hold.refuse(&error),
                    Some(Err(error)) => {
                        tracing::warn!(%error, topic = %hold.topic, partition = hold.partition, "Kafka reports an error of a partition");
                    }
                }
            }
        }
        // Its queues have told of what comes next.
        match batch.is_empty() {
            true => Poll::Pending,
            false => Poll::Ready(batch),
        }
    }
}

#[async_trait]
impl Copies<Hold> for Shared {
    async fn store(&self, hold: &Hold, position: u64, disposition: Disposition) -> Result<()> {
        if disposition != Disposition::DeadLetter {
            return Err(Error::new(
                ErrorKind::Unsupported,
                "Kafka cannot deliver a message again after a delay: retries need an event log",
            ));
        }
        let message = hold.message(position).ok_or_else(|| not_outstanding(position))?;
        let (messages, publisher, topic) = ([message], &self.publisher, &self.dead_topic);
        let stored =
            Outcomes::of_one(|outcomes| async move { publisher.send(&messages, Some(topic), &outcomes).await });
        stored
            .await
            .map_err(|why| Error::new(ErrorKind::Unavailable, "the dead letter was not stored").because(why))
    }
}
