//! Handlers as applications write them: with `anyhow`, and in a transaction of SQLite.

#![cfg(feature = "macros")]
#![allow(clippy::unwrap_used, missing_docs)]

use postrider::{
    Bus, Context, Event, GroupName, Mailbox, Retry,
    memory::{MemoryLog, MemoryTransport},
};
use std::time::Duration;

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.placed")]
struct OrderPlaced {
    id: u64,
}

async fn reserve(order: &OrderPlaced, _: &mut Context) -> anyhow::Result<()> {
    anyhow::ensure!(order.id > 0, "no such order");
    anyhow::bail!("nothing of order {} is in stock", order.id)
}

#[tokio::test]
async fn bail_and_anyhow_results_are_handlers() {
    let bus = Bus::builder()
        .log(MemoryLog::new())
        .transport(MemoryTransport::new())
        .build()
        .unwrap();
    bus.start().await.unwrap();
    let running = bus
        .subscribe::<OrderPlaced>("stock")
        .retry(Retry::none())
        .handler_returning(async |_, _| -> anyhow::Result<()> { Ok(()) })
        .compensate_returning(async |_, _| -> anyhow::Result<()> { anyhow::bail!("stuck") })
        .handler_returning(reserve)
        .start()
        .await
        .unwrap();
    bus.publish(&OrderPlaced { id: 1 }).await.unwrap();
    while running.report().dead_lettered == 0 {
        tokio::time::sleep(Duration::from_millis(1)).await;
    }
    let letters = bus.dead_letters(Mailbox::Inbox(GroupName::new("stock"))).unwrap();
    let text = letters.list(None, 1).await.unwrap().entries[0].errors[0].text.clone();
    assert!(text.starts_with("nothing of order 1 is in stock"), "{text}");
    assert!(text.contains("failed: stuck"), "{text}");
}

/// It would wait for the write lock of the handler's own transaction until it times out, again and again.
#[cfg(feature = "sqlite")]
#[tokio::test]
async fn a_second_transaction_beside_the_handlers_own_is_refused() {
    use postrider::{HandlerResult, Transactional, log::LogAdmin as _, sqlite::SqliteLog};
    let dir = tempfile::tempdir().unwrap();
    let log = SqliteLog::open(dir.path().join("log.db")).await.unwrap();
    let bus = Bus::builder()
        .log(log.clone())
        .transport(MemoryTransport::new())
        .build()
        .unwrap();
    bus.start().await.unwrap();
    let running = bus
        .subscribe::<OrderPlaced>("stock")
        .middleware(Transactional::new())
        .retry(Retry::none())
        .state(bus.clone())
        .handler(
            async |bus: &Bus, order: &OrderPlaced, _: &mut Context| -> HandlerResult {
                match order.id {
                    1 => drop(bus.begin().await?),
                    _ => bus.publish(&OrderPlaced { id: 0 }).await.map(drop)?,
                }
                Ok(())
            },
        )
        .start()
        .await
        .unwrap();
    bus.publish(&OrderPlaced { id: 1 }).await.unwrap();
    bus.publish(&OrderPlaced { id: 2 }).await.unwrap();
    for _ in 0..1000 {
        if running.report().dead_lettered == 2 {
            break;
        }
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    let inbox = Mailbox::Inbox(GroupName::new("stock"));
    let filter = postrider::log::Filter::of(inbox);
    let dead = log.list(&filter, &Default::default()).await.unwrap().entries;
    assert_eq!(dead.len(), 2, "{:?}", running.report());
    for letter in dead {
        assert!(letter.errors[0].text.contains("ctx.publish"), "{:?}", letter.errors);
    }
    bus.shutdown(Duration::from_secs(5)).await.unwrap();
}
