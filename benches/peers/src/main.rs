//! `postrider-peers <postgres url> <outbox> <rows> <batch>`: how long another outbox takes to drain so many rows to a publisher
//! that takes everything at once. Prints the seconds. Known: `outbox-core`, `hexeract`.

use anyhow::{Context as _, bail};
use hexeract_core::HandlerContext;
use hexeract_outbox::{Handler, OutboxError};
use hexeract_outbox_sql::{PgOutboxWorkerBuilder, postgres::ensure_schema};
use outbox_core::prelude::*;
use serde::{Deserialize, Serialize};
use sqlx::PgPool;
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

#[derive(Debug, Clone, Serialize, Deserialize)]
struct Placed {
    n: u64,
    text: String,
}

static SENT: AtomicUsize = AtomicUsize::new(0);

async fn until_sent(rows: usize) {
    while SENT.load(Ordering::Relaxed) < rows {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
}

const PAYLOAD: &str = "jsonb_build_object('n', g, 'text', repeat('x', 220))";

struct Counting;

#[async_trait::async_trait]
impl Transport<Placed> for Counting {
    async fn publish(&self, _event: Event<Placed>) -> Result<(), outbox_core::prelude::OutboxError> {
        SENT.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

const OUTBOX_CORE: &str = "
    DROP TABLE IF EXISTS outbox_events; DROP TYPE IF EXISTS status;
    CREATE TYPE status AS ENUM ('Pending', 'Processing', 'Sent');
    CREATE TABLE outbox_events (id uuid PRIMARY KEY DEFAULT gen_random_uuid(), idempotency_token text DEFAULT NULL, event_type text NOT NULL, payload jsonb NOT NULL,
        status status NOT NULL DEFAULT 'Pending', created_at timestamptz NOT NULL DEFAULT now(), locked_until timestamptz NOT NULL DEFAULT '-infinity');
    CREATE INDEX idx_outbox_processing_queue ON outbox_events (locked_until ASC, status) WHERE status IN ('Pending', 'Processing');
    CREATE UNIQUE INDEX idx_outbox_idempotency ON outbox_events (idempotency_token);
    CREATE OR REPLACE FUNCTION notify_outbox_event() RETURNS trigger AS $$ BEGIN PERFORM pg_notify('outbox_event', 'ping'); RETURN new; END; $$ LANGUAGE plpgsql;
";
/// Its trigger, for which the rows that are there already do not wait.
const TRIGGER: &str = "CREATE TRIGGER outbox_events_notify_trigger AFTER INSERT OR UPDATE ON outbox_events FOR EACH ROW EXECUTE FUNCTION notify_outbox_event()";

async fn outbox_core(pool: &PgPool, rows: usize, batch: u32) -> anyhow::Result<Duration> {
    sqlx::raw_sql(OUTBOX_CORE).execute(pool).await?;
    let fill = format!("INSERT INTO outbox_events (event_type, payload) SELECT 'placed', {PAYLOAD} FROM generate_series(1, $1) g");
    sqlx::query(&fill).bind(i32::try_from(rows)?).execute(pool).await?;
    sqlx::raw_sql(TRIGGER).execute(pool).await?;
    sqlx::raw_sql("ANALYZE outbox_events").execute(pool).await?;
    let mut config = OutboxConfig::<Placed>::default();
    config.batch_size = batch;
    config.poll_interval_secs = 1;
    config.idempotency_strategy = IdempotencyStrategy::None;
    let config = Arc::new(config);
    let (stop, stopped) = tokio::sync::watch::channel(false);
    let manager = OutboxManagerBuilder::new()
        .storage(Arc::new(outbox_postgres::PostgresOutbox::new(pool.clone(), config.clone())))
        .publisher(Arc::new(Counting))
        .config(config)
        .shutdown_rx(stopped)
        .build()?;
    let began = Instant::now();
    let running = tokio::spawn(async move { manager.run().await.map_err(|e| e.to_string()) });
    until_sent(rows).await;
    let took = began.elapsed();
    let _ = stop.send(true);
    running.abort();
    Ok(took)
}

impl hexeract_outbox::Event for Placed {
    const EVENT_TYPE: &'static str = "placed";
}

impl Handler<Placed> for Counting {
    type Error = OutboxError;
    async fn handle(&self, _event: Placed, _ctx: &HandlerContext) -> Result<(), OutboxError> {
        SENT.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
}

async fn hexeract(pool: &PgPool, rows: usize, batch: u32) -> anyhow::Result<Duration> {
    sqlx::raw_sql("DROP TABLE IF EXISTS peer_outbox").execute(pool).await?;
    ensure_schema(pool, "peer_outbox").await?;
    let fill = format!("INSERT INTO peer_outbox (event_id, event_type, payload) SELECT gen_random_uuid(), 'placed', {PAYLOAD} FROM generate_series(1, $1) g");
    sqlx::query(&fill).bind(i32::try_from(rows)?).execute(pool).await?;
    sqlx::raw_sql("ANALYZE peer_outbox").execute(pool).await?;
    let worker = PgOutboxWorkerBuilder::new(pool.clone())
        .table_name("peer_outbox")
        .register_handler::<Placed, _>(Counting)
        .poll_interval(Duration::from_millis(1))
        .batch_size(usize::try_from(batch)?)
        .build()?;
    let stop = tokio_util::sync::CancellationToken::new();
    let began = Instant::now();
    let running = tokio::spawn(worker.run(stop.clone()));
    until_sent(rows).await;
    let took = began.elapsed();
    stop.cancel();
    running.abort();
    Ok(took)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().collect();
    let [_, url, which, rows, batch] = &arguments[..] else {
        bail!("postrider-peers <postgres url> <outbox-core | hexeract> <rows> <batch>");
    };
    let pool = PgPool::connect(url).await.context("the server")?;
    let (rows, batch) = (rows.parse()?, batch.parse()?);
    let took = match which.as_str() {
        "outbox-core" => outbox_core(&pool, rows, batch).await?,
        "hexeract" => hexeract(&pool, rows, batch).await?,
        other => bail!("unknown outbox {other:?}: known are outbox-core and hexeract"),
    };
    println!("{}", took.as_secs_f64());
    Ok(())
}
