//! The Postgres log on a real server: one binary, so that all tests share it.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    clippy::print_stdout,
    clippy::disallowed_methods
)]

mod cancelled;
mod conformance;
mod fixture;
mod history;
mod lanes;
mod order;
mod outages;
mod restored;
mod schema;
mod set_back;
mod settled_floor;
mod sql_append;
mod transactions;
mod turns;
mod unreadable;
