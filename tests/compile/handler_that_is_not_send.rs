// A handler's future has to be Send.
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

async fn f(bus: &Bus) -> Result<Running> {
    bus.subscribe::<OrderPlaced>("g")
        .handler(async |order, ctx| {
            let local = std::rc::Rc::new(1);
            ctx.publish(order).await?;
            drop(local);
            Ok(())
        })
        .start()
        .await
}

fn main() {}
