use crate::{Error, ErrorKind, GroupName, Result, clock::Clock};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// What a subscription has done since it was started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SubscriptionReport {
    /// Deliveries, repeats included.
    pub delivered: u64,
    /// Messages whose chain succeeded.
    pub handled: u64,
    /// Messages that became dead letters.
    pub dead_lettered: u64,
    /// Messages of types this subscription has no chain for: acknowledged and not handled.
    pub ignored: u64,
    /// Deliveries whose outcome the broker did not take: they come back.
    pub unsettled: u64,
}

#[derive(Debug, Default)]
pub(super) struct Counters {
    pub(super) delivered: AtomicU64,
    pub(super) handled: AtomicU64,
    pub(super) dead_lettered: AtomicU64,
    pub(super) ignored: AtomicU64,
    pub(super) unsettled: AtomicU64,
}

impl Counters {
    pub(super) fn add(counter: &AtomicU64, n: usize) {
        counter.fetch_add(n as u64, Ordering::Relaxed);
    }
}

/// A started subscription. It runs until it is stopped or its bus shuts down; dropping this changes nothing.
#[derive(Debug, Clone)]
pub struct Running {
    pub(super) group: Arc<GroupName>,
    pub(super) counters: Arc<Counters>,
    pub(super) clock: Arc<dyn Clock>,
    pub(super) stop: CancellationToken,
    pub(super) kill: CancellationToken,
    pub(super) tasks: TaskTracker,
}

impl Running {
    /// The group.
    #[must_use]
    pub fn group(&self) -> &GroupName {
        &self.group
    }

    /// What it has done.
    #[must_use]
    pub fn report(&self) -> SubscriptionReport {
        let read = |counter: &AtomicU64| counter.load(Ordering::Relaxed);
        SubscriptionReport {
            delivered: read(&self.counters.delivered),
            handled: read(&self.counters.handled),
            dead_lettered: read(&self.counters.dead_lettered),
            ignored: read(&self.counters.ignored),
            unsettled: read(&self.counters.unsettled),
        }
    }

    /// Takes no more messages, finishes those in hand until `deadline`, settles, and leaves the group. What is not
    /// finished by then is delivered again, to this group.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if not everything was finished in time.
    pub async fn stop(&self, deadline: Duration) -> Result<()> {
        self.stop.cancel();
        tokio::select! {
            () = self.tasks.wait() => return Ok(()),
            () = self.clock.sleep(deadline) => {}
        }
        self.kill.cancel();
        self.tasks.wait().await;
        Err(Error::new(
            ErrorKind::Unavailable,
            "handlers were cut off by the deadline: their messages come again",
        )
        .with("group", &self.group)
        .with("deadline", format!("{deadline:?}")))
    }
}
