//! What a transport has to show.

mod closing;
#[cfg(unix)]
mod crash;
mod delivery;
mod fixture;
mod groups;
mod order;

pub use closing::*;
#[cfg(unix)]
pub use crash::{Server, order_through_accidents};
pub use delivery::*;
pub use fixture::{ClockedTransport, TransportFixture};
pub use groups::*;
pub use order::*;

use fixture::Member;
