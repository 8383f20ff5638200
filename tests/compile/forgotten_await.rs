// Nothing is published until it is awaited.
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

#[deny(unused_must_use)]
fn f(bus: &Bus, order: &OrderPlaced) {
    bus.publish(order);
}
#[deny(unused_must_use)]
fn g(bus: &Bus) {
    bus.subscribe::<OrderPlaced>("g").handler(reserve);
}

fn main() {}
