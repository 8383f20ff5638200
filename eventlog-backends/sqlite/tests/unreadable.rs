//! Rows that something else has written: they are refused, or become dead letters that a person sees; they stop nobody.

#![allow(clippy::unwrap_used)]

use postrider_core::{
    EventLog, Mailbox, Message, Topic,
    log::{
        Claim, EventLogStore, Filter, LogAdmin as _, NewRecord, Outcome, Owner, Page, RecordState, SessionOptions,
        Settled,
    },
};
use postrider_sqlite::SqliteLog;
use postrider_testkit::run;
use sqlx::AssertSqlSafe;
use std::time::Duration;

const COLUMNS: &str = "mailbox, message_id, topic, type, source, key, content_type, headers, time, payload, created_at";

fn row(mailbox: i64, id: &str, topic: &str, key: &str, headers: &str, time: &str) -> String {
    format!("{mailbox}, {id}, {topic}, 't.v1', NULL, {key}, 'text/plain', '{headers}', {time}, x'41', 0")
}

async fn try_sql(log: &SqliteLog, sql: String) -> Result<(), String> {
    let done = sqlx::raw_sql(AssertSqlSafe(sql)).execute(log.pool()).await;
    done.map(drop).map_err(|error| error.to_string())
}

const ID: &str = "randomblob(16)";
const NEVER: &str = "9223372036854775807";

#[test]
fn rows_that_make_no_sense_cannot_be_inserted() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let log = SqliteLog::open(dir.path().join("log.db")).await.unwrap();
        for bad in [
            row(7, ID, "'t'", "NULL", "[]", "NULL"),
            row(1, "x'010203'", "'t'", "NULL", "[]", "NULL"),
            row(1, ID, "'a b'", "NULL", "[]", "NULL"),
            row(1, ID, "''", "NULL", "[]", "NULL"),
            row(1, ID, "'t'", "''", "[]", "NULL"),
            row(1, ID, "'t'", "printf('%.600c', 'k')", "[]", "NULL"),
            row(1, ID, "'t'", "NULL", "{}", "NULL"),
            row(1, ID, "'t'", "NULL", "[]", NEVER),
        ] {
            let event = format!("INSERT INTO postrider_event ({COLUMNS}) VALUES ({bad})");
            assert!(try_sql(&log, event).await.unwrap_err().contains("constraint"), "{bad}");
            let scheduled = format!("INSERT INTO postrider_scheduled ({COLUMNS}, due_at) VALUES ({bad}, 0)");
            assert!(
                try_sql(&log, scheduled).await.unwrap_err().contains("constraint"),
                "{bad}"
            );
        }
        let good = row(1, ID, "'t'", "NULL", "[]", "NULL");
        let never = format!("INSERT INTO postrider_scheduled ({COLUMNS}, due_at) VALUES ({good}, {NEVER})");
        assert!(try_sql(&log, never).await.unwrap_err().contains("constraint"));
        try_sql(&log, format!("INSERT INTO postrider_event ({COLUMNS}) VALUES ({good})"))
            .await
            .unwrap();
    });
}

#[test]
fn an_unreadable_row_is_a_dead_letter_and_stops_nobody() {
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let log = SqliteLog::open(dir.path().join("log.db")).await.unwrap();
        let outbox = Mailbox::outbox();
        let insert = async |table: &str, more: &str, values: String| {
            let sql = format!(
                "PRAGMA ignore_check_constraints = ON; INSERT INTO postrider_{table} ({COLUMNS}{more}) VALUES ({values}); PRAGMA ignore_check_constraints = OFF"
            );
            try_sql(&log, sql).await.unwrap();
        };
        let bad = [
            row(1, ID, "'t'", "'a'", "{}", "0"),
            row(1, ID, "'a b'", "'a'", "[]", "0"),
            row(1, "x'010203'", "'t'", "NULL", "[]", NEVER),
            row(1, ID, "'t'", "NULL", "[\"secret", "-9223372036854775808"),
            row(1, ID, "CAST(x'74ff' AS TEXT)", "NULL", "[]", "0"),
        ];
        for bad in &bad {
            let good = Message::new(Topic::new("t"), "t.v1", "good").with_key("a");
            log.append(&outbox, &[NewRecord::new(good)]).await.unwrap();
            insert("event", "", bad.clone()).await;
        }
        let parked = |n: i64, key: &str, headers: &str, state: i64, due: &str| {
            let row = row(1, ID, "'t'", key, headers, "0");
            format!("{row}, {n}, 2, {state}, {due}, '[]'")
        };
        const MORE: &str = ", id, attempts, state, due_at, errors";
        for (n, headers, state) in [(1001, "{}", 0), (1002, "{}", 1), (1003, "[]", 1)] {
            let due = if state == 0 { "1" } else { "NULL" };
            insert("parked", MORE, parked(n, "'p'", headers, state, due)).await;
        }
        insert("parked", MORE, parked(1004, "NULL", "[]", 0, NEVER)).await;
        insert("parked", MORE, parked(1005, "NULL", "[]", 0, "-9223372036854775808")).await;
        let options = SessionOptions::new(Owner::new()).with_lease(Duration::from_secs(60));
        let session = EventLogStore::open(&log, &outbox, &options).await.unwrap();
        let mut found = Vec::new();
        for _ in 0..30 {
            let claimed = session.claim(&Claim::new(100)).await.unwrap();
            let done = |record: &postrider_core::log::Record| Settled {
                tag: record.tag,
                outcome: Outcome::Done,
            };
            let settled: Vec<_> = claimed.records.iter().map(done).collect();
            session.settle(&settled).await.unwrap();
            for record in &claimed.records {
                found.push(String::from_utf8_lossy(record.message.payload()).into_owned());
            }
        }
        found.sort();
        assert_eq!(found, ["A", "A", "good", "good", "good", "good", "good"]);
        let failed = Filter::of(outbox.clone()).with_state(RecordState::Failed);
        let listing = log.list(&failed, &Page::default()).await.unwrap();
        assert_eq!(listing.entries.len(), 7);
        for entry in &listing.entries {
            let error = &entry.errors[0].text;
            assert!(error.contains("cannot be read") && !error.contains("secret"), "{error}");
            let shown = log.show(&outbox, entry.message.id()).await.unwrap().unwrap();
            assert_eq!(shown.message.payload(), entry.message.payload());
            let one = Filter::of(outbox.clone()).with_id(entry.message.id());
            assert_eq!(log.discard(&one, 10).await.unwrap(), 1, "{error}");
        }
        let log: EventLog = log.clone().into();
        assert_eq!(log.admin().unwrap().stats().await.unwrap()[&outbox].failed, 0);
    });
}
