//! A subscription's place in its group: joined, and joined again when it is lost.

use super::{
    shared::Shared,
    worker::{Worker, WorkerEnd},
};
use crate::{
    Error, ErrorKind, Result, Subscriber, Subscription,
    health::{PartState, Trouble},
    supervise::Next,
};
use std::{
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use tokio::sync::oneshot;
use tokio_util::sync::CancellationToken;

/// The first wait before the next try to join; it doubles.
const FIRST: Duration = Duration::from_millis(500);
/// The longest.
const LONGEST: Duration = Duration::from_secs(30);

/// What joins a group, and how often it has tried in a row.
pub(super) struct Joining {
    pub(super) shared: Arc<Shared>,
    pub(super) subscriber: Arc<dyn Subscriber>,
    pub(super) subscription: Subscription,
    pub(super) kill: CancellationToken,
    /// Told of the first try.
    pub(super) first: Mutex<Option<oneshot::Sender<Result<()>>>>,
    failures: AtomicU32,
}

impl Joining {
    pub(super) fn new(
        shared: Arc<Shared>,
        subscriber: Arc<dyn Subscriber>,
        subscription: Subscription,
        kill: CancellationToken,
        first: oneshot::Sender<Result<()>>,
    ) -> Self {
        Self {
            shared,
            subscriber,
            subscription,
            kill,
            first: Mutex::new(Some(first)),
            failures: AtomicU32::new(0),
        }
    }

    /// Joins, and works until the subscription is stopped or the feed ends by itself.
    pub(super) async fn run(self: Arc<Self>) -> Next {
        let shared = &self.shared;
        let joined = self.subscriber.subscribe(&self.subscription);
        let Some(joined) = shared.stop.run_until_cancelled(joined).await else {
            return Next::Ended;
        };
        let feed = match joined {
            Ok(feed) => feed,
            Err(error) => return self.failed(error),
        };
        if self.failures.load(Ordering::Acquire) > 0 {
            tracing::info!(group = %shared.group, "the subscription is connected to the broker");
        }
        shared.status.clear(Trouble::Broker);
        shared.is_connected();
        self.tell(Ok(()));
        let (intake, settling) = feed.split();
        *shared.lag.lock().unwrap_or_else(PoisonError::into_inner) = intake.lag();
        let worker = Worker {
            shared: shared.clone(),
            intake,
            settling,
            kill: self.kill.clone(),
        };
        let began = shared.tools.clock.elapsed();
        let end = worker.run().await;
        if shared.tools.clock.elapsed().saturating_sub(began) >= LONGEST {
            // It was sound for a while: what comes now is another matter.
            self.failures.store(0, Ordering::Release);
        }
        match end {
            WorkerEnd::Stopped => Next::Ended,
            WorkerEnd::Closed => {
                let text = "the transport ended the feed by itself: the subscription joins its group again";
                tracing::error!(group = %shared.group, "{text}");
                shared
                    .status
                    .raise(Trouble::Broker, PartState::Degraded, text.to_owned(), None);
                Next::Again(self.wait())
            }
        }
    }

    fn failed(&self, error: Error) -> Next {
        let shared = &self.shared;
        let is_outage = matches!(
            error.kind(),
            ErrorKind::Unavailable | ErrorKind::Busy | ErrorKind::Conflict | ErrorKind::Closed | ErrorKind::LeaseLost
        );
        let text = error.to_chain();
        if self.failures.load(Ordering::Acquire) == 0 {
            tracing::warn!(group = %shared.group, error = text, "the subscription cannot join its group, it keeps trying");
        }
        shared.status.raise(Trouble::Broker, PartState::Degraded, text, None);
        let is_first = self.tell(Err(error));
        match is_first && !is_outage {
            // Whoever starts it is told, and nothing is left behind.
            true => Next::Ended,
            false => Next::Again(self.wait()),
        }
    }

    fn wait(&self) -> Duration {
        let failures = self.failures.fetch_add(1, Ordering::AcqRel);
        FIRST.saturating_mul(1 << failures.min(10)).min(LONGEST)
    }

    /// Tells whoever starts the subscription how the first try went. Says whether it was the first.
    fn tell(&self, how: Result<()>) -> bool {
        let first = self.first.lock().unwrap_or_else(PoisonError::into_inner).take();
        match first {
            Some(first) => {
                let _ = first.send(how);
                true
            }
            None => false,
        }
    }
}
