//! The transport in memory.

mod faults;
mod feed;
mod group;

pub use faults::MemoryFaults;

use crate::{
    Capabilities, Feed, GroupName, Message, Order, PublishError, PublishErrorKind, Publisher, Reachability, Result,
    Scope, Subscriber, Subscription, Topic, Transport,
    clock::{Clock, SystemClock},
    publisher::Outcomes,
    relay::TopicPattern,
    subscriber::nothing_to_declare,
};
use async_trait::async_trait;
use feed::Member;
use futures_util::{StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use group::{Group, Handled};
use rustc_hash::FxHashMap;
use std::{
    collections::VecDeque,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// A transport in memory: the reference implementation. Clones are handles on the same broker.
///
/// It behaves as a log does: a topic keeps its messages, with or without subscribers, and a new group begins at the
/// earliest kept. Groups share, redeliver, retry after a delay, keep keys in order and have dead letters of their own.
#[derive(Debug, Clone)]
pub struct MemoryTransport {
    broker: Arc<Broker>,
}

#[derive(Debug)]
struct Broker {
    clock: Arc<dyn Clock>,
    retention: usize,
    confirms_when_handled: bool,
    faults: MemoryFaults,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    last_offset: u64,
    topics: FxHashMap<Topic, TopicLog>,
    groups: FxHashMap<GroupName, Arc<Group>>,
    /// Who gets what is published to topics that come to be.
    patterns: Vec<(TopicPattern, Arc<Group>)>,
}

#[derive(Debug, Default)]
struct TopicLog {
    kept: VecDeque<(u64, Message)>,
    groups: Vec<Arc<Group>>,
}

impl MemoryTransport {
    /// A broker without topics, on the system's clock, that keeps the last 100,000 messages of a topic for new groups.
    #[must_use]
    pub fn new() -> Self {
        Self::on_clock(SystemClock::shared())
    }

    /// A broker on another clock.
    #[must_use]
    pub fn on_clock(clock: Arc<dyn Clock>) -> Self {
        Self::with(clock, 100_000, false)
    }

    fn with(clock: Arc<dyn Clock>, retention: usize, confirms_when_handled: bool) -> Self {
        Self {
            broker: Arc::new(Broker {
                clock,
                retention,
                confirms_when_handled,
                faults: MemoryFaults::default(),
                state: Mutex::default(),
            }),
        }
    }

    /// An empty broker like this one that keeps the last `messages` of a topic for groups to come. What a group has not
    /// settled is kept whatever the number.
    #[must_use]
    pub fn with_retention(self, messages: usize) -> Self {
        let broker = &self.broker;
        Self::with(broker.clock.clone(), messages, broker.confirms_when_handled)
    }

    /// An empty broker like this one that confirms a message only once every group has settled it: for handlers in the
    /// same process as the event log. This broker forgets everything when the process ends; the log then still has what
    /// was not handled, and the next start delivers it.
    ///
    /// A topic without a group leads nowhere. A message published again while a group still has it is not queued twice.
    #[must_use]
    pub fn confirm_when_handled(self) -> Self {
        let broker = &self.broker;
        Self::with(broker.clock.clone(), broker.retention, true)
    }

    /// What is to go wrong.
    #[must_use]
    pub fn faults(&self) -> &MemoryFaults {
        &self.broker.faults
    }

    /// The messages that `topic` keeps, oldest first: what was published.
    #[must_use]
    pub fn published(&self, topic: &Topic) -> Vec<Message> {
        let state = self.state();
        let log = state.topics.get(topic);
        log.map_or_else(Vec::new, |log| log.kept.iter().map(|(_, m)| m.clone()).collect())
    }

    /// The dead letters of the transport's own for `group`. With an event log, the dead letters are there instead.
    #[must_use]
    pub fn dead_letters(&self, group: &GroupName) -> Vec<Message> {
        let group = self.state().groups.get(group).cloned();
        group.map_or_else(Vec::new, |group| group.state().dead.clone())
    }

    /// Changes when something happens to a group.
    #[cfg(feature = "testing")]
    pub(crate) fn marks(&self) -> Vec<[usize; 5]> {
        let groups: Vec<_> = self.state().groups.values().cloned().collect();
        let mut marks: Vec<_> = groups.iter().map(|group| group.state().marks()).collect();
        marks.sort_unstable();
        marks
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.broker.state()
    }
}

impl Broker {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for MemoryTransport {
    fn default() -> Self {
        Self::new()
    }
}

impl From<MemoryTransport> for Transport {
    fn from(transport: MemoryTransport) -> Self {
        let capabilities = Capabilities::default()
            .with_order(Order::Partitioned)
            .with_delayed_retry()
            .with_dead_letter()
            .with_delivery_count()
            .with_individual_acks()
            .with_broadcast()
            .with_wildcards();
        Self::new("memory", capabilities)
            .with_publisher(transport.clone())
            .with_subscriber(transport)
    }
}

#[async_trait]
impl Publisher for MemoryTransport {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        let faults = &self.broker.faults;
        faults.delay(&*self.broker.clock).await;
        let slow = faults.slow_topics(batch);
        let mut later: FuturesUnordered<BoxFuture<'_, ()>> = FuturesUnordered::new();
        for (topic, latency) in &slow {
            let clock = &self.broker.clock;
            later.push(Box::pin(async move {
                clock.sleep(*latency).await;
                let of_topic = batch.iter().enumerate().filter(|(_, m)| m.topic() == topic);
                self.store(of_topic, outcomes).await;
            }));
        }
        let at_once = batch.iter().enumerate();
        let at_once = at_once.filter(|(_, message)| !slow.iter().any(|(topic, _)| message.topic() == topic));
        self.store(at_once, outcomes).await;
        while later.next().await.is_some() {}
    }

    async fn check(&self) -> Reachability {
        self.broker.faults.reachability()
    }
}

impl MemoryTransport {
    /// Stores what no fault forbids, and reports what became of each.
    async fn store(&self, messages: impl Iterator<Item = (usize, &Message)> + Send, outcomes: &Outcomes) {
        let broker = &self.broker;
        let mut reached: Vec<Arc<Group>> = Vec::new();
        let mut awaited = FuturesUnordered::new();
        let mut known = Vec::with_capacity(messages.size_hint().1.unwrap_or_default());
        {
            let mut state = self.state();
            let fault = broker.faults.now();
            let mut lost: Option<PublishError> = None;
            for (at, message) in messages {
                let handled = broker.confirms_when_handled.then(|| Arc::new(Handled::default()));
                let outcome = match (&lost, &fault) {
                    (Some(error), _) => Err(error.clone()),
                    (None, Some(fault)) => fault(message),
                    (None, None) => Ok(()),
                };
                let outcome =
                    outcome.and_then(|()| state.store(message, broker.retention, handled.as_ref(), &mut reached));
                if let Err(error) = &outcome
                    && error.kind() == PublishErrorKind::Unavailable(Scope::Connection)
                {
                    lost = Some(error.clone());
                }
                match handled.filter(|_| outcome.is_ok()) {
                    None => known.push((at, outcome)),
                    Some(handled) => awaited.push(async move {
                        handled.all().await;
                        outcomes.report(at, Ok(()));
                    }),
                }
            }
        }
        outcomes.report_all(known);
        for group in reached {
            group.news.notify_waiters();
        }
        while awaited.next().await.is_some() {}
    }
}

impl State {
    /// Nothing reaches the group any more, and nobody waits for it.
    fn forget(&mut self, group: &Arc<Group>) {
        for log in self.topics.values_mut() {
            log.groups.retain(|known| !Arc::ptr_eq(known, group));
        }
        self.patterns.retain(|(_, known)| !Arc::ptr_eq(known, group));
        group.state().abandon();
    }

    fn store(
        &mut self,
        message: &Message,
        retention: usize,
        handled: Option<&Arc<Handled>>,
        reached: &mut Vec<Arc<Group>>,
    ) -> Result<(), PublishError> {
        self.last_offset += 1;
        let offset = self.last_offset;
        if !self.topics.contains_key(message.topic()) {
            let matching = self
                .patterns
                .iter()
                .filter(|(pattern, _)| pattern.matches(message.topic()));
            let mut log = TopicLog::default();
            for (_, group) in matching {
                if !log.groups.iter().any(|known| Arc::ptr_eq(known, group)) {
                    log.groups.push(group.clone());
                }
            }
            self.topics.insert(message.topic().clone(), log);
        }
        let Some(log) = self.topics.get_mut(message.topic()) else {
            return Ok(());
        };
        if handled.is_some() && log.groups.is_empty() {
            return Err(PublishError::unroutable("no group has subscribed to the topic"));
        }
        for group in &log.groups {
            group.state().arrive(offset, message.clone(), handled);
            if !reached.iter().any(|known| Arc::ptr_eq(known, group)) {
                reached.push(group.clone());
            }
        }
        // What was handled is not for groups to come.
        if handled.is_none() {
            log.kept.push_back((offset, message.clone()));
            if log.kept.len() > retention {
                log.kept.pop_front();
            }
        }
        Ok(())
    }
}

#[async_trait]
impl Subscriber for MemoryTransport {
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        let group = self.declared(subscription);
        let member = Arc::new(Member::new(group, self.broker.clone(), subscription));
        Ok(Feed::new(
            feed::MemoryDeliveries(member.clone()),
            feed::MemorySettler(member),
        ))
    }

    async fn declare(&self, subscription: &Subscription) -> Result<()> {
        if subscription.broadcast {
            return Err(nothing_to_declare(&subscription.group));
        }
        self.declared(subscription);
        Ok(())
    }
}

impl MemoryTransport {
    /// The group, with what it is to get.
    fn declared(&self, subscription: &Subscription) -> Arc<Group> {
        let mut state = self.state();
        let group = if subscription.broadcast {
            Arc::default()
        } else {
            state.groups.entry(subscription.group.clone()).or_default().clone()
        };
        let mut topics = subscription.topics.clone();
        for pattern in &subscription.patterns {
            topics.extend(state.topics.keys().filter(|topic| pattern.matches(topic)).cloned());
            let known = |(p, g): &(TopicPattern, Arc<Group>)| p == pattern && Arc::ptr_eq(g, &group);
            if !state.patterns.iter().any(known) {
                state.patterns.push((pattern.clone(), group.clone()));
            }
        }
        for topic in &topics {
            let log = state.topics.entry(topic.clone()).or_default();
            if log.groups.iter().any(|known| Arc::ptr_eq(known, &group)) {
                continue;
            }
            log.groups.push(group.clone());
            if !subscription.broadcast {
                let mut of_group = group.state();
                for (offset, message) in &log.kept {
                    of_group.arrive(*offset, message.clone(), None);
                }
            }
        }
        group
    }
}
