//! mq-bridge, by its publishers and consumers, without a route.
//!
//! Tried, 256 bytes on two busy cores, a second:
//! - RabbitMQ, publish: 1000 `send` calls at once 13 to 18 k; `send_batch` of 50 to 500, together 1000 on their way, 10 to
//!   17 k, in each comparison less.
//! - RabbitMQ, consume, from a classic queue: batches of 500 12.6 k, of 100 10.5 k; commits awaited later, or a prefetch of
//!   100 to 10,000, are no better. (The other peers get 9 to 15 k from a classic queue, where they get 18 to 28 k from a
//!   quorum queue: it is the queue that is slower here.)
//! - Kafka, publish: `send_batch` of 500, two at once, 75 k; of 250 69 k; up to 10,000 on their way no better; `send` 57 k; a
//!   linger of 5 ms 61 k. lz4, its default, gives 88 k with a payload of one letter: off, as the others are uncompressed.
//! - Kafka, consume: batches of 500, 1000 or 2000 200 k; with librdkafka's default `fetch.queue.backoff.ms` 130 k.

use super::{HEADERS, Work, rabbitmq};
use anyhow::{Context as _, bail};
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mq_bridge::{
    CanonicalMessage, SentBatch,
    endpoints::{
        amqp::{AmqpConsumer, AmqpPublisher},
        kafka::{KafkaConsumer, KafkaPublisher},
    },
    models::{AmqpConfig, KafkaConfig},
    traits::{MessageConsumer, MessageDisposition, MessagePublisher as _},
};
use std::time::{Duration, Instant};

const KEY: &str = "ce_partitionkey";

fn message(work: &Work, n: usize) -> CanonicalMessage {
    let message = CanonicalMessage::new(work.payload(), None).with_metadata_kv(KEY, Work::key(n));
    HEADERS.iter().fold(message, |message, (name, value)| {
        message.with_metadata_kv(*name, *value)
    })
}

fn amqp(work: &Work) -> AmqpConfig {
    AmqpConfig {
        url: work.address.clone(),
        queue: Some(work.name.clone()),
        // Heeded by its publisher only: the consumer declares a durable queue without `x-queue-type`, and RabbitMQ refuses
        // that for a quorum queue (PRECONDITION_FAILED, inequivalent arg).
        no_declare_queue: true,
        prefetch_count: Some(2000),
        ..Default::default()
    }
}

fn kafka(work: &Work) -> KafkaConfig {
    let option = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    KafkaConfig {
        url: work.address.clone(),
        topic: Some(work.name.clone()),
        group_id: Some(work.name.clone()),
        create_topic: Some(false),
        partition_key: Some(KEY.to_owned()),
        // acks=all and idempotence are its defaults.
        producer_options: Some(vec![option("compression.type", "none"), option("linger.ms", "1")]),
        consumer_options: Some(vec![option("fetch.queue.backoff.ms", "10")]),
        ..Default::default()
    }
}

/// A call returns with the confirm.
pub async fn publish_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let publisher = AmqpPublisher::new(&amqp(&work)).await?;
    publisher.send(message(&work, 0)).await?;
    let began = Instant::now();
    let calls = stream::iter(0..work.count).map(|n| publisher.send(message(&work, n)));
    calls.buffer_unordered(1000).try_for_each(async |_| Ok(())).await?;
    Ok(began.elapsed())
}

/// A call returns with the delivery reports of its batch.
pub async fn publish_kafka(work: Work) -> anyhow::Result<Duration> {
    let publisher = KafkaPublisher::new(&kafka(&work)).await?;
    publisher.send(message(&work, 0)).await?;
    let began = Instant::now();
    let calls = stream::iter((0..work.count).step_by(500)).map(async |from| {
        let batch = (from..work.count.min(from + 500)).map(|n| message(&work, n));
        match publisher.send_batch(batch.collect()).await? {
            SentBatch::Ack => Ok(()),
            failed => bail!("{failed:?}"),
        }
    });
    calls.buffer_unordered(2).try_collect::<()>().await?;
    Ok(began.elapsed())
}

async fn consume(consumer: &mut impl MessageConsumer, count: usize) -> anyhow::Result<Duration> {
    let (mut got, mut began) = (0, None);
    while got < count {
        let batch = consumer.receive_batch(500).await?;
        began.get_or_insert_with(Instant::now);
        got += batch.messages.len();
        let dispositions = vec![MessageDisposition::Ack; batch.messages.len()];
        std::hint::black_box(batch.messages);
        (batch.commit)(dispositions).await?;
    }
    Ok(began.context("messages")?.elapsed())
}

pub async fn consume_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let mut consumer = AmqpConsumer::new(&amqp(&work)).await?;
    let took = consume(&mut consumer, work.count).await?;
    tokio::time::sleep(rabbitmq::LINGER).await;
    Ok(took)
}

pub async fn consume_kafka(work: Work) -> anyhow::Result<Duration> {
    consume(&mut KafkaConsumer::new(&kafka(&work)).await?, work.count).await
}
