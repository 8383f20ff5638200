//! What goes around a chain.

use crate::{
    Diary, OrderPaid, OrderPlaced, dead, placed, waiting,
    world::{World, options, secs},
};
use postrider_core::{
    AnyEvent, Bus, Context, EventLog, GroupName, HandlerError, HandlerResult, Message, Middleware, Next, Retry, Topic,
    Transactional, Transport, Verdict,
    consumer::{CatchPanic, CircuitBreaker, Flow, RetryInside, Throttle, Timeout, Tracing},
    memory::MemoryTransport,
    relay::Backoff,
};
use std::{num::NonZeroU32, sync::Arc};

/// Notes what it is told, under its name.
struct Notes(&'static str, Diary);

impl Middleware for Notes {
    async fn execute(&self, ctx: &mut Context, event: &AnyEvent, next: Next<'_>) -> HandlerResult {
        self.1.note(format!("{} in, {}", self.0, event.kind()));
        ctx.insert(self.0);
        let result = next.run(ctx, event).await;
        self.1.note(format!("{} out, {}", self.0, result.is_ok()));
        result
    }
    async fn on_failure(&self, _: &mut Context, error: &HandlerError, attempt: u32) {
        self.1.note(format!("{} told of {attempt}: {error}", self.0));
    }
    async fn fallback(&self, _: &mut Context, event: Option<&AnyEvent>, error: &HandlerError) -> Option<Verdict> {
        self.1.note(format!("{} asked, {}: {error}", self.0, event.is_some()));
        None
    }
}

/// The same, for one type.
struct OfPlaced(Diary);

impl Middleware<OrderPlaced> for OfPlaced {
    async fn execute(&self, ctx: &mut Context, order: &OrderPlaced, next: Next<'_, OrderPlaced>) -> HandlerResult {
        if order.id == 0 {
            self.0.note("skipped");
            return Ok(());
        }
        self.0
            .note(format!("typed {} in {:?}", order.id, ctx.get::<&'static str>()));
        next.run(ctx, order).await
    }
    async fn fallback(&self, _: &mut Context, order: Option<&OrderPlaced>, _: &HandlerError) -> Option<Verdict> {
        self.0.note(format!("typed asked, {:?}", order.map(|o| o.id)));
        None
    }
}

fn bus(world: &World, build: impl FnOnce(postrider_core::BusBuilder) -> postrider_core::BusBuilder) -> Bus {
    let builder = Bus::builder()
        .log(EventLog::from(world.log.clone()))
        .transport(Transport::from(world.transport.clone()))
        .relay(options())
        .clock(world.clock.clone())
        .seed(1);
    build(builder).build().unwrap()
}

#[tokio::test]
async fn the_first_is_the_outermost_and_each_is_told_and_asked() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let bus = bus(&world, |b| b.middleware(Notes("bus", diary.clone())));
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .middleware_for_all(Notes("all", diary.clone()))
        .middleware(OfPlaced(diary.clone()))
        .retry(Retry::default().with_max_attempts(2))
        .state(diary.clone())
        .handler(async |diary, order, _| {
            diary.note("handler");
            if order.id == 2 { Err("no")? } else { Ok(()) }
        })
        .and::<OrderPaid>()
        .handler(async |diary, _, _| diary.did("paid"))
        .start()
        .await
        .unwrap();
    let take = || std::mem::take(&mut *diary.0.lock().unwrap());
    world.bus.publish(&placed(1, "a")).await.unwrap();
    world.until(|_| running.report().handled == 1).await;
    let kind = "order.placed.v2";
    assert_eq!(
        take(),
        [
            format!("bus in, {kind}"),
            format!("all in, {kind}"),
            "typed 1 in Some(\"all\")".to_owned(),
            "handler".to_owned(),
            "all out, true".to_owned(),
            "bus out, true".to_owned()
        ]
    );
    world.bus.publish(&OrderPaid { order: 1 }).await.unwrap();
    world.until(|_| running.report().handled == 2).await;
    assert_eq!(
        take(),
        [
            "bus in, order.paid.v1",
            "all in, order.paid.v1",
            "paid",
            "all out, true",
            "bus out, true"
        ]
    );
    world.bus.publish(&placed(0, "a")).await.unwrap();
    world.until(|_| running.report().handled == 3).await;
    assert!(take().contains(&"skipped".to_owned()));
    world.bus.publish(&placed(2, "a")).await.unwrap();
    world.pass(secs(1)).await;
    world.until(|_| running.report().dead_lettered == 1).await;
    let lines = take();
    let told: Vec<&str> = lines
        .iter()
        .map(String::as_str)
        .filter(|l| l.contains("told") || l.contains("asked"))
        .collect();
    assert_eq!(
        told,
        [
            "all told of 1: no",
            "bus told of 1: no",
            "all told of 2: no",
            "bus told of 2: no",
            "typed asked, Some(2)",
            "all asked, true: no",
            "bus asked, true: no"
        ]
    );
    let undecodable = Message::new(Topic::new("orders"), kind, "not json");
    world.bus.publish(undecodable).await.unwrap();
    world.until(|_| running.report().dead_lettered == 2).await;
    let lines = take();
    assert_eq!(lines.len(), 3, "{lines:?}");
    assert_eq!(lines[0], "typed asked, None");
    assert!(lines[2].starts_with("bus asked, false:"), "{lines:?}");
}

/// Says what it was told to.
struct Says(Verdict);

impl Middleware<OrderPlaced> for Says {
    async fn fallback(&self, _: &mut Context, _: Option<&OrderPlaced>, _: &HandlerError) -> Option<Verdict> {
        Some(self.0)
    }
}

#[tokio::test]
async fn verdicts_are_carried_out() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let mut subscriptions = Vec::new();
    for (group, verdict) in [
        ("ack", Verdict::Ack),
        ("retry", Verdict::Retry { after: secs(100) }),
        ("requeue", Verdict::Requeue),
        ("dead", Verdict::DeadLetter),
    ] {
        let running = world
            .bus
            .subscribe::<OrderPlaced>(group)
            .middleware(Says(verdict))
            .retry(Retry::none())
            .state(diary.clone())
            .handler(async |diary, _, ctx| {
                diary.note(ctx.group().to_string());
                Err("no")?
            })
            .start()
            .await
            .unwrap();
        subscriptions.push(running);
    }
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| subscriptions[0].report().handled == 1).await;
    world.until(|_| subscriptions[1].report().parked == 1).await;
    world.until(|_| subscriptions[3].report().dead_lettered == 1).await;
    // A keyed one goes to the inbox, where it keeps its place.
    world.until(|_| subscriptions[2].report().parked == 1).await;
    assert_eq!(diary.count("retry"), 1);
    world.pass(secs(99)).await;
    assert_eq!(diary.count("retry"), 1);
    assert!(diary.count("requeue") >= 2);
    world.pass(secs(2)).await;
    world.until(|_| diary.count("retry") == 2).await;
    assert_eq!((diary.count("ack"), diary.count("dead")), (1, 1));
    assert_eq!(
        (dead(&world, "dead").await.len(), dead(&world, "ack").await.len()),
        (1, 0)
    );
    assert_eq!(waiting(&world, "retry").await.parked, 1);
}

#[tokio::test]
async fn what_is_shipped_does_what_it_says() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let retried = world
        .bus
        .subscribe::<OrderPlaced>("retry")
        .middleware(Tracing::new())
        .middleware(RetryInside::new(Retry::default().with_in_place(3)))
        .retry(Retry::none())
        .state(diary.clone())
        .handler(async |diary, _, ctx| {
            diary.note(format!("retry, attempt {}", ctx.attempt()));
            if diary.count("retry, attempt 1") < 3 {
                Err("not yet")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .unwrap();
    let panicking = world
        .bus
        .subscribe::<OrderPlaced>("panic")
        .middleware(CatchPanic::permanent())
        .middleware(Timeout::after(secs(60)))
        .handler(async |_, _| panic!("a defect"))
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| panicking.report().dead_lettered == 1).await;
    assert_eq!(
        dead(&world, "panic").await[0].attempts,
        1,
        "another attempt would meet it again"
    );
    world.pass(secs(5)).await;
    world.until(|_| retried.report().handled == 1).await;
    assert_eq!(diary.count("retry, attempt 1"), 3, "three runs of one attempt");
}

#[tokio::test]
async fn a_throttle_lets_so_many_begin() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Throttle::new(NonZeroU32::new(5).unwrap(), secs(10)))
        .state(diary.clone())
        .handler(Diary::reserve)
        .start()
        .await
        .unwrap();
    for id in 0..12 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    world.until(|_| diary.lines().len() == 5).await;
    world.settle().await;
    assert_eq!(diary.lines().len(), 5, "the bucket was full");
    world.pass(secs(4)).await;
    world.settle().await;
    assert_eq!(diary.lines().len(), 7, "one each two seconds");
    world.pass(secs(10)).await;
    world.until(|_| diary.lines().len() == 12).await;
}

#[tokio::test]
async fn a_circuit_breaker_pauses_the_subscription_and_costs_nothing() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let is_down = Arc::new(std::sync::atomic::AtomicBool::new(true));
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(CircuitBreaker::new(NonZeroU32::new(3).unwrap(), secs(20)))
        .retry(Retry::default().with_in_place(2))
        .state(Arc::new((diary.clone(), is_down.clone())))
        .handler(async |(diary, is_down), order, _| {
            diary.note(format!("call {}", order.id));
            if is_down.load(std::sync::atomic::Ordering::SeqCst) {
                Err("502")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .unwrap();
    for id in 0..50 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    world.until(|_| matches!(running.flow(), Flow::Waiting(_))).await;
    world.pass(secs(10)).await;
    let calls = diary.lines().len();
    assert!(
        (3..60).contains(&calls),
        "those under way when it opened, no more: {calls}"
    );
    assert_eq!(running.report().dead_lettered, 0);
    is_down.store(false, std::sync::atomic::Ordering::SeqCst);
    for _ in 0..8 {
        world.pass(secs(10)).await;
    }
    world.until(|_| running.report().handled == 50).await;
    assert_eq!(running.flow(), Flow::Running);
}

#[tokio::test]
async fn a_middleware_that_panics_ends_no_subscription() {
    struct Panics;
    impl Middleware for Panics {
        async fn on_failure(&self, _: &mut Context, _: &HandlerError, _: u32) {
            panic!("when told");
        }
        async fn fallback(&self, _: &mut Context, _: Option<&AnyEvent>, _: &HandlerError) -> Option<Verdict> {
            panic!("when asked");
        }
    }
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware_for_all(Panics)
        .retry(
            Retry::default()
                .with_max_attempts(2)
                .with_in_place(1)
                .with_backoff(Backoff::Fixed(secs(1))),
        )
        .handler(async |order, _| if order.id == 1 { Err("no")? } else { Ok(()) })
        .start()
        .await
        .unwrap();
    for id in 1..4 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    for _ in 0..3 {
        world.pass(secs(1)).await;
    }
    world
        .until(|_| running.report().handled == 2 && running.report().dead_lettered == 1)
        .await;
}

/// A compensation that is cut off with everything around it runs again, to its end.
#[tokio::test]
async fn a_compensation_that_is_cut_off_runs_again() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Timeout::after(secs(2)))
        .middleware(Transactional::new())
        .retry(Retry::none())
        .state(diary.clone())
        .handler(Diary::reserve)
        .compensate(async |diary, _, _| {
            diary.note("release begins");
            if diary.count("release begins") == 1 {
                std::future::pending::<()>().await;
            }
            diary.did("release ends")
        })
        .handler(async |_, _, _| Err("no")?)
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    for _ in 0..3 {
        world.pass(secs(2)).await;
    }
    world.until(|_| running.report().dead_lettered == 1).await;
    assert_eq!(
        diary.lines(),
        ["reserve 1", "release begins", "release begins", "release ends"]
    );
}

/// Would have everything tried again.
struct Again;

impl Middleware for Again {
    async fn fallback(&self, _: &mut Context, _: Option<&AnyEvent>, _: &HandlerError) -> Option<Verdict> {
        Some(Verdict::Retry { after: secs(1) })
    }
}

/// It decodes no better the next time, and without an inbox there is nowhere to wait: it is kept.
#[tokio::test]
async fn what_cannot_be_decoded_is_kept_where_nothing_can_wait() {
    let transport = MemoryTransport::new();
    let bus = Bus::builder().transport(transport.clone()).build().unwrap();
    bus.start().await.unwrap();
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .middleware_for_all(Again)
        .handler(async |_, _| Ok(()))
        .start()
        .await
        .unwrap();
    bus.publish_direct(Message::new(Topic::new("orders"), "order.placed.v2", "?"))
        .await
        .unwrap();
    while running.report().delivered == 0 {
        tokio::task::yield_now().await;
    }
    bus.shutdown(secs(5)).await.unwrap();
    assert_eq!(running.report().dead_lettered, 1);
    assert_eq!(transport.dead_letters(&GroupName::new("g")).len(), 1);
}
