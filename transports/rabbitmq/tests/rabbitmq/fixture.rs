//! Names of a test's own on the broker that the tests share, and a plain client beside ours.

use lapin::{Channel, Connection, ConnectionProperties};
use postrider_core::{GroupName, Message, Subscription, Topic, Transport, partition::SLOTS};
use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::server::RabbitMq;
use std::time::Duration;

pub(crate) use postrider_testkit::transport::{join, send as publish, take, text};

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

    /// Has a plain client's queue get all there is of `topic`.
    pub(crate) async fn bind(&self, channel: &Channel, queue: &str, topic: &Topic) {
        let slots = (0..SLOTS).map(|slot| format!("{topic}.@.{slot}"));
        for key in slots.chain([topic.to_string()]) {
            let exchange = self.name.as_str().into();
            let bound = channel.queue_bind(
                queue.into(),
                exchange,
                key.into(),
                Default::default(),
                Default::default(),
            );
            bound.await.unwrap();
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
