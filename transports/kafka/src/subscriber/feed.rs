use super::{
    Shared,
    hold::{Hold, not_outstanding},
};
use crate::{topology::dead_topic, wire};
use async_trait::async_trait;
use postrider_core::{
    Assignment, Deliveries, DeliveryTag, Disposition, Error, ErrorKind, Incoming, Received, Result, Settler,
    wire::Reader,
};
use rdkafka::Message as _;
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

fn tag(assignment: Assignment, at: i64) -> DeliveryTag {
    DeliveryTag(u128::from(assignment.0) << 64 | u128::from(at.unsigned_abs()))
}

#[allow(clippy::cast_possible_truncation)]
fn untag(tag: DeliveryTag) -> (Assignment, u64) {
    (Assignment((tag.0 >> 64) as u64), tag.0 as u64)
}

#[derive(Debug)]
pub(super) struct KafkaDeliveries {
    shared: Arc<Shared>,
    /// Those that hand out messages, as of a count of changes.
    holds: Vec<Arc<Hold>>,
    seen: Option<u64>,
    /// Which comes first, so that none is left behind.
    first: usize,
    reader: Reader,
}

impl KafkaDeliveries {
    pub(super) fn new(shared: Arc<Shared>) -> Self {
        Self {
            shared,
            holds: Vec::new(),
            seen: None,
            first: 0,
            reader: Reader::default(),
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
        let changed = self.shared.changed.load(Ordering::Acquire);
        if self.seen != Some(changed) {
            self.holds = self.shared.holds().values().cloned().collect();
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
                        let message = wire::read(&mut self.reader, &record, &hold.topic);
                        let at = record.offset();
                        if hold.goes_back(at) {
                            tracing::warn!(topic = %hold.topic, partition = hold.partition, offset = at, "the partition's messages begin again: it was truncated, or made anew");
                            self.shared.tell(Ok(Incoming::Revoked(hold.assignment)));
                            break;
                        }
                        if hold.hand_out(at, &message) {
                            batch.push(Received {
                                message,
                                tag: tag(hold.assignment, at),
                                delivery_count: 1,
                                assignment: hold.assignment,
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
            if self.shared.is_closing() {
                self.let_go();
                return Err(Error::new(ErrorKind::Closed, "the subscription has been closed"));
            }
            let shared = self.shared.clone();
            let mut news = std::pin::pin!(shared.news.notified());
            news.as_mut().enable();
            if let Some(told) = self.shared.next_told() {
                // More may have been told of in the same moment.
                self.shared.news.notify_one();
                return told;
            }
            if self.shared.has_failed.load(Ordering::Acquire) {
                self.let_go();
                return Err(Error::new(
                    ErrorKind::Closed,
                    "the subscription has ended: Kafka refuses this member",
                ));
            }
            let batch = self.take(max);
            if !batch.is_empty() {
                if batch.len() >= max {
                    self.shared.news.notify_one();
                }
                return Ok(Incoming::Batch(batch));
            }
            // Nothing is held over this await: cancelled here, nothing is lost.
            news.await;
        }
    }
}

#[derive(Debug)]
pub(super) struct KafkaSettler(pub(super) Arc<Shared>);

impl KafkaSettler {
    /// Stores a dead letter; then the original may be acknowledged.
    async fn bury(&self, hold: &Hold, at: u64) -> Result<()> {
        let message = hold.message(at).ok_or_else(|| not_outstanding(at))?;
        let topic = dead_topic(&self.0.subscription.group);
        let stored = self.0.publisher.send(&[message], Some(&topic)).await;
        match stored.into_iter().next() {
            Some(Err(why)) => Err(Error::new(ErrorKind::Unavailable, "the dead letter was not stored").because(why)),
            _ => Ok(()),
        }
    }
}

#[async_trait]
impl Settler for KafkaSettler {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let mut outcomes: Vec<Option<Result<()>>> = (0..batch.len()).map(|_| None).collect();
        // By hold, each in the order given.
        let mut by_hold: Vec<(Arc<Hold>, Vec<usize>, Vec<(u64, Disposition)>)> = Vec::new();
        for (n, (tag, disposition)) in batch.iter().enumerate() {
            let (assignment, at) = untag(*tag);
            let known = by_hold.iter().position(|(hold, ..)| hold.assignment == assignment);
            let place = match (known, self.0.hold(assignment)) {
                (Some(place), _) => place,
                (None, Some(hold)) => {
                    by_hold.push((hold, Vec::new(), Vec::new()));
                    by_hold.len() - 1
                }
                (None, None) => {
                    outcomes[n] = Some(Err(not_outstanding(at)));
                    continue;
                }
            };
            let hold = by_hold[place].0.clone();
            let said = match disposition {
                Disposition::Ack | Disposition::Release => Ok(*disposition),
                Disposition::DeadLetter => self.bury(&hold, at).await.map(|()| Disposition::Ack),
                _ => Err(Error::new(
                    ErrorKind::Unsupported,
                    "Kafka cannot deliver a message again after a delay: retries need an event log",
                )),
            };
            // What could not be done comes again.
            let said = said.unwrap_or_else(|error| {
                outcomes[n] = Some(Err(error));
                Disposition::Release
            });
            by_hold[place].1.push(n);
            by_hold[place].2.push((at, said));
        }
        for (hold, places, said) in by_hold {
            let (settled, restarts) = hold.settle(&said);
            for (n, outcome) in places.into_iter().zip(settled) {
                outcomes[n].get_or_insert(outcome);
            }
            if restarts {
                self.0.tell(Ok(Incoming::Revoked(hold.assignment)));
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
