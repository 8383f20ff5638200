//! The bus for the tests of applications.

#![allow(clippy::unwrap_used, missing_docs)]

use postrider_core::{
    Bus, Event, HandlerError, Message, Result, Topic, Transactional,
    testing::{CrashPoint, TestBus},
};
use serde::{Deserialize, Serialize};
use std::time::Duration;

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "order.placed", key = "id")]
struct OrderPlaced {
    id: u32,
}

#[derive(Debug, PartialEq, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "order.invoiced")]
struct Invoiced {
    order: u32,
}

/// The application: bills orders, but not the unlucky ones.
async fn wire(bus: &Bus) -> Result<()> {
    bus.subscribe::<OrderPlaced>("billing")
        .middleware(Transactional::new())
        .handler(async |order, ctx| {
            if order.id == 13 {
                return Err(HandlerError::permanent("not that one"));
            }
            ctx.publish(&Invoiced { order: order.id }).await?;
            Ok(())
        })
        .start()
        .await?;
    bus.subscribe::<Invoiced>("mail")
        .handler(async |_, ctx| match ctx.attempt() {
            1..=4 => Err("the mail server sleeps")?,
            _ => Ok(()),
        })
        .start()
        .await?;
    Ok(())
}

#[tokio::test]
async fn an_application_is_tested_in_a_few_lines() {
    let app = TestBus::start(wire).await.unwrap();
    app.bus().publish(&OrderPlaced { id: 1 }).await.unwrap();
    app.settle().await;
    app.handled::<OrderPlaced>("billing").times(1);
    app.handled::<Invoiced>("mail").times(0);
    app.advance(Duration::from_secs(120)).await;
    app.handled::<Invoiced>("mail").times(1);
    assert_eq!(app.published::<Invoiced>(), [Invoiced { order: 1 }]);
    app.no_dead_letters().await;
    app.bus()
        .publish_after(&OrderPlaced { id: 13 }, Duration::from_secs(3600))
        .await
        .unwrap();
    app.deliver(Message::new(Topic::new("order.placed"), "order.placed.v1", "not json"))
        .await
        .unwrap();
    app.settle().await;
    assert_eq!(app.dead_letters("billing").await.len(), 1);
    app.advance(Duration::from_secs(3700)).await;
    assert_eq!(app.dead_letters("billing").await.len(), 2);
}

#[tokio::test]
#[should_panic(expected = "order.placed.v1 in inbox:billing, after 1 attempts: not that one")]
async fn dead_letters_are_told() {
    let app = TestBus::start(wire).await.unwrap();
    app.bus().publish(&OrderPlaced { id: 13 }).await.unwrap();
    app.settle().await;
    app.no_dead_letters().await;
}

#[tokio::test]
async fn a_process_dies_where_it_is_told_and_the_next_finishes() {
    for point in [
        CrashPoint::BeforeCommit,
        CrashPoint::AfterCommit,
        CrashPoint::BeforeAck,
        CrashPoint::AfterAck,
        CrashPoint::BeforePublish,
        CrashPoint::AfterPublish,
        CrashPoint::BeforePark,
        CrashPoint::AfterPark,
    ] {
        let mut app = TestBus::start(wire).await.unwrap();
        app.crash_at(point);
        app.bus().publish(&OrderPlaced { id: 1 }).await.unwrap();
        app.settle().await;
        app.advance(Duration::from_secs(10)).await;
        assert!(app.has_crashed(), "{point:?}");
        app.restart().await.unwrap();
        app.advance(Duration::from_secs(300)).await;
        app.handled::<Invoiced>("mail").times(1);
        assert_eq!(app.published::<Invoiced>().len(), 1, "{point:?}");
        app.no_dead_letters().await;
        // A restart without a crash.
        app.restart().await.unwrap();
        app.bus().publish(&OrderPlaced { id: 2 }).await.unwrap();
        app.settle().await;
        assert_eq!(app.published::<Invoiced>().len(), 2, "{point:?}");
    }
}
