//! A process of a history: it can stand still, and it can die.

use crate::{
    feed::{FaultySubscriber, Seat},
    log::{self, FaultyLog},
    publisher::FaultyPublisher,
    world::World,
};
use async_trait::async_trait;
use postrider_core::{
    Bus, Error, ErrorKind, EventLog, Message, RelayOptions, Result, Transport,
    clock::{Clock, Moment, Timestamp},
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};
use tokio::sync::Notify;

/// Whether a process runs, stands still, or is dead.
#[derive(Debug, Default)]
pub(crate) struct Life {
    is_frozen: AtomicBool,
    is_over: AtomicBool,
    changed: Notify,
}

impl Life {
    pub(crate) fn is_over(&self) -> bool {
        self.is_over.load(Ordering::SeqCst)
    }

    pub(crate) fn is_frozen(&self) -> bool {
        self.is_frozen.load(Ordering::SeqCst)
    }

    fn freeze(&self, frozen: bool) {
        self.is_frozen.store(frozen, Ordering::SeqCst);
        self.changed.notify_waiters();
    }

    /// Waits for as long as the process stands still. An error, and no effect, if it is dead.
    pub(crate) async fn pass(&self) -> Result<()> {
        loop {
            let mut changed = std::pin::pin!(self.changed.notified());
            changed.as_mut().enable();
            if self.is_over() {
                return Err(Error::new(ErrorKind::Unavailable, "this process is dead"));
            }
            if !self.is_frozen() {
                return Ok(());
            }
            changed.await;
        }
    }
}

/// The clock as a process sees it: who sleeps in one that stands still does not wake.
#[derive(Debug)]
struct ProcessClock {
    world: Arc<World>,
    life: Arc<Life>,
}

#[async_trait]
impl Clock for ProcessClock {
    fn now(&self) -> Timestamp {
        self.world.clock.now()
    }
    fn elapsed(&self) -> Moment {
        self.world.clock.elapsed()
    }
    async fn sleep(&self, duration: Duration) {
        self.world.clock.sleep(duration).await;
        let _ = self.life.pass().await;
    }
}

/// How a process reaches the world.
#[derive(Debug, Clone)]
pub(crate) struct Reach {
    pub(crate) world: Arc<World>,
    pub(crate) life: Arc<Life>,
    pub(crate) clock: Arc<dyn Clock>,
    pub(crate) name: String,
    /// Its places in groups.
    pub(crate) seats: Arc<Mutex<Vec<Arc<Seat>>>>,
}

/// What becomes of a call.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Fate {
    Goes,
    /// It takes effect, and its caller is told that it failed.
    FailsAfter,
    /// It takes effect, and the answer takes long.
    SlowAfter(Duration),
}

impl Reach {
    fn new(world: &Arc<World>, name: &str) -> Self {
        let life = Arc::new(Life::default());
        let clock = ProcessClock {
            world: world.clone(),
            life: life.clone(),
        };
        Self {
            world: world.clone(),
            life,
            clock: Arc::new(clock),
            name: name.to_owned(),
            seats: Arc::default(),
        }
    }

    /// The broker takes away what it holds of its groups, and tells it only when it asks for more.
    pub(crate) async fn evict(&self) {
        let seats = self.seats.lock().unwrap().clone();
        for seat in seats {
            seat.evict().await;
        }
    }

    /// A call of the log goes out: it may fail at once, without an effect.
    pub(crate) async fn begins(&self, what: &'static str) -> Result<Fate> {
        self.life.pass().await?;
        let rates = self.world.rates();
        let (fails, slow, way, length) = self.world.fault(|dice| {
            let (fails, slow) = (dice.chance(rates.log_fails), dice.chance(rates.log_slow));
            (fails, slow, dice.roll(2), dice.millis(1, 1500))
        });
        if fails {
            self.world.ledger.count("calls of the log that failed");
        }
        let fate = match (fails, slow, way) {
            (true, _, 0) => {
                self.world.note(format_args!("{} {what} fails", self.name));
                return Err(away());
            }
            (true, ..) => Fate::FailsAfter,
            (_, true, 0) => {
                self.clock.sleep(length).await;
                self.life.pass().await?;
                Fate::Goes
            }
            (_, true, _) => Fate::SlowAfter(length),
            _ => Fate::Goes,
        };
        Ok(fate)
    }

    /// And its answer comes back.
    pub(crate) async fn ends<T>(&self, fate: Fate, what: &'static str, answer: T) -> Result<T> {
        match fate {
            Fate::Goes => {}
            Fate::FailsAfter => {
                self.world
                    .note(format_args!("{} {what} fails after it took effect", self.name));
                return Err(away());
            }
            Fate::SlowAfter(length) => self.clock.sleep(length).await,
        }
        self.life.pass().await?;
        Ok(answer)
    }
}

pub(crate) fn away() -> Error {
    Error::new(ErrorKind::Unavailable, "the database is away")
}

/// A process: a bus on the world's log and broker.
#[derive(Debug)]
pub(crate) struct Process {
    pub(crate) reach: Reach,
    pub(crate) bus: Bus,
    /// Ends what it is told to end soon.
    ends: Mutex<Vec<tokio::task::JoinHandle<()>>>,
}

/// What a process may take longer than it was told to.
const GRACE: Duration = Duration::from_secs(6);

impl Process {
    pub(crate) fn new(world: &Arc<World>, name: &str, relay: RelayOptions, seed: u64) -> Self {
        let reach = Reach::new(world, name);
        let log = EventLog::from(world.log.reached_on(reach.clock.clone()));
        let (transactions, inbox) = (log.transactions().unwrap().clone(), log.inbox().unwrap().clone());
        let log = log
            .map_store(|inner| FaultyLog::new(inner, &reach))
            .with_transactions(log::FaultyTransactions::new(transactions, &reach))
            .with_inbox(log::FaultyInbox::new(inbox, &reach));
        let transport = Transport::from(world.broker.clone())
            .map_publisher(|inner| FaultyPublisher::new(inner, &reach))
            .map_subscriber(|inner| FaultySubscriber::new(inner, &reach));
        let bus = Bus::builder()
            .log(log)
            .transport(transport)
            .relay(relay)
            .source("test")
            .clock(reach.clock.clone())
            .seed(seed)
            .build()
            .unwrap();
        Self {
            reach,
            bus,
            ends: Mutex::default(),
        }
    }

    pub(crate) fn name(&self) -> &str {
        &self.reach.name
    }

    fn note(&self, what: &str) {
        self.reach.world.note(format_args!("{} {what}", self.name()));
    }

    /// Starts the bus, if need be several times.
    pub(crate) async fn start(&self) {
        self.note("starts");
        while self.bus.start().await.is_err() {
            self.reach.world.pass(Duration::from_millis(100)).await;
        }
    }

    /// It is gone, as by SIGKILL: nothing it does has any effect from now on, and nothing is handed back.
    pub(crate) fn crash(&self) {
        self.note("crashes");
        self.reach.world.ledger.count("crashes");
        self.reach.world.ledger.book().interruptions += 1;
        self.reach.life.is_over.store(true, Ordering::SeqCst);
        self.reach.life.freeze(false);
        let bus = self.bus.clone();
        self.ends.lock().unwrap().push(tokio::spawn(async move {
            let _ = bus.shutdown(Duration::ZERO).await;
        }));
    }

    /// It stands still for a while, as by SIGSTOP, and then goes on.
    pub(crate) fn freeze(&self, length: Duration) {
        self.note(&format!("stands still for {length:?}"));
        self.reach.world.ledger.count("processes that stood still");
        self.reach.world.ledger.book().interruptions += 1;
        self.reach.life.freeze(true);
        let reach = self.reach.clone();
        tokio::spawn(async move {
            reach.world.pass(length).await;
            if reach.life.is_frozen() {
                reach.world.note(format_args!("{} goes on", reach.name));
                reach.life.freeze(false);
            }
        });
    }

    pub(crate) fn thaw(&self) {
        self.reach.life.freeze(false);
    }

    /// Stops it in order, which must not take longer than it was told.
    pub(crate) async fn shut_down(&self, deadline: Duration) -> Result<()> {
        self.note(&format!("shuts down within {deadline:?}"));
        let world = &self.reach.world;
        world.ledger.count("shutdowns");
        world.ledger.book().interruptions += 1;
        let began = world.elapsed();
        let result = self.bus.shutdown(deadline).await;
        self.bounded("the shutdown", began, deadline);
        self.note(&format!("has shut down: {}", result.is_ok()));
        result
    }

    pub(crate) fn bounded(&self, what: &str, began: Duration, deadline: Duration) {
        let world = &self.reach.world;
        let took = world.elapsed() - began;
        if took > deadline + GRACE {
            world.broken(format!(
                "{what} of {} took {took:?} with a deadline of {deadline:?}",
                self.name()
            ));
        }
    }

    /// Publishes in a task of its own: whether that went well is the wrappers' to know.
    pub(crate) fn publish(&self, messages: Vec<Message>, how: How) {
        let (bus, reach) = (self.bus.clone(), self.reach.clone());
        tokio::spawn(async move {
            let result = match how {
                How::Each => {
                    let mut result = Ok(());
                    for message in messages {
                        result = result.and(bus.publish(message).await.map(drop));
                    }
                    result
                }
                How::After(delay) => {
                    let mut result = Ok(());
                    for message in messages {
                        result = result.and(bus.publish_after(message, delay).await.map(drop));
                    }
                    result
                }
                How::Together => bus.publish_all(messages).await.map(drop),
                How::InTransaction { commits, wait } => in_transaction(&bus, &reach, messages, commits, wait).await,
            };
            if let Err(error) = result {
                reach
                    .world
                    .note(format_args!("{} could not publish: {error}", reach.name));
            }
        });
    }
}

/// How messages are published.
#[derive(Debug, Clone, Copy)]
pub(crate) enum How {
    Each,
    Together,
    After(Duration),
    InTransaction { commits: bool, wait: Duration },
}

async fn in_transaction(bus: &Bus, reach: &Reach, messages: Vec<Message>, commits: bool, wait: Duration) -> Result<()> {
    let mut tx = bus.begin().await?;
    for message in messages {
        bus.publish_in(&mut tx, message).await?;
    }
    reach.clock.sleep(wait).await;
    match commits {
        true => tx.commit().await,
        false => tx.rollback().await,
    }
}
