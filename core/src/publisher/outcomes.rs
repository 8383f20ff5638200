use super::{Outcome, PublishError, Publisher};
use crate::Message;
use async_trait::async_trait;
use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
};
use tokio::sync::Notify;

/// The outcomes of one [`publish`](Publisher::publish) call, reported message by message as each is known.
///
/// Clones report for the same call, so the task or callback that learns of a confirm can report it directly. The first
/// outcome of a message is final; later ones are ignored.
#[derive(Clone)]
pub struct Outcomes {
    call: Arc<Call>,
}

struct Call {
    number: u64,
    reported: Box<[AtomicBool]>,
    left: AtomicUsize,
    to: To,
}

enum To {
    Reports(Arc<Reports>),
    Listener(Box<dyn Fn(usize, Outcome) + Send + Sync>),
}

impl Outcomes {
    /// The outcomes of call `number`, of `count` messages.
    pub(crate) fn new(number: u64, count: usize, to: Arc<Reports>) -> Self {
        Self::to(number, count, To::Reports(to))
    }

    /// The outcomes of a call of `count` messages, handed to `listener` with their positions as they are reported: for
    /// wrappers that meter or change them.
    pub fn listened_to(count: usize, listener: impl Fn(usize, Outcome) + Send + Sync + 'static) -> Self {
        Self::to(0, count, To::Listener(Box::new(listener)))
    }

    fn to(number: u64, count: usize, to: To) -> Self {
        Self {
            call: Arc::new(Call {
                number,
                reported: (0..count).map(|_| AtomicBool::new(false)).collect(),
                left: AtomicUsize::new(count),
                to,
            }),
        }
    }

    /// The outcome of a call of one message, for drivers that publish something of their own: runs `call` to its end.
    pub async fn of_one<Fut: Future<Output = ()>>(call: impl FnOnce(Self) -> Fut) -> Outcome {
        let reports = Arc::new(Reports::default());
        let outcomes = Self::new(0, 1, reports.clone());
        call(outcomes.clone()).await;
        outcomes.report_rest(Err(PublishError::unreported()));
        reports
            .take(Vec::new())
            .pop()
            .map_or_else(|| Err(PublishError::unreported()), |report| report.outcome)
    }

    /// Reports the outcome of the message at position `at` of the batch.
    pub fn report(&self, at: usize, outcome: Outcome) {
        self.report_all(std::iter::once((at, outcome)));
    }

    /// Reports the outcomes of a whole batch, in its order.
    pub fn report_each(&self, outcomes: impl IntoIterator<Item = Outcome>) {
        self.report_all(outcomes.into_iter().enumerate());
    }

    /// Reports `outcome` for every message that has none yet: how a lost connection is reported.
    // By value, as `report` takes it.
    #[allow(clippy::needless_pass_by_value)]
    pub fn report_rest(&self, outcome: Outcome) {
        if !self.is_complete() {
            self.report_all((0..self.call.reported.len()).map(|at| (at, outcome.clone())));
        }
    }

    /// Reports the outcomes of several messages, with their positions: cheaper than one by one.
    pub fn report_all(&self, outcomes: impl IntoIterator<Item = (usize, Outcome)>) {
        let call = &*self.call;
        let mut reported = 0;
        let fresh = outcomes.into_iter().filter(|(at, _)| match call.reported.get(*at) {
            Some(is_reported) => {
                let is_fresh = !is_reported.swap(true, Ordering::AcqRel);
                reported += usize::from(is_fresh);
                is_fresh
            }
            None => {
                let messages = call.reported.len();
                tracing::error!(
                    at,
                    messages,
                    "a publisher reported an outcome beyond its batch: it is ignored"
                );
                false
            }
        });
        match &call.to {
            To::Reports(reports) => reports.push(fresh.map(|(at, outcome)| Report {
                call: call.number,
                at,
                outcome,
            })),
            To::Listener(listener) => fresh.for_each(|(at, outcome)| listener(at, outcome)),
        }
        // Behind it: who sees that all have theirs finds them.
        call.left.fetch_sub(reported, Ordering::AcqRel);
    }

    /// Whether every message has its outcome.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.call.left.load(Ordering::Acquire) == 0
    }
}

impl fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcomes")
            .field("messages", &self.call.reported.len())
            .field("missing", &self.call.left)
            .finish_non_exhaustive()
    }
}

/// An outcome as it reaches the side that called.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) call: u64,
    pub(crate) at: usize,
    pub(crate) outcome: Outcome,
}

/// Where the outcomes of many calls arrive.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    arrived: Mutex<Vec<Report>>,
    news: Notify,
}

impl Reports {
    fn push(&self, reports: impl Iterator<Item = Report>) {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = arrived.is_empty();
        arrived.extend(reports);
        // Those behind the first wake nobody: the reader takes all of them.
        if was_empty && !arrived.is_empty() {
            drop(arrived);
            self.news.notify_one();
        }
    }

    /// Takes what has arrived, and leaves `empty` in its place.
    pub(crate) fn take(&self, empty: Vec<Report>) -> Vec<Report> {
        std::mem::replace(&mut *self.arrived.lock().unwrap_or_else(PoisonError::into_inner), empty)
    }

    /// Waits for a report. Cancel-safe; may return without one.
    pub(crate) async fn arrived(&self) {
        self.news.notified().await;
    }
}

/// Conveniences for callers of a [`Publisher`].
#[async_trait]
pub trait PublisherExt: Publisher {
    /// Publishes a batch and waits for all of its outcomes, in the order of the batch. A message that the publisher reports
    /// nothing of counts as unknown: [`Unavailable`](super::PublishErrorKind::Unavailable), for the connection.
    async fn publish_all(&self, batch: &[Message]) -> Vec<Outcome> {
        let reports = Arc::new(Reports::default());
        let outcomes = Outcomes::new(0, batch.len(), reports.clone());
        if !batch.is_empty() {
            self.publish(batch, &outcomes).await;
        }
        outcomes.report_rest(Err(PublishError::unreported()));
        let mut all: Vec<Outcome> = batch.iter().map(|_| Err(PublishError::unreported())).collect();
        for report in reports.take(Vec::new()) {
            all[report.at] = report.outcome;
        }
        all
    }
}

impl<P: Publisher + ?Sized> PublisherExt for P {}
