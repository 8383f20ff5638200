//! The relay's paths, on the memory log and transport and a clock that only moves when told.

#![allow(clippy::unwrap_used, clippy::panic)]

mod world;

use postrider_core::{
    Message, PublishError, Topic,
    log::{Filter, Page, RecordState},
    relay::{Backoff, OnFailed, SendOrder, TopicOptions, TopicPattern, Unroutable},
};
use std::{
    collections::HashMap,
    sync::{
        Arc, Mutex,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};
use world::{World, event, options, secs};

/// Each message on its way: which try of it this is.
#[derive(Debug, Default, Clone)]
struct Tries(Arc<Mutex<HashMap<String, u32>>>);

impl Tries {
    fn count(&self, message: &Message) -> u32 {
        let mut tries = self.0.lock().unwrap();
        let n = tries.entry(world::name(message)).or_default();
        *n += 1;
        *n
    }
    fn of(&self, name: &str) -> u32 {
        self.0.lock().unwrap().get(name).copied().unwrap_or(0)
    }
}

#[tokio::test]
async fn what_is_published_arrives_and_is_kept_in_the_history() {
    let world = World::start(options()).await;
    world
        .bus
        .publish_all((0..100).map(|n| event("t", Some("k"), &n.to_string())))
        .await
        .unwrap();
    world
        .bus
        .publish(event("t", None, "keyless"))
        .header("tenant", "a")
        .await
        .unwrap();
    world.until(|w| w.published("t").len() == 101).await;
    let expected: Vec<String> = (0..100).map(|n| n.to_string()).collect();
    assert_eq!(world.published_of_key("t", "k"), expected);
    world.until_async(async |w| w.stats().await.succeeded == 101).await;
    let message = world
        .transport
        .published(&Topic::new("t"))
        .into_iter()
        .find(|m| m.key().is_none())
        .unwrap();
    assert_eq!((message.source(), message.header("tenant")), (Some("test"), Some("a")));
    assert!(message.time().is_some() && message.sequence().is_some());
    let report = world.bus.relay_report();
    assert!(report.is_healthy());
    assert_eq!((report.counts.published, report.counts.lost), (101, 0));
    world.bus.shutdown(secs(5)).await.unwrap();
}

#[tokio::test]
async fn a_refused_message_goes_through_the_local_tier_and_holds_back_only_its_key() {
    let world = World::start(options()).await;
    let tries = Tries::default();
    let counted = tries.clone();
    world.transport.faults().on_publish(move |m| {
        if counted.count(m) <= 2 && world::name(m) == "bad" {
            Err(PublishError::rejected("no"))
        } else {
            Ok(())
        }
    });
    let batch = [
        event("t", Some("k"), "bad"),
        event("t", Some("k"), "after"),
        event("t", Some("j"), "other"),
        event("t", None, "free"),
    ];
    world.bus.publish_all(batch).await.unwrap();
    world.until(|w| w.published("t").len() == 2).await;
    world.until_async(async |w| w.stats().await.parked == 2).await;
    world.pass(secs(3)).await;
    world.until(|_| tries.of("bad") == 2).await;
    assert_eq!(world.published("t").len(), 2, "its follower waits");
    world.pass(secs(3)).await;
    world.until(|w| w.published("t").len() == 4).await;
    assert_eq!(world.published_of_key("t", "k"), ["bad", "after"]);
    assert_eq!(tries.of("bad"), 3);
    let done = world.show_by_name("bad").await;
    assert_eq!(
        (done.attempts, done.state),
        (1, RecordState::Succeeded),
        "three tries are one attempt"
    );
}

#[tokio::test]
async fn attempts_are_exhausted_and_the_dead_letter_is_told_of_and_redriven() {
    let told: Arc<Mutex<Vec<(String, u32, usize)>>> = Arc::default();
    let heard = told.clone();
    let options = options()
        .with_max_attempts(2)
        .with_local_max_attempts(2)
        .with_backoff(Backoff::Fixed(secs(10)))
        .on_exhausted(move |record| {
            heard
                .lock()
                .unwrap()
                .push((world::name(&record.message), record.attempts, record.errors.len()));
            panic!("a callback's panic is its own affair");
        });
    let world = World::start(options).await;
    let (tries, broken) = (Tries::default(), Arc::new(AtomicU32::new(1)));
    let (counted, still) = (tries.clone(), broken.clone());
    world.transport.faults().on_publish(move |m| {
        let n = counted.count(m);
        if world::name(m) == "bad" && still.load(Ordering::SeqCst) == 1 {
            return Err(PublishError::rejected(format!("no, for the {n}th time")));
        }
        Ok(())
    });
    world
        .bus
        .publish_all([event("t", Some("k"), "bad"), event("t", Some("k"), "after")])
        .await
        .unwrap();
    world.until(|_| tries.of("bad") == 1).await;
    world.pass(secs(3)).await;
    world.until(|_| tries.of("bad") == 2).await;
    world
        .until_async(async |w| w.show_by_name("bad").await.due_at.is_some())
        .await;
    world.pass(secs(11)).await;
    world.until(|_| tries.of("bad") == 3).await;
    world.pass(secs(3)).await;
    world.until(|_| tries.of("bad") == 4).await;
    world.until(|_| told.lock().unwrap().len() == 1).await;
    assert_eq!(told.lock().unwrap()[0], ("bad".to_owned(), 2, 4));
    world.until(|w| w.published("t") == ["after"]).await;
    let failed = world.show_by_name("bad").await;
    assert_eq!((failed.state, failed.attempts), (RecordState::Failed, 2));
    assert_eq!(
        failed.errors[3].text,
        "the broker refused the message: no, for the 4th time"
    );
    broken.store(0, Ordering::SeqCst);
    let admin = world.bus.log().unwrap().admin().unwrap();
    let all = Filter::of(world::outbox());
    assert_eq!(admin.redrive(&all, 10).await.unwrap(), 1);
    world.pass(secs(1)).await;
    world.until(|w| w.published("t") == ["after", "bad"]).await;
    assert_eq!(world.bus.relay_report().counts.failed, 1);
}

#[tokio::test]
async fn an_invalid_message_fails_at_once_and_may_hold_its_key() {
    let hold = TopicOptions::default().with_on_failed(OnFailed::HoldKey);
    let world = World::start(options().topic(TopicPattern::parse("hold*").unwrap(), hold)).await;
    world.transport.faults().on_publish(|m| {
        if world::name(m) == "bad" {
            Err(PublishError::invalid("too odd"))
        } else {
            Ok(())
        }
    });
    for topic in ["hold", "release"] {
        let batch = ["bad", "after"].map(|name| event(topic, Some("k"), name));
        world.bus.publish_all(batch).await.unwrap();
    }
    world.until(|w| w.published("release") == ["after"]).await;
    world.until_async(async |w| w.stats().await.failed == 2).await;
    world.pass(secs(120)).await;
    world.settle().await;
    assert!(world.published("hold").is_empty());
    let admin = world.bus.log().unwrap().admin().unwrap();
    assert_eq!(
        admin
            .discard(&Filter::of(world::outbox()).with_topic(Topic::new("hold")), 10)
            .await
            .unwrap(),
        1
    );
    world.pass(secs(1)).await;
    world.until(|w| w.published("hold") == ["after"]).await;
}

#[tokio::test]
async fn an_outage_of_the_broker_costs_no_attempt() {
    let world = World::start(options()).await;
    world.transport.faults().set_down(true);
    world
        .bus
        .publish_all((0..50).map(|n| event("t", Some("k"), &n.to_string())))
        .await
        .unwrap();
    world.until(|w| w.bus.relay_report().broker_away.is_some()).await;
    for _ in 0..60 {
        world.pass(secs(10)).await;
    }
    assert!(!world.bus.relay_report().is_healthy());
    world.transport.faults().clear();
    for _ in 0..20 {
        world.pass(secs(1)).await;
    }
    world.until(|w| w.published("t").len() == 50).await;
    let expected: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    assert_eq!(world.published_of_key("t", "k"), expected);
    world.until_async(async |w| w.stats().await.succeeded == 50).await;
    let all = world.list().await;
    assert!(
        all.iter()
            .all(|record| record.attempts == 0 && record.errors.is_empty())
    );
    assert!(world.bus.relay_report().is_healthy());
}

#[tokio::test]
async fn a_missing_destination_pauses_its_topic_only_and_costs_no_attempt() {
    let world = World::start(options()).await;
    let (missing, tries) = (Arc::new(AtomicU32::new(1)), Tries::default());
    let (still, counted) = (missing.clone(), tries.clone());
    world.transport.faults().on_publish(move |m| {
        counted.count(m);
        if m.topic().as_str() == "away" && still.load(Ordering::SeqCst) == 1 {
            return Err(PublishError::unroutable("no such exchange"));
        }
        Ok(())
    });
    let away = (0..30).map(|n| event("away", Some(["a", "b", "c"][n % 3]), &n.to_string()));
    world.bus.publish_all(away).await.unwrap();
    world.until_async(async |w| w.stats().await.parked == 30).await;
    let paused = world.bus.relay_report().paused_topics;
    assert_eq!(paused[0].0.as_str(), "away");
    assert!(paused[0].1.contains("no such exchange"));
    world.bus.publish(event("here", None, "1")).await.unwrap();
    world.bus.publish(event("away", None, "late")).await.unwrap();
    world.until(|w| w.published("here").len() == 1).await;
    for _ in 0..60 {
        world.pass(secs(10)).await;
    }
    let probes: u32 = (0..30).map(|n| tries.of(&n.to_string())).sum();
    assert!((10..200).contains(&probes), "it is probed, and seldom: {probes}");
    missing.store(0, Ordering::SeqCst);
    for _ in 0..30 {
        world.pass(secs(1)).await;
    }
    world.until(|w| w.published("away").len() == 31).await;
    for (at, key) in ["a", "b", "c"].iter().enumerate() {
        let expected: Vec<String> = (at..30).step_by(3).map(|n| n.to_string()).collect();
        assert_eq!(world.published_of_key("away", key), expected);
    }
    world.until_async(async |w| w.stats().await.succeeded == 32).await;
    assert!(world.list().await.iter().all(|record| record.attempts == 0));
    assert!(world.bus.relay_report().is_healthy());
}

#[tokio::test]
async fn records_left_waiting_by_a_relay_of_before_are_probed_by_the_next() {
    let world = World::start(options()).await;
    world
        .transport
        .faults()
        .on_publish(|_| Err(PublishError::destination("full")));
    world
        .bus
        .publish_all((0..5).map(|n| event("t", None, &n.to_string())))
        .await
        .unwrap();
    world.until_async(async |w| w.stats().await.parked == 5).await;
    world.bus.shutdown(secs(5)).await.unwrap();
    world.transport.faults().clear();
    let next = world.another(options()).await;
    for _ in 0..5 {
        next.pass(secs(1)).await;
    }
    next.until(|w| w.published("t").len() == 5).await;
}

#[tokio::test]
async fn what_leads_nowhere_is_dropped_where_the_topic_says_so() {
    let drop = TopicOptions::default().with_unroutable(Unroutable::Drop);
    let world = World::start(options().topic(TopicPattern::parse("metrics.*").unwrap(), drop)).await;
    world
        .transport
        .faults()
        .on_publish(|_| Err(PublishError::unroutable("nobody listens")));
    world
        .bus
        .publish_all((0..5).map(|n| event("metrics.cpu", Some("k"), &n.to_string())))
        .await
        .unwrap();
    world.until(|w| w.bus.relay_report().counts.dropped == 5).await;
    world.until_async(async |w| w.stats().await.pending == 0).await;
}

#[tokio::test]
async fn a_message_that_kills_its_connection_does_not_stop_the_others() {
    let world = World::start(options().with_max_attempts(1).with_local_max_attempts(1)).await;
    let deaths = Arc::new(AtomicU32::new(0));
    let counted = deaths.clone();
    world.transport.faults().on_publish(move |m| {
        if world::name(m) == "poison" {
            counted.fetch_add(1, Ordering::SeqCst);
            return Err(PublishError::connection("connection reset by peer"));
        }
        Ok(())
    });
    let mut batch: Vec<Message> = (0..40).map(|n| event("t", None, &n.to_string())).collect();
    batch.insert(20, event("t", Some("k"), "poison"));
    batch.push(event("t", Some("k"), "after"));
    world.bus.publish_all(batch).await.unwrap();
    for _ in 0..100 {
        world.pass(secs(1)).await;
    }
    world.until(|w| w.published("t").len() == 41).await;
    world.until_async(async |w| w.stats().await.failed == 1).await;
    let failed = world.show_by_name("poison").await;
    assert!(
        failed
            .errors
            .last()
            .unwrap()
            .text
            .contains("lost twice with only this message"),
        "{failed:?}"
    );
    assert!(deaths.load(Ordering::SeqCst) >= 3);
    let others = world
        .list()
        .await
        .into_iter()
        .filter(|r| world::name(&r.message) != "poison");
    assert!(
        others.into_iter().all(|r| r.attempts == 0),
        "the innocent are not blamed"
    );
}

#[tokio::test]
async fn delayed_events_come_when_it_is_time() {
    let world = World::start(options()).await;
    world
        .bus
        .publish_after(event("t", None, "later"), secs(3600))
        .await
        .unwrap();
    world.bus.publish(event("t", None, "now")).await.unwrap();
    world.until(|w| w.published("t") == ["now"]).await;
    world.pass(secs(3590)).await;
    world.settle().await;
    assert_eq!(world.published("t"), ["now"]);
    world.pass(secs(11)).await;
    world.until(|w| w.published("t") == ["now", "later"]).await;
}

#[tokio::test]
async fn a_key_is_sent_one_by_one_unless_its_topic_is_pipelined() {
    for (order, calls) in [(SendOrder::Strict, 20), (SendOrder::Pipelined, 1)] {
        let topic = TopicOptions::default().with_order(order);
        let world = World::new(options().topic(TopicPattern::parse("*").unwrap(), topic)).await;
        let batches = world.count_publish_calls();
        world
            .bus
            .publish_all((0..20).map(|n| event("t", Some("k"), &n.to_string())))
            .await
            .unwrap();
        world.bus.start().await.unwrap();
        world.until(|w| w.published("t").len() == 20).await;
        assert_eq!(batches.load(Ordering::SeqCst), calls, "{order:?}");
    }
}

#[tokio::test]
async fn a_few_wait_for_more_while_many_are_with_the_broker_and_not_for_long() {
    let world = World::start(options()).await;
    let calls = world.count_publish_calls();
    let calls = || calls.load(Ordering::SeqCst);
    let many = |from: u32| (from..from + 10).map(|n| event("t", None, &n.to_string()));
    world.transport.faults().set_latency(secs(5));
    world.bus.publish_all(many(0)).await.unwrap();
    world.until(|_| calls() == 1).await;
    for n in 10..12 {
        world.bus.publish(event("t", None, &n.to_string())).await.unwrap();
        world.settle().await;
    }
    world.pass(Duration::from_millis(15)).await;
    assert_eq!(calls(), 1, "two wait while ten are under way");
    world.pass(Duration::from_millis(15)).await;
    assert_eq!(calls(), 2, "and go together");
    let some = |from: u32| (from..from + 2).map(|n| event("t", None, &n.to_string()));
    world.bus.publish_all(some(12)).await.unwrap();
    world.settle().await;
    assert_eq!(calls(), 2);
    world.bus.publish_all(some(14)).await.unwrap();
    world.settle().await;
    assert_eq!(calls(), 3, "a third of what is under way does not wait");
    world.pass(secs(20)).await;
    world.until(|w| w.published("t").len() == 16).await;
    assert_eq!(calls(), 3);
}

#[tokio::test]
async fn the_history_is_cleaned_up_and_dead_letters_stay() {
    let world = World::start(
        options()
            .with_retention(secs(100))
            .with_cleanup_interval(secs(50))
            .with_cleanup_batch(7),
    )
    .await;
    world.transport.faults().on_publish(|m| {
        if world::name(m) == "bad" {
            Err(PublishError::invalid("odd"))
        } else {
            Ok(())
        }
    });
    world
        .bus
        .publish_all((0..30).map(|n| event("t", None, &n.to_string())))
        .await
        .unwrap();
    world.bus.publish(event("t", None, "bad")).await.unwrap();
    world.until_async(async |w| w.stats().await.succeeded == 30).await;
    world.pass(secs(90)).await;
    world.settle().await;
    assert_eq!(world.stats().await.succeeded, 30);
    world.pass(secs(20)).await;
    world.pass(secs(50)).await;
    world.until_async(async |w| w.stats().await.succeeded == 0).await;
    world.pass(secs(1_000_000)).await;
    assert_eq!(world.stats().await.failed, 1);
    let none = World::start(options().with_retention(Duration::ZERO)).await;
    none.bus.publish(event("t", None, "1")).await.unwrap();
    none.until(|w| w.published("t").len() == 1).await;
    none.until_async(async |w| w.stats().await.pending == 0).await;
    assert_eq!(none.stats().await.succeeded, 0);
}

#[tokio::test]
async fn a_shutdown_gives_back_what_was_not_sent_and_the_next_relay_goes_on_at_once() {
    let world = World::start(options().with_batch_size(10).with_max_in_flight(10)).await;
    world.transport.faults().set_latency(secs(1));
    world
        .bus
        .publish_all((0..100).map(|n| event("t", Some(["a", "b"][n % 2]), &n.to_string())))
        .await
        .unwrap();
    world.until(|w| w.bus.relay_report().counts.claimed > 0).await;
    let (bus, clock) = (world.bus.clone(), world.clock.clone());
    let stopping = tokio::spawn(async move { bus.shutdown(secs(30)).await });
    world.settle().await;
    clock.advance(secs(2));
    stopping.await.unwrap().unwrap();
    let before = world.published("t").len();
    assert!(before < 100);
    world.transport.faults().clear();
    let next = world.another(options()).await;
    next.until(|w| w.published("t").len() == 100).await;
    for (at, key) in ["a", "b"].iter().enumerate() {
        let expected: Vec<String> = (at..100).step_by(2).map(|n| n.to_string()).collect();
        assert_eq!(next.published_of_key("t", key), expected);
    }
    let error = world.bus.start().await.unwrap_err();
    assert_eq!(error.kind(), postrider_core::ErrorKind::Closed);
}

#[tokio::test]
async fn a_shutdown_past_its_deadline_says_so_and_loses_nothing() {
    let world = World::start(options()).await;
    world.transport.faults().set_latency(secs(3600));
    world.bus.publish(event("t", None, "stuck")).await.unwrap();
    world.until(|w| w.bus.relay_report().counts.claimed == 1).await;
    world.settle().await;
    let (bus, clock) = (world.bus.clone(), world.clock.clone());
    let stopping = tokio::spawn(async move { bus.shutdown(secs(1)).await });
    world.settle().await;
    clock.advance(secs(2));
    assert!(stopping.await.unwrap().is_err());
    world.transport.faults().clear();
    let next = world.another(options()).await;
    next.until(|w| w.published("t") == ["stuck"]).await;
}

/// Health tells of an outage, and of its end, though nobody publishes anything.
#[tokio::test]
async fn an_outage_shows_while_nothing_is_published() {
    let world = World::start(options()).await;
    world.bus.publish(event("t", None, "1")).await.unwrap();
    world.until(|w| w.published("t") == ["1"]).await;
    world.transport.faults().set_down(true);
    for _ in 0..6 {
        world.pass(secs(1)).await;
    }
    world.until(|w| w.bus.relay_report().broker_away.is_some()).await;
    assert!(!world.bus.relay_report().is_healthy());
    world.transport.faults().clear();
    for _ in 0..30 {
        world.pass(secs(1)).await;
    }
    world.until(|w| w.bus.relay_report().is_healthy()).await;
    world.bus.publish(event("t", None, "2")).await.unwrap();
    world.until(|w| w.published("t") == ["1", "2"]).await;
}

#[tokio::test]
async fn a_stuck_publish_counts_as_an_outage() {
    let world = World::start(options().with_publish_timeout(secs(10))).await;
    world.transport.faults().set_latency(secs(3600));
    world.bus.publish(event("t", None, "1")).await.unwrap();
    world.until(|w| w.bus.relay_report().counts.claimed == 1).await;
    world.pass(secs(11)).await;
    world.until(|w| w.bus.relay_report().broker_away.is_some()).await;
    assert!(
        world
            .bus
            .relay_report()
            .broker_away
            .unwrap()
            .contains("no answer within 10s")
    );
    world.transport.faults().clear();
    for _ in 0..5 {
        world.pass(secs(1)).await;
    }
    world.until(|w| w.published("t") == ["1"]).await;
    assert_eq!(world.show_by_name("1").await.attempts, 0);
}

#[tokio::test]
async fn a_relay_that_loses_its_lease_stops_and_its_records_are_published_by_the_other() {
    let short = options().with_lease(secs(15));
    let world = World::start(short.clone()).await;
    world.transport.faults().set_latency(secs(5));
    world
        .bus
        .publish_all((0..10).map(|n| event("t", Some("k"), &n.to_string())))
        .await
        .unwrap();
    world.until(|w| w.bus.relay_report().counts.claimed == 10).await;
    let other = world.another(short).await;
    // A jump longer than the lease, as if both had been paused: neither renewed in time.
    world.clock.advance(secs(60));
    for _ in 0..100 {
        world.pass(secs(1)).await;
    }
    world.transport.faults().clear();
    world.pass(secs(6)).await;
    world.until(|w| w.published_of_key("t", "k").len() == 10).await;
    let expected: Vec<String> = (0..10).map(|n| n.to_string()).collect();
    assert_eq!(
        world.published_of_key("t", "k"),
        expected,
        "first appearances are in order"
    );
    drop(other);
}

#[tokio::test]
async fn pages_of_a_listing_show_everything() {
    let world = World::new(options()).await;
    world
        .bus
        .publish_all((0..25).map(|n| event("t", None, &n.to_string())))
        .await
        .unwrap();
    let admin = world.bus.log().unwrap().admin().unwrap();
    let first = admin
        .list(&Filter::of(world::outbox()), &Page::first(20))
        .await
        .unwrap();
    let second = admin
        .list(&Filter::of(world::outbox()), &Page::after(first.next.unwrap(), 20))
        .await
        .unwrap();
    assert_eq!((first.entries.len(), second.entries.len(), second.next), (20, 5, None));
}
