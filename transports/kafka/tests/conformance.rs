//! The conformance suite, on a real broker. Whatever is logged at WARN or above while it runs fails it.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

mod broker;

use postrider_kafka::transport_with;
use postrider_testkit::{server::fresh_name, transport::NamedTransport, transport_conformance};
use std::time::Duration;

/// Topics and groups of its own.
fn fixture() -> NamedTransport {
    let transport = transport_with(broker::options().with_partitions(8)).unwrap();
    // The mock cluster takes its time to let a group's next member in.
    let quiet = if cfg!(feature = "mock") { 12 } else { 4 };
    NamedTransport::new(fresh_name(), transport, Duration::from_secs(quiet))
}

transport_conformance!(fixture());
