//! Start, stop, and what runs in between.

use super::{Bus, TaskContext, tasks::Task};
use crate::{
    Error, ErrorKind, Mailbox, Result,
    clock::check_timers,
    health::{Part, PartState, Status},
    log::{Owner, Session, SessionOptions},
    relay::{Attempts, End, Engine, Parts, Publishing, RelayOptions, Reporter, Wake, clean_up},
    supervise::{self, supervise},
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio_util::{sync::CancellationToken, task::TaskTracker};

#[derive(Debug)]
pub(super) struct Lifecycle {
    /// What is to be started; `None` once it has been.
    tasks: Mutex<Option<Vec<Task>>>,
    tracker: TaskTracker,
    stop: CancellationToken,
    kill: CancellationToken,
    has_started: AtomicBool,
}

/// How long what was cut off by the deadline of a shutdown may take to hand back its lease.
const AFTER_THE_DEADLINE: Duration = Duration::from_secs(2);

/// Between tries to open a mailbox.
const REOPEN: Duration = Duration::from_secs(1);
/// The time for which a relay leaves its mailbox to another member of the group.
const ASIDE: Duration = Duration::from_secs(2);

/// The tasks of a start that is not complete yet.
struct Taken<'a> {
    place: &'a Mutex<Option<Vec<Task>>>,
    tasks: Option<Vec<Task>>,
}

impl Drop for Taken<'_> {
    fn drop(&mut self) {
        if let Some(tasks) = self.tasks.take() {
            *self.place.lock().unwrap_or_else(PoisonError::into_inner) = Some(tasks);
        }
    }
}

impl Lifecycle {
    pub(super) fn new(tasks: Vec<Task>) -> Self {
        Self {
            tasks: Mutex::new(Some(tasks)),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
            has_started: AtomicBool::new(false),
        }
    }
}

impl Bus {
    /// Starts the relay and the background tasks. Subscriptions have a start of their own.
    ///
    /// Without a log there is no relay. Where the log belongs to another process just now, the relay stands by.
    ///
    /// # Errors
    /// Of the log, if the mailbox cannot be opened: then nothing has been started, and it may be tried again.
    /// [`ErrorKind::Unsupported`] if the transport has no publisher; [`ErrorKind::Closed`] after a shutdown or a start;
    /// [`ErrorKind::Config`] in a tokio runtime without timers.
    pub async fn start(&self) -> Result<()> {
        check_timers()?;
        let inner = &self.0;
        let lifecycle = &inner.lifecycle;
        let take = || lifecycle.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(tasks) = take().filter(|_| !lifecycle.stop.is_cancelled()) else {
            return Err(Error::new(
                ErrorKind::Closed,
                "the bus has been started already, or shut down",
            ));
        };
        // Given back if this fails, or is cut off.
        let mut taken = Taken {
            place: &lifecycle.tasks,
            tasks: Some(tasks),
        };
        self.start_relay().await?;
        let tasks = taken.tasks.take().unwrap_or_default();
        inner.accepting.started();
        for task in tasks {
            let ctx = TaskContext {
                bus: self.clone(),
                stop: lifecycle.stop.child_token(),
            };
            let status = Status::new(
                Part::Task(task.name().to_owned()),
                inner.clock.clone(),
                PartState::Running,
            );
            inner.board.show(status.clone());
            self.spawn(task.run(ctx, lifecycle.kill.clone(), status));
        }
        lifecycle.has_started.store(true, Ordering::Release);
        Ok(())
    }

    async fn start_relay(&self) -> Result<()> {
        let inner = &self.0;
        if inner.log.is_none() || !inner.relays {
            return Ok(());
        }
        let publishing = Publishing {
            publisher: inner.transport.publisher()?.clone(),
            source: inner.source.clone(),
            clock: inner.clock.clone(),
            timeout: inner.relay.publish_timeout,
        };
        let options = (*inner.relay).clone();
        let parts = Parts {
            reporter: inner.reporter.clone(),
            ..self.relay_parts(Mailbox::outbox(), options, Arc::new(publishing), inner.wake.clone())?
        };
        let session = open(&parts).await?;
        let lifecycle = &inner.lifecycle;
        self.spawn_relay(
            parts,
            session,
            None,
            &TaskTracker::new(),
            &lifecycle.stop,
            &lifecycle.kill,
        );
        Ok(())
    }

    /// The parts of a relay of `mailbox`, without its session.
    pub(crate) fn relay_parts(
        &self,
        mailbox: Mailbox,
        options: RelayOptions,
        attempts: Arc<dyn Attempts>,
        wake: Arc<Wake>,
    ) -> Result<Parts> {
        let inner = &self.0;
        let status = Status::new(Part::Relay(mailbox.clone()), inner.clock.clone(), PartState::Running);
        Ok(Parts {
            mailbox,
            options: Arc::new(options),
            log: self.need_log()?.clone(),
            attempts,
            clock: inner.clock.clone(),
            wake,
            reporter: Arc::new(Reporter::new(status)),
            rng: inner.seed.map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed),
        })
    }

    /// Opens the first session of a relay.
    pub(crate) async fn open_session(&self, parts: &Parts) -> Result<Box<dyn Session>> {
        open(parts).await
    }

    /// Starts a relay, with its first session, and the cleaning up behind it.
    pub(crate) fn spawn_relay(
        &self,
        parts: Parts,
        session: Box<dyn Session>,
        receipts: Option<Duration>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
        kill: &CancellationToken,
    ) {
        let (store, clock) = (parts.log.store().clone(), parts.clock.clone());
        let (mailbox, options) = (parts.mailbox.clone(), parts.options.clone());
        let status = parts.reporter.status().clone();
        self.0.board.show(status.clone());
        let first = Arc::new(Mutex::new(Some(session)));
        let tokens = (stop.clone(), kill.clone());
        let relay = supervise(status, clock.clone(), stop.clone(), move || {
            let (parts, first, (stop, kill)) = (parts.clone(), first.clone(), tokens.clone());
            async move { run_relay(parts, &first, stop, kill).await }
        });
        self.spawn(tasks.track_future(relay));
        let name = format!("clean-up of {mailbox}");
        let status = Status::new(Part::Task(name), clock.clone(), PartState::Running);
        self.0.board.show(status.clone());
        let token = stop.clone();
        let cleaning = supervise(status, clock.clone(), stop.clone(), move || {
            let (store, mailbox, options) = (store.clone(), mailbox.clone(), options.clone());
            let (clock, stop) = (clock.clone(), token.clone());
            async move {
                clean_up(store, mailbox, options, receipts, clock, stop).await;
                supervise::Next::Ended
            }
        });
        self.spawn(tasks.track_future(cleaning));
    }

    /// Stops everything, within `deadline`: subscriptions take no more messages and finish those in hand, the relay
    /// claims no more and finishes what is with the broker, leases are handed back, background tasks are told to stop.
    ///
    /// Nothing is lost: what was not finished is delivered or published again later. Handlers publish until it returns; from
    /// then on publishing is refused with [`ErrorKind::Closed`], though a log would still take it: shut the bus down behind
    /// everything that publishes.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if something had to be cut off.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let lifecycle = &self.0.lifecycle;
        let _closes = self.0.accepting.closes();
        lifecycle.stop.cancel();
        lifecycle.tracker.close();
        tokio::select! {
            biased;
            () = lifecycle.tracker.wait() => return Ok(()),
            () = self.0.clock.sleep(deadline) => {}
        }
        lifecycle.kill.cancel();
        let _ = tokio::time::timeout(AFTER_THE_DEADLINE, lifecycle.tracker.wait()).await;
        Err(Error::new(
            ErrorKind::Unavailable,
            "the shutdown had to cut something off: it is repeated after the next start",
        )
        .with("deadline", format!("{deadline:?}")))
    }

    /// Runs until the process is told to end (Ctrl-C, or SIGTERM), then shuts down within `deadline`. Starts the bus if
    /// that has not been done.
    ///
    /// # Errors
    /// Of [`start`](Bus::start) and [`shutdown`](Bus::shutdown), or if signals cannot be listened to.
    pub async fn run_until_signal(&self, deadline: Duration) -> Result<()> {
        let started = self
            .0
            .lifecycle
            .tasks
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .is_none();
        if !started {
            self.start().await?;
        }
        signal()
            .await
            .map_err(|e| Error::new(ErrorKind::Unexpected, "signals cannot be listened to").because(e))?;
        tracing::info!("told to end, shutting down");
        self.shutdown(deadline).await
    }

    /// Returns `true` between a successful start and the beginning of a shutdown.
    pub(super) fn is_started(&self) -> bool {
        let lifecycle = &self.0.lifecycle;
        lifecycle.has_started.load(Ordering::Acquire) && !lifecycle.stop.is_cancelled()
    }

    /// Tokens for a part that stops with the bus: the first asks it to finish, the second cuts it off.
    pub(crate) fn new_part(&self) -> Result<(CancellationToken, CancellationToken)> {
        let lifecycle = &self.0.lifecycle;
        if lifecycle.stop.is_cancelled() {
            return Err(Error::new(ErrorKind::Closed, "the bus has been shut down"));
        }
        Ok((lifecycle.stop.child_token(), lifecycle.kill.child_token()))
    }

    pub(crate) fn spawn(&self, task: impl Future<Output = ()> + Send + 'static) {
        self.0.lifecycle.tracker.spawn(task);
    }
}

/// Opens a session for a relay.
async fn open(parts: &Parts) -> Result<Box<dyn Session>> {
    let options = SessionOptions::new(Owner::new())
        .with_lease(parts.options.lease)
        .with_keep_succeeded(!parts.options.retention.is_zero())
        .with_poll_interval(parts.options.poll_interval);
    parts.log.store().open(&parts.mailbox, &options).await
}

/// One life of a relay: with the first session, or a fresh one.
async fn run_relay(
    parts: Parts,
    first: &Mutex<Option<Box<dyn Session>>>,
    stop: CancellationToken,
    kill: CancellationToken,
) -> supervise::Next {
    let first = first.lock().unwrap_or_else(PoisonError::into_inner).take();
    if first.is_none() {
        match stop.run_until_cancelled(parts.attempts.stands_by()).await {
            Some(true) => return supervise::Next::Again(ASIDE),
            Some(false) => {}
            None => return supervise::Next::Ended,
        }
    }
    let opened = match first {
        Some(session) => Ok(session),
        None => match stop.run_until_cancelled(open(&parts)).await {
            Some(opened) => opened,
            None => return supervise::Next::Ended,
        },
    };
    let session = match opened {
        Ok(session) => session,
        Err(error) => {
            tracing::warn!(mailbox = %parts.mailbox, error = error.to_chain(), "the relay cannot open its mailbox: it tries again");
            parts.reporter.log_away(Some(error.to_chain()));
            return supervise::Next::Again(REOPEN);
        }
    };
    match Engine::new(parts, session).run(stop, kill).await {
        End::Stopped => supervise::Next::Ended,
        End::Aside => supervise::Next::Again(ASIDE),
    }
}

#[cfg(unix)]
async fn signal() -> std::io::Result<()> {
    use tokio::signal::unix::{SignalKind, signal};
    let mut terminate = signal(SignalKind::terminate())?;
    tokio::select! {
        interrupted = tokio::signal::ctrl_c() => interrupted,
        _ = terminate.recv() => Ok(()),
    }
}

#[cfg(not(unix))]
async fn signal() -> std::io::Result<()> {
    tokio::signal::ctrl_c().await
}
