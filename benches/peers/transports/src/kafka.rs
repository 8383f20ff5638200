//! What surrounds a measurement on Kafka, by the plain client: the topic made and filled before, looked at and removed after.

use super::{HEADERS, Work};
use anyhow::Context as _;
use futures_util::future::try_join_all;
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
const PATIENCE: Duration = Duration::from_secs(60);

fn config(work: &Work) -> ClientConfig {
    let mut config = ClientConfig::new();
    config
        .set("bootstrap.servers", &work.address)
        .set("group.id", &work.name);
    config
}

pub async fn prepare(work: &Work) -> anyhow::Result<()> {
    let admin: AdminClient<DefaultClientContext> = config(work).create()?;
    let topic = NewTopic::new(&work.name, PARTITIONS, TopicReplication::Fixed(1));
    for result in admin.create_topics([&topic], &AdminOptions::new()).await? {
        result.map_err(|(name, error)| anyhow::anyhow!("{name}: {error}"))?;
    }
    Ok(())
}

/// The headers as rdkafka has them.
pub fn headers() -> OwnedHeaders {
    let headers = OwnedHeaders::new_with_capacity(HEADERS.len());
    HEADERS.iter().fold(headers, |headers, (key, value)| {
        headers.insert(Header {
            key,
            value: Some(*value),
        })
    })
}

pub async fn fill(work: &Work) -> anyhow::Result<()> {
    let producer: FutureProducer = config(work).set("linger.ms", "5").create()?;
    let (payload, all) = (work.payload(), Vec::from_iter(0..work.count));
    for some in all.chunks(20_000) {
        let sent = some.iter().map(|&n| {
            let (key, producer, payload) = (Work::key(n), &producer, &payload);
            async move {
                let record = FutureRecord::to(&work.name)
                    .key(&key)
                    .payload(payload)
                    .headers(headers());
                producer.send(record, PATIENCE).await.map_err(|(error, _)| error)
            }
        });
        try_join_all(sent).await?;
    }
    Ok(())
}

/// Removes the topic, once it has so many messages, or the group has committed so many.
pub async fn check(work: &Work, expected: usize, committed: bool) -> anyhow::Result<()> {
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
        anyhow::ensure!(
            began.elapsed() < PATIENCE,
            "{found} messages are there or committed, not {expected}"
        );
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    let admin: AdminClient<DefaultClientContext> = config(work).create()?;
    admin.delete_topics(&[&work.name], &AdminOptions::new()).await?;
    Ok(())
}
