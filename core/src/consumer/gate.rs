//! Whether a subscription may go on: a person can pause it, and so can an outage.

use crate::{
    MessageId,
    clock::{Clock, Moment},
    health::{PartState, Status, Trouble},
};
use rustc_hash::FxHashMap;
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Notify, futures::Notified};
use tokio_util::sync::CancellationToken;

/// The first wait of an outage; it doubles.
const FIRST: Duration = Duration::from_millis(500);
/// The longest.
const LONGEST: Duration = Duration::from_secs(30);
/// After so many failed probes a message that waits alone steps aside for others.
const ALONE: u32 = 3;
/// How many messages are remembered that found a service away.
const SUSPECTS: usize = 4096;

/// What every handling passes before each attempt. While a service is away one of them probes, in turn, and the others wait.
///
/// A message that finds the service away again after another one has found it there is at fault itself: it waits alone, and
/// the others go on.
#[derive(Debug, Default)]
pub(super) struct Gate {
    state: Mutex<State>,
    /// What is read when all is well.
    is_closed: AtomicBool,
    /// Whether any message is suspected.
    has_suspects: AtomicBool,
    /// Attempts that got an answer.
    answers: AtomicU64,
    changed: Notify,
    status: Option<Arc<Status>>,
}

#[derive(Debug, Default)]
struct State {
    is_paused: bool,
    /// What handlers need is away: one of them probes.
    outage: Option<Outage>,
    /// The event log is away: whoever writes to it tries on.
    log_away: Option<String>,
    /// Messages that found a service away, each with the answers that others had got by then.
    suspects: FxHashMap<MessageId, Suspect>,
    last_ticket: u64,
    /// Who waits for an outage to end, in the order in which they probe.
    waiting: VecDeque<u64>,
}

#[derive(Debug)]
struct Outage {
    until: Moment,
    wait: Duration,
    /// Somebody is finding out whether it is over.
    is_probed: bool,
    why: String,
}

#[derive(Debug, Clone, Copy)]
struct Suspect {
    answers: u64,
    times: u32,
}

/// The right to make one attempt. Dropped without a word, as when the handling is cut off, somebody else may probe.
#[derive(Debug)]
pub(super) struct Pass<'a> {
    gate: &'a Gate,
    is_probe: bool,
}

/// What a message does that finds a service away.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Away {
    /// It waits at the gate, as all do.
    All,
    /// Others are answered: it waits for so long by itself.
    Alone(Duration),
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
    /// The attempt on `message` got an answer, be it a failure: nothing is away.
    pub(super) fn answered(mut self, message: MessageId) {
        self.gate.answers.fetch_add(1, Ordering::AcqRel);
        if self.gate.has_suspects.load(Ordering::Acquire) {
            let mut state = self.gate.state();
            state.suspects.remove(&message);
            self.gate
                .has_suspects
                .store(!state.suspects.is_empty(), Ordering::Release);
        }
        if self.is_probe {
            self.is_probe = false;
            self.gate.state().outage = None;
            self.gate.tell();
            tracing::info!("the services that handlers need are available again: the subscription continues");
        }
    }

    /// What the attempt on `message` needs is away.
    pub(super) fn unavailable(mut self, clock: &dyn Clock, message: MessageId, why: String) -> Away {
        let was_probe = std::mem::take(&mut self.is_probe);
        self.gate.close(clock, message, why, was_probe)
    }
}

/// A place among those who wait for an outage to end.
struct Ticket<'a> {
    gate: &'a Gate,
    number: u64,
}

impl Drop for Ticket<'_> {
    fn drop(&mut self) {
        let mut state = self.gate.state();
        let was_first = state.waiting.front() == Some(&self.number);
        state.waiting.retain(|number| *number != self.number);
        drop(state);
        if was_first {
            self.gate.changed.notify_waiters();
        }
    }
}

fn alone_for(times: u32) -> Duration {
    FIRST.saturating_mul(1 << times.min(10)).min(LONGEST)
}

impl Gate {
    /// A gate that shows in the health of its subscription.
    pub(super) fn of(status: Arc<Status>) -> Self {
        Self {
            status: Some(status),
            ..Self::default()
        }
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn tell(&self) {
        let state = self.state();
        let is_closed = state.is_paused || state.outage.is_some() || state.log_away.is_some();
        self.is_closed.store(is_closed, Ordering::Release);
        if let Some(status) = &self.status {
            let outage = state.outage.as_ref().map(|outage| &outage.why);
            for (trouble, why) in [(Trouble::Services, outage), (Trouble::Log, state.log_away.as_ref())] {
                match why {
                    Some(why) => status.raise(trouble, PartState::Degraded, why.clone(), None),
                    None => {
                        status.clear(trouble);
                    }
                }
            }
        }
        drop(state);
        self.changed.notify_waiters();
    }

    /// Whether nothing is to be taken in just now.
    pub(super) fn is_closed(&self) -> bool {
        self.is_closed.load(Ordering::Acquire)
    }

    /// Why nothing goes on, if it is an outage of what handlers need.
    pub(super) fn outage(&self) -> Option<String> {
        self.state().outage.as_ref().map(|outage| outage.why.clone())
    }

    /// Why the event log counts as away, while it does.
    pub(super) fn log_away(&self) -> Option<String> {
        self.state().log_away.clone()
    }

    /// Nothing more is begun, or taken from the broker, until the log [is back](Gate::log_is_back).
    pub(super) fn log_is_away(&self, why: String) {
        self.state().log_away = Some(why);
        self.tell();
    }

    pub(super) fn log_is_back(&self) {
        if self.is_closed() && self.state().log_away.take().is_some() {
            tracing::info!("the event log is available again: the subscription continues");
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

    /// A message finds a service away: an outage begins, a probe has failed, or the message is at fault itself.
    fn close(&self, clock: &dyn Clock, message: MessageId, why: String, was_probe: bool) -> Away {
        let mut state = self.state();
        let answers = self.answers.load(Ordering::Acquire);
        let before = state.suspects.get(&message).copied();
        let suspect = Suspect {
            answers,
            times: before.map_or(1, |suspect| suspect.times.saturating_add(1)),
        };
        if before.is_some() || state.suspects.len() < SUSPECTS {
            state.suspects.insert(message, suspect);
            self.has_suspects.store(true, Ordering::Release);
        }
        if let Some(before) = before
            && answers > before.answers
        {
            if was_probe && let Some(outage) = &mut state.outage {
                outage.is_probed = false;
            }
            drop(state);
            self.changed.notify_waiters();
            let wait = alone_for(before.times);
            tracing::warn!(%message, error = why, retry_in = ?wait, "a service is unavailable to this message only: it waits, the others continue, and no attempt is counted");
            return Away::Alone(wait);
        }
        let wait = match &state.outage {
            None => FIRST,
            Some(outage) if was_probe => (outage.wait * 2).min(LONGEST),
            // One of those that were under way when it began.
            Some(_) => return Away::All,
        };
        if state.outage.is_none() {
            tracing::warn!(
                error = why,
                "a service that handlers need is unavailable: the subscription waits, and no attempt is counted"
            );
        }
        let jittered = wait / 2 + (wait / 2).mul_f64(fastrand::f64());
        state.outage = Some(Outage {
            until: clock.elapsed() + jittered,
            wait,
            is_probed: false,
            why,
        });
        // With nobody else to probe it steps aside, so that another message can be taken to find out.
        let steps_aside = was_probe && state.waiting.is_empty() && suspect.times >= ALONE;
        drop(state);
        self.tell();
        match steps_aside {
            true => Away::Alone(wait),
            false => Away::All,
        }
    }

    /// A message finds a service away in a call in which others were answered: how long it waits by itself.
    pub(super) fn alone(&self, message: MessageId) -> Duration {
        let mut state = self.state();
        let times = state.suspects.get(&message).map_or(0, |suspect| suspect.times);
        if times > 0 || state.suspects.len() < SUSPECTS {
            let answers = self.answers.load(Ordering::Acquire);
            let times = times.saturating_add(1);
            state.suspects.insert(message, Suspect { answers, times });
            self.has_suspects.store(true, Ordering::Release);
        }
        alone_for(times)
    }

    /// While a service is away and no message waits to probe it: how long until one is to be taken from the broker for that.
    pub(super) fn lacks_probe(&self, clock: &dyn Clock) -> Option<Duration> {
        if !self.is_closed() {
            return None;
        }
        let state = self.state();
        let outage = state.outage.as_ref()?;
        let lacks = !outage.is_probed && state.waiting.is_empty() && !state.is_paused && state.log_away.is_none();
        lacks.then(|| outage.until.saturating_sub(clock.elapsed()))
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
        // Whose probe has failed comes again behind the others: one message cannot keep all of them waiting.
        let ticket = {
            let mut state = self.state();
            state.last_ticket += 1;
            let number = state.last_ticket;
            state.waiting.push_back(number);
            Ticket { gate: self, number }
        };
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            let wait = {
                let mut state = self.state();
                let now = clock.elapsed();
                let is_next = state.waiting.front() == Some(&ticket.number);
                match (&mut state.outage, self.is_closed()) {
                    (_, false) => {
                        return Some(Pass {
                            gate: self,
                            is_probe: false,
                        });
                    }
                    (Some(outage), _) if !outage.is_probed && is_next => {
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
