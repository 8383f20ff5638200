//! The receiving side of a transport: what an author implements. What core makes of it is a [`Feed`].

mod feed;

pub use feed::{Delivery, Feed, Intake, Settlement, Settling, Taken};

use crate::{Error, GroupName, Message, Result, Topic, relay::TopicPattern};
use async_trait::async_trait;
use std::{
    fmt::Debug,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// What a group asks of its queue, where a transport has such a thing: names, times and rights that brokers have in common
/// and most applications leave alone. One that a transport does not [honour](crate::Capabilities::queue_options) is refused
/// at start, by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct QueueOptions {
    /// `queue_expiry`: the broker removes the group's queue, with what is in it, when nobody has used it for so long.
    pub expiry: Option<Duration>,
    /// `message_expiry`: a message that has waited so long is dead-lettered, if there is a target for it, and else lost.
    pub message_expiry: Option<Duration>,
    /// `dead_letter_to`: where messages go that expire, and dead letters where there is no event log.
    pub dead_letter_to: Option<String>,
    /// `bind`: the exchange or stream that the group takes from, in place of the transport's own: it has to be there.
    pub bind: Option<String>,
    /// `declare`: whether the group's queue is declared, or has to be there.
    pub declare: Option<bool>,
}

impl QueueOptions {
    /// The names of those that are set.
    pub fn names(&self) -> impl Iterator<Item = &'static str> {
        let all = [
            ("queue_expiry", self.expiry.is_some()),
            ("message_expiry", self.message_expiry.is_some()),
            ("dead_letter_to", self.dead_letter_to.is_some()),
            ("bind", self.bind.is_some()),
            ("declare", self.declare.is_some()),
        ];
        all.into_iter().filter(|(_, is_set)| *is_set).map(|(name, _)| name)
    }
}

/// What a group wants to receive.
#[derive(Debug, Clone, PartialEq, Eq)]
#[non_exhaustive]
pub struct Subscription {
    /// The group: each gets every message once, its members share them.
    pub group: GroupName,
    /// The topics; at least one, unless there are patterns.
    pub topics: Vec<Topic>,
    /// Further topics: all that match, those to come included. Refused at start if the transport cannot.
    pub patterns: Vec<TopicPattern>,
    /// Whether messages of one (topic, key) are to come in order. Refused at start if the transport cannot.
    pub ordered: bool,
    /// About how many messages may be unsettled: what a driver sizes its prefetch by, unless order needs another.
    pub max_in_flight: usize,
    /// Whether each member gets every message, from when it joined until it goes, in place of a share. Nothing waits for a
    /// member that has gone. Refused at start if the transport cannot.
    pub broadcast: bool,
    /// What is asked of the group's queue.
    pub queue: QueueOptions,
}

impl Subscription {
    /// A subscription of `group` to `topics`, in order, with up to 256 messages in flight.
    #[must_use]
    pub fn new(group: GroupName, topics: Vec<Topic>) -> Self {
        Self {
            group,
            topics,
            patterns: Vec::new(),
            ordered: true,
            max_in_flight: 256,
            broadcast: false,
            queue: QueueOptions::default(),
        }
    }
    /// Adds every topic that matches.
    #[must_use]
    pub fn with_pattern(mut self, pattern: TopicPattern) -> Self {
        self.patterns.push(pattern);
        self
    }
    /// Gives each member every message.
    #[must_use]
    pub fn broadcast(mut self) -> Self {
        self.broadcast = true;
        self
    }
    /// Does without the order of keys.
    #[must_use]
    pub fn unordered(mut self) -> Self {
        self.ordered = false;
        self
    }
    /// Sets how many messages may be in flight.
    #[must_use]
    pub fn with_max_in_flight(mut self, max: usize) -> Self {
        self.max_in_flight = max;
        self
    }
}

/// Receives messages from a broker.
#[async_trait]
pub trait Subscriber: Debug + Send + Sync + 'static {
    /// Joins a group.
    ///
    /// # Contract
    /// - Declares what the group needs; what is published from then on reaches the group, also while it has no member.
    ///   A new group begins at the earliest message the broker still has.
    /// - At least once: what was not settled when a member went comes back, to it or to another.
    /// - With [`ordered`](Subscription::ordered): per (topic, key) first appearances are in the order of publishing, and
    ///   no two members have messages of one key at once.
    /// - With [`broadcast`](Subscription::broadcast): every member gets what is published from then on until it goes, also
    ///   what is published while it reconnects. Nothing is kept for it when its feed was closed or dropped; what a broker
    ///   keeps for one whose process died goes after a while.
    ///
    /// Held by `transport::every_message_once_to_each_group`, `transport::competing_consumers_share`,
    /// `transport::a_late_subscriber_gets_what_waited`, `transport::order_per_key`,
    /// `transport::order_per_key_through_a_member_that_dies`, `transport::order_per_key_while_another_member_looks`,
    /// `transport::members_share_the_partitions`, `transport::a_rolling_deploy_loses_nothing`,
    /// `transport::a_broadcast_reaches_every_member`, `transport::a_pattern_takes_every_topic_that_matches`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`](crate::ErrorKind::Unsupported) for what was not declared as a capability;
    /// [`ErrorKind::Unavailable`](crate::ErrorKind::Unavailable) if the broker cannot be reached.
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed>;

    /// Declares what the group needs, and joins it not: what is published from then on waits for its first member.
    ///
    /// # Contract
    /// Does what [`subscribe`](Subscriber::subscribe) declares, and nothing else: no member counts, none is disturbed. A second
    /// call changes nothing, and adds the topics that are new. With [`broadcast`](Subscription::broadcast) there is nothing that
    /// could wait: refused.
    ///
    /// Held by `transport::what_is_published_to_a_declared_group_waits_for_it`.
    ///
    /// # Errors
    /// As [`subscribe`](Subscriber::subscribe).
    async fn declare(&self, subscription: &Subscription) -> Result<()>;
}

/// The error of [`declare`](Subscriber::declare) for a broadcast, whose members have nothing that outlasts them.
#[must_use]
pub fn nothing_to_declare(group: &GroupName) -> Error {
    let text = "a broadcast cannot be declared: nothing waits for a member that is not there";
    Error::new(crate::ErrorKind::Unsupported, text).with("group", group)
}

/// How a driver names a delivery: chosen by it, opaque to everybody else, unique within the feed until it is settled.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct DeliveryTag(pub u128);

impl DeliveryTag {
    /// A position in what an assignment hands out.
    #[must_use]
    pub const fn of(assignment: Assignment, position: u64) -> Self {
        Self((assignment.0 as u128) << 64 | position as u128)
    }

    /// The assignment and the position that it was made [`of`](DeliveryTag::of).
    #[must_use]
    #[allow(clippy::cast_possible_truncation)]
    pub const fn parts(self) -> (Assignment, u64) {
        (Assignment((self.0 >> 64) as u64), self.0 as u64)
    }
}

/// One stretch of having a partition, numbered by the driver: what a revocation refers to. Drivers without partitions
/// use [`Assignment::WHOLE`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Assignment(pub u64);

impl Assignment {
    /// All of the feed, for as long as it lasts.
    pub const WHOLE: Self = Self(0);

    /// One that nobody else in this process has.
    #[must_use]
    pub fn fresh() -> Self {
        static LAST: AtomicU64 = AtomicU64::new(0);
        Self(LAST.fetch_add(1, Ordering::Relaxed) + 1)
    }
}

/// A message as a driver hands it in.
#[derive(Debug, Clone)]
pub struct Received {
    /// The message.
    pub message: Message,
    /// What it is settled by.
    pub tag: DeliveryTag,
    /// How often it has been handed to this group, this time included; 1 where the broker does not count. A hint: it
    /// never decides what becomes of a message.
    pub delivery_count: u32,
    /// How many attempts the [retry](Disposition::Retry) that it comes from was told of; 0 where it comes from none.
    pub attempts: u32,
    /// What it came with.
    pub assignment: Assignment,
}

/// What comes out of [`Deliveries::next`].
#[derive(Debug)]
#[non_exhaustive]
pub enum Incoming {
    /// Messages: at least one.
    Batch(Vec<Received>),
    /// The partition is going to another member. Core settles or releases each of its deliveries: handlers under way finish,
    /// the rest is released at once. The driver lets the partition go as soon as none is outstanding. It waits as long as the
    /// broker lets it, for a handler may take its time, and in any case until [`close`](Settler::close) has to return; what it lets
    /// go unsettled comes to another member while a handler here still has it.
    Revoked(Assignment),
    /// The partition is gone already. What is settled of it from now on is in vain.
    Lost(Assignment),
    /// The broker no longer has messages that the group has not read: it has deleted them, for their age, say.
    Missed {
        /// How many, as far as is known; at least one.
        messages: u64,
        /// Of what, and why.
        why: String,
    },
}

/// How many messages wait with the broker, for a member to read them: a driver sets it now and then, a subscription's report
/// shows it. Clones are the same.
#[derive(Debug, Clone)]
pub struct Lag(Arc<AtomicU64>);

impl Default for Lag {
    /// One that is not known.
    fn default() -> Self {
        Self(Arc::new(AtomicU64::new(u64::MAX)))
    }
}

impl Lag {
    /// Sets it.
    pub fn set(&self, messages: u64) {
        self.0.store(messages, Ordering::Relaxed);
    }

    /// It is not known any more.
    pub fn forget(&self) {
        self.set(u64::MAX);
    }

    /// What it was when it was last looked; `None` if it is not known.
    #[must_use]
    pub fn get(&self) -> Option<u64> {
        Some(self.0.load(Ordering::Relaxed)).filter(|messages| *messages != u64::MAX)
    }
}

/// The author's side of a feed: where messages come from.
#[async_trait]
pub trait Deliveries: Debug + Send + 'static {
    /// Waits for at least one message, or for a change of assignment.
    ///
    /// # Contract
    /// - At most `max` messages. In order, where order was asked for.
    /// - Cancel-safe: takes nothing before its last await. Core calls it only while it has room, so not calling it is
    ///   the backpressure.
    /// - Reconnects by itself. An error is reported once and the next call goes on. One of
    ///   [`ErrorKind::Config`](crate::ErrorKind::Config) says that this member gets nothing, or not all of it, for a reason that only
    ///   an operator mends (rights, settings): the driver repeats it every 10 s while that lasts, and core shows it; after
    ///   [`ErrorKind::Closed`](crate::ErrorKind::Closed) nothing comes any more. Before a [`close`](Settler::close) that says
    ///   that the feed has ended and cannot be mended: core joins the group anew, with backoff.
    ///
    /// Held by `transport::unsettled_comes_back`, `transport::concurrent_close_loses_nothing`,
    /// `transport::a_closed_feed_says_so`, `transport::a_feed_outlives_the_broker`.
    async fn next(&mut self, max: usize) -> Result<Incoming>;
}

/// What becomes of a delivery.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[non_exhaustive]
pub enum Disposition {
    /// Done with it.
    Ack,
    /// Again, after a delay. Only where [`delayed_retry`](crate::Capabilities::delayed_retry) is declared.
    Retry {
        /// How long to wait.
        after: Duration,
        /// How many attempts have been made, to be [handed in](Received::attempts) with it.
        attempts: u32,
    },
    /// To the transport's own dead letters. Only where [`dead_letter`](crate::Capabilities::dead_letter) is declared.
    DeadLetter,
    /// Not done with it: to be delivered again, to this member or another.
    Release,
}

/// The author's side of a feed: where the outcome goes.
#[async_trait]
pub trait Settler: Debug + Send + Sync + 'static {
    /// Tells the broker what became of deliveries.
    ///
    /// # Contract
    /// - Returns within some seconds, also while the broker is away: what it cannot say now is an error, and the message comes
    ///   again. Core has one call at a time under way, and shows a settle that hangs as a fault of the subscription.
    /// - One outcome each, in order. `Ok` for an ack means that the message does not come back while the broker lives
    ///   as it promises and the feed is closed or dropped, and not killed: drivers may group acks, so of a member that is
    ///   killed what was acknowledged last may come again. Where [`individual_acks`](crate::Capabilities::individual_acks)
    ///   is not declared, so may what was acknowledged behind something unsettled when its member goes.
    /// - A tag that is not outstanding (its assignment is lost, the connection is another) is an error for that one and
    ///   acks nothing else.
    /// - What was released or retried comes back with a higher delivery count where that is declared, what was retried
    ///   with its attempts, and what follows it in its key comes behind it where order was asked for.
    ///
    /// Held by `transport::what_is_retried_comes_back`, `transport::what_is_released_comes_back_in_order`,
    /// `transport::a_second_settle_is_an_error`, `transport::dead_letters_do_not_come_back`,
    /// `transport::undeclared_is_refused`.
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>>;

    /// Ends the feed: no more deliveries, what was settled is flushed, what was not comes back. A feed that is dropped
    /// unclosed does the same by itself, soon.
    ///
    /// # Contract
    /// Returns within `deadline`. [`Deliveries::next`] answers [`ErrorKind::Closed`](crate::ErrorKind::Closed) from
    /// then on. A second call does nothing.
    ///
    /// Held by `transport::concurrent_close_loses_nothing`.
    async fn close(&self, deadline: Duration) -> Result<()>;
}

macro_rules! forward {
    ($pointer:ident) => {
        #[async_trait]
        impl<S: Subscriber + ?Sized> Subscriber for $pointer<S> {
            async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
                (**self).subscribe(subscription).await
            }
            async fn declare(&self, subscription: &Subscription) -> Result<()> {
                (**self).declare(subscription).await
            }
        }
        #[async_trait]
        impl<S: Settler + ?Sized> Settler for $pointer<S> {
            async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
                (**self).settle(batch).await
            }
            async fn close(&self, deadline: Duration) -> Result<()> {
                (**self).close(deadline).await
            }
        }
    };
}
forward!(Arc);
forward!(Box);

#[async_trait]
impl<D: Deliveries + ?Sized> Deliveries for Box<D> {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        (**self).next(max).await
    }
}

const _: fn(&dyn Subscriber, &dyn Deliveries, &dyn Settler) = |_, _, _| {};
