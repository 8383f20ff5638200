//! Start, stop, and what runs in between.

use super::{Bus, TaskContext, tasks::Task};
use crate::{
    Error, ErrorKind, Mailbox, Result,
    log::{Owner, SessionOptions},
    relay::{Attempts, Engine, Parts, Publishing, RelayOptions, Reporter, Wake, clean_up},
};
use std::{
    sync::{Arc, Mutex, PoisonError},
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
}

/// How long what was cut off by the deadline of a shutdown may take to hand back its lease.
const AFTER_THE_DEADLINE: Duration = Duration::from_secs(2);

impl Lifecycle {
    pub(super) fn new(tasks: Vec<Task>) -> Self {
        Self {
            tasks: Mutex::new(Some(tasks)),
            tracker: TaskTracker::new(),
            stop: CancellationToken::new(),
            kill: CancellationToken::new(),
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
    /// [`ErrorKind::Unsupported`] if the transport has no publisher; [`ErrorKind::Closed`] after a shutdown or a start.
    pub async fn start(&self) -> Result<()> {
        let inner = &self.0;
        let lifecycle = &inner.lifecycle;
        let take = || lifecycle.tasks.lock().unwrap_or_else(PoisonError::into_inner).take();
        let Some(tasks) = take().filter(|_| !lifecycle.stop.is_cancelled()) else {
            return Err(Error::new(
                ErrorKind::Closed,
                "the bus has been started already, or shut down",
            ));
        };
        if let Err(error) = self.start_relay().await {
            *lifecycle.tasks.lock().unwrap_or_else(PoisonError::into_inner) = Some(tasks);
            return Err(error);
        }
        for task in tasks {
            let ctx = TaskContext {
                bus: self.clone(),
                stop: lifecycle.stop.child_token(),
            };
            self.spawn(task.run(ctx, lifecycle.kill.clone()));
        }
        Ok(())
    }

    async fn start_relay(&self) -> Result<()> {
        let inner = &self.0;
        if inner.log.is_none() {
            return Ok(());
        }
        let publishing = Publishing {
            publisher: inner.transport.publisher()?.clone(),
            clock: inner.clock.clone(),
            timeout: inner.relay.publish_timeout,
        };
        let options = (*inner.relay).clone();
        let wake = inner.wake.clone();
        let parts = self
            .relay_parts(Mailbox::outbox(), options, Arc::new(publishing), wake)
            .await?;
        let parts = Parts {
            reporter: inner.reporter.clone(),
            ..parts
        };
        let lifecycle = &inner.lifecycle;
        self.spawn_relay(parts, None, &TaskTracker::new(), &lifecycle.stop, &lifecycle.kill);
        Ok(())
    }

    /// What a relay of `mailbox` works with: with a session of its own.
    pub(crate) async fn relay_parts(
        &self,
        mailbox: Mailbox,
        options: RelayOptions,
        attempts: Arc<dyn Attempts>,
        wake: Arc<Wake>,
    ) -> Result<Parts> {
        let inner = &self.0;
        let log = self.need_log()?.clone();
        let session_options = SessionOptions::new(Owner::new())
            .with_lease(options.lease)
            .with_keep_succeeded(!options.retention.is_zero())
            .with_poll_interval(options.poll_interval);
        let session = log.store().open(&mailbox, &session_options).await?;
        Ok(Parts {
            mailbox,
            options: Arc::new(options),
            log,
            session,
            attempts,
            clock: inner.clock.clone(),
            wake,
            reporter: Arc::new(Reporter::default()),
            rng: inner.seed.map_or_else(fastrand::Rng::new, fastrand::Rng::with_seed),
        })
    }

    /// Starts a relay and the cleaning up behind it.
    pub(crate) fn spawn_relay(
        &self,
        parts: Parts,
        receipts: Option<Duration>,
        tasks: &TaskTracker,
        stop: &CancellationToken,
        kill: &CancellationToken,
    ) {
        let (store, clock) = (parts.log.store().clone(), parts.clock.clone());
        let (mailbox, options) = (parts.mailbox.clone(), parts.options.clone());
        let engine = Engine::new(parts);
        self.spawn(tasks.track_future(engine.run(stop.clone(), kill.clone())));
        self.spawn(tasks.track_future(clean_up(store, mailbox, options, receipts, clock, stop.clone())));
    }

    /// Stops everything, within `deadline`: subscriptions take no more messages and finish those in hand, the relay
    /// claims no more and finishes what is with the broker, leases are handed back, background tasks are told to stop.
    ///
    /// Nothing is lost: what was not finished is delivered or published again later.
    ///
    /// # Errors
    /// [`ErrorKind::Unavailable`] if something had to be cut off.
    pub async fn shutdown(&self, deadline: Duration) -> Result<()> {
        let lifecycle = &self.0.lifecycle;
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
