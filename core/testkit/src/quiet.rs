//! What is logged at WARN and above while a test runs.
//!
//! Operators are woken by such lines, so that a run without trouble has none: neither of ours nor of the client libraries, of
//! whatever thread.

use std::{
    fmt::{Debug, Write as _},
    sync::{Mutex, MutexGuard, OnceLock, PoisonError},
};
use tracing::{
    Event, Level, Metadata, Subscriber,
    field::{Field, Visit},
    level_filters::LevelFilter,
    span::{Attributes, Id, Record},
};

/// All that the process has logged since the first test began.
static LOGGED: Mutex<Vec<String>> = Mutex::new(Vec::new());

fn logged() -> MutexGuard<'static, Vec<String>> {
    LOGGED.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Hears `tracing` and `log`: clients use either.
struct Listener;

fn heard(target: &str, line: impl FnOnce() -> String) {
    // lapin says so of each message that leads nowhere, and cannot be told not to: the driver's docs have more on it.
    if target != "lapin::returned_messages" {
        logged().push(line());
    }
}

impl log::Log for Listener {
    fn enabled(&self, of: &log::Metadata<'_>) -> bool {
        of.level() <= log::Level::Warn
    }

    fn log(&self, record: &log::Record<'_>) {
        if log::Log::enabled(self, record.metadata()) {
            heard(record.target(), || {
                format!("{} {}: {}", record.level(), record.target(), record.args())
            });
        }
    }

    fn flush(&self) {}
}

struct Line(String);

impl Visit for Line {
    fn record_debug(&mut self, field: &Field, value: &dyn Debug) {
        let _ = write!(self.0, " {field}={value:?}");
    }
}

impl Subscriber for Listener {
    fn enabled(&self, of: &Metadata<'_>) -> bool {
        *of.level() <= Level::WARN
    }

    fn max_level_hint(&self) -> Option<LevelFilter> {
        Some(LevelFilter::WARN)
    }

    fn event(&self, event: &Event<'_>) {
        let of = event.metadata();
        heard(of.target(), || {
            let mut line = Line(format!("{} {}:", of.level(), of.target()));
            event.record(&mut line);
            line.0
        });
    }

    fn new_span(&self, _: &Attributes<'_>) -> Id {
        Id::from_u64(1)
    }
    fn record(&self, _: &Id, _: &Record<'_>) {}
    fn record_follows_from(&self, _: &Id, _: &Id) {}
    fn enter(&self, _: &Id) {}
    fn exit(&self, _: &Id) {}
}

/// Fails if anything was logged at WARN or above while `test` ran, by it or by what ran beside it.
pub(crate) fn quietly(test: impl FnOnce()) {
    static LISTENS: OnceLock<bool> = OnceLock::new();
    let listens = *LISTENS.get_or_init(|| {
        log::set_max_level(log::LevelFilter::Warn);
        log::set_logger(&Listener).is_ok() && tracing::subscriber::set_global_default(Listener).is_ok()
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

#[cfg(test)]
mod tests {
    use super::quietly;

    #[test]
    fn whoever_logs_fails_the_test() {
        let fails = |test: fn()| std::panic::catch_unwind(|| quietly(test)).is_err();
        assert!(fails(|| tracing::warn!(n = 1, "a line")));
        assert!(fails(|| log::error!("a line of a client's")));
        assert!(!fails(|| tracing::info!("nothing to see")));
    }
}
