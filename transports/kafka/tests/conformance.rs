//! The conformance suite, on a real broker.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod broker;

use postrider_core::Transport;
use postrider_kafka::{KafkaOptions, transport_with};
use postrider_testkit::{
    server::{Kafka, fresh_name},
    transport::NamedTransport,
    transport_conformance, transport_outages,
};
use std::time::Duration;

/// Topics and groups of its own.
fn fixture() -> NamedTransport {
    let transport = transport_with(broker::options().with_partitions(8)).unwrap();
    // The mock cluster takes its time to let a group's next member in.
    let quiet = if cfg!(feature = "mock") { 12 } else { 4 };
    NamedTransport::new(fresh_name(), transport, Duration::from_secs(quiet))
}

fn soon_told(server: &Kafka) -> Transport {
    let seconds = Duration::from_secs;
    let options = KafkaOptions::new(server.brokers())
        .with_partitions(4)
        .with_session_timeout(seconds(2));
    transport_with(options.with_timeout(seconds(3)).with_delivery_timeout(seconds(3))).unwrap()
}

transport_conformance!(fixture());
transport_outages!(
    Kafka,
    soon_told,
    #[cfg_attr(feature = "mock", ignore = "there is no Apache Kafka here to be killed")]
);
