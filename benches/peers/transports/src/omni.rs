//! omniqueue. Its producer never asks RabbitMQ for confirms and drops what lapin would tell of them, so its figure for
//! publishing is of handing messages over: the broker is still taking them when the clock stops. A message sent has neither
//! headers nor a key of its own.
//!
//! Tried, 256 bytes on two busy cores, a second: publish, one call after the other 57 k, 1000 at once 90 k; consume, with
//! `receive` and an ack each 7 k, `receive_all` of 500 and its acks one after the other 9 k, at once 33 k, of 100 23 k.
//! On lapin's default runtime, not tokio's, everything is the same or slower.

use super::{Work, rabbitmq};
use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all, stream};
use omniqueue::{
    QueueBuilder,
    backends::{
        RabbitMqBackend, RabbitMqConfig,
        rabbitmq::{BasicProperties, ConnectionProperties},
    },
};
use std::time::{Duration, Instant};

fn queue(work: &Work) -> QueueBuilder<RabbitMqBackend> {
    let properties = ConnectionProperties::default()
        .with_executor(tokio_executor_trait::Tokio::current())
        .with_reactor(tokio_reactor_trait::Tokio);
    RabbitMqBackend::builder(RabbitMqConfig {
        uri: work.address.clone(),
        connection_properties: properties,
        publish_exchange: String::new(),
        publish_routing_key: work.name.clone(),
        publish_options: Default::default(),
        publish_properties: BasicProperties::default().with_delivery_mode(2),
        consume_queue: work.name.clone(),
        consumer_tag: String::new(),
        consume_options: Default::default(),
        consume_arguments: Default::default(),
        consume_prefetch_count: Some(2000),
        requeue_on_nack: true,
    })
}

pub async fn publish(work: Work) -> anyhow::Result<Duration> {
    let producer = queue(&work).build_producer().await?;
    producer.send_raw(&work.payload()).await?;
    let began = Instant::now();
    let calls = stream::iter(0..work.count).map(|_| async { producer.send_raw(&work.payload()).await });
    calls.buffer_unordered(1000).try_collect::<()>().await?;
    let took = began.elapsed();
    // Dropped at once it lost its last message in one run of eight, though each call had returned without an error.
    std::mem::forget(producer);
    Ok(took)
}

pub async fn consume(work: Work) -> anyhow::Result<Duration> {
    let mut consumer = queue(&work).build_consumer().await?;
    let (mut got, mut began) = (0, None);
    while got < work.count {
        let some = consumer.receive_all(500, Duration::from_secs(10)).await?;
        anyhow::ensure!(!some.is_empty(), "no more messages came after {got}");
        began.get_or_insert_with(Instant::now);
        got += some.len();
        let acks = some.into_iter().map(|delivery| async {
            std::hint::black_box(delivery.borrow_payload());
            delivery.ack().await.map_err(|(error, _)| error)
        });
        try_join_all(acks).await?;
    }
    let took = began.context("messages")?.elapsed();
    tokio::time::sleep(rabbitmq::LINGER).await;
    Ok(took)
}
