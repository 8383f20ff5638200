//! A chain of handlers with everything around it: order, compensation, what may fail, time-outs, middleware, retries in
//! place and from the inbox, an outage.
//!
//! ```text
//! cargo run --example 04_handlers_and_compensation
//! ```

#![allow(clippy::print_stdout)]

use postrider::{
    AnyEvent, Bus, Context, Event, Handler, HandlerError, HandlerResult, Middleware, Next, OnFailure, Retry, Verdict,
    consumer::{CircuitBreaker, Timeout},
    memory::{MemoryLog, MemoryTransport},
    relay::Backoff,
};
use std::{
    num::NonZeroU32,
    time::{Duration, Instant},
};

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.placed", topic = "orders", key = "customer")]
struct OrderPlaced {
    id: u32,
    customer: String,
    item: String,
}

/// A step as a type: with its compensation, and its place in the chain if it declares one.
struct Reserve {
    warehouse: &'static str,
}

impl Handler<OrderPlaced> for Reserve {
    async fn execute(&self, order: &OrderPlaced, _: &mut Context) -> HandlerResult {
        println!("   {}  reserve {} in the {}", order.id, order.item, self.warehouse);
        Ok(())
    }
    async fn compensate(&self, order: &OrderPlaced, _: &mut Context) -> HandlerResult {
        println!("   {}  put {} back", order.id, order.item);
        Ok(())
    }
}

async fn charge(order: &OrderPlaced, ctx: &mut Context) -> HandlerResult {
    match (&*order.item, ctx.attempt()) {
        ("anvil", _) => Err(HandlerError::permanent("the card is refused")),
        ("lamp", 1..=3) => Err("the bank did not answer")?,
        _ => {
            println!(
                "   {}  charge {}, at attempt {}",
                order.id,
                order.customer,
                ctx.attempt()
            );
            Ok(())
        }
    }
}

async fn refund(order: &OrderPlaced, _: &mut Context) -> HandlerResult {
    println!("   {}  refund {}", order.id, order.customer);
    Ok(())
}

async fn recommend(_: &OrderPlaced, _: &mut Context) -> HandlerResult {
    Err("the recommendation service has no idea")?
}

/// Middleware for events of every type.
struct Timing;

impl Middleware for Timing {
    async fn execute(&self, ctx: &mut Context, event: &AnyEvent, next: Next<'_>) -> HandlerResult {
        let began = Instant::now();
        let result = next.run(ctx, event).await;
        let how = if result.is_ok() { "handled" } else { "failed" };
        println!("      ({} {how} in {:?})", event.kind(), began.elapsed());
        result
    }
    async fn on_failure(&self, _: &mut Context, error: &HandlerError, attempt: u32) {
        println!("      (attempt {attempt} failed: {error})");
    }
}

/// Middleware for one type: what it says is done with a message nobody could handle.
struct GiveUpOnAnvils;

impl Middleware<OrderPlaced> for GiveUpOnAnvils {
    async fn fallback(&self, _: &mut Context, order: Option<&OrderPlaced>, error: &HandlerError) -> Option<Verdict> {
        let order = order.filter(|order| order.item == "anvil")?;
        println!("   {}  {error}: an anvil is not worth a dead letter", order.id);
        Some(Verdict::Ack)
    }
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let bus = Bus::builder()
        .log(MemoryLog::new())
        .transport(MemoryTransport::new())
        .middleware(Timing)
        .build()?;
    let few = NonZeroU32::new(5).unwrap_or(NonZeroU32::MIN);
    let running = bus
        .subscribe::<OrderPlaced>("shop")
        .middleware(GiveUpOnAnvils)
        .middleware(CircuitBreaker::new(few, Duration::from_secs(1)))
        .middleware(Timeout::after(Duration::from_secs(10)))
        .retry(Retry::default().with_backoff(Backoff::Fixed(Duration::from_secs(1))))
        .step(Reserve { warehouse: "hall" })
        .handler(charge)
        .compensate(refund)
        .timeout(Duration::from_secs(2))
        .handler(recommend)
        .on_failure(OnFailure::Ignore)
        .handler(async |order, _| {
            println!("   {}  ship {}", order.id, order.item);
            Ok(())
        })
        .start()
        .await?;
    bus.start().await?;
    let order = |id, customer: &str, item: &str| OrderPlaced {
        id,
        customer: customer.to_owned(),
        item: item.to_owned(),
    };
    println!("1. A book for ada: every step in order; one may fail.");
    bus.publish(&order(1, "ada", "book")).await?;
    until(|| running.report().handled == 1).await;
    println!("\n2. An anvil for bob: the second step fails for good, the first is taken back.");
    bus.publish(&order(2, "bob", "anvil")).await?;
    until(|| running.report().handled == 2).await;
    println!("\n3. A lamp for cy: tried in place, then from the inbox. What cy orders meanwhile waits; dee does not.");
    bus.publish(&order(3, "cy", "lamp")).await?;
    until(|| running.report().parked == 1).await;
    bus.publish(&order(4, "cy", "book")).await?;
    bus.publish(&order(5, "dee", "book")).await?;
    until(|| running.report().handled == 5).await;
    println!("\n{:?}", running.report());
    bus.shutdown(Duration::from_secs(5)).await?;
    Ok(())
}

async fn until(mut done: impl FnMut() -> bool) {
    while !done() {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
}
