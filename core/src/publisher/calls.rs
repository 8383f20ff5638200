use super::PublishError;
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};
use tokio::sync::oneshot;

/// What became of a message.
pub type Outcome = Result<(), PublishError>;

/// Which message of which call.
pub type Place = (u64, usize);

/// The calls that the task of a publisher works for: what is handed over next, what is unconfirmed, and what became of it.
///
/// Messages are handed over in the order of the calls, and confirmed in any. A call is answered when the last of its messages
/// is; those that nobody waits for any more are not handed over. `W` is what a call consists of.
#[derive(Debug)]
pub struct Calls<W> {
    all: FxHashMap<u64, Call<W>>,
    last: u64,
    /// Not wholly handed over, in order.
    waiting: VecDeque<u64>,
    /// In the order they were handed over, those that are answered among them.
    unanswered: VecDeque<(Instant, Place)>,
    /// Answered before they were confirmed, which they may still be.
    late: FxHashSet<Place>,
}

#[derive(Debug)]
struct Call<W> {
    work: W,
    reply: oneshot::Sender<Vec<Outcome>>,
    outcomes: Vec<Option<Outcome>>,
    left: usize,
    handed_over: usize,
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
    /// One more, of so many messages: at least one.
    pub fn begin(&mut self, work: W, count: usize, reply: oneshot::Sender<Vec<Outcome>>) {
        self.last += 1;
        self.waiting.push_back(self.last);
        let call = Call {
            work,
            reply,
            outcomes: (0..count).map(|_| None).collect(),
            left: count,
            handed_over: 0,
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
                if call.reply.is_closed() {
                    call.left -= call.outcomes.len() - call.handed_over;
                    call.outcomes.truncate(call.handed_over);
                }
                if call.handed_over < call.outcomes.len() {
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

    /// What became of a message that was handed over. Said once more, or of one that was given up, it counts no more.
    pub fn confirm(&mut self, place: Place, outcome: Outcome) {
        self.late.remove(&place);
        self.answer(place, outcome);
    }

    fn answer(&mut self, (number, at): Place, outcome: Outcome) {
        let Some(call) = self.all.get_mut(&number) else {
            return;
        };
        if call.outcomes[at].is_none() {
            call.outcomes[at] = Some(outcome);
            call.left -= 1;
        }
        if call.left == 0
            && let Some(call) = self.all.remove(&number)
        {
            call.reply(&PublishError::connection("the outcome is not known"));
        }
    }

    /// Answers what was handed over longer than `patience` before `now`, and is not confirmed.
    pub fn give_up(&mut self, now: Instant, patience: Duration, why: impl Fn() -> PublishError) {
        while let Some((since, place)) = self.unanswered.front().copied() {
            let call = self.all.get(&place.0);
            if call.is_some_and(|call| call.outcomes[place.1].is_none()) {
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

    /// Answers every call, with this error where nothing is known.
    pub fn fail_all(&mut self, error: &PublishError) {
        self.waiting.clear();
        // They may be confirmed yet, and are with the broker until then.
        for (_, place) in std::mem::take(&mut self.unanswered) {
            let call = self.all.get(&place.0);
            if call.is_some_and(|call| call.outcomes[place.1].is_none()) {
                self.late.insert(place);
            }
        }
        self.all.drain().for_each(|(_, call)| call.reply(error));
    }
}

impl<W> Call<W> {
    fn reply(self, unknown: &PublishError) {
        let outcomes = self.outcomes.into_iter();
        let outcomes = outcomes.map(|outcome| outcome.unwrap_or_else(|| Err(unknown.clone())));
        let _ = self.reply.send(outcomes.collect());
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn handed_over(calls: &mut Calls<&'static str>, now: Instant) -> Vec<(Place, &'static str)> {
        std::iter::from_fn(|| calls.hand_over(now).map(|(place, work)| (place, *work))).collect()
    }

    #[test]
    fn a_call_is_answered_with_its_last_message() {
        let mut calls = Calls::default();
        let (first, mut first_answer) = oneshot::channel();
        let (second, mut second_answer) = oneshot::channel();
        calls.begin("first", 2, first);
        calls.begin("second", 1, second);
        let places = handed_over(&mut calls, Instant::now());
        assert_eq!(places, [((1, 0), "first"), ((1, 1), "first"), ((2, 0), "second")]);
        assert!(calls.is_handed_over());

        calls.confirm((2, 0), Ok(()));
        assert!(second_answer.try_recv().unwrap()[0].is_ok());
        calls.confirm((1, 1), Ok(()));
        calls.confirm((1, 1), Err(PublishError::rejected("said once more")));
        assert!(first_answer.try_recv().is_err());
        calls.confirm((1, 0), Err(PublishError::rejected("no")));
        let outcomes = first_answer.try_recv().unwrap();
        assert!(outcomes[0].is_err() && outcomes[1].is_ok());
    }

    #[test]
    fn what_nobody_waits_for_is_not_handed_over() {
        let mut calls = Calls::default();
        let (gone, answer) = oneshot::channel();
        let (stays, mut stays_answer) = oneshot::channel();
        calls.begin("gone", 3, gone);
        calls.begin("stays", 1, stays);
        let now = Instant::now();
        assert_eq!(calls.hand_over(now).map(|(place, _)| place), Some((1, 0)));
        drop(answer);
        assert_eq!(handed_over(&mut calls, now), [((2, 0), "stays")]);
        calls.confirm((1, 0), Ok(()));
        calls.fail_all(&PublishError::connection("lost"));
        assert!(stays_answer.try_recv().unwrap()[0].is_err());
        assert!(calls.all.is_empty() && calls.is_handed_over());
        assert_eq!(calls.late(), 1, "it has no place in the window until it is confirmed");
        calls.confirm((2, 0), Ok(()));
        assert_eq!(calls.late(), 0);
    }

    #[test]
    fn what_is_never_confirmed_is_given_up() {
        let (mut calls, began, patience) = (Calls::default(), Instant::now(), Duration::from_secs(8));
        let why = || PublishError::destination("late");
        let (early, mut early_answer) = oneshot::channel();
        calls.begin("early", 2, early);
        handed_over(&mut calls, began);
        let (later, mut later_answer) = oneshot::channel();
        calls.begin("later", 1, later);
        handed_over(&mut calls, began + Duration::from_secs(5));

        calls.confirm((1, 0), Ok(()));
        calls.give_up(began + Duration::from_secs(7), patience, why);
        assert!(early_answer.try_recv().is_err());
        calls.give_up(began + Duration::from_secs(9), patience, why);
        let outcomes = early_answer.try_recv().unwrap();
        assert!(outcomes[0].is_ok() && outcomes[1].is_err());
        assert_eq!((calls.late(), later_answer.try_recv().is_err()), (1, true));
        // It may be confirmed all the same.
        calls.confirm((1, 1), Ok(()));
        assert_eq!(calls.late(), 0);
    }
}
