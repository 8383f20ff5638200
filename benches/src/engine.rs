//! What the engine itself costs, on the memory backends and one core. The raw limit is the same work in a loop: the
//! event is encoded, put in a queue, taken out, decoded, and given to the handler.

use crate::{Size, table::Table};
use async_trait::async_trait;
use postrider::{
    Bus, Event, Message, Outcomes, Publisher, Reachability, RelayOptions, Transport,
    event::{Codec as _, DynEvent as _, Json},
    memory::{MemoryLog, MemoryTransport},
};
use std::{
    collections::VecDeque,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "bench.keyless")]
struct Keyless {
    n: u64,
    text: String,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "bench.keyed", key = |e: &Self| e.n % 1000)]
struct Keyed {
    n: u64,
    text: String,
}

/// A publisher that confirms at once.
#[derive(Debug, Default)]
pub(crate) struct NoOp(pub(crate) Arc<AtomicUsize>);

#[async_trait]
impl Publisher for NoOp {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        self.0.fetch_add(batch.len(), Ordering::Relaxed);
        outcomes.report_rest(Ok(()));
    }
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

impl NoOp {
    pub(crate) fn transport(self) -> Transport {
        Transport::new("no-op", postrider::Capabilities::default()).with_publisher(self)
    }
}

fn options() -> RelayOptions {
    RelayOptions::default().with_retention(Duration::ZERO)
}

fn one_core() -> anyhow::Result<tokio::runtime::Runtime> {
    Ok(tokio::runtime::Builder::new_current_thread().enable_all().build()?)
}

fn messages<E: Event>(n: usize, make: impl Fn(u64) -> E) -> anyhow::Result<Vec<Message>> {
    (0..n as u64).map(|n| Ok(make(n).to_message()?)).collect()
}

/// Encoded, queued, taken, decoded, handled: without an engine.
fn raw<E: Event<Codec = Json> + serde::Serialize + serde::de::DeserializeOwned>(
    n: usize,
    make: impl Fn(u64) -> E,
) -> anyhow::Result<Duration> {
    let messages = messages(n, make)?;
    let handled = AtomicUsize::new(0);
    let began = Instant::now();
    let mut queue: VecDeque<Message> = messages.into_iter().collect();
    while let Some(message) = queue.pop_front() {
        let event: E = Json::decode(message.payload())?;
        std::hint::black_box(event);
        handled.fetch_add(1, Ordering::Relaxed);
    }
    Ok(began.elapsed())
}

/// Waits, on the one core, until `done` has counted to `n`.
async fn until(done: &AtomicUsize, n: usize) {
    while done.load(Ordering::Relaxed) < n {
        tokio::task::yield_now().await;
    }
}

/// A backlog through the relay to a publisher that confirms at once.
fn relay<E: Event>(n: usize, make: impl Fn(u64) -> E) -> anyhow::Result<Duration> {
    let sent = Arc::new(AtomicUsize::new(0));
    let bus = Bus::builder()
        .log(MemoryLog::new())
        .transport(NoOp(sent.clone()).transport())
        .relay(options())
        .build()?;
    let messages = messages(n, make)?;
    one_core()?.block_on(async {
        bus.publish_all(messages).await?;
        let began = Instant::now();
        bus.start().await?;
        until(&sent, n).await;
        let took = began.elapsed();
        bus.shutdown(Duration::from_secs(10)).await?;
        Ok(took)
    })
}

/// A backlog through the relay, the memory broker and a chain of one handler.
fn whole<E: Event>(n: usize, make: impl Fn(u64) -> E) -> anyhow::Result<Duration> {
    let transport = MemoryTransport::new().with_retention(0);
    let bus = Bus::builder()
        .log(MemoryLog::new())
        .transport(transport)
        .relay(options())
        .build()?;
    let messages = messages(n, make)?;
    let handled = Arc::new(AtomicUsize::new(0));
    one_core()?.block_on(async {
        bus.subscribe::<E>("bench")
            .state(handled.clone())
            .max_in_flight(4000)
            .handler(async |handled: &AtomicUsize, event, _ctx| {
                std::hint::black_box(event);
                handled.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
            .start()
            .await?;
        bus.publish_all(messages).await?;
        let began = Instant::now();
        bus.start().await?;
        until(&handled, n).await;
        let took = began.elapsed();
        bus.shutdown(Duration::from_secs(10)).await?;
        Ok(took)
    })
}

/// Computes for 10 ms on one core.
fn compute() {
    let began = Instant::now();
    let mut x = 1u64;
    while began.elapsed() < Duration::from_millis(10) {
        for _ in 0..1000 {
            x = std::hint::black_box(x.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1));
        }
    }
}

/// Events whose handlers compute, in a group on a runtime of two threads.
fn computing(n: usize) -> anyhow::Result<Duration> {
    let bus = Bus::builder()
        .log(MemoryLog::new())
        .transport(MemoryTransport::new().with_retention(0))
        .relay(options())
        .build()?;
    let handled = Arc::new(AtomicUsize::new(0));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    runtime.block_on(async {
        bus.subscribe::<Keyed>("bench")
            .state(handled.clone())
            .handler(async |handled: &AtomicUsize, _, _ctx| {
                compute();
                handled.fetch_add(1, Ordering::Relaxed);
                Ok(())
            })
            .start()
            .await?;
        bus.publish_all(messages(n, |n| Keyed { n, text: String::new() })?)
            .await?;
        let began = Instant::now();
        bus.start().await?;
        while handled.load(Ordering::Relaxed) < n {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        let took = began.elapsed();
        bus.shutdown(Duration::from_secs(10)).await?;
        Ok(took)
    })
}

pub(crate) fn run(size: Size, table: &mut Table) -> anyhow::Result<()> {
    let (n, rounds) = (size.of(400_000), size.rounds());
    let text = || "an event of a usual size, about a hundred bytes of JSON in all, give or take".to_owned();
    let keyless = |n| Keyless { n, text: text() };
    let keyed = |n| Keyed { n, text: text() };
    let name = "engine";
    table.compare(
        name,
        "relay, no keys",
        "/s",
        rounds,
        n,
        || raw(n, keyless),
        || relay(n, keyless),
    )?;
    table.compare(
        name,
        "relay, 1000 keys",
        "/s",
        rounds,
        n,
        || raw(n, keyed),
        || relay(n, keyed),
    )?;
    table.compare(
        name,
        "relay and consumer, no keys",
        "/s",
        rounds,
        n,
        || raw(n, keyless),
        || whole(n, keyless),
    )?;
    table.compare(
        name,
        "relay and consumer, 1000 keys",
        "/s",
        rounds,
        n,
        || raw(n, keyed),
        || whole(n, keyed),
    )?;
    let n = size.of(400);
    table.compare(
        name,
        "10 ms of CPU in each handler, two threads",
        "/s",
        rounds,
        n,
        || {
            let began = Instant::now();
            (0..n).for_each(|_| compute());
            Ok(began.elapsed())
        },
        || computing(n),
    )?;
    Ok(())
}
