//! Histories of consumers: one to three members of a group, and everything that can go wrong with them.

use crate::{
    dice::Dice,
    handlers::{Kind, Plans, subscribe},
    ledger::{Book, Handled},
    process::Process,
    world::{Rates, World, id, short},
};
use futures_util::FutureExt as _;
use postrider_core::{
    GroupName, Mailbox, Message, MessageId, Publisher as _, RelayOptions, Retry, Running, Subscriber as _,
    Subscription, Topic,
    log::{Filter, LogAdmin as _, Page, RecordState, Stored},
    publisher::Outcomes,
    relay::Backoff,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

/// A message that was published.
#[derive(Debug)]
struct Sent {
    message: Message,
    is_task: bool,
}

/// A history that has been made up and is to be lived.
struct Consumers {
    world: Arc<World>,
    dice: Dice,
    relay: RelayOptions,
    kind: Kind,
    retry: Retry,
    max_in_flight: usize,
    plans: Arc<Plans>,
    members: Vec<(Process, Running)>,
    gone: Vec<Process>,
    started: usize,
    sent: Vec<Sent>,
}

pub(crate) fn world(seed: u64) -> Arc<World> {
    let dice = &mut Dice::new(seed ^ 0xBEEF);
    // Some histories have trouble of one kind only.
    let rates = Rates {
        log_fails: dice.pick(&[0, 0, 20, 80]),
        log_slow: dice.pick(&[0, 30, 200]),
        calls: 0,
        messages: 0,
        settles: dice.pick(&[0, 50, 200]),
        receives: dice.pick(&[0, 20]),
    };
    World::new(seed, rates)
}

fn inbox() -> Mailbox {
    Mailbox::Inbox(GroupName::new("g"))
}

pub(crate) async fn live(world: Arc<World>, seed: u64) {
    let mut dice = Dice::new(seed);
    let relay = RelayOptions::default()
        .with_batch_size(dice.pick(&[2, 20]))
        .with_poll_interval(dice.millis(50, 500))
        .with_lease(dice.millis(1_000, 10_000))
        .with_max_probe_interval(dice.millis(500, 10_000));
    let retry = Retry::default()
        .with_max_attempts(u32::try_from(dice.between(2, 5)).unwrap())
        .with_in_place(u32::try_from(dice.between(1, 3)).unwrap())
        .with_waits(dice.millis(10, 100), dice.millis(200, 2_000))
        .with_backoff(Backoff::Fixed(dice.millis(500, 6_000)));
    let kind = Kind::any(&mut dice);
    let mut consumers = Consumers {
        world,
        relay,
        kind,
        retry,
        max_in_flight: dice.pick(&[1, 4, 32]),
        plans: Arc::default(),
        members: Vec::new(),
        gone: Vec::new(),
        started: 0,
        sent: Vec::new(),
        dice,
    };
    consumers.world.note(format_args!(
        "{kind:?} {:?} {retry:?} {:?} max_in_flight {}",
        consumers.world.rates(),
        consumers.relay,
        consumers.max_in_flight
    ));
    for _ in 0..consumers.dice.between(1, 3) {
        if consumers.dice.roll(2) == 0 {
            consumers.publish().await;
        }
        consumers.join().await;
    }
    let steps = consumers.dice.between(25, 60);
    for _ in 0..steps {
        consumers.step().await;
        let pause = match consumers.dice.roll(8) {
            0..4 => Duration::ZERO,
            4..7 => consumers.dice.millis(1, 300),
            _ => consumers.dice.millis(300, 8_000),
        };
        consumers.world.pass(pause).await;
    }
    consumers.come_to_rest().await;
    consumers.check().await;
}

impl Consumers {
    /// Another process joins the group.
    async fn join(&mut self) {
        self.started += 1;
        let name = format!("p{}", self.started);
        let process = Process::new(&self.world, &name, self.relay.clone(), self.dice.number());
        process.start().await;
        let running = self.subscribe(&process).await;
        self.members.push((process, running));
    }

    async fn subscribe(&self, process: &Process) -> Running {
        loop {
            match subscribe(process, self.kind, self.retry, self.max_in_flight, &self.plans).await {
                Ok(running) => return running,
                Err(error) => self
                    .world
                    .note(format_args!("{} could not subscribe: {error}", process.name())),
            }
            self.world.pass(Duration::from_millis(200)).await;
        }
    }

    fn any(&mut self) -> usize {
        self.dice.roll(self.members.len())
    }

    /// A process that is gone, and another in its place.
    async fn replace(&mut self, process: Process) {
        self.gone.push(process);
        self.world.pass(self.dice.millis(0, 2_000)).await;
        self.join().await;
    }

    async fn step(&mut self) {
        match self.dice.roll(40) {
            0..24 => self.publish().await,
            24 | 25 => self.publish_again().await,
            26 | 27 => {
                let at = self.any();
                let (process, _) = self.members.remove(at);
                process.crash();
                self.replace(process).await;
            }
            28..31 => {
                let at = self.any();
                let length = self.relay.lease.mul_f64(self.dice.pick(&[0.3, 1.0, 1.5, 3.0]));
                let process = &self.members[at].0;
                process.freeze(length);
                // The broker gives up on it, or does not.
                if self.dice.roll(2) == 0 {
                    process.reach.evict().await;
                }
            }
            31 | 32 => {
                let at = self.any();
                self.world
                    .note(format_args!("{} loses its place", self.members[at].0.name()));
                self.world.ledger.book().interruptions += 1;
                self.members[at].0.reach.evict().await;
            }
            33 => {
                let at = self.any();
                let running = self.members[at].1.clone();
                let length = self.dice.millis(1, 10_000);
                self.world
                    .note(format_args!("{} pauses for {length:?}", self.members[at].0.name()));
                running.pause();
                let world = self.world.clone();
                tokio::spawn(async move {
                    world.pass(length).await;
                    running.resume();
                });
            }
            34 => {
                // It leaves the group, and joins it anew.
                let at = self.any();
                let (process, running) = self.members.remove(at);
                process.thaw();
                let deadline = self.dice.millis(0, 5_000);
                self.world
                    .note(format_args!("{} stops within {deadline:?}", process.name()));
                self.world.ledger.book().interruptions += 1;
                let began = self.world.elapsed();
                let _ = running.stop(deadline).await;
                process.bounded("the stop", began, deadline);
                self.world.note(format_args!("{} has stopped", process.name()));
                let running = self.subscribe(&process).await;
                self.members.push((process, running));
            }
            35 => {
                let at = self.any();
                let (process, _) = self.members.remove(at);
                process.thaw();
                let _ = process.shut_down(self.dice.millis(0, 8_000)).await;
                self.replace(process).await;
            }
            36 => {
                let jump = self.relay.lease.mul_f64(self.dice.pick(&[0.5, 1.0, 2.0]));
                self.world.note(format_args!("the clock jumps by {jump:?}"));
                self.world.ledger.book().interruptions += 1;
                self.world.clock.advance(jump);
            }
            37 => {
                self.note_dead_letters().await;
                let redriven = self.world.log.redrive(&Filter::of(inbox()), 100).await.unwrap();
                self.world.note(format_args!("{redriven} are redriven"));
            }
            38 => {
                let at = self.any();
                self.members[at].1.set_max_in_flight(self.dice.pick(&[1, 3, 20]));
            }
            _ => {}
        }
        self.note_dead_letters().await;
    }

    async fn publish(&mut self) {
        for _ in 0..self.dice.pick(&[1, 1, 2, 5]) {
            let n = self.sent.len() as u64 + 1;
            let key = self.dice.roll(5);
            let is_task = self.kind == Kind::Mixed && self.dice.roll(2) == 0;
            let kind = if is_task { "task.v1" } else { "job.v1" };
            let text = format!(r#"{{"n":{n},"key":"k{key}"}}"#);
            let message = Message::new(Topic::new("jobs"), kind, text)
                .with_source("test")
                .with_id(id(n));
            let message = match key {
                0 => message,
                key => message.with_key(format!("k{key}")),
            };
            self.plans.make(message.id(), &mut self.dice);
            self.send(&message).await;
            self.sent.push(Sent { message, is_task });
        }
    }

    async fn publish_again(&mut self) {
        if self.sent.is_empty() {
            return;
        }
        let at = self.dice.roll(self.sent.len());
        let message = self.sent[at].message.clone();
        self.send(&message).await;
    }

    async fn send(&self, message: &Message) {
        self.world.note(format_args!(
            "sent {} {}",
            short(message.id()),
            message.key().unwrap_or("")
        ));
        let publish = |outcomes| async move {
            let broker = &self.world.broker;
            broker.publish(std::slice::from_ref(message), &outcomes).await;
        };
        Outcomes::of_one(publish).await.unwrap();
    }

    async fn stored(&self, mailbox: Mailbox, state: RecordState) -> Vec<Stored> {
        let filter = Filter::of(mailbox).with_state(state);
        self.world.log.list(&filter, &Page::first(1000)).await.unwrap().entries
    }

    /// A dead letter has to have a reason.
    async fn note_dead_letters(&self) {
        for stored in self.stored(inbox(), RecordState::Failed).await {
            let (id, max) = (stored.message.id(), self.retry.max_attempts);
            let (handled, interruptions) = {
                let mut book = self.world.ledger.book();
                if book.failed.insert(id) {
                    *book.counts.entry("dead letters").or_default() += 1;
                }
                (book.handled.get(&id).cloned().unwrap_or_default(), book.interruptions)
            };
            let mut most = handled.failures;
            if let Kind::Durable { .. } = self.kind {
                // A step that was cut off may be the fault of the message.
                most += interruptions;
            }
            // One that was begun so often and never ended may be what ends processes.
            let was_cut_off = |text: &str| text.contains("the process ended, or was cut off");
            let is_deadly = interruptions >= max && stored.errors.last().is_some_and(|error| was_cut_off(&error.text));
            let is_exhausted = handled.permanent || is_deadly || stored.attempts >= max;
            if !is_exhausted || stored.attempts > most {
                self.world.broken(format!(
                    "{} is a dead letter after {} of {max} attempts, at most {most} of which count: {:?}",
                    short(id),
                    stored.attempts,
                    stored.errors
                ));
            }
        }
    }

    fn is_done(&self, sent: &Sent, handled: Option<&Handled>) -> bool {
        let Some(handled) = handled else { return false };
        match self.kind.steps(sent.is_task) {
            0 => handled.plain > 0,
            steps => (0..steps).all(|step| handled.committed.get(&step) == Some(&1)),
        }
    }

    /// What is neither handled nor a dead letter, and what still waits in the log.
    async fn left(&self) -> Vec<MessageId> {
        let mut left: Vec<MessageId> = Vec::new();
        for mailbox in [inbox(), Mailbox::outbox()] {
            let pending = self.stored(mailbox, RecordState::Pending).await;
            left.extend(pending.iter().map(|stored| stored.message.id()));
        }
        let failed = self.stored(inbox(), RecordState::Failed).await;
        let failed: BTreeSet<MessageId> = failed.iter().map(|stored| stored.message.id()).collect();
        let book = self.world.ledger.book();
        for sent in &self.sent {
            let id = sent.message.id();
            if !failed.contains(&id) && !self.is_done(sent, book.handled.get(&id)) {
                left.push(id);
            }
        }
        left
    }

    /// Nothing goes wrong any more: everything comes to its end.
    async fn come_to_rest(&mut self) {
        self.world.note(format_args!("nothing goes wrong any more"));
        self.world.calm();
        self.members.iter().for_each(|(process, _)| process.thaw());
        self.world.pass(Duration::from_secs(30)).await;
        let mut left = self.left().await;
        for _ in 0..400 {
            if left.is_empty() {
                break;
            }
            self.world.pass(Duration::from_secs(3)).await;
            left = self.left().await;
        }
        // Repeats are dealt with, too.
        self.world.pass(Duration::from_secs(60)).await;
        self.note_dead_letters().await;
        if !left.is_empty() {
            let ids: Vec<String> = left.iter().map(|id| short(*id)).collect();
            self.world.broken(format!("{} are never handled", ids.join(" ")));
        }
        for (process, _) in std::mem::take(&mut self.members) {
            if let Err(error) = process.shut_down(Duration::from_secs(10)).await {
                self.world
                    .broken(format!("{} could not shut down in peace: {error}", process.name()));
            }
            self.gone.push(process);
        }
    }

    async fn check(&self) {
        let group = Subscription::new(GroupName::new("g"), vec![Topic::new("jobs")]);
        let (mut intake, _settling) = self.world.broker.subscribe(&group).await.unwrap().split();
        if intake.next(100).now_or_never().is_some() {
            self.world
                .broken("the broker still has messages for the group".to_owned());
        }
        let mut broken = Vec::new();
        self.check_effects(&self.world.ledger.book(), &mut broken);
        self.check_order("begun", &self.world.ledger.book().began, &BTreeSet::new(), &mut broken);
        let book = self.world.ledger.book();
        self.check_order("in effect", &book.effects, &book.failed, &mut broken);
        drop(book);
        broken.into_iter().for_each(|what| self.world.broken(what));
    }

    /// What is handled in transactions has its effects once, and a chain is all done or all taken back.
    fn check_effects(&self, book: &Book, broken: &mut Vec<String>) {
        for sent in &self.sent {
            let id = sent.message.id();
            let Some(handled) = book.handled.get(&id) else { continue };
            let in_force: i32 = handled.committed.values().sum();
            let steps = i32::from(self.kind.steps(sent.is_task));
            if in_force != 0 && in_force != steps {
                broken.push(format!("{} is done in part: {:?}", short(id), handled.committed));
            }
        }
        let mut out: BTreeMap<MessageId, u32> = BTreeMap::new();
        for committed in &book.committed {
            *out.entry(committed.id).or_default() += 1;
        }
        for (id, times) in out {
            if times > 1 {
                broken.push(format!("{} was published {times} times", short(id)));
            }
        }
    }

    fn check_order(&self, what: &str, order: &[MessageId], but: &BTreeSet<MessageId>, broken: &mut Vec<String>) {
        let place: BTreeMap<MessageId, usize> = order.iter().enumerate().map(|(at, id)| (*id, at)).collect();
        let mut of_key: BTreeMap<&str, Vec<MessageId>> = BTreeMap::new();
        for sent in &self.sent {
            let id = sent.message.id();
            if let Some(key) = sent.message.key()
                && place.contains_key(&id)
                && !but.contains(&id)
            {
                of_key.entry(key).or_default().push(id);
            }
        }
        for (key, ids) in of_key {
            if !ids.is_sorted_by_key(|id| place[id]) {
                let mut got = ids.clone();
                got.sort_by_key(|id| place[id]);
                let names = |ids: &[MessageId]| ids.iter().map(|id| short(*id)).collect::<Vec<_>>().join(" ");
                broken.push(format!(
                    "{key} was {what} as {} in place of {}",
                    names(&got),
                    names(&ids)
                ));
            }
        }
    }
}
