//! Those who park and unpark records of a key take turns.

use crate::fixture::{LONG, PostgresFixture, claim, done, drain, names, open, options, record};
use postrider_core::{
    Mailbox,
    log::{AttemptError, EventLogStore as _, Outcome, Parking, Session, Settled, Until},
};
use postrider_testkit::{log::LogFixture as _, run};
use sqlx::{Connection as _, PgConnection};
use std::time::{Duration, Instant};

fn parked(fixture: &PostgresFixture, after: Duration) -> Outcome {
    let error = AttemptError::new(fixture.clock().now(), 1, "refused");
    Outcome::Parked(Parking::new(Until::After(after), 1, vec![error]))
}

/// A transaction whose turn it is, of every key, for as long as it is open.
async fn take_every_turn(fixture: &PostgresFixture) -> PgConnection {
    let mut connection = fixture.log.pool().acquire().await.unwrap().detach();
    let lock = fixture.fill(
        "SELECT count(pg_advisory_xact_lock(pg_class.oid::int4, h)) FROM generate_series(0, 1023) h, pg_class \
         JOIN pg_namespace n ON n.oid = relnamespace WHERE relname = 'parked' AND nspname = '",
    ) + &fixture.options.schema
        + "'";
    sqlx::raw_sql("BEGIN").execute(&mut connection).await.unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(lock))
        .execute(&mut connection)
        .await
        .unwrap();
    connection
}

/// A stranger's transaction that has parked something, and stays open, holds up its keys and nobody else.
#[test]
fn a_transaction_that_stays_open_holds_up_nobody_else() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let log = &fixture.log;
        let session = open(log, options(LONG)).await;
        let append = async |records: &[_]| log.append(&Mailbox::outbox(), records).await.unwrap();
        append(&[record(Some("k"), "1")]).await;
        let first = claim(&*session).await.records;
        append(&[record(Some("k"), "2")]).await;
        assert!(claim(&*session).await.records.is_empty(), "the key is busy");
        settle(&*session, &first, parked(&fixture, Duration::ZERO)).await;
        let stranger = take_every_turn(&fixture).await;
        // One has to be parked behind the first of its key, and of the same claim others need not.
        let others: Vec<_> = (0..100).map(|n| record(Some(&format!("other {n}")), "other")).collect();
        append(&[record(Some("k"), "3")]).await;
        append(&others).await;
        let began = Instant::now();
        let (mut got, mut run) = (Vec::new(), Vec::new());
        while got.iter().filter(|name| *name == "other").count() < 100 {
            let records = claim(&*session).await.records;
            got.extend(names(&records));
            let (of_key, others): (Vec<_>, Vec<_>) = records.into_iter().partition(|r| r.message.key() == Some("k"));
            assert!(done(&*session, &others).await.lost.is_empty());
            run.extend(of_key);
            assert!(
                began.elapsed() < Duration::from_secs(2),
                "the others wait for the stranger: {got:?}"
            );
        }
        assert_eq!(names(&run), ["1", "2"], "the third waits for the stranger");
        // What is done is written, whatever else is in the batch has to wait for.
        append(&[record(None, "done"), record(Some("x"), "parked")]).await;
        let records = claim(&*session).await.records;
        let batch: Vec<_> = records
            .iter()
            .map(|record| Settled {
                tag: record.tag,
                outcome: if record.message.key() == Some("x") {
                    parked(&fixture, Duration::ZERO)
                } else {
                    Outcome::Done
                },
            })
            .collect();
        session.settle(&batch).await.unwrap_err();
        assert_eq!(
            fixture
                .number("SELECT count(*) FROM {event} WHERE convert_from(payload, 'UTF8') = 'done'")
                .await,
            0
        );
        stranger.close().await.unwrap();
        assert!(done(&*session, &run).await.lost.is_empty());
        // Tried again, as an engine does, it succeeds, and everything comes in order.
        assert!(session.settle(&batch).await.unwrap().lost.is_empty());
        let mut rest = Vec::new();
        let until = Instant::now() + Duration::from_secs(5);
        while Instant::now() < until && rest.len() < 2 {
            rest.extend(drain(&*session).await);
        }
        got.extend(rest);
        let of_key: Vec<&String> = got.iter().filter(|name| name.len() == 1).collect();
        assert_eq!(of_key, ["1", "2", "3"]);
    });
}

async fn settle(session: &dyn Session, records: &[postrider_core::log::Record], outcome: Outcome) {
    let settled = |record: &postrider_core::log::Record| Settled {
        tag: record.tag,
        outcome: outcome.clone(),
    };
    let batch: Vec<_> = records.iter().map(settled).collect();
    assert!(session.settle(&batch).await.unwrap().lost.is_empty());
}
