//! What a transport has to show.

mod client;
mod closing;
#[cfg(unix)]
mod crash;
mod delivery;
mod deploy;
mod fixture;
mod groups;
mod order;
#[cfg(unix)]
mod outage;
mod sharing;

pub use client::*;
pub use closing::*;
#[cfg(unix)]
pub use crash::{Server, order_through_accidents};
pub use delivery::*;
pub use deploy::*;
pub use fixture::{ClockedTransport, NamedTransport, TransportFixture};
pub use groups::*;
pub use order::*;
#[cfg(unix)]
pub use outage::*;
pub use sharing::*;

use fixture::Member;
