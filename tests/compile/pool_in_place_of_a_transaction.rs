// A pool is no transaction.
#![allow(unused)]
use postrider::*;
use postrider::sqlite::SqliteLog;

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.placed", key = "customer")]
struct OrderPlaced {
    id: u64,
    customer: String,
}
#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.paid")]
struct OrderPaid {
    order: u64,
}
async fn reserve(_: &OrderPlaced, _: &mut Context) -> HandlerResult {
    Ok(())
}

async fn f(bus: &Bus, mut pool: sqlx::SqlitePool, order: &OrderPlaced) -> Result<MessageId> {
    bus.publish_in(&mut pool, order).await
}

fn main() {}
