//! Members of one group that handle different types: none acknowledges what another handles.

use crate::{
    OrderPaid, OrderPlaced, dead, pending, placed,
    world::{World, event, options, secs},
};
use postrider_core::{
    Bus, ErrorKind, EventLog, Running, SubscriptionOptions, Topic, Transport,
    consumer::Unknown,
    health::{Part, PartState},
    relay::RelayOptions,
};
use std::sync::{Arc, Mutex};

/// Another process on the world's log and broker.
fn process(world: &World, options: RelayOptions) -> Bus {
    Bus::builder()
        .log(EventLog::from(world.log.clone()))
        .transport(Transport::from(world.transport.clone()))
        .relay(options)
        .clock(world.clock.clone())
        .build()
        .unwrap()
}

type Handled = Arc<Mutex<Vec<String>>>;

/// The program of before the deploy: it knows `OrderPlaced`.
async fn old_member(bus: &Bus, handled: &Handled) -> Running {
    bus.subscribe::<OrderPlaced>("g")
        .state(handled.clone())
        .handler(async |handled: &Mutex<Vec<String>>, order: &OrderPlaced, _| {
            handled.lock().unwrap().push(format!("placed {}", order.id));
            Ok(())
        })
        .start()
        .await
        .unwrap()
}

/// The program of after it: it knows `OrderPaid`, too.
async fn new_member(bus: &Bus, handled: &Handled) -> Running {
    bus.subscribe::<OrderPlaced>("g")
        .state(handled.clone())
        .handler(async |handled: &Mutex<Vec<String>>, order: &OrderPlaced, _| {
            handled.lock().unwrap().push(format!("placed {}", order.id));
            Ok(())
        })
        .and::<OrderPaid>()
        .handler(async |handled: &Mutex<Vec<String>>, paid: &OrderPaid, _| {
            handled.lock().unwrap().push(format!("paid {}", paid.order));
            Ok(())
        })
        .start()
        .await
        .unwrap()
}

/// Both versions alive for a while, then the old one gone: every event is handled once, by whoever handles its type.
#[tokio::test]
async fn a_rolling_deploy_loses_no_event_of_the_new_type() {
    let world = World::start(options()).await;
    let (old, new) = (process(&world, options()), process(&world, options()));
    let handled = Handled::default();
    let old_running = old_member(&old, &handled).await;
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| handled.lock().unwrap().len() == 1).await;
    let new_running = new_member(&new, &handled).await;
    let mut expected = vec!["placed 1".to_owned()];
    for id in 2..40 {
        // One topic of the two types each, and one of the old member's own topic.
        world.bus.publish(&placed(id, &format!("c{}", id % 5))).await.unwrap();
        world.bus.publish(&OrderPaid { order: id }).await.unwrap();
        let paid = &OrderPaid { order: id + 100 };
        world
            .bus
            .publish(paid)
            .topic(Topic::new("orders"))
            .key(format!("c{}", id % 5))
            .await
            .unwrap();
        expected.extend([
            format!("placed {id}"),
            format!("paid {id}"),
            format!("paid {}", id + 100),
        ]);
        world.pass(secs(1)).await;
    }
    for _ in 0..20 {
        world.pass(secs(5)).await;
    }
    old_running.stop(secs(5)).await.unwrap();
    for _ in 0..20 {
        world.pass(secs(5)).await;
    }
    let mut all = handled.lock().unwrap().clone();
    all.sort();
    expected.sort();
    assert_eq!(all, expected);
    assert_eq!(old_running.report().ignored + new_running.report().ignored, 0);
    assert!(pending(&world, "g").await.is_empty(), "nothing is left behind");
    assert!(dead(&world, "g").await.is_empty());
}

/// What the holder of the inbox lacks is handed to the member that has it, and does not go round for ever.
#[tokio::test]
async fn a_member_hands_over_the_inbox_for_what_it_lacks() {
    let world = World::start(options()).await;
    let (one, other) = (process(&world, options()), process(&world, options()));
    let handled = Handled::default();
    let (placed_only, paid_only) = (old_member(&one, &handled).await, {
        other
            .subscribe::<OrderPaid>("g")
            .state(handled.clone())
            .handler(async |handled: &Mutex<Vec<String>>, paid: &OrderPaid, _| {
                handled.lock().unwrap().push(format!("paid {}", paid.order));
                Ok(())
            })
            .start()
            .await
            .unwrap()
    });
    for id in 0..30 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
        world.bus.publish(&OrderPaid { order: id }).await.unwrap();
    }
    for _ in 0..100 {
        world.pass(secs(1)).await;
    }
    let waiting = pending(&world, "g").await.len();
    let handled = handled.lock().unwrap().len();
    assert_eq!((handled, waiting), (60, 0));
    assert_eq!(placed_only.report().ignored + paid_only.report().ignored, 0);
    assert_eq!(dead(&world, "g").await.len(), 0);
    // Members that disagree for long show in their health.
    for _ in 0..100 {
        world.pass(secs(20)).await;
    }
    let part = Part::Subscription(placed_only.group().clone());
    let health = one.health().part(&part).unwrap().clone();
    assert_eq!(health.state, PartState::Degraded);
    assert!(health.error.unwrap().text.contains("order.paid"), "the types are named");
    assert!(one.health().live);
}

/// A type that nobody handles is acknowledged, and counted; one of a topic nobody asked for never is.
#[tokio::test]
async fn what_nobody_handles_is_ignored_only_on_topics_that_were_asked_for() {
    let world = World::start(options()).await;
    let handled = Handled::default();
    let running = old_member(&world.bus, &handled).await;
    for n in 0..5 {
        world.bus.publish(event("orders", None, &n.to_string())).await.unwrap();
    }
    world.until(|_| running.report().ignored == 5).await;
    assert_eq!(running.report().handled, 0);
}

#[tokio::test]
async fn a_second_subscription_of_a_group_on_one_bus_is_refused() {
    let world = World::start(options()).await;
    let handled = Handled::default();
    let running = old_member(&world.bus, &handled).await;
    let second = world
        .bus
        .subscribe::<OrderPaid>("g")
        .handler(async |_, _| Ok(()))
        .start()
        .await;
    let error = second.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
    assert!(error.to_string().contains(".and::<E>()"), "{error}");
    // Once it has stopped, another may take its place.
    running.stop(secs(5)).await.unwrap();
    let again = new_member(&world.bus, &handled).await;
    again.stop(secs(5)).await.unwrap();
}

/// Without a log the option decides.
#[tokio::test]
async fn without_a_log_an_option_says_what_becomes_of_unknown_types() {
    for (unknown, ignored) in [(Unknown::Ack, 1), (Unknown::DeadLetter, 0)] {
        let world = World::start(options()).await;
        let bus = Bus::builder()
            .transport(Transport::from(world.transport.clone()))
            .clock(world.clock.clone())
            .build()
            .unwrap();
        let mut says = SubscriptionOptions::default();
        says.unknown = Some(unknown);
        let running = bus
            .subscribe::<OrderPlaced>("g")
            .options(&says)
            .handler(async |_, _| Ok(()))
            .start()
            .await
            .unwrap();
        world.bus.publish(event("orders", None, "x")).await.unwrap();
        world
            .until(|_| running.report().ignored + running.report().dead_lettered == 1)
            .await;
        assert_eq!(running.report().ignored, ignored);
    }
}

/// A message of a topic that this member never asked for is never acknowledged unhandled: it waits, and is a dead letter where
/// nobody has handled its type for a day.
#[tokio::test]
async fn what_comes_from_a_topic_nobody_asked_for_is_not_ignored() {
    let world = World::start(options()).await;
    let handled = Handled::default();
    let running = old_member(&world.bus, &handled).await;
    // As a binding that an earlier version of the program has left behind.
    let stale = postrider_core::Subscription::new(running.group().clone(), vec![Topic::new("stale")]);
    let transport = Transport::from(world.transport.clone());
    transport.subscriber(&stale).unwrap().declare(&stale).await.unwrap();
    world.bus.publish(event("stale", None, "x")).await.unwrap();
    world.until(|_| running.report().parked == 1).await;
    for _ in 0..10 {
        world.pass(secs(5)).await;
    }
    assert_eq!(running.report().ignored, 0);
    assert_eq!(dead(&world, "g").await.len(), 1);
}
