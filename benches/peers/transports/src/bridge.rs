use super::{HEADERS, Work, knob};
use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use mq_bridge::{
    CanonicalMessage, SentBatch,
    endpoints::{
        amqp::{AmqpConsumer, AmqpPublisher},
        kafka::{KafkaConsumer, KafkaPublisher},
    },
    models::{AmqpConfig, KafkaConfig},
    traits::{MessageConsumer, MessageDisposition, MessagePublisher},
};
use std::{sync::Arc, time::{Duration, Instant}};

const KEY: &str = "ce_partitionkey";

fn message(work: &Work, n: usize) -> CanonicalMessage {
    let message = CanonicalMessage::new(work.payload(), None).with_metadata_kv(KEY, Work::key(n));
    HEADERS.iter().fold(message, |message, (name, value)| message.with_metadata_kv(*name, *value))
}

async fn publish(publisher: impl MessagePublisher + 'static, work: Work, size: usize, window: usize) -> anyhow::Result<Duration> {
    publisher.send(message(&work, 0)).await?;
    let publisher = Arc::new(publisher);
    let began = Instant::now();
    if size == 1 {
        let sent = stream::iter(0..work.count).map(|n| publisher.send(message(&work, n)));
        sent.buffer_unordered(window).try_for_each(async |_| Ok(())).await?;
        return Ok(began.elapsed());
    }
    let batches = stream::iter((0..work.count).step_by(size)).map(|from| {
        let (publisher, work) = (publisher.clone(), work.clone());
        let batch = async move {
            let to = (from + size).min(work.count);
            let messages = (from..to).map(|n| message(&work, n)).collect();
            match publisher.send_batch(messages).await? {
                SentBatch::Ack => anyhow::Ok(()),
                failed => anyhow::bail!("{failed:?}"),
            }
        };
        async { if knob("SPAWN", 1) > 0 { tokio::spawn(batch).await? } else { batch.await } }
    });
    batches.buffer_unordered(window / size).try_collect::<()>().await?;
    Ok(began.elapsed())
}

async fn consume(mut consumer: impl MessageConsumer, count: usize, size: usize) -> anyhow::Result<Duration> {
    let (mut got, mut began) = (0, None);
    let mut commits = tokio::task::JoinSet::new();
    while got < count {
        let batch = consumer.receive_batch(size).await?;
        began.get_or_insert_with(Instant::now);
        got += batch.messages.len();
        let dispositions = vec![MessageDisposition::Ack; batch.messages.len()];
        std::hint::black_box(batch.messages);
        if knob("CONC", 0) > 0 {
            if commits.len() >= knob("CONC", 0) { commits.join_next().await.unwrap()??; }
            commits.spawn((batch.commit)(dispositions));
        } else {
        (batch.commit)(dispositions).await?;
        }
    }
    while let Some(c) = commits.join_next().await { c??; }
    Ok(began.context("messages")?.elapsed())
}

fn amqp(work: &Work) -> AmqpConfig {
    AmqpConfig {
        url: work.address.clone(),
        queue: Some(work.name.clone()),
        no_declare_queue: true,
        prefetch_count: Some(knob("PREFETCH", 2000) as u16),
        ..Default::default()
    }
}

pub async fn publish_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let publisher = AmqpPublisher::new(&amqp(&work)).await?;
    publish(publisher, work, knob("BATCH", 500), knob("WINDOW", 1000)).await
}

pub async fn consume_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let consumer = AmqpConsumer::new(&amqp(&work)).await?;
    consume(consumer, work.count, knob("BATCH", 500)).await
}

fn kafka(work: &Work) -> KafkaConfig {
    let option = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    KafkaConfig {
        url: work.address.clone(),
        topic: Some(work.name.clone()),
        group_id: Some(work.name.clone()),
        create_topic: Some(false),
        partition_key: Some(KEY.to_owned()),
        producer_options: Some(vec![option("compression.type", if knob("LZ4", 0) > 0 { "lz4" } else { "none" }), option("linger.ms", &knob("LINGER", 1).to_string())]),
        consumer_options: Some(vec![option("fetch.queue.backoff.ms", &knob("BACKOFF", 10).to_string())]),
        ..Default::default()
    }
}

pub async fn publish_kafka(work: Work) -> anyhow::Result<Duration> {
    let publisher = KafkaPublisher::new(&kafka(&work)).await?;
    publish(publisher, work, knob("BATCH", 500), knob("WINDOW", 1000)).await
}

pub async fn consume_kafka(work: Work) -> anyhow::Result<Duration> {
    let consumer = KafkaConsumer::new(&kafka(&work)).await?;
    consume(consumer, work.count, knob("BATCH", 500)).await
}
