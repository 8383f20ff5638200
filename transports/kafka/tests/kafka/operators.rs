//! What operators cause: rights that are missing, topics that are deleted, data that is not kept.

use crate::fixture::{Fixture, join, publish, take, text};
use postrider_core::{
    Delivery, ErrorKind, Intake, PublishErrorKind, PublisherExt as _, Reachability, Scope, Taken, Transport,
};
use postrider_kafka::{KafkaOptions, Login, transport_with};
use postrider_testkit::{
    run, run_within,
    server::{Kafka, KafkaOperation as May, KafkaResource as On},
};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    consumer::{BaseConsumer, Consumer as _},
};
use std::time::{Duration, Instant};

const SOON: Duration = Duration::from_secs(20);
const DESTINATION: PublishErrorKind = PublishErrorKind::Unavailable(Scope::Destination);
const CONNECTION: PublishErrorKind = PublishErrorKind::Unavailable(Scope::Connection);

fn admin(fixture: &Fixture) -> AdminClient<DefaultClientContext> {
    ClientConfig::new()
        .set("bootstrap.servers", &fixture.brokers)
        .create()
        .unwrap()
}

async fn make_topic(fixture: &Fixture, partitions: i32, config: &[(&str, &str)]) {
    let topic = fixture.topic();
    let mut new = NewTopic::new(topic.as_str(), partitions, TopicReplication::Fixed(1));
    for (name, value) in config {
        new = new.set(name, value);
    }
    let made = admin(fixture)
        .create_topics([&new], &AdminOptions::new())
        .await
        .unwrap();
    made[0].as_ref().unwrap();
}

/// As the user `app`, who has no rights but those the test gives it.
fn as_app() -> Transport {
    let options = KafkaOptions::new(Kafka::shared().for_users())
        .with_login(Login::new("PLAIN", "app", "app"))
        .with_timeout(Duration::from_secs(5))
        .with_delivery_timeout(Duration::from_secs(5))
        .with_session_timeout(Duration::from_secs(2));
    transport_with(options).unwrap()
}

async fn acked(intake: &mut Intake, settling: &postrider_core::Settling, count: usize) -> Vec<String> {
    let got = take(intake, count, SOON).await;
    let texts = got.iter().map(text).collect();
    settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
    texts
}

/// What retention deletes before a group has read it is told, with how much it was, and the group goes on with the rest.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster deletes nothing")]
fn unread_data_that_is_deleted_is_counted() {
    run_within(Duration::from_secs(120), async {
        let fixture = Fixture::new();
        make_topic(&fixture, 1, &[("retention.ms", "1000"), ("segment.ms", "500")]).await;
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        publish(&transport, &[fixture.message(Some("k"), "read")]).await;
        assert_eq!(acked(&mut intake, &settling, 1).await, ["read"]);
        settling.close(SOON).await.unwrap();
        for n in 0..10 {
            publish(&transport, &[fixture.message(Some("k"), &n.to_string())]).await;
        }
        let plain: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .create()
            .unwrap();
        let until = Instant::now() + Duration::from_secs(60);
        let low = || plain.fetch_watermarks(fixture.topic().as_str(), 0, SOON).unwrap().0;
        while low() < 11 {
            assert!(Instant::now() < until, "retention deletes nothing");
            tokio::time::sleep(Duration::from_millis(200)).await;
        }
        publish(&transport, &[fixture.message(Some("k"), "after")]).await;
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        let (mut missed, mut texts) = (0, Vec::new());
        while texts.is_empty() {
            match tokio::time::timeout(SOON, intake.next(10))
                .await
                .expect("it goes on")
                .unwrap()
            {
                Taken::Missed { messages, why } => {
                    assert!(
                        why.contains(fixture.topic().as_str()) && why.contains("offset 1 to"),
                        "{why}"
                    );
                    missed += messages;
                }
                Taken::Batch(batch) => {
                    texts.extend(batch.iter().map(text));
                    settling.settle(batch.into_iter().map(Delivery::ack).collect()).await;
                }
                _ => {}
            }
        }
        assert!((10..=11).contains(&missed), "{missed} missed");
        assert!(missed == 11 || texts == ["after"], "{texts:?}");
    });
}

/// A topic takes less than the client puts into one batch, which it makes of several calls: each message that fits is published.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster takes batches of any size")]
fn messages_that_fit_are_published_whatever_they_travel_with() {
    run(async {
        let fixture = Fixture::new();
        make_topic(&fixture, 1, &[("max.message.bytes", "100000")]).await;
        let transport = fixture.transport();
        let mut calls = Vec::new();
        for _ in 0..6 {
            let publisher = transport.publisher().unwrap().clone();
            let batch: Vec<_> = (0..20).map(|_| fixture.message(None, &"x".repeat(30_000))).collect();
            calls.push(tokio::spawn(async move { publisher.publish_all(&batch).await }));
        }
        for call in calls {
            for outcome in call.await.unwrap() {
                outcome.unwrap();
            }
        }
        let large = fixture.message(None, &"x".repeat(200_000));
        let outcome = transport.publisher().unwrap().publish_all(&[large]).await;
        assert_eq!(outcome[0].as_ref().unwrap_err().kind(), PublishErrorKind::Invalid);
    });
}

/// A topic that is deleted and made anew is another one: a group that was running reads all of it, and so does one that
/// joins later; publishing makes it, and goes on.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster deletes nothing")]
fn a_topic_that_is_deleted_and_made_anew_goes_on() {
    run_within(Duration::from_secs(120), async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        let messages: Vec<_> = (0..8)
            .map(|n| fixture.message(Some("k"), &format!("old {n}")))
            .collect();
        publish(&transport, &messages).await;
        assert_eq!(acked(&mut intake, &settling, 8).await.len(), 8);
        let gone = admin(&fixture)
            .delete_topics(&[fixture.topic().as_str()], &AdminOptions::new())
            .await;
        gone.unwrap()[0].as_ref().unwrap();
        // Whoever publishes hears that it is gone, and the next call makes it anew.
        let until = Instant::now() + Duration::from_secs(60);
        let new: Vec<_> = (0..4)
            .map(|n| fixture.message(Some("k"), &format!("new {n}")))
            .collect();
        let mut left = new.clone();
        while !left.is_empty() {
            assert!(Instant::now() < until, "{} are not published", left.len());
            let outcomes = transport.publisher().unwrap().publish_all(&left).await;
            for outcome in &outcomes {
                let kind = outcome.as_ref().err().map(postrider_core::PublishError::kind);
                assert_ne!(kind, Some(PublishErrorKind::Rejected), "{outcome:?}");
            }
            let mut outcomes = outcomes.into_iter();
            left.retain(|_| outcomes.next().is_some_and(|outcome| outcome.is_err()));
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
        let mut texts = Vec::new();
        while texts.len() < 4 {
            assert!(Instant::now() < until, "only {texts:?} came");
            if let Ok(Ok(Taken::Batch(batch))) = tokio::time::timeout(SOON, intake.next(10)).await {
                texts.extend(batch.iter().map(text));
                settling.settle(batch.into_iter().map(Delivery::ack).collect()).await;
            }
        }
        texts.sort();
        texts.dedup();
        assert_eq!(texts, ["new 0", "new 1", "new 2", "new 3"]);
    });
}

/// Without the right to write, the topic's destination is away, and no message is blamed; with it, publishing goes on.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster has no rights")]
fn a_right_to_write_that_is_withdrawn_and_given_back_blames_no_message() {
    run(async {
        let fixture = Fixture::new();
        make_topic(&fixture, 2, &[]).await;
        let (server, topic) = (Kafka::shared(), fixture.topic());
        server.give(May::Describe, On::Topic, topic.as_str());
        let transport = as_app();
        let publisher = transport.publisher().unwrap();
        let message = fixture.message(Some("k"), "1");
        for _ in 0..3 {
            let outcome = publisher.publish_all(std::slice::from_ref(&message)).await;
            let error = outcome[0].as_ref().unwrap_err();
            assert_eq!(error.kind(), DESTINATION, "{error:?}");
            assert!(format!("{error:?}").contains(topic.as_str()), "{error:?}");
        }
        server.give(May::Write, On::Topic, topic.as_str());
        let goes = async || publisher.publish_all(std::slice::from_ref(&message)).await[0].is_ok();
        let until = Instant::now() + SOON;
        while !goes().await {
            assert!(Instant::now() < until, "it does not go on");
        }
        server.withdraw(May::Write, On::Topic, topic.as_str());
        let until = Instant::now() + SOON;
        loop {
            let outcome = publisher.publish_all(std::slice::from_ref(&message)).await;
            if let Err(error) = &outcome[0] {
                assert_eq!(error.kind(), DESTINATION, "{error}");
                break;
            }
            assert!(Instant::now() < until, "the right is not withdrawn");
        }
        assert!(matches!(publisher.check().await, Reachability::Up), "it is no outage");
    });
}

/// A member without the right to read as its group, or to read its topic, says so until it has it; then it gets everything.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster has no rights")]
fn a_member_without_rights_is_told_until_it_has_them() {
    run_within(Duration::from_secs(120), async {
        let fixture = Fixture::new();
        let (server, topic) = (Kafka::shared(), fixture.topic());
        publish(&fixture.transport(), &[fixture.message(Some("k"), "1")]).await;
        let subscription = fixture.subscription();
        server.give(May::Describe, On::Topic, topic.as_str());
        let transport = as_app();
        let (mut intake, settling) = join(&transport, &subscription).await;
        for (right, about, resource, name) in [
            (May::Read, "group", On::Group, subscription.group.as_str()),
            (May::Read, "topic", On::Topic, topic.as_str()),
        ] {
            let error = loop {
                match tokio::time::timeout(SOON, intake.next(10))
                    .await
                    .unwrap_or_else(|_| panic!("it does not say that it lacks a right to its {about}"))
                {
                    Err(error) => break error,
                    Ok(Taken::Batch(_)) => panic!("it has no right to that"),
                    Ok(_) => {}
                }
            };
            assert_eq!(error.kind(), ErrorKind::Config, "{error}");
            assert!(error.to_string().contains(about), "{error}");
            server.give(right, resource, name);
        }
        let until = Instant::now() + Duration::from_secs(60);
        loop {
            assert!(Instant::now() < until, "it gets nothing");
            match tokio::time::timeout(SOON, intake.next(10)).await {
                Ok(Ok(Taken::Batch(batch))) => {
                    assert_eq!(batch.iter().map(text).collect::<Vec<_>>(), ["1"]);
                    settling.settle(batch.into_iter().map(Delivery::ack).collect()).await;
                    break;
                }
                // Said before it had the right.
                Ok(_) => {}
                Err(_) => panic!("it gets nothing and says nothing"),
            }
        }
    });
}

/// A login that brokers refuse is told with their reason, and a mechanism they do not have is no outage.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster has no users")]
fn a_login_that_is_refused_says_why() {
    run(async {
        let fixture = Fixture::new();
        let logins = [
            Login::new("PLAIN", "app", "wrong"),
            #[cfg(feature = "tls")]
            Login::new("SCRAM-SHA-256", "app", "app"),
        ];
        for login in logins {
            let is_password = login.mechanism == "PLAIN";
            let options = KafkaOptions::new(Kafka::shared().for_users())
                .with_login(login)
                .with_timeout(Duration::from_secs(3))
                .with_delivery_timeout(Duration::from_secs(3));
            let transport = transport_with(options).unwrap();
            let outcome = transport
                .publisher()
                .unwrap()
                .publish_all(&[fixture.message(None, "1")])
                .await;
            let error = outcome[0].as_ref().unwrap_err();
            assert_eq!(error.kind(), CONNECTION, "{error}");
            let subscription = fixture.subscription();
            let joined = transport
                .subscriber(&subscription)
                .unwrap()
                .subscribe(&subscription)
                .await;
            let refused = joined.unwrap_err();
            let shown = format!("{error:?} {refused:?}");
            if is_password {
                assert_eq!(refused.kind(), ErrorKind::Unavailable, "{refused}");
                assert!(
                    shown.contains("uthentication failed") && !shown.contains("wrong"),
                    "{shown}"
                );
            } else {
                assert_eq!(refused.kind(), ErrorKind::Config, "{refused}");
                assert!(shown.contains("mechanism"), "{shown}");
            }
        }
    });
}
