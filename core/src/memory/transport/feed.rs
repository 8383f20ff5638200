use super::{Broker, group::Group};
use crate::{
    Assignment, Deliveries, DeliveryTag, Disposition, Error, ErrorKind, Incoming, Received, Result, Settler,
    Subscription,
};
use async_trait::async_trait;
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// A member of a group. When the last handle on it goes without a close, what it holds comes back: as after a crash.
#[derive(Debug)]
pub(super) struct Member {
    group: Arc<Group>,
    broker: Arc<Broker>,
    ordered: bool,
    /// The group goes with its only member.
    broadcast: bool,
    id: u64,
    closed: AtomicBool,
}

impl Member {
    pub(super) fn new(group: Arc<Group>, broker: Arc<Broker>, subscription: &Subscription) -> Self {
        let id = {
            let mut state = group.state();
            state.last_member += 1;
            state.last_member
        };
        Self {
            group,
            broker,
            ordered: subscription.ordered,
            broadcast: subscription.broadcast,
            id,
            closed: AtomicBool::new(false),
        }
    }

    fn leave(&self) {
        let mut state = self.group.state();
        // Under the lock: nothing is taken once this has come back.
        self.closed.store(true, Ordering::Release);
        state.release_all(self.id);
        drop(state);
        if self.broadcast {
            self.broker.state().forget(&self.group);
        }
        self.group.news.notify_waiters();
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    fn take(&self, max: usize) -> Result<(Vec<Received>, Option<Duration>)> {
        let now = self.broker.clock.elapsed();
        let mut state = self.group.state();
        if self.is_closed() {
            return Err(Error::new(ErrorKind::Closed, "the subscription has been closed"));
        }
        let taken = state.take(self.id, self.ordered, max, now);
        let received = taken.into_iter().map(|(tag, entry)| Received {
            message: entry.message,
            tag: DeliveryTag(u128::from(tag)),
            delivery_count: entry.delivery_count,
            attempts: entry.attempts,
            assignment: Assignment::WHOLE,
        });
        Ok((
            received.collect(),
            state.next_delayed().map(|at| at.saturating_sub(now)),
        ))
    }
}

impl Drop for Member {
    fn drop(&mut self) {
        if !self.is_closed() {
            self.leave();
        }
    }
}

#[derive(Debug)]
pub(super) struct MemoryDeliveries(pub(super) Arc<Member>);

#[async_trait]
impl Deliveries for MemoryDeliveries {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        let member = &self.0;
        loop {
            let mut news = std::pin::pin!(member.group.news.notified());
            news.as_mut().enable();
            let (received, delayed_for) = member.take(max)?;
            if !received.is_empty() {
                return Ok(Incoming::Batch(received));
            }
            // Nothing is held over these awaits: cancelled here, nothing is lost.
            match delayed_for {
                None => news.await,
                Some(delay) => tokio::select! {
                    biased;
                    () = news => {}
                    () = member.broker.clock.sleep(delay) => {}
                },
            }
        }
    }
}

#[derive(Debug)]
pub(super) struct MemorySettler(pub(super) Arc<Member>);

#[async_trait]
impl Settler for MemorySettler {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let member = &self.0;
        let now = member.broker.clock.elapsed();
        let mut state = member.group.state();
        let outcomes = batch
            .iter()
            .map(|(tag, disposition)| {
                // Tags of ours fit; any other is not outstanding.
                let tag = u64::try_from(tag.0).unwrap_or(0);
                let known = match disposition {
                    Disposition::Ack => state.ack(tag, member.id),
                    Disposition::Retry { after, attempts } => state.retry(tag, member.id, now + *after, *attempts),
                    Disposition::DeadLetter => state.dead_letter(tag, member.id),
                    Disposition::Release => state.release(tag, member.id),
                };
                if known {
                    Ok(())
                } else {
                    Err(Error::new(ErrorKind::LeaseLost, "the delivery is not outstanding").with("tag", tag))
                }
            })
            .collect();
        drop(state);
        member.group.news.notify_waiters();
        outcomes
    }

    async fn close(&self, _deadline: Duration) -> Result<()> {
        if !self.0.is_closed() {
            self.0.leave();
        }
        Ok(())
    }
}
