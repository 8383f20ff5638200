//! A transport as the bus holds it.

use crate::{Error, ErrorKind, Publisher, Result, Subscriber, Subscription};
use std::{fmt, sync::Arc};

/// What a transport promises about the order of messages of one (topic, key) within a group.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum Order {
    /// Nothing.
    #[default]
    None,
    /// Keys are spread over the members of a group, each key with one of them.
    Partitioned,
}

/// What a transport can do, told honestly: what is not declared is refused before it is tried, and the conformance kit
/// checks that it is.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Capabilities {
    /// The order of a key.
    pub order: Order,
    /// [`Disposition::Retry`](crate::Disposition::Retry).
    pub delayed_retry: bool,
    /// [`Disposition::DeadLetter`](crate::Disposition::DeadLetter).
    pub dead_letter: bool,
    /// Counts how often a message was delivered to a group.
    pub delivery_count: bool,
    /// Keeps an acknowledgement of a message behind one that is not settled, when their member goes. Without it, what counts
    /// is up to where everything is acknowledged.
    pub individual_acks: bool,
    /// [`Subscription::broadcast`].
    pub broadcast: bool,
    /// [`Subscription::patterns`].
    pub wildcards: bool,
    /// Which of the [`QueueOptions`](crate::subscriber::QueueOptions) it honours, by their names.
    pub queue_options: &'static [&'static str],
    /// The most bytes of a message, encoded; `None` if it knows no limit.
    pub max_message_bytes: Option<usize>,
}

impl Capabilities {
    /// Sets the order of a key.
    #[must_use]
    pub const fn with_order(mut self, order: Order) -> Self {
        self.order = order;
        self
    }
    /// Declares retries after a delay.
    #[must_use]
    pub const fn with_delayed_retry(mut self) -> Self {
        self.delayed_retry = true;
        self
    }
    /// Declares dead letters of its own.
    #[must_use]
    pub const fn with_dead_letter(mut self) -> Self {
        self.dead_letter = true;
        self
    }
    /// Declares that deliveries are counted.
    #[must_use]
    pub const fn with_delivery_count(mut self) -> Self {
        self.delivery_count = true;
        self
    }
    /// Declares that each acknowledgement counts by itself.
    #[must_use]
    pub const fn with_individual_acks(mut self) -> Self {
        self.individual_acks = true;
        self
    }
    /// Declares subscriptions of which each member gets everything.
    #[must_use]
    pub const fn with_broadcast(mut self) -> Self {
        self.broadcast = true;
        self
    }
    /// Declares subscriptions to every topic that matches a pattern.
    #[must_use]
    pub const fn with_wildcards(mut self) -> Self {
        self.wildcards = true;
        self
    }
    /// Sets which options of a group's queue it honours, by their names.
    #[must_use]
    pub const fn with_queue_options(mut self, names: &'static [&'static str]) -> Self {
        self.queue_options = names;
        self
    }
    /// Sets the most bytes of a message.
    #[must_use]
    pub const fn with_max_message_bytes(mut self, bytes: usize) -> Self {
        self.max_message_bytes = Some(bytes);
        self
    }
}

/// A transport as a bus holds it: the parts it has, and what it can do. The twin of [`EventLog`](crate::EventLog).
#[derive(Clone)]
pub struct Transport {
    name: &'static str,
    publisher: Option<Arc<dyn Publisher>>,
    subscriber: Option<Arc<dyn Subscriber>>,
    capabilities: Capabilities,
}

impl Transport {
    /// A transport called `name` (its Cargo feature and configuration kind) with no part yet.
    #[must_use]
    pub fn new(name: &'static str, capabilities: Capabilities) -> Self {
        Self {
            name,
            publisher: None,
            subscriber: None,
            capabilities,
        }
    }
    /// Adds the sending side.
    #[must_use]
    pub fn with_publisher(mut self, publisher: impl Publisher) -> Self {
        self.publisher = Some(Arc::new(publisher));
        self
    }
    /// Adds the receiving side.
    #[must_use]
    pub fn with_subscriber(mut self, subscriber: impl Subscriber) -> Self {
        self.subscriber = Some(Arc::new(subscriber));
        self
    }
    /// Wraps the sending side, if there is one, to meter it or to inject faults.
    #[must_use]
    pub fn map_publisher<P: Publisher>(mut self, wrap: impl FnOnce(Arc<dyn Publisher>) -> P) -> Self {
        self.publisher = self.publisher.map(|p| Arc::new(wrap(p)) as Arc<dyn Publisher>);
        self
    }
    /// Wraps the receiving side, if there is one.
    #[must_use]
    pub fn map_subscriber<S: Subscriber>(mut self, wrap: impl FnOnce(Arc<dyn Subscriber>) -> S) -> Self {
        self.subscriber = self.subscriber.map(|s| Arc::new(wrap(s)) as Arc<dyn Subscriber>);
        self
    }
    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }
    /// What it can do.
    #[must_use]
    pub fn capabilities(&self) -> &Capabilities {
        &self.capabilities
    }
    /// The sending side.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it has none.
    pub fn publisher(&self) -> Result<&Arc<dyn Publisher>> {
        self.publisher.as_ref().ok_or_else(|| self.lacks("a publisher"))
    }
    /// The receiving side, for `subscription`.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if it has none, or does not declare the order, the broadcast or the patterns
    /// of topics that are asked for.
    pub fn subscriber(&self, subscription: &Subscription) -> Result<&Arc<dyn Subscriber>> {
        if subscription.ordered && self.capabilities.order == Order::None {
            return Err(self
                .lacks("the order of keys: say `.unordered()` if the handlers do without it")
                .with("group", &subscription.group));
        }
        if subscription.broadcast && !self.capabilities.broadcast {
            return Err(self
                .lacks("broadcast: give each instance a group of its own")
                .with("group", &subscription.group));
        }
        let honoured = self.capabilities.queue_options;
        if let Some(name) = subscription.queue.names().find(|name| !honoured.contains(name)) {
            let error = Error::new(
                ErrorKind::Unsupported,
                "this transport does not honour an option of the subscription",
            );
            return Err(error
                .with("option", name)
                .with("transport", self.name)
                .with("group", &subscription.group));
        }
        if let Some(pattern) = subscription.patterns.first()
            && !self.capabilities.wildcards
        {
            return Err(self
                .lacks("topics by a pattern: name each of them, or see whether an option of the transport allows it")
                .with("pattern", pattern)
                .with("group", &subscription.group));
        }
        self.subscriber.as_ref().ok_or_else(|| self.lacks("a subscriber"))
    }

    fn lacks(&self, what: &'static str) -> Error {
        Error::new(ErrorKind::Unsupported, "this transport does not offer this")
            .with("missing", what)
            .with("transport", self.name)
    }
}

impl fmt::Debug for Transport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Transport")
            .field("name", &self.name)
            .field("publisher", &self.publisher.is_some())
            .field("subscriber", &self.subscriber.is_some())
            .field("capabilities", &self.capabilities)
            .finish()
    }
}
