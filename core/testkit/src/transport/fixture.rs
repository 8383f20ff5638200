use async_trait::async_trait;
use postrider_core::PublisherExt as _;
use postrider_core::{
    Delivery, GroupName, Intake, Message, Order, Settlement, Settling, Subscription, Taken, Topic, Transport,
    clock::{Clock, ManualClock},
};
use std::{sync::Arc, time::Duration};

/// A transport to be tested, with names nobody else uses, and the time it lives in.
#[async_trait]
pub trait TransportFixture: Send + Sync {
    /// The transport.
    fn transport(&self) -> Transport;

    /// A topic of this test's own.
    fn topic(&self, name: &str) -> Topic;

    /// A group of this test's own.
    fn group(&self, name: &str) -> GroupName;

    /// Lets at least `duration` pass for the transport.
    async fn advance(&self, duration: Duration);

    /// How long nothing must come for a test to believe that nothing comes: as long as a member needs to get its part, of a
    /// member that has died too.
    fn quiet(&self) -> Duration {
        Duration::from_millis(150)
    }
}

/// A transport of one test alone that takes the time from a [`ManualClock`].
#[derive(Debug)]
pub struct ClockedTransport {
    clock: Arc<ManualClock>,
    transport: Transport,
}

impl ClockedTransport {
    /// The transport that `make` makes.
    pub async fn new<Fut>(make: impl FnOnce(Arc<dyn Clock>) -> Fut) -> Self
    where
        Fut: Future<Output = Transport>,
    {
        let clock = ManualClock::shared();
        let transport = make(clock.clone()).await;
        Self { clock, transport }
    }
}

#[async_trait]
impl TransportFixture for ClockedTransport {
    fn transport(&self) -> Transport {
        self.transport.clone()
    }
    fn topic(&self, name: &str) -> Topic {
        Topic::parse(name.to_owned()).expect("a name of the kit's own")
    }
    fn group(&self, name: &str) -> GroupName {
        GroupName::parse(name.to_owned()).expect("a name of the kit's own")
    }
    async fn advance(&self, duration: Duration) {
        self.clock.advance(duration);
    }
}

/// A transport over a broker that others use too, under names of its own.
#[derive(Debug)]
pub struct NamedTransport {
    name: String,
    transport: Transport,
    quiet: Duration,
}

impl NamedTransport {
    /// `name` is nobody else's; `quiet` is as [`TransportFixture::quiet`] says.
    #[must_use]
    pub fn new(name: impl Into<String>, transport: Transport, quiet: Duration) -> Self {
        Self {
            name: name.into(),
            transport,
            quiet,
        }
    }
}

#[async_trait]
impl TransportFixture for NamedTransport {
    fn transport(&self) -> Transport {
        self.transport.clone()
    }
    fn topic(&self, name: &str) -> Topic {
        Topic::parse(format!("{}.{name}", self.name)).expect("a name of the kit's own")
    }
    fn group(&self, name: &str) -> GroupName {
        GroupName::parse(format!("{}.{name}", self.name)).expect("a name of the kit's own")
    }
    async fn advance(&self, duration: Duration) {
        tokio::time::sleep(duration).await;
    }
    fn quiet(&self) -> Duration {
        self.quiet
    }
}

/// A member of a group, with the shorthands a test wants.
pub(super) struct Member {
    intake: Intake,
    pub(super) settling: Settling,
    quiet: Duration,
}

impl Member {
    /// Joins `group` on the topic `t`, in order where the transport can.
    pub(super) async fn join(fixture: &dyn TransportFixture, group: &str) -> Self {
        Self::on(
            fixture,
            Subscription::new(fixture.group(group), vec![fixture.topic("t")]),
        )
        .await
    }

    pub(super) async fn on(fixture: &dyn TransportFixture, mut subscription: Subscription) -> Self {
        let transport = fixture.transport();
        if transport.capabilities().order == Order::None {
            subscription = subscription.unordered();
        }
        let subscriber = transport.subscriber(&subscription).expect("a subscriber");
        let (intake, settling) = subscriber.subscribe(&subscription).await.expect("a feed").split();
        Self {
            intake,
            settling,
            quiet: fixture.quiet(),
        }
    }

    /// What comes, up to `max`, until it has been quiet for a while.
    pub(super) async fn take(&mut self, max: usize) -> Vec<Delivery> {
        let mut taken = Vec::new();
        while taken.len() < max {
            match tokio::time::timeout(self.quiet, self.intake.next(max - taken.len())).await {
                Ok(Ok(Taken::Batch(batch))) => taken.extend(batch),
                // What the test has dropped of a partition that goes is told, so that it can go.
                Ok(Ok(_)) => drop(self.settling.settle(Vec::new()).await),
                Ok(Err(error)) => panic!("receiving failed: {error:?}"),
                Err(_) => break,
            }
        }
        taken
    }

    /// What is there just now, up to `max`.
    pub(super) async fn some(&mut self, max: usize) -> Vec<Delivery> {
        match tokio::time::timeout(Duration::from_millis(50), self.intake.next(max)).await {
            Ok(Ok(Taken::Batch(batch))) => batch,
            Ok(Err(error)) => panic!("receiving failed: {error:?}"),
            _ => Vec::new(),
        }
    }

    /// As [`some`](Member::some), from a member that does not wait long.
    pub(super) async fn at_once(&mut self, max: usize) -> Vec<Delivery> {
        match tokio::time::timeout(Duration::from_millis(5), self.intake.next(max)).await {
            Ok(Ok(Taken::Batch(batch))) => batch,
            Ok(Err(error)) => panic!("receiving failed: {error:?}"),
            _ => Vec::new(),
        }
    }

    pub(super) async fn next(&mut self) -> postrider_core::Result<Taken> {
        self.intake.next(10).await
    }

    pub(super) async fn settle(&self, settlements: Vec<Settlement>) {
        let errors = self.settling.settle(settlements).await;
        assert!(errors.is_empty(), "{errors:?}");
    }

    /// Takes and acknowledges everything there is; its names in order.
    pub(super) async fn drain(&mut self) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let taken = self.take(100).await;
            if taken.is_empty() {
                return all;
            }
            all.extend(names(&taken));
            self.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        }
    }
}

pub(super) fn names(deliveries: &[Delivery]) -> Vec<String> {
    deliveries.iter().map(|delivery| name(delivery.message())).collect()
}

pub(super) fn name(message: &Message) -> String {
    String::from_utf8_lossy(message.payload()).into_owned()
}

/// Publishes to the topic `t` messages given as `key:name`, or `name` without a key.
pub(super) async fn publish(fixture: &dyn TransportFixture, names: &[&str]) {
    let messages: Vec<Message> = names
        .iter()
        .map(|text| {
            let (key, name) = text
                .split_once(':')
                .map_or((None, *text), |(key, name)| (Some(key), name));
            let message = Message::new(fixture.topic("t"), "test.v1", name.to_owned()).with_source("kit");
            key.map_or(message.clone(), |key| message.with_key(key))
        })
        .collect();
    let transport = fixture.transport();
    for outcome in transport.publisher().expect("a publisher").publish_all(&messages).await {
        outcome.expect("published");
    }
}

/// `from..to` as messages of `key`.
pub(super) fn numbered(key: &str, numbers: std::ops::Range<u32>) -> Vec<String> {
    numbers.map(|n| format!("{key}:{key}{n}")).collect()
}

pub(super) async fn publish_all(fixture: &dyn TransportFixture, names: &[String]) {
    publish(fixture, &names.iter().map(String::as_str).collect::<Vec<_>>()).await;
}
