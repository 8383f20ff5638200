//! The SQLite log beside bare SQL on the same file system, through the same driver.

use crate::{Size, engine::NoOp, table::Table};
use postrider::{Bus, Event, RelayOptions, event::DynEvent as _, sqlite::SqliteLog};
use sqlx::{
    Connection as _, SqliteConnection, SqlitePool,
    sqlite::{SqliteConnectOptions, SqliteJournalMode, SqliteSynchronous},
};
use std::{
    path::Path,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::runtime::Runtime;

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "bench.sqlite")]
struct Placed {
    n: u64,
    text: String,
}

fn placed(n: usize) -> Placed {
    Placed {
        n: n as u64,
        text: "x".repeat(220),
    }
}

const RAW: &str = "
    CREATE TABLE orders (id INTEGER PRIMARY KEY, customer TEXT NOT NULL, item TEXT NOT NULL, cents INTEGER NOT NULL);
    CREATE TABLE raw (id INTEGER PRIMARY KEY AUTOINCREMENT, message_id BLOB NOT NULL, topic TEXT NOT NULL, type TEXT NOT NULL,
        time INTEGER NOT NULL, payload BLOB NOT NULL);
    CREATE TABLE history (id INTEGER PRIMARY KEY, message_id BLOB NOT NULL, topic TEXT NOT NULL, type TEXT NOT NULL,
        time INTEGER NOT NULL, payload BLOB NOT NULL, finished_at INTEGER NOT NULL);
";
const INSERT_RAW: &str = "INSERT INTO raw (message_id, topic, type, time, payload) VALUES (?, ?, ?, ?, ?)";

const FILL_RAW: &str = "WITH RECURSIVE c (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM c WHERE n < ?) \
    INSERT INTO raw (message_id, topic, type, time, payload) SELECT randomblob(16), 'bench.sqlite', 'bench.sqlite.v1', 0, randomblob(240) FROM c";

/// A fresh file with the log and the raw tables.
struct Fresh {
    log: SqliteLog,
    pool: SqlitePool,
    _dir: tempfile::TempDir,
}

impl Fresh {
    async fn new() -> anyhow::Result<Self> {
        let dir = tempfile::tempdir_in(std::env::current_dir()?.join("target"))?;
        let log = SqliteLog::open(dir.path().join("bench.db")).await?;
        let pool = log.pool().clone();
        sqlx::raw_sql(RAW).execute(&pool).await?;
        Ok(Self { log, pool, _dir: dir })
    }

    fn bus(&self, retention: Duration) -> anyhow::Result<(Bus, Arc<AtomicUsize>)> {
        let sent = Arc::new(AtomicUsize::new(0));
        let relay = RelayOptions::default().with_retention(retention);
        let bus = Bus::builder()
            .log(self.log.clone())
            .transport(NoOp(sent.clone()).transport())
            .relay(relay)
            .build()?;
        Ok((bus, sent))
    }

    /// A connection as the relay has: its own, and without a flush at each commit.
    async fn connection(&self) -> anyhow::Result<SqliteConnection> {
        let path: &Path = &self._dir.path().join("bench.db");
        let options = SqliteConnectOptions::new()
            .filename(path)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Normal);
        Ok(SqliteConnection::connect_with(&options).await?)
    }
}

async fn insert_raw(connection: &mut SqliteConnection, n: usize) -> anyhow::Result<()> {
    let message = placed(n).to_message()?;
    sqlx::query(INSERT_RAW)
        .bind(&message.id().as_uuid().as_bytes()[..])
        .bind(message.topic().as_str())
        .bind(message.kind())
        .bind(0_i64)
        .bind(&message.payload()[..])
        .execute(connection)
        .await?;
    Ok(())
}

async fn append_raw(n: usize) -> anyhow::Result<Duration> {
    let fresh = Fresh::new().await?;
    let began = Instant::now();
    for n in 0..n {
        let mut tx = fresh.pool.begin_with("BEGIN IMMEDIATE").await?;
        insert_raw(&mut tx, n).await?;
        tx.commit().await?;
    }
    Ok(began.elapsed())
}

async fn append_ours(n: usize) -> anyhow::Result<Duration> {
    let fresh = Fresh::new().await?;
    let (bus, _) = fresh.bus(Duration::ZERO)?;
    let began = Instant::now();
    for n in 0..n {
        bus.publish(&placed(n)).await?;
    }
    Ok(began.elapsed())
}

const BATCH: usize = 100;

async fn batches_raw(n: usize) -> anyhow::Result<Duration> {
    let fresh = Fresh::new().await?;
    let values = vec!["(?, ?, ?, ?, ?)"; BATCH].join(", ");
    let sql = format!("INSERT INTO raw (message_id, topic, type, time, payload) VALUES {values}");
    let sql: Arc<str> = sql.into();
    let began = Instant::now();
    for _ in 0..n / BATCH {
        let messages = (0..BATCH)
            .map(|n| placed(n).to_message())
            .collect::<postrider::Result<Vec<_>>>()?;
        let mut tx = fresh.pool.begin_with("BEGIN IMMEDIATE").await?;
        let mut insert = sqlx::query(sqlx::AssertSqlSafe(sql.clone()));
        for message in &messages {
            insert = insert
                .bind(message.id().as_uuid().as_bytes().to_vec())
                .bind(message.topic().as_str())
                .bind(message.kind())
                .bind(0_i64)
                .bind(&message.payload()[..]);
        }
        insert.execute(&mut *tx).await?;
        tx.commit().await?;
    }
    Ok(began.elapsed())
}

async fn batches_ours(n: usize) -> anyhow::Result<Duration> {
    let fresh = Fresh::new().await?;
    let (bus, _) = fresh.bus(Duration::ZERO)?;
    let began = Instant::now();
    for _ in 0..n / BATCH {
        let events: Vec<Placed> = (0..BATCH).map(placed).collect();
        bus.publish_all(&events).await?;
    }
    Ok(began.elapsed())
}

/// A business transaction; with an event in it if `bus` is given.
async fn business(n: usize, with_event: bool) -> anyhow::Result<Duration> {
    let fresh = Fresh::new().await?;
    let (bus, _) = fresh.bus(Duration::ZERO)?;
    let began = Instant::now();
    for n in 0..n {
        let mut tx = fresh.pool.begin_with("BEGIN IMMEDIATE").await?;
        sqlx::query("INSERT INTO orders (customer, item, cents) VALUES (?, ?, ?)")
            .bind("ada")
            .bind("lamp")
            .bind(4200_i64)
            .execute(&mut *tx)
            .await?;
        sqlx::query("UPDATE orders SET cents = cents + 1 WHERE id = ?")
            .bind(n as i64 / 2)
            .execute(&mut *tx)
            .await?;
        if with_event {
            bus.publish_in(&mut tx, &placed(n)).await?;
        }
        tx.commit().await?;
    }
    Ok(began.elapsed())
}

type RawRow = (i64, Vec<u8>, String, String, i64, Vec<u8>);

/// Read in order, then deleted, or moved to a history: what any relay has to do at least.
async fn drain_raw(n: usize, history: bool) -> anyhow::Result<Duration> {
    let fresh = Fresh::new().await?;
    sqlx::query(FILL_RAW)
        .bind(i64::try_from(n)?)
        .execute(&fresh.pool)
        .await?;
    let mut connection = fresh.connection().await?;
    let began = Instant::now();
    let mut cursor = 0_i64;
    loop {
        let rows: Vec<RawRow> = sqlx::query_as(
            "SELECT id, message_id, topic, type, time, payload FROM raw WHERE id > ? ORDER BY id LIMIT 1000",
        )
        .bind(cursor)
        .fetch_all(&mut connection)
        .await?;
        let Some(last) = rows.last() else { break };
        let (first, last) = (cursor, last.0);
        cursor = last;
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await?;
        if history {
            let keep = "INSERT INTO history SELECT id, message_id, topic, type, time, payload, 0 FROM raw WHERE id > ? AND id <= ?";
            sqlx::query(keep).bind(first).bind(last).execute(&mut *tx).await?;
        }
        sqlx::query("DELETE FROM raw WHERE id > ? AND id <= ?")
            .bind(first)
            .bind(last)
            .execute(&mut *tx)
            .await?;
        tx.commit().await?;
    }
    Ok(began.elapsed())
}

async fn drain_ours(n: usize, history: bool) -> anyhow::Result<Duration> {
    let fresh = Fresh::new().await?;
    let (bus, sent) = fresh.bus(if history {
        Duration::from_secs(3600)
    } else {
        Duration::ZERO
    })?;
    for batch in 0..n / 1000 {
        let events: Vec<Placed> = (0..1000).map(|n| placed(batch * 1000 + n)).collect();
        bus.publish_all(&events).await?;
    }
    let began = Instant::now();
    bus.start().await?;
    while sent.load(Ordering::Relaxed) < n {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // To the last settle.
    bus.shutdown(Duration::from_secs(30)).await?;
    let took = began.elapsed();
    let left: i64 = sqlx::query_scalar("SELECT count(*) FROM postrider_event")
        .fetch_one(&fresh.pool)
        .await?;
    anyhow::ensure!(left == 0, "{left} events were not settled");
    Ok(took)
}

pub(crate) fn run(size: Size, table: &mut Table) -> anyhow::Result<()> {
    std::fs::create_dir_all("target")?;
    let runtime: Runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let (name, rounds) = ("sqlite", size.rounds());
    let n = size.of(1500);
    let on = |work: std::pin::Pin<Box<dyn Future<Output = anyhow::Result<Duration>>>>| runtime.block_on(work);
    table.compare(
        name,
        "append, one a transaction",
        "/s",
        rounds,
        n,
        || on(Box::pin(append_raw(n))),
        || on(Box::pin(append_ours(n))),
    )?;
    let many = size.of(100_000);
    table.compare(
        name,
        "append, 100 a transaction",
        "/s",
        rounds,
        many,
        || on(Box::pin(batches_raw(many))),
        || on(Box::pin(batches_ours(many))),
    )?;
    table.compare(
        name,
        "business transaction, without and with event",
        "/s",
        rounds,
        n,
        || on(Box::pin(business(n, false))),
        || on(Box::pin(business(n, true))),
    )?;
    let drain = size.of(100_000);
    for (history, case) in [(false, "drain, deleting"), (true, "drain, keeping a history")] {
        table.compare(
            name,
            case,
            "/s",
            rounds,
            drain,
            || on(Box::pin(drain_raw(drain, history))),
            || on(Box::pin(drain_ours(drain, history))),
        )?;
    }
    Ok(())
}
