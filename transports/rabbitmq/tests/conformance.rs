//! The conformance suite, on a real broker.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use async_trait::async_trait;
use postrider_core::{GroupName, Topic, Transport};
use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::{server::RabbitMq, transport::TransportFixture, transport_conformance};
use std::time::Duration;

struct Fixture(String, Transport);

impl Fixture {
    fn new() -> Self {
        let name = RabbitMq::shared().fresh_name();
        let options = RabbitMqOptions::new(RabbitMq::shared().url()).with_exchange(&name);
        Self(name, transport_with(options).unwrap())
    }
}

#[async_trait]
impl TransportFixture for Fixture {
    fn transport(&self) -> Transport {
        self.1.clone()
    }
    fn topic(&self, name: &str) -> Topic {
        Topic::parse(format!("{}.{name}", self.0)).unwrap()
    }
    fn group(&self, name: &str) -> GroupName {
        GroupName::parse(format!("{}.{name}", self.0)).unwrap()
    }
    async fn advance(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn quiet(&self) -> Duration {
        Duration::from_secs(1)
    }
}

transport_conformance!(Fixture::new());
