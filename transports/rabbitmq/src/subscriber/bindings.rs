//! Whether the group's bindings are still there. An exchange that was deleted and declared anew has none, and says nothing of it:
//! what is published then reaches the groups that joined since, and no other.
//!
//! A queue of the member's own is bound like the group's, and a message that expires at once is sent to it now and then. When that
//! reaches no queue, the bindings are gone.

use crate::connection::{Connection, failed, is_reply};
use lapin::{
    BasicProperties, Channel, Confirmation,
    options::{BasicPublishOptions, ConfirmSelectOptions, QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use postrider_core::Result;
use std::time::Duration;

/// Between two looks.
pub(super) const EVERY: Duration = Duration::from_secs(5);

/// A queue that tells by what reaches it.
pub(super) struct Canary {
    channel: Channel,
    exchange: String,
    queue: String,
}

impl Canary {
    pub(super) async fn new(connection: &Connection, exchange: &str) -> Result<Self> {
        let making = async {
            let channel = connection.create_channel().await?;
            channel.confirm_select(ConfirmSelectOptions::default()).await?;
            let own = QueueDeclareOptions {
                exclusive: true,
                auto_delete: true,
                ..Default::default()
            };
            let queue = channel.queue_declare("".into(), own, FieldTable::default()).await?;
            let queue = queue.name().as_str().to_owned();
            let (options, none) = (QueueBindOptions::default(), FieldTable::default());
            channel
                .queue_bind(
                    queue.as_str().into(),
                    exchange.into(),
                    queue.as_str().into(),
                    options,
                    none,
                )
                .await?;
            Ok(Self {
                channel,
                exchange: exchange.to_owned(),
                queue,
            })
        };
        making.await.map_err(failed("watching the bindings"))
    }

    /// Whether what is bound to the exchange still is.
    pub(super) async fn lives(&self) -> Result<bool> {
        let mandatory = BasicPublishOptions {
            mandatory: true,
            immediate: false,
        };
        let sending = async {
            let sent = self.channel.basic_publish(
                self.exchange.as_str().into(),
                self.queue.as_str().into(),
                mandatory,
                b"",
                BasicProperties::default().with_expiration("0".into()),
            );
            sent.await?.await
        };
        match sending.await {
            Ok(Confirmation::Ack(None) | Confirmation::NotRequested) => Ok(true),
            Ok(_) => Ok(false),
            // No exchange at all.
            Err(why) if is_reply(&why, 404) => Ok(false),
            Err(why) => Err(failed("watching the bindings")(why)),
        }
    }
}
