//! The memory transport against the suite.

use postrider_core::memory::MemoryTransport;
use postrider_testkit::{transport::ClockedTransport, transport_conformance};

transport_conformance!(ClockedTransport::new(|clock| async move { MemoryTransport::on_clock(clock).into() }).await);
