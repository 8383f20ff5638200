use super::{HEADERS, Work, knob};
use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, pin_mut, stream};
use ruststream::{
    BatchSubscriber, Broker as _, ConnectedBroker as _, HeaderMap, IncomingMessage as _, Lend, OutgoingMessage, OwnedTransactions as _,
    Publisher, Subscriber, Transaction as _,
};
use ruststream_lapin::{ConfirmsPublisher, LapinBroker, LapinPublish, RabbitQuorumQueue};
use ruststream_rdkafka::{Commit, KafkaBroker, KafkaPublish, KafkaTopic, StartOffset};
use std::{
    num::{NonZeroU16, NonZeroUsize},
    time::{Duration, Instant},
};

fn headers(key: &'static str, n: usize) -> HeaderMap {
    let mut headers = HeaderMap::with_capacity(HEADERS.len() + 1);
    for (name, value) in HEADERS {
        headers.insert(name, value);
    }
    headers.insert(key, Work::key(n));
    headers
}

async fn one<P: Publisher<Payload = Lend>>(publisher: &P, key: &'static str, work: &Work, n: usize) -> anyhow::Result<()> {
    let payload = work.payload();
    let message = OutgoingMessage::new(&work.name, &payload).with_headers(headers(key, n));
    Ok(publisher.publish(message, None).await?)
}

async fn publish<P: Publisher<Payload = Lend> + Clone + 'static>(publisher: &P, key: &'static str, work: &Work, window: usize) -> anyhow::Result<Duration> {
    one(publisher, key, work, 0).await?;
    let began = Instant::now();
    if knob("TASKS", 0) > 0 {
        let tasks = knob("TASKS", 0);
        let mut set = tokio::task::JoinSet::new();
        for task in 0..tasks {
            let (publisher, work) = (publisher.clone(), work.clone());
            set.spawn(async move {
                for n in (task..work.count).step_by(tasks) {
                    one(&publisher, key, &work, n).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(r) = set.join_next().await {
            r??;
        }
        return Ok(began.elapsed());
    }
    let sent = stream::iter(0..work.count).map(|n| one(publisher, key, work, n));
    sent.buffer_unordered(window).try_collect::<()>().await?;
    Ok(began.elapsed())
}

async fn batch(publisher: ConfirmsPublisher, work: Work, from: usize, to: usize) -> anyhow::Result<()> {
    let mut transaction = publisher.transaction().await?;
    for n in from..to {
        let message = OutgoingMessage::with_payload(&work.name, ruststream::BytesMut::from(&work.payload()[..])).with_headers(headers(ruststream_lapin::PARTITION_KEY_HEADER, n));
        transaction.publish(message, None).await?;
    }
    Ok(transaction.commit().await?)
}

pub async fn publish_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let broker = LapinBroker::new(&work.address).connect().await?;
    let publisher = broker.publisher(LapinPublish::default().confirms());
    let took = if knob("BATCH", 0) > 0 {
        let size = knob("BATCH", 0);
        one(&publisher, ruststream_lapin::PARTITION_KEY_HEADER, &work, 0).await?;
        let began = Instant::now();
        let starts = stream::iter((0..work.count).step_by(size));
        starts
            .map(|from| {
                let b = batch(publisher.clone(), work.clone(), from, (from + size).min(work.count));
                async move { tokio::spawn(b).await? }
            })
            .buffer_unordered(knob("WINDOW", 1000) / size)
            .try_collect::<()>()
            .await?;
        began.elapsed()
    } else {
        publish(&publisher, ruststream_lapin::PARTITION_KEY_HEADER, &work, knob("WINDOW", 1000)).await?
    };
    broker.shutdown().await?;
    Ok(took)
}

pub async fn publish_kafka(work: Work) -> anyhow::Result<Duration> {
    let broker = KafkaBroker::new([&work.address])
        .producer_config("acks", "all")
        .producer_config("enable.idempotence", "true")
        .producer_config("linger.ms", knob("LINGER", 1).to_string());
    let broker = broker.connect().await?;
    let publisher = broker.publisher(KafkaPublish::default());
    let took = publish(&publisher, ruststream_rdkafka::PARTITION_KEY_HEADER, &work, knob("WINDOW", 1000)).await?;
    broker.shutdown().await?;
    Ok(took)
}

async fn consume<S: Subscriber + BatchSubscriber>(mut subscriber: S, count: usize) -> anyhow::Result<Duration>
where S::Batch: IntoIterator<Item = S::Message> {
    let mut began = None;
    if knob("READY", 0) > 0 {
        let chunks = subscriber.stream().ready_chunks(knob("READY", 0));
        pin_mut!(chunks);
        let mut got = 0;
        while got < count {
            let some = chunks.next().await.context("m")?;
            began.get_or_insert_with(Instant::now);
            got += some.len();
            futures_util::future::try_join_all(some.into_iter().map(async |m| { let m = m?; std::hint::black_box((m.payload(), m.headers())); anyhow::Ok(m.ack().await?) })).await?;
        }
    } else if knob("BATCH", 0) > 0 {
        let batches = subscriber.batches(NonZeroUsize::new(knob("BATCH", 0)).unwrap());
        pin_mut!(batches);
        let mut got = 0;
        while got < count {
            let batch = batches.next().await.context("a batch")??;
            began.get_or_insert_with(Instant::now);
            let acks: Vec<_> = batch.into_iter().map(|m| { std::hint::black_box((m.payload(), m.headers())); m.ack() }).collect();
            got += acks.len();
            futures_util::future::try_join_all(acks).await?;
        }
    } else if knob("SEQ", 0) > 0 {
        let messages = subscriber.stream();
        pin_mut!(messages);
        for _ in 0..count {
            let message = messages.next().await.context("a message")??;
            began.get_or_insert_with(Instant::now);
            std::hint::black_box((message.payload(), message.headers()));
            message.ack().await?;
        }
    } else {
        let messages = subscriber.stream();
        let acks = messages.take(count).map_err(anyhow::Error::from).map_ok(|message| {
            began.get_or_insert_with(Instant::now);
            std::hint::black_box((message.payload(), message.headers()));
            async move { Ok(message.ack().await?) }
        });
        acks.try_buffer_unordered(knob("ACKS", 1000)).try_collect::<()>().await?;
    }
    let took = began.context("messages")?.elapsed();
    tokio::time::sleep(Duration::from_secs(2)).await;
    Ok(took)
}

pub async fn consume_rabbitmq(work: Work) -> anyhow::Result<Duration> {
    let broker = LapinBroker::new(&work.address).connect().await?;
    let prefetch = NonZeroU16::new(knob("PREFETCH", 2000) as u16).context("a prefetch")?;
    let queue = RabbitQuorumQueue::new(&work.name).prefetch(prefetch);
    let took = consume(broker.subscribe(queue).await?, work.count).await?;
    broker.shutdown().await?;
    Ok(took)
}

pub async fn consume_kafka(work: Work) -> anyhow::Result<Duration> {
    let broker = KafkaBroker::new([&work.address]).connect().await?;
    let mut topic = KafkaTopic::new(&work.name)
        .group(&work.name)
        .start(StartOffset::Earliest)
        .commit(Commit::Tracked);
    if knob("BACKOFF", 10) > 0 {
        topic = topic.config("fetch.queue.backoff.ms", knob("BACKOFF", 10).to_string());
    }
    let took = consume(broker.subscribe_with(topic).await?, work.count).await?;
    broker.shutdown().await?;
    Ok(took)
}
