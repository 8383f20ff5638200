//! What is logged at WARN and above while a test runs.
//!
//! Operators are woken by such lines, so that a run without trouble has none: neither of ours nor of the client libraries, of
//! whatever thread.

use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

/// All that the process has logged since the first test began.
static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn logged() -> MutexGuard<'static, Vec<String>> {
    LOGGED.lock().unwrap_or_else(PoisonError::into_inner)
}

struct Listener;

impl log::Log for Listener {
    fn enabled(&self, of: &log::Metadata<'_>) -> bool {
        of.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        // lapin says so of each message that leads nowhere, and cannot be told not to: the driver's docs have more on it.
        if self.enabled(record.metadata()) && record.target() != "lapin::returned_messages" {
            logged().push(format!("{} {}: {}", record.level(), record.target(), record.args()));
        }
    }

    fn flush(&self) {}
}

/// Fails if anything was logged at WARN or above while `test` ran, by it or by what ran beside it.
pub(crate) fn quietly(test: impl FnOnce()) {
    static LISTENS: OnceLock<bool> = OnceLock::new();
    let listens = *LISTENS.get_or_init(|| {
        let listens = log::set_logger(&Listener).is_ok();
        log::set_max_level(log::LevelFilter::Warn);
        listens && !tracing::dispatcher::has_been_set()
    });
    assert!(
        listens,
        "the conformance suite listens to the log: a test binary that has it installs no logger or subscriber"
    );
    let before = logged().len();
    test();
    let heard = logged().split_off(before);
    assert!(
        heard.is_empty(),
        "a run without trouble logs nothing at WARN or above (what makes trouble, like transport_outages!, belongs into a test file of its own):\n{}",
        heard.join("\n")
    );
}
