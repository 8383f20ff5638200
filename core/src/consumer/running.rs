use super::shared::Shared;
use crate::{
    Error, ErrorKind, GroupName, Result,
    health::{PartState, Trouble},
};
use std::{
    fmt,
    sync::{
        Arc, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

/// How long what was cut off by the deadline of a stop may take to settle and to leave the group.
const AFTER_THE_DEADLINE: Duration = Duration::from_secs(2);

macro_rules! counters {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        /// What a subscription has done since it was started.
        #[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
        #[non_exhaustive]
        pub struct SubscriptionReport {
            $($(#[$doc])* pub $name: u64,)*
            /// Messages that wait with the broker for this member, when it was last looked; `None` where the transport does not
            /// know.
            pub lag: Option<u64>,
        }

        #[derive(Debug, Default)]
        pub(super) struct Counters {
            $($name: AtomicU64,)*
        }

        impl Counters {
            $(pub(super) fn $name(&self, n: usize) {
                self.$name.fetch_add(n as u64, Ordering::Relaxed);
            })*

            fn report(&self, lag: Option<u64>) -> SubscriptionReport {
                SubscriptionReport {
                    $($name: self.$name.load(Ordering::Relaxed),)*
                    lag,
                }
            }
        }
    };
}

counters! {
    /// Deliveries, repeats included.
    delivered,
    /// Messages whose chain succeeded, or that a middleware said were done with.
    handled,
    /// Messages that were parked in the inbox: to be tried again, or behind one that is.
    parked,
    /// Deliveries that were dropped, since the inbox knew them: handled before, waiting already, or a dead letter.
    dropped,
    /// Messages that became dead letters.
    dead_lettered,
    /// Messages of types this subscription has no chain for: acknowledged and not handled.
    ignored,
    /// Deliveries whose outcome the broker did not take: they come back.
    unsettled,
    /// Messages that the broker deleted before the group had read them, as far as the transport knows.
    missed,
}

/// A started subscription. It runs until it is stopped or its bus shuts down; dropping this changes nothing.
#[derive(Clone)]
pub struct Running {
    pub(super) shared: Arc<Shared>,
    pub(super) kill: CancellationToken,
    pub(super) tasks: TaskTracker,
}

/// Whether a subscription goes on.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub enum Flow {
    /// It takes messages and handles them.
    Running,
    /// It is not connected to the broker, and keeps trying: why, once it is known.
    Connecting(Option<String>),
    /// [`pause`](Running::pause) was called.
    Paused,
    /// Something that handlers need is away, or the event log: it waits, and this is why.
    Waiting(String),
    /// [`stop`](Running::stop) was called, or the bus is shutting down.
    Stopped,
}

impl Running {
    /// The group.
    #[must_use]
    pub fn group(&self) -> &GroupName {
        &self.shared.group
    }

    /// What it has done.
    #[must_use]
    pub fn report(&self) -> SubscriptionReport {
        let lag = self.shared.lag.lock().unwrap_or_else(PoisonError::into_inner);
        self.shared.counters.report(lag.get())
    }

    /// Whether it goes on.
    #[must_use]
    pub fn flow(&self) -> Flow {
        let gate = &self.shared.gate;
        if self.shared.stop.is_cancelled() {
            return Flow::Stopped;
        }
        match gate.outage().or_else(|| gate.log_away()) {
            _ if gate.is_paused() => Flow::Paused,
            Some(why) => Flow::Waiting(why),
            None if self.shared.status.has(Trouble::Outcomes).is_some() => {
                Flow::Waiting("the broker does not take the outcomes of deliveries".to_owned())
            }
            None if !self.shared.is_joined() => Flow::Connecting(self.shared.broker_away()),
            None => Flow::Running,
        }
    }

    /// Begins no more attempts until [`resume`](Running::resume), neither on deliveries nor from the inbox, and takes no
    /// more messages; attempts under way go on. The group's other members go on, too.
    pub fn pause(&self) {
        self.shared.gate.pause(true);
        self.shared.status.is(PartState::Paused);
    }

    /// Goes on after a [`pause`](Running::pause).
    pub fn resume(&self) {
        self.shared.gate.pause(false);
        self.shared.status.is(match *self.shared.connected.borrow() {
            true => PartState::Running,
            false => PartState::Connecting,
        });
    }

    /// Waits until the subscription has joined its group for the first time. Cancel-safe.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] after `deadline`, with what the broker said last; [`ErrorKind::Closed`] if the
    /// subscription is stopped.
    pub async fn connected(&self, deadline: Duration) -> Result<()> {
        let mut connected = self.shared.connected.subscribe();
        let result = tokio::select! {
            biased;
            _ = connected.wait_for(|connected| *connected) => return Ok(()),
            () = self.shared.stop.cancelled() => Err(Error::new(ErrorKind::Closed, "the subscription has been stopped")),
            () = self.shared.tools.clock.sleep(deadline) => {
                let text = "the subscription is not connected to the broker yet: it keeps trying";
                Err(Error::new(ErrorKind::Unavailable, text).with("why", self.shared.broker_away().unwrap_or_default()))
            }
        };
        result.map_err(|error| error.with("group", &self.shared.group))
    }

    /// Changes how many messages may be taken from the broker and not yet settled; at least 1. Fewer than are in hand
    /// takes effect as those are settled. What the broker sends ahead was decided when the subscription was started.
    pub fn set_max_in_flight(&self, messages: usize) {
        self.shared.max_in_flight.store(messages.max(1), Ordering::Relaxed);
        self.shared.gate.nudge();
    }

    /// Takes no more messages, finishes those in hand until `deadline`, settles, and leaves the group. What is not
    /// finished by then is delivered again, to this group.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if not everything was finished in time.
    pub async fn stop(&self, deadline: Duration) -> Result<()> {
        self.shared.stop.cancel();
        tokio::select! {
            biased;
            () = self.tasks.wait() => return Ok(()),
            () = self.shared.tools.clock.sleep(deadline) => {}
        }
        self.kill.cancel();
        // A handler that blocks its thread cannot be cut off, only left behind.
        let _ = tokio::time::timeout(AFTER_THE_DEADLINE, self.tasks.wait()).await;
        Err(Error::new(
            ErrorKind::Unavailable,
            "handlers were cut off by the deadline: their messages come again",
        )
        .with("group", &self.shared.group)
        .with("deadline", format!("{deadline:?}")))
    }
}

impl fmt::Debug for Running {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Running")
            .field("group", &self.shared.group)
            .field("flow", &self.flow())
            .field("report", &self.report())
            .finish()
    }
}
