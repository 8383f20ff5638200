//! RustStream, by its `Publisher` and `Subscriber` traits, which lie below its handlers and codecs.
//!
//! Tried, 256 bytes on two busy cores, a second:
//! - RabbitMQ, publish: 1000 calls at once 14 to 20 k; from 200 tasks 12 to 17 k; its owned transactions (a batch is written,
//!   then its confirms awaited) of 50 to 1000, together 1000 on their way, 7 to 17 k.
//! - RabbitMQ, consume: acks one after the other 6 k, 1000 at once 28 k; its batches of 100 the same, and they wait for a
//!   last one to fill. A prefetch of 1000, 2000 or 5000: no difference.
//! - Kafka, publish: 1000 calls at once 73 k, as from 1000 tasks; 10,000 at once are no better; a linger of 5 ms 57 k.
//! - Kafka, consume: acks (which only store an offset) one after the other 280 k, as in batches; librdkafka's default
//!   `fetch.queue.backoff.ms` of a second costs 40 %.

use super::{HEADERS, Work, rabbitmq};
use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use ruststream::{
    Broker as _, ConnectedBroker as _, HeaderMap, IncomingMessage as _, Lend, OutgoingMessage, Publisher, Subscriber,
    nonzero,
};
use ruststream_lapin::{LapinBroker, LapinPublish, RabbitQuorumQueue};
use ruststream_rdkafka::{Commit, KafkaBroker, KafkaPublish, KafkaTopic, StartOffset};
use std::time::{Duration, Instant};

/// `key` is the header that the adapter takes for the key of a message.
async fn one(
    publisher: &impl Publisher<Payload = Lend>,
    work: &Work,
    key: &'static str,
    n: usize,
) -> anyhow::Result<()> {
    let mut headers = HeaderMap::with_capacity(HEADERS.len() + 1);
    for (name, value) in HEADERS {
        headers.insert(name, value);
    }
    headers.insert(key, Work::key(n));
    let payload = work.payload();
    let message = OutgoingMessage::new(&work.name, &payload).with_headers(headers);
    Ok(publisher.publish(message, None).await?)
}

async fn publish(
    publisher: &impl Publisher<Payload = Lend>,
    work: &Work,
    key: &'static str,
) -> anyhow::Result<Duration> {
    one(publisher, work, key, 0).await?;
    let began = Instant::now();
    let calls = stream::iter(0..work.count).map(|n| one(publisher, work, key, n));
    calls.buffer_unordered(1000).try_collect::<()>().await?;
    Ok(began.elapsed())
}

/// With so many acknowledgements under way at once.
async fn consume(subscriber: &mut impl Subscriber, count: usize, acks: usize) -> anyhow::Result<Duration> {
    let mut began = None;
    let messages = subscriber.stream().take(count).map_err(anyhow::Error::from);
    let settled = messages.map_ok(|message| {
        began.get_or_insert_with(Instant::now);
        std::hint::black_box((message.payload(), message.headers()));
        async { Ok(message.ack().await?) }
    });
    settled.try_buffer_unordered(acks).try_collect::<()>().await?;
    Ok(began.context("messages")?.elapsed())
}

/// Its publisher with confirms; its messages are persistent by default.
pub async fn publish_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let broker = LapinBroker::new(&work.address).connect().await?;
    let publisher = broker.publisher(LapinPublish::default().confirms());
    let took = publish(&publisher, &work, ruststream_lapin::PARTITION_KEY_HEADER).await?;
    broker.shutdown().await?;
    Ok(took)
}

pub async fn consume_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let broker = LapinBroker::new(&work.address).connect().await?;
    let queue = RabbitQuorumQueue::new(&work.name).prefetch(nonzero!(2000));
    let mut subscriber = broker.subscribe(queue).await?;
    let took = consume(&mut subscriber, work.count, 1000).await?;
    tokio::time::sleep(rabbitmq::LINGER).await;
    drop(subscriber);
    broker.shutdown().await?;
    Ok(took)
}

/// A call returns with the delivery report.
pub async fn publish_kafka(work: Work) -> anyhow::Result<Duration> {
    let broker = KafkaBroker::new([&work.address])
        .producer_config("acks", "all")
        .producer_config("enable.idempotence", "true")
        .producer_config("linger.ms", "1");
    let broker = broker.connect().await?;
    let publisher = broker.publisher(KafkaPublish::default());
    let took = publish(&publisher, &work, ruststream_rdkafka::PARTITION_KEY_HEADER).await?;
    broker.shutdown().await?;
    Ok(took)
}

/// `Tracked`: the offset stored is the last before the first message without an ack. Committed in the background, each
/// five seconds and when the consumer closes.
pub async fn consume_kafka(work: Work) -> anyhow::Result<Duration> {
    let broker = KafkaBroker::new([&work.address]).connect().await?;
    let topic = KafkaTopic::new(&work.name).group(&work.name).commit(Commit::Tracked);
    let topic = topic
        .start(StartOffset::Earliest)
        .config("fetch.queue.backoff.ms", "10");
    let mut subscriber = broker.subscribe_with(topic).await?;
    let took = consume(&mut subscriber, work.count, 1).await?;
    drop(subscriber);
    broker.shutdown().await?;
    Ok(took)
}
