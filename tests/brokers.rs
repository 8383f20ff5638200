//! The example of every broker, on a server of the test's own.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "../examples/brokers/program.rs"]
mod program;

use postrider_testkit::{run, server};

#[test]
fn the_example_runs_on_rabbitmq() {
    let url = server::RabbitMq::shared().url();
    run(async {
        program::run(postrider::rabbitmq::transport(url).unwrap())
            .await
            .unwrap()
    });
}

#[test]
fn the_example_runs_on_kafka() {
    let brokers = server::Kafka::shared().brokers();
    run(async {
        program::run(postrider::kafka::transport(brokers).unwrap())
            .await
            .unwrap()
    });
}

/// Delays are the log's, so they outlast processes, and any transport carries what was delayed.
#[test]
fn a_delayed_event_survives_restarts_and_comes_when_it_is_due() {
    use postrider::{Bus, Event, MessageId, Topic, event::DynEvent as _, sqlite::SqliteLog};
    use std::time::{Duration, Instant};

    #[derive(serde::Serialize, serde::Deserialize, Event)]
    #[event(name = "reminder.due")]
    struct Reminder {
        n: u32,
    }
    let url = server::RabbitMq::shared().url();
    run(async {
        let dir = tempfile::tempdir().unwrap();
        let file = dir.path().join("log.db");
        let name = format!("delayed-{}", MessageId::new());
        let topic = Topic::parse(name.clone()).unwrap();
        let bus = async || {
            let log = SqliteLog::open(&file).await.unwrap();
            let transport = postrider::rabbitmq::transport(url.clone()).unwrap();
            Bus::builder().log(log).transport(transport).build().unwrap()
        };
        let first = bus().await;
        first.start().await.unwrap();
        let began = Instant::now();
        let delay = Duration::from_secs(4);
        let message = |n| Reminder { n }.to_message().unwrap().with_topic(topic.clone());
        first.publish_after(message(1), delay).await.unwrap();
        let at = postrider::clock::Clock::now(&postrider::clock::SystemClock::new()) + delay;
        first.publish_at(message(2), at).await.unwrap();
        first.shutdown(Duration::from_secs(5)).await.unwrap();
        let second = bus().await;
        let (sender, mut comes) = tokio::sync::mpsc::unbounded_channel();
        second
            .subscribe::<Reminder>(name)
            .topic(topic.clone())
            .state(std::sync::Arc::new((sender,)))
            .handler(async |(sender,), reminder, _| Ok(sender.send((reminder.n, Instant::now()))?))
            .start()
            .await
            .unwrap();
        second.start().await.unwrap();
        let mut got = Vec::new();
        for _ in 0..2 {
            let (n, at) = comes.recv().await.unwrap();
            assert!(at - began >= delay, "{n} came after {:?}", at - began);
            got.push(n);
        }
        got.sort_unstable();
        assert_eq!(got, [1, 2]);
        second.shutdown(Duration::from_secs(5)).await.unwrap();
    });
}

/// RabbitMQ takes back what is not settled within its `consumer_timeout`. A handler that needs longer is begun once more at that
/// moment, and not for ever: what it has done by then is acknowledged when it comes again.
#[test]
fn a_handler_that_outlasts_the_consumer_timeout_is_not_repeated_for_ever() {
    use postrider::{Bus, Event, memory::MemoryLog};
    use std::{
        sync::{
            Arc,
            atomic::{AtomicU32, Ordering},
        },
        time::{Duration, Instant},
    };

    #[derive(serde::Serialize, serde::Deserialize, Event)]
    #[event(name = "slow.work", key = "n")]
    struct Slow {
        n: u32,
    }
    let mut server = server::RabbitMq::start();
    // What is not settled is looked at by the tick of a channel.
    server.ctl(&[
        "eval",
        "application:set_env(rabbit, consumer_timeout, 1000), application:set_env(rabbit, channel_tick_interval, 500).",
    ]);
    postrider_testkit::run_within(Duration::from_secs(120), async {
        let transport = postrider::rabbitmq::transport(server.url()).unwrap();
        let bus = Bus::builder()
            .log(MemoryLog::new())
            .transport(transport)
            .build()
            .unwrap();
        bus.start().await.unwrap();
        let begun = Arc::new((AtomicU32::new(0),));
        let running = bus
            .subscribe::<Slow>("slow")
            .state(begun.clone())
            .handler(async |(begun,), _, _| {
                begun.fetch_add(1, Ordering::SeqCst);
                tokio::time::sleep(Duration::from_secs(4)).await;
                Ok(())
            })
            .start()
            .await
            .unwrap();
        bus.publish(&Slow { n: 1 }).await.unwrap();
        let began = Instant::now();
        while running.report().dropped == 0 {
            assert!(began.elapsed() < Duration::from_secs(60), "{:?}", running.report());
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let times = begun.0.load(Ordering::SeqCst);
        assert!(times <= 3, "begun {times} times");
        tokio::time::sleep(Duration::from_secs(6)).await;
        assert_eq!(begun.0.load(Ordering::SeqCst), times, "{:?}", running.report());
        bus.shutdown(Duration::from_secs(10)).await.unwrap();
    });
}

/// What waits with the broker is in the report of a subscription.
#[test]
fn a_report_says_how_much_waits() {
    use postrider::{Bus, Event, Topic, Transport, event::DynEvent as _, memory::MemoryLog};
    use std::time::{Duration, Instant};

    #[derive(serde::Serialize, serde::Deserialize, Event)]
    #[event(name = "waiting.work", key = "n")]
    struct Work {
        n: u32,
    }
    async fn waits(transport: Transport) {
        let name = server::fresh_name();
        let topic = Topic::parse(name.clone()).unwrap();
        let bus = Bus::builder()
            .log(MemoryLog::new())
            .transport(transport)
            .build()
            .unwrap();
        bus.start().await.unwrap();
        let running = bus
            .subscribe::<Work>(name)
            .topic(topic.clone())
            .handler(async |_, _| Ok(()))
            .start()
            .await
            .unwrap();
        running.connected(Duration::from_secs(20)).await.unwrap();
        running.pause();
        let events = (0..5000).map(|n| Work { n }.to_message().unwrap().with_topic(topic.clone()));
        bus.publish_all(events).await.unwrap();
        let until = Instant::now() + Duration::from_secs(40);
        // What lies ready at the member does not count on RabbitMQ.
        while running.report().lag.is_none_or(|lag| lag < 2900) {
            assert!(Instant::now() < until, "{:?}", running.report());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        running.resume();
        while running.report().lag != Some(0) {
            assert!(Instant::now() < until, "{:?}", running.report());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        bus.shutdown(Duration::from_secs(10)).await.unwrap();
    }
    postrider_testkit::run_within(Duration::from_secs(120), async {
        waits(postrider::rabbitmq::transport(server::RabbitMq::shared().url()).unwrap()).await;
        waits(postrider::kafka::transport(server::Kafka::shared().brokers()).unwrap()).await;
    });
}
