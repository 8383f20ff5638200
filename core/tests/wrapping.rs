//! A log wrapped in another, to meter it and to make it slow: everything goes on working, transactions included. And a
//! transport that takes no dead letters.

#![allow(clippy::unwrap_used, missing_docs)]

mod world;

use async_trait::async_trait;
use postrider_core::{
    Bus, Context, DeliveryTag, Disposition, Error, ErrorKind, Event, EventBus, EventLog, Feed, GroupName, HandlerError,
    HandlerResult, Mailbox, PublishError, Result, Settler, Subscriber, Subscription, Topic, Transport,
    clock::{Clock, ManualClock},
    log::{
        Claim, Claimed, EventLogStore, Lent, LogCapabilities, NewRecord, Purge, Session, SessionOptions, SettleReport,
        Settled,
    },
    memory::{MemoryLog, MemoryTransport},
};
use serde::{Deserialize, Serialize};
use std::{
    collections::HashSet,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use world::{event, name, options, secs};

/// Counts the calls, and takes a second for each settle.
#[derive(Debug)]
struct Metered<S> {
    inner: S,
    clock: Arc<ManualClock>,
    calls: Arc<AtomicU32>,
}

impl<S> Metered<S> {
    fn count(&self) {
        self.calls.fetch_add(1, Ordering::SeqCst);
    }
}

#[async_trait]
impl<S: EventLogStore> EventLogStore for Metered<S> {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.count();
        self.inner.append(mailbox, batch).await
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        let inner = self.inner.open(mailbox, options).await?;
        Ok(Box::new(Metered {
            inner,
            clock: self.clock.clone(),
            calls: self.calls.clone(),
        }))
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.inner.purge(request).await
    }
}

#[async_trait]
impl Session for Metered<Box<dyn Session>> {
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        self.count();
        self.inner.claim(request).await
    }
    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        self.count();
        let tags: HashSet<_> = batch.iter().map(|settled| settled.tag).collect();
        assert_eq!(tags.len(), batch.len(), "a batch names a record once");
        self.clock.sleep(secs(1)).await;
        self.inner.settle(batch).await
    }
    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        self.inner.resume(topic, max).await
    }
    async fn wait(&self, at_most: Duration) -> Result<()> {
        self.inner.wait(at_most).await
    }
    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[tokio::test]
async fn a_wrapped_log_works_as_before() {
    let clock = ManualClock::shared();
    let (memory, transport) = (
        MemoryLog::on_clock(clock.clone()),
        MemoryTransport::on_clock(clock.clone()),
    );
    let calls = Arc::new(AtomicU32::new(0));
    let (meter, counted) = (clock.clone(), calls.clone());
    let log = EventLog::from(memory.clone()).map_store(|inner| Metered {
        inner,
        clock: meter,
        calls: counted,
    });
    // Each is refused once, and its second try is quicker than the settle of its first.
    let refused = Mutex::new(HashSet::new());
    transport.faults().on_publish(move |message| {
        let is_first = refused.lock().unwrap().insert(message.id());
        if is_first {
            Err(PublishError::rejected("not at first"))
        } else {
            Ok(())
        }
    });
    let relay = options().with_local_interval(Duration::from_millis(10));
    let bus = Bus::builder()
        .log(log)
        .transport(transport.clone())
        .relay(relay)
        .clock(clock.clone())
        .build()
        .unwrap();
    bus.start().await.unwrap();
    // In a transaction of the wrapped log's own, in one begun by the bus, and through the object.
    let mut tx = memory.transaction();
    bus.publish_in(&mut tx, event("t", Some("k"), "1")).await.unwrap();
    tx.commit();
    let mut tx = bus.begin().await.unwrap();
    bus.publish_in(&mut tx, event("t", Some("k"), "2")).await.unwrap();
    bus.publish_all_in(&mut tx, [event("t", Some("k"), "3"), event("t", None, "4")])
        .await
        .unwrap();
    tx.commit().await.unwrap();
    let mut tx = bus.begin().await.unwrap();
    bus.publish_in(&mut tx, event("t", Some("k"), "undone")).await.unwrap();
    tx.rollback().await.unwrap();
    let object: Arc<dyn EventBus> = bus.as_dyn();
    let mut tx = memory.transaction();
    object.publish_in(&mut tx, event("t", Some("k"), "5")).await.unwrap();
    object.publish(event("t", Some("k"), "6")).await.unwrap();
    tx.commit();
    for _ in 0..2000 {
        clock.advance(Duration::from_millis(20));
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
    }
    let sent = transport.published(&Topic::new("t"));
    let of_key: Vec<String> = sent.iter().filter(|m| m.key().is_some()).map(name).collect();
    assert_eq!(of_key, ["1", "2", "3", "6", "5"], "in the order of commits, each once");
    assert_eq!(sent.len(), 6);
    assert!(calls.load(Ordering::SeqCst) > 5);
}

#[tokio::test]
async fn a_topic_that_is_back_before_its_parkings_are_written_strands_nothing() {
    let clock = ManualClock::shared();
    let (memory, transport) = (
        MemoryLog::on_clock(clock.clone()),
        MemoryTransport::on_clock(clock.clone()),
    );
    let (meter, calls) = (clock.clone(), Arc::new(AtomicU32::new(0)));
    let log = EventLog::from(memory).map_store(|inner| Metered {
        inner,
        clock: meter,
        calls,
    });
    // Away for a moment, again and again, while each settle takes a second.
    let now = clock.clone();
    transport.faults().on_publish(move |_| {
        let is_away = now.elapsed().since_the_beginning().as_millis() % 1700 < 900;
        if is_away {
            Err(PublishError::destination("full"))
        } else {
            Ok(())
        }
    });
    let relay = options().with_batch_size(4).with_max_in_flight(8);
    let bus = Bus::builder()
        .log(log)
        .transport(transport.clone())
        .relay(relay)
        .clock(clock.clone())
        .seed(3)
        .build()
        .unwrap();
    bus.start().await.unwrap();
    for n in 0..40 {
        bus.publish(event("t", Some(["a", "b", "c"][n % 3]), &n.to_string()))
            .await
            .unwrap();
    }
    for _ in 0..6000 {
        clock.advance(Duration::from_millis(50));
        for _ in 0..20 {
            tokio::task::yield_now().await;
        }
        if transport.published(&Topic::new("t")).len() >= 40 {
            break;
        }
    }
    let sent: HashSet<String> = transport.published(&Topic::new("t")).iter().map(name).collect();
    assert_eq!(sent.len(), 40, "{:?}", bus.relay_report());
}

#[tokio::test]
async fn parts_that_are_missing_are_refused_by_name() {
    let memory = MemoryLog::new();
    let bare = EventLog::new("bare", memory.clone(), LogCapabilities::default());
    let bus = Bus::builder()
        .log(bare)
        .transport(MemoryTransport::new())
        .build()
        .unwrap();
    let says = |error: postrider_core::Error, what: &str| {
        assert_eq!(error.kind(), postrider_core::ErrorKind::Unsupported);
        assert!(
            error.to_string().contains(what) && error.to_string().contains("log: bare"),
            "{error}"
        );
    };
    says(bus.begin().await.unwrap_err(), "transactions");
    says(bus.log().unwrap().admin().unwrap_err(), "administration");
    says(
        bus.publish(event("t", Some("k"), "x")).await.unwrap_err(),
        "order of keys",
    );
    says(
        bus.publish_after(event("t", None, "x"), secs(1)).await.unwrap_err(),
        "delayed publishing",
    );
    let mut tx = memory.transaction();
    says(
        bus.publish_in(&mut tx, event("t", None, "x")).await.unwrap_err(),
        "transactions",
    );
    bus.publish(event("t", None, "x")).await.unwrap();
    let wrong = Lent::exclusive(&mut 1_u8).get_mut::<String>().unwrap_err();
    assert_eq!(wrong.kind(), postrider_core::ErrorKind::WrongTransaction);
}

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "noted")]
struct Noted {
    id: u32,
}

/// Takes no dead letter: what is to be one comes again.
#[derive(Debug)]
struct NoDeadLetters<S>(S);

#[async_trait]
impl<S: Subscriber> Subscriber for NoDeadLetters<S> {
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        let feed = self.0.subscribe(subscription).await?;
        Ok(feed.map_settler(NoDeadLetters))
    }
    async fn declare(&self, subscription: &Subscription) -> Result<()> {
        self.0.declare(subscription).await
    }
}

#[async_trait]
impl<S: Settler> Settler for NoDeadLetters<S> {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let mut outcomes = Vec::new();
        for (tag, disposition) in batch {
            let is_dead = *disposition == Disposition::DeadLetter;
            let said = if is_dead { Disposition::Release } else { *disposition };
            let settled = self.0.settle(&[(*tag, said)]).await.remove(0);
            outcomes.push(if is_dead {
                Err(Error::new(ErrorKind::Unavailable, "not stored"))
            } else {
                settled
            });
        }
        outcomes
    }
    async fn close(&self, deadline: Duration) -> Result<()> {
        self.0.close(deadline).await
    }
}

/// A dead letter that cannot be stored comes again at longer and longer intervals, and is never lost.
#[tokio::test]
async fn what_cannot_be_settled_does_not_spin() {
    let clock = ManualClock::shared();
    let broker = MemoryTransport::on_clock(clock.clone());
    let transport = Transport::from(broker.clone()).map_subscriber(NoDeadLetters);
    let bus = Bus::builder()
        .transport(transport)
        .clock(clock.clone())
        .source("test")
        .build()
        .unwrap();
    bus.start().await.unwrap();
    let failing = async |_: &Noted, _: &mut Context| -> HandlerResult { Err(HandlerError::permanent("never")) };
    let running = bus.subscribe::<Noted>("g").handler(failing).start().await.unwrap();
    bus.publish_direct(&Noted { id: 1 }).await.unwrap();
    for _ in 0..1200 {
        for _ in 0..50 {
            tokio::task::yield_now().await;
        }
        clock.advance(Duration::from_millis(100));
    }
    // In two minutes: after 0.5, 1, 2, 4, 8, 16 and then every 30 seconds.
    let report = running.report();
    assert!((7..=11).contains(&report.delivered), "{report:?}");
    assert!(broker.dead_letters(&GroupName::new("g")).is_empty());
    bus.shutdown(secs(1)).await.unwrap();
}
