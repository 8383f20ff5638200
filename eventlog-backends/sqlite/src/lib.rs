//! Postrider's event log on SQLite: no server, one file, the same promises.
//!
//! ```no_run
//! # async fn f() -> postrider_core::Result<()> {
//! use postrider_sqlite::SqliteLog;
//! let log = SqliteLog::open("shop.db").await?;
//! let pool = log.pool(); // your own tables live in the same file, so one transaction covers both
//! # Ok(()) }
//! ```
//!
//! # How it works
//! - SQLite has one writer at a time, so ids ascend in the order of commits. A relay reads them with a cursor, what it
//!   settles is deleted or moved to the history, and what was refused moves to a table of its own.
//! - One session has a mailbox at a time, under a lease; another process stands by and takes over when the lease runs
//!   out. There are no lanes as on a server: one process drains more than the file can take in.
//! - The lease is a counter that its holder moves. Whoever wants it waits until the counter has stood still for the
//!   length of the lease, on its own monotonic clock: wall clocks may jump as they like. Due times do follow the wall
//!   clock: if it jumps ahead, what waits comes early; if it jumps back, late.
//! - Write-ahead log; your transactions are durable at commit (`synchronous=FULL`). The relay's own connection does
//!   without the flush (`NORMAL`): after a power failure it may publish again what it had published.

mod admin;
mod append;
mod config;
mod error;
mod inbox;
mod log;
mod members;
mod purge;
mod row;
mod schema;
mod session;
mod sql;
mod transaction;

pub use config::SqliteOptions;
pub use log::SqliteLog;
