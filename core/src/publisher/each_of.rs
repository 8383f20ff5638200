use super::{Outcomes, PublishError, Publisher, Reachability};
use crate::{Message, Topic};
use async_trait::async_trait;
use futures_util::{StreamExt as _, stream::FuturesUnordered};
use rustc_hash::FxHashMap;
use std::{
    fmt::Debug,
    sync::{Arc, Mutex, PoisonError},
};
use tokio::sync::Semaphore;

/// The simple shape for an author: one message at a time. [`EachOf`] makes a [`Publisher`] of it.
pub trait PublishOne: Debug + Send + Sync + 'static {
    /// Publishes one message.
    ///
    /// # Contract
    /// As [`Publisher::publish`] for a batch of one. Calls overlap, for messages of different keys.
    ///
    /// Held by `core::each_of_keeps_a_key_in_order_and_holds_back_behind_a_refusal`.
    fn publish_one(&self, message: &Message) -> impl Future<Output = Result<(), PublishError>> + Send;

    /// Asks whether the broker can be reached; [`Reachability::Unknown`] unless the author knows better.
    ///
    /// # Contract
    /// As [`Publisher::check`].
    ///
    /// Held by `transport::a_broker_that_stands_still_is_told`.
    fn check(&self) -> impl Future<Output = Reachability> + Send {
        std::future::ready(Reachability::Unknown)
    }
}

/// A [`Publisher`] made of a [`PublishOne`]: sends messages of different keys side by side, up to a window for each topic,
/// and holds back what follows a refused message in its key.
///
/// The window belongs to a topic, so that a destination that does not answer takes no place of the others.
#[derive(Debug, Clone)]
pub struct EachOf<P> {
    one: P,
    window: usize,
    windows: Arc<Mutex<FxHashMap<Topic, Arc<Semaphore>>>>,
}

impl<P: PublishOne> EachOf<P> {
    /// A window of 64 messages for each topic.
    pub fn new(one: P) -> Self {
        Self {
            one,
            window: 64,
            windows: Arc::default(),
        }
    }

    /// Sets how many messages of a topic may be on their way at once, all calls together; at least 1.
    #[must_use]
    pub fn with_window(mut self, window: usize) -> Self {
        self.window = window.clamp(1, Semaphore::MAX_PERMITS);
        self
    }

    fn window_of(&self, topic: &Topic) -> Arc<Semaphore> {
        let mut windows = self.windows.lock().unwrap_or_else(PoisonError::into_inner);
        // Topics come and go: windows that nobody uses are forgotten.
        if windows.len() >= 1024 && !windows.contains_key(topic) {
            windows.retain(|_, window| Arc::strong_count(window) > 1);
        }
        let window = windows
            .entry(topic.clone())
            .or_insert_with(|| Arc::new(Semaphore::new(self.window)));
        window.clone()
    }

    /// Publishes the messages at `run`, which share a key, one after the other.
    async fn publish_run(&self, batch: &[Message], run: Vec<usize>, window: &Semaphore, outcomes: &Outcomes) {
        let mut refused = false;
        for at in run {
            let outcome = if refused {
                Err(PublishError::held_back())
            } else {
                // It is never closed.
                let _place = window.acquire().await;
                self.one.publish_one(&batch[at]).await
            };
            refused |= outcome.is_err();
            outcomes.report(at, outcome);
        }
    }
}

#[async_trait]
impl<P: PublishOne> Publisher for EachOf<P> {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        let mut windows: FxHashMap<&Topic, Arc<Semaphore>> = FxHashMap::default();
        for message in batch {
            let topic = message.topic();
            windows.entry(topic).or_insert_with(|| self.window_of(topic));
        }
        // A message at a time of each run: of a long batch, no more futures than there are places wait in the set.
        let mut sent: FuturesUnordered<_> = runs(batch)
            .into_iter()
            .map(|run| {
                let window = &windows[batch[run[0]].topic()];
                self.publish_run(batch, run, window, outcomes)
            })
            .collect();
        while sent.next().await.is_some() {}
    }

    async fn check(&self) -> Reachability {
        self.one.check().await
    }
}

/// The positions of a batch's messages, by key, each in order.
fn runs(batch: &[Message]) -> Vec<Vec<usize>> {
    let mut by_key = FxHashMap::default();
    let mut runs: Vec<Vec<usize>> = Vec::with_capacity(batch.len());
    for (at, message) in batch.iter().enumerate() {
        match message.key_hash() {
            None => runs.push(vec![at]),
            Some(key) => match by_key.entry(key) {
                std::collections::hash_map::Entry::Occupied(run) => {
                    let run: &usize = run.get();
                    runs[*run].push(at);
                }
                std::collections::hash_map::Entry::Vacant(slot) => {
                    slot.insert(runs.len());
                    runs.push(vec![at]);
                }
            },
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        PublishErrorKind,
        publisher::{PublisherExt as _, Reports},
    };

    #[derive(Debug, Default)]
    struct RefusesB(Mutex<Vec<String>>);
    impl PublishOne for RefusesB {
        async fn publish_one(&self, message: &Message) -> Result<(), PublishError> {
            tokio::task::yield_now().await;
            let text = String::from_utf8_lossy(message.payload()).into_owned();
            self.0.lock().unwrap().push(text.clone());
            if text == "b" {
                Err(PublishError::rejected("b"))
            } else {
                Ok(())
            }
        }
    }

    #[tokio::test]
    async fn each_of_keeps_a_key_in_order_and_holds_back_behind_a_refusal() {
        let publisher = EachOf::new(RefusesB::default()).with_window(4);
        let message = |text: &'static str| Message::new(Topic::new("t"), "e.v1", text);
        let batch = [
            message("a").with_key("k"),
            message("x"),
            message("b").with_key("k"),
            message("c").with_key("k"),
            message("d").with_key("other"),
        ];
        let outcomes = publisher.publish_all(&batch).await;
        let kinds: Vec<_> = outcomes
            .iter()
            .map(|o| o.as_ref().err().map(PublishError::kind))
            .collect();
        assert_eq!(
            kinds,
            [
                None,
                None,
                Some(PublishErrorKind::Rejected),
                Some(PublishErrorKind::HeldBack),
                None
            ]
        );
        assert!(!publisher.one.0.lock().unwrap().contains(&"c".to_owned()));
        assert!(matches!(publisher.check().await, Reachability::Unknown));
    }

    /// Never answers for the topic `silent`.
    #[derive(Debug)]
    struct Silent;
    impl PublishOne for Silent {
        async fn publish_one(&self, message: &Message) -> Result<(), PublishError> {
            match message.topic().as_str() {
                "silent" => std::future::pending().await,
                _ => Ok(()),
            }
        }
    }

    #[tokio::test]
    async fn a_silent_topic_takes_no_place_of_the_others() {
        let publisher = EachOf::new(Silent).with_window(2);
        let batch: Vec<Message> = (0..100)
            .map(|n| Message::new(Topic::new(if n < 90 { "silent" } else { "good" }), "e.v1", "x"))
            .collect();
        let reports = Arc::new(Reports::default());
        let outcomes = Outcomes::new(1, batch.len(), reports.clone());
        let call = publisher.publish(&batch, &outcomes);
        assert!(
            futures_util::FutureExt::now_or_never(call).is_none(),
            "the silent ones keep the call open"
        );
        let reported: Vec<usize> = reports
            .take(Vec::new())
            .into_iter()
            .flat_map(|report| report.at)
            .collect();
        assert_eq!(reported, (90..100).collect::<Vec<_>>());
    }
}
