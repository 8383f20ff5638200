//! What is wrong with one topic, destination or message delays no other, on a clock that only moves when told.

#![allow(clippy::unwrap_used, clippy::panic)]

mod world;

use postrider_core::{
    Outcomes, PublishError, Publisher as _, PublisherExt as _, Topic,
    health::{Part, PartState},
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicUsize, Ordering},
    },
    time::Duration,
};
use world::{World, event, options, secs};

const MS: Duration = Duration::from_millis(1);

/// A broker that answers for the topic `bad` only after 8 s, and then that its destination is away.
fn bad_is_silent(world: &World) {
    world.transport.faults().set_topic_latency(Topic::new("bad"), secs(8));
    world
        .transport
        .faults()
        .on_publish(|message| match message.topic().as_str() {
            "bad" => Err(PublishError::destination("no answer within 8s")),
            _ => Ok(()),
        });
}

/// How long each of the events of one key takes to the broker, one published every 10 ms while `bad` gets as many.
async fn latencies(world: &World, rounds: usize, with_bad: usize) -> Vec<Duration> {
    let mut longest = Vec::new();
    for n in 0..rounds {
        for m in 0..with_bad {
            let key = format!("bad{m}");
            world.bus.publish(event("bad", Some(&key), "bad")).await.unwrap();
        }
        world
            .bus
            .publish(event("good", Some("k"), &n.to_string()))
            .await
            .unwrap();
        let mut waited = Duration::ZERO;
        world.settle().await;
        while world.published("good").len() <= n {
            world.clock.advance(MS);
            waited += MS;
            world.settle().await;
            assert!(waited < secs(1), "{n} of {rounds} does not arrive");
        }
        longest.push(waited);
        world.clock.advance((10 * MS).saturating_sub(waited));
        world.settle().await;
    }
    longest.sort_unstable();
    longest
}

#[tokio::test]
async fn a_silent_destination_delays_no_other_topic() {
    for burst in [0, 3000] {
        let world = World::start(options()).await;
        bad_is_silent(&world);
        let of_burst = (0..burst).map(|n| event("bad", None, &n.to_string()));
        world.bus.publish_all(of_burst).await.unwrap();
        // 20 s: through the first silence and several probes.
        let sorted = latencies(&world, 2000, 2).await;
        let p99 = sorted[sorted.len() * 99 / 100];
        assert!(p99 <= 20 * MS, "p99 {p99:?}, longest {:?}", sorted.last());
        assert_eq!(world.bus.relay_report().paused_topics.len(), 1);

        // Nothing is lost, and no attempt is counted.
        world.transport.faults().clear();
        world.pass(secs(120)).await;
        world.until(|w| w.published("bad").len() == 4000 + burst).await;
        world.until_async(async |w| w.stats().await.pending == 0).await;
        assert_eq!(world.stats().await.failed, 0);
        assert!(world.bus.relay_report().is_healthy(), "{:?}", world.bus.relay_report());
    }
}

#[tokio::test]
async fn a_key_goes_on_while_its_neighbour_of_the_same_call_waits() {
    let world = World::new(options()).await;
    world.transport.faults().set_topic_latency(Topic::new("slow"), secs(5));
    let slow = (0..3).map(|n| event("slow", None, &n.to_string()));
    let key = (0..20).map(|n| event("t", Some("k"), &n.to_string()));
    world.bus.publish_all(slow.chain(key)).await.unwrap();
    world.bus.start().await.unwrap();
    // Without any time passing but what gathering may take.
    for _ in 0..20 {
        world.settle().await;
        world.clock.advance(20 * MS);
    }
    world.settle().await;
    assert_eq!(world.published("t").len(), 20);
    assert_eq!(world.published("slow").len(), 0);
    world.pass(secs(10)).await;
    world.until(|w| w.published("slow").len() == 3).await;
}

#[tokio::test]
async fn a_broker_that_is_slow_for_all_pauses_nothing() {
    let world = World::start(options()).await;
    world.transport.faults().set_latency(secs(6));
    for n in 0..10 {
        world.bus.publish(event(["a", "b"][n % 2], None, "x")).await.unwrap();
        world.pass(500 * MS).await;
    }
    assert!(world.bus.relay_report().paused_topics.is_empty());
    world.pass(secs(10)).await;
    world
        .until(|w| w.published("a").len() + w.published("b").len() == 10)
        .await;
}

#[tokio::test]
async fn a_wrapper_sees_each_outcome_as_it_is_reported() {
    let world = World::new(options()).await;
    world.transport.faults().set_topic_latency(Topic::new("slow"), secs(5));
    let told = Arc::new(std::sync::Mutex::new(Vec::new()));
    let (sink, batch) = (told.clone(), [event("slow", None, "x"), event("t", None, "y")]);
    let outcomes = Outcomes::listened_to(2, move |at, outcome| sink.lock().unwrap().push((at, outcome.is_ok())));
    let transport = world.transport.clone();
    let call = tokio::spawn(async move { transport.publish(&batch, &outcomes).await });
    world.settle().await;
    assert_eq!(*told.lock().unwrap(), [(1, true)]);
    world.pass(secs(6)).await;
    call.await.unwrap();
    assert_eq!(*told.lock().unwrap(), [(1, true), (0, true)]);
    assert_eq!(world.transport.publish_all(&[event("t", None, "z")]).await.len(), 1);
}

/// Large messages that are refused wait in the local tier, by bytes as by number, and keep no room from other topics.
#[tokio::test]
async fn large_refused_messages_stall_no_other_topic() {
    let world = World::start(options()).await;
    let large = "x".repeat(900_000);
    world
        .transport
        .faults()
        .on_publish(|message| match message.topic().as_str() {
            "large" => Err(PublishError::rejected("no")),
            _ => Ok(()),
        });
    let batch = (0..80).map(|_| event("large", None, &large));
    world.bus.publish_all(batch).await.unwrap();
    world.settle().await;
    // In the first moment all of them are refused; from then on others pass, though the local tier is full.
    for n in 0..50 {
        world.bus.publish(event("small", None, &n.to_string())).await.unwrap();
        world.settle().await;
        world.clock.advance(20 * MS);
        world.settle().await;
        assert_eq!(world.published("small").len(), n + 1);
    }
}

/// A relay that holds one record at a time makes all tries of an attempt, and others pass between them.
#[tokio::test]
async fn one_in_flight_has_a_local_tier_too() {
    let tries = Arc::new(AtomicUsize::new(0));
    let options = options().with_batch_size(1).with_max_in_flight(1).with_max_attempts(4);
    let world = World::start(options).await;
    let counted = tries.clone();
    world
        .transport
        .faults()
        .on_publish(move |message| match message.topic().as_str() {
            "bad" => {
                counted.fetch_add(1, Ordering::SeqCst);
                Err(PublishError::rejected("no"))
            }
            _ => Ok(()),
        });
    world.bus.publish(event("bad", None, "x")).await.unwrap();
    world.until(|_| tries.load(Ordering::SeqCst) == 1).await;
    world.bus.publish(event("good", None, "x")).await.unwrap();
    world.until(|w| w.published("good").len() == 1).await;
    for _ in 0..100 {
        world.pass(secs(5)).await;
    }
    world.until_async(async |w| w.stats().await.failed == 1).await;
    assert_eq!(tries.load(Ordering::SeqCst), 12, "4 attempts of 3 tries");
}

/// A relay is healthy again with the first message that the broker confirms after an outage.
#[tokio::test]
async fn health_returns_with_the_first_confirmed_message() {
    let world = World::start(options()).await;
    world.transport.faults().set_down(true);
    world.bus.publish(event("t", None, "1")).await.unwrap();
    world.until(|w| !w.bus.relay_report().is_healthy()).await;
    let health = world.bus.health();
    let broker = health.part(&Part::Broker).unwrap();
    assert_eq!(
        (health.live, health.ready, broker.state),
        (true, true, PartState::Degraded)
    );
    assert!(broker.error.as_ref().unwrap().text.contains("told to be down"));
    world.transport.faults().set_down(false);
    for _ in 0..10 {
        world.pass(50 * MS).await;
    }
    world.until(|w| w.published("t").len() == 1).await;
    world.settle().await;
    assert!(world.bus.relay_report().is_healthy(), "{:?}", world.bus.relay_report());
    assert_eq!(world.bus.health().worst(), PartState::Running);
}

/// A publisher that never answers for one topic delays only that topic, and no message of it is blamed.
#[tokio::test]
async fn a_publisher_that_hangs_on_one_topic_delays_no_other() {
    // Beside steady traffic, and with the hanging topic alone at first.
    for alone in [false, true] {
        let world = World::start(options()).await;
        let hangs = Topic::new("bad");
        world.transport.faults().set_topic_latency(hangs, secs(1_000_000));
        for n in 0..3 {
            world.bus.publish(event("bad", None, &n.to_string())).await.unwrap();
        }
        if alone {
            world.pass(secs(15)).await;
        }
        let sorted = latencies(&world, 6000, 0).await;
        let p99 = sorted[sorted.len() * 99 / 100];
        assert!(
            p99 <= 20 * MS,
            "alone {alone}: p99 {p99:?}, longest {:?}",
            sorted.last()
        );
        assert_eq!(world.bus.relay_report().broker_away, None);
        for stored in world.list().await {
            assert!(
                world::name(&stored.message).len() > 1 || stored.attempts == 0,
                "{stored:?}"
            );
        }
        world.transport.faults().clear();
        for _ in 0..5 {
            world.pass(secs(10)).await;
        }
        world.until(|w| w.published("bad").len() >= 3).await;
        world.until_async(async |w| w.stats().await.pending == 0).await;
        assert_eq!(world.stats().await.failed, 0);
    }
}
