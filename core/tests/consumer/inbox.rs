//! What waits: retries, those behind them, outages, restarts.

use crate::{
    Diary, OrderPlaced, dead, placed, waiting,
    world::{World, options, secs},
};
use async_trait::async_trait;
use postrider_core::{
    Bus, Error, ErrorKind, EventLog, GroupName, HandlerError, Mailbox, Message, MessageId, Result, Retry, Running,
    Topic, Transport,
    consumer::{Flow, SubscriptionOptions, Unknown},
    log::{EventLogStore, Filter, NewRecord, Purge, Session, SessionOptions},
    relay::Backoff,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

/// Handles by the diary: fails while the switch says so.
async fn switched(bus: &Bus, diary: &Diary, fails: &Arc<AtomicBool>, retry: Retry) -> Running {
    let state = Arc::new((diary.clone(), fails.clone()));
    bus.subscribe::<OrderPlaced>("g")
        .retry(retry)
        .state(state)
        .handler(async |(diary, fails), order, ctx| {
            diary.note(format!("{} {} attempt {}", order.customer, order.id, ctx.attempt()));
            if fails.load(Ordering::SeqCst) && order.customer == "ada" {
                return Err(HandlerError::from(format!("no {}", ctx.attempt())));
            }
            Ok(())
        })
        .start()
        .await
        .unwrap()
}

fn retry() -> Retry {
    Retry::default()
        .with_in_place(2)
        .with_max_attempts(5)
        .with_backoff(Backoff::Fixed(secs(10)))
}

#[tokio::test]
async fn later_events_of_a_key_wait_behind_a_parked_one_and_others_pass() {
    let world = World::start(options()).await;
    let (diary, fails) = (Diary::default(), Arc::new(AtomicBool::new(true)));
    let running = switched(&world.bus, &diary, &fails, retry()).await;
    for id in 0..3 {
        world.bus.publish(&placed(id, "ada")).await.unwrap();
        world.bus.publish(&placed(id, "bob")).await.unwrap();
    }
    world.pass(secs(1)).await;
    world
        .until(|_| running.report().handled == 3 && running.report().parked == 3)
        .await;
    let of = |who: &str| -> Vec<String> { diary.lines().into_iter().filter(|l| l.starts_with(who)).collect() };
    assert_eq!(of("ada"), ["ada 0 attempt 1", "ada 0 attempt 2"]);
    assert_eq!(of("bob").len(), 3);
    // One that comes while others wait goes behind them, and everybody else goes on.
    world.bus.publish(&placed(3, "ada")).await.unwrap();
    world.bus.publish(&placed(3, "bob")).await.unwrap();
    world
        .until(|_| running.report().handled == 4 && running.report().parked == 4)
        .await;
    fails.store(false, Ordering::SeqCst);
    world.pass(secs(11)).await;
    world.until(|_| running.report().handled == 8).await;
    assert_eq!(
        of("ada")[2..],
        [
            "ada 0 attempt 3",
            "ada 1 attempt 1",
            "ada 2 attempt 1",
            "ada 3 attempt 1"
        ]
    );
    assert_eq!(waiting(&world, "g").await.pending, 0);
    // With nothing left to wait for, the next one is handled at once.
    world.bus.publish(&placed(4, "ada")).await.unwrap();
    world.until(|_| running.report().handled == 9).await;
    assert_eq!(running.report().parked, 4);
}

#[tokio::test]
async fn one_parked_at_once_holds_back_those_looked_up_with_it() {
    let world = World::start(options()).await;
    let (diary, fails) = (Diary::default(), Arc::new(AtomicBool::new(true)));
    // All of them are taken, and looked up, together.
    for id in 0..4 {
        world.bus.publish(&placed(id, "ada")).await.unwrap();
    }
    world.until(|world| world.published("orders").len() == 4).await;
    let running = switched(&world.bus, &diary, &fails, retry().with_in_place(1)).await;
    world.until(|_| running.report().parked == 4).await;
    assert_eq!(diary.lines(), ["ada 0 attempt 1"]);
    fails.store(false, Ordering::SeqCst);
    world.pass(secs(11)).await;
    world.until(|_| running.report().handled == 4).await;
    let after: Vec<String> = diary.lines().split_off(1);
    assert_eq!(
        after,
        [
            "ada 0 attempt 2",
            "ada 1 attempt 1",
            "ada 2 attempt 1",
            "ada 3 attempt 1"
        ]
    );
}

#[tokio::test]
async fn attempts_are_counted_over_both_tiers_and_end_as_a_dead_letter() {
    let world = World::start(options()).await;
    let (diary, fails) = (Diary::default(), Arc::new(AtomicBool::new(true)));
    let running = switched(&world.bus, &diary, &fails, retry()).await;
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.bus.publish(&placed(2, "ada")).await.unwrap();
    for _ in 0..4 {
        world.pass(secs(10)).await;
    }
    world.until(|_| running.report().dead_lettered == 1).await;
    let letters = dead(&world, "g").await;
    let texts: Vec<&str> = letters[0].errors.iter().map(|e| &*e.text).collect();
    assert_eq!(
        (letters[0].attempts, texts),
        (5, vec!["no 1", "no 2", "no 3", "no 4", "no 5"])
    );
    let attempts: Vec<u32> = letters[0].errors.iter().map(|e| e.attempt).collect();
    assert_eq!(attempts, [1, 2, 3, 4, 5]);
    // Its key goes on, with the event behind it.
    world.until(|_| diary.count("ada 2 attempt 1") == 1).await;
    // A duplicate of a dead letter is dropped, also after the redrive that follows.
    let again = world.transport.published(&Topic::new("orders"))[0].clone();
    world.bus.publish_direct(again.clone()).await.unwrap();
    world.until(|_| running.report().dropped == 1).await;
    fails.store(false, Ordering::SeqCst);
    let admin = world.bus.log().unwrap().admin().unwrap();
    let filter = Filter::of(Mailbox::Inbox(GroupName::new("g"))).with_id(again.id());
    assert_eq!(admin.redrive(&filter, 10).await.unwrap(), 1);
    world.pass(secs(10)).await;
    world.until(|_| running.report().handled == 2).await;
    assert_eq!(diary.count("ada 1 attempt 1"), 2, "its attempts began anew");
    assert!(dead(&world, "g").await.is_empty());
}

#[tokio::test]
async fn a_duplicate_of_what_waits_is_dropped() {
    let world = World::start(options()).await;
    let (diary, fails) = (Diary::default(), Arc::new(AtomicBool::new(true)));
    let running = switched(&world.bus, &diary, &fails, retry()).await;
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.pass(secs(1)).await;
    world.until(|_| running.report().parked == 1).await;
    // As after a crash between the parking and the acknowledgement.
    let again = world.transport.published(&Topic::new("orders"))[0].clone();
    world.bus.publish_direct(again).await.unwrap();
    world.until(|_| running.report().dropped == 1).await;
    fails.store(false, Ordering::SeqCst);
    world.pass(secs(11)).await;
    world.until(|_| running.report().handled == 1).await;
    assert_eq!(diary.lines().len(), 3);
}

#[tokio::test]
async fn a_service_that_is_away_costs_no_attempt_and_fills_no_inbox() {
    let world = World::start(options()).await;
    let (diary, is_away) = (Diary::default(), Arc::new(AtomicBool::new(true)));
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .max_in_flight(16)
        .state(Arc::new((diary.clone(), is_away.clone())))
        .handler(async |(diary, is_away), _, ctx| {
            diary.note(format!("attempt {}", ctx.attempt()));
            if is_away.load(Ordering::SeqCst) {
                return Err(HandlerError::unavailable("the bank is closed"));
            }
            Ok(())
        })
        .start()
        .await
        .unwrap();
    for id in 0..100 {
        world.bus.publish(&placed(id, &format!("c{}", id % 20))).await.unwrap();
    }
    for _ in 0..60 {
        world.pass(secs(10)).await;
    }
    assert_eq!(running.flow(), Flow::Waiting("the bank is closed".to_owned()));
    let asked = diary.lines().len();
    assert!(
        asked < 16 + 60,
        "one probe at a time, further and further apart: {asked}"
    );
    assert_eq!(
        running.report().delivered,
        16,
        "nothing is taken that cannot be handled"
    );
    assert_eq!(waiting(&world, "g").await.pending, 0);
    is_away.store(false, Ordering::SeqCst);
    world.pass(secs(60)).await;
    world.until(|_| running.report().handled == 100).await;
    assert_eq!(diary.count("attempt 1"), diary.lines().len());
    assert_eq!((running.flow(), running.report().parked), (Flow::Running, 0));
}

/// A log that can be switched off.
#[derive(Debug)]
struct Switched(Arc<dyn EventLogStore>, Arc<AtomicBool>);

#[async_trait]
impl EventLogStore for Switched {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        if self.1.load(Ordering::SeqCst) && matches!(mailbox, Mailbox::Inbox(_)) {
            return Err(postrider_core::Error::new(
                ErrorKind::Unavailable,
                "the database is away",
            ));
        }
        self.0.append(mailbox, batch).await
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        self.0.open(mailbox, options).await
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.0.purge(request).await
    }
}

#[tokio::test]
async fn while_the_log_is_away_nothing_is_acknowledged_and_nothing_lost() {
    let world = World::start(options()).await;
    let is_away = Arc::new(AtomicBool::new(true));
    let log = EventLog::from(world.log.clone()).map_store(|store| Switched(store, is_away.clone()));
    let bus = Bus::builder()
        .log(log)
        .transport(Transport::from(world.transport.clone()))
        .relay(options())
        .clock(world.clock.clone())
        .build()
        .unwrap();
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .handler(async |order, _| match order.id % 3 {
            0 => Err(HandlerError::permanent("never")),
            1 => Err(HandlerError::retry_after(secs(60), "later")),
            _ => Ok(()),
        })
        .start()
        .await
        .unwrap();
    for id in 0..30 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    world.pass(secs(20)).await;
    assert_eq!((running.report().dead_lettered, running.report().parked), (0, 0));
    assert!(matches!(running.flow(), Flow::Waiting(_)), "{:?}", running.flow());
    is_away.store(false, Ordering::SeqCst);
    world.pass(secs(5)).await;
    world
        .until(|_| running.report().dead_lettered == 10 && running.report().parked == 10)
        .await;
    assert_eq!(running.report().handled, 10);
    assert_eq!(running.flow(), Flow::Running);
}

#[tokio::test]
async fn delays_of_days_survive_restarts() {
    let world = World::start(options()).await;
    let days = |n: u64| secs(n * 24 * 3600);
    let diary = Diary::default();
    let subscribe = async |bus: &Bus| {
        bus.subscribe::<OrderPlaced>("g")
            .state(diary.clone())
            .handler(async |diary, _, ctx| {
                diary.note(format!("attempt {}", ctx.attempt()));
                match ctx.attempt() {
                    1 => Err(HandlerError::retry_after(secs(3 * 24 * 3600), "come back on Thursday")),
                    _ => Ok(()),
                }
            })
            .start()
            .await
            .unwrap()
    };
    let first = subscribe(&world.bus).await;
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| first.report().parked == 1).await;
    world.bus.shutdown(secs(5)).await.unwrap();
    world.pass(days(2)).await;
    let second = world.another(options()).await;
    let again = subscribe(&second.bus).await;
    world.pass(secs(60)).await;
    assert_eq!(diary.lines().len(), 1);
    world.pass(days(1)).await;
    world.until(|_| again.report().handled == 1).await;
    assert_eq!(diary.lines(), ["attempt 1", "attempt 2"]);
}

#[tokio::test]
async fn another_version_waits_for_whoever_handles_it_and_an_unknown_type_is_as_the_options_say() {
    let world = World::start(options()).await;
    let options_of_g = SubscriptionOptions::default().with_unknown(Unknown::DeadLetter);
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .options(&options_of_g)
        .state(diary.clone())
        .handler(Diary::reserve)
        .start()
        .await
        .unwrap();
    let message = |kind: &'static str| Message::new(Topic::new("orders"), kind, r#"{"id":7,"customer":"x"}"#);
    world.bus.publish(message("order.placed.v3")).await.unwrap();
    world.bus.publish(message("invoice.sent.v1")).await.unwrap();
    world
        .until(|_| running.report().dead_lettered == 1 && running.report().parked == 1)
        .await;
    for _ in 0..10 {
        world.pass(secs(60)).await;
    }
    let letters = dead(&world, "g").await;
    assert!(
        letters[0].errors[0].text.contains("no handler for invoice.sent.v1"),
        "{letters:?}"
    );
    let stats = waiting(&world, "g").await;
    assert_eq!((stats.parked, stats.failed), (1, 1), "and no attempt was counted");
    assert_ne!(letters[0].message.id(), MessageId::new());
}

#[tokio::test]
async fn without_order_nothing_waits_for_its_key() {
    for transactional in [false, true] {
        let world = World::start(options()).await;
        let (diary, fails) = (Diary::default(), Arc::new(AtomicBool::new(true)));
        let mut subscription = world.bus.subscribe::<OrderPlaced>("g").unordered().retry(retry());
        if transactional {
            subscription = subscription.middleware(postrider_core::Transactional::new());
        }
        let running = subscription
            .state(Arc::new((diary.clone(), fails.clone())))
            .handler(async |(diary, fails), order, _| {
                diary.note(order.id.to_string());
                if fails.load(Ordering::SeqCst) && order.id == 0 {
                    Err("no")?
                } else {
                    Ok(())
                }
            })
            .start()
            .await
            .unwrap();
        world.bus.publish(&placed(0, "ada")).await.unwrap();
        world.pass(secs(1)).await;
        world.until(|_| running.report().parked == 1).await;
        for id in 1..4 {
            world.bus.publish(&placed(id, "ada")).await.unwrap();
        }
        world.until(|_| running.report().handled == 3).await;
        assert_eq!(running.report().parked, 1, "{transactional}");
        fails.store(false, Ordering::SeqCst);
        world.pass(secs(11)).await;
        world.until(|_| running.report().handled == 4).await;
    }
}

/// Answers that it is away, and then that it will never take the record.
#[derive(Debug)]
struct Refuses(Arc<dyn EventLogStore>, AtomicU32);

#[async_trait]
impl EventLogStore for Refuses {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        if *mailbox == Mailbox::outbox() {
            return self.0.append(mailbox, batch).await;
        }
        let kind = match self.1.fetch_add(1, Ordering::SeqCst) {
            0 => ErrorKind::Unavailable,
            _ => ErrorKind::Invalid,
        };
        Err(Error::new(kind, "not this one"))
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        self.0.open(mailbox, options).await
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.0.purge(request).await
    }
}

/// A record that the log never takes goes to the transport's dead letters, and stops nobody.
#[tokio::test]
async fn a_record_that_the_log_refuses_stops_no_other() {
    let world = World::start(options()).await;
    let log = EventLog::from(world.log.clone()).map_store(|store| Refuses(store, AtomicU32::new(0)));
    let bus = Bus::builder()
        .log(log)
        .transport(Transport::from(world.transport.clone()))
        .relay(options())
        .clock(world.clock.clone())
        .build()
        .unwrap();
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .handler(async |order, _| match order.id {
            0 => Err(HandlerError::permanent("never")),
            _ => Ok(()),
        })
        .start()
        .await
        .unwrap();
    for id in 0..20 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
        world.pass(Duration::from_millis(200)).await;
    }
    world.until(|_| running.report().handled == 19).await;
    assert_eq!(running.flow(), Flow::Running);
    assert_eq!(world.transport.dead_letters(running.group()).len(), 1);
}
