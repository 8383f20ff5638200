//! Rows that something else has written: they are refused, or become dead letters that a person sees; they stop nobody.

use crate::fixture::{LONG, PostgresFixture, claim, done, drain, names, open, options, record};
use postrider_core::{
    EventLog, Mailbox,
    log::{EventLogStore as _, Filter, Page, RecordState},
};
use postrider_testkit::run;
use sqlx::{AssertSqlSafe, SqlSafeStr as _};
use std::time::Duration;

async fn try_sql(fixture: &PostgresFixture, sql: &str) -> Result<(), String> {
    let sql = AssertSqlSafe(fixture.fill(sql)).into_sql_str();
    let done = sqlx::raw_sql(sql).execute(fixture.log.pool()).await;
    done.map(drop).map_err(|error| error.to_string())
}

#[test]
fn times_without_end_are_refused() {
    run(async {
        let fixture = PostgresFixture::new().await;
        for (arguments, says) in [
            ("not_before => 'infinity'", "before the year 10000"),
            ("not_before => '290000-01-01'", "before the year 10000"),
            ("occurred_at => 'infinity'", "between the years 1 and 9999"),
            ("occurred_at => '-infinity'", "between the years 1 and 9999"),
            ("occurred_at => '4000-01-01 BC'", "between the years 1 and 9999"),
        ] {
            let sql = format!("SELECT {{append}}('t', 't.v1', '1'::jsonb, {arguments})");
            let error = try_sql(&fixture, &sql).await.unwrap_err();
            assert!(error.contains(says), "{arguments}: {error}");
        }
        for fine in [
            "not_before => '-infinity'",
            "occurred_at => NULL",
            "not_before => '9000-01-01'",
        ] {
            let sql = format!("SELECT {{append}}('t', 't.v1', '1'::jsonb, {fine})");
            try_sql(&fixture, &sql).await.unwrap();
        }
        let session = open(&fixture.log, options(LONG)).await;
        assert_eq!(drain(&*session).await, ["1", "1"]);
    });
}

const COLUMNS: &str =
    "mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload, created_at";

fn row(lane: i16, topic: &str, key: &str, headers: &str, time: &str) -> String {
    format!(
        "1, {lane}, gen_random_uuid(), '{topic}', 't.v1', NULL, {key}, 'text/plain', '{headers}', {time}, '\\x41'::bytea, now()"
    )
}

#[test]
fn rows_that_make_no_sense_cannot_be_inserted() {
    run(async {
        let fixture = PostgresFixture::new().await;
        for bad in [
            row(64, "t", "NULL", "[]", "now()"),
            row(-1, "t", "NULL", "[]", "now()"),
            row(1, "a b", "NULL", "[]", "now()"),
            row(1, "a..b", "NULL", "[]", "now()"),
            row(1, "t", "''", "[]", "now()"),
            row(1, "t", "repeat('k', 513)", "[]", "now()"),
            row(1, "t", "NULL", "{}", "now()"),
            row(1, "t", "NULL", "[]", "'infinity'"),
            row(1, "t", "NULL", "[]", "'290000-01-01'"),
        ] {
            let event = format!("INSERT INTO {{event}} ({COLUMNS}) VALUES ({bad})");
            assert!(
                try_sql(&fixture, &event).await.unwrap_err().contains("event_valid"),
                "{bad}"
            );
            let scheduled = format!("INSERT INTO {{scheduled}} ({COLUMNS}, due_at) VALUES ({bad}, now())");
            let error = try_sql(&fixture, &scheduled).await.unwrap_err();
            assert!(error.contains("scheduled_valid"), "{bad}");
        }
        let good = row(1, "t", "NULL", "[]", "now()");
        let never = format!("INSERT INTO {{scheduled}} ({COLUMNS}, due_at) VALUES ({good}, 'infinity')");
        assert!(try_sql(&fixture, &never).await.unwrap_err().contains("scheduled_valid"));
    });
}

const UNCHECKED: &str = "ALTER TABLE {event} DROP CONSTRAINT event_valid; \
    ALTER TABLE {scheduled} DROP CONSTRAINT scheduled_valid; ALTER TABLE {parked} DROP CONSTRAINT parked_valid";

#[test]
fn an_unreadable_row_is_a_dead_letter_and_stops_nobody() {
    run(async {
        let fixture = PostgresFixture::new().await;
        fixture.sql(UNCHECKED).await;
        let session = open(&fixture.log, options(LONG)).await;
        let bad = [
            row(12, "t", "'a'", "{}", "now()"),
            row(12, "a b", "'a'", "[]", "now()"),
            row(12, "t", "NULL", "[[1, 2]]", "'infinity'"),
            row(3, "t", "NULL", "[\"secret", "'-infinity'"),
        ];
        for bad in &bad {
            fixture
                .log
                .append(&Mailbox::outbox(), &[record(Some("a"), "good")])
                .await
                .unwrap();
            fixture
                .sql(&format!("INSERT INTO {{event}} ({COLUMNS}) VALUES ({bad})"))
                .await;
        }
        // One that is delayed, and two parked of a key: a head and what waits behind it, with a good one behind.
        fixture
            .sql(&format!(
                "INSERT INTO {{scheduled}} ({COLUMNS}, due_at) VALUES ({}, now())",
                bad[1]
            ))
            .await;
        let parked = |n: i64, key: &str, headers: &str, state: i16, next_at: &str| {
            format!(
                "INSERT INTO {{parked}} ({COLUMNS}, id, attempts, state, next_at, errors) VALUES ({}, {n}, 2, {state}, {next_at}, '[]')",
                row(12, "t", key, headers, "now()")
            )
        };
        fixture.sql("SELECT setval('{position}', 2000)").await;
        for (n, headers, state) in [(1001, "{}", 0), (1002, "{}", 1), (1003, "[]", 1)] {
            let next_at = if state == 0 { "now()" } else { "NULL" };
            fixture.sql(&parked(n, "'p'", headers, state, next_at)).await;
        }
        fixture.sql(&parked(1004, "NULL", "[]", 0, "now()")).await;
        let mut found = Vec::new();
        for _ in 0..20 {
            let records = claim(&*session).await.records;
            done(&*session, &records).await;
            found.extend(names(&records));
            tokio::time::sleep(Duration::from_millis(25)).await;
        }
        found.sort();
        assert_eq!(found, ["A", "A", "good", "good", "good", "good"]);
        // They are seen with the reason, and can be discarded.
        let log: EventLog = fixture.log.clone().into();
        let admin = log.admin().unwrap();
        let failed = Filter::of(Mailbox::outbox()).with_state(RecordState::Failed);
        let listing = admin.list(&failed, &Page::default()).await.unwrap();
        assert_eq!(listing.entries.len(), 7);
        for entry in &listing.entries {
            let error = &entry.errors[0].text;
            assert!(error.contains("cannot be read") && !error.contains("secret"), "{error}");
            let shown = admin
                .show(&Mailbox::outbox(), entry.message.id())
                .await
                .unwrap()
                .unwrap();
            assert_eq!(shown.message.payload(), entry.message.payload());
        }
        // Redriven they fail again.
        let one = Filter::of(Mailbox::outbox()).with_id(listing.entries[0].message.id());
        assert_eq!(admin.redrive(&one, 1).await.unwrap(), 1);
        assert!(drain(&*session).await.is_empty());
        assert_eq!(admin.discard(&failed, 100).await.unwrap(), 7);
        assert_eq!(
            fixture.number("SELECT count(*) FROM {parked} WHERE state >= 3").await,
            0
        );
    });
}

#[test]
fn times_without_end_in_the_tables_panic_nowhere() {
    run(async {
        let fixture = PostgresFixture::new().await;
        fixture.sql(UNCHECKED).await;
        let row = row(1, "t", "NULL", "[]", "'infinity'");
        for (n, at) in [
            (1, "infinity"),
            (2, "290000-01-01"),
            (3, "-infinity"),
            (4, "4000-01-01 BC"),
        ] {
            fixture
                .sql(&format!(
                    "INSERT INTO {{scheduled}} ({COLUMNS}, due_at) VALUES ({row}, '{at}')"
                ))
                .await;
            fixture
                .sql(&format!(
                    "INSERT INTO {{parked}} ({COLUMNS}, id, attempts, state, next_at, errors) VALUES ({row}, {n}, 2, 0, '{at}', '[]')"
                ))
                .await;
        }
        fixture.sql("UPDATE {parked} SET created_at = 'infinity'").await;
        let session = open(&fixture.log, options(LONG)).await;
        fixture
            .log
            .append(&Mailbox::outbox(), &[record(None, "good")])
            .await
            .unwrap();
        assert!(drain(&*session).await.contains(&"good".to_owned()));
        let log: EventLog = fixture.log.clone().into();
        let admin = log.admin().unwrap();
        let all = Filter::of(Mailbox::outbox());
        admin.list(&all, &Page::default()).await.unwrap();
        admin.stats().await.unwrap();
    });
}
