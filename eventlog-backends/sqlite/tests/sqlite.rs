//! What is particular to SQLite: files that cannot be used, transactions that are none, names that are hostile.

#![allow(clippy::unwrap_used)]

use postrider_core::{
    Bus, ErrorKind, EventLog, Mailbox, Message, Topic,
    clock::{Clock, ManualClock},
    log::{Claim, EventLogStore as _, Filter, LogAdmin as _, NewRecord, Outcome, Owner, Page, SessionOptions, Settled},
    memory::MemoryTransport,
};
use postrider_sqlite::{SqliteLog, SqliteOptions};
use sqlx::{Connection as _, SqliteConnection};
use std::{path::PathBuf, time::Duration};

fn message(name: &'static str) -> Message {
    Message::new(Topic::new("t"), "test.v1", name).with_key("k")
}

fn batch(name: &'static str) -> [NewRecord; 1] {
    [NewRecord::new(message(name))]
}

struct Dir(tempfile::TempDir);

impl Dir {
    fn new() -> Self {
        Self(tempfile::tempdir().unwrap())
    }
    fn file(&self) -> PathBuf {
        self.0.path().join("log.db")
    }
}

fn bus(log: &SqliteLog) -> Bus {
    Bus::builder()
        .log(log.clone())
        .transport(MemoryTransport::new())
        .build()
        .unwrap()
}

#[tokio::test]
async fn events_go_with_the_callers_transaction() {
    let dir = Dir::new();
    let log = SqliteLog::open(dir.file()).await.unwrap();
    let bus = bus(&log);
    sqlx::raw_sql("CREATE TABLE orders (id INTEGER)")
        .execute(log.pool())
        .await
        .unwrap();
    for commits in [true, false] {
        let mut tx = log.pool().begin().await.unwrap();
        sqlx::query("INSERT INTO orders VALUES (1)")
            .execute(&mut *tx)
            .await
            .unwrap();
        bus.publish_in(&mut tx, message("transaction")).await.unwrap();
        if commits {
            tx.commit().await.unwrap()
        } else {
            tx.rollback().await.unwrap()
        }
    }
    // A plain connection in a transaction, and one begun on the bus.
    let mut connection = log.pool().acquire().await.unwrap();
    let mut tx = connection.begin().await.unwrap();
    let inner: &mut SqliteConnection = &mut tx;
    bus.publish_in(inner, message("connection")).await.unwrap();
    tx.commit().await.unwrap();
    drop(connection);
    let mut tx = bus.begin().await.unwrap();
    let connection: &mut SqliteConnection = tx.connection().unwrap();
    sqlx::query("INSERT INTO orders VALUES (2)")
        .execute(connection)
        .await
        .unwrap();
    bus.publish_in(&mut tx, message("begun")).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = bus.begin().await.unwrap();
    bus.publish_in(&mut tx, message("never")).await.unwrap();
    drop(tx);
    let listing = log
        .list(&Filter::of(Mailbox::outbox()), &Page::default())
        .await
        .unwrap();
    let names: Vec<_> = listing
        .entries
        .iter()
        .map(|entry| entry.message.payload().to_vec())
        .collect();
    assert_eq!(names, [&b"transaction"[..], b"connection", b"begun"]);
    let orders: i64 = sqlx::query_scalar("SELECT count(*) FROM orders")
        .fetch_one(log.pool())
        .await
        .unwrap();
    assert_eq!(orders, 2);
}

#[tokio::test]
async fn a_connection_in_no_transaction_is_refused_with_what_to_do() {
    let dir = Dir::new();
    let log = SqliteLog::open(dir.file()).await.unwrap();
    let mut connection = log.pool().acquire().await.unwrap();
    let error = bus(&log).publish_in(&mut *connection, message("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::WrongTransaction);
    assert!(error.to_string().contains("pool.begin()"), "{error}");
    // A transaction on another file is refused by SQLite itself: the tables are not there.
    let elsewhere = Dir::new();
    let url = format!("sqlite://{}?mode=rwc", elsewhere.file().display());
    let other = sqlx::SqlitePool::connect(&url).await.unwrap();
    let mut tx = other.begin().await.unwrap();
    let error = bus(&log).publish_in(&mut tx, message("x")).await.unwrap_err();
    assert!(error.to_chain().contains("no such table"), "{error:?}");
}

#[tokio::test]
async fn a_reader_that_cannot_become_a_writer_is_told_how_to_begin() {
    let dir = Dir::new();
    let log = SqliteLog::open(dir.file()).await.unwrap();
    let bus = bus(&log);
    let mut tx = log.pool().begin().await.unwrap();
    let _: i64 = sqlx::query_scalar("SELECT count(*) FROM postrider_event")
        .fetch_one(&mut *tx)
        .await
        .unwrap();
    bus.publish(message("in between")).await.unwrap();
    let error = bus.publish_in(&mut tx, message("too late")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Conflict);
    assert!(
        error.is_retryable() && error.to_string().contains("BEGIN IMMEDIATE"),
        "{error}"
    );
}

#[tokio::test]
async fn a_locked_file_is_unavailable_and_then_available() {
    let dir = Dir::new();
    let options = SqliteOptions::default().with_busy_timeout(Duration::from_millis(50));
    let log = SqliteLog::open_with(dir.file(), options).await.unwrap();
    let writer = log.pool().begin_with("BEGIN IMMEDIATE").await.unwrap();
    let error = bus(&log).publish(message("x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_string().contains("locked by another writer"), "{error}");
    writer.rollback().await.unwrap();
    bus(&log).publish(message("x")).await.unwrap();
}

#[tokio::test]
async fn files_that_cannot_be_used_say_why() {
    let dir = Dir::new();
    let error = SqliteLog::open(dir.0.path().join("no/such/folder/log.db"))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage);
    assert!(
        error.to_string().contains("folder") && error.to_string().contains("no/such/folder"),
        "{error}"
    );

    std::fs::write(dir.file(), vec![7_u8; 8192]).unwrap();
    let error = SqliteLog::open(dir.file()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage);
    assert!(error.to_string().contains("corrupt, or no SQLite database"), "{error}");
    assert_eq!(
        std::fs::read(dir.file()).unwrap(),
        vec![7_u8; 8192],
        "it is left as it is"
    );

    let read_only = dir.0.path().join("read_only.db");
    drop(SqliteLog::open(&read_only).await.unwrap());
    let pool = sqlx::SqlitePool::connect(&format!("sqlite://{}?mode=ro", read_only.display()))
        .await
        .unwrap();
    let log = SqliteLog::on_pool(pool, SqliteOptions::default()).await;
    let error = match log {
        Err(error) => error,
        Ok(log) => bus(&log).publish(message("x")).await.unwrap_err(),
    };
    assert_eq!(error.kind(), ErrorKind::Storage);
    assert!(error.to_string().contains("cannot be written"), "{error}");
}

#[tokio::test]
async fn tables_of_a_newer_version_are_refused_and_left_alone() {
    let dir = Dir::new();
    let log = SqliteLog::open(dir.file()).await.unwrap();
    sqlx::raw_sql("UPDATE postrider_meta SET value = 99")
        .execute(log.pool())
        .await
        .unwrap();
    drop(log);
    let error = SqliteLog::open(dir.file()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage);
    assert!(
        error.to_string().contains("newer version") && error.to_string().contains("found: 99"),
        "{error}"
    );
}

#[tokio::test]
async fn a_full_disk_loses_nothing_and_the_relay_goes_on_when_there_is_room() {
    let dir = Dir::new();
    let log = SqliteLog::open_with(dir.file(), SqliteOptions::default().with_max_connections(1))
        .await
        .unwrap();
    sqlx::raw_sql("CREATE TABLE orders (id INTEGER)")
        .execute(log.pool())
        .await
        .unwrap();
    let bus = bus(&log);
    // SQLite's own limit answers exactly as a full disk does.
    let pages: i64 = sqlx::query_scalar("PRAGMA page_count")
        .fetch_one(log.pool())
        .await
        .unwrap();
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("PRAGMA max_page_count = {}", pages + 4)))
        .execute(log.pool())
        .await
        .unwrap();
    let big = || Message::new(Topic::new("t"), "test.v1", vec![1; 100_000]);
    let mut tx = log.pool().begin().await.unwrap();
    sqlx::query("INSERT INTO orders VALUES (1)")
        .execute(&mut *tx)
        .await
        .unwrap();
    let error = bus.publish_in(&mut tx, big()).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Storage);
    assert!(error.to_string().contains("disk is full"), "{error}");
    drop(tx);
    let orders: i64 = sqlx::query_scalar("SELECT count(*) FROM orders")
        .fetch_one(log.pool())
        .await
        .unwrap();
    assert_eq!(orders, 0, "the order went with its event");
    // The limit was that connection's, and the pool has given it up: there is room again.
    bus.publish(big()).await.unwrap();
    bus.start().await.unwrap();
    let outbox = Mailbox::outbox();
    while log.stats().await.unwrap()[&outbox].succeeded < 1 {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    bus.shutdown(Duration::from_secs(5)).await.unwrap();
}

#[tokio::test]
async fn any_prefix_is_quoted_and_two_logs_share_a_file() {
    let dir = Dir::new();
    let hostile = [
        "a\"; DROP TABLE postrider_event; --",
        "it's",
        "with space ",
        "ünïcode_",
        "postrider_",
    ];
    for prefix in hostile {
        let log = SqliteLog::open_with(dir.file(), SqliteOptions::default().with_prefix(prefix))
            .await
            .unwrap();
        bus(&log).publish(message("x")).await.unwrap();
    }
    for prefix in hostile {
        let log = SqliteLog::open_with(dir.file(), SqliteOptions::default().with_prefix(prefix))
            .await
            .unwrap();
        let session = log
            .open(&Mailbox::outbox(), &SessionOptions::new(Owner::new()))
            .await
            .unwrap();
        let claimed = session.claim(&Claim::new(10)).await.unwrap();
        assert_eq!(claimed.records.len(), 1, "{prefix:?}");
        let settled = Settled {
            tag: claimed.records[0].tag,
            outcome: Outcome::Done,
        };
        assert!(session.settle(&[settled]).await.unwrap().lost.is_empty());
        assert_eq!(log.stats().await.unwrap()[&Mailbox::outbox()].succeeded, 1);
    }
    for (prefix, says) in [
        ("", "1 to 100 bytes"),
        ("a\0", "NUL"),
        ("sqlite_x", "SQLite keeps for itself"),
    ] {
        let error = SqliteLog::open_with(dir.file(), SqliteOptions::default().with_prefix(prefix))
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains(says), "{error}");
    }
}

#[tokio::test]
async fn a_wall_clock_that_jumps_does_not_move_the_lease() {
    let dir = Dir::new();
    let clock = ManualClock::shared();
    let open = || SqliteLog::open_with(dir.file(), SqliteOptions::default().with_clock(clock.clone()));
    let (one, two) = (open().await.unwrap(), open().await.unwrap());
    one.append(&Mailbox::outbox(), &batch("now")).await.unwrap();
    let later = NewRecord::new(message("later")).after(Duration::from_secs(3600));
    one.append(&Mailbox::outbox(), &[later]).await.unwrap();
    let options = || SessionOptions::new(Owner::new()).with_lease(Duration::from_secs(15));
    let holder = one.open(&Mailbox::outbox(), &options()).await.unwrap();
    let standby = two.open(&Mailbox::outbox(), &options()).await.unwrap();
    let held = holder.claim(&Claim::new(10)).await.unwrap();
    assert_eq!(held.records.len(), 1);
    for days in [400, -800] {
        clock.jump_to(clock.now() + chrono::TimeDelta::days(days));
        assert!(standby.claim(&Claim::new(10)).await.unwrap().records.is_empty());
        assert!(held.lease.is_held());
    }
    let settled = Settled {
        tag: held.records[0].tag,
        outcome: Outcome::Done,
    };
    assert!(holder.settle(&[settled]).await.unwrap().lost.is_empty());
    // What waits for a time follows the wall clock, as documented.
    clock.jump_to(clock.now() + chrono::TimeDelta::days(900));
    assert_eq!(holder.claim(&Claim::new(10)).await.unwrap().records.len(), 1);
}

#[tokio::test]
async fn another_process_wakes_the_relay() {
    let dir = Dir::new();
    let (here, there) = (
        SqliteLog::open(dir.file()).await.unwrap(),
        SqliteLog::open(dir.file()).await.unwrap(),
    );
    let session = here
        .open(&Mailbox::outbox(), &SessionOptions::new(Owner::new()))
        .await
        .unwrap();
    session.claim(&Claim::new(1)).await.unwrap();
    // The first look only learns where things stand.
    session.wait(Duration::from_millis(60)).await.unwrap();
    let waiting = tokio::spawn(async move { session.wait(Duration::from_secs(600)).await });
    there.append(&Mailbox::outbox(), &batch("news")).await.unwrap();
    tokio::time::timeout(Duration::from_secs(20), waiting)
        .await
        .unwrap()
        .unwrap()
        .unwrap();
}

#[tokio::test]
async fn debug_output_hides_payloads() {
    let dir = Dir::new();
    let log = SqliteLog::open(dir.file()).await.unwrap();
    let text = format!("{log:?} {:?} {:?}", EventLog::from(log.clone()), message("secret"));
    assert!(!text.contains("secret"), "{text}");
}
