//! A bus on memory backends and a clock that only moves when told.

#![allow(dead_code, clippy::unwrap_used, clippy::panic)]

pub(crate) mod logs;

use async_trait::async_trait;
use postrider_core::{
    Bus, EventLog, Mailbox, Message, Outcomes, Publisher, Reachability, Topic, Transport,
    clock::ManualClock,
    log::{Filter, Page, Stats, Stored},
    memory::{MemoryLog, MemoryTransport},
    relay::RelayOptions,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

pub(crate) fn secs(n: u64) -> Duration {
    Duration::from_secs(n)
}

/// Options with a lease nothing outlasts: the clock makes great leaps.
pub(crate) fn options() -> RelayOptions {
    RelayOptions::default().with_lease(secs(1_000_000_000))
}

pub(crate) fn outbox() -> Mailbox {
    Mailbox::outbox()
}

/// A message whose payload is its name.
pub(crate) fn event(topic: &'static str, key: Option<&str>, name: &str) -> Message {
    let message = Message::new(Topic::new(topic), "test.v1", name.to_owned());
    key.map_or(message.clone(), |key| message.with_key(key))
}

pub(crate) fn name(message: &Message) -> String {
    String::from_utf8_lossy(message.payload()).into_owned()
}

pub(crate) struct World {
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) log: MemoryLog,
    pub(crate) transport: MemoryTransport,
    pub(crate) bus: Bus,
    calls: Arc<AtomicU32>,
}

impl World {
    /// A bus that has not been started.
    pub(crate) async fn new(options: RelayOptions) -> Self {
        let clock = ManualClock::shared();
        let log = MemoryLog::on_clock(clock.clone());
        let transport = MemoryTransport::on_clock(clock.clone());
        Self::on(clock, log, transport, options)
    }

    pub(crate) async fn start(options: RelayOptions) -> Self {
        let world = Self::new(options).await;
        world.bus.start().await.unwrap();
        world
    }

    /// Another bus on the same log and broker, started: as another process, or the same after a restart.
    pub(crate) async fn another(&self, options: RelayOptions) -> Self {
        let world = Self::on(self.clock.clone(), self.log.clone(), self.transport.clone(), options);
        world.bus.start().await.unwrap();
        world
    }

    fn on(clock: Arc<ManualClock>, log: MemoryLog, transport: MemoryTransport, options: RelayOptions) -> Self {
        let calls = Arc::new(AtomicU32::new(0));
        let counted = calls.clone();
        let metered = Transport::from(transport.clone()).map_publisher(|inner| Metered { inner, calls: counted });
        let bus = Bus::builder()
            .log(EventLog::from(log.clone()))
            .transport(metered)
            .relay(options)
            .source("test")
            .clock(clock.clone())
            .seed(1)
            .build()
            .unwrap();
        Self {
            clock,
            log,
            transport,
            bus,
            calls,
        }
    }

    pub(crate) fn count_publish_calls(&self) -> Arc<AtomicU32> {
        self.calls.clone()
    }

    /// Lets time pass, in steps that give the tasks their turns.
    pub(crate) async fn pass(&self, time: Duration) {
        const STEPS: u32 = 10;
        for _ in 0..STEPS {
            self.settle().await;
            self.clock.advance(time / STEPS);
        }
        self.settle().await;
    }

    /// Gives every task its turn, many times over.
    pub(crate) async fn settle(&self) {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
    }

    pub(crate) async fn until(&self, condition: impl Fn(&Self) -> bool) {
        self.until_async(async |world| condition(world)).await;
    }

    /// Waits for a condition, without letting time pass.
    pub(crate) async fn until_async(&self, condition: impl AsyncFn(&Self) -> bool) {
        for _ in 0..20_000 {
            if condition(self).await {
                return;
            }
            tokio::task::yield_now().await;
        }
        panic!(
            "what was waited for does not happen: {:?}\n{:#?}",
            self.bus.relay_report(),
            self.stats().await
        );
    }

    pub(crate) fn published(&self, topic: &'static str) -> Vec<String> {
        self.transport.published(&Topic::new(topic)).iter().map(name).collect()
    }

    /// First appearances.
    pub(crate) fn published_of_key(&self, topic: &'static str, key: &str) -> Vec<String> {
        let mut names = Vec::new();
        for message in self
            .transport
            .published(&Topic::new(topic))
            .iter()
            .filter(|m| m.key() == Some(key))
        {
            if !names.contains(&name(message)) {
                names.push(name(message));
            }
        }
        names
    }

    pub(crate) async fn stats(&self) -> Stats {
        let stats = self.bus.log().unwrap().admin().unwrap().stats().await.unwrap();
        stats.get(&outbox()).copied().unwrap_or_default()
    }

    pub(crate) async fn list(&self) -> Vec<Stored> {
        let admin = self.bus.log().unwrap().admin().unwrap();
        admin
            .list(&Filter::of(outbox()), &Page::first(1000))
            .await
            .unwrap()
            .entries
    }

    pub(crate) async fn show_by_name(&self, wanted: &str) -> Stored {
        self.list()
            .await
            .into_iter()
            .find(|stored| name(&stored.message) == wanted)
            .unwrap()
    }
}

/// A publisher that counts calls with something in them: wrapping changes nothing else.
#[derive(Debug)]
struct Metered {
    inner: Arc<dyn Publisher>,
    calls: Arc<AtomicU32>,
}

#[async_trait]
impl Publisher for Metered {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        self.calls.fetch_add(u32::from(!batch.is_empty()), Ordering::SeqCst);
        self.inner.publish(batch, outcomes).await;
    }
    async fn check(&self) -> Reachability {
        self.inner.check().await
    }
}

/// A subscription to the topic `t` that handles what comes.
pub(crate) async fn subscribe(bus: &Bus, group: &str) -> postrider_core::Result<postrider_core::Running> {
    bus.subscribe::<Test>(group).handler(async |_, _| Ok(())).start().await
}

/// The events that [`event`] makes, of the topic `t`.
#[derive(Debug)]
pub(crate) struct Test;

impl postrider_core::Event for Test {
    const NAME: &'static str = "test";
    const TOPIC: Topic = Topic::new("t");
    type Codec = Anything;
}

/// Takes whatever there is.
#[derive(Debug)]
pub(crate) struct Anything;

impl postrider_core::Codec<Test> for Anything {
    const CONTENT_TYPE: &'static str = "text/plain";
    fn encode(_: &Test) -> postrider_core::Result<bytes::Bytes> {
        Ok(bytes::Bytes::new())
    }
    fn decode(_: &bytes::Bytes) -> postrider_core::Result<Test> {
        Ok(Test)
    }
}
