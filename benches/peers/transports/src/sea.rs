//! sea-streamer, on its Kafka backend.
//!
//! Its consumer gives a message's payload, but neither its key nor its headers, and lends what librdkafka holds, so it does
//! less than the others; the payload is copied here, as a handler would have it.
//!
//! Tried, 256 bytes on two busy cores, a second: publish, 1000 on their way 83 k; 10,000 on their way 82 k; a linger of 5 ms
//! 78 k. Consume, the offset of each message stored 560 k, of each batch of 500 750 k, of 100 or 1000 the same. (Its
//! `commit` waits for the broker, on a thread of its own, and commits the offset it is given, not the next one.)

use super::{Work, kafka};
use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sea_streamer::{
    Buffer as _, Consumer as _, ConsumerGroup, ConsumerMode, ConsumerOptions as _, Message as _, StreamKey,
    Streamer as _, StreamerUri,
    kafka::{AutoOffsetReset, FutureRecord, KafkaConsumerOptions, KafkaProducerOptions, KafkaStreamer},
};
use std::{
    collections::HashMap,
    time::{Duration, Instant},
};

async fn streamer(work: &Work) -> anyhow::Result<KafkaStreamer> {
    let uri: StreamerUri = format!("kafka://{}", work.address).parse()?;
    Ok(KafkaStreamer::connect(uri, Default::default()).await?)
}

/// What `send_record` returns is awaited for the delivery report.
pub async fn publish(work: Work) -> anyhow::Result<Duration> {
    let streamer = streamer(&work).await?;
    let mut options = KafkaProducerOptions::default();
    options.add_custom_option("acks", "all");
    options.add_custom_option("enable.idempotence", "true");
    options.add_custom_option("linger.ms", "1");
    let producer = streamer.create_producer(StreamKey::new(&work.name)?, options).await?;
    let one = async |n| {
        let (key, payload) = (Work::key(n), work.payload());
        let record = FutureRecord::to(&work.name).key(&key).payload(&payload);
        producer.send_record(record.headers(kafka::headers()))?.await
    };
    one(0).await?;
    let began = Instant::now();
    let calls = stream::iter(0..work.count).map(one);
    calls.buffer_unordered(1000).try_for_each(async |_| Ok(())).await?;
    let took = began.elapsed();
    streamer.disconnect().await?;
    Ok(took)
}

/// What is stored is committed in the background, each five seconds and when the consumer closes.
pub async fn consume(work: Work) -> anyhow::Result<Duration> {
    let mut options = KafkaConsumerOptions::new(ConsumerMode::LoadBalanced);
    options.set_consumer_group(ConsumerGroup::new(&work.name))?;
    options.set_auto_offset_reset(AutoOffsetReset::Earliest);
    options.set_enable_auto_offset_store(false);
    options.add_custom_option("fetch.queue.backoff.ms", "10");
    let (streamer, stream) = (streamer(&work).await?, StreamKey::new(&work.name)?);
    let mut consumer = streamer.create_consumer(std::slice::from_ref(&stream), options).await?;
    let (mut got, mut began, mut last) = (0, None, HashMap::new());
    while got < work.count {
        {
            let mut batch = consumer.stream().take(500.min(work.count - got));
            while let Some(message) = batch.next().await {
                let message = message?;
                began.get_or_insert_with(Instant::now);
                got += 1;
                last.insert(message.shard_id(), message.sequence());
                std::hint::black_box(message.message().into_bytes());
            }
        }
        for (shard, sequence) in last.drain() {
            consumer.store_offset(&stream, &shard, &sequence)?;
        }
    }
    Ok(began.context("messages")?.elapsed())
}
