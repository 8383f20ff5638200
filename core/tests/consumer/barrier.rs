//! Barriers: forward calls and compensations in any order, in attempts that no clock tells apart.

use crate::{
    Diary, OrderPlaced, dead, placed,
    world::{World, options, secs},
};
use postrider_core::{Context, ErrorKind, HandlerError, Result, Retry, consumer::Barrier, relay::Backoff};
use std::sync::{Arc, Mutex};

async fn forward(barrier: &Barrier, ctx: &Context) -> Result<bool> {
    let mut tx = ctx.bus().begin().await?;
    let go = barrier.forward(&mut tx).await;
    tx.commit().await?;
    go
}

async fn compensate(barrier: &Barrier, ctx: &Context) -> Result<bool> {
    let mut tx = ctx.bus().begin().await?;
    let go = barrier.compensate(&mut tx).await?;
    tx.commit().await?;
    Ok(go)
}

/// A wall clock set back by an hour before each attempt changes nothing.
#[tokio::test]
async fn a_barrier_lets_each_call_have_its_effect_once_whatever_the_order_and_the_clock() {
    let world = World::start(options()).await;
    let kept: Arc<Mutex<Vec<Barrier>>> = Arc::default();
    let clock = world.clock.clone();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .retry(Retry::default().with_in_place(3))
        .state(Arc::new((kept.clone(), clock)))
        .handler(async |(kept, clock), _, ctx| {
            use postrider_core::clock::Clock as _;
            clock.jump_to(clock.now() - secs(3600));
            let barrier = ctx.barrier("charge").await?;
            kept.lock().unwrap().push(barrier.clone());
            let before = |n: usize| kept.lock().unwrap()[n].clone();
            match ctx.attempt() {
                1 => {
                    // The compensation comes first: empty, and remembered.
                    assert!(!compensate(&barrier, ctx).await? && !compensate(&barrier, ctx).await?);
                    let late = forward(&barrier, ctx).await.unwrap_err();
                    assert!(late.to_string().contains("too late"), "{late}");
                }
                2 => {
                    // The next attempt is another matter; each call has its effect once.
                    assert!(
                        forward(&before(0), ctx).await.is_err(),
                        "one that hung since the attempt before"
                    );
                    assert!(forward(&barrier, ctx).await? && !forward(&barrier, ctx).await?);
                    assert!(!forward(&ctx.barrier("charge").await?, ctx).await?, "the same attempt");
                    assert!(
                        ctx.barrier("other")
                            .await?
                            .forward(&mut ctx.bus().begin().await?)
                            .await?
                    );
                }
                3 => {
                    assert!(!forward(&barrier, ctx).await?, "it is in force already");
                    assert!(compensate(&barrier, ctx).await? && !compensate(&barrier, ctx).await?);
                    assert!(!compensate(&before(1), ctx).await?);
                    assert!(forward(&barrier, ctx).await.is_err() && forward(&before(1), ctx).await.is_err());
                    // What is rolled back has not happened.
                    let mut tx = ctx.bus().begin().await?;
                    assert!(barrier.forward(&mut tx).await.is_err());
                    tx.rollback().await?;
                    return Ok(());
                }
                attempt => panic!("{attempt}"),
            }
            Err("once more")?
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.pass(secs(2)).await;
    world.until(|_| running.report().handled == 1).await;
    assert!(dead(&world, "g").await.is_empty());
}

/// Each attempt charges, fails and refunds, in this process or after it, while the clock goes back: nothing comes too late.
#[tokio::test]
async fn attempts_are_told_apart_without_a_clock() {
    for durable in [false, true] {
        let world = World::start(options()).await;
        let diary = Diary::default();
        let subscribing = world.bus.subscribe::<OrderPlaced>("g").retry(
            Retry::default()
                .with_max_attempts(8)
                .with_backoff(Backoff::Fixed(secs(1))),
        );
        let subscribing = if durable { subscribing.durable() } else { subscribing };
        let running = subscribing
            .state(diary.clone())
            .handler(async |diary: &Diary, _, ctx| {
                let barrier = ctx.barrier("charge").await?;
                if forward(&barrier, ctx).await? {
                    diary.note("charge");
                }
                Ok(())
            })
            .compensate(async |diary: &Diary, _, ctx| {
                let barrier = ctx.barrier("charge").await?;
                if compensate(&barrier, ctx).await? {
                    diary.note("refund");
                }
                Ok(())
            })
            .handler(async |_, _, ctx| match ctx.attempt() {
                1..6 => Err(HandlerError::transient("not yet")),
                _ => Ok(()),
            })
            .start()
            .await
            .unwrap();
        world.bus.publish(&placed(1, "ada")).await.unwrap();
        for _ in 0..20 {
            use postrider_core::clock::Clock as _;
            world.pass(secs(1)).await;
            // By less than what waits, which is due by that clock.
            world
                .clock
                .jump_to(world.clock.now() - std::time::Duration::from_millis(900));
        }
        world.pass(secs(60)).await;
        world.until(|_| running.report().handled == 1).await;
        let lines = diary.lines();
        assert_eq!(
            (diary.count("charge"), diary.count("refund")),
            (6, 5),
            "durable {durable}: {lines:?}"
        );
        assert_eq!(lines.last().unwrap(), "charge");
    }
}

#[tokio::test]
async fn a_barrier_without_a_log_says_what_it_lacks() {
    let world = World::new(options()).await;
    let bus = postrider_core::Bus::builder()
        .transport(postrider_core::Transport::from(world.transport.clone()))
        .clock(world.clock.clone())
        .build()
        .unwrap();
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .handler(async |_, ctx| {
            let error = ctx.barrier("charge").await.unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
            assert!(error.to_string().contains("event log"), "{error}");
            Ok(())
        })
        .start()
        .await
        .unwrap();
    bus.publish_direct(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().handled == 1).await;
}
