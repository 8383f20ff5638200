//! The conformance suite, on a real broker. Whatever is logged at WARN or above while it runs fails it.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::{server::RabbitMq, transport::NamedTransport, transport_conformance};
use std::time::Duration;

/// Everything under an exchange of its own.
fn fixture() -> NamedTransport {
    let server = RabbitMq::shared();
    let name = server.fresh_name();
    let options = RabbitMqOptions::new(server.url()).with_exchange(&name);
    NamedTransport::new(name, transport_with(options).unwrap(), Duration::from_secs(1))
}

transport_conformance!(fixture());
