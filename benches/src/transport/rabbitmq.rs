use super::{Broker, HEADERS, Work, declare};
use anyhow::Context as _;
use futures_util::{StreamExt as _, future::BoxFuture};
use lapin::{
    BasicProperties, Channel, Confirmation, Connection, ConnectionProperties,
    options::{BasicAckOptions, BasicConsumeOptions, BasicPublishOptions, BasicQosOptions, ConfirmSelectOptions},
    types::{AMQPValue, FieldTable},
};
use postrider::Transport;
use postrider_testkit::server::RabbitMq;
use std::{
    collections::VecDeque,
    task::{Context, Poll, Waker},
    time::{Duration, Instant},
};

pub(super) struct RabbitMqBroker {
    server: RabbitMq,
    exchange: String,
}

const MANDATORY: BasicPublishOptions = BasicPublishOptions {
    mandatory: true,
    immediate: false,
};

impl RabbitMqBroker {
    pub(super) fn start() -> Self {
        Self {
            server: RabbitMq::start(),
            exchange: "bench".to_owned(),
        }
    }

    async fn channel(&self) -> anyhow::Result<(Connection, Channel)> {
        let connection = Connection::connect(&self.server.url(), ConnectionProperties::default()).await?;
        let channel = connection.create_channel().await?;
        Ok((connection, channel))
    }

    async fn confirming(&self, work: &Work) -> anyhow::Result<(Connection, Channel)> {
        declare(self, &work.subscription.clone().unordered()).await?;
        let (connection, channel) = self.channel().await?;
        channel.confirm_select(ConfirmSelectOptions::default()).await?;
        Ok((connection, channel))
    }
}

/// As ours has them.
fn properties(key: &str) -> BasicProperties {
    let mut headers = FieldTable::default();
    for (name, value) in HEADERS {
        headers.insert(
            format!("cloudEvents_{name}").into(),
            AMQPValue::LongString(value.into()),
        );
    }
    headers.insert("cloudEvents_partitionkey".into(), AMQPValue::LongString(key.into()));
    BasicProperties::default()
        .with_delivery_mode(2)
        .with_message_id(HEADERS[1].1.into())
        .with_content_type("application/json".into())
        .with_type("bench.v1".into())
        .with_app_id("bench".into())
        .with_headers(headers)
}

/// One message, handed over; the future waits for its confirm.
async fn publish(channel: Channel, exchange: String, topic: String, n: usize, payload: Vec<u8>) -> anyhow::Result<()> {
    let (key, routing) = (Work::key(n), format!("{topic}.@.{}", n % 64));
    let sent = channel.basic_publish(exchange.into(), routing.into(), MANDATORY, &payload, properties(&key));
    let confirm = sent.await?.await?;
    anyhow::ensure!(matches!(confirm, Confirmation::Ack(None)), "{confirm:?}");
    Ok(())
}

impl Broker for RabbitMqBroker {
    const WINDOW: usize = 1000;

    fn address(&self) -> String {
        self.server.url()
    }

    fn transport(&self) -> anyhow::Result<Transport> {
        let options = postrider::rabbitmq::RabbitMqOptions::new(self.server.url()).with_exchange(&self.exchange);
        Ok(postrider::rabbitmq::transport_with(options)?)
    }

    /// A window of 1000, handed over without waiting for the socket, confirms in order.
    async fn publish_raw(&self, work: &Work) -> anyhow::Result<Duration> {
        let (connection, channel) = self.confirming(work).await?;
        let (topic, exchange, payload, count) = (
            work.topic.to_string(),
            self.exchange.clone(),
            work.payload(),
            work.count,
        );
        let publishing = tokio::spawn(async move {
            let began = Instant::now();
            let mut window: VecDeque<BoxFuture<'static, anyhow::Result<()>>> = VecDeque::new();
            for n in 0..count {
                if window.len() == Self::WINDOW
                    && let Some(oldest) = window.pop_front()
                {
                    oldest.await?;
                }
                let one = publish(channel.clone(), exchange.clone(), topic.clone(), n, payload.clone());
                let mut one: BoxFuture<'static, _> = Box::pin(one);
                match one.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                    Poll::Ready(done) => done?,
                    Poll::Pending => window.push_back(one),
                }
            }
            for one in window {
                one.await?;
            }
            anyhow::Ok(began.elapsed())
        });
        let took = publishing.await??;
        // Its channel may be closing already.
        let _ = connection.close(200, "OK".into()).await;
        Ok(took)
    }

    async fn publish_raw_from(&self, work: &Work, tasks: usize) -> anyhow::Result<Duration> {
        let (connection, channel) = self.confirming(work).await?;
        let began = Instant::now();
        let mut running = tokio::task::JoinSet::new();
        for task in 0..tasks {
            let (channel, exchange, topic) = (channel.clone(), self.exchange.clone(), work.topic.to_string());
            let (payload, count) = (work.payload(), work.count / tasks);
            running.spawn(async move {
                for n in 0..count {
                    let n = n * tasks + task;
                    publish(channel.clone(), exchange.clone(), topic.clone(), n, payload.clone()).await?;
                }
                anyhow::Ok(())
            });
        }
        while let Some(done) = running.join_next().await {
            done??;
        }
        let took = began.elapsed();
        // Its channel may be closing already.
        let _ = connection.close(200, "OK".into()).await;
        Ok(took)
    }

    /// A prefetch of 2000, and one acknowledgement for every hundred.
    async fn consume_raw(&self, work: &Work) -> anyhow::Result<Duration> {
        let (connection, channel) = self.channel().await?;
        channel.basic_qos(2000, BasicQosOptions::default()).await?;
        let queue = work.subscription.group.to_string();
        let mut consumer = channel
            .basic_consume(
                queue.into(),
                "".into(),
                BasicConsumeOptions::default(),
                FieldTable::default(),
            )
            .await?;
        let (mut count, mut began) = (0, None);
        while count < work.count {
            let delivery = consumer.next().await.context("a delivery")??;
            began.get_or_insert_with(Instant::now);
            count += 1;
            std::hint::black_box(&delivery.properties);
            if count % 100 == 0 || count == work.count {
                channel
                    .basic_ack(delivery.delivery_tag, BasicAckOptions { multiple: true })
                    .await?;
            }
        }
        let took = began.context("messages")?.elapsed();
        // Its channel may be closing already.
        let _ = connection.close(200, "OK".into()).await;
        Ok(took)
    }
}
