//! Exactly-once effects on Postgres: a handler that inserts one row, with its receipt in the same transaction. Beside it
//! the bare statements, as often a transaction and on as many connections. A backlog at the memory broker; it starts the
//! database server itself.

use crate::{Size, table::Table};
use postrider::{
    Bus, Event, Message, Transactional,
    event::DynEvent as _,
    memory::MemoryTransport,
    postgres::{PostgresLog, PostgresOptions},
};
use postrider_testkit::server::Postgres;
use sqlx::{PgConnection, PgPool, postgres::PgPoolOptions};
use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "bench.effect")]
struct Placed {
    n: i64,
    text: String,
}

const TABLE: &str = "DROP TABLE IF EXISTS effect; CREATE TABLE effect (n bigint NOT NULL, text text NOT NULL)";
const INSERT: &str = "INSERT INTO effect VALUES ($1, $2)";
/// As many batches as the consumer handles at once.
const CONNECTIONS: usize = 4;

async fn pool(server: &Postgres) -> anyhow::Result<PgPool> {
    let pool = PgPoolOptions::new().max_connections(24).connect(&server.url()).await?;
    sqlx::raw_sql(TABLE).execute(&pool).await?;
    Ok(pool)
}

fn messages(n: usize) -> anyhow::Result<Vec<Message>> {
    let placed = |n| Placed {
        n,
        text: "x".repeat(220),
    };
    (0..n as i64).map(|n| Ok(placed(n).to_message()?)).collect()
}

/// Decodes, inserts a row and a receipt, commits.
async fn raw(server: &Postgres, n: usize, batch: usize) -> anyhow::Result<Duration> {
    let pool = pool(server).await?;
    sqlx::raw_sql(
        "DROP TABLE IF EXISTS seen; CREATE TABLE seen (id uuid PRIMARY KEY, at timestamptz NOT NULL DEFAULT now())",
    )
    .execute(&pool)
    .await?;
    let messages = Arc::new(messages(n)?);
    let connections = if batch == 1 { 16 } else { CONNECTIONS };
    let next = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let workers = (0..connections).map(|_| {
        let (messages, pool, next) = (messages.clone(), pool.clone(), next.clone());
        tokio::spawn(async move {
            loop {
                let from = next.fetch_add(batch, Ordering::Relaxed);
                let Some(mine) = messages
                    .get(from..(from + batch).min(messages.len()))
                    .filter(|m| !m.is_empty())
                else {
                    return anyhow::Ok(());
                };
                let mut tx = pool.begin().await?;
                let ids: Vec<_> = mine.iter().map(|message| *message.id().as_uuid()).collect();
                let seen =
                    sqlx::query("INSERT INTO seen (id) SELECT unnest($1::uuid[]) ON CONFLICT DO NOTHING RETURNING id");
                seen.bind(ids).fetch_all(&mut *tx).await?;
                for message in mine {
                    let placed: Placed = serde_json::from_slice(message.payload())?;
                    sqlx::query(INSERT)
                        .bind(placed.n)
                        .bind(placed.text)
                        .execute(&mut *tx)
                        .await?;
                }
                tx.commit().await?;
            }
        })
    });
    for worker in workers.collect::<Vec<_>>() {
        worker.await??;
    }
    let took = began.elapsed();
    check(&pool, n).await?;
    pool.close().await;
    Ok(took)
}

async fn ours(server: &Postgres, n: usize, batch: usize) -> anyhow::Result<Duration> {
    let pool = pool(server).await?;
    let schema = server.fresh_name();
    let log = PostgresLog::on_pool(pool.clone(), PostgresOptions::default().with_schema(&schema))?;
    postrider::log::LogSchema::migrate(&log).await?;
    let bus = Bus::builder()
        .log(log)
        .transport(MemoryTransport::new().with_retention(n))
        .build()?;
    for message in messages(n)? {
        bus.publish_direct(message).await?;
    }
    let how = NonZeroUsize::new(batch).filter(|batch| batch.get() > 1);
    let how = how.map_or_else(Transactional::new, Transactional::batch);
    let began = Instant::now();
    let running = bus
        .subscribe::<Placed>("bench")
        .middleware(how)
        .max_in_flight(if batch == 1 { 16 } else { 10 * batch })
        .handler(async |placed, ctx| {
            let insert = sqlx::query(INSERT).bind(placed.n).bind(&placed.text);
            insert.execute(ctx.tx::<PgConnection>()?).await?;
            Ok(())
        })
        .start()
        .await?;
    while running.report().handled < n as u64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let took = began.elapsed();
    bus.shutdown(Duration::from_secs(10)).await?;
    check(&pool, n).await?;
    sqlx::raw_sql(sqlx::AssertSqlSafe(format!("DROP SCHEMA {schema} CASCADE")))
        .execute(&pool)
        .await?;
    pool.close().await;
    Ok(took)
}

/// Each has had its effect once.
async fn check(pool: &PgPool, n: usize) -> anyhow::Result<()> {
    let (rows, different): (i64, i64) = sqlx::query_as("SELECT count(*), count(DISTINCT n) FROM effect")
        .fetch_one(pool)
        .await?;
    anyhow::ensure!(
        (rows, different) == (n as i64, n as i64),
        "{rows} effects of {different} events, not {n}"
    );
    Ok(())
}

pub(crate) fn run(size: Size, table: &mut Table) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let server = Postgres::start();
    for (batch, full) in [(1, 10_000), (10, 40_000), (100, 60_000)] {
        let n = size.of(full);
        table.compare(
            "consumer",
            format!("a row and a receipt, {batch} a transaction"),
            "events/s",
            size.rounds(),
            n,
            || runtime.block_on(raw(&server, n, batch)),
            || runtime.block_on(ours(&server, n, batch)),
        )?;
    }
    Ok(())
}
