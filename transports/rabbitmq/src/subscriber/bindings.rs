//! Whether the group's bindings are still there. An exchange that was deleted and declared anew has none, and says nothing of it:
//! what is published then reaches the groups that joined since, and no other.
//!
//! A queue of the member's own is bound like the group's, and a message that expires at once is sent to it now and then. When that
//! reaches no queue, the bindings are gone. It is sent by the connection of copies: a broker that is low on memory reads nothing more
//! from connections that publish, and what a member acknowledges has to get through then, too.

use crate::{
    connection::{Connection, failed},
    publisher::RabbitMqPublisher,
};
use lapin::{
    Channel,
    options::{QueueBindOptions, QueueDeclareOptions},
    types::FieldTable,
};
use postrider_core::{PublishErrorKind, Result, Scope};
use std::time::Duration;

/// Between two looks.
pub(super) const EVERY: Duration = Duration::from_secs(5);

/// A queue that tells by what reaches it.
#[derive(Clone)]
pub(super) struct Canary {
    /// Its queue goes with it.
    _channel: Channel,
    publisher: RabbitMqPublisher,
    queue: String,
}

impl Canary {
    pub(super) async fn new(connection: &Connection, publisher: RabbitMqPublisher, exchange: &str) -> Result<Self> {
        let making = async {
            let channel = connection.create_channel().await?;
            let own = QueueDeclareOptions {
                exclusive: true,
                auto_delete: true,
                ..Default::default()
            };
            let queue = channel.queue_declare("".into(), own, FieldTable::default()).await?;
            let queue = queue.name().as_str().to_owned();
            let (options, none) = (QueueBindOptions::default(), FieldTable::default());
            let name = queue.as_str();
            channel
                .queue_bind(name.into(), exchange.into(), name.into(), options, none)
                .await?;
            Ok(Self {
                _channel: channel,
                publisher,
                queue,
            })
        };
        making.await.map_err(failed("watching the bindings"))
    }

    /// Whether what is bound to the exchange still is; `None` if that cannot be found out, without the right to write to it, say.
    pub(super) async fn lives(&self) -> Option<bool> {
        match self.publisher.probe(self.queue.clone()).await {
            Ok(()) => Some(true),
            Err(why) if why.is_unroutable() => Some(false),
            // The broker takes nothing just now.
            Err(why) if why.kind() == PublishErrorKind::Unavailable(Scope::Connection) => Some(true),
            // No exchange at all: whoever publishes next declares it.
            Err(why) if format!("{why:?}").contains("NOT_FOUND") => Some(true),
            Err(why) => {
                tracing::debug!(error = %why, "the bindings of a group are not watched any more");
                None
            }
        }
    }
}
