//! Histories of relays: two at a time on one log, and everything that can go wrong with them.

use crate::{
    dice::Dice,
    ledger::{Book, Committed},
    process::{How, Process},
    publisher::LUCK,
    world::{Rates, World, id, short},
};
use postrider_core::{
    Mailbox, Message, MessageId, RelayOptions, Topic,
    log::{Filter, LogAdmin as _, Page, RecordState, Stats},
    relay::Backoff,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::Arc,
    time::Duration,
};

const TOPICS: [&str; 3] = ["t1", "t2", "t3"];

/// A history that has been made up and is to be lived.
struct Relays {
    world: Arc<World>,
    dice: Dice,
    options: RelayOptions,
    processes: Vec<Process>,
    gone: Vec<Process>,
    started: usize,
    published: u64,
}

pub(crate) fn world(seed: u64) -> Arc<World> {
    let dice = &mut Dice::new(seed ^ 0xC0FFEE);
    // Some histories have trouble of one kind only.
    let rates = Rates {
        log_fails: dice.pick(&[0, 0, 20, 80]),
        log_slow: dice.pick(&[0, 30, 200]),
        calls: dice.pick(&[0, 30, 150]),
        messages: dice.pick(&[0, 30, 150, 400]),
        settles: 0,
        receives: 0,
    };
    World::new(seed, rates)
}

fn options(dice: &mut Dice) -> RelayOptions {
    let batch = dice.pick(&[1, 3, 20]);
    let backoff = match dice.roll(2) {
        0 => Backoff::Fixed(dice.millis(200, 5_000)),
        _ => Backoff::FullJitter {
            min: dice.millis(100, 1_000),
            max: dice.millis(2_000, 20_000),
        },
    };
    RelayOptions::default()
        .with_batch_size(batch)
        .with_max_in_flight(batch * dice.pick(&[1, 2, 8]))
        .with_max_publishing(dice.pick(&[1, 4, 64, 1024]))
        .with_poll_interval(dice.millis(50, 500))
        .with_lease(dice.millis(1_000, 15_000))
        .with_publish_timeout(dice.millis(1_000, 10_000))
        .with_local_max_attempts(u32::try_from(dice.between(1, 3)).unwrap())
        .with_local_interval(dice.millis(100, 3_000))
        .with_local_queue_expiry(dice.millis(1_000, 60_000))
        .with_max_attempts(u32::try_from(dice.between(2, 6)).unwrap())
        .with_backoff(backoff)
        .with_min_retry_interval(dice.millis(1_000, 60_000))
        .with_retry_batch(dice.pick(&[1, 3, 100]))
        .with_max_probe_interval(dice.millis(500, 10_000))
        .with_retention(dice.pick(&[Duration::ZERO, Duration::from_secs(3 * 3600)]))
}

pub(crate) async fn live(world: Arc<World>, seed: u64) {
    let mut dice = Dice::new(seed);
    let options = options(&mut dice);
    world.note(format_args!("{:?} {options:?}", world.rates()));
    let mut relays = Relays {
        world,
        dice,
        options,
        processes: Vec::new(),
        gone: Vec::new(),
        started: 0,
        published: 0,
    };
    relays.start().await;
    relays.start().await;
    let steps = relays.dice.between(30, 70);
    for _ in 0..steps {
        relays.step().await;
        let pause = match relays.dice.roll(8) {
            0..4 => Duration::ZERO,
            4..7 => relays.dice.millis(1, 300),
            _ => relays.dice.millis(300, 8_000),
        };
        relays.world.pass(pause).await;
    }
    relays.come_to_rest().await;
    relays.check().await;
}

impl Relays {
    async fn start(&mut self) {
        self.started += 1;
        let name = format!("p{}", self.started);
        let process = Process::new(&self.world, &name, self.options.clone(), self.dice.number());
        process.start().await;
        self.processes.push(process);
    }

    /// A process that is to end, and one that takes its place.
    async fn replace(&mut self, with: impl AsyncFnOnce(&Process, &mut Dice)) {
        let at = self.dice.roll(self.processes.len());
        let process = self.processes.remove(at);
        with(&process, &mut self.dice).await;
        self.gone.push(process);
        self.world.pass(self.dice.millis(0, 2_000)).await;
        self.start().await;
    }

    async fn step(&mut self) {
        match self.dice.roll(40) {
            0..24 => self.publish(),
            24..27 => self.replace(async |process, _| process.crash()).await,
            27..30 => {
                let at = self.dice.roll(self.processes.len());
                let length = self.options.lease.mul_f64(self.dice.pick(&[0.3, 1.0, 1.5, 3.0]));
                self.processes[at].freeze(length);
            }
            30 => {
                self.replace(async |process, dice| {
                    process.thaw();
                    let _ = process.shut_down(dice.millis(0, 12_000)).await;
                })
                .await;
            }
            31 | 32 => {
                // As when the machine sleeps.
                let jump = self.options.lease.mul_f64(self.dice.pick(&[0.5, 1.0, 2.0]));
                self.world.note(format_args!("the clock jumps by {jump:?}"));
                self.world.clock.advance(jump);
            }
            33 | 34 => {
                let away = self.dice.pick(&[None, Some(false), Some(true)]);
                self.world.set_topic_away(away);
            }
            35 | 36 => {
                let is_down = self.dice.roll(2) == 0;
                self.world.note(format_args!("the broker is down: {is_down}"));
                self.world.broker.faults().set_down(is_down);
            }
            37 => {
                self.note_dead_letters().await;
                let filter = Filter::of(Mailbox::outbox());
                let redriven = self.world.log.redrive(&filter, 100).await.unwrap();
                self.world.note(format_args!("{redriven} are redriven"));
            }
            _ => {}
        }
        self.note_dead_letters().await;
    }

    fn publish(&mut self) {
        let dice = &mut self.dice;
        let topic = Topic::parse(dice.pick(&TOPICS)).unwrap();
        let messages = (0..dice.pick(&[1, 1, 2, 5]))
            .map(|_| {
                self.published += 1;
                let message = Message::new(topic.clone(), "test.v1", format!("{}", self.published))
                    .with_source("test")
                    .with_id(id(self.published));
                let message = match dice.roll(60) {
                    0 => message.with_header(LUCK, "rejected"),
                    1 => message.with_header(LUCK, "invalid"),
                    2 => message.with_header(LUCK, "deadly"),
                    _ => message,
                };
                match dice.roll(6) {
                    0 => message,
                    key => message.with_key(format!("k{}", key % 4)),
                }
            })
            .collect();
        let how = match dice.roll(10) {
            0..5 => How::Each,
            5 | 6 => How::Together,
            7 => How::After(dice.millis(1, 20_000)),
            _ => How::InTransaction {
                commits: dice.roll(4) > 0,
                wait: dice.millis(0, 400),
            },
        };
        let at = dice.roll(self.processes.len());
        self.processes[at].publish(messages, how);
    }

    async fn stored(&self, state: RecordState) -> Vec<postrider_core::log::Stored> {
        let filter = Filter::of(Mailbox::outbox()).with_state(state);
        self.world.log.list(&filter, &Page::first(1000)).await.unwrap().entries
    }

    /// A dead letter has to have a reason.
    async fn note_dead_letters(&self) {
        for stored in self.stored(RecordState::Failed).await {
            let (id, max) = (stored.message.id(), self.options.max_attempts);
            let told = {
                let mut book = self.world.ledger.book();
                if book.failed.insert(id) {
                    *book.counts.entry("dead letters").or_default() += 1;
                }
                book.told.get(&id).copied().unwrap_or_default()
            };
            if told.invalid == 0 && stored.attempts < max {
                self.world.broken(format!(
                    "{} is a dead letter after {} of {max} attempts: {:?}",
                    short(id),
                    stored.attempts,
                    stored.errors
                ));
            }
            self.check_attempts(id, stored.attempts);
        }
    }

    /// Only what was said of the message counts.
    fn check_attempts(&self, id: MessageId, attempts: u32) {
        let told = self.world.ledger.book().told.get(&id).copied().unwrap_or_default();
        let most = told.rejected + told.invalid + told.unknown / 2;
        if attempts > most {
            self.world
                .broken(format!("{} has {attempts} attempts, and was told {told:?}", short(id)));
        }
    }

    async fn stats(&self) -> Stats {
        let stats = self.world.log.stats().await.unwrap();
        stats.get(&Mailbox::outbox()).copied().unwrap_or_default()
    }

    /// Nothing goes wrong any more: everything comes to its end.
    async fn come_to_rest(&mut self) {
        self.world.note(format_args!("nothing goes wrong any more"));
        self.world.calm();
        self.world.broker.faults().clear();
        self.world.set_topic_away(None);
        self.processes.iter().chain(&self.gone).for_each(Process::thaw);
        // What was on its way arrives, appends and ghosts included.
        self.world.pass(Duration::from_secs(90)).await;
        let mut left = self.stats().await;
        for _ in 0..600 {
            if left.pending == 0 {
                break;
            }
            self.world.pass(Duration::from_secs(3)).await;
            left = self.stats().await;
        }
        self.note_dead_letters().await;
        if left.pending > 0 {
            let pending = self.stored(RecordState::Pending).await;
            let ids: Vec<String> = pending.iter().map(|stored| short(stored.message.id())).collect();
            self.world.broken(format!("{} are never sent", ids.join(" ")));
        }
        for process in std::mem::take(&mut self.processes) {
            if let Err(error) = process.shut_down(Duration::from_secs(10)).await {
                self.world
                    .broken(format!("{} could not shut down in peace: {error}", process.name()));
            }
            self.gone.push(process);
        }
    }

    async fn check(&self) {
        for stored in self.stored(RecordState::Succeeded).await {
            self.check_attempts(stored.message.id(), stored.attempts);
        }
        let mut broken = Vec::new();
        check_sent(&self.world.ledger.book(), &mut broken);
        check_order(&self.world.ledger.book(), &mut broken);
        broken.into_iter().for_each(|what| self.world.broken(what));
    }
}

/// Whatever was committed was sent, or is a dead letter.
fn check_sent(book: &Book, broken: &mut Vec<String>) {
    let arrived: BTreeSet<MessageId> = book.arrived.iter().map(|(id, _)| *id).collect();
    for Committed { id, .. } in &book.committed {
        if !arrived.contains(id) && !book.failed.contains(id) {
            broken.push(format!("{} is lost", short(*id)));
        }
    }
}

/// First appearances of a key are in the order of commits; what is delayed or was a dead letter has given up its place.
fn check_order(book: &Book, broken: &mut Vec<String>) {
    let mut wanted: BTreeMap<(&str, &str), Vec<MessageId>> = BTreeMap::new();
    for committed in &book.committed {
        if let (Some(key), None) = (&committed.key, committed.due)
            && !book.failed.contains(&committed.id)
        {
            wanted.entry((&committed.topic, key)).or_default().push(committed.id);
        }
    }
    let mut first: BTreeMap<MessageId, usize> = BTreeMap::new();
    for (at, (id, _)) in book.arrived.iter().enumerate() {
        first.entry(*id).or_insert(at);
    }
    for ((topic, key), ids) in wanted {
        let sent: Vec<MessageId> = ids.iter().copied().filter(|id| first.contains_key(id)).collect();
        if !sent.is_sorted_by_key(|id| first[id]) {
            let mut got = sent.clone();
            got.sort_by_key(|id| first[id]);
            let names = |ids: &[MessageId]| ids.iter().map(|id| short(*id)).collect::<Vec<_>>().join(" ");
            broken.push(format!(
                "{topic} {key} came as {} in place of {}",
                names(&got),
                names(&sent)
            ));
        }
    }
}
