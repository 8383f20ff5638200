use crate::{Assignment, DeliveryTag, Disposition, Error, ErrorKind, Result};
use async_trait::async_trait;
use rustc_hash::FxHashMap;
use std::{
    fmt::Debug,
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicU64, Ordering},
    },
};

/// A partition, or a queue, that a member of a group has for a while: what a driver hands messages out of.
#[async_trait]
pub trait Hold: Debug + Send + Sync + 'static {
    /// Which stretch of having it this is.
    fn assignment(&self) -> Assignment;

    /// Notes what became of messages by their positions: `Ack` and `Release` only. One outcome each, and whether the hold
    /// hands out nothing more until everything that is not settled can be handed out again, in order.
    async fn settle(&self, batch: &[(u64, Disposition)]) -> (Vec<Result<()>>, bool);
}

/// Where a driver puts messages that are to be tried later, or never again.
#[async_trait]
pub trait Copies<H>: Sync {
    /// Stores a copy of what is out at `position`, for `Retry` or as a `DeadLetter`; the original is acknowledged after it.
    ///
    /// # Errors
    /// If the copy is not stored for certain: then the original comes again.
    async fn store(&self, hold: &H, position: u64, disposition: Disposition) -> Result<()>;
}

/// All that a member has.
#[derive(Debug)]
pub struct Holds<H> {
    all: Mutex<FxHashMap<Assignment, Arc<H>>>,
    changes: AtomicU64,
}

impl<H> Default for Holds<H> {
    fn default() -> Self {
        Self {
            all: Mutex::default(),
            changes: AtomicU64::new(0),
        }
    }
}

impl<H: Hold> Holds<H> {
    fn map(&self) -> MutexGuard<'_, FxHashMap<Assignment, Arc<H>>> {
        self.all.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Adds one.
    pub fn add(&self, hold: Arc<H>) {
        self.map().insert(hold.assignment(), hold);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Forgets one: what is settled of it from now on is in vain.
    pub fn remove(&self, assignment: Assignment) {
        self.map().remove(&assignment);
        self.changes.fetch_add(1, Ordering::Release);
    }

    /// Forgets all, and gives them.
    pub fn take(&self) -> Vec<Arc<H>> {
        let all = std::mem::take(&mut *self.map());
        self.changes.fetch_add(1, Ordering::Release);
        all.into_values().collect()
    }

    /// All of them.
    pub fn all(&self) -> Vec<Arc<H>> {
        self.map().values().cloned().collect()
    }

    /// One of them.
    pub fn get(&self, assignment: Assignment) -> Option<Arc<H>> {
        self.map().get(&assignment).cloned()
    }

    /// How often there was another set of them.
    pub fn changes(&self) -> u64 {
        self.changes.load(Ordering::Acquire)
    }

    /// Settles deliveries, hold by hold, those of each in the order given, after their copies are stored. One outcome
    /// each, in the order of the batch, and the assignments that end with it, which the driver tells as revoked.
    ///
    /// What has no hold any more is [`not_outstanding`]; of what could not be copied the error is told, and the original is
    /// released. Dropped before it ends, copies may be stored whose originals come again: nothing is lost.
    pub async fn settle(
        &self,
        batch: &[(DeliveryTag, Disposition)],
        copies: &impl Copies<H>,
    ) -> (Vec<Result<()>>, Vec<Assignment>) {
        let mut outcomes: Vec<Option<Result<()>>> = batch.iter().map(|_| None).collect();
        let mut parts: Vec<Part<H>> = Vec::new();
        for (n, (tag, disposition)) in batch.iter().enumerate() {
            let (assignment, position) = tag.parts();
            let known = parts.iter().rposition(|part| part.hold.assignment() == assignment);
            let at = match known {
                Some(at) => at,
                None => {
                    let Some(hold) = self.get(assignment) else {
                        outcomes[n] = Some(Err(not_outstanding(position)));
                        continue;
                    };
                    parts.push(Part::of(hold));
                    parts.len() - 1
                }
            };
            let said = match disposition {
                Disposition::Ack | Disposition::Release => *disposition,
                Disposition::Retry { .. } | Disposition::DeadLetter => {
                    match copies.store(&parts[at].hold, position, *disposition).await {
                        Ok(()) => Disposition::Ack,
                        Err(error) => {
                            outcomes[n] = Some(Err(error));
                            Disposition::Release
                        }
                    }
                }
            };
            parts[at].places.push(n);
            parts[at].said.push((position, said));
        }
        let mut ended = Vec::new();
        for part in parts {
            let (settled, ends) = part.hold.settle(&part.said).await;
            for (n, outcome) in part.places.into_iter().zip(settled) {
                outcomes[n].get_or_insert(outcome);
            }
            if ends {
                ended.push(part.hold.assignment());
            }
        }
        let unknown = || Err(Error::new(ErrorKind::Unexpected, "a driver said nothing of a delivery"));
        let outcomes = outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(unknown));
        (outcomes.collect(), ended)
    }
}

/// What of a batch belongs to one hold.
struct Part<H> {
    hold: Arc<H>,
    places: Vec<usize>,
    said: Vec<(u64, Disposition)>,
}

impl<H> Part<H> {
    fn of(hold: Arc<H>) -> Self {
        Self {
            hold,
            places: Vec::new(),
            said: Vec::new(),
        }
    }
}

/// The error of a delivery that cannot be settled any more.
#[must_use]
pub fn not_outstanding(position: u64) -> Error {
    let text = "the delivery is not outstanding: its partition has gone to somebody else, or its connection is lost";
    Error::new(ErrorKind::LeaseLost, text).with("position", position)
}
