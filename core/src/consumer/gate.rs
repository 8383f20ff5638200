//! Whether a subscription may go on: a person can pause it, and so can an outage.

use crate::clock::{Clock, Moment};
use std::{
    sync::{
        Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Notify, futures::Notified};
use tokio_util::sync::CancellationToken;

/// The first wait of an outage; it doubles.
const FIRST: Duration = Duration::from_millis(500);
/// The longest.
const LONGEST: Duration = Duration::from_secs(30);

/// What every handling passes before each attempt. While a service is away one of them probes, the others wait.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    /// What is read when all is well.
    is_closed: AtomicBool,
    changed: Notify,
}

#[derive(Debug, Default)]
struct State {
    is_paused: bool,
    /// What handlers need is away: one of them probes.
    outage: Option<Outage>,
    /// The event log is away: whoever writes to it tries on.
    log_away: Option<String>,
}

#[derive(Debug)]
struct Outage {
    until: Moment,
    wait: Duration,
    /// Somebody is finding out whether it is over.
    is_probed: bool,
    why: String,
}

/// The right to make one attempt. Dropped without a word, as when the handling is cut off, somebody else may probe.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    is_probe: bool,
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.is_probe {
            let mut state = self.gate.state();
            if let Some(outage) = &mut state.outage {
                outage.is_probed = false;
            }
            drop(state);
            self.gate.changed.notify_waiters();
        }
    }
}

impl Pass<'_> {
    /// The attempt got an answer, be it a failure: nothing is away.
    pub(super) fn answered(mut self) {
        if self.is_probe {
            self.is_probe = false;
            self.gate.state().outage = None;
            self.gate.tell();
            tracing::info!("what the handlers need is back: the subscription goes on");
        }
    }

    /// What the attempt needs is away.
    pub(super) fn unavailable(mut self, clock: &dyn Clock, why: String) {
        let was_probe = std::mem::take(&mut self.is_probe);
        self.gate.close(clock, why, was_probe);
    }
}

impl Gate {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        let state = self.state();
        let is_closed = state.is_paused || state.outage.is_some() || state.log_away.is_some();
        self.is_closed.store(is_closed, Ordering::Release);
        drop(state);
        self.changed.notify_waiters();
    }

    /// Whether nothing is to be taken in just now.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Why nothing goes on, if it is an outage.
    pub(super) fn outage(&self) -> Option<String> {
        let state = self.state();
        let of_handlers = state.outage.as_ref().map(|outage| outage.why.clone());
        of_handlers.or_else(|| state.log_away.clone())
    }

    /// Nothing more is begun, or taken from the broker, until the log [is back](Gate::log_is_back).
    pub(super) fn log_is_away(&self, why: String) {
        self.state().log_away = Some(why);
        self.tell();
    }

    pub(super) fn log_is_back(&self) {
        if self.is_closed() && self.state().log_away.take().is_some() {
            tracing::info!("the event log is back: the subscription goes on");
            self.tell();
        }
    }

    /// Whether a person has paused it.
    pub(super) fn is_paused(&self) -> bool {
        self.state().is_paused
    }

    pub(super) fn pause(&self, is_paused: bool) {
        self.state().is_paused = is_paused;
        self.tell();
    }

    /// Something is away: an outage begins, or a probe has failed.
    fn close(&self, clock: &dyn Clock, why: String, was_probe: bool) {
        let mut state = self.state();
        let wait = match &state.outage {
            None => FIRST,
            Some(outage) if was_probe => (outage.wait * 2).min(LONGEST),
            // One of those that were under way when it began.
            Some(_) => return,
        };
        if state.outage.is_none() {
            tracing::warn!(
                error = why,
                "what the handlers need is away: the subscription waits, and no attempt is counted"
            );
        }
        let jittered = wait / 2 + (wait / 2).mul_f64(fastrand::f64());
        state.outage = Some(Outage {
            until: clock.elapsed() + jittered,
            wait,
            is_probed: false,
            why,
        });
        drop(state);
        self.tell();
    }

    /// Waits until an attempt may be made; `None` once `stop` has been said.
    pub(super) async fn pass(&self, clock: &dyn Clock, stop: &CancellationToken) -> Option<Pass<'_>> {
        if !self.is_closed() {
            return Some(Pass {
                gate: self,
                is_probe: false,
            });
        }
        // Boxed: whoever does not wait need not have room for it.
        Box::pin(self.wait(clock, stop)).await
    }

    async fn wait(&self, clock: &dyn Clock, stop: &CancellationToken) -> Option<Pass<'_>> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let wait = {
                let mut state = self.state();
                let now = clock.elapsed();
                match (&mut state.outage, self.is_closed()) {
                    (_, false) => {
                        return Some(Pass {
                            gate: self,
                            is_probe: false,
                        });
                    }
                    (Some(outage), _) if !outage.is_probed => {
                        let left = outage.until.saturating_sub(now);
                        if left.is_zero() && !state.is_paused && state.log_away.is_none() {
                            if let Some(outage) = &mut state.outage {
                                outage.is_probed = true;
                            }
                            return Some(Pass {
                                gate: self,
                                is_probe: true,
                            });
                        }
                        Some(left).filter(|left| !left.is_zero())
                    }
                    _ => None,
                }
            };
            tokio::select! {
                biased;
                () = stop.cancelled() => return None,
                () = changed => {}
                () = async { clock.sleep(wait.unwrap_or(LONGEST)).await }, if wait.is_some() => {}
            }
        }
    }

    /// Waits for a change. Enable it before looking at what may have changed.
    pub(super) fn changed(&self) -> Notified<'_> {
        self.changed.notified()
    }

    /// Lets those who wait for a change look again, at something else.
    pub(super) fn nudge(&self) {
        self.changed.notify_waiters();
    }
}
