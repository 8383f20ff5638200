//! The conformance suite, on a real broker.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use postrider_core::Transport;
use postrider_kafka::{KafkaOptions, transport_with};
use postrider_testkit::{server::Kafka, transport::NamedTransport, transport_conformance, transport_outages};
use std::time::Duration;

/// Topics and groups of its own.
fn fixture() -> NamedTransport {
    let server = Kafka::shared();
    let options = KafkaOptions::new(server.brokers()).with_partitions(8);
    NamedTransport::new(
        server.fresh_name(),
        transport_with(options).unwrap(),
        Duration::from_secs(4),
    )
}

fn soon_told(server: &Kafka) -> Transport {
    let seconds = Duration::from_secs;
    let options = KafkaOptions::new(server.brokers())
        .with_partitions(4)
        .with_session_timeout(seconds(2));
    transport_with(options.with_timeout(seconds(3)).with_delivery_timeout(seconds(3))).unwrap()
}

transport_conformance!(fixture());
transport_outages!(Kafka::start(), soon_told);
