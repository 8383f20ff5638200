//! The tasks that handlers run on: as many as the runtime has worker threads, so that a handler that computes or blocks holds
//! up neither the subscription's own task nor the handlers on the other threads.

use super::{
    chain::AnyChain,
    shared::{Finished, Shared},
};
use crate::Delivery;
use futures_util::{FutureExt as _, future::BoxFuture};
use std::{
    collections::VecDeque,
    panic::AssertUnwindSafe,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    task::{Context as TaskContext, Poll, Waker},
    time::Duration,
};
use tokio::sync::Notify;
use tokio_util::{
    sync::{CancellationToken, ReusableBoxFuture},
    task::{AbortOnDropHandle, TaskTracker},
};

/// A handler that ran for so long without waiting gives its thread to the others.
const LONG: Duration = Duration::from_micros(200);

/// The most jobs that are taken at once.
const MOST: usize = 32;

/// Work for the crew.
pub(super) enum Job {
    /// One message.
    One(Delivery, Option<u64>),
    /// Messages of one key, one after the other.
    Run(Run),
    /// Messages that are handled together.
    Together(Arc<dyn AnyChain>, Vec<(Delivery, Option<u64>)>),
}

/// Messages of one key.
pub(super) struct Run {
    pub(super) key: u64,
    pub(super) deliveries: VecDeque<Delivery>,
}

/// What has come of it.
pub(super) enum Ended {
    /// One message of a run that goes on.
    Part(Finished),
    /// One message alone, or of a batch.
    One(Finished),
    /// A run, or one message that panicked. Boxed: most are of one message.
    Run(Box<EndedRun>),
    /// All of a batch have been told of, but for so many that a panic took, and their keys.
    Together { lost: Vec<Option<u64>> },
}

/// How a run has ended.
pub(super) struct EndedRun {
    pub(super) key: Option<u64>,
    /// `None` if it panicked: its delivery was released.
    pub(super) last: Option<Finished>,
    /// What is left of it has not been begun.
    pub(super) left: VecDeque<Delivery>,
}

impl Ended {
    fn run(key: Option<u64>, last: Option<Finished>, left: VecDeque<Delivery>) -> Self {
        Self::Run(Box::new(EndedRun { key, last, left }))
    }
}

/// The crew of one subscription.
pub(super) struct Crew {
    queue: Arc<Queue>,
    members: Vec<AbortOnDropHandle<()>>,
    /// What waits in the middle of a handler.
    waiting: TaskTracker,
    kill: CancellationToken,
}

#[derive(Default)]
struct Queue {
    jobs: Mutex<VecDeque<Job>>,
    work: Notify,
    ended: Mutex<Vec<Ended>>,
    news: Notify,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Queue {
    fn tell(&self, ended: Ended) {
        self.tell_with(|all| all.push(ended));
    }

    fn tell_all(&self, ended: &mut Vec<Ended>) {
        if !ended.is_empty() {
            self.tell_with(|all| all.append(ended));
        }
    }

    fn tell_with(&self, add: impl FnOnce(&mut Vec<Ended>)) {
        let mut all = lock(&self.ended);
        let was_empty = all.is_empty();
        add(&mut all);
        if was_empty {
            drop(all);
            self.news.notify_one();
        }
    }
}

impl Crew {
    /// Starts its tasks on this runtime.
    pub(super) fn start(shared: &Arc<Shared>, kill: &CancellationToken) -> Self {
        let (queue, waiting, kill) = (Arc::new(Queue::default()), TaskTracker::new(), kill.child_token());
        let runtime = tokio::runtime::Handle::current();
        let member = |_| {
            let member = Member {
                members: runtime.metrics().num_workers().max(1),
                shared: shared.clone(),
                queue: queue.clone(),
                waiting: waiting.clone(),
                kill: kill.clone(),
            };
            AbortOnDropHandle::new(runtime.spawn(member.work()))
        };
        Self {
            members: (0..runtime.metrics().num_workers()).map(member).collect(),
            queue,
            waiting,
            kill,
        }
    }

    /// Adds work.
    pub(super) fn add(&self, jobs: &mut Vec<Job>) {
        let count = jobs.len().min(self.members.len());
        lock(&self.queue.jobs).extend(jobs.drain(..));
        for _ in 0..count {
            self.queue.work.notify_one();
        }
    }

    /// Takes back what has not been begun.
    pub(super) fn take_back(&self) -> VecDeque<Job> {
        std::mem::take(&mut *lock(&self.queue.jobs))
    }

    /// Waits until something has ended. Cancel-safe; may return for nothing.
    pub(super) async fn news(&self) {
        self.queue.news.notified().await;
    }

    /// Takes what has ended, and leaves `empty` in its place.
    pub(super) fn take(&self, empty: Vec<Ended>) -> Vec<Ended> {
        std::mem::replace(&mut *lock(&self.queue.ended), empty)
    }

    /// Ends all work: what is in the middle of it is dropped, and its deliveries with it. Waits for that until `limit`, since
    /// a handler that blocks its thread cannot be ended.
    pub(super) async fn end(mut self, limit: Duration) {
        self.kill.cancel();
        self.take_back();
        self.waiting.close();
        let mut members = std::mem::take(&mut self.members);
        let all = async {
            for member in members.drain(..) {
                member.abort();
                let _ = member.detach().await;
            }
            self.waiting.wait().await;
        };
        let _ = tokio::time::timeout(limit, all).await;
    }
}

/// What waits in the middle of a handler ends with its crew, however that ends.
impl Drop for Crew {
    fn drop(&mut self) {
        self.kill.cancel();
    }
}

struct Member {
    /// How many there are.
    members: usize,
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    waiting: TaskTracker,
    kill: CancellationToken,
}

impl Member {
    async fn work(self) {
        // Several quick ones are taken at once; of those that take long, one at a time.
        let (mut jobs, mut told) = (VecDeque::new(), Vec::new());
        let mut spare = None;
        let mut most = 1;
        loop {
            let mut work = std::pin::pin!(self.queue.work.notified());
            work.as_mut().enable();
            {
                let mut queue = lock(&self.queue.jobs);
                let share = (queue.len() / self.members).clamp(1, most).min(queue.len());
                jobs.extend(queue.drain(..share));
            }
            if jobs.is_empty() {
                work.await;
                continue;
            }
            let began = self.shared.tools.clock.elapsed();
            let lasts = || self.shared.tools.clock.elapsed().saturating_sub(began) >= LONG;
            while let Some(job) = jobs.pop_front() {
                self.begin(job, &mut told, &mut spare);
                if jobs.len() % 8 == 1 && lasts() {
                    break;
                }
            }
            self.queue.tell_all(&mut told);
            let was_long = lasts();
            most = if was_long { 1 } else { (most * 2).min(MOST) };
            if !jobs.is_empty() {
                // For the others.
                let mut queue = lock(&self.queue.jobs);
                jobs.drain(..).rev().for_each(|job| queue.push_front(job));
                drop(queue);
                self.queue.work.notify_one();
            }
            // The subscription's own task, and whatever else has to run on this thread.
            match was_long {
                true => tokio::task::yield_now().await,
                false => tokio::task::coop::consume_budget().await,
            }
        }
    }

    /// Handles a job as far as it goes without waiting. Most handlers of a busy group are quick: a task of its own, which costs
    /// more than they do, is for those that wait. It is polled again there, so the waker of this first poll need not wake anybody. The box
    /// of a handling that has ended is used again.
    fn begin(&self, job: Job, told: &mut Vec<Ended>, spare: &mut Option<ReusableBoxFuture<'static, Ended>>) {
        let mut cx = TaskContext::from_waker(Waker::noop());
        let (shared, queue) = (self.shared.clone(), || self.queue.clone());
        match job {
            Job::One(delivery, key) => {
                let one = async move {
                    match handle_one(&shared, delivery, key).await {
                        Some(finished) => Ended::One(finished),
                        None => Ended::run(key, None, VecDeque::new()),
                    }
                };
                let mut one = match spare.take() {
                    Some(mut used) => {
                        used.set(one);
                        used
                    }
                    None => ReusableBoxFuture::new(one),
                };
                match one.poll(&mut cx) {
                    Poll::Ready(ended) => {
                        told.push(ended);
                        *spare = Some(one);
                    }
                    Poll::Pending => {
                        let queue = queue();
                        self.wait(async move { queue.tell(one.await) });
                    }
                }
            }
            Job::Run(run) => self.begin_boxed(Box::pin(handle(shared, queue(), run)), &mut cx),
            Job::Together(chain, batch) => {
                self.begin_boxed(Box::pin(handle_together(shared, queue(), chain, batch)), &mut cx);
            }
        }
    }

    fn begin_boxed(&self, mut handling: BoxFuture<'static, ()>, cx: &mut TaskContext<'_>) {
        if handling.as_mut().poll(cx).is_pending() {
            self.wait(handling);
        }
    }

    fn wait(&self, handling: impl Future<Output = ()> + Send + 'static) {
        let kill = self.kill.clone();
        self.waiting.spawn(async move {
            kill.run_until_cancelled(handling).await;
        });
    }
}

/// Takes one message through its chain. `None` if that panicked: then it is released.
async fn handle_one(shared: &Shared, delivery: Delivery, key: Option<u64>) -> Option<Finished> {
    if delivery.is_gone() {
        return Some(Finished {
            settlement: delivery.release(),
            key,
            is_parked: false,
        });
    }
    match AssertUnwindSafe(shared.handle(delivery, key)).catch_unwind().await {
        Ok(finished) => Some(finished),
        Err(_) => {
            shared.panicked();
            None
        }
    }
}

/// Takes the messages of a run through their chain, until one does not simply succeed.
async fn handle(shared: Arc<Shared>, queue: Arc<Queue>, run: Run) {
    let Run { key, mut deliveries } = run;
    let key = Some(key);
    while let Some(delivery) = deliveries.pop_front() {
        let last = handle_one(&shared, delivery, key).await;
        let goes_on = match &last {
            Some(last) => !last.is_parked && !last.settlement.comes_again() && !shared.stop.is_cancelled(),
            None => false,
        };
        match last {
            Some(last) if goes_on && !deliveries.is_empty() => queue.tell(Ended::Part(last)),
            last => {
                let left = std::mem::take(&mut deliveries);
                queue.tell(Ended::run(key, last, left));
            }
        }
    }
}

async fn handle_together(
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    chain: Arc<dyn AnyChain>,
    batch: Vec<(Delivery, Option<u64>)>,
) {
    let keys: Mutex<Vec<Option<Option<u64>>>> = Mutex::new(batch.iter().map(|(_, key)| Some(*key)).collect());
    let each = |at: usize, finished: Finished| {
        if let Some(key) = lock(&keys).get_mut(at) {
            *key = None;
        }
        queue.tell(Ended::One(finished));
    };
    let handling = AssertUnwindSafe(shared.handle_together(&*chain, batch, each)).catch_unwind();
    if handling.await.is_err() {
        shared.panicked();
    }
    let lost = lock(&keys).drain(..).flatten().collect();
    queue.tell(Ended::Together { lost });
}
