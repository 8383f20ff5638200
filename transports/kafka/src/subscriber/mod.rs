//! Receiving: a client for each member of a group, served by a thread of its own, and a queue for each partition it has.
//!
//! Nothing is done inside the client's callbacks: they note what the group's coordinator wants, and the thread does it, after
//! what is out of a partition has been settled. The messages of each partition come in a queue of its own, so that the
//! client goes on serving the group while nobody takes messages.

mod beginning;
mod feed;
mod hold;
mod member;

use crate::{
    client::{Cluster, off_thread},
    publisher::KafkaPublisher,
    topology::dead_topic,
};
use async_trait::async_trait;
use feed::KafkaSource;
use hold::Hold;
use postrider_core::{Feed, Result, Subscriber, Subscription, partition::Membership, subscriber::nothing_to_declare};
use std::sync::Arc;

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
        let topology = self.publisher.topology();
        // A topic of dead letters that somebody named has to be there before there are any.
        let dead = subscription.queue.dead_letter_to.as_deref();
        let ensured = topology.ensure(topics.clone().chain(dead)).await;
        ensured.map_err(|error| self.cluster.while_joining(error))?;
        let partitions = topology.partitions(topics).await;
        let (membership, working) = Membership::begin();
        let shared = Arc::new(Shared {
            dead_topic: subscription
                .queue
                .dead_letter_to
                .clone()
                .unwrap_or_else(|| dead_topic(&subscription.group)),
            subscription: subscription.clone(),
            cluster: self.cluster.clone(),
            publisher: self.publisher.clone(),
            membership,
        });
        let feed = shared
            .membership
            .feed(KafkaSource::new(shared.membership.clone()), shared.clone());
        let started = off_thread(move || member::start(shared, partitions, working)).await?;
        started.map_err(|error| self.cluster.while_joining(error))?;
        Ok(feed)
    }

    /// A topic keeps its messages whether a group has read them or not, and a new group begins with the earliest: the topics are
    /// all that is to be declared.
    async fn declare(&self, subscription: &Subscription) -> Result<()> {
        if subscription.broadcast {
            return Err(nothing_to_declare(&subscription.group));
        }
        let topics = subscription.topics.iter().map(postrider_core::Topic::as_str);
        let dead = subscription.queue.dead_letter_to.as_deref();
        let ensured = self.publisher.topology().ensure(topics.chain(dead)).await;
        ensured.map_err(|error| self.cluster.while_joining(error))
    }
}

/// What the two sides of a feed and its thread share.
#[derive(Debug)]
struct Shared {
    subscription: Subscription,
    dead_topic: String,
    cluster: Cluster,
    publisher: KafkaPublisher,
    membership: Arc<Membership<Hold>>,
}
