//! Handlers written with `anyhow`.

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
