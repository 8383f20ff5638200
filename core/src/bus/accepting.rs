//! The acceptance of events by a bus: refused after its shutdown, with a warning while it has not been started.

use super::{Bus, Inner};
use crate::{Error, ErrorKind, Result};
use std::sync::{
    Arc,
    atomic::{AtomicBool, Ordering},
};
use std::time::Duration;

/// The time after the first event at which a bus that should relay, and has not been started, logs a warning.
const FORGOTTEN: Duration = Duration::from_secs(10);

#[derive(Debug, Default)]
pub(super) struct Accepting {
    is_started: AtomicBool,
    is_closed: AtomicBool,
    /// The first event has come.
    is_watched: AtomicBool,
}

impl Accepting {
    pub(super) fn started(&self) {
        self.is_started.store(true, Ordering::Release);
    }

    /// Closes it when what is returned is dropped: at the end of a shutdown, whose handlers still publish.
    pub(super) fn closes(&self) -> impl Drop {
        Closing(&self.is_closed)
    }
}

struct Closing<'a>(&'a AtomicBool);

impl Drop for Closing<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

impl Bus {
    /// Refuses what comes after the shutdown.
    pub(super) fn check_open(&self) -> Result<()> {
        if !self.0.accepting.is_closed.load(Ordering::Acquire) {
            return Ok(());
        }
        let text =
            "the event was not published: the bus has been shut down; shut it down behind everything that publishes";
        Err(Error::new(ErrorKind::Closed, text))
    }

    /// Takes note of an event that went into the log, and that a relay has to carry.
    pub(super) fn watch_for_start(&self) {
        let accepting = &self.0.accepting;
        if accepting.is_watched.load(Ordering::Relaxed) || accepting.is_watched.swap(true, Ordering::Relaxed) {
            return;
        }
        let is_forgotten = |inner: &Inner| {
            let accepting = &inner.accepting;
            inner.relays
                && !accepting.is_started.load(Ordering::Acquire)
                && !accepting.is_closed.load(Ordering::Acquire)
        };
        // (Handlers of a synchronous test may poll this outside of any runtime.)
        if !is_forgotten(&self.0) || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let (inner, clock) = (Arc::downgrade(&self.0), self.0.clock.clone());
        tokio::spawn(async move {
            clock.sleep(FORGOTTEN).await;
            if inner.upgrade().is_some_and(|inner| is_forgotten(&inner)) {
                tracing::warn!(
                    "events have been published for {} s on a bus that was never started: they wait in the log. Call \
                     `bus.start()`; where another process relays them, build this bus with `.without_relay()`",
                    FORGOTTEN.as_secs()
                );
            }
        });
    }
}
