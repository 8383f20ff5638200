use super::{Work, knob, plain};
use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, stream};
use sea_streamer::{
    Buffer as _, Consumer as _, ConsumerGroup, ConsumerMode, ConsumerOptions as _, Message as _, Producer as _, StreamKey, Streamer as _, StreamerUri,
    kafka::{AutoOffsetReset, FutureRecord, KafkaConsumerOptions, KafkaProducerOptions, KafkaStreamer},
};
use std::{collections::{HashMap, VecDeque}, time::{Duration, Instant}};

async fn streamer(work: &Work) -> anyhow::Result<KafkaStreamer> {
    let uri: StreamerUri = format!("kafka://{}", work.address).parse()?;
    Ok(KafkaStreamer::connect(uri, Default::default()).await?)
}

pub async fn publish(work: Work) -> anyhow::Result<Duration> {
    let streamer = streamer(&work).await?;
    let mut options = KafkaProducerOptions::default();
    options.add_custom_option("acks", "all").add_custom_option("enable.idempotence", "true").add_custom_option("linger.ms", knob("LINGER", 1).to_string());
    let producer = streamer.create_producer(StreamKey::new(&work.name)?, options).await?;
    let send = |n| {
        let key = Work::key(n);
        producer.send_record(FutureRecord::to(&work.name).key(&key).payload(&work.payload()).headers(plain::kafka_headers()))
    };
    send(0)?.await?;
    let began = Instant::now();
    if knob("VD", 1) > 0 {
        let mut window = VecDeque::new();
        for n in 0..work.count {
            if window.len() == knob("WINDOW", 1000) {
                window.pop_front().unwrap().await?;
            }
            window.push_back(send(n)?);
        }
        for s in window { s.await?; }
    } else {
        let sent = stream::iter(0..work.count).map(|n| { let s = send(n); async { s?.await } });
        sent.buffer_unordered(knob("WINDOW", 1000)).try_for_each(async |_| Ok(())).await?;
    }
    let took = began.elapsed();
    streamer.disconnect().await?;
    Ok(took)
}

pub async fn consume(work: Work) -> anyhow::Result<Duration> {
    let streamer = streamer(&work).await?;
    let mut options = KafkaConsumerOptions::new(ConsumerMode::LoadBalanced);
    options.set_consumer_group(ConsumerGroup::new(&work.name))?;
    options.set_auto_offset_reset(AutoOffsetReset::Earliest);
    options.set_enable_auto_offset_store(false);
    options.add_custom_option("fetch.queue.backoff.ms", knob("BACKOFF", 10).to_string());
    let mut consumer = streamer.create_consumer(&[StreamKey::new(&work.name)?], options).await?;
    let (mut got, mut began) = (0, None);
    let size = knob("BATCH", 500);
    while got < work.count {
        if size == 1 {
            let id = {
                let message = consumer.next().await?;
                began.get_or_insert_with(Instant::now);
                std::hint::black_box(message.message().into_bytes());
                message.identifier()
            };
            got += 1;
            consumer.store_offset_with(&id)?;
            continue;
        }
        let mut last = HashMap::new();
        {
            let mut messages = consumer.stream().take(size.min(work.count - got));
            while let Some(message) = messages.next().await {
                let message = message?;
                began.get_or_insert_with(Instant::now);
                got += 1;
                last.insert(message.shard_id(), message.sequence());
                std::hint::black_box(message.message().into_bytes());
            }
        }
        let key = StreamKey::new(&work.name)?;
        for (shard, sequence) in &last {
            consumer.store_offset(&key, shard, sequence)?;
        }
    }
    let took = began.context("messages")?.elapsed();
    tokio::task::spawn_blocking(|| drop(consumer)).await?;
    Ok(took)
}
