//! What surrounds a measurement on RabbitMQ, by the plain client: the queue made and filled before, looked at and removed
//! after.

use super::{HEADERS, Work};
use futures_util::future::try_join_all;
use lapin::{
    BasicProperties, Channel, Connection, ConnectionProperties,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::{AMQPValue, FieldTable},
};
use std::time::{Duration, Instant};

const PATIENCE: Duration = Duration::from_secs(60);
/// After its last ack and with the clock stopped, a consumer on RabbitMQ stays for so long: the broker's channel passes the
/// acks of a quorum queue on bit by bit, and when it is closed forgets those it still has.
pub const LINGER: Duration = Duration::from_secs(2);

async fn channel(work: &Work) -> anyhow::Result<(Connection, Channel)> {
    let connection = Connection::connect(&work.address, ConnectionProperties::default()).await?;
    let channel = connection.create_channel().await?;
    Ok((connection, channel))
}

pub async fn prepare(work: &Work, kind: &str) -> anyhow::Result<()> {
    let (connection, channel) = channel(work).await?;
    let mut arguments = FieldTable::default();
    if kind != "classic" {
        arguments.insert("x-queue-type".into(), AMQPValue::LongString(kind.into()));
    }
    let options = QueueDeclareOptions {
        durable: true,
        ..Default::default()
    };
    channel
        .queue_declare(work.name.as_str().into(), options, arguments)
        .await?;
    Ok(connection.close(200, "OK".into()).await?)
}

pub async fn fill(work: &Work) -> anyhow::Result<()> {
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
            confirms.push(
                channel
                    .basic_publish("".into(), routing, options, &payload, properties)
                    .await?,
            );
        }
        for confirm in try_join_all(confirms).await? {
            anyhow::ensure!(confirm.is_ack(), "{confirm:?}");
        }
    }
    Ok(connection.close(200, "OK".into()).await?)
}

/// Removes the queue, once so many messages lie in it (none: all were acknowledged, since their consumer is gone).
pub async fn check(work: &Work, expected: usize) -> anyhow::Result<()> {
    let (connection, channel) = channel(work).await?;
    let passive = QueueDeclareOptions {
        passive: true,
        ..Default::default()
    };
    let began = Instant::now();
    loop {
        let queue = channel
            .queue_declare(work.name.as_str().into(), passive, FieldTable::default())
            .await?;
        if queue.message_count() as usize == expected && queue.consumer_count() == 0 {
            break;
        }
        let found = queue.message_count();
        anyhow::ensure!(
            began.elapsed() < PATIENCE,
            "{found} messages lie in the queue, not {expected}"
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    channel
        .queue_delete(work.name.as_str().into(), QueueDeleteOptions::default())
        .await?;
    Ok(connection.close(200, "OK".into()).await?)
}
