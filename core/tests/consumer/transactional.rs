//! Exactly-once effects: receipts, effects and follow-ups in one transaction. (In memory the effects are events; the tests
//! of the databases have rows.)

use crate::{
    Diary, OrderPaid, OrderPlaced, dead, placed,
    world::{World, options, secs},
};
use async_trait::async_trait;
use postrider_core::{
    Bus, Error, ErrorKind, EventLog, HandlerError, Mailbox, Message, MessageId, OnFailure, Result, Retry, Topic,
    Transactional, Transport,
    consumer::Batch,
    event::DynEvent as _,
    log::{Lent, LogTransaction, NewRecord, TransactionalLog},
};
use std::{
    num::NonZeroUsize,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
};

fn paid(world: &World) -> Vec<Message> {
    let published = world.transport.published(&Topic::new("orders"));
    published.into_iter().filter(|m| m.kind() == "order.paid.v1").collect()
}

#[tokio::test]
async fn what_is_published_goes_with_the_receipt_or_not_at_all() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .state(diary.clone())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |_, order, ctx| {
            ctx.publish(&OrderPaid { order: order.id }).await?;
            assert!(ctx.has_transaction());
            if ctx.attempt() == 1 { Err("not yet")? } else { Ok(()) }
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.pass(secs(1)).await;
    world.until(|_| running.report().handled == 1).await;
    world.until(|w| !paid(w).is_empty()).await;
    assert_eq!(
        diary.lines(),
        ["reserve 1", "release 1", "reserve 1"],
        "compensated after the rollback"
    );
    // What it published tells where it comes from.
    let first = world.transport.published(&Topic::new("orders"))[0].clone();
    let follow_up = paid(&world)[0].clone();
    let id = first.id().to_string();
    assert_eq!(follow_up.attribute("causationid"), Some(&(&*id).into()));
    assert_eq!(follow_up.attribute("correlationid"), Some(&(&*id).into()));
    // The same message once more, as after a crash before the acknowledgement.
    world.bus.publish_direct(first).await.unwrap();
    world.until(|_| running.report().dropped == 1).await;
    assert_eq!(running.report().handled, 1, "what is dropped was not handled");
    world.pass(secs(1)).await;
    assert_eq!(
        (paid(&world).len(), diary.lines().len()),
        (1, 3),
        "it was acknowledged and not handled"
    );
}

#[tokio::test]
async fn the_correlation_goes_on_and_on() {
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .handler(async |order, ctx| {
            ctx.publish(&OrderPaid { order: order.id }).await?;
            let own = Message::new(Topic::new("other"), "x.v1", "{}").with_attribute("correlationid", "of its own");
            ctx.publish(own).await?;
            Ok(())
        })
        .start()
        .await
        .unwrap();
    world
        .bus
        .publish(&placed(1, "ada"))
        .attribute("correlationid", "request 7")
        .await
        .unwrap();
    world.until(|_| running.report().handled == 1).await;
    world
        .until(|w| paid(w).len() == 1 && w.published("other").len() == 1)
        .await;
    assert_eq!(paid(&world)[0].attribute("correlationid"), Some(&"request 7".into()));
    let other = world.transport.published(&Topic::new("other"));
    assert_eq!(other[0].attribute("correlationid"), Some(&"of its own".into()));
}

#[tokio::test]
async fn an_optional_step_that_fails_leaves_nothing_in_the_transaction() {
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .handler(async |_, ctx| {
            ctx.publish(&OrderPaid { order: 1 }).await?;
            Ok(())
        })
        .handler(async |_, ctx| {
            ctx.publish(&OrderPaid { order: 2 }).await?;
            Err("not that one")?
        })
        .on_failure(OnFailure::Ignore)
        .handler(async |_, ctx| {
            ctx.publish(&OrderPaid { order: 3 }).await?;
            Ok(())
        })
        .on_failure(OnFailure::Ignore)
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().handled == 1).await;
    world.until(|w| paid(w).len() == 2).await;
    let payloads: Vec<_> = paid(&world)
        .iter()
        .map(|m| String::from_utf8_lossy(m.payload()).into_owned())
        .collect();
    assert_eq!(payloads, [r#"{"order":1}"#, r#"{"order":3}"#]);
}

#[tokio::test]
async fn those_of_a_parked_key_are_held_back_by_admission() {
    let world = World::start(options()).await;
    let (diary, fails) = (Diary::default(), Arc::new(AtomicBool::new(true)));
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .retry(Retry::default().with_in_place(1))
        .state(Arc::new((diary.clone(), fails.clone())))
        .handler(async |(diary, fails), order, _| {
            diary.note(format!("{} {}", order.customer, order.id));
            if fails.load(Ordering::SeqCst) && order.customer == "ada" {
                Err("no")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().parked == 1).await;
    for id in 2..5 {
        world.bus.publish(&placed(id, "ada")).await.unwrap();
        world.bus.publish(&placed(id, "bob")).await.unwrap();
    }
    world
        .until(|_| running.report().parked == 4 && running.report().handled == 3)
        .await;
    fails.store(false, Ordering::SeqCst);
    world.pass(secs(3)).await;
    world.until(|_| running.report().handled == 7).await;
    let ada: Vec<_> = diary.lines().into_iter().filter(|l| l.starts_with("ada")).collect();
    assert_eq!(ada, ["ada 1", "ada 1", "ada 2", "ada 3", "ada 4"]);
}

#[tokio::test]
async fn a_batch_shares_a_transaction_and_falls_back_to_one_by_one() {
    let world = World::new(options()).await;
    let diary = Diary::default();
    let orders: Vec<_> = (0..40).map(|id| placed(id, &format!("c{id}"))).collect();
    world.bus.publish_all(&orders).await.unwrap();
    world.bus.start().await.unwrap();
    world.until(|w| w.published("orders").len() == 40).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::batch(NonZeroUsize::new(10).unwrap()))
        .retry(Retry::none())
        .state(diary.clone())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |_, order, ctx| {
            ctx.publish(&OrderPaid { order: order.id }).await?;
            if order.id == 17 { Err("not this one")? } else { Ok(()) }
        })
        .start()
        .await
        .unwrap();
    world
        .until(|_| running.report().handled == 39 && running.report().dead_lettered == 1)
        .await;
    world.until(|w| paid(w).len() == 39).await;
    world.pass(secs(1)).await;
    assert_eq!(paid(&world).len(), 39, "each once, and none of the one that failed");
    let runs = diary.lines().iter().filter(|l| l.starts_with("reserve")).count();
    assert!((41..=50).contains(&runs), "those of one batch ran again: {runs}");
    assert_eq!(
        diary.lines().iter().filter(|l| l.starts_with("release")).count(),
        1,
        "only for the try that counted"
    );
    assert_eq!(dead(&world, "g").await.len(), 1);
}

#[tokio::test]
async fn what_cannot_be_had_is_named() {
    let world = World::start(options()).await;
    let noop = async |_: &OrderPlaced, _: &mut postrider_core::Context| -> postrider_core::HandlerResult { Ok(()) };
    let broadcast = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .broadcast();
    let error = broadcast.handler(noop).start().await.unwrap_err();
    assert!(
        error.to_string().contains("instances of a broadcast have none"),
        "{error}"
    );
    let both = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .durable();
    let error = both.handler(noop).start().await.unwrap_err();
    assert!(
        error.to_string().contains("`Transactional` cannot go around it"),
        "{error}"
    );
    let bus = postrider_core::Bus::builder()
        .transport(world.transport.clone())
        .build()
        .unwrap();
    let error = bus
        .subscribe::<OrderPlaced>("g")
        .durable()
        .handler(noop)
        .start()
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported);
    assert!(error.to_string().contains("needs an event log"), "{error}");
    let misplaced = world.bus.subscribe::<OrderPlaced>("g").durable();
    let misplaced = misplaced.batch_handler(Batch::default(), async |orders, _| {
        orders.iter().map(|_| Ok(())).collect()
    });
    let error = misplaced.start().await.unwrap_err();
    assert!(error.to_string().contains("what: durable()"), "{error}");
    // A handler that asks for a transaction where there is none.
    let running = world
        .bus
        .subscribe::<OrderPlaced>("h")
        .retry(Retry::none())
        .handler(async |_, ctx| {
            let error = ctx.tx::<u32>().unwrap_err();
            Err(HandlerError::permanent(error))
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().dead_lettered == 1).await;
    let text = dead(&world, "h").await[0].errors[0].text.clone();
    assert!(text.contains("add the `Transactional` middleware"), "{text}");
}

#[tokio::test]
async fn what_a_compensation_publishes_is_not_taken_for_what_a_step_does() {
    for durable in [false, true] {
        let world = World::start(options()).await;
        let mut subscription = world.bus.subscribe::<OrderPlaced>("g");
        if durable {
            subscription = subscription.durable();
        } else {
            subscription = subscription.middleware(Transactional::new());
        }
        let running = subscription
            .retry(
                Retry::default()
                    .with_max_attempts(3)
                    .with_backoff(postrider_core::relay::Backoff::Fixed(secs(1))),
            )
            .handler(async |_, _| Ok(()))
            .compensate(async |_, ctx| {
                ctx.publish(&OrderPaid {
                    order: 100 + ctx.attempt(),
                })
                .await?;
                Ok(())
            })
            .named("charge")
            .handler(async |_, ctx| {
                if ctx.attempt() < 3 {
                    return Err(HandlerError::from("not yet"));
                }
                ctx.publish(&OrderPaid { order: 1 }).await?;
                ctx.publish(&OrderPaid { order: 2 }).await?;
                Ok(())
            })
            .named("confirm")
            .start()
            .await
            .unwrap();
        world.bus.publish(&placed(1, "ada")).await.unwrap();
        for _ in 0..5 {
            world.pass(secs(2)).await;
        }
        world.until(|_| running.report().handled == 1).await;
        world.until(|w| paid(w).len() == 4).await;
        let ids: std::collections::HashSet<_> = paid(&world).iter().map(Message::id).collect();
        assert_eq!(
            ids.len(),
            4,
            "two refunds of two attempts, and two events of the third: durable {durable}"
        );
    }
}

#[tokio::test]
async fn a_run_that_failed_inside_a_batch_spoils_it_whatever_a_middleware_makes_of_it() {
    use postrider_core::consumer::RetryInside;
    let world = World::new(options()).await;
    let orders: Vec<_> = (0..10).map(|id| placed(id, &format!("c{id}"))).collect();
    world.bus.publish_all(&orders).await.unwrap();
    world.bus.start().await.unwrap();
    world.until(|w| w.published("orders").len() == 10).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(RetryInside::new(Retry::default()))
        .middleware(Transactional::batch(NonZeroUsize::new(10).unwrap()))
        .state(diary.clone())
        .handler(async |diary, order, ctx| {
            ctx.publish(&OrderPaid { order: order.id }).await?;
            diary.note(order.id.to_string());
            if order.id == 5 && diary.count("5") < 3 {
                Err("a hiccup")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .unwrap();
    for _ in 0..5 {
        world.pass(secs(1)).await;
    }
    world.until(|_| running.report().handled == 10).await;
    world.until(|w| paid(w).len() == 10).await;
    world.pass(secs(1)).await;
    assert_eq!(paid(&world).len(), 10, "the run that failed has published nothing");
}

/// A database whose transactions can be switched off.
#[derive(Debug)]
struct Switched(Arc<dyn TransactionalLog>, Arc<AtomicBool>);

#[async_trait]
impl TransactionalLog for Switched {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        match self.1.load(Ordering::SeqCst) {
            true => Err(Error::new(ErrorKind::Unavailable, "the database is away")),
            false => self.0.begin().await,
        }
    }
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.0.append_in(tx, mailbox, batch).await
    }
}

/// What a transaction cannot begin for is no fault of the message's.
#[tokio::test]
async fn a_database_that_is_away_costs_no_attempt() {
    let world = World::start(options()).await;
    let is_away = Arc::new(AtomicBool::new(true));
    let log = EventLog::from(world.log.clone());
    let inner = log.transactions().unwrap().clone();
    let bus = Bus::builder()
        .log(log.with_transactions(Switched(inner, is_away.clone())))
        .transport(Transport::from(world.transport.clone()))
        .relay(options())
        .clock(world.clock.clone())
        .build()
        .unwrap();
    let one_by_one = bus
        .subscribe::<OrderPlaced>("one")
        .middleware(Transactional::new())
        .retry(Retry::none())
        .handler(async |_, ctx| if ctx.attempt() == 1 { Ok(()) } else { Err("counted")? })
        .start()
        .await
        .unwrap();
    let together = bus
        .subscribe::<OrderPlaced>("together")
        .middleware(Transactional::batch(NonZeroUsize::new(10).unwrap()))
        .retry(Retry::none())
        .handler(async |_, ctx| if ctx.attempt() == 1 { Ok(()) } else { Err("counted")? })
        .start()
        .await
        .unwrap();
    for id in 0..20 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    for _ in 0..20 {
        world.pass(secs(10)).await;
    }
    for running in [&one_by_one, &together] {
        let report = running.report();
        assert_eq!((report.handled, report.dead_lettered, report.parked), (0, 0, 0));
    }
    is_away.store(false, Ordering::SeqCst);
    world.pass(secs(60)).await;
    world
        .until(|_| one_by_one.report().handled == 20 && together.report().handled == 20)
        .await;
}

/// Where there is no transaction, the error says why, and what to do.
#[tokio::test]
async fn an_error_about_a_missing_transaction_says_the_true_reason() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let plain = world
        .bus
        .subscribe::<OrderPlaced>("plain")
        .state(diary.clone())
        .handler(async |diary: &Diary, _, ctx| diary.did(ctx.tx::<u8>().unwrap_err().to_string()))
        .start()
        .await
        .unwrap();
    let batches = world
        .bus
        .subscribe::<OrderPlaced>("batches")
        .batch_handler(postrider_core::consumer::Batch::default(), async |orders, ctx| {
            assert!(ctx.of(0).tx::<u8>().unwrap_err().to_string().contains("batch handlers"));
            orders.iter().map(|_| Ok(())).collect()
        })
        .start()
        .await
        .unwrap();
    let compensated = world
        .bus
        .subscribe::<OrderPlaced>("compensated")
        .middleware(Transactional::new())
        .retry(Retry::none())
        .state(diary.clone())
        .handler(async |_, _, _| Ok(()))
        .compensate(async |diary: &Diary, _, ctx| diary.did(ctx.tx::<u8>().unwrap_err().to_string()))
        .handler(async |_, _, _| Err("no")?)
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    // The batch gathers for a moment.
    world.pass(secs(1)).await;
    world
        .until(|_| {
            plain.report().handled == 1 && batches.report().handled == 1 && compensated.report().dead_lettered == 1
        })
        .await;
    let lines = diary.lines();
    let [one, other] = &lines[..] else { panic!("{lines:?}") };
    let (plain, over) = if one.contains("middleware") {
        (one, other)
    } else {
        (other, one)
    };
    assert!(plain.contains("add the `Transactional` middleware"), "{plain}");
    assert!(
        over.contains("it has been rolled back") && over.contains("bus().begin()"),
        "{over}"
    );
    assert!(!over.contains("add the `Transactional`"), "{over}");
}

/// Publishing beside the transaction that a handler runs in, in place of in it, is an error that says what to do.
#[tokio::test]
async fn a_transaction_beside_that_of_the_handler_is_refused() {
    let world = World::start(options()).await;
    let bus = world.bus.clone();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .retry(Retry::none())
        .state(bus)
        .handler(async |bus: &Bus, order, ctx| {
            let paid = OrderPaid { order: order.id };
            match order.id {
                1 => bus.publish(&paid).await?,
                _ => ctx.publish(&paid).await?,
            };
            Ok(())
        })
        .start()
        .await
        .unwrap();
    for id in 1..=2 {
        world.bus.publish(&placed(id, &id.to_string())).await.unwrap();
    }
    for _ in 0..5 {
        world.pass(secs(1)).await;
    }
    world
        .until(|_| running.report().dead_lettered == 1 && running.report().handled == 1)
        .await;
    for stored in dead(&world, "g").await {
        assert!(stored.errors[0].text.contains("ctx.publish"), "{:?}", stored.errors);
    }
}

/// An event is its source and its id together: the same id from another source is another event.
#[tokio::test]
async fn the_same_id_from_two_sources_is_two_events() {
    let world = World::start(options()).await;
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .handler(async |_, _| Ok(()))
        .start()
        .await
        .unwrap();
    let id: MessageId = "6ba7b810-9dad-41d1-80b4-00c04fd430c8".parse().unwrap();
    for source in ["/a", "/b", "/a"] {
        let message = placed(1, "ada").to_message().unwrap();
        let message = message.with_id(id).with_source(source);
        world.bus.publish_direct(message).await.unwrap();
    }
    world
        .until(|_| running.report().handled == 2 && running.report().dropped == 1)
        .await;
}

/// Attributes go with an event through the log, the inbox and the dead letters, and out again when it is redriven.
#[tokio::test]
async fn attributes_are_kept_all_the_way() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .retry(Retry::default().with_in_place(1).with_max_attempts(2))
        .state(diary.clone())
        .handler(async |diary: &Diary, _, ctx| {
            let attribute = |name| {
                ctx.message()
                    .attribute(name)
                    .map(ToString::to_string)
                    .unwrap_or_default()
            };
            diary.note(format!(
                "{} {} {}",
                attribute("tenantid"),
                attribute("level"),
                attribute("subject")
            ));
            Err("not yet".into())
        })
        .start()
        .await
        .unwrap();
    let publish = world.bus.publish(&placed(1, "ada"));
    let publish = publish
        .attribute("tenantid", "acme")
        .attribute("level", 3)
        .header("tenantid", "free");
    publish.attribute("subject", "orders/1").await.unwrap();
    for _ in 0..60 {
        world.pass(secs(1)).await;
    }
    world.until(|_| running.report().dead_lettered == 1).await;
    let letter = &dead(&world, "g").await[0].message;
    assert_eq!(letter.attribute("level"), Some(&3.into()), "with its type");
    assert_eq!(letter.header("tenantid"), Some("free"), "names of headers are free");
    let noted = diary.0.lock().unwrap().clone();
    assert!(
        noted.len() >= 2 && noted.iter().all(|line| line == "acme 3 orders/1"),
        "{noted:?}"
    );
}

/// What was appended without a source, by SQL, goes out with that of the bus.
#[tokio::test]
async fn the_relay_fills_in_the_source() {
    let world = World::start(options()).await;
    let message = placed(1, "ada").to_message().unwrap();
    assert!(message.source().is_none());
    let log = world.bus.log().unwrap().store().clone();
    log.append(&Mailbox::outbox(), &[NewRecord::new(message)])
        .await
        .unwrap();
    world.until(|w| w.published("orders").len() == 1).await;
    let published = world.transport.published(&Topic::new("orders"));
    assert!(published[0].source().is_some_and(|source| !source.is_empty()));
}
