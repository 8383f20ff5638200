//! Receiving: a client for each member of a group, served by a thread of its own, and a queue for each partition it has.
//!
//! Nothing is done inside the client's callbacks: they note what the group's coordinator wants, and the thread does it, after
//! what is out of a partition has been settled. The messages of each partition come in a queue of its own, so that the
//! client goes on serving the group while nobody takes messages.

mod feed;
mod hold;
mod member;

use crate::{
    client::{Cluster, off_thread},
    publisher::KafkaPublisher,
};
use async_trait::async_trait;
use feed::{KafkaDeliveries, KafkaSettler};
use hold::Hold;
use postrider_core::{Error, ErrorKind, Feed, Incoming, Result, Subscriber, Subscription, partition::Holds};
use std::{
    collections::VecDeque,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
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
            holds: Holds::default(),
            told: Mutex::default(),
            news: Arc::default(),
            closing: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            is_ended,
        });
        let handle = Arc::new(Handle(shared.clone()));
        off_thread(move || member::start(shared, ended)).await??;
        Ok(Feed::new(KafkaDeliveries::new(handle.clone()), KafkaSettler(handle)))
    }
}

/// What the two sides of a feed and its thread share.
#[derive(Debug)]
struct Shared {
    subscription: Subscription,
    cluster: Cluster,
    publisher: KafkaPublisher,
    holds: Holds<Hold>,
    /// What the thread tells of.
    told: Mutex<VecDeque<Result<Incoming>>>,
    /// There are messages, or something was told.
    news: Arc<Notify>,
    closing: AtomicBool,
    /// The client has failed for good.
    has_failed: AtomicBool,
    is_ended: watch::Receiver<bool>,
}

/// What the two sides of a feed have. When both are gone, the thread leaves the group by itself.
#[derive(Debug)]
struct Handle(Arc<Shared>);

impl Drop for Handle {
    fn drop(&mut self) {
        self.0.closing.store(true, Ordering::Release);
    }
}

impl Shared {
    fn add(&self, hold: Arc<Hold>) {
        self.holds.add(hold);
        self.news.notify_one();
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
