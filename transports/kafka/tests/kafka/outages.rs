//! What a transport has to show while its broker is away.

use postrider_core::Transport;
use postrider_kafka::{KafkaOptions, transport_with};
use postrider_testkit::{server::Kafka, transport_outages};
use std::time::Duration;

fn soon_told(server: &Kafka) -> Transport {
    let seconds = Duration::from_secs;
    let options = KafkaOptions::new(server.brokers())
        .with_partitions(4)
        .with_session_timeout(seconds(2));
    transport_with(options.with_timeout(seconds(3)).with_delivery_timeout(seconds(3))).unwrap()
}

transport_outages!(
    Kafka,
    soon_told,
    #[cfg_attr(feature = "mock", ignore = "there is no Apache Kafka here to be killed")]
);
