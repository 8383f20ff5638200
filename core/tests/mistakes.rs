//! Mistakes of the first day, and what is said to them.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod world;

use postrider_core::{
    Bus, Context, ErrorKind, Event, GroupName, HandlerResult, Mailbox, Message, MessageId, Result, Topic,
    consumer::{Batch, BatchContext, BatchResult, Timeout},
    log::Pace,
    memory::{MemoryLog, MemoryTransport},
};
use serde::{Deserialize, Serialize};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};
use tracing::Level;
use world::{World, logs::Logs, options, secs};

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "order.placed", topic = "orders", key = "customer")]
struct OrderPlaced {
    id: u32,
    customer: Option<String>,
}

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "a.b", key = |e: &Self| e.0.checked_sub(1))]
struct Numbered(u32);

fn placed(id: u32, customer: Option<&str>) -> OrderPlaced {
    OrderPlaced {
        id,
        customer: customer.map(str::to_owned),
    }
}

async fn fine(_: &OrderPlaced, _: &mut Context) -> HandlerResult {
    Ok(())
}

#[test]
fn a_key_may_be_an_option() {
    assert_eq!(Event::key(&placed(1, Some("ada"))).as_deref(), Some("ada"));
    assert_eq!(Event::key(&placed(1, None)), None);
    assert_eq!(Event::key(&Numbered(8)).as_deref(), Some("7"));
    assert_eq!(Event::key(&Numbered(0)), None);
    const { assert!(OrderPlaced::KEYED) };
}

#[derive(Debug, Default)]
struct Batches(Mutex<Vec<u32>>);

impl Batches {
    async fn take(&self, orders: &[OrderPlaced], _: &mut BatchContext) -> BatchResult {
        self.0.lock().unwrap().extend(orders.iter().map(|order| order.id));
        orders.iter().map(|_| Ok(())).collect()
    }
}

#[tokio::test]
async fn batch_handlers_get_the_state() {
    let world = World::start(options()).await;
    let state = Arc::new(Batches::default());
    for (group, by_method) in [("method", true), ("closure", false)] {
        let subscribing = world.bus.subscribe::<OrderPlaced>(group).state(state.clone());
        let subscribing = if by_method {
            subscribing.batch_handler(Batch::default(), Batches::take)
        } else {
            subscribing.batch_handler(Batch::default(), async |state: &Batches, orders, ctx| {
                state.take(orders, ctx).await
            })
        };
        // The state is there for what comes behind, too.
        let next = subscribing.and::<Numbered>();
        next.handler(async |state: &Batches, n: &Numbered, _| {
            state.0.lock().unwrap().push(n.0);
            Ok(())
        })
        .start()
        .await
        .unwrap();
    }
    world.bus.publish(&placed(7, None)).await.unwrap();
    world.pass(secs(1)).await;
    world.until(|_| state.0.lock().unwrap().len() == 2).await;
    world.bus.publish(&Numbered(8)).await.unwrap();
    world.until(|_| state.0.lock().unwrap()[2..] == [8, 8]).await;
}

#[derive(Debug)]
struct OutOfStock;
impl std::fmt::Display for OutOfStock {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("out of stock")
    }
}
impl std::error::Error for OutOfStock {}

async fn reserve(_: &OrderPlaced, _: &mut Context) -> Result<(), OutOfStock> {
    Err(OutOfStock)
}

#[tokio::test]
async fn handlers_may_have_errors_of_their_own() {
    let world = World::start(options()).await;
    let taken_back = Arc::new(Mutex::new(0));
    let plain = world
        .bus
        .subscribe::<OrderPlaced>("plain")
        .retry(postrider_core::Retry::none())
        .handler(fine)
        .compensate_returning(async |_, _| -> Result<(), OutOfStock> { Ok(()) })
        .handler_returning(reserve)
        .start()
        .await
        .unwrap();
    let stateful = world
        .bus
        .subscribe::<OrderPlaced>("stateful")
        .retry(postrider_core::Retry::none())
        .state(taken_back.clone())
        .handler_returning(async |_: &Mutex<u32>, _, _| -> Result<(), OutOfStock> { Ok(()) })
        .compensate_returning(async |n: &Mutex<u32>, _, _| -> Result<(), OutOfStock> {
            *n.lock().unwrap() += 1;
            Ok(())
        })
        .handler_returning(async |_: &Mutex<u32>, order, ctx| reserve(order, ctx).await)
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, None)).await.unwrap();
    world
        .until(|_| plain.report().dead_lettered + stateful.report().dead_lettered == 2)
        .await;
    assert_eq!(*taken_back.lock().unwrap(), 1);
    let inbox = Mailbox::Inbox(GroupName::new("plain"));
    let letters = world.bus.dead_letters(inbox).unwrap().list(None, 9).await.unwrap();
    assert_eq!(letters.entries[0].errors[0].text, "out of stock");
}

#[tokio::test]
async fn a_time_out_of_zero_is_refused() {
    let world = World::start(options()).await;
    let zero = Duration::ZERO;
    let step = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .handler(fine)
        .timeout(zero)
        .start()
        .await;
    let error = step.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains("time-out of a step is 0s"), "{error}");
    let around = world.bus.subscribe::<OrderPlaced>("g").middleware(Timeout::after(zero));
    let error = around.handler(fine).start().await.unwrap_err();
    assert!(error.to_string().contains("`Timeout` middleware is 0s"), "{error}");
    let all = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware_for_all(Timeout::after(zero));
    let batch = all.batch_handler(Batch::default(), async |_, _| Vec::new());
    assert_eq!(batch.start().await.unwrap_err().kind(), ErrorKind::Config);
}

#[tokio::test]
async fn dead_letters_of_a_misspelt_group_are_an_error() {
    let world = World::start(options()).await;
    let of = |group| world.bus.dead_letters(Mailbox::Inbox(GroupName::new(group))).unwrap();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("billing")
        .retry(postrider_core::Retry::none())
        .handler(async |_, _| Err("no")?)
        .start()
        .await
        .unwrap();
    assert_eq!(of("billing").count().await.unwrap(), 0);
    assert!(of("billing").list(None, 9).await.unwrap().entries.is_empty());
    assert_eq!(of("billing").show(MessageId::new()).await.unwrap(), None);
    let outbox = world.bus.dead_letters(Mailbox::outbox()).unwrap();
    assert_eq!(outbox.count().await.unwrap(), 0);
    world.bus.publish(&placed(1, None)).await.unwrap();
    world.until(|_| running.report().dead_lettered == 1).await;
    let wrong = of("biling");
    let errors = [
        wrong.count().await.unwrap_err(),
        wrong.list(None, 9).await.unwrap_err(),
        wrong.show(MessageId::new()).await.unwrap_err(),
        wrong.redrive(Pace::AtOnce).await.unwrap_err(),
        wrong.discard().await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Invalid);
        let text = error.to_string();
        assert!(text.contains("no such mailbox") && text.contains("billing"), "{text}");
    }
    assert_eq!(of("billing").redrive(Pace::AtOnce).await.unwrap(), 1);
}

#[tokio::test]
async fn publishing_is_refused_once_the_bus_is_shut_down_and_not_before() {
    let world = World::start(options()).await;
    let late = Arc::new(Mutex::new(Vec::new()));
    world
        .bus
        .subscribe::<OrderPlaced>("g")
        .state(late.clone())
        .handler(async |late: &Mutex<Vec<Result<MessageId>>>, order, ctx| {
            if order.id == 1 {
                late.lock().unwrap().push(Ok(MessageId::new()));
                // In hand when the shutdown begins.
                for _ in 0..200 {
                    tokio::task::yield_now().await;
                }
                let published = ctx.publish(&placed(2, None)).await;
                late.lock().unwrap().push(published);
            }
            Ok(())
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, None)).await.unwrap();
    world.until(|_| late.lock().unwrap().len() == 1).await;
    world.bus.shutdown(secs(60)).await.unwrap();
    assert!(
        late.lock().unwrap()[1].is_ok(),
        "a handler that finishes still publishes"
    );
    let message = || Message::new(Topic::new("t"), "e.v1", "");
    let mut tx = world.bus.begin().await.unwrap();
    let errors = [
        world.bus.publish(message()).await.unwrap_err(),
        world.bus.publish_after(message(), secs(1)).await.unwrap_err(),
        world.bus.publish_all([message()]).await.unwrap_err(),
        world.bus.publish_in(&mut tx, message()).await.unwrap_err(),
        world.bus.publish_direct(message()).await.unwrap_err(),
        world.bus.as_dyn().publish(message()).await.unwrap_err(),
    ];
    for error in errors {
        assert_eq!(error.kind(), ErrorKind::Closed);
        assert!(error.to_string().contains("has been shut down"), "{error}");
    }
}

#[tokio::test]
async fn a_bus_that_publishes_and_was_never_started_is_told_of_once() {
    let forgotten = |logs: &Logs| logs.of(Level::WARN, "never started").len();
    for (in_transaction, relays, starts, told) in [
        (false, true, false, 1),
        (true, true, false, 1),
        (false, true, true, 0),
        (false, false, false, 0),
    ] {
        let logs = Logs::capture();
        let world = World::new(options()).await;
        let mut builder = Bus::builder()
            .log(world.log.clone())
            .transport(world.transport.clone())
            .clock(world.clock.clone());
        if !relays {
            builder = builder.without_relay();
        }
        let bus = builder.build().unwrap();
        for n in 0..3 {
            if in_transaction {
                let mut tx = bus.begin().await.unwrap();
                bus.publish_in(&mut tx, &placed(n, None)).await.unwrap();
                tx.commit().await.unwrap();
            } else {
                bus.publish(&placed(n, None)).await.unwrap();
            }
        }
        world.pass(secs(9)).await;
        assert_eq!(forgotten(&logs), 0);
        if starts {
            bus.start().await.unwrap();
        }
        for _ in 0..3 {
            world.pass(secs(9)).await;
            bus.publish(&placed(9, None)).await.unwrap();
        }
        assert_eq!(forgotten(&logs), told, "{:#?}", logs.lines());
        if !relays {
            bus.start().await.unwrap();
            world.pass(secs(9)).await;
            assert!(world.published("orders").is_empty(), "no relay runs here");
        }
    }
}

#[test]
fn a_runtime_without_timers_is_refused_at_the_start() {
    let runtime = tokio::runtime::Builder::new_current_thread().build().unwrap();
    runtime.block_on(async {
        let bus = Bus::builder()
            .log(MemoryLog::new())
            .transport(MemoryTransport::new())
            .build()
            .unwrap();
        for error in [
            bus.start().await.unwrap_err(),
            bus.subscribe::<OrderPlaced>("g")
                .handler(fine)
                .start()
                .await
                .unwrap_err(),
        ] {
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("enable_all"), "{error}");
        }
    });
}

#[tokio::test]
async fn a_group_can_be_declared_before_it_has_a_member() {
    let clock = postrider_core::clock::ManualClock::shared();
    let (log, clock2) = (MemoryLog::on_clock(clock.clone()), clock.clone());
    // This broker takes nothing that no group wants, as RabbitMQ.
    let transport = MemoryTransport::on_clock(clock.clone()).confirm_when_handled();
    let bus = Bus::builder()
        .log(log)
        .transport(transport)
        .clock(clock2)
        .build()
        .unwrap();
    bus.start().await.unwrap();
    bus.declare::<OrderPlaced>("billing").await.unwrap();
    bus.declare::<OrderPlaced>("billing").await.unwrap();
    let bad = bus.declare::<OrderPlaced>("two words").await.unwrap_err();
    assert_eq!(bad.kind(), ErrorKind::Invalid);
    bus.publish(&placed(1, None)).await.unwrap();
    for _ in 0..200 {
        tokio::task::yield_now().await;
    }
    assert!(bus.relay_report().paused_topics.is_empty(), "{:?}", bus.relay_report());
    let running = bus
        .subscribe::<OrderPlaced>("billing")
        .handler(fine)
        .start()
        .await
        .unwrap();
    while running.report().handled == 0 {
        tokio::task::yield_now().await;
    }
}
