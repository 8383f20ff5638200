//! The broker as a relay reaches it: every kind of outcome, each in its own time. What a publisher looks like is here only.

use crate::{
    process::Reach,
    world::{World, short},
};
use async_trait::async_trait;
use futures_util::future::join_all;
use postrider_core::{
    Message, PublishError, PublishErrorKind, Publisher, Reachability, Scope,
    publisher::{Outcome, Outcomes},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

#[derive(Debug)]
pub(crate) struct FaultyPublisher {
    inner: Arc<dyn Publisher>,
    reach: Reach,
}

/// What becomes of a call as a whole.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Call {
    Goes,
    /// The connection is lost with this message.
    LosesConnection(usize),
    HangsBefore,
    HangsAfter,
    /// What was sent arrives long after the caller has given it up.
    ArrivesLate(Duration),
    PanicsBefore,
    PanicsAfter,
    /// One outcome is never told.
    Forgets,
}

/// What becomes of a message.
#[derive(Debug, Clone, Copy, PartialEq)]
enum OfMessage {
    Confirmed,
    /// It arrives, and the connection is lost before that is told.
    ArrivesAndIsLost,
    Lost,
    Rejected,
    /// The broker says no, and keeps it.
    RejectedAndKept,
    Invalid,
    Destination,
    Unroutable,
    HeldBack,
}

/// Messages that bring bad luck say so in this header.
pub(crate) const LUCK: &str = "luck";

/// Longer than any publish call may take.
const FOR_EVER: Duration = Duration::from_secs(600);

impl FaultyPublisher {
    pub(crate) fn new(inner: Arc<dyn Publisher>, reach: &Reach) -> Self {
        let reach = reach.clone();
        Self { inner, reach }
    }

    fn call(&self, batch: &[Message]) -> Call {
        let rates = self.reach.world.rates();
        self.reach.world.fault(|dice| {
            if !dice.chance(rates.calls) {
                return Call::Goes;
            }
            match dice.roll(11) {
                0..4 => Call::LosesConnection(dice.roll(batch.len())),
                4 => Call::HangsBefore,
                5 => Call::HangsAfter,
                6 | 7 => Call::ArrivesLate(dice.millis(100, 60_000)),
                8 => Call::PanicsBefore,
                9 => Call::PanicsAfter,
                _ => Call::Forgets,
            }
        })
    }

    fn of_message(&self, message: &Message) -> OfMessage {
        let (world, rates) = (&self.reach.world, self.reach.world.rates());
        match message.header(LUCK) {
            Some("rejected") => return OfMessage::Rejected,
            Some("invalid") => return OfMessage::Invalid,
            Some("deadly") => return OfMessage::Lost,
            _ => {}
        }
        match world.topic_away() {
            Some(is_unroutable) if message.topic().as_str() == "t1" => {
                return match is_unroutable {
                    true => OfMessage::Unroutable,
                    false => OfMessage::Destination,
                };
            }
            _ => {}
        }
        world.fault(|dice| {
            if !dice.chance(rates.messages) {
                return OfMessage::Confirmed;
            }
            match dice.roll(12) {
                0..6 => OfMessage::Rejected,
                6 => OfMessage::RejectedAndKept,
                7 => OfMessage::Invalid,
                8 => OfMessage::Destination,
                9 => OfMessage::Unroutable,
                10 => OfMessage::HeldBack,
                _ => OfMessage::ArrivesAndIsLost,
            }
        })
    }

    /// Hands a message to the broker.
    async fn send(&self, message: &Message) -> Outcome {
        send(&self.reach.world, &self.inner, message).await
    }

    async fn one(&self, message: &Message) -> Outcome {
        let (world, id) = (&self.reach.world, message.id());
        let fate = self.of_message(message);
        if fate != OfMessage::Confirmed {
            world.note(format_args!("{} publishes {}: {fate:?}", self.reach.name, short(id)));
        }
        match fate {
            OfMessage::Confirmed => self.send(message).await,
            OfMessage::ArrivesAndIsLost => {
                self.send(message).await?;
                Err(PublishError::connection("lost"))
            }
            OfMessage::Lost => Err(PublishError::connection("lost")),
            OfMessage::Rejected => Err(PublishError::rejected("no")),
            OfMessage::RejectedAndKept => {
                self.send(message).await?;
                Err(PublishError::rejected("no, and yet"))
            }
            OfMessage::Invalid => Err(PublishError::invalid("never")),
            OfMessage::Destination => Err(PublishError::destination("full")),
            OfMessage::Unroutable => Err(PublishError::unroutable("nobody wants it")),
            OfMessage::HeldBack => Err(PublishError::held_back()),
        }
    }

    /// Tells the relay an outcome: none if the process is dead by then.
    async fn report(&self, at: usize, message: &Message, outcome: Outcome, outcomes: &Outcomes) {
        let (says_more, ledger) = (self.reach.world.fault(|dice| dice.chance(20)), &self.reach.world.ledger);
        if self.reach.life.pass().await.is_err() {
            return;
        }
        ledger.told(message.id(), |told| {
            match outcome.as_ref().map_err(PublishError::kind) {
                Err(PublishErrorKind::Unavailable(Scope::Connection)) => {}
                Err(PublishErrorKind::Rejected) => {
                    (told.unknown, told.rejected) = (told.unknown - 1, told.rejected + 1)
                }
                Err(PublishErrorKind::Invalid) => (told.unknown, told.invalid) = (told.unknown - 1, told.invalid + 1),
                _ => told.unknown -= 1,
            }
        });
        outcomes.report(at, outcome);
        if says_more {
            // The first is final.
            outcomes.report(at, Err(PublishError::invalid("said too late")));
        }
    }

    /// One message of a call, in its own time.
    async fn in_its_time(&self, call: Call, at: usize, message: &Message, lost: &Lost, outcomes: &Outcomes) {
        let rates = self.reach.world.rates();
        let wait = self.reach.world.fault(|dice| match dice.chance(rates.calls) {
            true => dice.pick(&[100, 2_000, 9_000, 60_000]),
            false => dice.pick(&[0, 0, 0, 2, 30, 400]),
        });
        self.reach.clock.sleep(Duration::from_millis(wait)).await;
        if call == Call::LosesConnection(at) {
            lost.set();
        }
        // What it would say is not heard.
        let is_unheard = call == Call::HangsAfter || (call == Call::Forgets && at == 0);
        if !lost.get() {
            let outcome = self.one(message).await;
            let connection = PublishErrorKind::Unavailable(Scope::Connection);
            if outcome.as_ref().is_err_and(|error| error.kind() == connection) {
                lost.set();
            }
            if !is_unheard && !lost.get() {
                self.report(at, message, outcome, outcomes).await;
            }
        }
        if lost.get() {
            outcomes.report_rest(Err(PublishError::connection("lost")));
        }
    }
}

/// Whether the connection of a call is lost.
#[derive(Debug, Default)]
struct Lost(AtomicBool);

impl Lost {
    fn set(&self) {
        self.0.store(true, Ordering::SeqCst);
    }
    fn get(&self) -> bool {
        self.0.load(Ordering::SeqCst)
    }
}

async fn send(world: &World, inner: &Arc<dyn Publisher>, message: &Message) -> Outcome {
    let publish = |outcomes| async move { inner.publish(std::slice::from_ref(message), &outcomes).await };
    let outcome = Outcomes::of_one(publish).await;
    if outcome.is_ok() {
        world.arrived(message);
    }
    outcome
}

#[async_trait]
impl Publisher for FaultyPublisher {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        let (world, clock) = (&self.reach.world, &self.reach.clock);
        for message in batch {
            world.ledger.told(message.id(), |told| told.unknown += 1);
        }
        if let Err(error) = self.reach.life.pass().await {
            return outcomes.report_rest(Err(PublishError::connection(error)));
        }
        let call = self.call(batch);
        if call != Call::Goes {
            world.ledger.count("publish calls that failed");
            world.note(format_args!("{} publishes {}: {call:?}", self.reach.name, batch.len()));
        }
        match call {
            Call::HangsBefore => clock.sleep(FOR_EVER).await,
            Call::PanicsBefore => std::panic::resume_unwind(Box::new("a panic")),
            Call::ArrivesLate(late) => {
                let (sent, inner, world) = (batch.to_vec(), self.inner.clone(), world.clone());
                tokio::spawn(async move {
                    world.pass(late).await;
                    for message in sent {
                        let _ = send(&world, &inner, &message).await;
                    }
                });
                clock.sleep(FOR_EVER).await;
            }
            _ => {}
        }
        let lost = Lost::default();
        let each = batch.iter().enumerate();
        join_all(each.map(|(at, message)| self.in_its_time(call, at, message, &lost, outcomes))).await;
        match call {
            Call::HangsAfter => clock.sleep(FOR_EVER).await,
            Call::PanicsAfter => std::panic::resume_unwind(Box::new("a panic")),
            _ => {}
        }
    }

    async fn check(&self) -> Reachability {
        if let Err(error) = self.reach.life.pass().await {
            return Reachability::Down(PublishError::connection(error));
        }
        let rates = self.reach.world.rates();
        let fate = self
            .reach
            .world
            .fault(|dice| dice.chance(rates.calls).then(|| dice.roll(4)));
        match fate {
            Some(0) => Reachability::Down(PublishError::connection("still away")),
            Some(1) => Reachability::Unknown,
            Some(2) => std::panic::resume_unwind(Box::new("a panic")),
            Some(_) => {
                self.reach.clock.sleep(FOR_EVER).await;
                Reachability::Unknown
            }
            None => self.inner.check().await,
        }
    }
}
