//! Testing an application that uses Postrider, in one process, in milliseconds: memory for the broker and, unless told
//! otherwise, for the log, a clock that moves when told, a process that dies where it is told to. Handlers that write to the log's
//! own database are tested on that database: [`TestBusBuilder::log`].
//!
//! ```
//! use postrider_core::{Event, testing::TestBus};
//! # use postrider_core as postrider;
//!
//! #[derive(serde::Serialize, serde::Deserialize, postrider::Event)]
//! #[event(crate = "postrider_core", name = "order.placed")]
//! struct OrderPlaced { id: u32 }
//! #[derive(serde::Serialize, serde::Deserialize, postrider::Event)]
//! #[event(crate = "postrider_core", name = "order.invoiced")]
//! struct Invoiced { order: u32 }
//!
//! # #[tokio::main(flavor = "current_thread")] async fn main() -> postrider::Result<()> {
//! // The application's own wiring.
//! let app = TestBus::start(async |bus| {
//!     bus.subscribe::<OrderPlaced>("billing")
//!         .handler(async |order, ctx| {
//!             ctx.publish(&Invoiced { order: order.id }).await?;
//!             Ok(())
//!         })
//!         .start()
//!         .await
//!         .map(drop)
//! })
//! .await?;
//! app.bus().publish(&OrderPlaced { id: 1 }).await?;
//! app.settle().await;
//! app.handled::<OrderPlaced>("billing").times(1);
//! assert_eq!(app.published::<Invoiced>()[0].order, 1);
//! app.no_dead_letters().await;
//! # Ok(()) }
//! ```

// What it is for is to fail a test.
#![allow(clippy::panic)]

mod builder;
mod crash;

pub use builder::TestBusBuilder;
pub use crash::CrashPoint;

use crate::{
    AnyEvent, Bus, BusBuilder, Codec as _, Context, Event, EventLog, GroupName, HandlerResult, Mailbox, Message,
    Middleware, Next, RelayOptions, Result, Transport,
    clock::ManualClock,
    log::{Filter, Page, RecordState, Stats, Stored},
    memory::MemoryTransport,
};
use crash::{Life, reached_by};
use futures_util::future::BoxFuture;
use std::{
    collections::BTreeMap,
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

const LEASE: Duration = Duration::from_secs(15);

type Wire = Box<dyn Fn(Bus) -> BoxFuture<'static, Result<()>> + Send + Sync>;
type Describe = Box<dyn Fn(BusBuilder) -> BusBuilder + Send + Sync>;

/// An application under test.
pub struct TestBus {
    bus: Bus,
    life: Arc<Life>,
    clock: Arc<ManualClock>,
    log: EventLog,
    transport: MemoryTransport,
    records: Arc<Records>,
    /// For so many milliseconds nothing may have changed until it counts as quiet.
    quiet: u32,
    describe: Describe,
    wire: Wire,
}

/// What handlers did.
#[derive(Debug, Default)]
struct Records {
    handled: Mutex<Vec<(GroupName, String)>>,
    attempts: AtomicU64,
}

/// Notes each attempt that succeeded.
struct Recorder(Arc<Records>);

impl Middleware for Recorder {
    async fn execute(&self, ctx: &mut Context, event: &AnyEvent, next: Next<'_>) -> HandlerResult {
        self.0.attempts.fetch_add(1, Ordering::SeqCst);
        let result = next.run(ctx, event).await;
        if result.is_ok() {
            let mut handled = self.0.handled.lock().unwrap_or_else(PoisonError::into_inner);
            handled.push((ctx.group().clone(), event.kind().into_owned()));
        }
        result
    }
}

impl TestBus {
    /// A bus that is started and wired up by the application's own function, which makes its subscriptions. It is called
    /// again by [`restart`](TestBus::restart).
    ///
    /// # Errors
    /// Of `wire`.
    pub async fn start<W>(wire: W) -> Result<Self>
    where
        W: AsyncFn(&Bus) -> Result<()> + WireFn + Send + Sync + 'static,
    {
        Self::builder().start(wire).await
    }

    /// Describes a test that differs: on another log, with a bus of other settings.
    pub fn builder() -> TestBusBuilder {
        TestBusBuilder::default()
    }

    /// The same with a bus that is described further: its source, limits, middleware.
    ///
    /// # Errors
    /// Of `wire`, or if the description makes no sense.
    pub async fn start_with<D, W>(describe: D, wire: W) -> Result<Self>
    where
        D: Fn(BusBuilder) -> BusBuilder + Send + Sync + 'static,
        W: AsyncFn(&Bus) -> Result<()> + WireFn + Send + Sync + 'static,
    {
        Self::builder().describe(describe).start(wire).await
    }

    async fn begin(&self) -> Result<()> {
        self.bus.start().await?;
        (self.wire)(self.bus.clone()).await
    }

    /// The bus the application has.
    #[must_use]
    pub fn bus(&self) -> &Bus {
        &self.bus
    }

    /// Publishes a message to the broker as somebody else's application does, without a log.
    ///
    /// # Errors
    /// Of the broker, which has none.
    pub async fn deliver(&self, message: impl crate::IntoMessage) -> Result<()> {
        let outsider = Bus::builder()
            .transport(self.transport.clone())
            .source("somebody else")
            .build()?;
        outsider.publish_direct(message).await.map(drop)
    }

    /// Lets everything run until nothing happens any more without time passing: events are published, delivered and
    /// handled. Handlers may do real input and output, as long as no step of it takes more than some milliseconds
    /// ([`TestBusBuilder::quiet`]).
    pub async fn settle(&self) {
        let mut last = None;
        let mut unchanged = 0;
        while unchanged < self.quiet {
            for _ in 0..100 {
                tokio::task::yield_now().await;
            }
            tokio::time::sleep(Duration::from_millis(1)).await;
            let now = Some(self.fingerprint().await);
            unchanged = if now == last { unchanged + 1 } else { 0 };
            last = now;
        }
    }

    /// Everything that changes when something happens.
    async fn fingerprint(&self) -> (String, u64, Vec<[usize; 5]>) {
        let stats = self.stats().await;
        let report = self.bus.relay_report();
        let attempts = self.records.attempts.load(Ordering::SeqCst);
        (format!("{stats:?} {report:?}"), attempts, self.transport.marks())
    }

    /// Lets time pass: timers end, retries and delayed events become due, and everything settles, step by step.
    pub async fn advance(&self, time: Duration) {
        const STEPS: u32 = 20;
        for _ in 0..STEPS {
            self.settle().await;
            self.clock.advance(time / STEPS);
        }
        self.settle().await;
    }

    /// The clock, to set the time.
    #[must_use]
    pub fn clock(&self) -> &Arc<ManualClock> {
        &self.clock
    }

    /// Lets the process die when it gets there for the next time. What it does from then on reaches neither the log nor the
    /// broker. Go on with [`restart`](TestBus::restart).
    pub fn crash_at(&self, point: CrashPoint) {
        self.life.dies_at(point);
    }

    /// Whether the process has died.
    #[must_use]
    pub fn has_crashed(&self) -> bool {
        self.life.is_over()
    }

    /// Another process on the same log and broker, wired up as the first. If that has died its leases run out first;
    /// otherwise it is shut down as it should be.
    ///
    /// # Errors
    /// Of the wiring.
    pub async fn restart(&mut self) -> Result<()> {
        let deadline = if self.life.is_over() {
            Duration::ZERO
        } else {
            Duration::from_secs(60)
        };
        // The dead are cut off, which is no failure.
        let _ = self.bus.shutdown(deadline).await;
        self.clock.advance(LEASE * 2);
        self.life = Arc::new(Life::default());
        self.bus = build(
            &self.life,
            &self.clock,
            &self.log,
            &self.transport,
            &self.records,
            &self.describe,
        )?;
        self.begin().await
    }

    /// The events of this type that have reached the broker, repeats left out, in order.
    ///
    /// # Panics
    /// If one does not decode.
    #[must_use]
    pub fn published<E: Event>(&self) -> Vec<E> {
        let messages = self.published_messages::<E>();
        let decode = |message: &Message| E::Codec::decode(message.payload());
        messages
            .iter()
            .map(|message| decode(message).unwrap_or_else(|error| panic!("{message:?} does not decode: {error}")))
            .collect()
    }

    /// The messages they came in.
    #[must_use]
    pub fn published_messages<E: Event>(&self) -> Vec<Message> {
        let mut seen = std::collections::HashSet::new();
        let all = self.transport.published(&E::TOPIC).into_iter();
        all.filter(|message| message.kind() == E::kind() && seen.insert(message.id()))
            .collect()
    }

    /// How often events of this type were handled with success by a group.
    #[track_caller]
    pub fn handled<E: Event>(&self, group: &str) -> Handled {
        let handled = self.records.handled.lock().unwrap_or_else(PoisonError::into_inner);
        let of_it = |(g, kind): &&(GroupName, String)| g.as_str() == group && *kind == E::kind();
        Handled {
            what: format!("{} by {group}", E::kind()),
            times: handled.iter().filter(of_it).count(),
        }
    }

    /// The dead letters of a group.
    ///
    /// # Panics
    /// If `group` is no name.
    pub async fn dead_letters(&self, group: &str) -> Vec<Stored> {
        let group = GroupName::parse(group.to_owned()).unwrap_or_else(|error| panic!("{error}"));
        self.failed(Mailbox::Inbox(group)).await
    }

    async fn failed(&self, mailbox: Mailbox) -> Vec<Stored> {
        let filter = Filter::of(mailbox).with_state(RecordState::Failed);
        let Ok(admin) = self.log.admin() else { return Vec::new() };
        let listing = admin.list(&filter, &Page::first(1000)).await;
        listing.map(|listing| listing.entries).unwrap_or_default()
    }

    async fn stats(&self) -> BTreeMap<Mailbox, Stats> {
        let Ok(admin) = self.log.admin() else {
            return BTreeMap::new();
        };
        admin.stats().await.unwrap_or_default()
    }

    /// # Panics
    /// If there are dead letters, in the outbox or in any inbox: it says which, and their last errors.
    pub async fn no_dead_letters(&self) {
        let mut found = Vec::new();
        for mailbox in self.stats().await.into_keys() {
            for stored in self.failed(mailbox.clone()).await {
                let error = stored.errors.last().map_or("no error", |error| &*error.text);
                found.push(format!(
                    "{} in {mailbox}, after {} attempts: {error}",
                    stored.message.kind(),
                    stored.attempts
                ));
            }
        }
        assert!(found.is_empty(), "there are dead letters:\n{}", found.join("\n"));
    }
}

fn build(
    life: &Arc<Life>,
    clock: &Arc<ManualClock>,
    log: &EventLog,
    transport: &MemoryTransport,
    records: &Arc<Records>,
    describe: &Describe,
) -> Result<Bus> {
    let (log, transport) = reached_by(life, log.clone(), Transport::from(transport.clone()))?;
    let builder = Bus::builder()
        .log(log)
        .transport(transport)
        .relay(RelayOptions::default().with_lease(LEASE))
        .clock(clock.clone())
        .seed(1)
        .source("test")
        .middleware(Recorder(records.clone()));
    describe(builder).build()
}

/// How often something was handled, to be compared with what it should be.
#[derive(Debug, Clone)]
#[must_use = "say how often: `.times(1)`"]
pub struct Handled {
    what: String,
    times: usize,
}

impl Handled {
    /// # Panics
    /// If it was handled another number of times.
    #[track_caller]
    pub fn times(&self, expected: usize) {
        assert_eq!(self.times, expected, "how often {} was handled", self.what);
    }

    /// How often it was.
    #[must_use]
    pub fn count(&self) -> usize {
        self.times
    }
}

/// `async fn(&Bus) -> Result<()>` with a future that is `Send`. Never implemented by hand.
pub trait WireFn: 'static {
    #[doc(hidden)]
    fn erased(self) -> Box<dyn Fn(Bus) -> BoxFuture<'static, Result<()>> + Send + Sync>;
}

#[doc(hidden)]
pub trait WireCall<A>: AsyncFn(A) -> Result<()> + Fn(A) -> <Self as WireCall<A>>::Future {
    type Future: Future<Output = Result<()>>;
}
impl<F, Fut, A> WireCall<A> for F
where
    F: AsyncFn(A) -> Result<()> + Fn(A) -> Fut,
    Fut: Future<Output = Result<()>>,
{
    type Future = Fut;
}

impl<F> WireFn for F
where
    F: for<'a> WireCall<&'a Bus, Future: Send> + Send + Sync + 'static,
{
    fn erased(self) -> Box<dyn Fn(Bus) -> BoxFuture<'static, Result<()>> + Send + Sync> {
        let wire = Arc::new(self);
        Box::new(move |bus| {
            let wire = wire.clone();
            Box::pin(async move { wire(&bus).await })
        })
    }
}

impl fmt::Debug for TestBus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("TestBus")
            .field("bus", &self.bus)
            .field("has_crashed", &self.has_crashed())
            .finish_non_exhaustive()
    }
}
