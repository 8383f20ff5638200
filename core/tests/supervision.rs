//! What dies, hangs or cannot be reached at a start: seen, told, bounded and restarted.

#![allow(clippy::unwrap_used, clippy::panic)]

mod world;

use async_trait::async_trait;
use postrider_core::{
    Bus, Deliveries, DeliveryTag, Disposition, Error, ErrorKind, EventLog, Feed, GroupName, Incoming, Mailbox, Message,
    Outcomes, Publisher, Reachability, Result, Settler, Subscriber, Subscription, Topic, Transport,
    consumer::Flow,
    health::{Part, PartState},
    log::{Claim, Claimed, EventLogStore, NewRecord, Purge, Session, SessionOptions, SettleReport, Settled},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::{Duration, Instant},
};
use world::{World, event, options, secs};

/// Goes wrong where and when it is told to.
#[derive(Debug, Default)]
struct Faults {
    /// Claims that panic.
    claims: AtomicU32,
    /// Joins that fail.
    joins: AtomicU32,
    /// Feeds that end by themselves when they are asked the first time.
    feeds: AtomicU32,
    /// How often a feed was asked for.
    joined: AtomicU32,
    opens_hang: AtomicBool,
    settles_hang: AtomicBool,
    closes_hang: AtomicBool,
    /// Of feeds alone.
    leaves_hang: AtomicBool,
    wait_returns_at_once: AtomicBool,
    /// Messages that the broker deletes unread, each told of by itself.
    misses: AtomicU32,
    /// Settles that come too late: the broker has given the messages to somebody else by then.
    late_settles: AtomicU32,
    /// How often the feed says that the group is refused.
    refusals: AtomicU32,
    /// Waits that fail.
    wait_fails: AtomicU32,
    empty_batches: AtomicBool,
    asked: AtomicU32,
}

fn happens(counter: &AtomicU32) -> bool {
    counter
        .fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1))
        .is_ok()
}

#[derive(Debug)]
struct Faulty<T: ?Sized>(Arc<Faults>, Arc<T>);

#[async_trait]
impl EventLogStore for Faulty<dyn EventLogStore> {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.1.append(mailbox, batch).await
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        if self.0.opens_hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        let session: Arc<dyn Session> = self.1.open(mailbox, options).await?.into();
        Ok(Box::new(Faulty(self.0.clone(), session)))
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.1.purge(request).await
    }
}

#[async_trait]
impl Session for Faulty<dyn Session> {
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        self.0.asked.fetch_add(1, Ordering::SeqCst);
        assert!(!happens(&self.0.claims), "this session is broken");
        self.1.claim(request).await
    }
    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        self.1.settle(batch).await
    }
    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        self.1.resume(topic, max).await
    }
    async fn wait(&self, at_most: Duration) -> Result<()> {
        if happens(&self.0.wait_fails) {
            return Err(Error::new(
                ErrorKind::Unavailable,
                "the connection that listens was lost",
            ));
        }
        match self.0.wait_returns_at_once.load(Ordering::SeqCst) {
            true => Ok(()),
            false => self.1.wait(at_most).await,
        }
    }
    async fn close(&self) -> Result<()> {
        if self.0.closes_hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        self.1.close().await
    }
}

#[async_trait]
impl Subscriber for Faulty<dyn Subscriber> {
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        self.0.joined.fetch_add(1, Ordering::SeqCst);
        if happens(&self.0.joins) {
            return Err(Error::new(ErrorKind::Unavailable, "the broker is away"));
        }
        let feed = self.1.subscribe(subscription).await?;
        let ends = happens(&self.0.feeds);
        let faults = self.0.clone();
        let (deliveries, settler) = feed.into_parts();
        let deliveries = FaultyFeed {
            faults: faults.clone(),
            inner: deliveries,
            ends,
        };
        Ok(Feed::new(deliveries, Faulty(faults, settler)))
    }
    async fn declare(&self, subscription: &Subscription) -> Result<()> {
        self.1.declare(subscription).await
    }
}

#[derive(Debug)]
struct FaultyFeed {
    faults: Arc<Faults>,
    inner: Box<dyn Deliveries>,
    ends: bool,
}

#[async_trait]
impl Deliveries for FaultyFeed {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        if self.ends {
            return Err(Error::new(ErrorKind::Closed, "it has ended"));
        }
        if happens(&self.faults.refusals) {
            return Err(Error::new(ErrorKind::Config, "READ on the group is missing"));
        }
        if happens(&self.faults.misses) {
            let why = "topic t is kept for 1 s".to_owned();
            return Ok(Incoming::Missed { messages: 5, why });
        }
        if self.faults.empty_batches.load(Ordering::SeqCst) {
            self.faults.asked.fetch_add(1, Ordering::SeqCst);
            return Ok(Incoming::Batch(Vec::new()));
        }
        self.inner.next(max).await
    }
}

#[async_trait]
impl Settler for Faulty<dyn Settler> {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        if self.0.settles_hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        if happens(&self.0.late_settles) {
            let back: Vec<_> = batch.iter().map(|(tag, _)| (*tag, Disposition::Release)).collect();
            self.1.settle(&back).await;
            let late = || Err(Error::new(ErrorKind::LeaseLost, "it is somebody else's"));
            return batch.iter().map(|_| late()).collect();
        }
        self.1.settle(batch).await
    }
    async fn close(&self, deadline: Duration) -> Result<()> {
        if self.0.closes_hang.load(Ordering::SeqCst) || self.0.leaves_hang.load(Ordering::SeqCst) {
            std::future::pending::<()>().await;
        }
        self.1.close(deadline).await
    }
}

async fn faulty() -> (World, Bus, Arc<Faults>) {
    let world = World::new(options()).await;
    let faults = Arc::new(Faults::default());
    let (of_log, of_transport) = (faults.clone(), faults.clone());
    let bus = Bus::builder()
        .log(EventLog::from(world.log.clone()).map_store(|store| Faulty(of_log, store)))
        .transport(Transport::from(world.transport.clone()).map_subscriber(|inner| Faulty(of_transport, inner)))
        .relay(options())
        .clock(world.clock.clone())
        .build()
        .unwrap();
    (world, bus, faults)
}

fn state(bus: &Bus, part: &Part) -> PartState {
    bus.health().part(part).unwrap().state
}

/// A panic in a session is told, shown and mended: the relay opens another session and goes on.
#[tokio::test]
async fn a_relay_whose_session_panics_is_restarted() {
    let (world, bus, faults) = faulty().await;
    faults.claims.store(2, Ordering::SeqCst);
    bus.start().await.unwrap();
    bus.publish(event("t", None, "1")).await.unwrap();
    world.settle().await;
    let relay = Part::Relay(Mailbox::outbox());
    assert_eq!(state(&bus, &relay), PartState::Degraded);
    let error = bus.health().part(&relay).unwrap().error.clone().unwrap();
    assert!(error.text.contains("this session is broken"), "{}", error.text);
    assert!(bus.health().live && error.fix.is_some());
    for _ in 0..10 {
        world.pass(secs(1)).await;
    }
    world.until(|w| w.published("t") == ["1"]).await;
    world.pass(secs(60)).await;
    assert_eq!(state(&bus, &relay), PartState::Running, "it has been sound for a while");
    bus.shutdown(secs(5)).await.unwrap();
}

/// One that dies again and again has failed: then only a restart of the process helps.
#[tokio::test]
async fn a_relay_that_dies_again_and_again_is_not_live() {
    let (world, bus, faults) = faulty().await;
    faults.claims.store(u32::MAX, Ordering::SeqCst);
    bus.start().await.unwrap();
    for _ in 0..30 {
        world.pass(secs(1)).await;
    }
    assert_eq!(state(&bus, &Part::Relay(Mailbox::outbox())), PartState::Failed);
    assert!(!bus.health().live);
    bus.shutdown(secs(5)).await.unwrap();
}

/// A task of the application's that panics is shown; it is not run again.
#[tokio::test]
async fn a_background_task_that_panics_is_shown() {
    let world = World::new(options()).await;
    let bus = Bus::builder()
        .transport(Transport::from(world.transport.clone()))
        .task("ticker", |_| async { panic!("out of ticks") })
        .build()
        .unwrap();
    bus.start().await.unwrap();
    world.settle().await;
    let health = bus.health();
    let part = health.part(&Part::Task("ticker".to_owned())).unwrap();
    assert_eq!((part.state, health.live), (PartState::Failed, false));
    assert!(part.error.as_ref().unwrap().text.contains("out of ticks"));
    bus.shutdown(secs(1)).await.unwrap();
}

/// A feed that ends by itself, and a broker that is away when the subscription starts: it joins again, and says so meanwhile.
#[tokio::test]
async fn a_subscription_joins_again_by_itself() {
    let (world, bus, faults) = faulty().await;
    faults.joins.store(2, Ordering::SeqCst);
    faults.feeds.store(2, Ordering::SeqCst);
    bus.start().await.unwrap();
    let running = world::subscribe(&bus, "g").await.unwrap();
    assert!(
        matches!(running.flow(), Flow::Connecting(Some(_))),
        "{:?}",
        running.flow()
    );
    let part = Part::Subscription(GroupName::new("g"));
    let health = bus.health();
    assert_eq!(
        (state(&bus, &part), health.live, health.ready),
        (PartState::Degraded, true, true)
    );
    assert_eq!(
        running.connected(Duration::ZERO).await.unwrap_err().kind(),
        ErrorKind::Unavailable
    );
    bus.publish(event("t", None, "1")).await.unwrap();
    for _ in 0..20 {
        world.pass(secs(1)).await;
    }
    running.connected(secs(1)).await.unwrap();
    assert_eq!(running.flow(), Flow::Running);
    assert_eq!(state(&bus, &part), PartState::Running);
    world.until(|_| running.report().delivered == 1).await;
    bus.shutdown(secs(5)).await.unwrap();
    assert_eq!(state(&bus, &part), PartState::Stopped);
}

/// A feed that joins, and closes at once, and so on, is asked for ever more seldom.
#[tokio::test]
async fn a_feed_that_closes_at_once_is_joined_ever_more_seldom() {
    let (world, bus, faults) = faulty().await;
    faults.feeds.store(u32::MAX, Ordering::SeqCst);
    bus.start().await.unwrap();
    let _running = world::subscribe(&bus, "g").await.unwrap();
    for _ in 0..600 {
        world.pass(Duration::from_millis(100)).await;
    }
    let joined = faults.joined.load(Ordering::SeqCst);
    assert!((3..30).contains(&joined), "joined {joined} times in a minute");
    let part = bus
        .health()
        .part(&Part::Subscription(GroupName::new("g")))
        .unwrap()
        .clone();
    assert_eq!(part.state, PartState::Degraded);
}

/// A group without rights is shown for as long as that lasts, and with what to do; the broker is there all the while.
#[tokio::test]
async fn a_group_without_rights_is_shown_until_it_has_them() {
    let (world, bus, faults) = faulty().await;
    bus.start().await.unwrap();
    faults.refusals.store(3, Ordering::SeqCst);
    let _running = world::subscribe(&bus, "g").await.unwrap();
    let part = Part::Subscription(GroupName::new("g"));
    for _ in 0..20 {
        world.pass(secs(1)).await;
        let health = bus.health();
        let shown = health.part(&part).unwrap();
        assert_eq!((shown.state, health.live), (PartState::Degraded, true));
        let error = shown.error.as_ref().unwrap();
        assert!(
            error.text.contains("READ on the group") && error.fix.is_some(),
            "{error:?}"
        );
    }
    for _ in 0..20 {
        world.pass(secs(1)).await;
    }
    assert_eq!(state(&bus, &part), PartState::Running, "it has not been said again");
    // And at once with the first message.
    faults.refusals.store(1, Ordering::SeqCst);
    bus.publish(event("t", None, "1")).await.unwrap();
    world.until(|_| faults.refusals.load(Ordering::SeqCst) == 0).await;
    bus.publish(event("t", None, "2")).await.unwrap();
    for _ in 0..3 {
        world.pass(secs(1)).await;
    }
    assert_eq!(state(&bus, &part), PartState::Running);
    bus.shutdown(secs(5)).await.unwrap();
}

/// A start that is cut off while the log opens its mailbox has started nothing, and may be tried again.
#[tokio::test]
async fn a_start_that_is_cut_off_may_be_tried_again() {
    let (world, bus, faults) = faulty().await;
    faults.opens_hang.store(true, Ordering::SeqCst);
    for _ in 0..2 {
        let cut_off = tokio::time::timeout(Duration::from_millis(20), bus.start()).await;
        assert!(cut_off.is_err(), "the log does not open its mailbox");
    }
    faults.opens_hang.store(false, Ordering::SeqCst);
    bus.start().await.unwrap();
    bus.publish(event("t", None, "1")).await.unwrap();
    world.until(|w| w.published("t") == ["1"]).await;
    bus.shutdown(secs(5)).await.unwrap();
}

/// What makes no sense is still an error of the start, and leaves nothing behind.
#[tokio::test]
async fn what_cannot_be_had_is_an_error_of_the_start() {
    let world = World::new(options()).await;
    let refusing = Transport::from(world.transport.clone()).map_subscriber(|_| Refusing);
    let bus = Bus::builder()
        .transport(refusing)
        .clock(world.clock.clone())
        .build()
        .unwrap();
    for _ in 0..2 {
        let error = world::subscribe(&bus, "g").await.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "and the group is free again");
    }
}

#[derive(Debug)]
struct Refusing;

#[async_trait]
impl Subscriber for Refusing {
    async fn subscribe(&self, _: &Subscription) -> Result<Feed> {
        Err(Error::new(ErrorKind::Config, "no such exchange"))
    }
    async fn declare(&self, _: &Subscription) -> Result<()> {
        Err(Error::new(ErrorKind::Config, "no such exchange"))
    }
}

/// A broker that does not let a member go in order, since it hangs, is left behind soon after the deadline of a stop: also if that
/// passes while the member is leaving.
#[tokio::test]
async fn a_member_that_cannot_leave_is_cut_off_by_the_deadline() {
    let (world, bus, faults) = faulty().await;
    faults.leaves_hang.store(true, Ordering::SeqCst);
    bus.start().await.unwrap();
    let running = world::subscribe(&bus, "g").await.unwrap();
    let stopping = running.clone();
    let stopping = tokio::spawn(async move { stopping.stop(Duration::from_millis(1)).await });
    // It has begun to leave before the deadline has passed.
    world.settle().await;
    world.clock.advance(secs(1));
    assert!(stopping.await.unwrap().is_err());
    // Nothing is left of it to wait for.
    let shutdown = tokio::time::timeout(secs(2), bus.shutdown(secs(60))).await;
    shutdown.unwrap().unwrap();
}

/// What was handled, and comes again because the broker did not take its acknowledgement, is acknowledged and not handled again.
#[tokio::test]
async fn what_is_done_and_not_acknowledged_is_handled_once() {
    let (world, bus, faults) = faulty().await;
    faults.late_settles.store(1, Ordering::SeqCst);
    bus.start().await.unwrap();
    let running = world::subscribe(&bus, "g").await.unwrap();
    bus.publish(event("t", Some("k"), "1")).await.unwrap();
    world.until(|_| running.report().delivered == 2).await;
    bus.publish(event("t", Some("k"), "2")).await.unwrap();
    world.until(|_| running.report().delivered == 3).await;
    world.settle().await;
    let report = running.report();
    assert_eq!((report.handled, report.dropped, report.unsettled), (2, 1, 1));
    bus.shutdown(secs(5)).await.unwrap();
}

/// What the broker deletes before the group has read it is counted, and health shows it for a while.
#[tokio::test]
async fn messages_that_were_deleted_unread_are_shown() {
    let (world, bus, faults) = faulty().await;
    faults.misses.store(2, Ordering::SeqCst);
    bus.start().await.unwrap();
    let running = world::subscribe(&bus, "g").await.unwrap();
    world.until(|_| running.report().missed == 10).await;
    let part = Part::Subscription(GroupName::new("g"));
    assert_eq!(state(&bus, &part), PartState::Degraded);
    let error = bus.health().part(&part).unwrap().error.clone().unwrap();
    assert!(
        error.text.contains("deleted 5 messages") && error.fix.is_some(),
        "{error:?}"
    );
    world.pass(secs(601)).await;
    world.until(|_| state(&bus, &part) == PartState::Running).await;
    bus.shutdown(secs(5)).await.unwrap();
}

/// A settler that hangs is shown, and bounds neither a stop nor a shutdown.
#[tokio::test]
async fn a_settler_that_hangs_is_shown_and_left_behind() {
    let (world, bus, faults) = faulty().await;
    faults.settles_hang.store(true, Ordering::SeqCst);
    faults.closes_hang.store(true, Ordering::SeqCst);
    bus.start().await.unwrap();
    let running = world::subscribe(&bus, "g").await.unwrap();
    bus.publish(event("t", None, "1")).await.unwrap();
    for _ in 0..15 {
        world.pass(secs(1)).await;
    }
    assert_eq!(running.report().delivered, 1);
    let part = Part::Subscription(GroupName::new("g"));
    assert_eq!(state(&bus, &part), PartState::Degraded);
    let began = Instant::now();
    let error = running.stop(Duration::ZERO).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(began.elapsed() < secs(4), "{:?}", began.elapsed());
    assert!(bus.shutdown(Duration::ZERO).await.is_err());
    assert!(began.elapsed() < secs(8), "{:?}", began.elapsed());
}

/// A session whose wait returns at once, and a feed that gives empty batches, do not make a core spin.
#[tokio::test]
async fn waits_that_end_at_once_do_not_spin() {
    let (world, bus, faults) = faulty().await;
    faults.wait_returns_at_once.store(true, Ordering::SeqCst);
    bus.start().await.unwrap();
    for _ in 0..100 {
        world.pass(Duration::from_millis(100)).await;
    }
    let claims = faults.asked.swap(0, Ordering::SeqCst);
    assert!(claims < 100, "{claims} claims in 10 s");
    faults.empty_batches.store(true, Ordering::SeqCst);
    let _running = world::subscribe(&bus, "g").await.unwrap();
    for _ in 0..100 {
        world.pass(Duration::from_millis(100)).await;
    }
    let asked = faults.asked.load(Ordering::SeqCst);
    assert!(asked < 200, "asked {asked} times in 10 s");
}

/// A publisher that reports no outcome has not published.
#[tokio::test]
async fn a_publisher_without_outcomes_has_not_published() {
    let world = World::new(options()).await;
    let forgetful = Transport::from(world.transport.clone()).map_publisher(|_| Forgetful);
    let bus = Bus::builder()
        .transport(forgetful)
        .clock(world.clock.clone())
        .build()
        .unwrap();
    let error = bus.publish_direct(event("t", None, "1")).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(error.to_chain().contains("without an outcome"), "{}", error.to_chain());
}

#[derive(Debug)]
struct Forgetful;

#[async_trait]
impl Publisher for Forgetful {
    async fn publish(&self, _: &[Message], _: &Outcomes) {}
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

/// After an error of its wait the relay listens again within a poll interval.
#[tokio::test]
async fn an_error_of_the_wait_leaves_no_relay_deaf() {
    let (world, bus, faults) = faulty().await;
    bus.start().await.unwrap();
    world.settle().await;
    faults.wait_fails.store(1, Ordering::SeqCst);
    // What makes the engine wait anew.
    bus.publish(event("t", None, "1")).await.unwrap();
    world.until(|w| w.published("t").len() == 1).await;
    world.settle().await;
    // Another process, whose commits nobody tells this one of.
    world.bus.publish(event("t", None, "2")).await.unwrap();
    for _ in 0..12 {
        world.pass(Duration::from_millis(100)).await;
    }
    assert_eq!(world.published("t").len(), 2);
}
