use super::{Broker, HEADERS, Work, declare};
use anyhow::Context as _;
use postrider::Transport;
use postrider_testkit::server::Kafka;
use rdkafka::{
    ClientConfig, Message as _,
    consumer::{Consumer as _, StreamConsumer},
    error::KafkaError,
    message::{Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord, Producer as _, future_producer::DeliveryFuture},
    types::RDKafkaErrorCode,
};
use std::{
    collections::VecDeque,
    time::{Duration, Instant},
};

pub(super) struct KafkaBroker {
    server: Kafka,
}

impl KafkaBroker {
    pub(super) fn start() -> anyhow::Result<Self> {
        Ok(Self {
            server: Kafka::start_fast(),
        })
    }

    /// With the settings that ours has.
    fn producer(&self) -> anyhow::Result<FutureProducer> {
        Ok(ClientConfig::new()
            .set("bootstrap.servers", self.server.brokers())
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("linger.ms", "1")
            .set("partitioner", "murmur2_random")
            .create()?)
    }
}

fn headers() -> OwnedHeaders {
    let mut headers = OwnedHeaders::new_with_capacity(7);
    for (name, value) in HEADERS {
        headers = headers.insert(Header {
            key: &format!("ce_{name}"),
            value: Some(value),
        });
    }
    let content_type = Header {
        key: "content-type",
        value: Some("application/json"),
    };
    headers.insert(content_type)
}

async fn send(producer: &FutureProducer, topic: &str, n: usize, payload: &[u8]) -> anyhow::Result<DeliveryFuture> {
    let key = Work::key(n);
    let partition_key = Header {
        key: "ce_partitionkey",
        value: Some(&key),
    };
    let mut record = FutureRecord::to(topic)
        .key(&key)
        .payload(payload)
        .headers(headers().insert(partition_key));
    loop {
        match producer.send_result(record) {
            Ok(sent) => return Ok(sent),
            Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) => {
                record = again;
                tokio::time::sleep(Duration::from_millis(1)).await;
            }
            Err((error, _)) => return Err(error.into()),
        }
    }
}

async fn confirmed(sent: DeliveryFuture) -> anyhow::Result<()> {
    sent.await?.map(drop).map_err(|(error, _)| error.into())
}

impl Broker for KafkaBroker {
    const WINDOW: usize = 10_000;

    fn address(&self) -> String {
        self.server.brokers()
    }

    fn transport(&self) -> anyhow::Result<Transport> {
        let options = postrider::kafka::KafkaOptions::new(self.server.brokers()).with_partitions(4);
        Ok(postrider::kafka::transport_with(options)?)
    }

    /// A window of 10,000, confirms in order.
    async fn publish_raw(&self, work: &Work) -> anyhow::Result<Duration> {
        declare(self, &work.subscription.clone().unordered()).await?;
        let producer = self.producer()?;
        let (topic, payload, count) = (work.topic.to_string(), work.payload(), work.count);
        confirmed(send(&producer, &topic, 0, &payload).await?).await?;
        let publishing = tokio::spawn(async move {
            let began = Instant::now();
            let mut window = VecDeque::with_capacity(Self::WINDOW);
            for n in 0..count {
                if window.len() == Self::WINDOW
                    && let Some(oldest) = window.pop_front()
                {
                    confirmed(oldest).await?;
                }
                window.push_back(send(&producer, &topic, n, &payload.clone()).await?);
            }
            for sent in window {
                confirmed(sent).await?;
            }
            let took = began.elapsed();
            producer.flush(Duration::from_secs(5))?;
            anyhow::Ok(took)
        });
        publishing.await?
    }

    async fn publish_raw_from(&self, work: &Work, tasks: usize) -> anyhow::Result<Duration> {
        declare(self, &work.subscription.clone().unordered()).await?;
        let producer = self.producer()?;
        confirmed(send(&producer, work.topic.as_str(), 0, &work.payload()).await?).await?;
        let began = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for task in 0..tasks {
            let (producer, topic) = (producer.clone(), work.topic.to_string());
            let (payload, count) = (work.payload(), work.count / tasks);
            running.spawn(async move {
                for n in 0..count {
                    confirmed(send(&producer, &topic, n * tasks + task, &payload.clone()).await?).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = running.join_next().await {
            done??;
        }
        Ok(began.elapsed())
    }

    /// Borrowed, made our own, and the offset stored.
    async fn consume_raw(&self, work: &Work) -> anyhow::Result<Duration> {
        let consumer: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", self.server.brokers())
            .set("group.id", format!("{}-raw", work.subscription.group))
            .set("auto.offset.reset", "earliest")
            .set("enable.auto.offset.store", "false")
            .set("fetch.queue.backoff.ms", "10")
            .create()?;
        consumer.subscribe(&[work.topic.as_str()])?;
        let count = work.count;
        let consuming = tokio::spawn(async move {
            let (mut got, mut began) = (0, None);
            while got < count {
                let record = consumer.recv().await?;
                began.get_or_insert_with(Instant::now);
                got += 1;
                let headers = record.headers().into_iter().flat_map(|headers| headers.iter());
                let headers: Vec<(String, Vec<u8>)> = headers
                    .map(|h| (h.key.to_owned(), h.value.unwrap_or_default().to_vec()))
                    .collect();
                std::hint::black_box((
                    record.key().map(<[u8]>::to_vec),
                    headers,
                    record.payload().map(<[u8]>::to_vec),
                ));
                consumer.store_offset_from_message(&record)?;
            }
            let took = began.context("messages")?.elapsed();
            tokio::task::spawn_blocking(move || drop(consumer)).await?;
            anyhow::Ok(took)
        });
        consuming.await?
    }
}
