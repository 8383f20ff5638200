//! The Postgres log beside bare SQL on the same server, through the same driver. It starts its own server.

use crate::{Size, engine::NoOp, peers, table::Table};
use async_trait::async_trait;
use postrider::{
    Bus, Event, Message, MessageId, Outcomes, Publisher, Reachability, RelayOptions, Transport,
    event::DynEvent as _,
    postgres::{PostgresLog, PostgresOptions},
};
use postrider_testkit::server::Postgres;
use sqlx::{Connection as _, PgConnection, PgPool, Row as _, postgres::PgPoolOptions};
use std::{
    collections::HashMap,
    pin::Pin,
    sync::{
        Arc, Mutex,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::task::JoinSet;

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "bench.postgres")]
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
    DROP TABLE IF EXISTS orders, raw, raw_done;
    CREATE TABLE orders (id bigint GENERATED ALWAYS AS IDENTITY PRIMARY KEY, customer text NOT NULL, item text NOT NULL, cents bigint NOT NULL);
    CREATE TABLE raw (lane smallint NOT NULL, id bigint NOT NULL GENERATED ALWAYS AS IDENTITY, message_id uuid NOT NULL, topic text NOT NULL, type text NOT NULL,
        source text, key text, content_type text NOT NULL, headers text NOT NULL, time timestamptz, payload bytea NOT NULL, created_at timestamptz NOT NULL DEFAULT now(),
        PRIMARY KEY (lane, id));
    CREATE TABLE raw_done (LIKE raw, finished_at timestamptz NOT NULL);
";

const INSERT_RAW: &str = "INSERT INTO raw (lane, message_id, topic, type, source, key, content_type, headers, time, payload) VALUES ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10)";

/// A fresh schema on the server.
struct Fresh {
    log: PostgresLog,
    pool: PgPool,
    schema: String,
}

impl Fresh {
    async fn new(server: &Postgres) -> anyhow::Result<Self> {
        let pool = PgPoolOptions::new().max_connections(20).connect(&server.url()).await?;
        sqlx::raw_sql(RAW).execute(&pool).await?;
        let schema = server.fresh_name();
        let log = PostgresLog::on_pool(pool.clone(), PostgresOptions::default().with_schema(&schema))?;
        postrider::log::LogSchema::migrate(&log).await?;
        Ok(Self { log, pool, schema })
    }

    fn bus(&self, relay: RelayOptions) -> anyhow::Result<(Bus, Arc<AtomicUsize>)> {
        let sent = Arc::new(AtomicUsize::new(0));
        let transport = NoOp(sent.clone()).transport();
        Ok((
            Bus::builder()
                .log(self.log.clone())
                .transport(transport)
                .relay(relay)
                .build()?,
            sent,
        ))
    }

    async fn fill(&self, n: usize) -> anyhow::Result<()> {
        let schema = &self.schema;
        let sql = format!(
            "INSERT INTO {schema}.event (mailbox, lane, message_id, topic, type, source, key, content_type, headers, time, payload) \
             SELECT 1, {schema}.lane_of(NULL, id), id, 'bench.postgres', 'bench.postgres.v1', 'bench', NULL, 'application/json', '[]', now(), \
             convert_to(repeat('x', 256), 'UTF8') FROM (SELECT gen_random_uuid() AS id FROM generate_series(1, {n})) g"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&self.pool).await?;
        Ok(())
    }

    /// History of a day ago, in another slot than the one that is being written.
    async fn fill_history(&self, n: usize) -> anyhow::Result<()> {
        let schema = &self.schema;
        let sql = format!(
            "INSERT INTO {schema}.done SELECT 1, 0, g, gen_random_uuid(), 'bench.postgres', 'bench.postgres.v1', 'bench', NULL, 'application/json', '[]', now(), \
             convert_to(repeat('x', 256), 'UTF8'), now(), 0, '[]', now(), ({schema}.slot() + 15) % 16 FROM generate_series(1, {n}) g"
        );
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&self.pool).await?;
        Ok(())
    }

    async fn end(self) -> anyhow::Result<()> {
        let sql = format!("DROP SCHEMA {} CASCADE", self.schema);
        sqlx::raw_sql(sqlx::AssertSqlSafe(sql)).execute(&self.pool).await?;
        self.pool.close().await;
        Ok(())
    }
}

async fn insert_raw(connection: &mut PgConnection, n: usize) -> anyhow::Result<()> {
    let message = placed(n).to_message()?;
    sqlx::query(INSERT_RAW)
        .bind((n % 64) as i16)
        .bind(message.id().as_uuid())
        .bind(message.topic().as_str())
        .bind(message.kind())
        .bind("bench")
        .bind(None::<&str>)
        .bind(message.content_type())
        .bind("[]")
        .bind(message.time())
        .bind(&message.payload()[..])
        .execute(connection)
        .await?;
    Ok(())
}

/// `n` times `work`, spread over `clients` tasks.
async fn spread<F, Fut>(n: usize, clients: usize, work: F) -> anyhow::Result<Duration>
where
    F: Fn(usize) -> Fut + Send + Sync + 'static,
    Fut: Future<Output = anyhow::Result<()>> + Send,
{
    let work = Arc::new(work);
    let began = Instant::now();
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let work = work.clone();
        tasks.spawn(async move {
            for n in (client..n).step_by(clients) {
                work(n).await?;
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    Ok(began.elapsed())
}

async fn append_raw(server: &Postgres, n: usize, clients: usize) -> anyhow::Result<Duration> {
    let fresh = Fresh::new(server).await?;
    let pool = fresh.pool.clone();
    let took = spread(n, clients, move |n| {
        let pool = pool.clone();
        async move { insert_raw(&mut *pool.acquire().await?, n).await }
    })
    .await?;
    fresh.end().await?;
    Ok(took)
}

async fn append_ours(server: &Postgres, n: usize, clients: usize) -> anyhow::Result<Duration> {
    let fresh = Fresh::new(server).await?;
    let (bus, _) = fresh.bus(RelayOptions::default())?;
    let took = spread(n, clients, move |n| {
        let bus = bus.clone();
        async move { Ok(bus.publish(&placed(n)).await.map(|_| ())?) }
    })
    .await?;
    fresh.end().await?;
    Ok(took)
}

const BATCH: usize = 100;

async fn batches_raw(server: &Postgres, n: usize) -> anyhow::Result<Duration> {
    const SQL: &str = "INSERT INTO raw (lane, message_id, topic, type, source, content_type, headers, time, payload) \
        SELECT * FROM unnest($1::int2[], $2::uuid[], $3::text[], $4::text[], $5::text[], $6::text[], $7::text[], $8::timestamptz[], $9::bytea[])";
    let fresh = Fresh::new(server).await?;
    let mut connection = fresh.pool.acquire().await?;
    let began = Instant::now();
    for _ in 0..n / BATCH {
        let messages = (0..BATCH)
            .map(|n| placed(n).to_message())
            .collect::<postrider::Result<Vec<Message>>>()?;
        sqlx::query(SQL)
            .bind((0..BATCH).map(|n| (n % 64) as i16).collect::<Vec<_>>())
            .bind(messages.iter().map(|m| *m.id().as_uuid()).collect::<Vec<_>>())
            .bind(messages.iter().map(|m| m.topic().as_str()).collect::<Vec<_>>())
            .bind(messages.iter().map(|m| m.kind()).collect::<Vec<_>>())
            .bind(messages.iter().map(|_| "bench").collect::<Vec<_>>())
            .bind(messages.iter().map(|m| m.content_type()).collect::<Vec<_>>())
            .bind(messages.iter().map(|_| "[]").collect::<Vec<_>>())
            .bind(messages.iter().map(|m| m.time()).collect::<Vec<_>>())
            .bind(messages.iter().map(|m| &m.payload()[..]).collect::<Vec<_>>())
            .execute(&mut *connection)
            .await?;
    }
    let took = began.elapsed();
    drop(connection);
    fresh.end().await?;
    Ok(took)
}

async fn batches_ours(server: &Postgres, n: usize) -> anyhow::Result<Duration> {
    let fresh = Fresh::new(server).await?;
    let (bus, _) = fresh.bus(RelayOptions::default())?;
    let began = Instant::now();
    for _ in 0..n / BATCH {
        let events: Vec<Placed> = (0..BATCH).map(placed).collect();
        bus.publish_all(&events).await?;
    }
    let took = began.elapsed();
    fresh.end().await?;
    Ok(took)
}

/// How a business transaction has its event.
#[derive(Clone, Copy)]
enum With {
    Nothing,
    PublishIn,
    Begin,
}

async fn orders(connection: &mut PgConnection, n: usize) -> anyhow::Result<()> {
    sqlx::query("INSERT INTO orders (customer, item, cents) VALUES ($1, $2, $3)")
        .bind("ada")
        .bind("lamp")
        .bind(4200_i64)
        .execute(&mut *connection)
        .await?;
    sqlx::query("UPDATE orders SET cents = cents + 1 WHERE id = $1")
        .bind(n as i64 / 2)
        .execute(&mut *connection)
        .await?;
    Ok(())
}

async fn business(server: &Postgres, n: usize, clients: usize, with: With) -> anyhow::Result<Duration> {
    let fresh = Fresh::new(server).await?;
    let (bus, _) = fresh.bus(RelayOptions::default())?;
    let pool = fresh.pool.clone();
    let took = spread(n, clients, move |n| {
        let (bus, pool) = (bus.clone(), pool.clone());
        async move {
            if let With::Begin = with {
                let mut tx = bus.begin().await?;
                orders(tx.connection::<PgConnection>()?, n).await?;
                bus.publish_in(&mut tx, &placed(n)).await?;
                return Ok(tx.commit().await?);
            }
            let mut tx = pool.begin().await?;
            orders(&mut tx, n).await?;
            if let With::PublishIn = with {
                bus.publish_in(&mut tx, &placed(n)).await?;
            }
            Ok(tx.commit().await?)
        }
    })
    .await?;
    fresh.end().await?;
    Ok(took)
}

/// Read in order on one connection while another deletes what was read before, or moves it to a history: the bare
/// statements of a relay that owns everything.
async fn drain_raw(server: &Postgres, n: usize, batch: usize, history: bool) -> anyhow::Result<Duration> {
    let fresh = Fresh::new(server).await?;
    let fill = format!(
        "INSERT INTO raw (lane, message_id, topic, type, source, content_type, headers, time, payload) SELECT g % 64, gen_random_uuid(), 'bench.postgres', \
         'bench.postgres.v1', 'bench', 'application/json', '[]', now(), convert_to(repeat('x', 256), 'UTF8') FROM generate_series(1, {n}) g"
    );
    sqlx::raw_sql(sqlx::AssertSqlSafe(fill)).execute(&fresh.pool).await?;
    let (mut reader, mut writer) = (
        PgConnection::connect(&server.url()).await?,
        PgConnection::connect(&server.url()).await?,
    );
    for connection in [&mut reader, &mut writer] {
        let set = "SET synchronous_commit = off; SET enable_seqscan = off; SET enable_bitmapscan = off; SET enable_hashjoin = off; SET enable_mergejoin = off; SET plan_cache_mode = force_generic_plan";
        sqlx::raw_sql(set).execute(connection).await?;
    }
    let (to_delete, mut deleting) = tokio::sync::mpsc::channel::<(Vec<i16>, Vec<i64>)>(2);
    let began = Instant::now();
    let delete = tokio::spawn(async move {
        let sql = if history {
            "WITH gone AS (DELETE FROM raw r USING unnest($1::int2[], $2::int8[]) u (lane, id) WHERE r.lane = u.lane AND r.id = u.id RETURNING r.*) INSERT INTO raw_done SELECT gone.*, now() FROM gone"
        } else {
            "DELETE FROM raw r USING unnest($1::int2[], $2::int8[]) u (lane, id) WHERE r.lane = u.lane AND r.id = u.id"
        };
        while let Some((lanes, ids)) = deleting.recv().await {
            sqlx::query(sql).bind(lanes).bind(ids).execute(&mut writer).await?;
        }
        anyhow::Ok(())
    });
    let mut cursors = vec![0_i64; 64];
    let of_a_lane = batch.div_ceil(64);
    loop {
        let fetch = sqlx::query(
            "SELECT e.lane, e.id, e.message_id, e.topic, e.type, e.source, e.key, e.content_type, e.headers, e.time, e.payload FROM unnest($1::int2[], $2::int8[]) l (lane, cursor) \
             CROSS JOIN LATERAL (SELECT * FROM raw WHERE lane = l.lane AND id > l.cursor ORDER BY id LIMIT $3) e",
        );
        let rows = fetch
            .bind((0..64).collect::<Vec<i16>>())
            .bind(&cursors)
            .bind(of_a_lane as i64)
            .fetch_all(&mut reader)
            .await?;
        if rows.is_empty() {
            break;
        }
        let (mut lanes, mut ids) = (Vec::with_capacity(rows.len()), Vec::with_capacity(rows.len()));
        for row in &rows {
            let (lane, id): (i16, i64) = (row.get(0), row.get(1));
            // What a publisher needs of it.
            std::hint::black_box((
                row.get::<sqlx::types::Uuid, _>(2),
                row.get::<String, _>(3),
                row.get::<&str, _>(4),
                row.get::<Option<&str>, _>(6),
                row.get::<&str, _>(8),
                row.get::<Vec<u8>, _>(10),
            ));
            cursors[usize::try_from(lane)?] = id;
            lanes.push(lane);
            ids.push(id);
        }
        to_delete.send((lanes, ids)).await?;
    }
    drop(to_delete);
    delete.await??;
    let took = began.elapsed();
    fresh.end().await?;
    Ok(took)
}

struct Drain {
    rows: usize,
    batch: usize,
    relays: usize,
    retention: Duration,
    history: usize,
}

async fn drain_ours(server: &Postgres, drain: &Drain) -> anyhow::Result<Duration> {
    let fresh = Fresh::new(server).await?;
    fresh.fill(drain.rows).await?;
    if drain.history > 0 {
        fresh.fill_history(drain.history).await?;
    }
    let options = RelayOptions::default()
        .with_retention(drain.retention)
        .with_batch_size(drain.batch);
    let mut buses = Vec::new();
    for _ in 0..drain.relays {
        buses.push(fresh.bus(options.clone().with_lease(Duration::from_secs(2)))?);
    }
    let began = Instant::now();
    for (bus, _) in &buses {
        bus.start().await?;
    }
    let sent = || {
        buses
            .iter()
            .map(|(_, sent)| sent.load(Ordering::Relaxed))
            .sum::<usize>()
    };
    while sent() < drain.rows {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    // To the last settle.
    for (bus, _) in &buses {
        bus.shutdown(Duration::from_secs(30)).await?;
    }
    let took = began.elapsed();
    let left = format!("SELECT count(*) FROM {}.event", fresh.schema);
    let left: i64 = sqlx::query_scalar(sqlx::AssertSqlSafe(left))
        .fetch_one(&fresh.pool)
        .await?;
    anyhow::ensure!(left == 0, "{left} events were not settled");
    fresh.end().await?;
    Ok(took)
}

/// How long another outbox takes on the same server.
fn drain_peer(server: &Postgres, which: &str, rows: usize, batch: usize) -> anyhow::Result<Duration> {
    let mut peer = peers::cargo("benches/peers/Cargo.toml");
    peers::run(peer.args([&server.url(), which, &rows.to_string(), &batch.to_string()]))
}

/// When each message was committed, or came to the publisher.
type Times = Arc<Mutex<HashMap<MessageId, Instant>>>;

fn note(times: &Times, ids: impl IntoIterator<Item = MessageId>) {
    let now = Instant::now();
    let mut times = times.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
    times.extend(ids.into_iter().map(|id| (id, now)));
}

/// A publisher that notes when each message came.
#[derive(Debug, Default)]
struct Stopwatch(Times);

#[async_trait]
impl Publisher for Stopwatch {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        note(&self.0, batch.iter().map(Message::id));
        outcomes.report_rest(Ok(()));
    }
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

/// From the end of the commit to the publisher, at a given rate: p50 and p99.
async fn latency(
    server: &Postgres,
    rate: usize,
    seconds: usize,
    beside_a_snapshot: bool,
) -> anyhow::Result<(Duration, Duration)> {
    let fresh = Fresh::new(server).await?;
    // Somebody has forgotten a transaction: nothing that is deleted meanwhile can be cleared away.
    let mut forgotten = PgConnection::connect(&server.url()).await?;
    if beside_a_snapshot {
        let hold = "BEGIN ISOLATION LEVEL REPEATABLE READ; SELECT count(*) FROM pg_class";
        sqlx::raw_sql(hold).execute(&mut forgotten).await?;
    }
    let (committed, published) = (Times::default(), Times::default());
    let transport =
        Transport::new("stopwatch", postrider::Capabilities::default()).with_publisher(Stopwatch(published.clone()));
    let relay = RelayOptions::default().with_retention(Duration::ZERO);
    let bus = Bus::builder()
        .log(fresh.log.clone())
        .transport(transport)
        .relay(relay)
        .build()?;
    bus.start().await?;
    tokio::time::sleep(Duration::from_millis(300)).await;
    // Several events a transaction at high rates, so that the producers do not take the machine.
    let (clients, of_a_transaction) = if rate > 1000 { (8, 10) } else { (1, 1) };
    let pause = Duration::from_secs_f64((clients * of_a_transaction) as f64 / rate as f64);
    let mut tasks = JoinSet::new();
    for client in 0..clients {
        let (bus, n, committed) = (
            bus.clone(),
            rate * seconds / clients / of_a_transaction,
            committed.clone(),
        );
        tasks.spawn(async move {
            let mut ticks = tokio::time::interval(pause);
            ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
            for n in 0..n {
                ticks.tick().await;
                let mut tx = bus.begin().await?;
                let mut ids = Vec::with_capacity(of_a_transaction);
                for m in 0..of_a_transaction {
                    ids.push(bus.publish_in(&mut tx, &placed(client * 1000 + n * 10 + m)).await?);
                }
                tx.commit().await?;
                note(&committed, ids);
            }
            anyhow::Ok(())
        });
    }
    while let Some(ended) = tasks.join_next().await {
        ended??;
    }
    let count = |times: &Times| times.lock().unwrap_or_else(std::sync::PoisonError::into_inner).len();
    let began = Instant::now();
    while count(&published) < count(&committed) && began.elapsed() < Duration::from_secs(10) {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bus.shutdown(Duration::from_secs(10)).await?;
    let (committed, published) = (
        committed
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone(),
        published
            .lock()
            .unwrap_or_else(std::sync::PoisonError::into_inner)
            .clone(),
    );
    anyhow::ensure!(committed.len() == published.len(), "every event was published");
    // The relay may be quicker than the task that committed.
    let times = committed
        .iter()
        .filter_map(|(id, at)| Some(published.get(id)?.saturating_duration_since(*at)));
    let mut all: Vec<Duration> = times.collect();
    all.sort_unstable();
    forgotten.close().await?;
    let of = |part: f64| all.get((all.len() as f64 * part) as usize).copied().unwrap_or_default();
    fresh.end().await?;
    Ok((of(0.5), of(0.99)))
}

pub(crate) fn run(size: Size, table: &mut Table) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    let server = &Postgres::start_with(&["max_wal_size=4GB", "shared_buffers=1GB", "checkpoint_timeout=30min"]);
    let (name, rounds) = ("postgres", size.rounds());
    type Work<'a> = Pin<Box<dyn Future<Output = anyhow::Result<Duration>> + 'a>>;
    let on = |work: Work<'_>| runtime.block_on(work);

    let n = size.of(10_000);
    for clients in [1, 8] {
        table.compare(
            name,
            format!("append, one a transaction, {clients} clients"),
            "/s",
            rounds,
            n,
            || on(Box::pin(append_raw(server, n, clients))),
            || on(Box::pin(append_ours(server, n, clients))),
        )?;
    }
    let many = size.of(200_000);
    table.compare(
        name,
        "append, 100 a transaction",
        "/s",
        rounds,
        many,
        || on(Box::pin(batches_raw(server, many))),
        || on(Box::pin(batches_ours(server, many))),
    )?;
    for clients in [1, 8] {
        for (with, how) in [(With::PublishIn, "publish_in"), (With::Begin, "bus.begin()")] {
            table.compare(
                name,
                format!("business transaction + event, {how}, {clients} cl."),
                "/s",
                rounds,
                n,
                || on(Box::pin(business(server, n, clients, With::Nothing))),
                || on(Box::pin(business(server, n, clients, with))),
            )?;
        }
    }
    let (small, large) = (20_000, size.of(1_000_000));
    let day = Duration::from_secs(24 * 3600);
    for (rows, batch) in [(small, 1000), (large, 1000), (large, 100)] {
        for (retention, what) in [(Duration::ZERO, "deleting"), (day, "with history")] {
            let drain = Drain {
                rows,
                batch,
                relays: 1,
                retention,
                history: 0,
            };
            table.compare(
                name,
                format!("drain {rows}, batch {batch}, {what}"),
                "/s",
                rounds,
                rows,
                || on(Box::pin(drain_raw(server, rows, batch, !retention.is_zero()))),
                || on(Box::pin(drain_ours(server, &drain))),
            )?;
        }
    }
    for relays in [2, 4] {
        let drain = Drain {
            rows: large,
            batch: 1000,
            relays,
            retention: Duration::ZERO,
            history: 0,
        };
        let one = Drain {
            rows: large,
            batch: 1000,
            relays: 1,
            retention: Duration::ZERO,
            history: 0,
        };
        table.compare(
            name,
            format!("drain {large}, 1 relay and {relays} relays"),
            "/s",
            rounds,
            large,
            || on(Box::pin(drain_ours(server, &one))),
            || on(Box::pin(drain_ours(server, &drain))),
        )?;
    }
    for history in [size.of(1_000_000), size.of(5_000_000)] {
        let empty = Drain {
            rows: size.of(200_000),
            batch: 1000,
            relays: 1,
            retention: day,
            history: 0,
        };
        let full = Drain {
            rows: size.of(200_000),
            batch: 1000,
            relays: 1,
            retention: day,
            history,
        };
        table.compare(
            name,
            format!("drain, history empty and of {history}"),
            "/s",
            rounds,
            empty.rows,
            || on(Box::pin(drain_ours(server, &empty))),
            || on(Box::pin(drain_ours(server, &full))),
        )?;
    }
    for peer in ["outbox-core", "hexeract"].into_iter().filter(|_| size.peers) {
        for rows in [small, size.of(100_000)] {
            let drain = Drain {
                rows,
                batch: 1000,
                relays: 1,
                retention: day,
                history: 0,
            };
            table.compare(
                name,
                format!("drain {rows}, {peer} and ours"),
                "/s",
                rounds,
                rows,
                || drain_peer(server, peer, rows, 1000),
                || on(Box::pin(drain_ours(server, &drain))),
            )?;
        }
    }
    for (rate, beside_a_snapshot) in [(20, false), (10_000, false), (10_000, true)] {
        let beside = if beside_a_snapshot {
            ", beside a held snapshot"
        } else {
            ""
        };
        let case = format!("commit to publish at {rate}/s{beside}");
        if table.wants(&case) {
            let seconds = match (size.quick, beside_a_snapshot) {
                (true, _) => 1,
                (false, false) => 5,
                (false, true) => 30,
            };
            let (p50, p99) = runtime.block_on(latency(server, rate, seconds, beside_a_snapshot))?;
            table.latency(name, case, p50, p99);
        }
    }
    Ok(())
}
