//! Names of a test's own on the broker that the tests share.

use postrider_core::{Delivery, GroupName, Intake, Message, Settling, Subscription, Taken, Topic, Transport};
use postrider_kafka::{KafkaOptions, transport_with};
use postrider_testkit::server::Kafka;
use std::time::{Duration, Instant};

pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) brokers: String,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::on(Kafka::shared())
    }

    pub(crate) fn on(server: &Kafka) -> Self {
        Self {
            name: server.fresh_name(),
            brokers: server.brokers(),
        }
    }

    pub(crate) fn options(&self) -> KafkaOptions {
        KafkaOptions::new(&self.brokers)
            .with_partitions(4)
            .with_session_timeout(Duration::from_secs(2))
    }

    pub(crate) fn transport(&self) -> Transport {
        transport_with(self.options()).unwrap()
    }

    pub(crate) fn topic(&self) -> Topic {
        Topic::parse(format!("{}.t", self.name)).unwrap()
    }

    pub(crate) fn subscription(&self) -> Subscription {
        let group = GroupName::parse(self.name.clone()).unwrap();
        Subscription::new(group, vec![self.topic()])
    }

    pub(crate) fn message(&self, key: Option<&str>, text: &str) -> Message {
        let message = Message::new(self.topic(), "test.v1", text.to_owned()).with_source("test");
        match key {
            Some(key) => message.with_key(key),
            None => message,
        }
    }
}

pub(crate) async fn join(transport: &Transport, subscription: &Subscription) -> (Intake, Settling) {
    let subscriber = transport.subscriber(subscription).unwrap();
    subscriber.subscribe(subscription).await.unwrap().split()
}

pub(crate) async fn publish(transport: &Transport, batch: &[Message]) {
    for outcome in transport.publisher().unwrap().publish(batch).await {
        outcome.unwrap();
    }
}

/// `count` deliveries, or what has come within `limit`.
pub(crate) async fn take(intake: &mut Intake, count: usize, limit: Duration) -> Vec<Delivery> {
    let until = Instant::now() + limit;
    let mut taken = Vec::new();
    while taken.len() < count {
        let left = until.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, intake.next(count - taken.len())).await {
            Ok(Ok(Taken::Batch(batch))) => taken.extend(batch),
            Ok(_) => {}
            Err(_) => break,
        }
    }
    taken
}

pub(crate) fn text(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}
