//! Who has which part of a mailbox.

use crate::fixture::{LONG, PostgresFixture, claim, done, drain, names, open, options, record};
use postrider_core::Mailbox;
use postrider_core::log::{EventLogStore as _, Session};
use postrider_testkit::run;
use sqlx::{AssertSqlSafe, SqlSafeStr as _};
use std::time::{Duration, Instant};

/// How many lanes each owner has, fewest first; what nobody has is not counted.
async fn spread(fixture: &PostgresFixture) -> Vec<i64> {
    let sql = fixture.fill("SELECT count(*) FROM {lane} WHERE owner IS NOT NULL GROUP BY owner ORDER BY 1");
    let sql = AssertSqlSafe(sql).into_sql_str();
    sqlx::query_scalar(sql).fetch_all(fixture.log.pool()).await.unwrap()
}

/// Lets sessions claim, as relays do that have nothing to do, until the lanes are spread like this.
async fn until_spread(fixture: &PostgresFixture, sessions: &[&dyn Session], expected: &[i64], limit: Duration) {
    let began = Instant::now();
    loop {
        for session in sessions {
            claim(*session).await;
        }
        let found = spread(fixture).await;
        if found == expected {
            return;
        }
        assert!(
            began.elapsed() < limit,
            "{found:?} instead of {expected:?} after {limit:?}"
        );
        tokio::time::sleep(Duration::from_millis(30)).await;
    }
}

#[test]
fn lanes_are_spread_evenly_taken_over_and_handed_back() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let lease = Duration::from_millis(1200);
        let log = fixture.handle().await;
        let one = open(&fixture.log, options(lease)).await;
        until_spread(&fixture, &[&*one], &[64], Duration::from_millis(500)).await;
        let two = open(&log, options(lease)).await;
        until_spread(&fixture, &[&*one, &*two], &[32, 32], Duration::from_secs(6)).await;
        let three = open(&log, options(lease)).await;
        until_spread(
            &fixture,
            &[&*one, &*two, &*three],
            &[20, 22, 22],
            Duration::from_secs(6),
        )
        .await;
        // One dies: its lanes are taken once its lease is over.
        drop(one);
        until_spread(&fixture, &[&*two, &*three], &[32, 32], Duration::from_secs(6)).await;
        // One ends well: the other need not wait for any lease.
        two.close().await.unwrap();
        until_spread(&fixture, &[&*three], &[64], Duration::from_millis(700)).await;
    });
}

#[test]
fn a_lane_is_handed_over_only_when_nothing_of_it_is_out() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let lease = Duration::from_millis(900);
        let one = open(&fixture.log, options(lease)).await;
        let all: Vec<_> = (0..300)
            .map(|n| record(Some(&format!("k{}", n % 100)), &n.to_string()))
            .collect();
        fixture.log.append(&Mailbox::outbox(), &all).await.unwrap();
        let held = claim(&*one).await.records;
        assert_eq!(held.len(), 300);
        let log = fixture.handle().await;
        let two = open(&log, options(lease)).await;
        let began = Instant::now();
        while began.elapsed() < lease * 3 {
            for session in [&one, &two] {
                assert!(
                    claim(&**session).await.records.is_empty(),
                    "what is out is nobody else's"
                );
                tokio::time::sleep(Duration::from_millis(50)).await;
            }
        }
        assert!(
            done(&*one, &held).await.lost.is_empty(),
            "the lease was kept all the time"
        );
        until_spread(&fixture, &[&*one, &*two], &[32, 32], Duration::from_secs(5)).await;
    });
}

#[test]
fn a_session_that_waits_is_told_of_what_others_write_and_leave() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let one = open(
            &fixture.log,
            options(LONG).with_poll_interval(Duration::from_millis(200)),
        )
        .await;
        let log = fixture.handle().await;
        let two = open(&log, options(LONG).with_poll_interval(Duration::from_millis(200))).await;
        claim(&*one).await;
        drain(&*one).await;
        let soon = Duration::from_secs(3);
        let waits = async |session: &dyn Session| {
            let began = Instant::now();
            session.wait(LONG).await.unwrap();
            assert!(began.elapsed() < soon, "it was not told: {:?}", began.elapsed());
        };
        // An event of another process.
        let writes = async {
            tokio::time::sleep(Duration::from_millis(700)).await;
            log.append(&Mailbox::outbox(), &[record(None, "1")]).await.unwrap();
        };
        let (first, ()) = tokio::join!(async { claim_when_told(&*one, &waits).await }, writes);
        assert_eq!(first, ["1"]);
        // One that is due later.
        let later = record(None, "2").after(Duration::from_millis(900));
        log.append(&Mailbox::outbox(), &[later]).await.unwrap();
        assert_eq!(claim_when_told(&*one, &waits).await, ["2"]);
        // Lanes that another has left.
        claim(&*two).await;
        let leaves = async {
            tokio::time::sleep(Duration::from_millis(300)).await;
            one.close().await.unwrap();
        };
        tokio::join!(waits(&*two), leaves);
        log.append(&Mailbox::outbox(), &[record(Some("k"), "3")]).await.unwrap();
        assert_eq!(drain(&*two).await, ["3"]);
    });
}

async fn claim_when_told(session: &dyn Session, waits: &impl AsyncFn(&dyn Session)) -> Vec<String> {
    for _ in 0..20 {
        waits(session).await;
        let records = claim(session).await.records;
        done(session, &records).await;
        if !records.is_empty() {
            return names(&records);
        }
    }
    Vec::new()
}
