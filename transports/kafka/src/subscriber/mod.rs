//! Receiving: a client for each member of a group, served by a thread of its own, and a queue for each partition it has.
//!
//! Nothing is done inside the client's callbacks: they note what the group's coordinator wants, and the thread does it, after
//! what is out of a partition has been settled. The messages of each partition come in a queue of its own, so that the
//! client goes on serving the group while nobody takes messages.

mod feed;
mod hold;
mod member;

use crate::{client::Cluster, publisher::KafkaPublisher};
use async_trait::async_trait;
use feed::{KafkaDeliveries, KafkaSettler};
use hold::Hold;
use postrider_core::{Assignment, Error, ErrorKind, Feed, Incoming, Result, Subscriber, Subscription};
use rustc_hash::FxHashMap;
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Notify, watch};

#[derive(Debug)]
pub(crate) struct KafkaSubscriber {
    cluster: Cluster,
    /// For dead letters, and the declaration of topics.
    publisher: KafkaPublisher,
}

impl KafkaSubscriber {
    pub(crate) fn new(cluster: Cluster, publisher: KafkaPublisher) -> Self {
        Self { cluster, publisher }
    }
}

#[async_trait]
impl Subscriber for KafkaSubscriber {
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        let topics = subscription.topics.iter().map(postrider_core::Topic::as_str);
        self.publisher.topology().ensure(topics).await?;
        let (ended, is_ended) = watch::channel(false);
        let shared = Arc::new(Shared {
            subscription: subscription.clone(),
            cluster: self.cluster.clone(),
            publisher: self.publisher.clone(),
            holds: Mutex::default(),
            told: Mutex::default(),
            news: Arc::default(),
            closing: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            changed: AtomicU64::new(0),
            is_ended,
        });
        member::start(&shared, ended)?;
        Ok(Feed::new(KafkaDeliveries::new(shared.clone()), KafkaSettler(shared)))
    }
}

/// What the two sides of a feed and its thread share.
#[derive(Debug)]
struct Shared {
    subscription: Subscription,
    cluster: Cluster,
    publisher: KafkaPublisher,
    holds: Mutex<FxHashMap<Assignment, Arc<Hold>>>,
    /// What the thread tells of.
    told: Mutex<VecDeque<Result<Incoming>>>,
    /// There are messages, or something was told.
    news: Arc<Notify>,
    closing: AtomicBool,
    /// The client has failed for good.
    has_failed: AtomicBool,
    /// Counts changes of the holds.
    changed: AtomicU64,
    is_ended: watch::Receiver<bool>,
}

impl Shared {
    fn holds(&self) -> MutexGuard<'_, FxHashMap<Assignment, Arc<Hold>>> {
        self.holds.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn hold(&self, assignment: Assignment) -> Option<Arc<Hold>> {
        self.holds().get(&assignment).cloned()
    }

    fn add(&self, hold: Arc<Hold>) {
        self.holds().insert(hold.assignment, hold);
        self.changed.fetch_add(1, Ordering::Release);
        self.news.notify_one();
    }

    fn remove(&self, assignment: Assignment) {
        self.holds().remove(&assignment);
        self.changed.fetch_add(1, Ordering::Release);
    }

    fn tell(&self, what: Result<Incoming>) {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).push_back(what);
        self.news.notify_one();
    }

    fn next_told(&self) -> Option<Result<Incoming>> {
        self.told.lock().unwrap_or_else(PoisonError::into_inner).pop_front()
    }

    fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Acquire)
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        self.closing.store(true, Ordering::Release);
        self.news.notify_one();
        let mut is_ended = self.is_ended.clone();
        match tokio::time::timeout(deadline, is_ended.wait_for(|ended| *ended)).await {
            Ok(_) => Ok(()),
            Err(_) => Err(Error::new(
                ErrorKind::Unavailable,
                "Kafka did not answer in time: what was acknowledged last may come again",
            )),
        }
    }
}
