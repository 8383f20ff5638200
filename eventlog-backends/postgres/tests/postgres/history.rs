//! What succeeded, how long it is kept, and that it never stands in the way.

use crate::fixture::{LONG, PostgresFixture, claim, done, open, options, record};
use postrider_core::{
    Mailbox,
    log::{EventLogStore as _, Purge},
};
use postrider_postgres::PostgresOptions;
use postrider_testkit::{run, server::Postgres};
use std::time::{Duration, Instant};

const HOUR: Duration = Duration::from_secs(3600);

fn purge(age: Duration) -> Purge {
    Purge::new(Mailbox::outbox(), 1000).succeeded_after(age)
}

async fn publish(fixture: &PostgresFixture, count: usize) {
    let session = open(&fixture.log, options(LONG)).await;
    let batch: Vec<_> = (0..count).map(|n| record(None, &n.to_string())).collect();
    fixture.log.append(&Mailbox::outbox(), &batch).await.unwrap();
    let records = claim(&*session).await.records;
    assert_eq!(records.len(), count);
    assert!(done(&*session, &records).await.lost.is_empty());
    session.close().await.unwrap();
}

#[test]
fn slots_are_emptied_as_a_whole_day_after_day() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let day = HOUR * 24;
        let mut most = 0;
        // Five days of two events every two hours, past five midnights.
        for step in 0..60 {
            publish(&fixture, 2).await;
            fixture.jump(HOUR * 2).await;
            fixture.log.purge(&purge(day)).await.unwrap();
            let kept = fixture.number("SELECT count(*) FROM {done}").await;
            most = most.max(kept);
            let recent = fixture
                .number("SELECT count(*) FROM {done} WHERE finished_at > {clock}() - interval '23 hours'")
                .await;
            assert_eq!(recent, (2 * (step + 1)).min(22), "nothing goes before its time");
        }
        assert!(most <= 32, "little more than a day is kept: {most}");
        assert_eq!(fixture.log.history_failures(), 0);
        // Shorter from now on: the slots follow.
        fixture.log.purge(&purge(HOUR * 3)).await.unwrap();
        assert_eq!(
            fixture
                .number("SELECT value FROM {settings} WHERE name = 'history_slot_seconds'")
                .await,
            900
        );
        // The slot that is being written to is not emptied: which it is depends on the time of day.
        for jump in [HOUR * 4, HOUR / 2] {
            fixture.jump(jump).await;
            fixture.log.purge(&purge(HOUR * 3)).await.unwrap();
        }
        assert_eq!(fixture.number("SELECT count(*) FROM {done}").await, 0);
    });
}

#[test]
fn a_long_dump_stops_neither_settles_nor_the_clean_up() {
    run(async {
        let fixture = PostgresFixture::new().await;
        publish(&fixture, 10).await;
        fixture.jump(HOUR * 48).await;
        let mut dump = fixture.log.pool().begin().await.unwrap();
        let read = fixture.fill("SELECT count(*) FROM {done}");
        sqlx::raw_sql("SET TRANSACTION ISOLATION LEVEL REPEATABLE READ")
            .execute(&mut *dump)
            .await
            .unwrap();
        sqlx::query(sqlx::AssertSqlSafe(read))
            .execute(&mut *dump)
            .await
            .unwrap();
        let began = Instant::now();
        fixture.log.purge(&purge(HOUR * 24)).await.unwrap();
        assert!(
            began.elapsed() < Duration::from_secs(3),
            "the clean-up does not wait for it"
        );
        publish(&fixture, 10).await;
        assert_eq!(
            fixture.number("SELECT count(*) FROM {done}").await,
            20,
            "it is done another time"
        );
        dump.rollback().await.unwrap();
        fixture.log.purge(&purge(HOUR * 24)).await.unwrap();
        assert_eq!(fixture.number("SELECT count(*) FROM {done}").await, 10);
        assert_eq!(fixture.log.history_failures(), 0);
    });
}

#[test]
fn a_history_that_fails_never_fails_a_settle() {
    run(async {
        let options = PostgresOptions::default().with_schema(Postgres::shared().fresh_name());
        let fixture = PostgresFixture::with(options.with_lock_timeout(Duration::from_millis(200))).await;
        fixture
            .sql("ALTER TABLE {done} ADD CONSTRAINT broken CHECK (topic <> 't')")
            .await;
        publish(&fixture, 3).await;
        assert_eq!(fixture.log.history_failures(), 1);
        fixture.sql("ALTER TABLE {done} DROP CONSTRAINT broken").await;
        // Somebody has it locked.
        let mut lock = fixture.log.pool().begin().await.unwrap();
        let sql = fixture.fill("LOCK TABLE {done} IN ACCESS EXCLUSIVE MODE");
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
            .execute(&mut *lock)
            .await
            .unwrap();
        publish(&fixture, 3).await;
        lock.rollback().await.unwrap();
        assert_eq!(fixture.log.history_failures(), 2);
        assert_eq!(
            fixture.number("SELECT count(*) FROM {event}").await,
            0,
            "they are settled all the same"
        );
        publish(&fixture, 3).await;
        assert_eq!(fixture.number("SELECT count(*) FROM {done}").await, 3);
    });
}

#[test]
fn many_nodes_clean_up_at_once() {
    run(async {
        let fixture = PostgresFixture::new().await;
        publish(&fixture, 1000).await;
        fixture.sql("INSERT INTO {receipt} SELECT 1, gen_random_uuid(), clock_timestamp() - interval '3 days' FROM generate_series(1, 3000)").await;
        fixture.jump(HOUR * 48).await;
        let request = |max| {
            Purge::new(Mailbox::outbox(), max)
                .succeeded_after(HOUR * 24)
                .receipts_after(HOUR * 48)
        };
        let mut nodes = tokio::task::JoinSet::new();
        for node in 0..8 {
            let (log, request) = (fixture.handle().await, request(100 + node));
            nodes.spawn(async move {
                let mut removed = 0;
                loop {
                    let step = log.purge(&request).await.unwrap();
                    removed += step;
                    if step < request.max {
                        return removed;
                    }
                }
            });
        }
        let removed: u64 = nodes.join_all().await.into_iter().sum();
        assert_eq!(removed, 3000, "each receipt was removed by one of them");
        assert_eq!(fixture.number("SELECT count(*) FROM {receipt}").await, 0);
        assert_eq!(fixture.number("SELECT count(*) FROM {done}").await, 0);
    });
}
