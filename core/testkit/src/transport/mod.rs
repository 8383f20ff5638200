//! What a transport has to show.

mod closing;
mod delivery;
mod fixture;
mod groups;
mod order;

pub use closing::*;
pub use delivery::*;
pub use fixture::{ClockedTransport, TransportFixture};
pub use groups::*;
pub use order::*;

use fixture::Member;
