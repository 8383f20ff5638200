//! The whole path, with no server: an order and its event in one transaction, a relay, a broker in memory, a chain of
//! handlers.
//!
//! ```text
//! cargo run --example 01_quickstart [-- FILE]
//! ```
//! FILE is the SQLite file to use; a temporary one unless given.

#![allow(clippy::print_stdout)]

use postrider::{
    Bus, Context, Event, HandlerError, HandlerResult, Mailbox, Retry,
    log::{Filter, Page},
    memory::MemoryTransport,
    sqlite::SqliteLog,
};
use sqlx::SqlitePool;
use std::{path::PathBuf, time::Duration};

/// What happened. Orders of one customer stay in order.
#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.placed", topic = "orders", key = "customer")]
struct OrderPlaced {
    id: i64,
    customer: String,
    cents: i64,
}

async fn reserve(order: &OrderPlaced, ctx: &mut Context) -> HandlerResult {
    println!(
        "   handler 1   order {}: stock reserved (message {})",
        order.id,
        ctx.message().id()
    );
    Ok(())
}

async fn release(order: &OrderPlaced, _: &mut Context) -> HandlerResult {
    println!(
        "   undo 1      order {}: stock released, because a later handler failed",
        order.id
    );
    Ok(())
}

async fn charge(order: &OrderPlaced, _: &mut Context) -> HandlerResult {
    if order.cents > 100_000 {
        println!("   handler 2   order {}: the card is refused", order.id);
        return Err(HandlerError::permanent("the card is refused"));
    }
    println!(
        "   handler 2   order {}: {} charged {} cents",
        order.id, order.customer, order.cents
    );
    Ok(())
}

/// The order and its event: both, or neither.
async fn place(bus: &Bus, pool: &SqlitePool, order: &OrderPlaced, commit: bool) -> anyhow::Result<()> {
    let mut tx = pool.begin().await?;
    sqlx::query("INSERT INTO orders (id, customer, cents) VALUES (?, ?, ?)")
        .bind(order.id)
        .bind(&order.customer)
        .bind(order.cents)
        .execute(&mut *tx)
        .await?;
    bus.publish_in(&mut tx, order).await?;
    if commit {
        tx.commit().await?;
        println!("   committed   order {}, and its event with it", order.id);
    } else {
        tx.rollback().await?;
        println!("   rolled back order {}: its event is gone with it", order.id);
    }
    Ok(())
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let temporary = tempfile::tempdir()?;
    let file = std::env::args()
        .nth(1)
        .map_or_else(|| temporary.path().join("quickstart.db"), PathBuf::from);

    println!(
        "1. The event log is a SQLite file, {}; your tables are in it too.",
        file.display()
    );
    let log = SqliteLog::open(&file).await?;
    let pool = log.pool().clone();
    sqlx::raw_sql(
        "CREATE TABLE IF NOT EXISTS orders (id INTEGER PRIMARY KEY, customer TEXT NOT NULL, cents INTEGER NOT NULL)",
    )
    .execute(&pool)
    .await?;
    let first: i64 = sqlx::query_scalar("SELECT coalesce(max(id), 0) + 1 FROM orders")
        .fetch_one(&pool)
        .await?;
    let transport = MemoryTransport::new();
    let bus = Bus::builder()
        .log(log)
        .transport(transport.clone())
        .source("quickstart")
        .build()?;

    println!("2. The group `billing` handles each order in two steps; the first can be taken back.");
    let billing = bus
        .subscribe::<OrderPlaced>("billing")
        .retry(Retry::none())
        .handler(reserve)
        .compensate(release)
        .handler(charge)
        .start()
        .await?;

    println!("3. Three orders are placed, each in one transaction with its event. Nothing is sent yet.");
    let order = |n: i64, customer: &str, cents| OrderPlaced {
        id: first + n,
        customer: customer.to_owned(),
        cents,
    };
    place(&bus, &pool, &order(0, "ada", 4_200), true).await?;
    place(&bus, &pool, &order(1, "bob", 990), false).await?;
    place(&bus, &pool, &order(2, "ada", 250_000), true).await?;

    println!("4. The relay starts: it takes what was committed to the broker, and the handlers get it.");
    bus.start().await?;
    while billing.report().handled + billing.report().dead_lettered < 2 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    bus.shutdown(Duration::from_secs(10)).await?;

    println!("5. What is left behind:");
    let relay = bus.relay_report().counts;
    println!(
        "   the relay   published {} events, the broker has {}",
        relay.published,
        transport.published(&OrderPlaced::TOPIC).len()
    );
    let report = billing.report();
    println!(
        "   billing     handled {}, and has {} dead letter",
        report.handled, report.dead_lettered
    );
    let Some(log) = bus.log() else { return Ok(()) };
    let inbox = Filter::of(Mailbox::Inbox(billing.group().clone()));
    for dead in log.admin()?.list(&inbox, &Page::default()).await?.entries {
        let why = dead.errors.last().map_or("", |error| error.text.as_str());
        println!(
            "   dead letter {} ({}): {why}",
            dead.message.kind(),
            String::from_utf8_lossy(dead.message.payload())
        );
    }
    println!("An order that was rolled back sent nothing; one that was committed was delivered; one whose handlers");
    println!("failed was taken back step by step and waits in the log for a person, who may redrive or discard it.");
    Ok(())
}
