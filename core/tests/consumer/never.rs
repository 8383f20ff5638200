//! `Duration::MAX`, as applications write "never": it is a wait like any other, wherever it is given.

use crate::{
    Diary, OrderPlaced, placed, waiting,
    world::{World, secs},
};
use postrider_core::{
    HandlerError, RelayOptions, Retry, SubscriptionOptions,
    consumer::{Batch, CircuitBreaker, Throttle, Timeout},
    relay::Backoff,
};
use std::{num::NonZeroU32, time::Duration};

const NEVER: Duration = Duration::MAX;

fn never() -> RelayOptions {
    RelayOptions::default()
        .with_poll_interval(NEVER)
        .with_lease(NEVER)
        .with_publish_timeout(NEVER)
        .with_local_interval(NEVER)
        .with_local_queue_expiry(NEVER)
        .with_backoff(Backoff::Fixed(NEVER))
        .with_min_retry_interval(NEVER)
        .with_retention(NEVER)
        .with_failed_retention(NEVER)
        .with_cleanup_interval(NEVER)
        .with_max_probe_interval(NEVER)
}

#[tokio::test]
async fn every_time_of_a_relay_may_be_never() {
    let world = World::start(never()).await;
    world.transport.faults().on_publish(|message| {
        let refused = postrider_core::PublishError::rejected("no");
        if message.key() == Some("bad") {
            Err(refused)
        } else {
            Ok(())
        }
    });
    world.bus.publish_after(&placed(9, "later"), NEVER).await.unwrap();
    world.bus.publish(&placed(1, "bad")).await.unwrap();
    for id in 2..5 {
        world.bus.publish(&placed(id, "good")).await.unwrap();
        world.until(|w| w.published("orders").len() == id as usize - 1).await;
    }
    world.pass(secs(600)).await;
    let stats = world.stats().await;
    assert_eq!((stats.pending, stats.scheduled, stats.failed), (2, 1, 0));
    world.bus.shutdown(NEVER).await.unwrap();
}

#[tokio::test]
async fn backoff_without_end_parks_for_good() {
    for backoff in [
        Backoff::Fixed(NEVER),
        Backoff::FullJitter { min: NEVER, max: NEVER },
        Backoff::FullJitter {
            min: secs(1),
            max: NEVER,
        },
    ] {
        let mut rng = fastrand::Rng::with_seed(1);
        for attempt in [1, 31, 32, 33, u32::MAX] {
            assert!(backoff.after(attempt, &mut rng) <= postrider_core::clock::LONGEST);
        }
    }
}

#[tokio::test]
async fn every_time_of_a_subscription_may_be_never() {
    let world = World::start(never()).await;
    let diary = Diary::default();
    let options = SubscriptionOptions::default().with_receipts(NEVER).with_retry(
        Retry::default()
            .with_in_place(1)
            .with_waits(NEVER, NEVER)
            .with_backoff(Backoff::Fixed(NEVER)),
    );
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .options(&options)
        .middleware(Timeout::after(NEVER))
        .middleware(Throttle::new(NonZeroU32::new(100).unwrap(), NEVER))
        .middleware(CircuitBreaker::new(NonZeroU32::new(100).unwrap(), NEVER))
        .state(diary.clone())
        .handler(async |diary: &Diary, order, _| match order.id {
            1 => Err(HandlerError::retry_after(NEVER, "not in this life")),
            2 => Err("transient".into()),
            id => diary.did(format!("{id}")),
        })
        .timeout(NEVER)
        .start()
        .await
        .unwrap();
    for (id, customer) in [(1, "a"), (2, "b"), (3, "c")] {
        world.bus.publish(&placed(id, customer)).await.unwrap();
    }
    world.until(|_| diary.count("3") == 1).await;
    world.until_async(async |w| waiting(w, "g").await.parked == 2).await;
    world.pass(secs(600)).await;
    world.bus.publish(&placed(4, "d")).await.unwrap();
    world.until(|_| diary.count("4") == 1).await;
    assert_eq!(waiting(&world, "g").await.parked, 2);
    running.stop(NEVER).await.unwrap();
}

#[tokio::test]
async fn a_batch_may_gather_for_ever() {
    let world = World::start(never()).await;
    world
        .bus
        .subscribe::<OrderPlaced>("g")
        .unordered()
        .batch_handler(
            Batch::of(std::num::NonZeroUsize::new(2).unwrap()).waiting(NEVER),
            async |orders, _| orders.iter().map(|_| Ok(())).collect(),
        )
        .start()
        .await
        .unwrap();
    for id in 0..2 {
        world.bus.publish(&placed(id, "a")).await.unwrap();
    }
    world.until_async(async |w| w.stats().await.succeeded == 2).await;
    world.bus.shutdown(NEVER).await.unwrap();
}
