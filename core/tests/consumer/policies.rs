//! What the failure of a step means, and of a compensation; time-outs; the order of steps.

use crate::{
    Diary, OrderPlaced, dead, placed,
    world::{World, options, secs},
};
use postrider_core::{Context, Handler, HandlerError, HandlerResult, OnFailure, Retry};
use std::{sync::Arc, time::Duration};

#[tokio::test]
async fn steps_run_in_the_order_they_declare() {
    struct First(Diary);
    impl Handler<OrderPlaced> for First {
        async fn execute(&self, _: &OrderPlaced, _: &mut Context) -> HandlerResult {
            self.0.note("first");
            Ok(())
        }
        fn order(&self) -> Option<i32> {
            Some(-1)
        }
    }
    let world = World::start(options()).await;
    let diary = Diary::default();
    world
        .bus
        .subscribe::<OrderPlaced>("g")
        .state(diary.clone())
        .handler(async |diary, _, _| diary.did("third"))
        .order(20)
        .handler(async |diary, _, _| diary.did("second"))
        .order(10)
        .step(First(diary.clone()))
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| diary.lines().len() == 3).await;
    assert_eq!(diary.lines(), ["first", "second", "third"]);
    let noop = async |_: &OrderPlaced, _: &mut Context| -> HandlerResult { Ok(()) };
    let describe = || {
        world
            .bus
            .subscribe::<OrderPlaced>("h")
            .handler(noop)
            .named("a")
            .order(1)
            .handler(noop)
            .named("b")
    };
    let twice = describe().order(1).start().await.unwrap_err().to_string();
    assert!(
        twice.contains("declare the same order") && twice.contains("a, b") && twice.contains("group: h"),
        "{twice}"
    );
    let mixed = describe().start().await.unwrap_err().to_string();
    assert!(
        mixed.contains("some steps of a chain declare their order") && mixed.contains("without: b"),
        "{mixed}"
    );
}

#[tokio::test]
async fn a_step_may_fail_or_take_itself_back_too() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .state(diary.clone())
        .retry(Retry::none())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |_, _, _| Err("no coupon")?)
        .compensate(async |diary, _, _| diary.did("what never happened is not taken back"))
        .on_failure(OnFailure::Ignore)
        .handler(async |diary, order, _| {
            diary.note(format!("half of {}", order.id));
            Err("and no more")?
        })
        .compensate(async |diary, order, _| diary.did(format!("without half of {}", order.id)))
        .on_failure(OnFailure::StopAndCompensateSelf)
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().dead_lettered == 1).await;
    assert_eq!(
        diary.lines(),
        ["reserve 1", "half of 1", "without half of 1", "release 1"]
    );
}

#[tokio::test]
async fn compensations_that_fail_are_told_beside_the_error_and_stop_no_other() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .state(diary.clone())
        .retry(Retry::none())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |_, _, _| Ok(()))
        .compensate(async |_, _, _| panic!("the till is jammed"))
        .named("charge")
        .handler(async |_, _, _| Ok(()))
        .compensate(async |_, _, _| Err(HandlerError::from("no label")))
        .named("label")
        .handler(async |_, _, _| Err(HandlerError::permanent("no dock")))
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().dead_lettered == 1).await;
    assert_eq!(diary.lines(), ["reserve 1", "release 1"]);
    let text = dead(&world, "g").await[0].errors[0].text.clone();
    let expected = "no dock; beside it the compensation of label failed: no label; \
        beside it the compensation of charge failed: charge panicked: the till is jammed";
    assert_eq!(text, expected);
}

#[tokio::test]
async fn a_step_and_a_chain_are_cut_off_by_their_time_outs() {
    use postrider_core::consumer::Timeout;
    let world = World::start(options()).await;
    let diary = Diary::default();
    let of_step = world
        .bus
        .subscribe::<OrderPlaced>("step")
        .state(diary.clone())
        .retry(Retry::none())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |_, _, _| std::future::pending().await)
        .named("ask")
        .timeout(secs(5))
        .start()
        .await
        .unwrap();
    let of_chain = world
        .bus
        .subscribe::<OrderPlaced>("chain")
        .middleware(Timeout::after(secs(7)))
        .state(diary.clone())
        .retry(Retry::none())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |_, _, _| std::future::pending().await)
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| diary.lines().len() == 2).await;
    world.pass(secs(4)).await;
    assert_eq!(of_step.report().dead_lettered, 0);
    world.pass(secs(2)).await;
    world.until(|_| of_step.report().dead_lettered == 1).await;
    assert_eq!(of_chain.report().dead_lettered, 0);
    world.pass(secs(2)).await;
    world.until(|_| of_chain.report().dead_lettered == 1).await;
    assert_eq!(diary.lines(), ["reserve 1", "reserve 1", "release 1", "release 1"]);
    let text = |dead: Vec<postrider_core::log::Stored>| dead[0].errors[0].text.clone();
    assert_eq!(text(dead(&world, "step").await), "the step ask took longer than 5s");
    assert_eq!(text(dead(&world, "chain").await), "the chain took longer than 7s");
}

#[tokio::test]
async fn a_closure_with_state_is_a_step_like_any_other() {
    let world = World::start(options()).await;
    let state = Arc::new((Diary::default(), Duration::from_millis(1)));
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .state(state.clone())
        .handler(async |(diary, _), order, ctx| {
            diary.note(format!("{} in {}", order.id, ctx.group()));
            Ok(())
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| running.report().handled == 1).await;
    assert_eq!(state.0.lines(), ["1 in g"]);
}
