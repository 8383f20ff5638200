use crate::fixture::{Fixture, join, publish, take, text};
use postrider_core::{ErrorKind, Message, PublishError, PublishErrorKind, Reachability, Scope, Topic};
use postrider_kafka::{KafkaOptions, Login, transport_with};
use postrider_testkit::{run, run_within, server::Kafka};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

fn kind(outcome: &Result<(), PublishError>) -> Option<PublishErrorKind> {
    outcome.as_ref().err().map(PublishError::kind)
}

const DESTINATION: Option<PublishErrorKind> = Some(PublishErrorKind::Unavailable(Scope::Destination));
const CONNECTION: Option<PublishErrorKind> = Some(PublishErrorKind::Unavailable(Scope::Connection));

/// What one message is refused for is not its neighbours' fault.
#[test]
fn each_message_has_an_outcome_of_its_own() {
    run(async {
        let fixture = Fixture::new();
        publish(&fixture.transport(), &[fixture.message(None, "declares")]).await;
        let looking = transport_with(fixture.options().without_declaring()).unwrap();
        let missing = Topic::parse(format!("{}.missing", fixture.name)).unwrap();
        let large = Message::new(fixture.topic(), "test.v1", vec![b'x'; 3_000_000]).with_source("test");
        let batch = [
            fixture.message(Some("a"), "1"),
            fixture.message(Some("a"), "2").with_topic(missing),
            large,
            fixture.message(Some("a"), "3"),
        ];
        let outcomes = looking.publisher().unwrap().publish(&batch).await;
        let kinds: Vec<_> = outcomes.iter().map(kind).collect();
        assert_eq!(
            kinds,
            [None, DESTINATION, Some(PublishErrorKind::Invalid), None],
            "{outcomes:?}"
        );
        assert!(outcomes[1].as_ref().unwrap_err().is_unroutable());
    });
}

/// More at once than librdkafka's queue holds.
#[test]
fn calls_that_overlap_wait_for_the_window() {
    run(async {
        let fixture = Fixture::new();
        let transport = transport_with(fixture.options().with_window(2000)).unwrap();
        publish(&transport, &[fixture.message(None, "first")]).await;
        let mut calls = Vec::new();
        for _ in 0..60 {
            let batch: Vec<Message> = (0..2500).map(|n| fixture.message(None, &n.to_string())).collect();
            let publisher = transport.publisher().unwrap().clone();
            calls.push(tokio::spawn(async move { publisher.publish(&batch).await }));
        }
        for call in calls {
            assert!(call.await.unwrap().iter().all(Result::is_ok));
        }
    });
}

#[test]
fn brokers_that_cannot_be_reached_are_told_without_the_password() {
    run(async {
        let login = Login::new("PLAIN", "u", "secret");
        let options = KafkaOptions::new("127.0.0.1:1")
            .with_login(login)
            .with_timeout(Duration::from_secs(1));
        let shown = format!("{options:?}");
        assert!(!shown.contains("secret") && shown.contains("PLAIN"), "{shown}");
        let transport = transport_with(options.with_delivery_timeout(Duration::from_secs(2))).unwrap();
        let message = Message::new(Topic::new("t"), "t.v1", "x").with_source("s");
        let outcome = transport.publisher().unwrap().publish(&[message]).await;
        assert_eq!(kind(&outcome[0]), CONNECTION);
        assert!(!format!("{outcome:?}").contains("secret"));
        assert!(matches!(
            transport.publisher().unwrap().check().await,
            Reachability::Down(_)
        ));
        // What is not compiled in is refused, by name.
        let error = transport_with(KafkaOptions::new("h:1").with_tls(None)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("kafka-tls"), "{error}");
    });
}

/// Killed with messages on their way: what was confirmed is there, and the publisher comes back by itself.
#[test]
fn what_was_confirmed_outlives_the_broker() {
    run_within(Duration::from_secs(120), async {
        let mut server = Kafka::start();
        let fixture = Fixture::on(&server);
        let transport = transport_with(fixture.options().with_delivery_timeout(Duration::from_secs(2))).unwrap();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        let (publisher, topic) = (transport.publisher().unwrap().clone(), fixture.topic());
        let publishing = tokio::spawn(async move {
            let (mut confirmed, mut away, mut back) = (BTreeSet::new(), None, None);
            for call in 0.. {
                let message =
                    |n: u32| Message::new(topic.clone(), "test.v1", format!("{call}.{n}")).with_source("test");
                let batch: Vec<Message> = (0..100).map(message).collect();
                for (n, outcome) in publisher.publish(&batch).await.into_iter().enumerate() {
                    match outcome {
                        Ok(()) => {
                            confirmed.insert(format!("{call}.{n}"));
                            if away.is_some() {
                                back.get_or_insert_with(Instant::now);
                            }
                        }
                        Err(error) => {
                            assert!(matches!(error.kind(), PublishErrorKind::Unavailable(_)), "{error:?}");
                            away.get_or_insert_with(Instant::now);
                        }
                    }
                }
                if back.is_some_and(|at: Instant| at.elapsed() > Duration::from_secs(1)) {
                    println!("back after {:?}", back.unwrap() - away.unwrap());
                    return confirmed;
                }
                tokio::time::sleep(Duration::from_millis(10)).await;
            }
            unreachable!()
        });
        tokio::time::sleep(Duration::from_millis(3000)).await;
        let killing = tokio::task::spawn_blocking(move || {
            server.kill();
            // Longer than a message may be on its way.
            let waits = Instant::now() + Duration::from_secs(4);
            while Instant::now() < waits {
                std::hint::spin_loop();
                std::thread::yield_now();
            }
            server.restart();
            server
        });
        let (mut got, mut quiet) = (BTreeSet::new(), 0);
        while quiet < 8 {
            let taken = take(&mut intake, 500, Duration::from_secs(2)).await;
            if taken.is_empty() && publishing.is_finished() {
                quiet += 1;
            }
            got.extend(taken.iter().map(text));
            settling
                .settle(taken.into_iter().map(postrider_core::Delivery::ack).collect())
                .await;
            if publishing.is_finished() && quiet == 0 && got.len() > 1000 {
                quiet = 4;
            }
        }
        let confirmed = publishing.await.unwrap();
        let lost: Vec<&String> = confirmed.difference(&got).collect();
        println!("{} confirmed, {} got", confirmed.len(), got.len());
        assert!(lost.is_empty(), "{} lost, {:?} first", lost.len(), lost[0]);
        drop(killing.await.unwrap());
    });
}
