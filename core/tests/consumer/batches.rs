//! Handlers of several events at once.

use crate::{
    Diary, OrderPlaced, dead, placed,
    world::{World, options, secs},
};
use postrider_core::{
    AnyEvent, Context, HandlerError, Message, Middleware, Retry, Topic, Transactional, Verdict,
    consumer::{Batch, Flow},
    relay::Backoff,
};
use std::{
    num::NonZeroUsize,
    sync::atomic::{AtomicBool, AtomicU32, Ordering},
    time::Duration,
};

fn of(max: usize) -> Batch {
    Batch::of(NonZeroUsize::new(max).unwrap()).waiting(Duration::from_millis(100))
}

#[tokio::test]
async fn events_come_together_and_only_those_that_failed_come_again() {
    let world = World::start(options()).await;
    let orders: Vec<_> = (0..25).map(|id| placed(id, &format!("c{id}"))).collect();
    world.bus.publish_all(&orders).await.unwrap();
    world.until(|w| w.published("orders").len() == 25).await;
    static DIARY: std::sync::LazyLock<Diary> = std::sync::LazyLock::new(Diary::default);
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .retry(
            Retry::default()
                .with_max_attempts(3)
                .with_in_place(2)
                .with_backoff(Backoff::Fixed(secs(5))),
        )
        .batch_handler(of(10), async |orders, ctx| {
            let ids: Vec<String> = orders.iter().map(|o| o.id.to_string()).collect();
            DIARY.note(ids.join(" "));
            assert_eq!(ctx.messages().count(), orders.len());
            let outcome = |o: &OrderPlaced| match o.id {
                3 => Err(HandlerError::from("no")),
                4 => Err(HandlerError::permanent("never")),
                _ => Ok(()),
            };
            orders.iter().map(outcome).collect()
        })
        .start()
        .await
        .unwrap();
    world.pass(secs(1)).await;
    world
        .until(|_| running.report().handled == 23 && running.report().dead_lettered == 1)
        .await;
    world.pass(secs(10)).await;
    world.until(|_| running.report().dead_lettered == 2).await;
    let lines = DIARY.lines();
    let sizes: Vec<usize> = lines.iter().map(|l| l.split(' ').count()).collect();
    assert!(
        sizes.contains(&10) && sizes.contains(&5) && sizes.iter().all(|s| *s <= 10),
        "{lines:?}"
    );
    assert_eq!(
        lines.iter().filter(|l| *l == "3").count(),
        2,
        "in place, and from the inbox: alone: {lines:?}"
    );
    let mut attempts: Vec<u32> = dead(&world, "g").await.iter().map(|d| d.attempts).collect();
    attempts.sort_unstable();
    assert_eq!(attempts, [1, 3]);
}

#[tokio::test]
async fn one_of_a_key_is_in_a_batch_and_a_handler_that_miscounts_or_panics_has_failed() {
    let world = World::start(options()).await;
    static DIARY: std::sync::LazyLock<Diary> = std::sync::LazyLock::new(Diary::default);
    for id in 0..12 {
        world
            .bus
            .publish(&placed(id, ["ada", "bob", "cy"][id as usize % 3]))
            .await
            .unwrap();
    }
    world.until(|w| w.published("orders").len() == 12).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .batch_handler(of(10), async |orders, _| {
            let mut names: Vec<&str> = orders.iter().map(|o| &*o.customer).collect();
            names.sort_unstable();
            names.dedup();
            assert_eq!(names.len(), orders.len(), "one of each key");
            for order in orders {
                DIARY.note(format!("{} {}", order.customer, order.id));
            }
            orders.iter().map(|_| Ok(())).collect()
        })
        .start()
        .await
        .unwrap();
    for _ in 0..10 {
        world.pass(secs(1)).await;
    }
    world.until(|_| running.report().handled == 12).await;
    for (n, who) in ["ada", "bob", "cy"].iter().enumerate() {
        let got: Vec<_> = DIARY.lines().into_iter().filter(|l| l.starts_with(who)).collect();
        let expected: Vec<_> = (n..12).step_by(3).map(|id| format!("{who} {id}")).collect();
        assert_eq!(got, expected);
    }
    let bad = world
        .bus
        .subscribe::<OrderPlaced>("bad")
        .retry(Retry::none())
        .batch_handler(of(4), async |orders, _| {
            assert!(orders[0].id != 0, "not the first");
            Vec::new()
        })
        .start()
        .await
        .unwrap();
    let undecodable = Message::new(Topic::new("orders"), "order.placed.v2", "?");
    world.bus.publish(undecodable).await.unwrap();
    for _ in 0..10 {
        world.pass(secs(1)).await;
    }
    world.until(|_| bad.report().dead_lettered == 13).await;
    let texts: Vec<String> = dead(&world, "bad")
        .await
        .into_iter()
        .map(|d| d.errors[0].text.clone())
        .collect();
    for says in ["panicked: not the first", "gave 0 outcomes for", "does not decode"] {
        assert!(texts.iter().any(|t| t.contains(says)), "{says}: {texts:?}");
    }
}

/// Events of a batch find a service away that others of it reach: these are handled, and those wait by themselves, without an
/// attempt.
#[tokio::test]
async fn a_service_that_is_away_for_some_of_a_batch_stops_no_others() {
    let world = World::start(options()).await;
    static DIARY: std::sync::LazyLock<Diary> = std::sync::LazyLock::new(Diary::default);
    static IS_AWAY: AtomicBool = AtomicBool::new(true);
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .max_in_flight(8)
        .batch_handler(of(4), async |orders, ctx| {
            let mut outcomes = Vec::new();
            for (place, order) in orders.iter().enumerate() {
                DIARY.note(format!("{} attempt {}", order.id, ctx.of(place).attempt()));
                outcomes.push(if order.id % 2 == 0 && IS_AWAY.load(Ordering::SeqCst) {
                    Err(HandlerError::unavailable("the bank is closed"))
                } else {
                    Ok(())
                });
            }
            outcomes
        })
        .start()
        .await
        .unwrap();
    for id in 0..40 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    for _ in 0..60 {
        world.pass(secs(1)).await;
    }
    let report = running.report();
    assert_eq!((report.handled, report.parked, report.dead_lettered), (20, 20, 0));
    IS_AWAY.store(false, Ordering::SeqCst);
    for _ in 0..10 {
        world.pass(secs(60)).await;
    }
    world.until(|_| running.report().handled == 40).await;
    assert!(
        DIARY.lines().iter().all(|line| line.ends_with("attempt 1")),
        "{:?}",
        DIARY.lines()
    );
    assert_eq!(running.flow(), Flow::Running);
    let odd = DIARY.lines().into_iter().filter(|line| line.starts_with("1 ")).count();
    assert_eq!(odd, 1, "what was handled is not handled again");
}

/// Notes each failure, and has an opinion of what cannot be decoded and of what is exhausted.
struct Witness(Diary);

impl Middleware for Witness {
    async fn on_failure(&self, _: &mut Context, error: &HandlerError, attempt: u32) {
        self.0.note(format!("{attempt}: {error}"));
    }
    async fn fallback(&self, _: &mut Context, event: Option<&AnyEvent>, _: &HandlerError) -> Option<Verdict> {
        let order: Option<&OrderPlaced> = event.and_then(AnyEvent::downcast_ref);
        self.0.note(format!("asked of {:?}", order.map(|order| order.id)));
        order.is_none_or(|order| order.id == 3).then_some(Verdict::Ack)
    }
}

#[tokio::test]
async fn middleware_for_all_is_told_of_each_event_that_failed_and_asked_for_a_verdict() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware_for_all(Witness(diary.clone()))
        .retry(Retry::default().with_max_attempts(2).with_in_place(2))
        .batch_handler(of(10), async |orders, _| {
            let outcome = |order: &OrderPlaced| match order.id {
                1 => Ok(()),
                2 => Err(HandlerError::permanent("never")),
                _ => Err(HandlerError::from("no")),
            };
            orders.iter().map(outcome).collect()
        })
        .start()
        .await
        .unwrap();
    let orders: Vec<_> = (1..4).map(|id| placed(id, &format!("c{id}"))).collect();
    world.bus.publish_all(&orders).await.unwrap();
    world
        .bus
        .publish(Message::new(Topic::new("orders"), "order.placed.v2", "?"))
        .await
        .unwrap();
    for _ in 0..5 {
        world.pass(secs(1)).await;
    }
    world.until(|_| running.report().handled == 3).await;
    let mut lines = diary.lines();
    lines.sort_unstable();
    assert_eq!(
        lines,
        [
            "1: never",
            "1: no",
            "2: no",
            "asked of None",
            "asked of Some(2)",
            "asked of Some(3)"
        ]
    );
    let letters = dead(&world, "g").await;
    assert_eq!(letters.len(), 1, "the others were acknowledged");
    let refused = world
        .bus
        .subscribe::<OrderPlaced>("refused")
        .middleware_for_all(Transactional::new())
        .batch_handler(of(10), async |orders, _| orders.iter().map(|_| Ok(())).collect())
        .start()
        .await
        .unwrap_err();
    assert!(refused.to_string().contains("Transactional"), "{refused}");
}

/// All events of a call find a service away: the subscription waits, and takes nothing that it cannot handle.
#[tokio::test]
async fn a_service_that_is_away_pauses_batches_too() {
    let world = World::start(options()).await;
    static CALLS: AtomicU32 = AtomicU32::new(0);
    static IS_AWAY: AtomicBool = AtomicBool::new(true);
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .max_in_flight(8)
        .batch_handler(of(4), async |orders, ctx| {
            CALLS.fetch_add(1, Ordering::SeqCst);
            let is_away = IS_AWAY.load(Ordering::SeqCst);
            (0..orders.len())
                .map(|place| {
                    assert_eq!(ctx.of(place).attempt(), 1);
                    if is_away {
                        Err(HandlerError::unavailable("the bank is closed"))
                    } else {
                        Ok(())
                    }
                })
                .collect()
        })
        .start()
        .await
        .unwrap();
    for id in 0..40 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    for _ in 0..60 {
        world.pass(secs(10)).await;
    }
    assert_eq!(running.flow(), Flow::Waiting("the bank is closed".to_owned()));
    let calls = CALLS.load(Ordering::SeqCst);
    assert!(calls < 100, "probes, further and further apart: {calls}");
    IS_AWAY.store(false, Ordering::SeqCst);
    for _ in 0..10 {
        world.pass(secs(60)).await;
    }
    world.until(|_| running.report().handled == 40).await;
}

/// What a batch has handled is acknowledged, and its keys go on, while a neighbour waits for its next try in place.
#[tokio::test]
async fn a_neighbour_that_waits_withholds_no_outcome() {
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .retry(Retry::default().with_in_place(2))
        .batch_handler(of(4), async |orders, ctx| {
            let mut outcomes = Vec::new();
            for (place, order) in orders.iter().enumerate() {
                outcomes.push(match (order.id, ctx.of(place).attempt()) {
                    (0, 1) => Err(HandlerError::retry_after(secs(1), "not yet")),
                    _ => Ok(()),
                });
            }
            outcomes
        })
        .start()
        .await
        .unwrap();
    for id in 0..4 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    world.until(|_| running.report().handled == 3).await;
    world.bus.publish(&placed(4, "c1")).await.unwrap();
    for _ in 0..3 {
        world.pass(Duration::from_millis(100)).await;
    }
    world.until(|_| running.report().handled == 4).await;
    world.pass(secs(2)).await;
    world.until(|_| running.report().handled == 5).await;
}
