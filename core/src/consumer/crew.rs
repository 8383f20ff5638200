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
    sync::CancellationToken,
    task::{AbortOnDropHandle, TaskTracker},
};

/// A handler that ran for so long without waiting gives its thread to the others.
const LONG: Duration = Duration::from_micros(200);

/// Work for the crew.
pub(super) enum Job {
    /// Messages of one key, one after the other; or one without a key.
    Run(Run),
    /// Messages that are handled together.
    Together(Arc<dyn AnyChain>, Vec<(Delivery, Option<u64>)>),
}

/// Messages of one key.
pub(super) struct Run {
    pub(super) key: Option<u64>,
    pub(super) deliveries: VecDeque<Delivery>,
}

/// What has come of it.
pub(super) enum Ended {
    /// One message of a run that goes on.
    Part(Finished),
    /// One message of a batch.
    One(Finished),
    /// The last of a run that ended: what is left of it has not been begun.
    Run {
        key: Option<u64>,
        /// `None` if it panicked: its delivery was released.
        last: Option<Finished>,
        left: VecDeque<Delivery>,
    },
    /// All of a batch have been told of, but for so many that a panic took, and their keys.
    Together { lost: Vec<Option<u64>> },
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
        let mut all = lock(&self.ended);
        all.push(ended);
        if all.len() == 1 {
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
    shared: Arc<Shared>,
    queue: Arc<Queue>,
    waiting: TaskTracker,
    kill: CancellationToken,
}

impl Member {
    async fn work(self) {
        loop {
            let mut work = std::pin::pin!(self.queue.work.notified());
            work.as_mut().enable();
            let job = lock(&self.queue.jobs).pop_front();
            let Some(job) = job else {
                work.await;
                continue;
            };
            tokio::task::coop::consume_budget().await;
            let began = self.shared.tools.clock.elapsed();
            let mut handling: BoxFuture<'static, ()> = match job {
                Job::Run(run) => Box::pin(handle(self.shared.clone(), self.queue.clone(), run)),
                Job::Together(chain, batch) => {
                    Box::pin(handle_together(self.shared.clone(), self.queue.clone(), chain, batch))
                }
            };
            // Most handlers of a busy group are quick: a task of its own, which costs more than they do, is for those that
            // wait. It is polled again there, so the waker of this first poll need not wake anybody.
            match handling.as_mut().poll(&mut TaskContext::from_waker(Waker::noop())) {
                Poll::Ready(()) => {}
                Poll::Pending => {
                    let kill = self.kill.clone();
                    self.waiting.spawn(async move {
                        kill.run_until_cancelled(handling).await;
                    });
                }
            }
            if self.shared.tools.clock.elapsed().saturating_sub(began) >= LONG {
                tokio::task::yield_now().await;
            }
        }
    }
}

/// Takes the messages of a run through their chain, until one does not simply succeed.
async fn handle(shared: Arc<Shared>, queue: Arc<Queue>, run: Run) {
    let Run { key, mut deliveries } = run;
    while let Some(delivery) = deliveries.pop_front() {
        let last = if delivery.gone().is_cancelled() {
            Some(Finished {
                settlement: delivery.release(),
                key,
                is_parked: false,
            })
        } else {
            let handling = AssertUnwindSafe(shared.handle(delivery, key)).catch_unwind();
            match handling.await {
                Ok(finished) => Some(finished),
                Err(_) => {
                    shared.panicked();
                    None
                }
            }
        };
        let goes_on = match &last {
            Some(last) => !last.is_parked && !last.settlement.comes_again() && !shared.stop.is_cancelled(),
            None => false,
        };
        match last {
            Some(last) if goes_on && !deliveries.is_empty() => queue.tell(Ended::Part(last)),
            last => {
                let left = std::mem::take(&mut deliveries);
                queue.tell(Ended::Run { key, last, left });
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
