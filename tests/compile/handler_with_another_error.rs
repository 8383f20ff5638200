// A handler's error is `HandlerError`, or it goes in by `.handler_returning`.
#![allow(unused)]
use postrider::*;

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.placed", key = "customer")]
struct OrderPlaced {
    id: u64,
    customer: String,
}
async fn reserve(_: &OrderPlaced, _: &mut Context) -> std::io::Result<()> {
    Ok(())
}

async fn f(bus: &Bus) -> Result<Running> {
    bus.subscribe::<OrderPlaced>("g").handler_returning(reserve).start().await?;
    bus.subscribe::<OrderPlaced>("g").handler(reserve).start().await
}
async fn no_handler(bus: &Bus) -> Result<Running> {
    bus.subscribe::<OrderPlaced>("g").handler(5).start().await
}

fn main() {}
