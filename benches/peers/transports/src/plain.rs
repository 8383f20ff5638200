//! What surrounds a measurement, by the plain clients: the queue or topic made and filled before, looked at and removed after.

use super::{HEADERS, Work};
use anyhow::Context as _;
use futures_util::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use rdkafka::{
    ClientConfig, Offset, TopicPartitionList,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
    message::{Header, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use std::time::{Duration, Instant};

const PARTITIONS: i32 = 4;
const PATIENCE: Duration = Duration::from_secs(15);

async fn channel(work: &Work) -> anyhow::Result<(Connection, Channel)> {
    let connection = Connection::connect(&work.address, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

pub async fn rabbitmq_prepare(work: &Work, kind: &str) -> anyhow::Result<()> {
    let (connection, channel) = channel(work).await?;
    let mut arguments = FieldTable::default();
    if kind != "classic" {
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    }
    let options = QueueDeclareOptions {
        durable: true,
        ..Default::default()
    };
    channel.queue_declare(work.name.as_str().into(), options, arguments).await?;
    Ok(connection.close(200, "OK".into()).await?)
}

pub async fn rabbitmq_fill(work: &Work) -> anyhow::Result<()> {
    let (connection, channel) = channel(work).await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let (payload, all) = (work.payload(), Vec::from_iter(0..work.count));
    for some in all.chunks(1000) {
        let mut confirms = Vec::new();
        for &n in some {
            let mut headers = FieldTable::default();
            for (name, value) in HEADERS {
                headers.insert(name.into(), AMQPValue::LongString(value.into()));
            }
            headers.insert("ce_partitionkey".into(), AMQPValue::LongString(Work::key(n).into()));
            let properties = BasicProperties::default().with_delivery_mode(2).with_headers(headers);
            let options = BasicPublishOptions::default();
            let routing = work.name.as_str().into();
            confirms.push(channel.basic_publish("".into(), routing, options, &payload, properties).await?);
        }
        for confirm in try_join_all(confirms).await? {
            anyhow::ensure!(confirm.is_ack(), "{confirm:?}");
        }
    }
    Ok(connection.close(200, "OK".into()).await?)
}

/// Removes the queue, once so many messages lie in it (none: all were acknowledged, since their consumer is gone).
pub async fn rabbitmq_check(work: &Work, expected: usize) -> anyhow::Result<()> {
    let (connection, channel) = channel(work).await?;
    let passive = QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let began = Instant::now();
    loop {
        let queue = channel.queue_declare(work.name.as_str().into(), passive, FieldTable::default()).await?;
        if queue.message_count() as usize == expected && queue.consumer_count() == 0 {
            break;
        }
        let found = queue.message_count();
        anyhow::ensure!(began.elapsed() < PATIENCE, "{found} messages lie in the queue, not {expected}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    channel.queue_delete(work.name.as_str().into(), QueueDeleteOptions::default()).await?;
    Ok(connection.close(200, "OK".into()).await?)
}

fn config(work: &Work) -> ClientConfig {
    let mut config = ClientConfig::new();
    config.set("bootstrap.servers", &work.address).set("group.id", &work.name);
    config
}

pub async fn kafka_prepare(work: &Work) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = config(work).create()?;
    let topic = NewTopic::new(&work.name, PARTITIONS, TopicReplication::Fixed(1));
    for result in admin.create_topics([&topic], &AdminOptions::new()).await? {
        result.map_err(|(name, error)| anyhow::anyhow!("{name}: {error}"))?;
    }
    Ok(())
}

/// The headers as rdkafka has them.
pub fn kafka_headers() -> OwnedHeaders {
    let headers = OwnedHeaders::new_with_capacity(HEADERS.len());
    HEADERS.iter().fold(headers, |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(*value),
        })
    })
}

pub async fn kafka_fill(work: &Work) -> anyhow::Result<()> {
    let producer: FutureProducer = config(work).set("linger.ms", "5").create()?;
    let (payload, all) = (work.payload(), Vec::from_iter(0..work.count));
    for some in all.chunks(20_000) {
        let sent = some.iter().map(|&n| {
            let (key, producer, payload) = (Work::key(n), &producer, &payload);
            async move {
                let record = FutureRecord::to(&work.name).key(&key).payload(payload).headers(kafka_headers());
                producer.send(record, PATIENCE).await.map_err(|(error, _)| error)
            }
        });
        try_join_all(sent).await?;
    }
    Ok(())
}

/// Removes the topic, once it has so many messages, or the group has committed so many.
pub async fn kafka_check(work: &Work, expected: usize, committed: bool) -> anyhow::Result<()> {
    let consumer: BaseConsumer = config(work).create()?;
    let began = Instant::now();
    loop {
        let mut found = 0;
        for partition in 0..PARTITIONS {
            found += match committed {
                true => {
                    let mut one = TopicPartitionList::new();
                    one.add_partition(&work.name, partition);
                    let offsets = consumer.committed_offsets(one, PATIENCE)?;
                    match offsets.elements().first().context("an offset")?.offset() {
                        Offset::Offset(offset) => offset,
                        _ => 0,
                    }
                }
                false => consumer.fetch_watermarks(&work.name, partition, PATIENCE)?.1,
            };
        }
        if usize::try_from(found)? == expected {
            break;
        }
        anyhow::ensure!(began.elapsed() < PATIENCE, "{found} messages are there or committed, not {expected}");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let admin: AdminClient<DefaultClientContext> = config(work).create()?;
    admin.delete_topics(&[&work.name], &AdminOptions::new()).await?;
    Ok(())
}
