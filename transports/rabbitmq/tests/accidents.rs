//! Order by key with real member processes, killed, paused and told to end, and the broker killed under them.
#![allow(clippy::panic)]

use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::{server::RabbitMq, transport::order_through_accidents};
use std::time::Duration;

fn main() {
    let transport = |url: &str| {
        let options = RabbitMqOptions::new(url).with_heartbeat(Duration::from_secs(1));
        transport_with(options.with_timeout(Duration::from_secs(5))).unwrap_or_else(|why| panic!("{why}"))
    };
    // A silent peer is given up after two heartbeats.
    order_through_accidents(RabbitMq::start, transport, Duration::from_secs(3));
}
