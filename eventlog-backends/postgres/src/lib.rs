//! Postrider's event log on PostgreSQL.

mod admin;
mod append;
mod config;
mod error;
mod inbox;
mod log;
mod purge;
mod row;
mod schema;
mod session;
mod sql;
mod tid;
mod transaction;
mod watch;

pub use config::PostgresOptions;
pub use log::PostgresLog;
