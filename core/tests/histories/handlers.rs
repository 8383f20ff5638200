//! Handlers that do what a plan says for each message, and note what takes effect.

use crate::{
    dice::Dice,
    ledger::Effect,
    log::Connection,
    process::{Process, Reach},
    world::{id, short},
};
use postrider_core::{
    Context, Event, HandlerError, HandlerResult, Message, MessageId, OnFailure, Retry, Running, Topic, Transactional,
    consumer::{Batch, BatchContext, SubscriptionOptions},
};
use serde::{Deserialize, Serialize};
use std::{
    cell::RefCell,
    collections::{BTreeMap, VecDeque},
    num::NonZeroUsize,
    sync::{Arc, Mutex},
    time::Duration,
};

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "job", topic = "jobs", key = "key")]
pub(crate) struct Job {
    pub(crate) n: u64,
    pub(crate) key: String,
}

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "task", topic = "jobs", key = "key")]
pub(crate) struct Task {
    pub(crate) n: u64,
    pub(crate) key: String,
}

/// How a group handles its messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    Plain,
    Transactional,
    /// Several in one transaction.
    Sharing(usize),
    /// Several in one call.
    Batched(usize),
    Durable {
        undoes_itself: bool,
    },
    /// Jobs plain, tasks in transactions.
    Mixed,
}

impl Kind {
    pub(crate) fn any(dice: &mut Dice) -> Self {
        match dice.roll(7) {
            0 => Self::Plain,
            1 => Self::Transactional,
            2 => Self::Sharing(dice.between(2, 6)),
            3 => Self::Batched(dice.between(2, 6)),
            4 | 5 => Self::Durable {
                undoes_itself: dice.roll(2) == 0,
            },
            _ => Self::Mixed,
        }
    }

    /// How many steps have an effect in a transaction, for a message of a type.
    pub(crate) fn steps(self, is_task: bool) -> u8 {
        match self {
            Self::Plain | Self::Batched(_) => 0,
            Self::Transactional | Self::Sharing(_) => 1,
            Self::Durable { .. } => 3,
            Self::Mixed => u8::from(is_task),
        }
    }
}

/// What a handler does with a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Act {
    Slow(Duration),
    Fails,
    Panics,
    RetryAfter(Duration),
    Unavailable,
    Permanent,
}

/// What the handlers of a group do, in the order they are asked. With nothing left they succeed.
#[derive(Debug, Default)]
pub(crate) struct Plans(Mutex<BTreeMap<MessageId, Plan>>);

#[derive(Debug, Default)]
struct Plan {
    acts: VecDeque<Act>,
    fails_for_ever: bool,
}

impl Plans {
    pub(crate) fn make(&self, of: MessageId, dice: &mut Dice) {
        let mut plan = Plan::default();
        let act = |dice: &mut Dice| match dice.roll(12) {
            0..4 => Act::Fails,
            4 | 5 => Act::Panics,
            6 => Act::RetryAfter(dice.millis(1, 8_000)),
            7 | 8 => Act::Unavailable,
            _ => Act::Slow(dice.millis(1, 4_000)),
        };
        match dice.roll(100) {
            0..60 => {}
            60..96 => plan.acts.extend((0..dice.between(1, 3)).map(|_| act(dice))),
            96 | 97 => plan.acts.push_back(Act::Permanent),
            _ => plan.fails_for_ever = true,
        }
        self.0.lock().unwrap().insert(of, plan);
    }

    fn next(&self, of: MessageId) -> Option<Act> {
        let mut plans = self.0.lock().unwrap();
        let plan = plans.get_mut(&of)?;
        plan.acts.pop_front().or(plan.fails_for_ever.then_some(Act::Fails))
    }
}

/// Where a handler runs.
#[derive(Debug)]
pub(crate) struct Site {
    reach: Reach,
    plans: Arc<Plans>,
}

impl Site {
    /// Goes on once the process does, and never in one that is dead.
    async fn alive(&self) {
        if self.reach.life.pass().await.is_err() {
            std::future::pending::<()>().await;
        }
    }

    async fn begin(&self, of: MessageId, step: u8) -> Option<Act> {
        self.alive().await;
        self.reach.world.ledger.began(of);
        let act = self.plans.next(of);
        self.reach.world.note(format_args!(
            "{} handles {} step {step}: {act:?}",
            self.reach.name,
            short(of)
        ));
        if let Some(Act::Slow(length)) = act {
            self.reach.clock.sleep(length).await;
        }
        act
    }

    fn outcome(&self, of: MessageId, act: Option<Act>) -> HandlerResult {
        let ledger = &self.reach.world.ledger;
        match act {
            None | Some(Act::Slow(_) | Act::Unavailable) => {}
            Some(_) => ledger.handled(of, |handled| handled.failures += 1),
        }
        match act {
            None | Some(Act::Slow(_)) => Ok(()),
            Some(Act::Fails) => Err("no".into()),
            Some(Act::Panics) => std::panic::resume_unwind(Box::new("a panic")),
            Some(Act::RetryAfter(wait)) => Err(HandlerError::retry_after(wait, "later")),
            Some(Act::Unavailable) => Err(HandlerError::unavailable("the bank is closed")),
            Some(Act::Permanent) => {
                ledger.handled(of, |handled| handled.permanent = true);
                Err(HandlerError::permanent("never"))
            }
        }
    }

    /// One step of a chain.
    async fn step(&self, step: u8, ctx: &mut Context, with_barrier: bool) -> HandlerResult {
        let of = ctx.message().id();
        let act = self.begin(of, step).await;
        if ctx.has_transaction() {
            let goes = match with_barrier {
                true => {
                    let barrier = ctx.barrier(&step.to_string()).await?;
                    barrier.forward(ctx.transaction()?).await?
                }
                false => true,
            };
            if goes {
                let effect = Effect {
                    id: of,
                    step,
                    change: 1,
                };
                ctx.tx::<Connection>()?.effects.push(effect);
            }
            ctx.publish(Message::new(Topic::new("out"), "done.v1", step.to_string()))
                .await?;
        }
        self.alive().await;
        let result = self.outcome(of, act);
        if result.is_ok() && !ctx.has_transaction() {
            self.reach.world.ledger.succeeded(of);
        }
        result
    }

    async fn undo(&self, step: u8, ctx: &mut Context) -> HandlerResult {
        let of = ctx.message().id();
        self.alive().await;
        let world = &self.reach.world;
        let rates = world.rates();
        if world.fault(|dice| dice.chance(rates.log_fails)) {
            return Err(HandlerError::unavailable("the bank is closed"));
        }
        world.note(format_args!("{} takes back {} step {step}", self.reach.name, short(of)));
        let barrier = ctx.barrier(&step.to_string()).await?;
        if barrier.compensate(ctx.transaction()?).await? {
            let effect = Effect {
                id: of,
                step,
                change: -1,
            };
            ctx.tx::<Connection>()?.effects.push(effect);
        }
        self.alive().await;
        Ok(())
    }
}

thread_local! {
    /// Handlers of batches have no state: where each runs, by its bus's publisher.
    static SITES: RefCell<BTreeMap<usize, Arc<Site>>> = const { RefCell::new(BTreeMap::new()) };
}

fn place_of(bus: &postrider_core::Bus) -> usize {
    Arc::as_ptr(bus.transport().publisher().unwrap()).cast::<()>() as usize
}

async fn handle_together(jobs: &[Job], ctx: &mut BatchContext) -> Vec<HandlerResult> {
    let place = place_of(ctx.of(0).bus());
    let site = SITES.with_borrow(|sites| sites[&place].clone());
    let mut acts = Vec::new();
    for job in jobs {
        acts.push(site.begin(id(job.n), 0).await);
    }
    site.alive().await;
    if acts.contains(&Some(Act::Panics)) {
        for job in jobs {
            site.reach
                .world
                .ledger
                .handled(id(job.n), |handled| handled.failures += 1);
        }
        std::panic::resume_unwind(Box::new("a panic"));
    }
    let each = jobs.iter().zip(acts).map(|(job, act)| {
        let result = site.outcome(id(job.n), act);
        if result.is_ok() {
            site.reach.world.ledger.succeeded(id(job.n));
        }
        result
    });
    each.collect()
}

fn most(n: usize) -> NonZeroUsize {
    NonZeroUsize::new(n).unwrap()
}

/// Subscribes a process to the group `g`.
pub(crate) async fn subscribe(
    process: &Process,
    kind: Kind,
    retry: Retry,
    max_in_flight: usize,
    plans: &Arc<Plans>,
) -> postrider_core::Result<Running> {
    let site = Arc::new(Site {
        reach: process.reach.clone(),
        plans: plans.clone(),
    });
    let mut options = SubscriptionOptions::default();
    options.max_in_flight = Some(max_in_flight);
    let jobs = process.bus.subscribe::<Job>("g").retry(retry).options(&options);
    match kind {
        Kind::Plain => {
            let jobs = jobs.state(site);
            jobs.handler(async |site: &Site, _: &Job, ctx| site.step(0, ctx, false).await)
                .start()
                .await
        }
        Kind::Transactional => {
            let jobs = jobs.middleware(Transactional::new()).state(site);
            jobs.handler(async |site: &Site, _: &Job, ctx| site.step(0, ctx, false).await)
                .start()
                .await
        }
        Kind::Sharing(max) => {
            let jobs = jobs.middleware(Transactional::batch(most(max))).state(site);
            jobs.handler(async |site: &Site, _: &Job, ctx| site.step(0, ctx, false).await)
                .start()
                .await
        }
        Kind::Batched(max) => {
            SITES.with_borrow_mut(|sites| sites.insert(place_of(&process.bus), site));
            let how = Batch::of(most(max)).waiting(Duration::from_millis(20));
            jobs.batch_handler(how, handle_together).start().await
        }
        Kind::Durable { undoes_itself } => {
            let on_failure = match undoes_itself {
                true => OnFailure::StopAndCompensateSelf,
                false => OnFailure::Stop,
            };
            jobs.durable()
                .state(site)
                .handler(async |site: &Site, _: &Job, ctx| site.step(0, ctx, true).await)
                .compensate(async |site: &Site, _: &Job, ctx| site.undo(0, ctx).await)
                .on_failure(on_failure)
                .named("one")
                .handler(async |site: &Site, _: &Job, ctx| site.step(1, ctx, true).await)
                .compensate(async |site: &Site, _: &Job, ctx| site.undo(1, ctx).await)
                .on_failure(on_failure)
                .named("two")
                .handler(async |site: &Site, _: &Job, ctx| site.step(2, ctx, true).await)
                .compensate(async |site: &Site, _: &Job, ctx| site.undo(2, ctx).await)
                .named("three")
                .start()
                .await
        }
        Kind::Mixed => {
            jobs.state(site)
                .handler(async |site: &Site, _: &Job, ctx| site.step(0, ctx, false).await)
                .and::<Task>()
                .middleware(Transactional::new())
                .handler(async |site: &Site, _: &Task, ctx| site.step(0, ctx, false).await)
                .start()
                .await
        }
    }
}
