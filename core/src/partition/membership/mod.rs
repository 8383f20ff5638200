use super::{Copies, Hold, not_outstanding};
use crate::{
    Assignment, Deliveries, DeliveryTag, Disposition, Error, ErrorKind, Feed, Incoming, Received, Result, Settler,
    subscriber::Lag,
};
use async_trait::async_trait;
use rustc_hash::FxHashMap;
use std::{
    collections::VecDeque,
    fmt::Debug,
    future::poll_fn,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    task::{Context, Poll},
    time::Duration,
};
use tokio::sync::{Notify, watch};

/// A member of a group, as the two sides of its [`Feed`] and the driver's task behind them share it: what it has, what it
/// tells of, and whether it is to go.
///
/// The task, which may be a thread, joins the group, [adds](Self::add) holds and takes them away. It does so for as long as it
/// keeps its [`Working`], and until [`is_closing`](Self::is_closing).
#[derive(Debug)]
pub struct Membership<H> {
    holds: Mutex<FxHashMap<Assignment, Arc<H>>>,
    changes: AtomicU64,
    told: Mutex<VecDeque<Result<Incoming>>>,
    lag: Lag,
    news: Arc<Notify>,
    work: Notify,
    closing: AtomicBool,
    has_ended: watch::Sender<bool>,
}

/// What the task of a [`Membership`] keeps while it works. Dropped, the feed has ended.
#[derive(Debug)]
#[must_use = "dropped, the feed has ended"]
pub struct Working<H: Hold>(Arc<Membership<H>>);

impl<H: Hold> Drop for Working<H> {
    fn drop(&mut self) {
        if std::thread::panicking() {
            self.0.tell(Err(Error::new(
                ErrorKind::Unexpected,
                "the transport's task has panicked",
            )));
        }
        self.0.lose_all();
        self.0.has_ended.send_replace(true);
        self.0.news.notify_one();
    }
}

impl<H: Hold> Membership<H> {
    /// One that has nothing yet.
    pub fn begin() -> (Arc<Self>, Working<H>) {
        let membership = Arc::new(Self {
            holds: Mutex::default(),
            changes: AtomicU64::new(0),
            told: Mutex::default(),
            lag: Lag::default(),
            news: Arc::default(),
            work: Notify::new(),
            closing: AtomicBool::new(false),
            has_ended: watch::Sender::new(false),
        });
        (membership.clone(), Working(membership))
    }

    /// The feed, of what `source` takes out of the holds. Once both of its sides are dropped, the member is to go.
    pub fn feed<S: Source, C: Copies<H>>(self: &Arc<Self>, source: S, copies: Arc<C>) -> Feed {
        let side = Arc::new(Side(self.clone()));
        let taking = Taking {
            side: side.clone(),
            source: Some(source),
        };
        Feed::new(taking, Settling { side, copies }).with_lag(self.lag.clone())
    }

    fn map(&self) -> MutexGuard<'_, FxHashMap<Assignment, Arc<H>>> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn has_changed(&self) {
        self.changes.fetch_add(1, Ordering::Release);
        self.news.notify_one();
    }

    /// Has one more.
    pub fn add(&self, hold: Arc<H>) {
        self.map().insert(hold.assignment(), hold);
        self.has_changed();
    }

    /// Has one no more: what is settled of it from now on is in vain.
    pub fn remove(&self, assignment: Assignment) {
        self.map().remove(&assignment);
        self.has_changed();
    }

    /// Has nothing any more, and gives all that it had.
    pub fn take(&self) -> Vec<Arc<H>> {
        let all = std::mem::take(&mut *self.map());
        self.has_changed();
        all.into_values().collect()
    }

    /// All that it has.
    pub fn holds(&self) -> Vec<Arc<H>> {
        self.map().values().cloned().collect()
    }

    /// How often it has come to have something else.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// How many messages wait with the broker for this member. The driver's task sets it every few seconds.
    pub fn lag(&self) -> &Lag {
        &self.lag
    }

    fn told(&self) -> MutexGuard<'_, VecDeque<Result<Incoming>>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Tells whoever takes messages. Of errors in a row, which nobody has heard of yet, the last counts.
    pub fn tell(&self, what: Result<Incoming>) {
        let mut told = self.told();
        if self.is_closing() {
            return;
        }
        if what.is_err() && told.back().is_some_and(Result::is_err) {
            told.pop_back();
        }
        told.push_back(what);
        self.news.notify_one();
    }

    /// A hold is to end once what is out of it is settled.
    pub fn revoke(&self, hold: &H) {
        if hold.leave() {
            self.tell(Ok(Incoming::Revoked(hold.assignment())));
            self.work.notify_one();
        }
    }

    /// A hold has ended.
    pub fn lose(&self, hold: &H) {
        hold.lose();
        self.tell(Ok(Incoming::Lost(hold.assignment())));
    }

    /// There is nothing any more.
    pub fn lose_all(&self) {
        self.take().iter().for_each(|hold| self.lose(hold));
    }

    /// What wakes whoever waits for messages: for callbacks of clients.
    pub fn news(&self) -> Arc<Notify> {
        self.news.clone()
    }

    /// Waits until there may be work for the task: something was settled, a hold is to end, or the member is to go.
    pub async fn work(&self) {
        self.work.notified().await;
    }

    /// Whether the member is to go.
    pub fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    fn begin_to_close(&self) {
        let mut told = self.told();
        self.closing.store(true, Ordering::Release);
        told.clear();
        self.news.notify_one();
        self.work.notify_one();
    }

    /// Settles deliveries, hold by hold, those of each in the order given, after their copies are stored. One outcome
    /// each, in the order of the batch; assignments that end with it are told.
    ///
    /// What has no hold any more is [`not_outstanding`]; of what could not be copied the error is told, and the original is
    /// released. Dropped before it ends, copies may be stored whose originals come again: nothing is lost.
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)], copies: &impl Copies<H>) -> Vec<Result<()>> {
        let mut outcomes: Vec<Option<Result<()>>> = batch.iter().map(|_| None).collect();
        let mut parts: Vec<Part<H>> = Vec::new();
        for (n, (tag, disposition)) in batch.iter().enumerate() {
            let (assignment, position) = tag.parts();
            let known = parts.iter().rposition(|part| part.hold.assignment() == assignment);
            let at = match known {
                Some(at) => at,
                None => {
                    let Some(hold) = self.map().get(&assignment).cloned() else {
                        outcomes[n] = Some(Err(not_outstanding(position)));
                        continue;
                    };
                    parts.push(Part::of(hold));
                    parts.len() - 1
                }
            };
            let said = match disposition {
                Disposition::Ack | Disposition::Release => *disposition,
                Disposition::Retry { .. } | Disposition::DeadLetter => {
                    match copies.store(&parts[at].hold, position, *disposition).await {
                        Ok(()) => Disposition::Ack,
                        Err(error) => {
                            outcomes[n] = Some(Err(error));
                            Disposition::Release
                        }
                    }
                }
            };
            parts[at].places.push(n);
            parts[at].said.push((position, said));
        }
        for part in parts {
            let (settled, ends) = part.hold.settle(&part.said).await;
            for (n, outcome) in part.places.into_iter().zip(settled) {
                outcomes[n].get_or_insert(outcome);
            }
            if ends {
                self.tell(Ok(Incoming::Revoked(part.hold.assignment())));
            }
        }
        let unknown = || Err(Error::new(ErrorKind::Unexpected, "a driver said nothing of a delivery"));
        self.work.notify_one();
        outcomes
            .into_iter()
            .map(|outcome| outcome.unwrap_or_else(unknown))
            .collect()
    }
}

/// What of a batch belongs to one hold.
struct Part<H> {
    hold: Arc<H>,
    places: Vec<usize>,
    said: Vec<(u64, Disposition)>,
}

impl<H> Part<H> {
    fn of(hold: Arc<H>) -> Self {
        Self {
            hold,
            places: Vec::new(),
            said: Vec::new(),
        }
    }
}

/// Where the messages of a member come from.
pub trait Source: Debug + Send + 'static {
    /// Takes what is there of what its holds hand out, at most `max` and at least one, or sees to it that there is
    /// [news](Membership::news), or that `cx` is woken, when there is something.
    fn poll_take(&mut self, cx: &mut Context<'_>, max: usize) -> Poll<Vec<Received>>;
}

/// What both sides of a feed have.
#[derive(Debug)]
struct Side<H: Hold>(Arc<Membership<H>>);

impl<H: Hold> Drop for Side<H> {
    fn drop(&mut self) {
        self.0.begin_to_close();
    }
}

#[derive(Debug)]
struct Taking<H: Hold, S> {
    side: Arc<Side<H>>,
    /// Until the end.
    source: Option<S>,
}

#[async_trait]
impl<H: Hold, S: Source> Deliveries for Taking<H, S> {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        let membership = &self.side.0;
        loop {
            let mut news = std::pin::pin!(membership.news.notified());
            news.as_mut().enable();
            if let Some(told) = membership.told().pop_front() {
                return told;
            }
            if membership.is_closing() || *membership.has_ended.borrow() {
                self.source = None;
            }
            let Some(source) = &mut self.source else {
                return Err(Error::new(ErrorKind::Closed, "the subscription has been closed"));
            };
            // What is taken is given in the same poll: cancelled here, nothing is lost.
            let taken = poll_fn(|cx| match source.poll_take(cx, max) {
                Poll::Ready(batch) => Poll::Ready(Some(batch)),
                Poll::Pending => news.as_mut().poll(cx).map(|()| None),
            });
            if let Some(batch) = taken.await {
                return Ok(Incoming::Batch(batch));
            }
        }
    }
}

#[derive(Debug)]
struct Settling<H: Hold, C> {
    side: Arc<Side<H>>,
    copies: Arc<C>,
}

#[async_trait]
impl<H: Hold, C: Copies<H>> Settler for Settling<H, C> {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        self.side.0.settle(batch, &*self.copies).await
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        let membership = &self.side.0;
        membership.begin_to_close();
        let mut has_ended = membership.has_ended.subscribe();
        let ended = tokio::time::timeout(deadline, has_ended.wait_for(|ended| *ended)).await;
        ended.map(drop).map_err(|_| {
            Error::new(
                ErrorKind::Unavailable,
                "the group could not be left in time: what was acknowledged last may come again",
            )
            .with("timeout", format!("{deadline:?}"))
        })
    }
}

#[cfg(test)]
mod tests;
