//! The memory log against the suite.

use postrider_core::memory::MemoryLog;
use postrider_testkit::{log::ClockedLog, log_conformance};

log_conformance!(ClockedLog::new(|clock| async move { MemoryLog::on_clock(clock).into() }).await);
