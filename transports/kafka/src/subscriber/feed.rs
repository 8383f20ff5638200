use super::{Handle, Shared, hold::Hold};
use crate::{topology::dead_topic, wire};
use async_trait::async_trait;
use postrider_core::{
    Deliveries, DeliveryTag, Disposition, Error, ErrorKind, Incoming, Received, Result, Settler,
    partition::{Copies, Hold as _, not_outstanding},
};
use rdkafka::Message as _;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

#[derive(Debug)]
pub(super) struct KafkaDeliveries {
    handle: Arc<Handle>,
    /// Those that hand out messages, as of a count of changes.
    holds: Vec<Arc<Hold>>,
    seen: Option<u64>,
    /// Which comes first, so that none is left behind.
    first: usize,
    records: wire::Records,
}

impl KafkaDeliveries {
    pub(super) fn new(handle: Arc<Handle>) -> Self {
        Self {
            handle,
            holds: Vec::new(),
            seen: None,
            first: 0,
            records: wire::Records::default(),
        }
    }

    /// The queues keep the client alive, and whoever has the last of them waits for it.
    fn let_go(&mut self) {
        let holds = std::mem::take(&mut self.holds);
        if !holds.is_empty() {
            std::thread::spawn(move || drop(holds));
        }
    }

    fn look(&mut self) {
        let changed = self.handle.0.holds.changes();
        if self.seen != Some(changed) {
            self.holds = self.handle.0.holds.all();
            self.seen = Some(changed);
        }
    }

    /// What is there, without waiting.
    fn take(&mut self, max: usize) -> Vec<Received> {
        self.look();
        let mut batch = Vec::new();
        let count = self.holds.len();
        self.first = (self.first + 1) % count.max(1);
        for n in 0..count {
            let hold = &self.holds[(self.first + n) % count];
            while batch.len() < max && !hold.is_leaving() {
                match hold.queue.poll(Duration::ZERO) {
                    None => break,
                    Some(Ok(record)) => {
                        let message = wire::read(&mut self.records, &record, &hold.topic);
                        let at = record.offset();
                        if hold.goes_back(at) {
                            tracing::warn!(topic = %hold.topic, partition = hold.partition, offset = at, "the partition's messages begin again: it was truncated, or made anew");
                            self.handle.0.tell(Ok(Incoming::Revoked(hold.assignment())));
                            break;
                        }
                        if hold.hand_out(at, &message) {
                            batch.push(Received {
                                message,
                                tag: DeliveryTag::of(hold.assignment(), at.unsigned_abs()),
                                delivery_count: 1,
                                assignment: hold.assignment(),
                            });
                        }
                    }
                    Some(Err(error)) => {
                        tracing::warn!(%error, topic = %hold.topic, partition = hold.partition, "Kafka reports an error of a partition");
                    }
                }
            }
        }
        batch
    }
}

impl Drop for KafkaDeliveries {
    fn drop(&mut self) {
        self.let_go();
    }
}

#[async_trait]
impl Deliveries for KafkaDeliveries {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        loop {
            if self.handle.0.is_closing() {
                self.let_go();
                return Err(Error::new(ErrorKind::Closed, "the subscription has been closed"));
            }
            let shared = self.handle.0.clone();
            let mut news = std::pin::pin!(shared.news.notified());
            news.as_mut().enable();
            if let Some(told) = self.handle.0.next_told() {
                // More may have been told of in the same moment.
                self.handle.0.news.notify_one();
                return told;
            }
            if self.handle.0.has_failed.load(Ordering::Acquire) {
                self.let_go();
                return Err(Error::new(
                    ErrorKind::Closed,
                    "the subscription has ended: Kafka refuses this member",
                ));
            }
            let batch = self.take(max);
            if !batch.is_empty() {
                if batch.len() >= max {
                    self.handle.0.news.notify_one();
                }
                return Ok(Incoming::Batch(batch));
            }
            // Nothing is held over this await: cancelled here, nothing is lost.
            news.await;
        }
    }
}

#[derive(Debug)]
pub(super) struct KafkaSettler(pub(super) Arc<Handle>);

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
        let topic = dead_topic(&self.subscription.group);
        let stored = self.publisher.send(&[message], Some(&topic)).await;
        match stored.into_iter().next() {
            Some(Err(why)) => Err(Error::new(ErrorKind::Unavailable, "the dead letter was not stored").because(why)),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Settler for KafkaSettler {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let shared = &self.0.0;
        let (outcomes, ended) = shared.holds.settle(batch, &**shared).await;
        let ended = ended.into_iter().map(Incoming::Revoked);
        ended.for_each(|assignment| shared.tell(Ok(assignment)));
        outcomes
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        self.0.0.close(deadline).await
    }
}
