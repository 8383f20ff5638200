// What a handler captures belongs into the subscription's state.
#![allow(unused)]
use postrider::*;

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.placed", key = "customer")]
struct OrderPlaced {
    id: u64,
    customer: String,
}
struct Warehouse;

async fn by_value(bus: &Bus, warehouse: Warehouse) -> Result<Running> {
    bus.subscribe::<OrderPlaced>("g")
        .handler(async move |order, ctx| {
            let _ = &warehouse;
            Ok(())
        })
        .start()
        .await
}
async fn a_batch(bus: &Bus, warehouse: Warehouse) -> Result<Running> {
    bus.subscribe::<OrderPlaced>("g")
        .batch_handler(consumer::Batch::default(), async move |orders, ctx| {
            let _ = &warehouse;
            Vec::new()
        })
        .start()
        .await
}

fn main() {}
