//! What the processes of a history share: time, the log, the broker, what goes wrong, and what is known to be true.

use crate::{
    dice::{Dice, Trace},
    ledger::Ledger,
};
use postrider_core::{
    Mailbox, MessageId,
    clock::{Clock as _, ManualClock},
    memory::{MemoryLog, MemoryTransport},
};
use std::{
    collections::BTreeMap,
    io::Write as _,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

/// How often things go wrong, in a thousand calls.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Rates {
    /// Calls of the log that fail.
    pub(crate) log_fails: usize,
    /// Calls of the log that take their time.
    pub(crate) log_slow: usize,
    /// Publish calls that fail as a whole, in some way.
    pub(crate) calls: usize,
    /// Messages that are refused, in some way.
    pub(crate) messages: usize,
    /// Settles of deliveries that fail.
    pub(crate) settles: usize,
    /// Receiving that fails.
    pub(crate) receives: usize,
}

#[derive(Debug)]
pub(crate) struct World {
    pub(crate) clock: Arc<ManualClock>,
    pub(crate) log: MemoryLog,
    pub(crate) broker: MemoryTransport,
    pub(crate) ledger: Ledger,
    pub(crate) trace: Trace,
    /// What goes wrong is rolled with these, apart from the dice that say what is done.
    faults: Mutex<Dice>,
    rates: Mutex<Rates>,
    /// The topic `t1` has no place to go to: `true` if that is because it leads nowhere.
    topic_away: Mutex<Option<bool>>,
    /// Counts the sessions.
    sessions: AtomicU64,
    /// The session that was given the lease of a mailbox last.
    holders: Mutex<BTreeMap<Mailbox, u64>>,
}

impl World {
    pub(crate) fn new(seed: u64, rates: Rates) -> Arc<Self> {
        let clock = ManualClock::shared();
        Arc::new(Self {
            log: MemoryLog::on_clock(clock.clone()),
            broker: MemoryTransport::on_clock(clock.clone()),
            clock,
            ledger: Ledger::default(),
            trace: Trace::new(),
            faults: Mutex::new(Dice::new(seed ^ 0x5EED_0FFA)),
            rates: Mutex::new(rates),
            topic_away: Mutex::default(),
            sessions: AtomicU64::default(),
            holders: Mutex::default(),
        })
    }

    pub(crate) fn rates(&self) -> Rates {
        *self.rates.lock().unwrap()
    }

    pub(crate) fn topic_away(&self) -> Option<bool> {
        *self.topic_away.lock().unwrap()
    }

    pub(crate) fn set_topic_away(&self, away: Option<bool>) {
        self.note(format_args!("t1 is away: {away:?}"));
        *self.topic_away.lock().unwrap() = away;
    }

    pub(crate) fn next_session(&self) -> u64 {
        self.sessions.fetch_add(1, Ordering::SeqCst)
    }

    pub(crate) fn holds(&self, mailbox: &Mailbox, session: u64) {
        self.holders.lock().unwrap().insert(mailbox.clone(), session);
    }

    pub(crate) fn is_held_by(&self, mailbox: &Mailbox, session: u64) -> bool {
        self.holders.lock().unwrap().get(mailbox) == Some(&session)
    }

    /// From now on nothing goes wrong by chance.
    pub(crate) fn calm(&self) {
        *self.rates.lock().unwrap() = Rates::default();
    }

    pub(crate) fn fault<T>(&self, roll: impl FnOnce(&mut Dice) -> T) -> T {
        roll(&mut self.faults.lock().unwrap())
    }

    pub(crate) fn elapsed(&self) -> Duration {
        self.clock.elapsed().since_the_beginning()
    }

    /// Something that breaks a promise.
    pub(crate) fn broken(&self, what: String) {
        self.note(format_args!("BROKEN: {what}"));
        self.ledger.broken(what);
    }

    pub(crate) fn note(&self, what: std::fmt::Arguments<'_>) {
        self.trace.note(self.elapsed(), what);
    }

    /// Lets time pass.
    pub(crate) async fn pass(&self, time: Duration) {
        self.clock.sleep(time).await;
    }
}

/// An id out of a number, so that a history has the same ids each time.
pub(crate) fn id(n: u64) -> MessageId {
    MessageId::from_uuid(uuid::Uuid::from_u128(
        0x0001_0000_0000_7000_8000_0000_0000_5052 | u128::from(n) << 16,
    ))
}

/// The number of an [`id`]; some digits of others.
pub(crate) fn short(id: MessageId) -> String {
    let bits = id.as_uuid().as_u128();
    if bits >> 64 == 0x0001_0000_0000_7000 {
        format!("#{}", bits >> 16 & 0xFFFF_FFFF)
    } else {
        format!("#…{:04x}", bits >> 16 & 0xFFFF)
    }
}

/// How long a history may take before it counts as one that does not end.
const LONGEST: Duration = Duration::from_secs(20);

/// Runs one history on one thread. Whenever all of its tasks are idle, time goes on to the next that sleeps.
pub(crate) fn run<T>(world: &Arc<World>, seed: u64, replay: &str, history: impl Future<Output = T>) -> T {
    fastrand::seed(seed);
    let clock = world.clock.clone();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_time()
        .on_thread_park(move || {
            if let Some(wait) = clock.next_wake() {
                clock.advance(wait);
            }
        })
        .build()
        .unwrap();
    let (ended, has_ended) = std::sync::mpsc::channel::<()>();
    let (replay, seen) = (replay.to_owned(), world.clone());
    let watchdog = std::thread::spawn(move || {
        if has_ended.recv_timeout(LONGEST) == Err(std::sync::mpsc::RecvTimeoutError::Timeout) {
            // Past the harness, which keeps what a test prints until it ends.
            let text = format!("{}\nthis history does not end: {replay}\n", seen.trace.text());
            let _ = std::io::stderr().write_all(text.as_bytes());
            std::process::abort();
        }
    });
    let began = Instant::now();
    let result = runtime.block_on(history);
    drop(ended);
    watchdog.join().unwrap();
    drop(runtime);
    if began.elapsed() > Duration::from_secs(2) {
        eprintln!("a slow history: {:?}, seed {seed}", began.elapsed());
    }
    result
}
