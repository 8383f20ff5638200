//! Names of a test's own on the broker that the tests share, and a plain client beside ours.

use lapin::{Channel, Connection, ConnectionProperties};
use postrider_core::{Delivery, GroupName, Intake, Message, Settling, Subscription, Taken, Topic, Transport};
use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::server::RabbitMq;
use std::time::{Duration, Instant};

pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) url: String,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self::on(RabbitMq::shared())
    }

    pub(crate) fn on(server: &RabbitMq) -> Self {
        Self {
            name: server.fresh_name(),
            url: server.url(),
        }
    }

    pub(crate) fn options(&self) -> RabbitMqOptions {
        RabbitMqOptions::new(&self.url)
            .with_exchange(&self.name)
            .with_timeout(Duration::from_secs(5))
    }

    pub(crate) fn transport(&self) -> Transport {
        transport_with(self.options()).unwrap()
    }

    pub(crate) fn topic(&self, name: &str) -> Topic {
        Topic::parse(format!("{}.{name}", self.name)).unwrap()
    }

    pub(crate) fn group(&self) -> GroupName {
        GroupName::parse(self.name.clone()).unwrap()
    }

    pub(crate) fn ordered(&self) -> Subscription {
        Subscription::new(self.group(), vec![self.topic("t")])
    }

    pub(crate) fn message(&self, key: Option<&str>, text: &str) -> Message {
        let message = Message::new(self.topic("t"), "test.v1", text.to_owned()).with_source("test");
        match key {
            Some(key) => message.with_key(key),
            None => message,
        }
    }

    /// A plain client's connection and channel.
    pub(crate) async fn plain(&self) -> (Connection, Channel) {
        let connection = Connection::connect(&self.url, ConnectionProperties::default())
            .await
            .unwrap();
        let channel = connection.create_channel().await.unwrap();
        (connection, channel)
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
