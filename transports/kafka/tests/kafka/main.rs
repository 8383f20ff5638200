//! What Kafka and its client do, and what the transport makes of it: one binary, so that all tests share a broker.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

#[path = "../broker/mod.rs"]
mod broker;
mod consuming;
mod fixture;
mod operators;
mod options;
mod outages;
mod publishing;
#[cfg(feature = "tls")]
mod tls;
mod wire;
