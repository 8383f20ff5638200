// A delivery is settled once.
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

fn f(delivery: Delivery) -> [Settlement; 2] {
    [delivery.ack(), delivery.release()]
}

fn main() {}
