//! Chains of steps: order, compensation, attempts.

use crate::{
    Diary, OrderPaid, OrderPlaced, dead, placed, waiting,
    world::{World, options, secs},
};
use postrider_core::{
    Bus, Context, ErrorKind, Event, GroupName, Handler, HandlerError, HandlerResult, Message, Retry, Subscription,
    Taken, Topic, clock::ManualClock, memory::MemoryTransport, relay::Backoff,
};
use std::sync::{
    Arc, Mutex,
    atomic::{AtomicU32, Ordering},
};

#[tokio::test]
async fn handlers_run_in_order_and_compensations_in_reverse() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("shop")
        .state(Arc::new(diary.clone()))
        .retry(Retry::none())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |diary, order, _| {
            diary.note(format!("charge {}", order.id));
            Ok(())
        })
        .compensate(async |diary, order, _| {
            diary.note(format!("refund {}", order.id));
            Err(HandlerError::from(format!("no refund for {}", order.id)))
        })
        .handler(async |diary, order, _| {
            if order.id == 2 {
                panic!("the dock is closed");
            }
            diary.note(format!("ship {}", order.id));
            Ok(())
        })
        .start()
        .await
        .unwrap();
    world
        .bus
        .publish_all([&placed(1, "ada"), &placed(2, "ada"), &placed(3, "ada")])
        .await
        .unwrap();
    world.until(|_| running.report().handled == 2).await;
    assert_eq!(
        diary.lines(),
        [
            "reserve 1",
            "charge 1",
            "ship 1",
            "reserve 2",
            "charge 2",
            "refund 2",
            "release 2",
            "reserve 3",
            "charge 3",
            "ship 3"
        ]
    );
    let dead = dead(&world, "shop").await;
    assert_eq!((dead.len(), dead[0].attempts), (1, 1));
    assert!(
        dead[0].errors[0].text.contains("panicked: the dock is closed"),
        "{:?}",
        dead[0].errors
    );
    assert_eq!(running.report().dead_lettered, 1);
    world.bus.shutdown(secs(5)).await.unwrap();
}

struct Flaky {
    failures: AtomicU32,
    diary: Diary,
}

impl Handler<OrderPlaced> for Flaky {
    async fn execute(&self, order: &OrderPlaced, ctx: &mut Context) -> HandlerResult {
        ctx.publish(&OrderPaid { order: order.id }).await?;
        self.diary.note(format!("attempt {}", ctx.attempt()));
        match self.failures.fetch_sub(1, Ordering::SeqCst) {
            0 => {
                self.failures.store(0, Ordering::SeqCst);
                Ok(())
            }
            3 => Err(HandlerError::unavailable("the bank is closed")),
            2 => Err(HandlerError::retry_after(secs(30), "too many requests")),
            _ => Err("not yet")?,
        }
    }
    async fn compensate(&self, _: &OrderPlaced, _: &mut Context) -> HandlerResult {
        panic!("a failing step does not compensate itself");
    }
}

#[tokio::test]
async fn a_chain_is_tried_again_and_publishes_under_the_same_id() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let flaky = Flaky {
        failures: AtomicU32::new(3),
        diary: diary.clone(),
    };
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .step(flaky)
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| diary.lines().len() == 1).await;
    world.pass(secs(1)).await;
    world.until(|_| diary.lines().len() == 2).await;
    world.pass(secs(20)).await;
    assert_eq!(diary.lines().len(), 2, "it was told to wait 30 s");
    assert_eq!(waiting(&world, "g").await.parked, 1, "and does so in the inbox");
    world.pass(secs(11)).await;
    world.until(|_| diary.lines().len() == 3).await;
    world.pass(secs(10)).await;
    world.until(|_| running.report().handled == 1).await;
    let lines = ["attempt 1", "attempt 1", "attempt 2", "attempt 3"];
    assert_eq!(diary.lines(), lines, "an outage is no attempt");
    world.until(|w| w.published("orders").len() == 5).await;
    let paid: Vec<Message> = world.transport.published(&Topic::new("orders"));
    let ids: std::collections::HashSet<_> = paid
        .iter()
        .filter(|m| m.kind() == "order.paid.v1")
        .map(Message::id)
        .collect();
    assert_eq!(ids.len(), 1, "each attempt published the same event");
}

#[tokio::test]
async fn permanent_errors_and_exhausted_attempts_are_dead_letters_and_hold_nobody_back() {
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .retry(Retry::default().with_max_attempts(3))
        .handler(async |order, _| match order.id {
            1 => Err(HandlerError::permanent("never")),
            2 => Err("not this time")?,
            _ => Ok(()),
        })
        .start()
        .await
        .unwrap();
    world
        .bus
        .publish_all([
            &placed(1, "ada"),
            &placed(2, "ada"),
            &placed(3, "ada"),
            &placed(4, "bob"),
        ])
        .await
        .unwrap();
    for _ in 0..10 {
        world.pass(secs(1)).await;
    }
    world.until(|_| running.report().handled == 2).await;
    let dead = dead(&world, "g").await;
    let summary: Vec<_> = dead.iter().map(|d| (d.attempts, d.errors.len())).collect();
    assert_eq!(summary, [(1, 1), (3, 3)]);
}

#[tokio::test]
async fn what_does_not_decode_is_kept_byte_for_byte_and_never_tried_again() {
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .handler(async |_, _| Ok(()))
        .start()
        .await
        .unwrap();
    let orders = Topic::new("orders");
    let bad = Message::new(orders.clone(), "order.placed.v2", vec![0xff, b'{', 0]).with_header("from", "elsewhere");
    let other_version = Message::new(orders.clone(), "order.placed.v7", "{}");
    let unknown = Message::new(orders, "invoice.sent.v1", "{}");
    for message in [bad.clone(), other_version, unknown] {
        world.bus.publish(message).await.unwrap();
    }
    world
        .until(|_| running.report().ignored == 1 && running.report().dead_lettered == 1 && running.report().parked == 1)
        .await;
    let dead = dead(&world, "g").await;
    assert_eq!(
        (dead[0].message.payload(), dead[0].message.header("from")),
        (bad.payload(), Some("elsewhere"))
    );
    assert_eq!(dead[0].attempts, 0);
    assert!(
        dead[0].errors[0].text.contains("does not decode"),
        "{:?}",
        dead[0].errors
    );
    let parked = waiting(&world, "g").await;
    assert_eq!(
        (dead.len(), parked.parked),
        (1, 1),
        "another version waits for whoever handles it"
    );
    assert_eq!(running.report().delivered, 3);
}

#[tokio::test]
async fn several_types_in_one_group_and_several_groups() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    for group in ["a", "b"] {
        world
            .bus
            .subscribe::<OrderPlaced>(group)
            .state(diary.clone())
            .handler(Diary::reserve)
            .and::<OrderPaid>()
            .handler(Diary::paid)
            .start()
            .await
            .unwrap();
    }
    world.bus.publish(&placed(1, "x")).await.unwrap();
    world.bus.publish(&OrderPaid { order: 1 }).await.unwrap();
    world.until(|_| diary.lines().len() == 4).await;
    let mut lines = diary.lines();
    lines.sort();
    assert_eq!(lines, ["paid 1 in a", "paid 1 in b", "reserve 1", "reserve 1"]);
}

#[tokio::test]
async fn keys_are_handled_in_order_and_side_by_side() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let (most, now) = (Arc::new(AtomicU32::new(0)), Arc::new(AtomicU32::new(0)));
    let state = Arc::new((diary.clone(), most.clone(), now));
    world
        .bus
        .subscribe::<OrderPlaced>("g")
        .state(state)
        .max_in_flight(50)
        .handler(async |(diary, most, now), order, _| {
            most.fetch_max(now.fetch_add(1, Ordering::SeqCst) + 1, Ordering::SeqCst);
            for _ in 0..(order.id * 7) % 5 {
                tokio::task::yield_now().await;
            }
            diary.note(format!("{} {}", order.customer, order.id));
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        })
        .start()
        .await
        .unwrap();
    let orders: Vec<OrderPlaced> = (0..200)
        .map(|id| placed(id, ["ada", "bob", "cy", "dee"][id as usize % 4]))
        .collect();
    world.bus.publish_all(&orders).await.unwrap();
    world.until(|_| diary.lines().len() == 200).await;
    for (at, customer) in ["ada", "bob", "cy", "dee"].iter().enumerate() {
        let got: Vec<String> = diary
            .lines()
            .into_iter()
            .filter(|line| line.starts_with(customer))
            .collect();
        let expected: Vec<String> = (at..200).step_by(4).map(|id| format!("{customer} {id}")).collect();
        assert_eq!(got, expected);
    }
    assert!(
        (2..=4).contains(&most.load(Ordering::SeqCst)),
        "one of each key at a time, keys side by side"
    );
}

#[tokio::test]
async fn a_stop_finishes_what_is_in_hand_and_leaves_the_rest() {
    let world = World::start(options()).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let handled = Arc::new(AtomicU32::new(0));
    let state = Arc::new((gate.clone(), handled.clone()));
    let subscribe = async || {
        world
            .bus
            .subscribe::<OrderPlaced>("g")
            .state(state.clone())
            .max_in_flight(10)
            .handler(async |(gate, handled), _, _| {
                gate.acquire().await?.forget();
                handled.fetch_add(1, Ordering::SeqCst);
                Ok(())
            })
            .start()
            .await
            .unwrap()
    };
    let orders: Vec<OrderPlaced> = (0..30)
        .map(|id| placed(id, if id % 2 == 0 { "ada" } else { "bob" }))
        .collect();
    world.bus.publish_all(&orders).await.unwrap();
    let running = subscribe().await;
    world.until(|_| running.report().delivered == 10).await;
    let stopping = running.clone();
    let stop = tokio::spawn(async move { stopping.stop(secs(60)).await });
    world.settle().await;
    gate.add_permits(30);
    stop.await.unwrap().unwrap();
    assert_eq!(handled.load(Ordering::SeqCst), 2, "one of each key was being handled");
    gate.acquire_many(28).await.unwrap().forget();
    // Past the deadline handlers are cut off, and their messages come again.
    let running = subscribe().await;
    world.until(|_| running.report().delivered >= 10).await;
    let (stopping, clock) = (running.clone(), world.clock.clone());
    let stop = tokio::spawn(async move { stopping.stop(secs(1)).await });
    world.settle().await;
    clock.advance(secs(2));
    assert_eq!(stop.await.unwrap().unwrap_err().kind(), ErrorKind::Unavailable);
    gate.add_permits(100);
    let last = subscribe().await;
    world.until(|_| last.report().handled == 28).await;
    assert_eq!(
        handled.load(Ordering::SeqCst),
        30,
        "none was handled twice, none is missing"
    );
}

#[tokio::test]
async fn mistakes_in_a_subscription_are_named() {
    let world = World::new(options()).await;
    let noop = async |_: &OrderPlaced, _: &mut Context| -> HandlerResult { Ok(()) };
    let bad_group = world
        .bus
        .subscribe::<OrderPlaced>("two words")
        .handler(noop)
        .start()
        .await
        .unwrap_err();
    assert!(bad_group.to_string().contains("not a group name"), "{bad_group}");
    let zero = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .max_in_flight(0)
        .handler(noop)
        .start()
        .await
        .unwrap_err();
    assert!(zero.to_string().contains("max_in_flight is 0"), "{zero}");
    let retry = Retry::default().with_max_attempts(0);
    let none = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .retry(retry)
        .handler(noop)
        .start()
        .await
        .unwrap_err();
    assert!(none.to_string().contains("retry.max_attempts is 0"), "{none}");
    let twice = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .handler(noop)
        .and::<OrderPlaced>()
        .handler(noop)
        .start()
        .await;
    assert!(twice.unwrap_err().to_string().contains("two chains for one event type"));
    world.bus.shutdown(secs(1)).await.unwrap();
    let closed = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .handler(noop)
        .start()
        .await
        .unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn without_a_log_dead_letters_are_the_transports_and_publishing_says_what_is_missing() {
    let transport = MemoryTransport::new();
    let bus = Bus::builder().transport(transport.clone()).build().unwrap();
    bus.start().await.unwrap();
    let error = bus.publish(&placed(1, "x")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("no event log"), "{error}");
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .handler(async |_, _| Err(HandlerError::permanent("no")))
        .start()
        .await
        .unwrap();
    bus.publish_direct(&placed(1, "x")).await.unwrap();
    while running.report().dead_lettered == 0 {
        tokio::task::yield_now().await;
    }
    bus.shutdown(secs(5)).await.unwrap();
    assert_eq!(transport.dead_letters(&GroupName::new("g")).len(), 1);
}

/// Without a log: the attempts that a message gets of a handler that fails with `error`, up to five of which two are in
/// place, until it is a dead letter. It has come back untried so often before.
async fn attempts_without_a_log(error: fn() -> HandlerError, untried: usize) -> Vec<String> {
    let clock = ManualClock::shared();
    let transport = MemoryTransport::on_clock(clock.clone());
    let bus = Bus::builder()
        .transport(transport.clone())
        .clock(clock.clone())
        .build()
        .unwrap();
    bus.start().await.unwrap();
    bus.publish_direct(&placed(1, "x")).await.unwrap();
    let group = GroupName::new("g");
    let subscription = Subscription::new(group.clone(), vec![OrderPlaced::TOPIC]).unordered();
    let feed = bus
        .transport()
        .subscriber(&subscription)
        .unwrap()
        .subscribe(&subscription)
        .await;
    let (mut intake, settling) = feed.unwrap().split();
    for _ in 0..untried {
        let Taken::Batch(batch) = intake.next(1).await.unwrap() else {
            panic!()
        };
        drop(batch);
        assert!(settling.settle(Vec::new()).await.is_empty());
    }
    settling.close(secs(1)).await.unwrap();

    let diary = Diary::default();
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .unordered()
        .retry(
            Retry::default()
                .with_max_attempts(5)
                .with_in_place(2)
                .with_backoff(Backoff::Fixed(secs(10))),
        )
        .state((diary.clone(), error))
        .handler(async |(diary, error), _, ctx| {
            diary.note(ctx.attempt().to_string());
            Err(error())
        })
        .start()
        .await
        .unwrap();
    let mut turns = 0;
    while running.report().dead_lettered == 0 {
        clock.advance(secs(1));
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        turns += 1;
        assert!(turns < 1000, "{:?}", diary.lines());
    }
    bus.shutdown(secs(5)).await.unwrap();
    assert_eq!(transport.dead_letters(&group).len(), 1);
    diary.lines()
}

#[tokio::test]
async fn without_a_log_attempts_go_with_the_message_and_deliveries_are_none() {
    let every = ["1", "2", "3", "4", "5"];
    let fails = || HandlerError::transient("not yet");
    assert_eq!(attempts_without_a_log(fails, 0).await, every);
    assert_eq!(attempts_without_a_log(fails, 7).await, every, "nobody had tried it");
    let later = || HandlerError::retry_after(secs(30), "not yet");
    assert_eq!(
        attempts_without_a_log(later, 0).await,
        every,
        "each of them with the broker"
    );
}

#[tokio::test]
async fn a_broker_that_confirms_what_was_handled_leaves_the_rest_in_the_log() {
    let world = World::new(options()).await;
    let in_process = || MemoryTransport::on_clock(world.clock.clone()).confirm_when_handled();
    let build = |transport| {
        Bus::builder()
            .log(world.log.clone())
            .transport(transport)
            .clock(world.clock.clone())
            .relay(options())
            .build()
            .unwrap()
    };
    let handled: Arc<Mutex<Vec<u32>>> = Arc::default();
    let subscribe = async |bus: &Bus, from: u32| {
        bus.subscribe::<OrderPlaced>("g")
            .state(Arc::new((handled.clone(), from)))
            .handler(async |(handled, from), order, _| {
                if order.id >= *from {
                    std::future::pending::<()>().await;
                }
                handled.lock().unwrap().push(order.id);
                Ok(())
            })
            .start()
            .await
            .unwrap()
    };
    let bus = build(in_process());
    bus.publish_all(
        (0..10)
            .map(|id| placed(id, &format!("c{id}")))
            .collect::<Vec<_>>()
            .iter(),
    )
    .await
    .unwrap();
    bus.start().await.unwrap();
    world.until(|_| bus.relay_report().paused_topics.len() == 1).await;
    subscribe(&bus, 5).await;
    for _ in 0..5 {
        world.pass(secs(1)).await;
    }
    world.until(|_| handled.lock().unwrap().len() == 5).await;
    let (stopping, clock) = (bus.clone(), world.clock.clone());
    let stop = tokio::spawn(async move { stopping.shutdown(secs(1)).await });
    world.settle().await;
    clock.advance(secs(2));
    assert!(stop.await.unwrap().is_err(), "five handlers never end");
    assert!(
        world.stats().await.pending >= 5,
        "what was not handled is still in the log"
    );
    let next = build(in_process());
    subscribe(&next, 100).await;
    next.start().await.unwrap();
    for _ in 0..5 {
        world.pass(secs(1)).await;
    }
    world.until_async(async |w| w.stats().await.pending == 0).await;
    let mut all = handled.lock().unwrap().clone();
    all.sort_unstable();
    all.dedup();
    assert_eq!(all, (0..10).collect::<Vec<_>>());
}
