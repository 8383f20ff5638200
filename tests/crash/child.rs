//! A process that publishes and relays: what is killed.

use crate::{
    ledger,
    store::{Place, Store},
};
use async_trait::async_trait;
use postrider::{
    Bus, Event, Message, Outcomes, PublishError, Publisher, Reachability, RelayOptions, Transport, relay::Backoff,
};
use std::{
    fs::File,
    io::Write as _,
    path::Path,
    sync::Mutex,
    time::{Duration, SystemTime},
};

pub(crate) const LEASE: Duration = Duration::from_millis(600);
const KEYS: i64 = 12;

/// The `n`-th event of a key.
#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "counted", key = "key")]
pub(crate) struct Counted {
    pub(crate) key: i64,
    pub(crate) n: i64,
}

/// A broker that outlives every process: a file that lines are appended to.
#[derive(Debug)]
struct FileBroker {
    file: Mutex<File>,
    /// Where every call is written down as it begins.
    begun: Mutex<File>,
    pace: Pace,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Pace {
    /// At once; it refuses some messages, some times.
    Fast,
    /// A few at a time, for a while.
    Slow,
    /// It never answers.
    Never,
}

impl FileBroker {
    fn open(dir: &Path, pace: Pace) -> Self {
        let open = |path| File::options().create(true).append(true).open(path);
        Self {
            file: Mutex::new(open(ledger::broker(dir)).expect("the broker's file")),
            begun: Mutex::new(open(ledger::begun(dir)).expect("the list of calls")),
            pace,
        }
    }

    fn refuses(message: &Message) -> bool {
        let now = SystemTime::now()
            .duration_since(SystemTime::UNIX_EPOCH)
            .unwrap_or_default()
            .subsec_nanos();
        (u64::from(now / 1000) ^ message.id().as_uuid().as_u64_pair().1).is_multiple_of(40)
    }
}

#[async_trait]
impl Publisher for FileBroker {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        if self.pace != Pace::Fast {
            let line = format!("{}\n", std::process::id());
            self.begun.lock().unwrap().write_all(line.as_bytes()).unwrap();
            tokio::time::sleep(Duration::from_millis(30)).await;
        }
        if self.pace == Pace::Never {
            return std::future::pending().await;
        }
        let mut lines = String::new();
        let results: Vec<_> = batch
            .iter()
            .map(|message| {
                if self.pace == Pace::Fast && Self::refuses(message) {
                    return Err(PublishError::rejected("not just now"));
                }
                let event: Counted = serde_json::from_slice(message.payload()).map_err(PublishError::invalid)?;
                lines.push_str(&ledger::line(event.key, event.n));
                Ok(())
            })
            .collect();
        match self.file.lock().unwrap().write_all(lines.as_bytes()) {
            Ok(()) => outcomes.report_each(results),
            Err(error) => outcomes.report_rest(Err(PublishError::connection(error))),
        }
    }
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn run(dir: &Path, place: &Place, what: &str) {
    let store = loop {
        match Store::open(dir, place).await {
            Ok(store) => break store,
            // The database may be down just now.
            Err(error) => eprintln!("(the log does not open, as it may: {error:#})"),
        }
        tokio::time::sleep(Duration::from_millis(100)).await;
    };
    let pace = match what {
        "slow" => Pace::Slow,
        "hold" => Pace::Never,
        _ => Pace::Fast,
    };
    let transport =
        Transport::new("file", postrider::Capabilities::default()).with_publisher(FileBroker::open(dir, pace));
    let mut relay = RelayOptions::default()
        .with_lease(LEASE)
        .with_poll_interval(Duration::from_millis(50))
        .with_local_interval(Duration::from_millis(10))
        .with_min_retry_interval(Duration::from_millis(300))
        .with_backoff(Backoff::Fixed(Duration::from_millis(50)))
        .with_max_attempts(1000);
    if pace != Pace::Fast {
        relay = relay
            .with_batch_size(10)
            .with_max_publishing(10)
            .with_publish_timeout(Duration::from_secs(60));
    }
    let bus = Bus::builder()
        .log(store.log())
        .transport(transport)
        .relay(relay)
        .source("crash")
        .build()
        .expect("a bus");
    if what == "fill" {
        // It publishes, and leaves the relaying to others.
        work(&bus, &store, 600).await;
        return;
    }
    while let Err(error) = bus.start().await {
        eprintln!("(the bus does not start, as it may: {error:#})");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    match what {
        "finish" => finish(&bus).await,
        "serve" => {
            // The rounds go on until the process ends; the bus does what a server's does.
            let working = bus.clone();
            tokio::spawn(async move { work(&working, &store, u64::MAX).await });
            bus.run_until_signal(Duration::from_secs(10))
                .await
                .expect("a clean shutdown");
        }
        "slow" | "hold" => std::future::pending().await,
        _ => work(&bus, &store, u64::MAX).await,
    }
}

/// So many transactions.
async fn work(bus: &Bus, store: &Store, rounds: u64) {
    let first = u64::from(std::process::id());
    for round in first..first.saturating_add(rounds) {
        let key = i64::try_from(round).unwrap_or(0) % KEYS;
        if let Err(error) = store.count(bus, key, round).await {
            // The other process holds a lock for long, paused in a transaction; or the database is down.
            eprintln!("(a transaction failed, as it may: {error:#})");
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        if round.is_multiple_of(3) {
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
    }
}

/// Waits until nothing is pending, and ends as a program should.
async fn finish(bus: &Bus) {
    let admin = bus.log().unwrap().admin().unwrap().clone();
    let began = std::time::Instant::now();
    loop {
        let stats = admin
            .stats()
            .await
            .expect("numbers")
            .remove(&postrider::Mailbox::outbox())
            .unwrap_or_default();
        if stats.pending == 0 {
            assert_eq!(stats.failed, 0, "nothing has failed for good");
            break;
        }
        assert!(began.elapsed() < Duration::from_secs(60), "still pending: {stats:?}");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bus.shutdown(Duration::from_secs(10)).await.expect("a clean shutdown");
}
