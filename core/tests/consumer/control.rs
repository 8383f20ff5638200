//! Pausing, resuming, more or less at once, options from a configuration.

use crate::{
    Diary, OrderPlaced, pending, placed,
    world::{World, options, secs},
};
use postrider_core::{
    Bus, ErrorKind, EventLog, HandlerError, Retry, SubscriptionOptions, Transport,
    consumer::{Flow, OnExhausted, Unknown},
    relay::Backoff,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

#[tokio::test]
async fn a_pause_holds_deliveries_and_retries_until_it_is_over() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .retry(Retry::default().with_in_place(1).with_backoff(Backoff::Fixed(secs(5))))
        .state(diary.clone())
        .handler(async |diary, order, ctx| {
            diary.note(format!("{} attempt {}", order.id, ctx.attempt()));
            if ctx.attempt() == 1 && order.id == 1 {
                Err("once more")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().parked == 1).await;
    running.pause();
    assert_eq!(running.flow(), Flow::Paused);
    world.bus.publish(&placed(2, "bob")).await.unwrap();
    for _ in 0..4 {
        world.pass(secs(5)).await;
    }
    assert_eq!(diary.lines(), ["1 attempt 1"], "neither what comes nor what is due");
    running.resume();
    world.pass(secs(1)).await;
    world.until(|_| running.report().handled == 2).await;
    assert_eq!(running.flow(), Flow::Running);
    running.stop(secs(1)).await.unwrap();
    assert_eq!(running.flow(), Flow::Stopped);
}

#[tokio::test]
async fn how_many_at_once_can_be_changed() {
    let world = World::start(options()).await;
    let gate = Arc::new(tokio::sync::Semaphore::new(0));
    let now = Arc::new(AtomicU32::new(0));
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .max_in_flight(3)
        .state(Arc::new((gate.clone(), now.clone())))
        .handler(async |(gate, now), _, _| {
            now.fetch_add(1, Ordering::SeqCst);
            gate.acquire().await?.forget();
            now.fetch_sub(1, Ordering::SeqCst);
            Ok(())
        })
        .start()
        .await
        .unwrap();
    for id in 0..40 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    world.until(|_| now.load(Ordering::SeqCst) == 3).await;
    running.set_max_in_flight(10);
    world.until(|_| now.load(Ordering::SeqCst) == 10).await;
    running.set_max_in_flight(2);
    gate.add_permits(9);
    world.until(|_| running.report().handled == 9).await;
    world.settle().await;
    assert!(now.load(Ordering::SeqCst) <= 2, "{now:?}");
    gate.add_permits(100);
    world.until(|_| running.report().handled == 40).await;
}

#[test]
fn options_are_read_from_a_configuration() {
    let read = |text: &str| serde_json::from_str::<SubscriptionOptions>(text);
    let options = read(
        r#"{"max_in_flight": 10, "ordered": false, "unknown": "dead_letter", "receipts": "30days",
            "retry": {"max_attempts": 4, "first_wait": "10ms", "backoff": {"fixed": "3s"}}}"#,
    )
    .unwrap();
    let retry = Retry::default()
        .with_max_attempts(4)
        .with_waits(Duration::from_millis(10), secs(2))
        .with_backoff(Backoff::Fixed(secs(3)));
    let expected = SubscriptionOptions::default()
        .with_max_in_flight(10)
        .with_ordered(false)
        .with_unknown(Unknown::DeadLetter)
        .with_receipts(secs(30 * 24 * 3600))
        .with_retry(retry);
    assert_eq!(options, expected);
    let error = read(r#"{"max_inflight": 10}"#).unwrap_err().to_string();
    assert!(
        error.contains("max_inflight") && error.contains("max_in_flight"),
        "{error}"
    );
}

#[tokio::test]
async fn the_configuration_counts_over_the_code() {
    let world = World::start(options()).await;
    let bus = Bus::builder()
        .log(EventLog::from(world.log.clone()))
        .transport(Transport::from(world.transport.clone()))
        .relay(options())
        .clock(world.clock.clone())
        .subscription("g", SubscriptionOptions::default().with_retry(Retry::none()))
        .subscription("h", SubscriptionOptions::default().with_max_in_flight(0))
        .build()
        .unwrap();
    let subscribe = |group: &'static str| {
        bus.subscribe::<OrderPlaced>(group)
            .retry(Retry::default().with_max_attempts(7))
            .handler(async |_, _| Err("no")?)
    };
    let running = subscribe("g").start().await.unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().dead_lettered == 1).await;
    let error = subscribe("h").start().await.unwrap_err().to_string();
    assert!(
        error.contains("max_in_flight is 0") && error.contains("group: h"),
        "{error}"
    );
}

#[tokio::test]
async fn what_the_transport_cannot_honour_is_refused_by_name() {
    let world = World::start(options()).await;
    let subscribe = |options: &SubscriptionOptions| {
        let subscription = world.bus.subscribe::<OrderPlaced>("g").options(options);
        subscription.handler(async |_, _| Ok(())).start()
    };
    for (name, options) in [
        (
            "queue_expiry",
            SubscriptionOptions::default().with_queue_expiry(secs(60)),
        ),
        (
            "message_expiry",
            SubscriptionOptions::default().with_message_expiry(secs(60)),
        ),
        (
            "dead_letter_to",
            SubscriptionOptions::default().with_dead_letter_to("x".to_owned()),
        ),
        ("bind", SubscriptionOptions::default().with_bind("x".to_owned())),
        ("declare", SubscriptionOptions::default().with_declare(false)),
    ] {
        let error = subscribe(&options).await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported);
        let text = error.to_string();
        assert!(
            text.contains(&format!("option: {name}")) && text.contains("transport: memory"),
            "{text}"
        );
    }
    let error = subscribe(&SubscriptionOptions::default().with_queue_expiry(Duration::ZERO))
        .await
        .unwrap_err();
    assert!(error.to_string().contains("queue_expiry is 0ns"), "{error}");
}

#[tokio::test]
async fn an_exhausted_message_may_be_tried_for_ever() {
    let world = World::start(options()).await;
    let requeue = SubscriptionOptions::default()
        .with_on_exhausted(OnExhausted::Requeue)
        .with_retry(Retry::none().with_backoff(Backoff::Fixed(secs(5))));
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .options(&requeue)
        .state(diary.clone())
        .handler(async |diary, _, _| {
            diary.note("tried");
            if diary.count("tried") < 20 {
                Err("not yet")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    for _ in 0..30 {
        world.pass(secs(5)).await;
    }
    world.until(|_| running.report().handled == 1).await;
    assert_eq!((diary.count("tried"), running.report().dead_lettered), (20, 0));
}

#[tokio::test]
async fn events_come_from_other_topics_too_by_name_or_by_pattern() {
    use postrider_core::{Topic, relay::TopicPattern};
    let world = World::start(options()).await;
    let diary = Diary::default();
    world
        .bus
        .subscribe::<OrderPlaced>("g")
        .topic(Topic::new("orders"))
        .topic(Topic::new("legacy"))
        .topics_like(TopicPattern::parse("region.*").unwrap())
        .state(diary.clone())
        .handler(async |diary, order, ctx| diary.did(format!("{} from {}", order.id, ctx.message().topic())))
        .start()
        .await
        .unwrap();
    for (id, topic) in [
        (1, "orders"),
        (2, "legacy"),
        (3, "region.north"),
        (4, "regions"),
        (5, "region.south"),
    ] {
        world
            .bus
            .publish(&placed(id, "ada"))
            .topic(Topic::new(topic))
            .await
            .unwrap();
    }
    world.until(|_| diary.lines().len() == 4).await;
    world.settle().await;
    let mut lines = diary.lines();
    lines.sort();
    assert_eq!(
        lines,
        [
            "1 from orders",
            "2 from legacy",
            "3 from region.north",
            "5 from region.south"
        ]
    );
}

/// A message whose handler always finds its service away does not stop the others: one of them probes next, and it waits by
/// itself, without an attempt.
#[tokio::test]
async fn one_message_that_misses_a_service_stops_no_other() {
    for max_in_flight in [1, 256] {
        let world = World::start(options()).await;
        let diary = Diary::default();
        let running = world
            .bus
            .subscribe::<OrderPlaced>("g")
            .max_in_flight(max_in_flight)
            .state(diary.clone())
            .handler(async |diary: &Diary, order, ctx| {
                if order.id == 0 {
                    return Err(HandlerError::unavailable("this tenant's bank is closed"));
                }
                diary.note(format!("{} {}", order.id, ctx.attempt()));
                Ok(())
            })
            .start()
            .await
            .unwrap();
        for id in 0..300 {
            let customer = if id == 299 { "c0".to_owned() } else { format!("c{id}") };
            world.bus.publish(&placed(id, &customer)).await.unwrap();
        }
        for _ in 0..90 {
            world.pass(secs(1)).await;
        }
        let report = running.report();
        assert_eq!(
            (report.handled, report.dead_lettered),
            (298, 0),
            "{max_in_flight}: {report:?}"
        );
        assert!(
            !diary.lines().iter().any(|line| line.starts_with("299 ")),
            "what is behind it in its key waits"
        );
        let waiting = pending(&world, "g").await;
        assert_eq!(waiting.len(), 2);
        assert!(waiting.iter().all(|stored| stored.attempts == 0), "{waiting:?}");
    }
}

/// A message whose handling never ends before its process does is a dead letter after so many starts.
#[tokio::test]
async fn a_message_that_ends_its_process_is_a_dead_letter_at_last() {
    let world = World::start(options()).await;
    let begun = Arc::new(AtomicU32::new(0));
    let mut lives = 0;
    loop {
        lives += 1;
        assert!(lives < 10, "it comes again for ever");
        let before = begun.load(Ordering::SeqCst);
        let running = world
            .bus
            .subscribe::<OrderPlaced>("g")
            .retry(Retry::default().with_max_attempts(3))
            .state(begun.clone())
            .handler(async |begun: &AtomicU32, order, _| {
                if order.id == 0 {
                    begun.fetch_add(1, Ordering::SeqCst);
                    std::future::pending::<()>().await;
                }
                Ok(())
            })
            .start()
            .await
            .unwrap();
        if lives == 1 {
            world.bus.publish(&placed(0, "ada")).await.unwrap();
        }
        world.bus.publish(&placed(lives, "bob")).await.unwrap();
        world.until(|_| running.report().handled == 1).await;
        for _ in 0..20 {
            world.settle().await;
        }
        if running.report().dead_lettered == 1 {
            break;
        }
        assert_eq!(begun.load(Ordering::SeqCst), before + 1);
        let _ = running.stop(Duration::ZERO).await;
    }
    // The first delivery is not counted, since nothing speaks against it.
    assert_eq!((lives, begun.load(Ordering::SeqCst)), (5, 4));
    let stored = crate::dead(&world, "g").await.remove(0);
    assert!(stored.errors[0].text.contains("3 times"), "{:?}", stored.errors);
}
