//! The conformance suite, on a real broker.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use postrider_core::Transport;
use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::{server::RabbitMq, transport::NamedTransport, transport_conformance, transport_outages};
use std::time::Duration;

/// Everything under an exchange of its own.
fn fixture() -> NamedTransport {
    let server = RabbitMq::shared();
    let name = server.fresh_name();
    let options = RabbitMqOptions::new(server.url()).with_exchange(&name);
    NamedTransport::new(name, transport_with(options).unwrap(), Duration::from_secs(1))
}

fn soon_told(server: &RabbitMq) -> Transport {
    transport_with(RabbitMqOptions::new(server.url()).with_heartbeat(Duration::from_secs(1))).unwrap()
}

transport_conformance!(fixture());
transport_outages!(RabbitMq, soon_told);
