//! Receiving: a connection for each member of a group, and a channel for each queue it has.

mod feed;
mod hold;
mod member;

use crate::{connection::Broker, publisher::RabbitMqPublisher};
use async_trait::async_trait;
use feed::{RabbitMqDeliveries, RabbitMqSettler};
use hold::Hold;
use member::Member;
use postrider_core::{Assignment, Error, ErrorKind, Feed, Result, Subscriber, Subscription};
use rustc_hash::FxHashMap;
use std::{
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Notify, mpsc, watch};
use tokio_util::sync::{CancellationToken, DropGuard};

#[derive(Debug)]
pub(crate) struct RabbitMqSubscriber {
    broker: Broker,
    /// For copies of messages.
    publisher: RabbitMqPublisher,
}

impl RabbitMqSubscriber {
    pub(crate) fn new(broker: Broker, publisher: RabbitMqPublisher) -> Self {
        Self { broker, publisher }
    }
}

#[async_trait]
impl Subscriber for RabbitMqSubscriber {
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        let (sender, changes) = mpsc::unbounded_channel();
        let dropped = CancellationToken::new();
        let (ended, is_ended) = watch::channel(false);
        let shared = Arc::new(Shared {
            subscription: subscription.clone(),
            broker: self.broker.clone(),
            publisher: self.publisher.clone(),
            holds: Mutex::default(),
            changes: sender,
            stir: Arc::default(),
            closing: AtomicBool::new(false),
            is_ended,
            _dropped: dropped.clone().drop_guard(),
        });
        // The first time in the caller's own time, so that whoever subscribes hears what is wrong.
        let member = Member::join(&shared).await?;
        let work = member::run(Arc::downgrade(&shared), member, shared.stir.clone());
        tokio::spawn(async move {
            dropped.run_until_cancelled(work).await;
            let _ = ended.send(true);
        });
        Ok(Feed::new(
            RabbitMqDeliveries::new(shared.clone(), changes),
            RabbitMqSettler(shared),
        ))
    }
}

/// What the two sides of a feed and its task share.
#[derive(Debug)]
struct Shared {
    subscription: Subscription,
    broker: Broker,
    publisher: RabbitMqPublisher,
    holds: Mutex<FxHashMap<Assignment, Arc<Hold>>>,
    changes: mpsc::UnboundedSender<Change>,
    /// Something has changed that the task is to look at.
    stir: Arc<Notify>,
    closing: AtomicBool,
    is_ended: watch::Receiver<bool>,
    /// Ends the task when nobody is left.
    _dropped: DropGuard,
}

/// What the task tells of.
#[derive(Debug)]
enum Change {
    Opened(Arc<Hold>, lapin::Consumer),
    /// It goes to somebody else, or begins anew, once what is out of it has been settled.
    Revoked(Assignment),
    Lost(Assignment),
    /// The connection cannot be had; it is tried on.
    Failed(Error),
}

impl Shared {
    fn holds(&self) -> MutexGuard<'_, FxHashMap<Assignment, Arc<Hold>>> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, assignment: Assignment) -> Option<Arc<Hold>> {
        self.holds().get(&assignment).cloned()
    }

    fn tell(&self, change: Change) {
        let _ = self.changes.send(change);
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// How many messages a queue may have handed to this member: enough that the broker need not be waited for.
    fn prefetch(&self) -> u16 {
        let wanted = self.subscription.max_in_flight.saturating_mul(2).clamp(16, 2000);
        u16::try_from(wanted).unwrap_or(2000)
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        if !self.closing.swap(true, Ordering::AcqRel) {
            self.tell(Change::Revoked(Assignment(0)));
        }
        self.stir.notify_one();
        let mut is_ended = self.is_ended.clone();
        let ended = tokio::time::timeout(deadline, is_ended.wait_for(|ended| *ended)).await;
        match ended {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(
                ErrorKind::Unavailable,
                "RabbitMQ did not answer in time: what was acknowledged last may come again",
            )),
        }
    }
}
