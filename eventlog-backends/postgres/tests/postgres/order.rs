//! The order of keys, with many relays, refusals, relays that come and go, and commits that are late.

use crate::fixture::PostgresFixture;
use async_trait::async_trait;
use postrider_core::{
    Bus, Event, EventLog, Message, Outcomes, PublishError, Publisher, Reachability, RelayOptions, Transport,
    relay::Backoff,
};
use postrider_testkit::run;
use std::{
    collections::{BTreeMap, HashSet},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};

const KEYS: i64 = 20;

#[derive(Debug, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "counted", key = "key", crate = "postrider_core")]
struct Counted {
    key: i64,
    n: i64,
}

/// A small generator that all may use.
#[derive(Debug, Clone, Default)]
struct Dice(Arc<AtomicU64>);

impl Dice {
    fn roll(&self, sides: u64) -> u64 {
        let mut z = self.0.fetch_add(0x9E37_79B9_7F4A_7C15, Ordering::Relaxed);
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        (z ^ (z >> 31)) % sides
    }
}

/// A broker that all relays send to. It is slow, and refuses some messages, some times.
#[derive(Debug, Clone, Default)]
struct Broker {
    sent: Arc<Mutex<Vec<(i64, i64)>>>,
    dice: Dice,
}

#[async_trait]
impl Publisher for Broker {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        tokio::time::sleep(Duration::from_micros(self.dice.roll(3000))).await;
        let one = |message: &Message| {
            if self.dice.roll(25) == 0 {
                return Err(PublishError::rejected("not just now"));
            }
            let event: Counted = serde_json::from_slice(message.payload()).map_err(PublishError::invalid)?;
            self.sent.lock().unwrap().push((event.key, event.n));
            Ok(())
        };
        outcomes.report_each(batch.iter().map(one));
    }
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

async fn relay(fixture: &PostgresFixture, broker: &Broker) -> Bus {
    let options = RelayOptions::default()
        .with_lease(Duration::from_millis(900))
        .with_poll_interval(Duration::from_millis(60))
        .with_batch_size(50)
        .with_max_in_flight(200)
        .with_local_interval(Duration::from_millis(5))
        .with_local_max_attempts(2)
        .with_min_retry_interval(Duration::from_millis(400))
        .with_backoff(Backoff::Fixed(Duration::from_millis(30)))
        .with_max_attempts(1000);
    let transport = Transport::new("broker", postrider_core::Capabilities::default()).with_publisher(broker.clone());
    let log = EventLog::from(fixture.handle().await);
    let bus = Bus::builder()
        .log(log)
        .transport(transport)
        .relay(options)
        .source("test")
        .build()
        .unwrap();
    bus.start().await.unwrap();
    bus
}

/// The next event of a random key, the key's row locked before; now and then it is rolled back, and often it is late.
async fn produce(fixture: &PostgresFixture, bus: &Bus, dice: &Dice) -> Option<()> {
    let key = i64::try_from(dice.roll(KEYS.unsigned_abs())).unwrap();
    let mut tx = fixture.log.pool().begin().await.ok()?;
    let next = fixture
        .fill("INSERT INTO {counts} VALUES ($1, 1) ON CONFLICT (key) DO UPDATE SET n = {counts}.n + 1 RETURNING n");
    let next = sqlx::query_scalar(sqlx::AssertSqlSafe(next))
        .bind(key)
        .fetch_one(&mut *tx)
        .await;
    let n: i64 = next.unwrap();
    let rolls_back = dice.roll(6) == 0;
    // A number that is rolled back is used again, so it is sent as one that must not be seen.
    let n = if rolls_back { -n } else { n };
    bus.publish_in(&mut tx, &Counted { key, n }).await.unwrap();
    if dice.roll(3) == 0 {
        tokio::time::sleep(Duration::from_millis(dice.roll(40))).await;
    }
    if rolls_back {
        tx.rollback().await.unwrap()
    } else {
        tx.commit().await.unwrap()
    }
    Some(())
}

fn keys_keep_their_order(relays: usize) {
    run(async move {
        let fixture = PostgresFixture::new().await;
        fixture
            .sql("CREATE TABLE {counts} (key bigint PRIMARY KEY, n bigint NOT NULL)")
            .await;
        let (broker, dice, stop) = (Broker::default(), Dice::default(), AtomicBool::new(false));
        let producing = async {
            let bus = Bus::builder()
                .log(fixture.log.clone())
                .transport(postrider_core::memory::MemoryTransport::new())
                .build()
                .unwrap();
            let one = async || {
                while !stop.load(Ordering::Relaxed) {
                    produce(&fixture, &bus, &dice).await;
                }
            };
            tokio::join!(one(), one(), one());
        };
        let relaying = async {
            let mut running = Vec::new();
            for _ in 0..relays {
                running.push(relay(&fixture, &broker).await);
            }
            let until = Instant::now() + Duration::from_secs(8);
            while Instant::now() < until {
                tokio::time::sleep(Duration::from_millis(300 + dice.roll(500))).await;
                // One goes, in order or cut off in the middle of everything, and another comes.
                let at = usize::try_from(dice.roll(relays as u64)).unwrap();
                let deadline = if dice.roll(2) == 0 {
                    Duration::from_secs(5)
                } else {
                    Duration::ZERO
                };
                let _ = running.swap_remove(at).shutdown(deadline).await;
                running.push(relay(&fixture, &broker).await);
            }
            stop.store(true, Ordering::Relaxed);
            running
        };
        let ((), running) = tokio::join!(producing, relaying);
        let pending = "SELECT (SELECT count(*) FROM {event}) + (SELECT count(*) FROM {parked})";
        let began = Instant::now();
        while fixture.number(pending).await > 0 {
            assert!(
                began.elapsed() < Duration::from_secs(20),
                "still pending: {}",
                fixture.number(pending).await
            );
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        for bus in running {
            bus.shutdown(Duration::from_secs(5)).await.unwrap();
        }
        let sent = broker.sent.lock().unwrap().clone();
        let (mut seen, mut last, mut inversions) = (HashSet::new(), BTreeMap::<i64, i64>::new(), 0);
        for (key, n) in &sent {
            assert!(*n > 0, "sent though rolled back: {key} {n}");
            if seen.insert((*key, *n)) {
                let last = last.entry(*key).or_default();
                inversions += usize::from(*n != *last + 1);
                *last = *n;
            }
        }
        let committed = usize::try_from(fixture.number("SELECT sum(n)::bigint FROM {counts}").await).unwrap();
        println!(
            "{relays} relays: {committed} committed, {} sent, {inversions} inversions, {} repeats",
            sent.len(),
            sent.len() - seen.len()
        );
        assert_eq!((seen.len(), inversions), (committed, 0));
        assert!(committed > 200, "too little happened to say anything");
    });
}

#[test]
fn keys_keep_their_order_with_one_relay() {
    keys_keep_their_order(1);
}

#[test]
fn keys_keep_their_order_with_three_relays() {
    keys_keep_their_order(3);
}

#[test]
fn keys_keep_their_order_with_eight_relays() {
    keys_keep_their_order(8);
}
