//! Exchange, queues and bindings: their names, and their declaration.

use crate::{
    config::RabbitMqOptions,
    connection::{Broker, Connection, failed, is_reply, within},
};
use lapin::{
    Channel, ExchangeKind,
    options::{ExchangeDeclareOptions, QueueBindOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use postrider_core::{
    AttributeValue, Error, ErrorKind, GroupName, Message, MessageId, Result, Subscription, Topic, partition,
    relay::TopicPattern, subscriber::QueueOptions,
};
use rustc_hash::FxHashMap;
use std::{
    ops::Range,
    sync::{Mutex, MutexGuard, PoisonError},
    time::Duration,
};

/// What stands between topic and slot in a routing key: no topic has it.
const SLOT: &str = ".@.";
const SLOTS: usize = partition::SLOTS as usize;

pub(crate) fn routing_key(message: &Message, is_plain: bool) -> String {
    if is_plain {
        return message.topic().to_string();
    }
    let slot = partition::slot_of(message.key(), message.id());
    format!("{}{SLOT}{slot}", message.topic())
}

/// The topic in a routing key, of ours or a plain one.
pub(crate) fn topic_of(routing_key: &str) -> &str {
    routing_key.split_once(SLOT).map_or(routing_key, |(topic, _)| topic)
}

pub(crate) fn partition_queue(group: &GroupName, partition: usize) -> String {
    format!("{group}:{partition}")
}

/// It says how many there are, so that nobody who is told of fewer finds it.
pub(crate) fn lease_queue(group: &GroupName, partition: usize, partitions: usize) -> String {
    format!("{group}:{partition}/{partitions}:lease")
}

pub(crate) fn members_queue(group: &GroupName) -> String {
    format!("{group}:members")
}

/// Its consumers are members that have less than their part.
pub(crate) fn hungry_queue(group: &GroupName) -> String {
    format!("{group}:hungry")
}

/// The queue of one member of a broadcast.
pub(crate) fn broadcast_queue(group: &GroupName) -> String {
    format!("{group}:each:{}", MessageId::new())
}

pub(crate) fn dead_queue(group: &GroupName) -> String {
    format!("{group}:dead")
}

/// Delays are rounded up by at most an eighth, so that there are few queues of them.
pub(crate) fn rounded(delay: Duration) -> u64 {
    let millis = u64::try_from(delay.as_millis()).unwrap_or(u64::MAX).clamp(1, 1 << 40);
    let step = (millis.next_power_of_two() / 16).max(1);
    millis.div_ceil(step) * step
}

fn text(value: &str) -> AMQPValue {
    AMQPValue::LongString(value.into())
}

/// An argument of a queue as an operator writes it.
fn argument(value: &AttributeValue) -> AMQPValue {
    match value {
        AttributeValue::Integer(n) => AMQPValue::LongLongInt(i64::from(*n)),
        AttributeValue::Boolean(yes) => AMQPValue::Boolean(*yes),
        other => text(&other.to_string()),
    }
}

fn table(entries: &[(&str, AMQPValue)]) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in entries {
        table.insert((*name).into(), value.clone());
    }
    table
}

/// Hand-overs and crashes count as deliveries, and a message that reaches the limit is taken out of its queue: nobody shall reach it.
/// A policy may set a lower one, which then counts; what that takes out goes to the group's dead letters.
const DELIVERY_LIMIT: i64 = 1_000_000;
const OTHER_EXCHANGE: &str = "the exchange is there on RabbitMQ, but declared otherwise: it is direct by default, topic \
    `with_wildcards`. Say which it is, or use another name; deleted and declared anew it reaches no group that has not joined again";
/// How long, in milliseconds, the queue of a member of a broadcast is kept for it to come back.
const ABANDONED_AFTER: i64 = 10 * 60_000;

fn quorum(more: &[(&str, AMQPValue)]) -> FieldTable {
    let mut arguments = table(&[
        ("x-queue-type", text("quorum")),
        ("x-delivery-limit", AMQPValue::LongLongInt(DELIVERY_LIMIT)),
    ]);
    for (name, value) in more {
        arguments.insert((*name).into(), value.clone());
    }
    arguments
}

/// Declares things, or looks whether they are there. On a channel of its own, which a refusal closes. Each may take as long
/// as anything may: how many there are depends on the group.
pub(crate) struct Declaring<'a> {
    channel: Channel,
    options: &'a RabbitMqOptions,
    asked: &'a QueueOptions,
}

impl<'a> Declaring<'a> {
    pub(crate) async fn on(connection: &Connection, broker: &'a Broker) -> Result<Self> {
        let opening = async { connection.create_channel().await.map_err(failed("opening a channel")) };
        Ok(Self {
            channel: broker.in_time("opening a channel", opening).await?,
            options: broker.options(),
            asked: broker.queue(),
        })
    }

    pub(crate) async fn end(self) -> Result<()> {
        self.channel
            .close(200, "OK".into())
            .await
            .map_err(failed("closing a channel"))
    }

    /// The exchange that everything is published to. One that a group names is somebody else's, and only looked for.
    pub(crate) async fn exchange(&self) -> Result<()> {
        let name = &self.options.exchange;
        let kind = match self.options.wildcards {
            true => ExchangeKind::Topic,
            false => ExchangeKind::Direct,
        };
        let options = ExchangeDeclareOptions {
            durable: true,
            passive: !self.options.declares || self.asked.bind.is_some(),
            ..Default::default()
        };
        let declared = self
            .channel
            .exchange_declare(name.as_str().into(), kind, options, FieldTable::default());
        let refused = |why| match is_reply(&why, 406) {
            true => Error::new(ErrorKind::Config, OTHER_EXCHANGE)
                .with("exchange", name)
                .because(why),
            false => refused(why, "exchange", name),
        };
        let declared = async { declared.await.map_err(refused) };
        within(self.options.timeout, "declaring the exchange", declared).await
    }

    async fn queue(&self, name: &str, arguments: FieldTable) -> Result<()> {
        self.declare(name, arguments, !self.options.declares).await
    }

    /// Whether a queue is there, of whatever kind. On a channel of its own, which is closed where it is not.
    async fn has(&self, connection: &Connection, name: &str) -> Result<bool> {
        let options = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let looking = async {
            let channel = connection.create_channel().await.map_err(failed("opening a channel"))?;
            match channel.queue_declare(name.into(), options, FieldTable::default()).await {
                Ok(_) => channel
                    .close(200, "OK".into())
                    .await
                    .map(|()| true)
                    .map_err(failed("closing a channel")),
                Err(why) if is_reply(&why, 404) => Ok(false),
                // It is there, and exclusive to somebody.
                Err(why) if is_reply(&why, 405) => Ok(true),
                Err(why) => Err(refused(why, "queue", name)),
            }
        };
        within(self.options.timeout, "looking for a queue", looking).await
    }

    async fn declare(&self, name: &str, arguments: FieldTable, passive: bool) -> Result<()> {
        let options = QueueDeclareOptions {
            durable: true,
            passive,
            ..Default::default()
        };
        let declared = self.channel.queue_declare(name.into(), options, arguments);
        let declared = async { declared.await.map(drop).map_err(|why| refused(why, "queue", name)) };
        within(self.options.timeout, "declaring a queue", declared).await
    }

    /// Without an answer, which comes with the next declaration.
    async fn bind(&self, queue: &str, routing_key: &str) -> Result<()> {
        let options = QueueBindOptions { nowait: true };
        let exchange = self.options.exchange.as_str();
        let bound = self.channel.queue_bind(
            queue.into(),
            exchange.into(),
            routing_key.into(),
            options,
            FieldTable::default(),
        );
        bound.await.map_err(|why| refused(why, "binding of queue", queue))
    }

    /// Has the queue get the messages of these slots, and the plain ones, which have none, with the first slot.
    async fn bind_slots(&self, queue: &str, subscription: &Subscription, slots: Range<usize>) -> Result<()> {
        for topic in &subscription.topics {
            if slots.start == 0 {
                self.bind(queue, topic.as_str()).await?;
            }
            for slot in slots.clone() {
                self.bind(queue, &format!("{topic}{SLOT}{slot}")).await?;
            }
            // It answers when all of it is bound.
            self.exchange().await?;
        }
        for pattern in &subscription.patterns {
            let words = words_of(pattern)?;
            if slots.len() == SLOTS {
                self.bind(queue, &format!("{words}{SLOT}*")).await?;
            } else {
                for slot in slots.clone() {
                    self.bind(queue, &format!("{words}{SLOT}{slot}")).await?;
                }
            }
            self.exchange().await?;
        }
        Ok(())
    }

    /// The queue of one member of a broadcast. Declared even where nothing else is: its name is the member's own.
    pub(crate) async fn broadcast(&self, queue: &str, subscription: &Subscription) -> Result<()> {
        let arguments = quorum(&[("x-expires", AMQPValue::LongLongInt(ABANDONED_AFTER))]);
        self.declare(queue, arguments, false).await?;
        self.bind_slots(queue, subscription, 0..SLOTS).await
    }

    /// What the group's queues are told beside what they always are.
    fn arguments(&self, group: &GroupName) -> Vec<(&str, AMQPValue)> {
        let asked = self.asked;
        let further = self.options.queue_arguments.iter();
        let mut arguments: Vec<(&str, AMQPValue)> =
            further.map(|(name, value)| (name.as_str(), argument(value))).collect();
        let millis = |time: Duration| AMQPValue::LongLongInt(i64::try_from(time.as_millis()).unwrap_or(i64::MAX));
        arguments.extend(asked.expiry.map(|time| ("x-expires", millis(time))));
        arguments.extend(asked.message_expiry.map(|time| ("x-message-ttl", millis(time))));
        // What expires with no target of its own is lost, as was asked for; nothing else is.
        if asked.message_expiry.is_none() || asked.dead_letter_to.is_some() {
            let (exchange, routing_key) = self.way_to_dead(group);
            arguments.extend([
                ("x-dead-letter-exchange", text(exchange)),
                ("x-dead-letter-routing-key", text(&routing_key)),
                ("x-dead-letter-strategy", text("at-least-once")),
                ("x-overflow", text("reject-publish")),
            ]);
        }
        arguments
    }

    /// The exchange and the routing key that lead to the group's dead letters: over the exchange of our own, which its users may
    /// write to, where nobody else would get them, too.
    fn way_to_dead(&self, group: &GroupName) -> (&str, String) {
        match self.options.wildcards || self.asked.bind.is_some() {
            true => ("", self.dead_queue(group)),
            false => (&self.options.exchange, dead_queue(group)),
        }
    }

    fn dead_queue(&self, group: &GroupName) -> String {
        let asked = self.asked.dead_letter_to.clone();
        asked.unwrap_or_else(|| dead_queue(group))
    }

    /// The queues of a group, and what they are to get.
    pub(crate) async fn group(&self, connection: &Connection, subscription: &Subscription) -> Result<()> {
        let group = &subscription.group;
        // Before anything can go there.
        self.dead_letters(connection, group).await?;
        if !subscription.ordered {
            self.queue(group.as_str(), quorum(&self.arguments(group))).await?;
            return match self.options.declares {
                true => self.bind_slots(group.as_str(), subscription, 0..SLOTS).await,
                false => Ok(()),
            };
        }
        let partitions = self.options.partitions;
        let members = [
            ("x-queue-type", text("classic")),
            // It gets no messages. What it says is how many partitions there are, and nobody else may say otherwise.
            (
                "x-max-length",
                AMQPValue::LongLongInt(i64::try_from(partitions).unwrap_or(i64::MAX)),
            ),
        ];
        let members = self.queue(&members_queue(group), table(&members)).await;
        members.map_err(|error| {
            if error.kind() == ErrorKind::Config && self.options.declares {
                Error::new(
                    ErrorKind::Config,
                    "the group was declared with another number of partitions, which is fixed: use that, or another group",
                )
                .with("group", group)
                .with("partitions", partitions)
                .because(error)
            } else {
                error
            }
        })?;
        let classic = table(&[("x-queue-type", text("classic"))]);
        self.queue(&hungry_queue(group), classic.clone()).await?;
        for partition in 0..partitions {
            let lease = lease_queue(group, partition, partitions);
            self.queue(&lease, classic.clone()).await.map_err(|error| match error.kind() {
                // What it does not know of would be read by nobody. (Where it declares them, it has been told by now.)
                ErrorKind::Config if !self.options.declares => Error::new(
                    ErrorKind::Config,
                    "the group is not declared on RabbitMQ with this number of partitions: a member has to be told of all that there are",
                )
                .with("group", group)
                .with("partitions", partitions)
                .because(error),
                _ => error,
            })?;
            let name = partition_queue(group, partition);
            let mut arguments = self.arguments(group);
            arguments.push(("x-single-active-consumer", AMQPValue::Boolean(true)));
            self.queue(&name, quorum(&arguments)).await?;
            if self.options.declares {
                self.bind_slots(&name, subscription, slots(partition, partitions))
                    .await?;
            }
        }
        Ok(())
    }

    /// The queue of the group's dead letters. One that is there is taken as it is, of whatever kind.
    pub(crate) async fn dead_letters(&self, connection: &Connection, group: &GroupName) -> Result<String> {
        let name = self.dead_queue(group);
        match (&self.asked.dead_letter_to, self.options.declares) {
            (None, false) => {}
            (Some(_), _) if self.has(connection, &name).await? => {}
            _ => self.queue(&name, quorum(&[])).await?,
        }
        if let (true, (exchange, routing_key)) = (self.options.declares, self.way_to_dead(group))
            && !exchange.is_empty()
        {
            self.bind(&name, &routing_key).await?;
        }
        Ok(name)
    }

    /// A queue whose messages go to `queue` after `millis`.
    pub(crate) async fn retries(&self, group: &GroupName, queue: &str, millis: u64) -> Result<String> {
        let part = queue.strip_prefix(group.as_str()).unwrap_or_default();
        let name = format!("{group}:retry:{millis}{part}");
        let number = |value: u64| AMQPValue::LongLongInt(i64::try_from(value).unwrap_or(i64::MAX));
        let arguments = [
            ("x-message-ttl", number(millis)),
            // It goes when it has not been used for a while; a message in it is used to wait so long.
            (
                "x-expires",
                number(millis.saturating_mul(2).saturating_add(3_600_000).min(1 << 42)),
            ),
            ("x-dead-letter-exchange", text("")),
            ("x-dead-letter-routing-key", text(queue)),
            ("x-dead-letter-strategy", text("at-least-once")),
            ("x-overflow", text("reject-publish")),
        ];
        // Declared even where nothing else is: its name depends on the delay.
        self.declare(&name, quorum(&arguments), false).await?;
        Ok(name)
    }
}

/// Where a copy of a message goes.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) enum Copy {
    /// Back to this queue, after so many milliseconds.
    Retry(String, u64),
    /// To the group's dead letters.
    Dead,
}

/// The queues of copies that were declared, by what they are for.
#[derive(Debug, Default)]
pub(crate) struct CopyQueues(Mutex<FxHashMap<Copy, String>>);

impl CopyQueues {
    fn known(&self) -> MutexGuard<'_, FxHashMap<Copy, String>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Its name, declared.
    pub(crate) async fn queue(&self, broker: &Broker, group: &GroupName, copy: &Copy) -> Result<String> {
        if let Some(name) = self.known().get(copy) {
            return Ok(name.clone());
        }
        let declaring = async {
            let connection = broker.connect("copies").await?;
            let declaring = Declaring::on(&connection, broker).await?;
            match copy {
                Copy::Retry(queue, millis) => declaring.retries(group, queue, *millis).await,
                Copy::Dead => declaring.dead_letters(&connection, group).await,
            }
        };
        let name = broker.in_time("declaring a queue for copies", declaring).await?;
        self.known().insert(copy.clone(), name.clone());
        Ok(name)
    }

    /// It may be there no more.
    pub(crate) fn forget(&self, copy: &Copy) {
        self.known().remove(copy);
    }
}

/// The slots of a partition: each slot has one, and neighbours share it.
fn slots(partition: usize, partitions: usize) -> Range<usize> {
    (partition * SLOTS).div_ceil(partitions)..((partition + 1) * SLOTS).div_ceil(partitions)
}

/// A pattern as a topic exchange has it, in words: only what has a slot behind it is bound by one, so that nothing comes
/// to two partitions.
fn words_of(pattern: &TopicPattern) -> Result<String> {
    match pattern.as_str().trim_end_matches('*') {
        "" => Ok("*.#".to_owned()),
        // One word at least, for `orders.*` is not `orders`.
        beginning if beginning.ends_with('.') => Ok(format!("{beginning}*.#")),
        _ => Err(Error::new(
            ErrorKind::Unsupported,
            "RabbitMQ matches topics by whole words: a pattern of it is `*`, or ends with `.*`",
        )
        .with("pattern", pattern)),
    }
}

fn refused(why: lapin::Error, what: &'static str, name: &str) -> Error {
    let (kind, text) = if is_reply(&why, 404) {
        (
            ErrorKind::Config,
            "it is missing on RabbitMQ, and is not to be declared",
        )
    } else if is_reply(&why, 406) {
        (
            ErrorKind::Config,
            "it is there on RabbitMQ, but declared otherwise: delete it, or use another name",
        )
    } else if is_reply(&why, 403) {
        (ErrorKind::Config, "RabbitMQ does not permit it to this user")
    } else {
        (ErrorKind::Unavailable, "RabbitMQ failed")
    };
    Error::new(kind, text).with(what, name).because(why)
}

/// Topics by their names, as a feed meets them.
#[derive(Debug, Default)]
pub(crate) struct Topics(Vec<Topic>);

impl Topics {
    pub(crate) fn new(topics: &[Topic]) -> Self {
        Self(topics.to_vec())
    }
    /// The topic of this name. A plain client may publish under a routing key that is none: then it is the nearest to it,
    /// for the message is not to be lost.
    pub(crate) fn find(&mut self, name: &str) -> Topic {
        if let Some(topic) = self.0.iter().find(|topic| topic.as_str() == name) {
            return topic.clone();
        }
        let topic = Topic::parse(name.to_owned()).unwrap_or_else(|_| {
            let known = |c: char| c.is_ascii_alphanumeric() || matches!(c, '.' | '-' | '_');
            let near: String = name.chars().take(150).map(|c| if known(c) { c } else { '_' }).collect();
            Topic::parse(near).unwrap_or(Topic::new("unknown"))
        });
        // As many as anybody has, so that strangers cannot fill the memory.
        if self.0.len() < 1000 {
            self.0.push(topic.clone());
        }
        topic
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_slot_has_one_partition() {
        for partitions in [1, 3, 8, 64] {
            let mut all: Vec<usize> = (0..partitions).flat_map(|p| slots(p, partitions)).collect();
            all.sort_unstable();
            assert_eq!(all, (0..64).collect::<Vec<_>>());
            let of = |slot: usize| slot * partitions / SLOTS;
            assert!(
                (0..partitions)
                    .all(|p| !slots(p, partitions).is_empty() && slots(p, partitions).all(|slot| of(slot) == p))
            );
        }
    }

    #[test]
    fn patterns_are_of_whole_words() {
        let words = |pattern: &str| words_of(&TopicPattern::parse(pattern).unwrap());
        assert_eq!(words("orders.*").unwrap(), "orders.*.#");
        assert_eq!(words("*").unwrap(), "*.#");
        assert!(words("ord*").unwrap_err().to_string().contains("pattern: ord*"));
    }

    #[test]
    fn delays_are_rounded_up_a_little() {
        for millis in [1, 2, 15, 16, 17, 1000, 1001, 60_000, 86_400_000] {
            let got = rounded(Duration::from_millis(millis));
            assert!(got >= millis && got <= millis + millis / 8 + 1, "{millis}: {got}");
            assert_eq!(rounded(Duration::from_millis(got)), got);
        }
        let of_a_minute: std::collections::BTreeSet<u64> = (1..60_000)
            .map(|millis| rounded(Duration::from_millis(millis)))
            .collect();
        assert!(of_a_minute.len() < 150, "{}", of_a_minute.len());
    }

    #[test]
    fn topics_come_back_out_of_routing_keys() {
        let message = Message::new(Topic::new("orders.placed"), "e.v1", "").with_key("order-1");
        assert_eq!(routing_key(&message, false), "orders.placed.@.46");
        assert_eq!(topic_of(&routing_key(&message, false)), "orders.placed");
        assert_eq!(topic_of("orders.5"), "orders.5");
    }
}
