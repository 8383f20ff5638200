//! A feed, and the engine's two sides of it.

use super::{Assignment, Deliveries, DeliveryTag, Disposition, Incoming, Lag, Received, Settler};
use crate::{Error, Message, MessageId, Result, Topic, clock::bounded};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

/// A stream of messages for a member of a group: what [`Subscriber::subscribe`](super::Subscriber::subscribe) returns.
#[derive(Debug)]
pub struct Feed {
    deliveries: Box<dyn Deliveries>,
    settler: Arc<dyn Settler>,
    lag: Lag,
}

impl Feed {
    /// Out of the author's two sides.
    #[must_use]
    pub fn new(deliveries: impl Deliveries, settler: impl Settler) -> Self {
        Self {
            deliveries: Box::new(deliveries),
            settler: Arc::new(settler),
            lag: Lag::default(),
        }
    }

    /// Shows how many messages wait with the broker.
    #[must_use]
    pub fn with_lag(mut self, lag: Lag) -> Self {
        self.lag = lag;
        self
    }

    /// Wraps the outcomes' side, to meter it or to inject faults.
    #[must_use]
    pub fn map_settler<S: Settler>(self, wrap: impl FnOnce(Arc<dyn Settler>) -> S) -> Self {
        Self {
            deliveries: self.deliveries,
            settler: Arc::new(wrap(self.settler)),
            lag: self.lag,
        }
    }

    /// The author's two sides, for wrappers that meter them or inject faults.
    #[must_use]
    pub fn into_parts(self) -> (Box<dyn Deliveries>, Arc<dyn Settler>) {
        (self.deliveries, self.settler)
    }

    /// The engine's two sides.
    #[must_use]
    pub fn split(self) -> (Intake, Settling) {
        let dropped = Dropped::default();
        let intake = Intake {
            deliveries: self.deliveries,
            assignments: HashMap::new(),
            dropped: dropped.clone(),
            lag: self.lag,
        };
        let settling = Settling {
            settler: self.settler,
            dropped,
        };
        (intake, settling)
    }
}

type Dropped = Arc<Mutex<Vec<DeliveryTag>>>;

/// A message that has to be settled: once, since settling consumes it. Dropped, it is released.
#[derive(Debug)]
#[must_use = "a delivery dropped unsettled is delivered again"]
pub struct Delivery {
    message: Message,
    delivery_count: u32,
    attempts: u32,
    tag: DeliveryTag,
    assignment: Assignment,
    is_gone: Arc<AtomicBool>,
    dropped: Option<Dropped>,
}

/// A delivery and what became of it.
#[derive(Debug)]
#[must_use = "give it to `Settling::settle`"]
pub struct Settlement {
    message: (Topic, MessageId),
    tag: DeliveryTag,
    disposition: Disposition,
}

impl Settlement {
    /// Whether the message comes again.
    pub(crate) fn comes_again(&self) -> bool {
        matches!(self.disposition, Disposition::Release | Disposition::Retry { .. })
    }
}

impl Delivery {
    /// The message.
    #[must_use]
    pub fn message(&self) -> &Message {
        &self.message
    }
    /// How often it has been handed to this group, this time included.
    #[must_use]
    pub fn delivery_count(&self) -> u32 {
        self.delivery_count
    }
    /// How many attempts were made before it waited with the broker; 0 where it did not.
    #[must_use]
    pub fn attempts(&self) -> u32 {
        self.attempts
    }
    /// What it came with.
    #[must_use]
    pub fn assignment(&self) -> Assignment {
        self.assignment
    }
    /// Whether its partition has been revoked or lost since.
    #[must_use]
    pub fn is_gone(&self) -> bool {
        self.is_gone.load(Ordering::Acquire)
    }
    fn settled(mut self, disposition: Disposition) -> Settlement {
        self.dropped = None;
        Settlement {
            message: (self.message.topic().clone(), self.message.id()),
            tag: self.tag,
            disposition,
        }
    }
    /// Done with it.
    pub fn ack(self) -> Settlement {
        self.settled(Disposition::Ack)
    }
    /// Again, after a delay: so many attempts have been made.
    pub fn retry(self, after: Duration, attempts: u32) -> Settlement {
        self.settled(Disposition::Retry {
            after: bounded(after),
            attempts,
        })
    }
    /// To the transport's own dead letters.
    pub fn dead_letter(self) -> Settlement {
        self.settled(Disposition::DeadLetter)
    }
    /// Not done with it.
    pub fn release(self) -> Settlement {
        self.settled(Disposition::Release)
    }
}

impl Drop for Delivery {
    fn drop(&mut self) {
        if let Some(dropped) = self.dropped.take() {
            let mut tags = dropped.lock().unwrap_or_else(PoisonError::into_inner);
            tags.push(self.tag);
        }
    }
}

/// What [`Intake::next`] gives.
#[derive(Debug)]
#[non_exhaustive]
pub enum Taken {
    /// Messages: at least one.
    Batch(Vec<Delivery>),
    /// This assignment is over: its deliveries have been told ([`Delivery::is_gone`]) and are to be settled or dropped.
    Gone(Assignment),
    /// The broker has deleted so many messages that the group has not read, and why.
    Missed {
        /// How many, as far as is known.
        messages: u64,
        /// Of what, and why.
        why: String,
    },
}

/// The engine's side of a feed: where deliveries come from.
#[derive(Debug)]
pub struct Intake {
    deliveries: Box<dyn Deliveries>,
    /// Each with whether it is gone.
    assignments: HashMap<Assignment, Arc<AtomicBool>>,
    dropped: Dropped,
    lag: Lag,
}

impl Intake {
    /// Waits for at least one delivery, and takes at most `max`. Cancel-safe.
    ///
    /// # Errors
    /// Of the transport: [`ErrorKind::Closed`](crate::ErrorKind::Closed) at the end; after any other, call it again.
    pub async fn next(&mut self, max: usize) -> Result<Taken> {
        match self.deliveries.next(max).await? {
            Incoming::Batch(received) => Ok(Taken::Batch(
                received.into_iter().map(|received| self.deliver(received)).collect(),
            )),
            Incoming::Revoked(assignment) | Incoming::Lost(assignment) => {
                if let Some(is_gone) = self.assignments.remove(&assignment) {
                    is_gone.store(true, Ordering::Release);
                }
                Ok(Taken::Gone(assignment))
            }
            Incoming::Missed { messages, why } => Ok(Taken::Missed { messages, why }),
        }
    }

    /// How many messages wait with the broker.
    pub(crate) fn lag(&self) -> Lag {
        self.lag.clone()
    }

    fn deliver(&mut self, received: Received) -> Delivery {
        let is_gone = self.assignments.entry(received.assignment).or_default();
        Delivery {
            is_gone: is_gone.clone(),
            message: received.message.arrived(),
            delivery_count: received.delivery_count,
            attempts: received.attempts,
            tag: received.tag,
            assignment: received.assignment,
            dropped: Some(self.dropped.clone()),
        }
    }
}

/// The engine's side of a feed: where the outcome goes.
#[derive(Debug, Clone)]
pub struct Settling {
    settler: Arc<dyn Settler>,
    dropped: Dropped,
}

impl Settling {
    /// Settles a batch, and releases what was dropped meanwhile. Gives back the errors.
    pub async fn settle(&self, batch: Vec<Settlement>) -> Vec<Error> {
        self.settle_each(batch).await.0
    }

    /// The same, and which messages were done with and are not acknowledged.
    pub(crate) async fn settle_each(&self, batch: Vec<Settlement>) -> (Vec<Error>, Vec<(Topic, MessageId)>) {
        let mut all: Vec<_> = batch.iter().map(|s| (s.tag, s.disposition)).collect();
        let dropped = std::mem::take(&mut *self.dropped.lock().unwrap_or_else(PoisonError::into_inner));
        all.extend(dropped.into_iter().map(|tag| (tag, Disposition::Release)));
        if all.is_empty() {
            return (Vec::new(), Vec::new());
        }
        let (mut errors, mut unacknowledged) = (Vec::new(), Vec::new());
        for (at, outcome) in self.settler.settle(&all).await.into_iter().enumerate() {
            let Err(error) = outcome else { continue };
            errors.push(error);
            let done = batch.get(at).filter(|settled| settled.disposition == Disposition::Ack);
            unacknowledged.extend(done.map(|settled| settled.message.clone()));
        }
        (errors, unacknowledged)
    }

    /// Whether deliveries were dropped that the broker has not been told of.
    #[must_use]
    pub fn has_dropped(&self) -> bool {
        !self.dropped.lock().unwrap_or_else(PoisonError::into_inner).is_empty()
    }

    /// Ends the feed.
    ///
    /// # Errors
    /// Of the transport, if something could not be flushed within `deadline`: it comes back.
    pub async fn close(&self, deadline: Duration) -> Result<()> {
        self.settle(Vec::new()).await;
        self.settler.close(deadline).await
    }
}
