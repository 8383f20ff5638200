//! The settled floor rests on a sequence that only goes forward: test fixtures, restores and administrators set it back.

use crate::fixture::{PostgresFixture, claim, done, names, open, options, record};
use postrider_core::{
    Mailbox,
    log::{EventLogStore as _, Outcome, Session, Settled},
};
use postrider_testkit::run;
use std::time::{Duration, Instant};

/// As an engine does it: claims when it is told to, until so many distinct events came.
async fn take(session: &dyn Session, count: usize) -> Vec<String> {
    let (mut all, began) = (Vec::new(), Instant::now());
    while all.len() < count && began.elapsed() < Duration::from_secs(10) {
        let records = claim(session).await.records;
        done(session, &records).await;
        for name in names(&records) {
            if !all.contains(&name) {
                all.push(name);
            }
        }
        if records.is_empty() {
            session.wait(Duration::from_secs(5)).await.unwrap();
        }
    }
    all
}

async fn append(fixture: &PostgresFixture, names: impl IntoIterator<Item = String>) {
    for name in names {
        fixture
            .log
            .append(&Mailbox::outbox(), &[record(Some("k"), &name)])
            .await
            .unwrap();
    }
}

/// Some events come and go, and one stays parked.
async fn have_a_past(fixture: &PostgresFixture, session: &dyn Session) {
    append(fixture, (0..30).map(|n| format!("old {n}"))).await;
    assert_eq!(take(session, 30).await.len(), 30);
    let refused = [record(Some("refused"), "refused")];
    fixture.log.append(&Mailbox::outbox(), &refused).await.unwrap();
    let records = claim(session).await.records;
    let failed = Settled {
        tag: records[0].tag,
        outcome: Outcome::Failed {
            attempts: 1,
            errors: Vec::new(),
            hold_key: false,
        },
    };
    session.settle(&[failed]).await.unwrap();
    // So that the floor is behind all of it.
    tokio::time::sleep(Duration::from_millis(300)).await;
    assert!(claim(session).await.records.is_empty());
}

fn expected() -> Vec<String> {
    (0..5).map(|n| format!("new {n}")).collect()
}

#[test]
fn nothing_is_lost_below_the_floor() {
    run(async {
        for damage in [
            "TRUNCATE {event} RESTART IDENTITY",
            "TRUNCATE {event}, {parked} RESTART IDENTITY",
            "SELECT setval('{position}', 1)",
            "ALTER SEQUENCE {position} RESTART",
            "ALTER SEQUENCE {position} CACHE 20",
        ] {
            let fixture = PostgresFixture::new().await;
            let session = open(&fixture.log, options(Duration::from_secs(30))).await;
            have_a_past(&fixture, &*session).await;
            fixture.sql(damage).await;
            append(&fixture, expected()).await;
            let mut found = take(&*session, 5).await;
            if damage.ends_with("CACHE 20") {
                // The order of commits is not in the ids any more.
                found.sort();
            }
            assert_eq!(found, expected(), "{damage}");
            // And whatever comes later, with a refusal among it.
            let record = record(None, "later");
            fixture.log.append(&Mailbox::outbox(), &[record]).await.unwrap();
            assert_eq!(take(&*session, 1).await, ["later"], "{damage}");
        }
    });
}

#[test]
fn ids_in_store_are_read_when_they_are_used() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let session = open(&fixture.log, options(Duration::from_secs(30))).await;
        fixture.sql("ALTER SEQUENCE {position} CACHE 20").await;
        let mut connections = Vec::new();
        for _ in 0..3 {
            connections.push(fixture.log.pool().acquire().await.unwrap());
        }
        for n in 0..6 {
            // Each connection has ids of its own: later ones are lower.
            let connection = &mut connections[2 - n % 3];
            let sql = format!("SELECT {{append}}('t', 't.v1', '\"{n}\"'::jsonb)");
            let sql = fixture.fill(&sql);
            sqlx::raw_sql(sqlx::AssertSqlSafe(sql))
                .execute(&mut **connection)
                .await
                .unwrap();
            assert_eq!(take(&*session, 1).await, [format!("\"{n}\"")]);
            tokio::time::sleep(Duration::from_millis(250)).await;
        }
    });
}

#[test]
fn a_sequence_that_has_caught_up_between_two_looks_is_noticed_too() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let session = open(&fixture.log, options(Duration::from_millis(400))).await;
        have_a_past(&fixture, &*session).await;
        let many: Vec<String> = (0..60).map(|n| format!("new {n}")).collect();
        let values: Vec<String> = many
            .iter()
            .map(|name| {
                format!("SELECT {{append}}('t', 't.v1', '{name}'::text, content_type => 'text/plain', key => 'k');")
            })
            .collect();
        let values = values.join(" ");
        fixture
            .sql(&format!(
                "BEGIN; TRUNCATE {{event}}, {{parked}} RESTART IDENTITY; {values} COMMIT;"
            ))
            .await;
        let mut found = take(&*session, 60).await;
        found.sort();
        let mut many = many;
        many.sort();
        assert_eq!(found, many);
    });
}
