//! What an operator sees of a message that fails: before it is a dead letter, and when it recovers.

use crate::{
    OrderPlaced, placed,
    world::{World, logs::Logs, options, secs},
};
use postrider_core::{Bus, Context, HandlerResult, Retry, Running, Transport, consumer::Batch, relay::Backoff};
use tracing::Level;

fn retry() -> Retry {
    Retry::default()
        .with_max_attempts(5)
        .with_in_place(2)
        .with_backoff(Backoff::Fixed(secs(60)))
}

async fn third_time_lucky(_: &OrderPlaced, ctx: &mut Context) -> HandlerResult {
    if ctx.attempt() < 4 {
        Err("no such customer")?
    } else {
        Ok(())
    }
}

async fn subscribe(bus: &Bus, kind: &str) -> Running {
    let subscribing = bus.subscribe::<OrderPlaced>("g").retry(retry());
    let running = match kind {
        "batches" => subscribing.batch_handler(Batch::default(), async |orders, ctx| {
            let mut outcomes = Vec::new();
            for (place, order) in orders.iter().enumerate() {
                outcomes.push(third_time_lucky(order, ctx.of(place)).await);
            }
            outcomes
        }),
        "durable" => return subscribing.durable().handler(third_time_lucky).start().await.unwrap(),
        "unordered" => return subscribing.unordered().handler(third_time_lucky).start().await.unwrap(),
        _ => return subscribing.handler(third_time_lucky).start().await.unwrap(),
    };
    running.start().await.unwrap()
}

#[tokio::test]
async fn an_attempt_that_fails_and_waits_is_a_warning_and_its_recovery_is_told() {
    for kind in ["plain", "batches", "durable", "unordered"] {
        let logs = Logs::capture();
        let world = World::start(options()).await;
        // Without a log, messages of an unordered group wait with the broker.
        let without_log = Bus::builder()
            .transport(Transport::from(world.transport.clone()))
            .clock(world.clock.clone())
            .build()
            .unwrap();
        let bus = if kind == "unordered" { &without_log } else { &world.bus };
        let running = subscribe(bus, kind).await;
        let id = world.bus.publish(&placed(1, "ada")).await.unwrap();
        for _ in 0..40 {
            world.pass(secs(10)).await;
        }
        world.until(|_| running.report().handled == 1).await;
        // In place nothing is said, but for a durable chain, whose attempts are all made in the inbox.
        let first = if kind == "durable" { 1 } else { 2 };
        let warned = logs.of(Level::WARN, "an attempt failed");
        assert_eq!(warned.len(), 4 - first, "{kind}: {warned:#?}");
        for (line, attempt) in warned.iter().zip(first..) {
            for says in [
                format!("message={id}"),
                "topic=orders".to_owned(),
                "group=g".to_owned(),
                format!("attempt={attempt}"),
                "of=5".to_owned(),
                "due=2026-01-01T00:".to_owned(),
                "no such customer".to_owned(),
            ] {
                assert!(line.contains(&says), "{kind}: {says} in {line}");
            }
        }
        let told = logs.of(Level::INFO, "the message was handled, after attempts that failed");
        assert_eq!(told.len(), 1, "{kind}: {:#?}", logs.lines());
        assert!(
            told[0].contains("attempt=4") && told[0].contains(&format!("message={id}")),
            "{told:?}"
        );
    }
}

#[tokio::test]
async fn a_message_that_succeeds_is_no_line() {
    let logs = Logs::capture();
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .handler(async |_, _| Ok(()))
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().handled == 1).await;
    let above_debug = |line: &&String| !line.starts_with("DEBUG") && !line.starts_with("TRACE");
    let lines: Vec<_> = logs.lines().iter().filter(above_debug).cloned().collect();
    assert!(lines.is_empty(), "{lines:#?}");
}
