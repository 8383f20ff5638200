//! An `Ok` means committed, whatever was cut off on the pool before: a client of an HTTP handler leaves, a time-out passes.

use crate::fixture::{LONG, PostgresFixture, drain, open, options, record};
use postrider_core::{
    Bus, Event, Mailbox, Message, Retry, Topic, Transactional,
    consumer::Timeout,
    log::{EventLogStore as _, NewRecord, Placement, TransactionalLog as _},
    memory::MemoryTransport,
    relay::Backoff,
};
use postrider_postgres::{PostgresLog, PostgresOptions};
use postrider_testkit::{log::cut_off_after, run, server::Postgres};
use sqlx::{AssertSqlSafe, PgPool, postgres::PgPoolOptions};
use std::time::Duration;

fn parked(name: &str) -> NewRecord {
    record(Some(name), name).placed(Placement::Parked {
        after: LONG,
        attempts: 1,
        errors: Vec::new(),
    })
}

fn dead(name: &str) -> NewRecord {
    let message = Message::new(Topic::new("t"), "t.v1", name.to_owned());
    NewRecord::new(message).placed(Placement::Failed {
        hold_key: false,
        attempts: 1,
        errors: Vec::new(),
    })
}

/// As a handler of a request does it, which is dropped with its client.
async fn handle(log: &PostgresLog, pool: &PgPool, name: &str) -> bool {
    let work = async {
        let mut tx = pool.begin().await?;
        sqlx::query("SELECT 1").execute(&mut *tx).await?;
        let batch = [record(None, name)];
        let lent = postrider_core::log::Lent::exclusive::<sqlx::PgConnection>(&mut tx);
        log.append_in(lent, &Mailbox::outbox(), &batch).await.unwrap();
        tx.commit().await
    };
    work.await.is_ok()
}

async fn nothing_is_lost_on(fixture: &PostgresFixture, log: &PostgresLog, pool: PgPool) {
    let mut expected = Vec::new();
    for polls in 1..=8 {
        for n in 0..3 {
            cut_off_after(polls, pool.begin()).await;
            cut_off_after(polls, pool.begin_with("BEGIN ISOLATION LEVEL SERIALIZABLE")).await;
            cut_off_after(polls, log.begin()).await;
            let name = format!("handled {polls} {n}");
            if cut_off_after(polls, handle(log, &pool, &name)).await {
                expected.push(name);
            }
            let name = format!("{polls} {n}");
            log.append(&Mailbox::outbox(), &[record(None, &name)]).await.unwrap();
            expected.push(name);
            let name = format!("parked {polls} {n}");
            log.append(&Mailbox::outbox(), &[parked(&name), dead(&name)])
                .await
                .unwrap();
            // What takes the transaction up itself still has one.
            let name = format!("whole {polls} {n}");
            assert!(handle(log, &pool, &name).await);
            expected.push(name);
        }
    }
    pool.close().await;
    assert_eq!(
        fixture.number("SELECT count(*) FROM {parked} WHERE state = 0").await,
        24,
        "parked"
    );
    assert_eq!(
        fixture.number("SELECT count(*) FROM {parked} WHERE state = 3").await,
        24,
        "dead letters"
    );
    let session = open(&fixture.log, options(LONG)).await;
    let mut found = drain(&*session).await;
    // Cut off in its COMMIT it may have happened.
    found.retain(|name| !name.starts_with("handled") || expected.contains(name));
    found.sort();
    expected.sort();
    assert_eq!(found, expected);
}

#[test]
fn nothing_is_lost_on_a_pool_of_the_application() {
    run(async {
        for connections in [1, 3] {
            let fixture = PostgresFixture::new().await;
            let pool = PgPoolOptions::new().max_connections(connections);
            let pool = pool.connect(&Postgres::shared().url()).await.unwrap();
            let log = PostgresLog::on_pool(pool.clone(), fixture.options.clone()).unwrap();
            nothing_is_lost_on(&fixture, &log, pool).await;
        }
    });
}

#[test]
fn nothing_is_lost_on_a_pool_of_ours() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let log = fixture.handle().await;
        nothing_is_lost_on(&fixture, &log, log.pool().clone()).await;
    });
}

#[test]
fn our_pool_takes_nothing_back_that_is_in_a_transaction() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let only_one = fixture.options.clone().with_max_connections(1);
        let log = PostgresLog::connect_with(&Postgres::shared().url(), only_one)
            .await
            .unwrap();
        let table = Postgres::shared().fresh_name();
        let create = format!("CREATE TABLE \"{table}\" (n int)");
        sqlx::raw_sql(AssertSqlSafe(create)).execute(log.pool()).await.unwrap();
        for polls in 1..=6 {
            cut_off_after(polls, log.pool().begin()).await;
            cut_off_after(polls, log.pool().begin_with("BEGIN READ ONLY")).await;
            // A statement of the application's own, without a transaction.
            let insert = format!("INSERT INTO \"{table}\" VALUES (1)");
            sqlx::raw_sql(AssertSqlSafe(insert)).execute(log.pool()).await.unwrap();
        }
        log.pool().close().await;
        let count = format!("SELECT count(*) FROM \"{table}\"");
        let count: i64 = sqlx::query_scalar(AssertSqlSafe(count))
            .fetch_one(fixture.log.pool())
            .await
            .unwrap();
        assert_eq!(count, 6);
    });
}

#[test]
fn a_closed_pool_closes_the_log() {
    run(async {
        let options = PostgresOptions::default().with_schema(Postgres::shared().fresh_name());
        let fixture = PostgresFixture::with(options).await;
        let log = fixture.handle().await;
        log.append(&Mailbox::outbox(), &[record(None, "1")]).await.unwrap();
        log.pool().close().await;
        let error = log.append(&Mailbox::outbox(), &[record(None, "2")]).await.unwrap_err();
        assert_eq!(error.kind(), postrider_core::ErrorKind::Closed);
        let error = log.begin().await.unwrap_err();
        assert_eq!(error.kind(), postrider_core::ErrorKind::Closed);
        tokio::time::timeout(Duration::from_secs(5), fixture.log.pool().close())
            .await
            .unwrap();
    });
}

#[derive(Debug, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "placed", key = |e: &Self| e.id % 7, crate = "postrider_core")]
struct Placed {
    id: u64,
}

#[test]
fn a_time_out_around_a_transaction_loses_no_event() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let pool = PgPoolOptions::new().max_connections(3);
        let pool = pool.connect(&Postgres::shared().url()).await.unwrap();
        let log = PostgresLog::on_pool(pool, fixture.options.clone()).unwrap();
        let bus = Bus::builder()
            .log(log)
            .transport(MemoryTransport::new())
            .build()
            .unwrap();
        let retry = || {
            Retry::default()
                .with_max_attempts(2)
                .with_backoff(Backoff::Fixed(Duration::from_millis(10)))
        };
        let timed = bus
            .subscribe::<Placed>("timed")
            .middleware(Timeout::after(Duration::from_millis(3)))
            .middleware(Transactional::new())
            .retry(retry())
            .handler(async |_, _| Ok(()))
            .start()
            .await
            .unwrap();
        let counted = bus
            .subscribe::<Placed>("counted")
            .handler(async |_, _| Ok(()))
            .start()
            .await
            .unwrap();
        bus.start().await.unwrap();
        for id in 0..200 {
            bus.publish(&Placed { id }).await.unwrap();
        }
        let until_all = async {
            loop {
                let (timed, counted) = (timed.report(), counted.report());
                // Each is handled, or was (cut off in its COMMIT), or a dead letter after two attempts: none is lost on its way
                // to the inbox.
                if timed.handled + timed.dropped + timed.dead_lettered >= 200 && counted.handled >= 200 {
                    break;
                }
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
        };
        let in_time = tokio::time::timeout(Duration::from_secs(40), until_all).await;
        assert!(in_time.is_ok(), "{:?} {:?}", timed.report(), counted.report());
        let dead = fixture.number("SELECT count(*) FROM {parked} WHERE state >= 3").await;
        assert_eq!(u64::try_from(dead).unwrap(), timed.report().dead_lettered);
        bus.shutdown(Duration::from_secs(5)).await.unwrap();
    });
}
