//! Names of a test's own on the broker that the tests share.

use crate::broker;
use postrider_core::{GroupName, Message, Subscription, Topic, Transport};
use postrider_kafka::{KafkaOptions, transport_with};
use postrider_testkit::server::fresh_name;
use std::time::Duration;

pub(crate) use postrider_testkit::transport::{join, send as publish, take, text};

pub(crate) struct Fixture {
    pub(crate) name: String,
    pub(crate) brokers: String,
}

impl Fixture {
    pub(crate) fn new() -> Self {
        Self {
            name: fresh_name(),
            brokers: broker::options().brokers,
        }
    }

    pub(crate) fn options(&self) -> KafkaOptions {
        broker::options()
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
