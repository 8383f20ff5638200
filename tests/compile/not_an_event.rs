// A type without the derive.
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

struct Invoice;
async fn f(bus: &Bus) -> Result<MessageId> {
    bus.publish(&Invoice).await
}
fn g(bus: &Bus) {
    let _ = bus.subscribe::<Invoice>("billing");
}

fn main() {}
