//! Orders from a file, each written with its event in one transaction, and handled into a second table. Kill it at any
//! moment and run it again: nothing is lost, and nothing takes effect twice.
//!
//! ```text
//! cargo run --release --example 02_transactional_outbox -- examples/data/orders.csv [shop.db]
//! ```
//! The orders are CSV (`id,customer,item,quantity,cents`), or JSON lines with the same names if the file ends in
//! `.jsonl`. Without a database file a temporary one is used, which a second run does not find again.

#![allow(clippy::print_stdout)]

use anyhow::Context as _;
use indicatif::{ProgressBar, ProgressStyle};
use postrider::{
    Bus, Context, Event, HandlerResult, RelayOptions,
    memory::MemoryTransport,
    sqlite::{SqliteLog, SqliteOptions},
};
use serde::{Deserialize, Serialize};
use sqlx::SqlitePool;
use std::{
    path::{Path, PathBuf},
    time::{Duration, Instant},
};

/// An order as it stands in the file, and the event that it was placed.
#[derive(Debug, Serialize, Deserialize, Event)]
#[event(name = "order.placed", topic = "orders", key = "customer")]
struct OrderPlaced {
    id: i64,
    customer: String,
    item: String,
    quantity: i64,
    cents: i64,
}

const TABLES: &str = "
    CREATE TABLE IF NOT EXISTS orders (
        id INTEGER PRIMARY KEY, customer TEXT NOT NULL, item TEXT NOT NULL, quantity INTEGER NOT NULL, cents INTEGER NOT NULL
    ) STRICT;
    CREATE TABLE IF NOT EXISTS totals (customer TEXT PRIMARY KEY, orders INTEGER NOT NULL, cents INTEGER NOT NULL) STRICT;
    CREATE TABLE IF NOT EXISTS handled (message_id TEXT PRIMARY KEY) STRICT, WITHOUT ROWID;
";

fn read_orders(path: &Path) -> anyhow::Result<Vec<OrderPlaced>> {
    let text =
        std::fs::read_to_string(path).with_context(|| format!("cannot read the orders in {}", path.display()))?;
    if path.extension().is_some_and(|extension| extension == "jsonl") {
        let lines = text.lines().enumerate().filter(|(_, line)| !line.trim().is_empty());
        let parsed = lines.map(|(n, line)| {
            serde_json::from_str(line).with_context(|| format!("{}:{}: not an order", path.display(), n + 1))
        });
        return parsed.collect();
    }
    let mut reader = csv::Reader::from_reader(text.as_bytes());
    let rows = reader.deserialize();
    rows.map(|row| row.with_context(|| format!("{}: not an order", path.display())))
        .collect()
}

/// The order and its event, in one transaction. `false` if it was placed by a run before this one.
async fn place(bus: &Bus, pool: &SqlitePool, order: &OrderPlaced) -> anyhow::Result<bool> {
    let mut tx = pool.begin_with("BEGIN IMMEDIATE").await?;
    let inserted = sqlx::query("INSERT INTO orders VALUES (?, ?, ?, ?, ?) ON CONFLICT (id) DO NOTHING")
        .bind(order.id)
        .bind(&order.customer)
        .bind(&order.item)
        .bind(order.quantity)
        .bind(order.cents)
        .execute(&mut *tx)
        .await?;
    let is_new = inserted.rows_affected() == 1;
    if is_new {
        bus.publish_in(&mut tx, order).await?;
    }
    tx.commit().await?;
    Ok(is_new)
}

/// What the handlers share.
struct Totals {
    pool: SqlitePool,
}

impl Totals {
    /// Adds the order to its customer's total. A message may come twice: its id goes in with the effect, so a repeat
    /// finds it there and does nothing.
    async fn add(&self, order: &OrderPlaced, ctx: &mut Context) -> HandlerResult {
        let mut tx = self.pool.begin_with("BEGIN IMMEDIATE").await?;
        let seen = sqlx::query("INSERT INTO handled VALUES (?) ON CONFLICT DO NOTHING")
            .bind(ctx.message().id().to_string())
            .execute(&mut *tx)
            .await?;
        if seen.rows_affected() == 1 {
            sqlx::query(
                "INSERT INTO totals VALUES (?, 1, ?) ON CONFLICT (customer) \
                 DO UPDATE SET orders = orders + 1, cents = cents + excluded.cents",
            )
            .bind(&order.customer)
            .bind(order.cents)
            .execute(&mut *tx)
            .await?;
        }
        tx.commit().await?;
        Ok(())
    }
}

async fn count(pool: &SqlitePool, sql: &'static str) -> anyhow::Result<u64> {
    let count: i64 = sqlx::query_scalar(sql).fetch_one(pool).await?;
    Ok(u64::try_from(count)?)
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: 02_transactional_outbox ORDERS.csv|ORDERS.jsonl [DATABASE]";
    let orders = read_orders(Path::new(&arguments.next().context(usage)?))?;
    let temporary = tempfile::tempdir()?;
    let file = arguments
        .next()
        .map_or_else(|| temporary.path().join("shop.db"), PathBuf::from);

    // A short lease, so that a run that follows a killed one waits for two seconds only.
    let log = SqliteLog::open_with(&file, SqliteOptions::default().with_max_connections(1)).await?;
    let pool = log.pool().clone();
    sqlx::raw_sql(TABLES).execute(&pool).await?;
    let bus = Bus::builder()
        .log(log)
        // This broker forgets everything with the process, so it confirms only what was handled.
        .transport(MemoryTransport::new().confirm_when_handled())
        .relay(RelayOptions::default().with_lease(Duration::from_secs(2)))
        .source("example")
        .build()?;
    bus.subscribe::<OrderPlaced>("totals")
        .state(Totals { pool: pool.clone() })
        .handler(Totals::add)
        .start()
        .await?;
    bus.start().await?;

    let already = count(&pool, "SELECT count(*) FROM handled").await?;
    println!(
        "{} orders in the file; {already} were handled by runs before this one",
        orders.len()
    );
    let began = Instant::now();
    let bar = ProgressBar::new(orders.len() as u64)
        .with_style(ProgressStyle::with_template("{bar:40} {pos}/{len} {msg}")?)
        .with_message("placing");
    let mut placed = 0_u64;
    for order in &orders {
        placed += u64::from(place(&bus, &pool, order).await?);
        bar.inc(1);
    }
    let placing = began.elapsed();
    bar.set_message("handling");
    loop {
        let handled = count(&pool, "SELECT count(*) FROM handled").await?;
        bar.set_position(handled);
        if handled >= count(&pool, "SELECT count(*) FROM orders").await? {
            break;
        }
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bar.finish_and_clear();
    let all = began.elapsed();
    bus.shutdown(Duration::from_secs(10)).await?;

    let in_orders = count(&pool, "SELECT coalesce(sum(cents), 0) FROM orders").await?;
    let in_totals = count(&pool, "SELECT coalesce(sum(cents), 0) FROM totals").await?;
    let customers = count(&pool, "SELECT count(*) FROM totals").await?;
    let rate = |n: u64, time: Duration| n as f64 / time.as_secs_f64().max(1e-9);
    println!(
        "placed   {placed} orders, each with its event in one transaction: {:.0}/s",
        rate(placed, placing)
    );
    println!(
        "handled  {} events for {customers} customers, in {:.1} s",
        count(&pool, "SELECT count(*) FROM handled").await? - already,
        all.as_secs_f64()
    );
    println!("orders   {in_orders} cents in all; totals say {in_totals}");
    anyhow::ensure!(in_orders == in_totals, "an order was lost, or took effect twice");
    println!("they agree: nothing was lost, and nothing took effect twice");
    Ok(())
}
