//! What RabbitMQ and its client do, and what the transport makes of it: one binary, so that all tests share a broker.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic, clippy::print_stdout)]

mod fixture;
mod options;
mod outages;
mod publishing;
mod queues;
mod settling;
mod wire;
