use crate::{Error, ErrorKind, EventBus, GroupName, IntoMessage, Message, MessageId, Result};
use std::sync::Arc;

/// What a handler knows beside the event.
#[derive(Debug)]
pub struct Context {
    message: Message,
    group: Arc<GroupName>,
    attempt: u32,
    published: u32,
    bus: Arc<dyn EventBus>,
}

impl Context {
    pub(super) fn new(message: Message, group: Arc<GroupName>, bus: Arc<dyn EventBus>) -> Self {
        Self {
            message,
            group,
            attempt: 0,
            published: 0,
            bus,
        }
    }

    pub(super) fn begin_attempt(&mut self) {
        self.attempt += 1;
        self.published = 0;
    }

    /// The message the event came in: its id, headers, time.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.message
    }
    /// The group that handles it.
    #[must_use]
    pub fn group(&self) -> &GroupName {
        &self.group
    }
    /// Which attempt this is, from 1.
    #[must_use]
    pub fn attempt(&self) -> u32 {
        self.attempt
    }

    /// Publishes an event through the log, in a transaction of its own.
    ///
    /// Its id follows from the message's, the group and how many were published before it: a second attempt publishes
    /// the same event under the same id, so a receiver with an inbox drops the repeat.
    ///
    /// # Errors
    /// As [`Bus::publish`](crate::Bus::publish).
    pub async fn publish(&mut self, event: impl IntoMessage) -> Result<MessageId> {
        let n = self.published;
        self.published = n.checked_add(1).ok_or_else(|| {
            Error::new(
                ErrorKind::Invalid,
                "a handler published more events than can be counted",
            )
        })?;
        let id = MessageId::derived(self.message.id(), &self.group, n);
        self.bus.publish(event).id(id).await
    }
}
