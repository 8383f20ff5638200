use crate::fixture::{Fixture, publish};
use postrider_core::{
    ErrorKind, Message, PublishError, PublishErrorKind, PublisherExt as _, Reachability, Scope, Topic,
};
use postrider_kafka::{KafkaOptions, Login, transport_with};
use postrider_testkit::{run, transport::send_reported};
use rdkafka::{
    ClientConfig,
    admin::{AdminClient, AdminOptions, NewTopic, TopicReplication},
    client::DefaultClientContext,
    mocking::MockCluster,
};
use std::time::Duration;

fn kind(outcome: &Result<(), PublishError>) -> Option<PublishErrorKind> {
    outcome.as_ref().err().map(PublishError::kind)
}

const DESTINATION: Option<PublishErrorKind> = Some(PublishErrorKind::Unavailable(Scope::Destination));
const CONNECTION: Option<PublishErrorKind> = Some(PublishErrorKind::Unavailable(Scope::Connection));

/// What one message is refused for is not its neighbours' fault.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster makes a topic that is missing")]
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
        let outcomes = looking.publisher().unwrap().publish_all(&batch).await;
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
            calls.push(tokio::spawn(async move { publisher.publish_all(&batch).await }));
        }
        for call in calls {
            assert!(call.await.unwrap().iter().all(Result::is_ok));
        }
    });
}

/// A topic without a leader is told of when the delivery time is over; its neighbours do not wait for that. (On the mock
/// cluster of the client: a broker alone does not lose a leader and go on.)
#[test]
fn a_topic_without_a_leader_delays_no_other() {
    run(async {
        let cluster = MockCluster::new(1).unwrap();
        let lacking = Topic::new("lacking");
        let good = Topic::new("good");
        for topic in [&lacking, &good] {
            cluster.create_topic(topic.as_str(), 1, 1).unwrap();
        }
        cluster.partition_leader(lacking.as_str(), 0, None).unwrap();
        let options = KafkaOptions::new(cluster.bootstrap_servers()).without_declaring();
        let transport = transport_with(options.with_delivery_timeout(Duration::from_secs(2))).unwrap();
        let message = |topic: &Topic| Message::new(topic.clone(), "test.v1", "x").with_source("test");
        publish(&transport, &[message(&good)]).await;
        let batch: Vec<Message> = (0..100)
            .map(|n| match n % 2 {
                0 => message(&lacking),
                _ => message(&good),
            })
            .collect();
        let (outcomes, reported) = send_reported(&transport, &batch).await;
        for (n, outcome) in outcomes.iter().enumerate() {
            assert_eq!(
                kind(outcome),
                if n % 2 == 0 { DESTINATION } else { None },
                "{outcome:?}"
            );
        }
        assert!(reported[50..].iter().all(|at| at % 2 == 0), "{reported:?}");
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
        let outcome = transport.publisher().unwrap().publish_all(&[message]).await;
        assert_eq!(kind(&outcome[0]), CONNECTION);
        assert!(!format!("{outcome:?}").contains("secret"));
        assert!(format!("{outcome:?}").contains("127.0.0.1:1"), "{outcome:?}");
        assert!(matches!(
            transport.publisher().unwrap().check().await,
            Reachability::Down(_)
        ));
        // What the promises rest on is refused, by name, and so is what librdkafka does not know.
        let options = KafkaOptions::new("127.0.0.1:1").with_property("client.rack", "secret");
        assert!(!format!("{options:?}").contains("secret"));
        let unknown = transport_with(options.clone().with_property("no.such", "secret")).unwrap_err();
        assert!(
            unknown.to_string().contains("no.such") && !format!("{unknown:?}").contains("secret"),
            "{unknown}"
        );
        let error = transport_with(options.with_property("acks", "1")).unwrap_err();
        assert!(
            error.kind() == ErrorKind::Config && error.to_string().contains("acks"),
            "{error}"
        );
        // What is not compiled in too.
        if cfg!(not(feature = "tls")) {
            let error = transport_with(KafkaOptions::new("h:1").with_tls(None)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Config);
            assert!(error.to_string().contains("kafka-tls"), "{error}");
        }
    });
}

/// Calls that are dropped in the middle, by a relay whose time for them is over, keep no place of the window.
#[test]
fn calls_that_are_dropped_give_their_places_back() {
    run(async {
        let fixture = Fixture::new();
        let transport = transport_with(fixture.options().with_window(100)).unwrap();
        publish(&transport, &[fixture.message(None, "first")]).await;
        let publisher = transport.publisher().unwrap();
        let batch: Vec<Message> = (0..100).map(|n| fixture.message(None, &n.to_string())).collect();
        for round in 0..40 {
            let dropped = tokio::time::timeout(Duration::from_micros(round * 50), publisher.publish_all(&batch));
            let _ = dropped.await;
        }
        let whole = tokio::time::timeout(Duration::from_secs(20), publisher.publish_all(&batch));
        let outcomes = whole.await.expect("places were lost");
        assert!(outcomes.iter().all(Result::is_ok), "{outcomes:?}");
    });
}

/// A topic that brokers refuse to declare delays and costs no other.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster takes any number of replicas")]
fn a_topic_that_cannot_be_declared_is_a_destination_that_is_away() {
    run(async {
        let fixture = Fixture::new();
        publish(&fixture.transport(), &[fixture.message(None, "declares")]).await;
        let transport = transport_with(fixture.options().with_replication(7)).unwrap();
        let refused = Topic::parse(format!("{}.refused", fixture.name)).unwrap();
        let batch = [
            fixture.message(Some("a"), "1").with_topic(refused),
            fixture.message(Some("a"), "2"),
        ];
        let outcomes = transport.publisher().unwrap().publish_all(&batch).await;
        let kinds: Vec<_> = outcomes.iter().map(kind).collect();
        assert_eq!(kinds, [DESTINATION, None], "{outcomes:?}");
    });
}

/// Brokers refuse a whole batch for one record: its neighbours go all the same, and cost nothing.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster compacts nothing")]
fn a_record_that_spoils_its_batch_spoils_no_other() {
    run(async {
        let fixture = Fixture::new();
        let client: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .create()
            .unwrap();
        let topic = fixture.topic();
        // Of a compacted topic each record needs a key.
        let compacted = NewTopic::new(topic.as_str(), 1, TopicReplication::Fixed(1)).set("cleanup.policy", "compact");
        client.create_topics([&compacted], &AdminOptions::new()).await.unwrap();
        let transport = transport_with(fixture.options().with_linger(Duration::from_millis(50))).unwrap();
        let mut batch: Vec<Message> = (0..20).map(|n| fixture.message(Some("k"), &n.to_string())).collect();
        batch.insert(7, fixture.message(None, "no key"));
        let outcomes = transport.publisher().unwrap().publish_all(&batch).await;
        for (at, outcome) in outcomes.iter().enumerate() {
            let expected = if at == 7 {
                Some(PublishErrorKind::Rejected)
            } else {
                None
            };
            assert_eq!(kind(outcome), expected, "{at}: {outcome:?}");
        }
    });
}
