use super::{Outcome, PublishError, Publisher};
use crate::Message;
use async_trait::async_trait;
use std::{
    fmt,
    ops::Range,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, AtomicUsize, Ordering},
    },
};
use tokio::sync::Notify;

/// Bits of a word.
const WORD: usize = u64::BITS as usize;

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
    messages: usize,
    /// A bit for each message: whether it has its outcome.
    reported: Box<[AtomicU64]>,
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
                messages: count,
                reported: (0..count.div_ceil(WORD)).map(|_| AtomicU64::new(0)).collect(),
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
        let report = reports.take(Vec::new()).pop();
        report.map_or_else(|| Err(PublishError::unreported()), |report| report.outcome)
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
            let missing = self.call.mark_rest();
            self.send(missing.into_iter().map(|at| (at, outcome.clone())));
        }
    }

    /// Reports the outcomes of several messages, with their positions: cheaper than one by one.
    pub fn report_all(&self, outcomes: impl IntoIterator<Item = (usize, Outcome)>) {
        let first = outcomes.into_iter().filter(|(at, _)| self.call.mark(*at));
        self.send(first.map(|(at, outcome)| (at..at + 1, outcome)));
    }

    /// Hands over the first outcomes of messages.
    fn send(&self, outcomes: impl Iterator<Item = (Range<usize>, Outcome)>) {
        let call = &*self.call;
        let mut count = 0;
        let counted = outcomes.inspect(|(at, _)| count += at.len());
        match &call.to {
            To::Reports(reports) => reports.push(call.number, counted),
            To::Listener(listener) => {
                counted.for_each(|(at, outcome)| at.for_each(|at| listener(at, outcome.clone())));
            }
        }
        // Behind it: who sees that all have theirs finds them.
        call.left.fetch_sub(count, Ordering::AcqRel);
    }

    /// Whether every message has its outcome.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.call.left.load(Ordering::Acquire) == 0
    }
}

impl Call {
    /// Marks a message as one that has its outcome. Says whether it had none.
    fn mark(&self, at: usize) -> bool {
        if at >= self.messages {
            let messages = self.messages;
            tracing::error!(
                at,
                messages,
                "a publisher reported an outcome beyond its batch: it is ignored"
            );
            return false;
        }
        let bit = 1 << (at % WORD);
        self.reported[at / WORD].fetch_or(bit, Ordering::AcqRel) & bit == 0
    }

    /// Marks all messages that have none yet, and gives them.
    fn mark_rest(&self) -> Vec<Range<usize>> {
        let mut rest: Vec<Range<usize>> = Vec::new();
        for (word, begin) in self.reported.iter().zip((0..self.messages).step_by(WORD)) {
            let all = u64::MAX >> WORD.saturating_sub(self.messages - begin);
            let mut missing = all & !word.fetch_or(all, Ordering::AcqRel);
            while missing != 0 {
                let from = missing.trailing_zeros() as usize;
                let to = from + (missing >> from).trailing_ones() as usize;
                missing &= !(u64::MAX >> (WORD - (to - from)) << from);
                match rest.last_mut() {
                    Some(last) if last.end == begin + from => last.end = begin + to,
                    _ => rest.push(begin + from..begin + to),
                }
            }
        }
        rest
    }
}

impl fmt::Debug for Outcomes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Outcomes")
            .field("messages", &self.call.messages)
            .field("missing", &self.call.left)
            .finish_non_exhaustive()
    }
}

/// An outcome as it reaches the side that called: that of neighbours of a call which share it.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) call: u64,
    pub(crate) at: Range<usize>,
    pub(crate) outcome: Outcome,
}

/// Where the outcomes of many calls arrive.
#[derive(Debug, Default)]
pub(crate) struct Reports {
    arrived: Mutex<Vec<Report>>,
    news: Notify,
}

impl Reports {
    fn push(&self, call: u64, outcomes: impl Iterator<Item = (Range<usize>, Outcome)>) {
        let mut arrived = self.arrived.lock().unwrap_or_else(PoisonError::into_inner);
        let was_empty = arrived.is_empty();
        for (at, outcome) in outcomes {
            match arrived.last_mut() {
                // Most come in order, and are good.
                Some(last)
                    if last.at.end == at.start && last.call == call && last.outcome.is_ok() && outcome.is_ok() =>
                {
                    last.at.end = at.end;
                }
                _ => arrived.push(Report { call, at, outcome }),
            }
        }
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
        for Report { at, outcome, .. } in reports.take(Vec::new()) {
            all[at].fill(outcome);
        }
        all
    }
}

impl<P: Publisher + ?Sized> PublisherExt for P {}

#[cfg(test)]
mod tests {
    use super::*;

    fn taken(reports: &Reports) -> Vec<(Range<usize>, bool)> {
        let reports = reports.take(Vec::new()).into_iter();
        reports.map(|report| (report.at, report.outcome.is_ok())).collect()
    }

    #[test]
    fn good_neighbours_are_one_report_and_the_first_outcome_counts() {
        let reports = Arc::new(Reports::default());
        let outcomes = Outcomes::new(1, 200, reports.clone());
        let bad = || Err(PublishError::rejected("no"));
        outcomes.report_all((60..70).map(|at| (at, Ok(()))));
        outcomes.report(70, Ok(()));
        outcomes.report(65, bad());
        outcomes.report(72, bad());
        outcomes.report(200, Ok(()));
        assert_eq!(taken(&reports), [(60..71, true), (72..73, false)]);
        assert!(!outcomes.is_complete());

        outcomes.report_rest(Ok(()));
        assert_eq!(taken(&reports), [(0..60, true), (71..72, true), (73..200, true)]);
        assert!(outcomes.is_complete());
        outcomes.report_rest(bad());
        assert!(taken(&reports).is_empty());
    }

    #[test]
    fn a_call_of_any_size_is_complete_once() {
        for messages in [0, 1, 63, 64, 65, 128, 1000] {
            let reports = Arc::new(Reports::default());
            let outcomes = Outcomes::new(1, messages, reports.clone());
            assert_eq!(outcomes.is_complete(), messages == 0);
            outcomes.report_rest(Err(PublishError::rejected("no")));
            let told: usize = taken(&reports).into_iter().map(|(at, _)| at.len()).sum();
            assert_eq!((told, outcomes.is_complete()), (messages, true));
        }
    }
}
