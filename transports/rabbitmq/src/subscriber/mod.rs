//! Receiving: a connection for each member of a group, and a channel for each queue it has.

mod feed;
mod hold;
mod leases;
mod member;

use crate::{
    connection::Broker,
    publisher::RabbitMqPublisher,
    topology::{CopyQueues, broadcast_queue},
};
use async_trait::async_trait;
use feed::{RabbitMqDeliveries, RabbitMqSettler};
use hold::Hold;
use member::Member;
use postrider_core::{Assignment, Error, ErrorKind, Feed, Result, Subscriber, Subscription, partition::Holds};
use rustc_hash::FxHashMap;
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::{Notify, mpsc, watch};

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
        let (ended, is_ended) = watch::channel(false);
        let shared = Arc::new(Shared {
            queue: match subscription.broadcast {
                true => broadcast_queue(&subscription.group),
                false => subscription.group.to_string(),
            },
            subscription: subscription.clone(),
            broker: self.broker.for_queue(&subscription.queue)?,
            publisher: self.publisher.clone(),
            copies: CopyQueues::default(),
            holds: Holds::default(),
            broken: Mutex::default(),
            changes: sender,
            stir: Notify::new(),
            closing: AtomicBool::new(false),
            is_ended,
        });
        // The first time in the caller's own time, so that whoever subscribes hears what is wrong.
        let member = Member::first(&shared).await?;
        let handle = Arc::new(Handle(shared.clone()));
        tokio::spawn(async move {
            member::run(&shared, member).await;
            let _ = ended.send(true);
        });
        Ok(Feed::new(
            RabbitMqDeliveries::new(handle.clone(), changes),
            RabbitMqSettler(handle),
        ))
    }
}

/// See [`Shared::prefetch`]. Members of another number must not meet those of this one.
const PREFETCH_IN_ORDER: u16 = 256;

/// What the two sides of a feed and its task share.
#[derive(Debug)]
struct Shared {
    subscription: Subscription,
    /// The queue of a group without partitions.
    queue: String,
    broker: Broker,
    publisher: RabbitMqPublisher,
    copies: CopyQueues,
    holds: Holds<Hold>,
    /// Partitions that could not be consumed, and when.
    broken: Mutex<FxHashMap<usize, Instant>>,
    changes: mpsc::UnboundedSender<Change>,
    /// Something has changed that the task is to look at.
    stir: Notify,
    closing: AtomicBool,
    is_ended: watch::Receiver<bool>,
}

/// What the two sides of a feed have. When both are gone, the task leaves the group by itself.
#[derive(Debug)]
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.begin_to_close();
    }
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
    Closed,
}

impl Shared {
    fn tell(&self, change: Change) {
        let _ = self.changes.send(change);
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    /// Whether members share partitions.
    fn is_shared(&self) -> bool {
        self.subscription.ordered && !self.subscription.broadcast
    }

    /// How many messages a queue may have handed to this member: enough that the broker need not be waited for. Of an ordered
    /// group all members have the same, whatever they may have in flight: a quorum queue puts what a consumer leaves behind
    /// what others have left, so one that had room for less than the one before it would leave that behind the rest.
    fn prefetch(&self) -> u16 {
        if self.subscription.ordered {
            return PREFETCH_IN_ORDER;
        }
        let wanted = self.subscription.max_in_flight.saturating_mul(2).clamp(16, 2000);
        u16::try_from(wanted).unwrap_or(2000)
    }

    fn begin_to_close(&self) {
        if !self.closing.swap(true, Ordering::AcqRel) {
            self.tell(Change::Closed);
        }
        self.stir.notify_one();
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        self.begin_to_close();
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
