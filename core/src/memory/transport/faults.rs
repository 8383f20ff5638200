use crate::{Message, PublishError, Reachability, Topic, clock::Clock};
use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

type Rule = Arc<dyn Fn(&Message) -> Result<(), PublishError> + Send + Sync>;

/// What goes wrong in a [`MemoryTransport`](super::MemoryTransport), on demand.
#[derive(Default)]
pub struct MemoryFaults {
    down: AtomicBool,
    rule: Mutex<Option<Rule>>,
    latency: Mutex<Duration>,
    slow: Mutex<Vec<(Topic, Duration)>>,
}

impl MemoryFaults {
    /// The broker cannot be reached until told otherwise: publishing fails, and a check says so. Receiving goes on.
    pub fn set_down(&self, down: bool) {
        self.down.store(down, Ordering::Release);
    }

    /// Asks `rule` before each message is stored; its error is the outcome. A lost connection is the outcome of the
    /// rest of the batch too.
    pub fn on_publish(&self, rule: impl Fn(&Message) -> Result<(), PublishError> + Send + Sync + 'static) {
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(rule));
    }

    /// Lets each publish call take this long, on the transport's clock.
    pub fn set_latency(&self, latency: Duration) {
        *self.latency.lock().unwrap_or_else(PoisonError::into_inner) = latency;
    }

    /// Lets messages of `topic` take this long, on the transport's clock, and their neighbours no longer for it; zero
    /// ends it.
    pub fn set_topic_latency(&self, topic: Topic, latency: Duration) {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner);
        slow.retain(|(known, _)| *known != topic);
        if !latency.is_zero() {
            slow.push((topic, latency));
        }
    }

    /// Nothing goes wrong any more.
    pub fn clear(&self) {
        self.set_down(false);
        self.set_latency(Duration::ZERO);
        self.slow.lock().unwrap_or_else(PoisonError::into_inner).clear();
        *self.rule.lock().unwrap_or_else(PoisonError::into_inner) = None;
    }

    pub(super) async fn delay(&self, clock: &dyn Clock) {
        let latency = *self.latency.lock().unwrap_or_else(PoisonError::into_inner);
        if !latency.is_zero() {
            clock.sleep(latency).await;
        }
    }

    /// The slow topics of a batch.
    pub(super) fn slow_topics(&self, batch: &[Message]) -> Vec<(Topic, Duration)> {
        let mut slow = self.slow.lock().unwrap_or_else(PoisonError::into_inner).clone();
        slow.retain(|(topic, _)| batch.iter().any(|message| message.topic() == topic));
        slow
    }

    /// The fault that messages meet now, if there is one: what is asked of each.
    pub(super) fn now(&self) -> Option<Rule> {
        if self.down.load(Ordering::Acquire) {
            return Some(Arc::new(|_| Err(down())));
        }
        self.rule.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn reachability(&self) -> Reachability {
        if self.down.load(Ordering::Acquire) {
            Reachability::Down(down())
        } else {
            Reachability::Up
        }
    }
}

fn down() -> PublishError {
    PublishError::connection("the memory transport has been told to be down")
}

impl fmt::Debug for MemoryFaults {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("MemoryFaults")
            .field("down", &self.down)
            .finish_non_exhaustive()
    }
}
