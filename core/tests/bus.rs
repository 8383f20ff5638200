//! The bus itself: how it is built, what it refuses, what runs with it, and what can stand in for it.

#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use async_trait::async_trait;
use postrider_core::{
    Bus, Capabilities, DynEvent, ErrorKind, Event, EventBus, Limits, Message, MessageId, RelayOptions, Result, Topic,
    Transport,
    log::{Lent, NewRecord},
    memory::{MemoryLog, MemoryTransport},
};
use serde::{Deserialize, Serialize};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use world::{World, event, options, secs};

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "order.placed", topic = "orders", key = "customer")]
struct OrderPlaced {
    customer: String,
}

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "order.paid", topic = "orders")]
struct OrderPaid;

fn placed() -> OrderPlaced {
    OrderPlaced {
        customer: "ada".to_owned(),
    }
}

#[test]
fn what_is_missing_or_makes_no_sense_is_named() {
    let says = |built: Result<Bus>, text: &str| {
        let error = built.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
        assert!(error.to_chain().contains(text), "{}", error.to_chain());
    };
    says(Bus::builder().log(MemoryLog::new()).build(), "no transport");
    let bus = || Bus::builder().log(MemoryLog::new()).transport(MemoryTransport::new());
    says(
        bus().relay(RelayOptions::default().with_batch_size(0)).build(),
        "relay.batch_size is 0",
    );
    says(bus().source("").build(), "`source`");
    says(
        bus().limits(Limits::default().with_max_message_bytes(0)).build(),
        "max_message_bytes is 0",
    );
    bus().build().unwrap();
}

#[tokio::test]
async fn messages_over_the_limit_are_refused_before_they_are_accepted() {
    let small = Transport::new("small", Capabilities::default().with_max_message_bytes(1000))
        .with_publisher(MemoryTransport::new());
    let bus = Bus::builder().log(MemoryLog::new()).transport(small).build().unwrap();
    for (message, says) in [
        (Message::new(Topic::new("t"), "e.v1", vec![0; 1001]), "too large"),
        (event("t", Some(""), "x"), "key of a message is empty"),
        (event("t", Some(&"k".repeat(600)), "x"), "more than 512 bytes"),
        (event("t", None, "x").with_header("", "x"), "name of a header is empty"),
    ] {
        let error = bus.publish(message).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Invalid);
        assert!(error.to_string().contains(says), "{error}");
    }
    let all = [event("t", None, "fine"), event("t", Some("\0"), "x")];
    assert!(bus.publish_all(all).await.is_err());
    let stats = bus.log().unwrap().admin().unwrap().stats().await.unwrap();
    assert!(stats.values().all(|stats| stats.pending == 0), "all or none");
    bus.publish(event("t", None, "")).await.unwrap();
}

#[tokio::test]
async fn options_of_one_event_go_with_it() {
    let world = World::start(options()).await;
    let id = MessageId::new();
    let published = world
        .bus
        .publish(&placed())
        .id(id)
        .key("other")
        .topic(Topic::new("elsewhere"))
        .header("a", "1")
        .header("a", "2");
    assert_eq!(published.await.unwrap(), id);
    let mixed: [&dyn DynEvent; 2] = [&placed(), &OrderPaid];
    world.bus.publish_all(mixed).await.unwrap();
    world
        .until(|w| w.published("orders").len() == 2 && w.published("elsewhere").len() == 1)
        .await;
    let message = &world.transport.published(&Topic::new("elsewhere"))[0];
    assert_eq!(
        (message.id(), message.key(), message.kind()),
        (id, Some("other"), "order.placed.v1")
    );
    assert_eq!(message.headers().len(), 2);
    assert_eq!(message.content_type(), "application/json");
}

#[tokio::test]
async fn background_tasks_start_and_stop_with_the_bus() {
    let (started, stopped) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let (on_start, on_stop) = (started.clone(), stopped.clone());
    let bus = Bus::builder()
        .log(MemoryLog::new())
        .transport(MemoryTransport::new())
        .task("ticker", move |ctx| async move {
            on_start.fetch_add(1, Ordering::SeqCst);
            ctx.bus.publish(&OrderPaid).await?;
            ctx.stop.cancelled().await;
            on_stop.fetch_add(1, Ordering::SeqCst);
            Ok(())
        })
        .task("stubborn", |_| std::future::pending())
        .build()
        .unwrap();
    assert_eq!(started.load(Ordering::SeqCst), 0);
    bus.start().await.unwrap();
    while started.load(Ordering::SeqCst) == 0 {
        tokio::task::yield_now().await;
    }
    let cut_off = bus.shutdown(Duration::from_millis(50)).await.unwrap_err();
    assert_eq!(cut_off.kind(), ErrorKind::Unavailable);
    assert_eq!(stopped.load(Ordering::SeqCst), 1);
    assert_eq!(bus.start().await.unwrap_err().kind(), ErrorKind::Closed);
}

/// A double of the whole bus.
#[derive(Debug, Default)]
struct Recording(Mutex<Vec<String>>);

#[async_trait]
impl EventBus for Recording {
    async fn publish_records(&self, batch: Vec<NewRecord>) -> Result<()> {
        self.0
            .lock()
            .unwrap()
            .extend(batch.iter().map(|record| record.message.kind().to_owned()));
        Ok(())
    }
    async fn publish_records_in(&self, _: Lent<'_>, batch: Vec<NewRecord>) -> Result<()> {
        self.publish_records(batch).await
    }
    async fn send_messages(&self, batch: Vec<Message>) -> Result<()> {
        self.publish_records(batch.into_iter().map(NewRecord::new).collect())
            .await
    }
}

/// Application code that does not know which bus it has.
async fn application(bus: &Arc<dyn EventBus>, log: &MemoryLog) -> Result<()> {
    let mut tx = log.transaction();
    bus.publish_in(&mut tx, &placed()).await?;
    tx.commit();
    bus.publish(&OrderPaid).header("a", "b").await?;
    bus.publish_after(&OrderPaid, secs(1)).await?;
    bus.publish_all([&OrderPaid, &OrderPaid]).await?;
    bus.publish_direct(&placed()).await?;
    Ok(())
}

#[tokio::test]
async fn a_double_replaces_the_bus() {
    let (recording, log) = (Arc::new(Recording::default()), MemoryLog::new());
    let object: Arc<dyn EventBus> = recording.clone();
    application(&object, &log).await.unwrap();
    let (placed, paid) = ("order.placed.v1", "order.paid.v1");
    assert_eq!(*recording.0.lock().unwrap(), [placed, paid, paid, paid, paid, placed]);
    let world = World::start(options()).await;
    application(&world.bus.as_dyn(), &world.log).await.unwrap();
    world.pass(secs(2)).await;
    world.until(|w| w.published("orders").len() == 6).await;
}
