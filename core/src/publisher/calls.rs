use super::{Outcome, Outcomes, PublishError};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// Which message of which call.
pub type Place = (u64, usize);

/// The calls that the task of a publisher works for: what is handed over next, what is unconfirmed, and what became of it.
///
/// Messages are handed over in the order of the calls, and confirmed in any; each outcome is reported when it is known.
/// What nobody waits for any more is not handed over. `W` is what a call consists of.
#[derive(Debug)]
pub struct Calls<W> {
    all: FxHashMap<u64, Call<W>>,
    last: u64,
    /// Not wholly handed over, in order.
    waiting: VecDeque<u64>,
    /// In the order they were handed over, those that are answered among them.
    unanswered: VecDeque<(Instant, Place)>,
    /// Given up before they were confirmed, which they may still be.
    late: FxHashSet<Place>,
}

#[derive(Debug)]
struct Call<W> {
    work: W,
    outcomes: Outcomes,
    /// Dropped with the call: what the caller waits for, and its going says that nobody waits any more.
    open: oneshot::Sender<()>,
    answered: Box<[bool]>,
    left: usize,
    handed_over: usize,
    /// How many are to be handed over at all: fewer than there are once nobody waits.
    wanted: usize,
}

impl<W> Default for Calls<W> {
    fn default() -> Self {
        Self {
            all: FxHashMap::default(),
            last: 0,
            waiting: VecDeque::new(),
            unanswered: VecDeque::new(),
            late: FxHashSet::default(),
        }
    }
}

impl<W> Calls<W> {
    /// Takes on a call of so many messages, at least one. `open` is dropped once all of them are answered.
    pub fn begin(&mut self, work: W, count: usize, outcomes: Outcomes, open: oneshot::Sender<()>) {
        self.last += 1;
        self.waiting.push_back(self.last);
        let call = Call {
            work,
            outcomes,
            open,
            answered: vec![false; count].into(),
            left: count,
            handed_over: 0,
            wanted: count,
        };
        self.all.insert(self.last, call);
    }

    /// Whether everything has been handed over.
    #[must_use]
    pub fn is_handed_over(&self) -> bool {
        self.waiting.is_empty()
    }

    /// The next message to hand over, of what its call consists of; it is unconfirmed from `now` on.
    pub fn hand_over(&mut self, now: Instant) -> Option<(Place, &W)> {
        while let Some(&number) = self.waiting.front() {
            if let Some(call) = self.all.get_mut(&number) {
                // Who has gone does not want the rest to be sent.
                if call.open.is_closed() {
                    call.left -= call.wanted - call.handed_over;
                    call.wanted = call.handed_over;
                }
                if call.handed_over < call.wanted {
                    let place = (number, call.handed_over);
                    call.handed_over += 1;
                    self.unanswered.push_back((now, place));
                    return self.all.get(&number).map(|call| (place, &call.work));
                }
                if call.left == 0 {
                    self.all.remove(&number);
                }
            }
            self.waiting.pop_front();
        }
        None
    }

    /// Reports the outcome of a message that was handed over. A second one, or that of a message given up, is ignored.
    pub fn confirm(&mut self, place: Place, outcome: Outcome) {
        self.late.remove(&place);
        self.answer(place, outcome);
    }

    fn answer(&mut self, (number, at): Place, outcome: Outcome) {
        let Some(call) = self.all.get_mut(&number) else {
            return;
        };
        if std::mem::replace(&mut call.answered[at], true) {
            return;
        }
        call.outcomes.report(at, outcome);
        call.left -= 1;
        if call.left == 0 {
            self.all.remove(&number);
        }
    }

    fn is_unanswered(&self, place: Place) -> bool {
        self.all.get(&place.0).is_some_and(|call| !call.answered[place.1])
    }

    /// Answers what was handed over longer than `patience` before `now`, and is not confirmed.
    pub fn give_up(&mut self, now: Instant, patience: Duration, why: impl Fn() -> PublishError) {
        while let Some((since, place)) = self.unanswered.front().copied() {
            if self.is_unanswered(place) {
                if now.saturating_duration_since(since) < patience {
                    return;
                }
                self.late.insert(place);
                self.answer(place, Err(why()));
            }
            self.unanswered.pop_front();
        }
    }

    /// How many were given up, and not confirmed since.
    #[must_use]
    pub fn late(&self) -> usize {
        self.late.len()
    }

    /// How many were handed over longer than `patience` before `now` and are neither confirmed nor given up: they need
    /// not count in a window, so that a destination that does not answer takes no place of the others.
    #[must_use]
    pub fn silent(&self, now: Instant, patience: Duration) -> usize {
        let old = |(since, _): &&(Instant, Place)| now.saturating_duration_since(*since) >= patience;
        let handed_over = self.unanswered.iter().take_while(old);
        handed_over.filter(|(_, place)| self.is_unanswered(*place)).count()
    }

    /// Answers every call, with this error where nothing is known.
    pub fn fail_all(&mut self, error: &PublishError) {
        self.waiting.clear();
        // They may be confirmed yet, and are with the broker until then.
        for (_, place) in std::mem::take(&mut self.unanswered) {
            if self.is_unanswered(place) {
                self.late.insert(place);
            }
        }
        for (_, call) in self.all.drain() {
            call.outcomes.report_rest(Err(error.clone()));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::publisher::Reports;
    use std::sync::Arc;

    /// A call as its caller sees it.
    struct Caller {
        reports: Arc<Reports>,
        done: oneshot::Receiver<()>,
    }

    impl Caller {
        fn begin(calls: &mut Calls<&'static str>, work: &'static str, count: usize) -> Self {
            let (open, done) = oneshot::channel();
            let reports = Arc::new(Reports::default());
            calls.begin(work, count, Outcomes::new(0, count, reports.clone()), open);
            Self { reports, done }
        }

        /// What was reported since it was last asked.
        fn told(&self) -> Vec<(usize, bool)> {
            let reports = self.reports.take(Vec::new()).into_iter();
            reports
                .flat_map(|report| report.at.map(move |at| (at, report.outcome.is_ok())))
                .collect()
        }

        fn is_done(&mut self) -> bool {
            self.done.try_recv() == Err(oneshot::error::TryRecvError::Closed)
        }
    }

    fn handed_over(calls: &mut Calls<&'static str>, now: Instant) -> Vec<(Place, &'static str)> {
        std::iter::from_fn(|| calls.hand_over(now).map(|(place, work)| (place, *work))).collect()
    }

    #[test]
    fn an_outcome_is_reported_when_it_is_known() {
        let mut calls = Calls::default();
        let mut first = Caller::begin(&mut calls, "first", 2);
        let mut second = Caller::begin(&mut calls, "second", 1);
        let places = handed_over(&mut calls, Instant::now());
        assert_eq!(places, [((1, 0), "first"), ((1, 1), "first"), ((2, 0), "second")]);
        assert!(calls.is_handed_over());

        calls.confirm((2, 0), Ok(()));
        assert_eq!(second.told(), [(0, true)]);
        assert!(second.is_done());
        calls.confirm((1, 1), Ok(()));
        calls.confirm((1, 1), Err(PublishError::rejected("said once more")));
        assert_eq!(first.told(), [(1, true)]);
        assert!(!first.is_done());
        calls.confirm((1, 0), Err(PublishError::rejected("no")));
        assert_eq!(first.told(), [(0, false)]);
        assert!(first.is_done());
    }

    #[test]
    fn what_nobody_waits_for_is_not_handed_over() {
        let mut calls = Calls::default();
        let gone = Caller::begin(&mut calls, "gone", 3);
        let mut stays = Caller::begin(&mut calls, "stays", 1);
        let now = Instant::now();
        assert_eq!(calls.hand_over(now).map(|(place, _)| place), Some((1, 0)));
        drop(gone);
        assert_eq!(handed_over(&mut calls, now), [((2, 0), "stays")]);
        calls.confirm((1, 0), Ok(()));
        calls.fail_all(&PublishError::connection("lost"));
        assert_eq!(stays.told(), [(0, false)]);
        assert!(stays.is_done() && calls.all.is_empty() && calls.is_handed_over());
        assert_eq!(calls.late(), 1, "it has no place in the window until it is confirmed");
        calls.confirm((2, 0), Ok(()));
        assert_eq!(calls.late(), 0);
    }

    #[test]
    fn what_is_never_confirmed_is_given_up() {
        let (mut calls, began, patience) = (Calls::default(), Instant::now(), Duration::from_secs(8));
        let why = || PublishError::destination("late");
        let mut early = Caller::begin(&mut calls, "early", 2);
        handed_over(&mut calls, began);
        let mut later = Caller::begin(&mut calls, "later", 1);
        handed_over(&mut calls, began + Duration::from_secs(5));

        calls.confirm((1, 0), Ok(()));
        let now = began + Duration::from_secs(7);
        calls.give_up(now, patience, why);
        assert_eq!(early.told(), [(0, true)]);
        assert_eq!(calls.silent(now, Duration::from_secs(3)), 1);
        assert_eq!(calls.silent(now, Duration::from_secs(2)), 2);
        calls.give_up(began + Duration::from_secs(9), patience, why);
        assert_eq!(early.told(), [(1, false)]);
        assert!(early.is_done() && !later.is_done());
        assert_eq!(calls.late(), 1);
        // It may be confirmed all the same.
        calls.confirm((1, 1), Ok(()));
        assert_eq!(calls.late(), 0);
    }
}
