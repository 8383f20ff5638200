//! Exactly-once effects: the receipt of a message, what its handlers write and what they publish are one transaction, so
//! a message that comes twice has its effect once. And the test of it, in a few lines.
//!
//! ```text
//! cargo run --example 05_exactly_once_effects
//! ```

#![allow(clippy::print_stdout)]

use postrider::{
    Bus, Event, Message, Running, Transactional, event::DynEvent as _, memory::MemoryTransport, sqlite::SqliteLog,
};
use sqlx::SqliteConnection;
use std::time::Duration;

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "payment.received", topic = "payments", key = "account")]
struct PaymentReceived {
    account: String,
    cents: i64,
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "balance.changed", topic = "balances", key = "account")]
struct BalanceChanged {
    account: String,
    cents: i64,
}

const TABLE: &str = "CREATE TABLE balance (account TEXT PRIMARY KEY, cents INTEGER NOT NULL) STRICT";

/// The application's own wiring: the test below runs it, too.
async fn accounts(bus: &Bus) -> postrider::Result<Running> {
    bus.subscribe::<PaymentReceived>("accounts")
        .middleware(Transactional::new())
        .handler(async |payment, ctx| {
            // The connection of the transaction the receipt is in.
            let cents: i64 = sqlx::query_scalar(
                "INSERT INTO balance VALUES (?1, ?2) ON CONFLICT DO UPDATE SET cents = cents + ?2 RETURNING cents",
            )
            .bind(&payment.account)
            .bind(payment.cents)
            .fetch_one(ctx.tx::<SqliteConnection>()?)
            .await?;
            let account = payment.account.clone();
            ctx.publish(&BalanceChanged { account, cents }).await?;
            // Fails once for some: all of it is undone, and tried again.
            if payment.cents == 300 && ctx.attempt() == 1 {
                Err("a hiccup")?;
            }
            Ok(())
        })
        .start()
        .await
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let log = SqliteLog::open(dir.path().join("bank.db")).await?;
    let pool = log.pool().clone();
    sqlx::raw_sql(TABLE).execute(&pool).await?;
    let transport = MemoryTransport::new();
    let bus = Bus::builder()
        .log(log)
        .transport(transport.clone())
        .source("bank")
        .build()?;

    let payments = accounts(&bus).await?;
    let screen = bus
        .subscribe::<BalanceChanged>("screen")
        .handler(async |changed, ctx| {
            let cause = ctx
                .message()
                .attribute("causationid")
                .map_or("?".into(), |cause| cause.as_text());
            println!(
                "   {} now has {} cents, because of message {cause}",
                changed.account, changed.cents
            );
            Ok(())
        })
        .start()
        .await?;
    bus.start().await?;

    println!("Three payments, the second of which comes four times, as after crashes and redeliveries:");
    let pay = |cents| PaymentReceived {
        account: "ada".to_owned(),
        cents,
    };
    let twice: Message = pay(200).to_message()?;
    bus.publish(&pay(100)).await?;
    for _ in 0..4 {
        bus.publish(twice.clone()).await?;
    }
    bus.publish(&pay(300)).await?;
    let seen = || payments.report().handled + payments.report().dropped;
    while seen() < 6 || screen.report().handled < 3 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let cents: i64 = sqlx::query_scalar("SELECT cents FROM balance WHERE account = 'ada'")
        .fetch_one(&pool)
        .await?;
    println!(
        "\n6 deliveries and a failure later ada has {cents} cents: {}",
        if cents == 600 { "right" } else { "wrong" }
    );
    anyhow::ensure!(cents == 600);
    bus.shutdown(Duration::from_secs(5)).await?;
    Ok(())
}

// `cargo test --example 05_exactly_once_effects --features testing`
#[cfg(all(test, feature = "testing"))]
mod tests {
    use super::*;
    use postrider::{
        clock::ManualClock,
        sqlite::SqliteOptions,
        testing::{CrashPoint, TestBus},
    };

    #[tokio::test]
    async fn a_payment_counts_once_wherever_the_process_dies() {
        for point in [CrashPoint::BeforeCommit, CrashPoint::AfterCommit, CrashPoint::BeforeAck] {
            // The handler writes to SQLite, so the log is there as well.
            let dir = tempfile::tempdir().unwrap();
            let clock = ManualClock::shared();
            let options = SqliteOptions::default().with_clock(clock.clone());
            let log = SqliteLog::open_with(dir.path().join("test.db"), options).await.unwrap();
            let pool = log.pool().clone();
            sqlx::raw_sql(TABLE).execute(&pool).await.unwrap();
            let mut app = TestBus::builder()
                .log(log, clock)
                .start(async |bus| accounts(bus).await.map(drop))
                .await
                .unwrap();
            app.crash_at(point);
            app.bus()
                .publish(&PaymentReceived {
                    account: "ada".to_owned(),
                    cents: 300,
                })
                .await
                .unwrap();
            app.advance(Duration::from_secs(10)).await;
            assert!(app.has_crashed());
            app.restart().await.unwrap();
            app.advance(Duration::from_secs(60)).await;
            let cents: i64 = sqlx::query_scalar("SELECT cents FROM balance")
                .fetch_one(&pool)
                .await
                .unwrap();
            assert_eq!(cents, 300, "{point:?}");
            assert_eq!(app.published::<BalanceChanged>().len(), 1, "{point:?}");
            app.no_dead_letters().await;
        }
    }
}
