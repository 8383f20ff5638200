//! The memory log and the memory transport: the reference implementations, for tests, examples and tools.
//!
//! They keep every contract but durability, on an injected clock. Nothing survives the process.

mod log;
mod transport;

pub use log::{MemoryConnection, MemoryLog, MemoryTransaction};
pub use transport::{MemoryFaults, MemoryTransport};
