//! Order by key with real member processes, killed, paused and told to end, and the broker killed under them.
#![allow(clippy::panic, clippy::print_stdout)]

use postrider_kafka::{KafkaOptions, transport_with};
use postrider_testkit::{server::Kafka, transport::order_through_accidents};
use std::time::Duration;

const SESSION: Duration = Duration::from_secs(2);

fn main() {
    if cfg!(feature = "mock") {
        return println!(
            "test order_is_kept_through_accidents ... ignored, there is no Apache Kafka here to be killed"
        );
    }
    let new_protocol = std::env::var("POSTRIDER_TEST_KAFKA_GROUPS").is_ok_and(|groups| groups == "new");
    let transport = move |brokers: &str| {
        let mut options = KafkaOptions::new(brokers)
            .with_partitions(8)
            .with_session_timeout(SESSION);
        if new_protocol {
            options = options.with_new_group_protocol();
        }
        transport_with(options).unwrap_or_else(|why| panic!("{why}"))
    };
    // With the new protocol the broker says how long a session is.
    order_through_accidents(
        Kafka::start,
        transport,
        if new_protocol { SESSION * 3 } else { SESSION },
    );
}
