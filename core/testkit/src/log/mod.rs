//! What an event log has to show.

mod admin;
mod cancelled;
mod fixture;
mod histories;
mod hot_key;
mod inbox;
mod leases;
mod members;
mod order;
mod records;
mod retention;

pub use admin::*;
pub use cancelled::*;
pub use fixture::{ClockedLog, LogFixture};
pub use histories::*;
pub use hot_key::*;
pub use inbox::*;
pub use leases::*;
pub use members::*;
pub use order::*;
pub use records::*;
pub use retention::*;

use fixture::{Desk, message};

/// What a log without administration is told.
const NEEDS_ADMIN: &str = "a log has a `LogAdmin`: without it nobody can work with its dead letters";
