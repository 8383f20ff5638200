use super::{Bus, Inner, accepting::Accepting, lifecycle::Lifecycle, tasks::Task};
use crate::{
    AnyEvent, Error, ErrorKind, EventLog, Limits, Mailbox, Message, Result, Topic, Transport,
    bus::TaskContext,
    clock::{Clock, SystemClock},
    consumer::{Layer, Middleware, SubscriptionOptions},
    health::{Board, Part, PartState, Status},
    relay::{RelayOptions, Reporter, Wake},
};
use std::{collections::HashMap, fmt, sync::Arc};

/// A bus being described.
#[must_use = "a bus comes into being with `.build()`"]
pub struct BusBuilder {
    log: Option<EventLog>,
    transport: Option<Transport>,
    clock: Option<Arc<dyn Clock>>,
    limits: Limits,
    source: String,
    relay: RelayOptions,
    seed: Option<u64>,
    relays: bool,
    tasks: Vec<Task>,
    layers: Vec<Layer<AnyEvent>>,
    subscriptions: HashMap<String, SubscriptionOptions>,
}

impl Default for BusBuilder {
    fn default() -> Self {
        Self {
            log: None,
            transport: None,
            clock: None,
            limits: Limits::default(),
            source: "postrider".to_owned(),
            relay: RelayOptions::default(),
            seed: None,
            relays: true,
            tasks: Vec::new(),
            layers: Vec::new(),
            subscriptions: HashMap::new(),
        }
    }
}

impl BusBuilder {
    /// Sets the event log. A bus without one can only [`publish_direct`](Bus::publish_direct) and subscribe.
    pub fn log(mut self, log: impl Into<EventLog>) -> Self {
        self.log = Some(log.into());
        self
    }

    /// Sets the transport.
    pub fn transport(mut self, transport: impl Into<Transport>) -> Self {
        self.transport = Some(transport.into());
        self
    }

    /// Sets what this application is called in the messages it publishes (the CloudEvents `source`); `postrider` if
    /// left out.
    pub fn source(mut self, source: impl Into<String>) -> Self {
        self.source = source.into();
        self
    }

    /// Sets how the relay works.
    pub fn relay(mut self, options: RelayOptions) -> Self {
        self.relay = options;
        self
    }

    /// Leaves what this process publishes to the relays of other processes on the same log: [`Bus::start`] starts none here,
    /// only background tasks.
    pub fn without_relay(mut self) -> Self {
        self.relays = false;
        self
    }

    /// Sets what a message may measure.
    pub fn limits(mut self, limits: Limits) -> Self {
        self.limits = limits;
        self
    }

    /// Sets the clock, for tests. The log's clock is the log's own: give it the same.
    pub fn clock(mut self, clock: Arc<dyn Clock>) -> Self {
        self.clock = Some(clock);
        self
    }

    /// Sets what the chances of backoff are drawn from, for tests that repeat.
    pub fn seed(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Puts something around the chain of every event type of every subscription, inside of what was put around them before.
    pub fn middleware(mut self, middleware: impl Middleware) -> Self {
        self.layers.push(Arc::new(middleware));
        self
    }

    /// Sets how the subscription of `group` works, over what its code says: what a configuration file's
    /// `[subscriptions.<group>]` is read into.
    pub fn subscription(mut self, group: impl Into<String>, options: SubscriptionOptions) -> Self {
        self.subscriptions.insert(group.into(), options);
        self
    }

    /// Adds a background task of yours: started by [`Bus::start`], told to stop by [`Bus::shutdown`].
    pub fn task<F, Fut>(mut self, name: impl Into<String>, run: F) -> Self
    where
        F: FnOnce(TaskContext) -> Fut + Send + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        self.tasks.push(Task::new(name.into(), run));
        self
    }

    /// The bus. Nothing is started or connected yet.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] that names what is missing or makes no sense.
    pub fn build(self) -> Result<Bus> {
        let transport = self.transport.ok_or_else(|| {
            let text = "the bus has no transport: add one with `.transport(…)`, such as `MemoryTransport::new()`";
            Error::new(ErrorKind::Config, text)
        })?;
        self.relay.validate()?;
        let mut limits = self.limits;
        if let Some(most) = transport.capabilities().max_message_bytes {
            limits.max_message_bytes = limits.max_message_bytes.min(most);
        }
        if limits.max_message_bytes == 0 {
            return Err(Error::new(
                ErrorKind::Config,
                "limits.max_message_bytes is 0: nothing could be published",
            ));
        }
        let probe = Message::new(Topic::new("source"), "source", "").with_source(self.source.clone());
        Limits::default().check(&probe).map_err(|e| {
            Error::new(
                ErrorKind::Config,
                "the bus's `source` cannot be the source of a message",
            )
            .because(e)
        })?;
        let history = self.log.as_ref().is_none_or(|log| log.capabilities().history);
        let mut relay = self.relay;
        if !history {
            relay.retention = std::time::Duration::ZERO;
        }
        let clock = self.clock.unwrap_or_else(SystemClock::shared);
        let status = Status::new(Part::Relay(Mailbox::outbox()), clock.clone(), PartState::Running);
        let built_at = clock.now();
        Ok(Bus(Arc::new(Inner {
            log: self.log,
            transport,
            clock,
            limits,
            source: self.source.into(),
            relay: Arc::new(relay),
            seed: self.seed,
            accepting: Accepting::default(),
            relays: self.relays,
            wake: Arc::new(Wake::default()),
            reporter: Arc::new(Reporter::new(status)),
            board: Board::default(),
            groups: Arc::default(),
            built_at,
            lifecycle: Lifecycle::new(self.tasks),
            layers: self.layers,
            subscriptions: self.subscriptions,
        })))
    }
}

impl fmt::Debug for BusBuilder {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("BusBuilder")
            .field("log", &self.log)
            .field("transport", &self.transport)
            .field("source", &self.source)
            .field("relay", &self.relay)
            .field("subscriptions", &self.subscriptions)
            .finish_non_exhaustive()
    }
}
