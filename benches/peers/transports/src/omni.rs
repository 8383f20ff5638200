use super::{Work, knob};
use anyhow::Context as _;
use futures_util::{StreamExt as _, TryStreamExt as _, future::try_join_all, stream};
use omniqueue::{
    QueueBuilder, QueueConsumer as _, QueueProducer as _,
    backends::{RabbitMqBackend, RabbitMqConfig, rabbitmq},
};
use std::time::{Duration, Instant};

fn queue(work: &Work) -> QueueBuilder<RabbitMqBackend> {
    let mut properties = rabbitmq::ConnectionProperties::default();
    if knob("TOKIO", 1) > 0 {
        properties = properties.with_executor(tokio_executor_trait::Tokio::current()).with_reactor(tokio_reactor_trait::Tokio);
    }
    RabbitMqBackend::builder(RabbitMqConfig {
        uri: work.address.clone(),
        connection_properties: properties,
        publish_exchange: String::new(),
        publish_routing_key: work.name.clone(),
        publish_options: Default::default(),
        publish_properties: rabbitmq::BasicProperties::default().with_delivery_mode(2),
        consume_queue: work.name.clone(),
        consumer_tag: String::new(),
        consume_options: Default::default(),
        consume_arguments: Default::default(),
        consume_prefetch_count: Some(knob("PREFETCH", 2000) as u16),
        requeue_on_nack: true,
    })
}

pub async fn publish(work: Work) -> anyhow::Result<Duration> {
    let producer = queue(&work).build_producer().await?;
    let payload = work.payload();
    producer.send_raw(&payload).await?;
    let began = Instant::now();
    if knob("SEQ", 0) > 0 {
        for _ in 0..work.count {
            producer.send_raw(&work.payload()).await?;
        }
    } else {
        let sent = stream::iter(0..work.count).map(|_| async { producer.send_raw(&work.payload()).await });
        sent.buffer_unordered(knob("WINDOW", 1000)).try_collect::<()>().await?;
    }
    let took = began.elapsed();
    tokio::time::sleep(Duration::from_secs(2)).await;
    Ok(took)
}

pub async fn consume(work: Work) -> anyhow::Result<Duration> {
    let mut consumer = queue(&work).build_consumer().await?;
    let (mut got, mut began) = (0, None);
    while got < work.count {
        if knob("SEQ", 0) > 0 {
            let d = consumer.receive().await?;
            began.get_or_insert_with(Instant::now);
            std::hint::black_box(d.borrow_payload());
            d.ack().await.map_err(|(e, _)| e)?;
            got += 1;
            continue;
        }
        let some = consumer.receive_all(knob("BATCH", 500), Duration::from_secs(5)).await?;
        began.get_or_insert_with(Instant::now);
        got += some.len();
        if knob("SEQACK", 0) > 0 {
            for d in some {
                d.ack().await.map_err(|(e, _)| e)?;
            }
        } else {
            try_join_all(some.into_iter().map(|delivery| async { std::hint::black_box(delivery.borrow_payload()); delivery.ack().await.map_err(|(error, _)| error) })).await?;
        }
    }
    let took = began.context("messages")?.elapsed();
    tokio::time::sleep(Duration::from_secs(2)).await;
    Ok(took)
}
