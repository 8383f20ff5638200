//! The server goes away and comes back.

use crate::fixture::{options, record};
use async_trait::async_trait;
use postrider_core::{
    Bus, Event, EventLog, Mailbox, Message, Outcomes, Publisher, Reachability, RelayOptions, Transport,
    log::{Claim, EventLogStore as _, LogSchema as _},
};
use postrider_postgres::{PostgresLog, PostgresOptions};
use postrider_testkit::{run, server::Postgres};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

#[derive(Debug, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "placed", key = |e: &Self| e.id % 7, crate = "postrider_core")]
struct Placed {
    id: i64,
}

#[derive(Debug, Clone, Default)]
struct Counting(Arc<Mutex<HashMap<i64, usize>>>);

#[async_trait]
impl Publisher for Counting {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        let mut counts = self.0.lock().unwrap();
        for message in batch {
            let event: Placed = serde_json::from_slice(message.payload()).unwrap();
            *counts.entry(event.id).or_default() += 1;
        }
        outcomes.report_rest(Ok(()));
    }
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

fn bus(log: &PostgresLog, broker: &Counting) -> Bus {
    let relay = RelayOptions::default()
        .with_poll_interval(Duration::from_millis(100))
        .with_max_probe_interval(Duration::from_millis(300));
    let relay = relay.with_lease(Duration::from_secs(2));
    let transport = Transport::new("counting", postrider_core::Capabilities::default()).with_publisher(broker.clone());
    Bus::builder()
        .log(EventLog::from(log.clone()))
        .transport(transport)
        .relay(relay)
        .build()
        .unwrap()
}

/// Publishes until it has gone well, and says under which ids: after an error it may have happened.
async fn publish(bus: &Bus, id: i64) {
    while bus.publish(&Placed { id }).await.is_err() {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

async fn until_all_are_sent(broker: &Counting, count: usize) {
    let began = Instant::now();
    while broker.0.lock().unwrap().len() < count {
        assert!(
            began.elapsed() < Duration::from_secs(20),
            "{} of {count} were sent",
            broker.0.lock().unwrap().len()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
}

#[test]
fn a_relay_outlives_its_server() {
    run(async {
        let mut server = Postgres::start();
        let options = PostgresOptions::default().with_acquire_timeout(Duration::from_millis(500));
        let log = PostgresLog::connect_with(&server.url(), options).await.unwrap();
        log.migrate().await.unwrap();
        let broker = Counting::default();
        let bus = bus(&log, &broker);
        bus.start().await.unwrap();
        let mut id = 0;
        for round in 0..3 {
            for _ in 0..50 {
                id += 1;
                publish(&bus, id).await;
            }
            let server = &mut server;
            let restart = tokio::task::block_in_place(|| {
                match round {
                    0 => server.kill(),
                    1 => server.stop(),
                    _ => {
                        // It answers nobody, for longer than the lease.
                        server.pause();
                        std::thread::sleep(Duration::from_secs(3));
                        server.resume();
                        return false;
                    }
                }
                std::thread::sleep(Duration::from_millis(700));
                true
            });
            if restart {
                tokio::task::block_in_place(|| server.restart());
            }
            let began = Instant::now();
            id += 1;
            publish(&bus, id).await;
            until_all_are_sent(&broker, usize::try_from(id).unwrap()).await;
            println!(
                "round {round}: all sent {:?} after the server was back",
                began.elapsed()
            );
        }
        let repeats: usize = broker.0.lock().unwrap().values().map(|n| n - 1).sum();
        println!("{id} events, {repeats} repeats");
        bus.shutdown(Duration::from_secs(5)).await.unwrap();
    });
}

#[test]
fn connections_that_are_cut_are_made_anew() {
    run(async {
        let server = Postgres::start();
        let log = PostgresLog::connect_with(&server.url(), PostgresOptions::default())
            .await
            .unwrap();
        log.migrate().await.unwrap();
        let broker = Counting::default();
        let bus = bus(&log, &broker);
        bus.start().await.unwrap();
        let cut =
            "SELECT count(pg_terminate_backend(pid)) FROM pg_stat_activity WHERE application_name = 'postrider relay'";
        for id in 0..200 {
            publish(&bus, id).await;
            if id % 40 == 20 {
                // The relay takes a moment to come back from the time before.
                let began = Instant::now();
                while sqlx::query_scalar::<_, i64>(cut).fetch_one(log.pool()).await.unwrap() == 0 {
                    assert!(
                        began.elapsed() < Duration::from_secs(10),
                        "the relay does not come back"
                    );
                    tokio::time::sleep(Duration::from_millis(20)).await;
                }
                until_all_are_sent(&broker, usize::try_from(id + 1).unwrap()).await;
            }
        }
        until_all_are_sent(&broker, 200).await;
        bus.shutdown(Duration::from_secs(5)).await.unwrap();
        let left: i64 = sqlx::query_scalar("SELECT count(*) FROM postrider.event")
            .fetch_one(log.pool())
            .await
            .unwrap();
        assert_eq!(left, 0);
    });
}

#[test]
fn idle_sessions_leave_the_server_alone() {
    run(async {
        // A server of its own, whose transactions are all ours.
        let server = Postgres::start();
        let log = PostgresLog::connect_with(&server.url(), PostgresOptions::default())
            .await
            .unwrap();
        log.migrate().await.unwrap();
        let groups = ["a", "b", "c"].map(|group| Mailbox::Inbox(postrider_core::GroupName::new(group)));
        let mut sessions = Vec::new();
        for mailbox in groups.iter().chain([&Mailbox::outbox()]) {
            // Renewals, which come apart from this, every 200 s.
            let session = log.open(mailbox, &options(Duration::from_secs(600))).await.unwrap();
            sessions.push(tokio::spawn(async move {
                loop {
                    session.claim(&Claim::new(100)).await.unwrap();
                    session.wait(Duration::from_secs(30)).await.unwrap();
                }
            }));
        }
        log.append(&Mailbox::outbox(), &[record(None, "1")]).await.unwrap();
        let count = async || -> i64 {
            // Statistics come late.
            tokio::time::sleep(Duration::from_secs(12)).await;
            sqlx::query_scalar("SELECT xact_commit + xact_rollback FROM pg_stat_database WHERE datname = 'postgres'")
                .fetch_one(log.pool())
                .await
                .unwrap()
        };
        let before = count().await;
        let began = Instant::now();
        let after = count().await;
        let each_second = (after - before) as f64 / began.elapsed().as_secs_f64();
        println!(
            "{each_second:.1} transactions a second for {} mailboxes",
            sessions.len()
        );
        assert!(each_second < 2.5, "{each_second} transactions a second");
        let connections: i64 =
            sqlx::query_scalar("SELECT count(*) FROM pg_stat_activity WHERE application_name = 'postrider relay'")
                .fetch_one(log.pool())
                .await
                .unwrap();
        assert!(connections <= 2 * 4 + 1, "{connections} connections");
    });
}
