//! A process that publishes and relays: what is killed.

use crate::{
    ledger,
    store::{Place, Store},
};
use async_trait::async_trait;
use postrider::{Bus, Event, Message, PublishError, Publisher, Reachability, RelayOptions, Transport, relay::Backoff};
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

/// A broker that outlives every process: a file that lines are appended to. It refuses some messages, some times.
#[derive(Debug)]
struct FileBroker {
    file: Mutex<File>,
}

impl FileBroker {
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
    async fn publish(&self, batch: &[Message]) -> Vec<Result<(), PublishError>> {
        let mut lines = String::new();
        let outcomes = batch
            .iter()
            .map(|message| {
                if Self::refuses(message) {
                    return Err(PublishError::rejected("not just now"));
                }
                let event: Counted = serde_json::from_slice(message.payload()).map_err(PublishError::invalid)?;
                lines.push_str(&ledger::line(event.key, event.n));
                Ok(())
            })
            .collect();
        match self.file.lock().unwrap().write_all(lines.as_bytes()) {
            Ok(()) => outcomes,
            Err(error) => PublishError::connection(error).for_all(batch),
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
    let file = File::options()
        .create(true)
        .append(true)
        .open(ledger::broker(dir))
        .expect("the broker's file");
    let transport = Transport::new("file", postrider::Capabilities::default())
        .with_publisher(FileBroker { file: Mutex::new(file) });
    let relay = RelayOptions::default()
        .with_lease(LEASE)
        .with_poll_interval(Duration::from_millis(50))
        .with_local_interval(Duration::from_millis(10))
        .with_min_retry_interval(Duration::from_millis(300))
        .with_backoff(Backoff::Fixed(Duration::from_millis(50)))
        .with_max_attempts(1000);
    let bus = Bus::builder()
        .log(store.log())
        .transport(transport)
        .relay(relay)
        .source("crash")
        .build()
        .expect("a bus");
    while let Err(error) = bus.start().await {
        eprintln!("(the bus does not start, as it may: {error:#})");
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    if what == "finish" {
        finish(&bus).await;
        return;
    }
    if what == "serve" {
        // The rounds go on until the process ends; the bus does what a server's does.
        let working = bus.clone();
        tokio::spawn(async move { work(&working, &store).await });
        bus.run_until_signal(Duration::from_secs(10))
            .await
            .expect("a clean shutdown");
        return;
    }
    work(&bus, &store).await;
}

/// Transactions, for ever.
async fn work(bus: &Bus, store: &Store) {
    for round in u64::from(std::process::id()).. {
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
