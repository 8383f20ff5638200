//! Receiving: a connection for each member of a group, and a channel for each queue it has.

mod bindings;
mod feed;
mod hold;
mod leases;
mod member;

use crate::{
    connection::Broker,
    publisher::RabbitMqPublisher,
    topology::{CopyQueues, Declaring, broadcast_queue},
};
use async_trait::async_trait;
use feed::RabbitMqSource;
use hold::Hold;
use member::Member;
use postrider_core::{
    Feed, GroupName, Result, Subscriber, Subscription, partition::Membership, subscriber::nothing_to_declare,
};
use rustc_hash::FxHashMap;
use std::{
    sync::{Arc, Mutex},
    time::Instant,
};

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

    /// The group as its queues are named.
    fn named(&self, subscription: &Subscription) -> Result<Subscription> {
        let mut named = subscription.clone();
        let prefix = &self.broker.options().queue_prefix;
        if !prefix.is_empty() {
            named.group = GroupName::parse(format!("{prefix}{}", subscription.group))?;
        }
        Ok(named)
    }
}

#[async_trait]
impl Subscriber for RabbitMqSubscriber {
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        let subscription = &self.named(subscription)?;
        let (membership, working) = Membership::begin();
        let shared = Arc::new(Shared {
            queue: match subscription.broadcast {
                true => broadcast_queue(&subscription.group),
                false => subscription.group.to_string(),
            },
            subscription: subscription.clone(),
            broker: self.broker.for_queue(&subscription.queue)?,
            publisher: self.publisher.clone(),
            copies: CopyQueues::default(),
            membership,
            broken: Mutex::default(),
        });
        // The first time in the caller's own time, so that whoever subscribes hears what is wrong.
        let member = Member::first(&shared).await?;
        let feed = shared.membership.feed(RabbitMqSource::new(&shared), shared.clone());
        tokio::spawn(async move {
            member::run(&shared, member).await;
            drop(working);
        });
        Ok(feed)
    }

    async fn declare(&self, subscription: &Subscription) -> Result<()> {
        if subscription.broadcast {
            return Err(nothing_to_declare(&subscription.group));
        }
        let subscription = &self.named(subscription)?;
        let broker = self.broker.for_queue(&subscription.queue)?;
        let connection = broker.connect(&format!("declaring {}", subscription.group)).await?;
        let declaring = Declaring::on(&connection, &broker).await?;
        declaring.exchange().await?;
        declaring.group(&connection, subscription).await?;
        declaring.end().await
    }
}

/// What the two sides of a feed and its task share.
#[derive(Debug)]
struct Shared {
    subscription: Subscription,
    /// The queue of a group without partitions.
    queue: String,
    broker: Broker,
    publisher: RabbitMqPublisher,
    copies: CopyQueues,
    membership: Arc<Membership<Hold>>,
    /// Partitions that could not be consumed, and when.
    broken: Mutex<FxHashMap<usize, Instant>>,
}

impl Shared {
    /// Whether members share partitions.
    fn is_shared(&self) -> bool {
        self.subscription.ordered && !self.subscription.broadcast
    }

    /// How many messages a queue may have handed to this member: enough that the broker need not be waited for. Of an ordered
    /// group all members have the same, whatever they may have in flight: a quorum queue puts what a consumer leaves behind
    /// what others have left, so one that had room for less than the one before it would leave that behind the rest.
    fn prefetch(&self) -> u16 {
        if self.subscription.ordered {
            return self.broker.options().prefetch;
        }
        let wanted = self.subscription.max_in_flight.saturating_mul(2).clamp(16, 2000);
        u16::try_from(wanted).unwrap_or(2000)
    }
}
