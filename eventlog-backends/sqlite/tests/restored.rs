//! Tables change under a program that lives on, and what is cut off on the application's pool.

#![allow(clippy::unwrap_used)]

use postrider_core::{
    GroupName, Mailbox, Message, MessageId, Topic,
    log::{
        Admission, Arrival, Claim, EventLogStore, InboxLog as _, NewRecord, Outcome, Owner, Placement, Session,
        SessionOptions, Settled, TransactionalLog as _,
    },
};
use postrider_sqlite::SqliteLog;
use postrider_testkit::{log::cut_off_after, run};
use sqlx::{AssertSqlSafe, sqlite::SqlitePoolOptions};
use std::time::{Duration, Instant};

fn record(key: Option<&str>, name: &str) -> NewRecord {
    let message = Message::new(Topic::new("t"), "t.v1", name.to_owned());
    NewRecord::new(match key {
        Some(key) => message.with_key(key),
        None => message,
    })
}

fn options() -> SessionOptions {
    SessionOptions::new(Owner::new()).with_lease(Duration::from_secs(1))
}

/// Drains until so many came, for as long as a lease may take to be missed.
async fn drain(session: &dyn Session, count: usize) -> Vec<String> {
    let (mut all, began) = (Vec::new(), Instant::now());
    loop {
        let records = session.claim(&Claim::new(1000)).await.unwrap().records;
        let settled: Vec<_> = records
            .iter()
            .map(|record| Settled {
                tag: record.tag,
                outcome: Outcome::Done,
            })
            .collect();
        let lost = session.settle(&settled).await.unwrap().lost;
        for record in records.iter().filter(|record| !lost.contains(&record.tag)) {
            all.push(String::from_utf8_lossy(record.message.payload()).into_owned());
        }
        if records.is_empty() && (all.len() >= count || began.elapsed() > Duration::from_secs(10)) {
            all.sort();
            return all;
        }
        session.wait(Duration::from_millis(50)).await.unwrap();
    }
}

const DAMAGES: [&str; 4] = [
    "DELETE FROM postrider_mailbox; DELETE FROM postrider_event; DELETE FROM postrider_parked; DELETE FROM postrider_scheduled; DELETE FROM postrider_receipt; DELETE FROM postrider_note",
    "DELETE FROM postrider_mailbox",
    // The ids are others' now.
    "UPDATE postrider_mailbox SET name = name || '2'",
    "UPDATE postrider_mailbox SET id = id + 100",
];

#[test]
fn a_mailbox_that_is_gone_comes_into_being_again() {
    run(async {
        for damage in DAMAGES {
            let dir = tempfile::tempdir().unwrap();
            let log = SqliteLog::open(dir.path().join("log.db")).await.unwrap();
            let group = GroupName::new("billing");
            let mailboxes = [Mailbox::outbox(), Mailbox::Inbox(group.clone())];
            let mut sessions = Vec::new();
            for mailbox in &mailboxes {
                let session = EventLogStore::open(&log, mailbox, &options()).await.unwrap();
                log.append(mailbox, &[record(Some("k"), "before")]).await.unwrap();
                assert_eq!(drain(&*session, 1).await, ["before"]);
                sessions.push(session);
            }
            sqlx::raw_sql(damage).execute(log.pool()).await.unwrap();
            for mailbox in &mailboxes {
                let many: Vec<_> = (0..5).map(|n| record(Some("k"), &n.to_string())).collect();
                log.append(mailbox, &many[..1]).await.unwrap();
                log.append(mailbox, &many[1..]).await.unwrap();
                let mut tx = log.begin().await.unwrap();
                log.append_in(tx.lend(), mailbox, &[record(None, "5")]).await.unwrap();
                tx.commit().await.unwrap();
                log.append(mailbox, &[record(None, "6").after(Duration::from_millis(10))])
                    .await
                    .unwrap();
            }
            let arrival = [Arrival::new(&record(None, "x").message)];
            for expected in [Admission::New, Admission::Duplicate] {
                let mut tx = log.begin().await.unwrap();
                assert_eq!(
                    log.admit(tx.lend(), &group, &arrival).await.unwrap(),
                    [expected],
                    "{damage}"
                );
                tx.commit().await.unwrap();
            }
            assert_eq!(log.look(&group, &arrival).await.unwrap(), [Admission::Duplicate]);
            assert!(log.write_note(None, &group, MessageId::new(), 0, "x").await.unwrap());
            for (session, mailbox) in sessions.iter().zip(&mailboxes) {
                let found = drain(&**session, 7).await;
                assert_eq!(found, ["0", "1", "2", "3", "4", "5", "6"], "{damage}: {mailbox}");
            }
        }
    });
}

#[test]
fn an_ok_means_committed_whatever_was_cut_off() {
    run(async {
        for connections in [1, 3] {
            let dir = tempfile::tempdir().unwrap();
            let url = format!("sqlite://{}?mode=rwc", dir.path().join("log.db").display());
            let pool = SqlitePoolOptions::new().max_connections(connections);
            let pool = pool.connect(&url).await.unwrap();
            let log = SqliteLog::on_pool(pool.clone(), Default::default()).await.unwrap();
            let mut expected = Vec::new();
            for polls in 1..=8 {
                for n in 0..4 {
                    cut_off_after(polls, pool.begin()).await;
                    cut_off_after(polls, pool.begin_with("BEGIN IMMEDIATE")).await;
                    cut_off_after(polls, log.begin()).await;
                    let name = format!("handled {polls} {n}");
                    let handled = cut_off_after(polls, async {
                        let mut tx = log.begin().await.unwrap();
                        log.append_in(tx.lend(), &Mailbox::outbox(), &[record(None, &name)])
                            .await
                            .unwrap();
                        tx.commit().await.unwrap();
                    });
                    if handled.await {
                        expected.push(name);
                    }
                    let name = format!("{polls} {n}");
                    log.append(&Mailbox::outbox(), &[record(None, &name)]).await.unwrap();
                    expected.push(name);
                    let dead = record(None, "dead").placed(Placement::Failed {
                        hold_key: false,
                        attempts: 1,
                        errors: Vec::new(),
                    });
                    log.append(&Mailbox::outbox(), &[dead]).await.unwrap();
                }
            }
            pool.close().await;
            let again = SqliteLog::open(dir.path().join("log.db")).await.unwrap();
            let dead = AssertSqlSafe("SELECT count(*) FROM postrider_parked WHERE state = 3");
            let dead: i64 = sqlx::query_scalar(dead).fetch_one(again.pool()).await.unwrap();
            assert_eq!(dead, 32);
            let outbox = Mailbox::outbox();
            let session = EventLogStore::open(&again, &outbox, &options()).await.unwrap();
            let mut found = drain(&*session, expected.len()).await;
            // Cut off in its COMMIT it may have happened.
            found.retain(|name| !name.starts_with("handled") || expected.contains(name));
            expected.sort();
            assert_eq!(found, expected);
        }
    });
}

#[test]
fn nothing_is_lost_below_the_cursor() {
    run(async {
        for damage in [
            "DELETE FROM sqlite_sequence",
            "UPDATE sqlite_sequence SET seq = 1",
            "DELETE FROM postrider_event; DELETE FROM sqlite_sequence",
            "DELETE FROM postrider_event; DELETE FROM postrider_done; DELETE FROM postrider_parked; DELETE FROM sqlite_sequence",
        ] {
            for is_new_session in [false, true] {
                let dir = tempfile::tempdir().unwrap();
                let log = SqliteLog::open(dir.path().join("log.db")).await.unwrap();
                let outbox = Mailbox::outbox();
                let mut session = EventLogStore::open(&log, &outbox, &options()).await.unwrap();
                let old: Vec<_> = (0..20).map(|n| record(Some("k"), &n.to_string())).collect();
                log.append(&outbox, &old).await.unwrap();
                assert_eq!(drain(&*session, 20).await.len(), 20);
                let dead = record(None, "dead").placed(Placement::Failed {
                    hold_key: false,
                    attempts: 1,
                    errors: Vec::new(),
                });
                log.append(&outbox, &[dead]).await.unwrap();
                if is_new_session {
                    session.close().await.unwrap();
                }
                sqlx::raw_sql(damage).execute(log.pool()).await.unwrap();
                // More at once than came before, of which a part is parked on arrival.
                let new: Vec<_> = (100..150).map(|n| record(Some("k"), &n.to_string())).collect();
                log.append(&outbox, &new).await.unwrap();
                let parked = record(None, "parked").placed(Placement::Parked {
                    after: Duration::ZERO,
                    attempts: 1,
                    errors: Vec::new(),
                });
                log.append(&outbox, &[parked]).await.unwrap();
                if is_new_session {
                    session = EventLogStore::open(&log, &outbox, &options()).await.unwrap();
                }
                let mut expected: Vec<String> = (100..150).map(|n| n.to_string()).collect();
                expected.push("parked".to_owned());
                assert_eq!(drain(&*session, 51).await, expected, "{damage}");
                log.append(&outbox, &[record(Some("k"), "later")]).await.unwrap();
                assert_eq!(drain(&*session, 1).await, ["later"], "{damage}");
            }
        }
    });
}
