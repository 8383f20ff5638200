//! Chains that survive the death of their process: all done, or all taken back. A process dies here at every boundary: its
//! log answers no more, after so many calls, and it never comes back. (The tests of the databases kill real processes.)

use crate::{
    Diary, OrderPlaced, dead, placed,
    world::{World, options, secs},
};
use async_trait::async_trait;
use postrider_core::{
    Bus, EventLog, GroupName, HandlerError, HandlerResult, MessageId, OnFailure, RelayOptions, Result, Retry, Running,
    Transport,
    log::{Admission, Arrival, GroupMember, InboxLog, Lent, Note, RegisteredMember},
    relay::Backoff,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

/// An inbox that answers so many calls, and then dies: before the call has its effect, or after.
#[derive(Debug)]
struct Mortal {
    inner: Arc<dyn InboxLog>,
    left: Arc<AtomicU32>,
    dies_after: bool,
}

impl Mortal {
    /// Whether the call may begin, and whether it may end.
    fn lives(&self) -> (bool, bool) {
        let before = self
            .left
            .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| Some(n.saturating_sub(1)))
            .unwrap();
        match before {
            0 => (false, false),
            1 => (self.dies_after, false),
            _ => (true, true),
        }
    }
}

#[async_trait]
impl InboxLog for Mortal {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        self.inner.admit(tx, group, arrivals).await
    }
    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        self.inner.look(group, arrivals).await
    }
    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        self.inner.note(tx, group, id).await
    }
    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        let (begins, ends) = self.lives();
        if !begins {
            std::future::pending::<()>().await;
        }
        let written = self.inner.write_note(tx, group, id, expected, text).await;
        if !ends {
            std::future::pending::<()>().await;
        }
        written
    }
    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        self.inner.register(group, member, retention).await
    }
    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        self.inner.members(group, retention).await
    }
}

/// The effects of a chain, each as often as it is in force, and what was done to get there.
#[derive(Debug, Default, Clone)]
struct Effects(Diary);

impl Effects {
    /// How often a step's effect is in force, minus how often it was taken back. Effects and compensations are repeatable
    /// here, as the handlers' contract asks: a step that is taken back twice is gone all the same.
    fn of(&self, step: &str) -> bool {
        let mut in_force = false;
        for line in self.0.lines() {
            match line.split_once(' ') {
                Some(("do", s)) if s == step => in_force = true,
                Some(("undo", s)) if s == step => in_force = false,
                _ => {}
            }
        }
        in_force
    }

    async fn subscribe(&self, bus: &Bus, fails_at: u32) -> Running {
        bus.subscribe::<OrderPlaced>("g")
            .durable()
            .retry(
                Retry::default()
                    .with_max_attempts(2)
                    .with_backoff(Backoff::Fixed(secs(1))),
            )
            .state(Arc::new((self.clone(), fails_at)))
            .handler(async |(effects, fails_at), _, _| effects.act("one", *fails_at == 1))
            .compensate(async |(effects, _), _, _| effects.undo("one"))
            .named("one")
            .handler(async |(effects, fails_at), _, _| effects.act("two", *fails_at == 2))
            .compensate(async |(effects, _), _, _| effects.undo("two"))
            .named("two")
            .handler(async |(effects, fails_at), _, _| effects.act("three", *fails_at == 3))
            .compensate(async |(effects, _), _, _| effects.undo("three"))
            .named("three")
            .start()
            .await
            .unwrap()
    }

    fn act(&self, step: &str, fails: bool) -> HandlerResult {
        if fails {
            return Err(HandlerError::permanent(format!("no {step}")));
        }
        self.0.note(format!("do {step}"));
        Ok(())
    }
    fn undo(&self, step: &str) -> HandlerResult {
        self.0.note(format!("undo {step}"));
        Ok(())
    }
}

fn short_lease() -> RelayOptions {
    options().with_lease(secs(10))
}

/// A process on the world's log and broker that dies after so many writes of how far it is.
fn mortal(world: &World, writes: u32, dies_after: bool) -> (Bus, Arc<AtomicU32>) {
    let left = Arc::new(AtomicU32::new(writes));
    let log = EventLog::from(world.log.clone());
    let inner = log.inbox().unwrap().clone();
    let mortal = Mortal {
        inner,
        left: left.clone(),
        dies_after,
    };
    let bus = Bus::builder()
        .log(log.with_inbox(mortal))
        .transport(Transport::from(world.transport.clone()))
        .relay(short_lease())
        .clock(world.clock.clone())
        .build()
        .unwrap();
    (bus, left)
}

async fn dies_at(writes: u32, dies_after: bool, fails_at: u32) -> bool {
    let world = World::start(short_lease()).await;
    let effects = Effects::default();
    let (bus, left) = mortal(&world, writes, dies_after);
    let first = effects.subscribe(&bus, fails_at).await;
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.until(|_| first.report().parked == 1).await;
    for _ in 0..3 {
        world.pass(secs(1)).await;
    }
    let has_died = left.load(Ordering::SeqCst) == 0;
    // Killed: its lease is renewed no more.
    let _ = bus.shutdown(std::time::Duration::ZERO).await;
    let (next, _) = mortal(&world, u32::MAX, false);
    let second = effects.subscribe(&next, fails_at).await;
    for _ in 0..40 {
        world.pass(secs(1)).await;
    }
    let at = format!(
        "died at write {writes}, {dies_after}; step {fails_at} fails: {:?}",
        effects.0.lines()
    );
    let steps = ["one", "two", "three"];
    let in_force: Vec<bool> = steps.iter().map(|step| effects.of(step)).collect();
    if fails_at == 0 {
        assert_eq!(in_force, [true; 3], "{at}");
        assert_eq!(dead(&world, "g").await.len(), 0, "{at}");
    } else {
        assert_eq!(in_force, [false; 3], "{at}");
        assert_eq!(dead(&world, "g").await.len(), 1, "{at}");
    }
    drop(second);
    has_died
}

#[tokio::test]
async fn a_chain_ends_all_done_or_all_taken_back_wherever_its_process_dies() {
    for fails_at in 0..=3 {
        let mut deaths = 0;
        for writes in 1..40 {
            let before = dies_at(writes, false, fails_at).await;
            let after = dies_at(writes, true, fails_at).await;
            deaths += u32::from(before) + u32::from(after);
            if !before && !after {
                break;
            }
        }
        assert!(deaths >= 6, "there were boundaries to die at: {deaths}");
    }
}

#[tokio::test]
async fn a_durable_chain_goes_on_where_it_was_when_a_service_was_away() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .durable()
        .state(diary.clone())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .handler(async |diary, _, _| {
            diary.note("ask");
            if diary.count("ask") < 3 {
                return Err(HandlerError::unavailable("the bank is closed"));
            }
            Ok(())
        })
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    for _ in 0..5 {
        world.pass(secs(2)).await;
    }
    world.until(|_| running.report().handled == 1).await;
    assert_eq!(
        diary.lines(),
        ["reserve 1", "ask", "ask", "ask"],
        "what is done stays done"
    );
}

#[tokio::test]
async fn a_compensation_that_fails_leaves_it_to_a_person_whose_redrive_tries_it_again() {
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("g")
        .durable()
        .state(diary.clone())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .named("reserve")
        .handler(async |diary, _, _| diary.did("charge"))
        .compensate(async |diary, _, _| {
            diary.note("refund");
            if diary.count("refund") < 2 {
                Err("the till is jammed")?
            } else {
                Ok(())
            }
        })
        .named("charge")
        .handler(async |_, _, _| Err("maybe")?)
        .on_failure(OnFailure::Ignore)
        .named("coupon")
        .handler(async |_, _, _| Err(HandlerError::permanent("no dock")))
        .named("ship")
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    world.pass(secs(1)).await;
    world.until(|_| running.report().dead_lettered == 1).await;
    assert_eq!(diary.lines(), ["reserve 1", "charge", "refund", "release 1"]);
    let letters = dead(&world, "g").await;
    let text = &letters[0].errors.last().unwrap().text;
    assert_eq!(
        text,
        "no dock; beside it the compensation of charge failed: the till is jammed"
    );
    let admin = world.bus.log().unwrap().admin().unwrap();
    let inbox = postrider_core::Mailbox::Inbox(GroupName::new("g"));
    admin.redrive(&postrider_core::log::Filter::of(inbox), 1).await.unwrap();
    world.pass(secs(1)).await;
    world.until(|_| running.report().dead_lettered == 2).await;
    assert_eq!(
        diary.lines()[4..],
        ["refund"],
        "what is taken back stays so; what was stuck is tried again"
    );
}

#[tokio::test]
async fn a_durable_chain_waits_as_a_step_says_and_is_taken_back_before_it_may_be_dead() {
    use postrider_core::consumer::Timeout;
    let world = World::start(options()).await;
    let diary = Diary::default();
    let running = world
        .bus
        .subscribe::<OrderPlaced>("later")
        .durable()
        .state(diary.clone())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .named("reserve")
        .handler(async |diary, _, _| {
            diary.note("ask");
            if diary.count("ask") < 2 {
                return Err(HandlerError::retry_after(secs(24 * 3600), "tomorrow"));
            }
            Ok(())
        })
        .named("ask")
        .start()
        .await
        .unwrap();
    let cut = Diary::default();
    let hanging = world
        .bus
        .subscribe::<OrderPlaced>("cut")
        .durable()
        .middleware(Timeout::after(secs(2)))
        .retry(Retry::none().with_backoff(Backoff::Fixed(secs(1))))
        .state(cut.clone())
        .handler(Diary::reserve)
        .compensate(Diary::release)
        .named("reserve")
        .handler(async |_, _, _| std::future::pending().await)
        .named("hang")
        .start()
        .await
        .unwrap();
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    for _ in 0..10 {
        world.pass(secs(2)).await;
    }
    world.until(|_| hanging.report().dead_lettered == 1).await;
    assert_eq!(
        cut.lines(),
        ["reserve 1", "release 1"],
        "cut off, taken back, and then dead"
    );
    assert_eq!(diary.lines(), ["reserve 1", "ask", "release 1"]);
    world.pass(secs(23 * 3600)).await;
    assert_eq!(diary.lines().len(), 3);
    world.pass(secs(2 * 3600)).await;
    world.until(|_| running.report().handled == 1).await;
    assert_eq!(diary.lines()[3..], ["reserve 1", "ask"]);
}

/// A program whose chain has other steps now takes up what had been taken back; what is in the middle is a person's to
/// decide.
#[tokio::test]
async fn a_chain_with_other_steps_takes_up_what_is_not_in_effect() {
    for (ends_with, handled) in [
        (HandlerError::retry_after(secs(60), "later") as HandlerError, 1),
        (HandlerError::unavailable("closed"), 0),
    ] {
        let world = World::start(short_lease()).await;
        let diary = Diary::default();
        let ends_with = Arc::new(std::sync::Mutex::new(Some(ends_with)));
        let before = world
            .bus
            .subscribe::<OrderPlaced>("g")
            .durable()
            .state(Arc::new((diary.clone(), ends_with)))
            .handler(async |(diary, _), _, _| diary.did("reserve"))
            .compensate(async |(diary, _), _, _| diary.did("release"))
            .named("reserve")
            .handler(async |(diary, ends_with), _, _| {
                diary.note("ask");
                ends_with.lock().unwrap().take().map_or(Ok(()), Err)
            })
            .named("ask")
            .start()
            .await
            .unwrap();
        world.bus.publish(&placed(1, "ada")).await.unwrap();
        world.until(|_| diary.count("ask") == 1).await;
        world.settle().await;
        // As if killed, in the second case: it still waits for the service.
        let _ = before.stop(secs(0)).await;
        let after = world
            .bus
            .subscribe::<OrderPlaced>("g")
            .durable()
            .state(diary.clone())
            .handler(async |diary, _, _| diary.did("check"))
            .named("check")
            .handler(async |diary, _, _| diary.did("reserve"))
            .named("reserve")
            .start()
            .await
            .unwrap();
        for _ in 0..60 {
            world.pass(secs(2)).await;
        }
        world
            .until(|_| after.report().handled == handled && after.report().dead_lettered == 1 - handled)
            .await;
        let letters = dead(&world, "g").await;
        match handled {
            1 => assert_eq!(diary.lines(), ["reserve", "ask", "release", "check", "reserve"]),
            _ => {
                assert_eq!(diary.lines(), ["reserve", "ask"], "nothing is done in the dark");
                let text = &letters[0].errors.last().unwrap().text;
                assert!(text.contains("from reserve → ask to check → reserve"), "{text}");
            }
        }
    }
}
