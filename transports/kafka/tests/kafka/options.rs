//! What operators, and users of the plain client, tell a client.

use crate::fixture::{Fixture, join, publish, take, text};
use postrider_core::{Capabilities, Delivery, ErrorKind, Message, Topic, clock::Timestamp};
use postrider_kafka::{KafkaOptions, Start, TopicOptions, transport_with};
use postrider_testkit::{run, server::fresh_name};
use rdkafka::{
    ClientConfig, Message as _,
    admin::{AdminClient, AdminOptions, ResourceSpecifier},
    client::DefaultClientContext,
    consumer::{Consumer as _, StreamConsumer},
    message::{Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(20);

fn plain(fixture: &Fixture, topic: &Topic) -> StreamConsumer {
    let consumer: StreamConsumer = ClientConfig::new()
        .set("bootstrap.servers", &fixture.brokers)
        .set("group.id", fresh_name())
        .set("auto.offset.reset", "earliest")
        .create()
        .unwrap();
    consumer.subscribe(&[topic.as_str()]).unwrap();
    consumer
}

/// Topics are declared as their pattern says, and else as all are.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster keeps no configuration")]
fn topics_are_declared_as_they_are_told() {
    run(async {
        let fixture = Fixture::new();
        let special = TopicOptions::default()
            .with_partitions(3)
            .with_config("retention.ms", "86400000");
        let options = fixture
            .options()
            .with_topic(&format!("{}.*", fixture.name), special)
            .unwrap();
        let transport = transport_with(options.clone()).unwrap();
        publish(&transport, &[fixture.message(None, "1")]).await;
        let admin: AdminClient<DefaultClientContext> = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .create()
            .unwrap();
        let topic = fixture.topic();
        let metadata = admin.inner().fetch_metadata(Some(topic.as_str()), SOON).unwrap();
        assert_eq!(metadata.topics()[0].partitions().len(), 3);
        let asked = [ResourceSpecifier::Topic(topic.as_str())];
        let found = admin
            .describe_configs(&asked, &AdminOptions::new())
            .await
            .unwrap()
            .remove(0)
            .unwrap();
        assert_eq!(found.get("retention.ms").unwrap().value.as_deref(), Some("86400000"));
        // What makes no sense is told at once, or by the brokers, as no outage.
        let none = TopicOptions::default().with_partitions(0);
        let error = transport_with(options.with_topic("a", none).unwrap()).unwrap_err();
        assert!(error.to_string().contains("`a`"), "{error}");
        let unknown = TopicOptions::default().with_config("retention.ms", "soon");
        let other = Fixture::new();
        let transport = transport_with(other.options().with_topic("*", unknown).unwrap()).unwrap();
        let subscription = other.subscription();
        let error = transport
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
    });
}

/// A group may begin with what was stored at some time or later.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster does not look for times")]
fn a_group_may_begin_at_a_time() {
    run(async {
        let fixture = Fixture::new();
        publish(&fixture.transport(), &[fixture.message(Some("k"), "before")]).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let time: Timestamp = std::time::SystemTime::now().into();
        publish(&fixture.transport(), &[fixture.message(Some("k"), "after")]).await;
        let transport = transport_with(fixture.options().with_start(Start::At(time))).unwrap();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        let got = take(&mut intake, 1, SOON).await;
        assert_eq!(got.iter().map(text).collect::<Vec<_>>(), ["after"]);
        settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
    });
}

/// A message with a key and without a payload deletes what a compacted topic has of the key, if it is asked to.
#[test]
fn a_tombstone_has_no_value() {
    run(async {
        let fixture = Fixture::new();
        let tombstones = transport_with(fixture.options().with_tombstones()).unwrap();
        publish(
            &tombstones,
            &[fixture.message(Some("k"), ""), fixture.message(None, "")],
        )
        .await;
        publish(&fixture.transport(), &[fixture.message(Some("k"), "")]).await;
        let (topic, mut values) = (fixture.topic(), Vec::new());
        let consumer = plain(&fixture, &topic);
        for _ in 0..3 {
            let record = tokio::time::timeout(SOON, consumer.recv()).await.unwrap().unwrap();
            values.push((record.key().is_some(), record.payload().is_some()));
        }
        values.sort_unstable();
        assert_eq!(values, [(false, true), (true, false), (true, true)]);
        let (mut intake, settling) = join(&fixture.transport(), &fixture.subscription()).await;
        let got = take(&mut intake, 3, SOON).await;
        assert!(got.len() == 3 && got.iter().all(|got| got.message().payload().is_empty()));
        settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
    });
}

/// Bytes in a header that are no text come back as the same bytes when the message is published again.
#[test]
fn headers_that_are_no_text_survive() {
    run(async {
        let fixture = Fixture::new();
        publish(&fixture.transport(), &[fixture.message(None, "declares")]).await;
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .create()
            .unwrap();
        let bytes = [0xff_u8, 0, b'a'];
        let headers = OwnedHeaders::new().insert(Header {
            key: "trace-bin",
            value: Some(&bytes[..]),
        });
        let (topic, key) = (fixture.topic(), "k");
        let record = FutureRecord::to(topic.as_str())
            .key(key)
            .payload("foreign")
            .headers(headers);
        producer.send(record, SOON).await.unwrap();
        let (mut intake, settling) = join(&fixture.transport(), &fixture.subscription()).await;
        let mut message: Option<Message> = None;
        while message.is_none() {
            let got = take(&mut intake, 1, SOON).await;
            assert!(!got.is_empty(), "it does not come");
            message = got
                .iter()
                .map(Delivery::message)
                .find(|message| &message.payload()[..] == b"foreign")
                .cloned();
            settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
        }
        let message = message.unwrap();
        assert_eq!(message.header("trace-bin"), Some("data:;base64,/wBh"));
        let again = Topic::parse(format!("{}.again", fixture.name)).unwrap();
        publish(&fixture.transport(), &[message.with_topic(again.clone())]).await;
        let record = plain(&fixture, &again);
        let record = tokio::time::timeout(SOON, record.recv()).await.unwrap().unwrap();
        let headers = record.headers().unwrap();
        let kept = headers.iter().find(|header| header.key == "trace-bin").unwrap();
        assert_eq!(kept.value, Some(&bytes[..]));
    });
}

/// Dead letters of a group go to the topic it names, which is there from the start.
#[test]
fn dead_letters_go_where_they_are_told() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let known: &Capabilities = transport.capabilities();
        assert!(known.queue_options.contains(&"dead_letter_to"));
        let dead = Topic::parse(format!("{}.failed", fixture.name)).unwrap();
        let mut subscription = fixture.subscription();
        subscription.queue.dead_letter_to = Some(dead.to_string());
        let (mut intake, settling) = join(&transport, &subscription).await;
        publish(&transport, &[fixture.message(Some("k"), "1")]).await;
        let got = take(&mut intake, 1, SOON).await;
        let errors = settling
            .settle(got.into_iter().map(Delivery::dead_letter).collect())
            .await;
        assert!(errors.is_empty(), "{errors:?}");
        let record = plain(&fixture, &dead);
        let record = tokio::time::timeout(SOON, record.recv()).await.unwrap().unwrap();
        assert_eq!(record.payload(), Some(&b"1"[..]));
    });
}

/// What one group's client is told counts for that one, and what it may not be told is refused.
#[test]
fn a_group_has_properties_of_its_own() {
    run(async {
        let fixture = Fixture::new();
        let group = fixture.subscription().group;
        // It cannot reach anybody from there.
        let options = fixture.options().with_timeout(Duration::from_secs(2));
        let transport =
            transport_with(options.with_group_property(group.as_str(), "broker.address.family", "v6")).unwrap();
        publish(&transport, &[fixture.message(None, "1")]).await;
        let subscription = fixture.subscription();
        let error = transport
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unavailable, "{error}");
        for (name, value) in [("acks", "0"), ("no.such", "secret")] {
            let options = KafkaOptions::new("h:1").with_group_property("g", name, value);
            let error = transport_with(options).unwrap_err();
            assert!(
                error.kind() == ErrorKind::Config && error.to_string().contains(name),
                "{error}"
            );
            assert!(!error.to_string().contains("secret"), "{error}");
        }
    });
}

/// A login by token: it is asked for, and shown by nobody.
#[test]
#[cfg(feature = "tls")]
#[cfg_attr(feature = "mock", ignore = "the mock cluster has no users")]
fn a_client_may_log_in_by_a_token() {
    use postrider_core::{Error, PublisherExt as _};
    use postrider_kafka::Token;
    use postrider_testkit::server::{Kafka, KafkaOperation as May, KafkaResource as On};
    run(async {
        let (fixture, server) = (Fixture::new(), Kafka::shared());
        let (topic, subscription) = (fixture.topic(), fixture.subscription());
        publish(&fixture.transport(), &[fixture.message(None, "declares")]).await;
        for right in [May::Read, May::Write, May::Describe] {
            server.give(right, On::Topic, topic.as_str());
        }
        server.give(May::Read, On::Group, subscription.group.as_str());
        let token = || {
            use base64::{Engine as _, engine::general_purpose::URL_SAFE_NO_PAD};
            let now = std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .unwrap()
                .as_secs();
            let claims = format!(r#"{{"sub":"app","iat":{now},"exp":{}}}"#, now + 600);
            let part = |text: &str| URL_SAFE_NO_PAD.encode(text);
            let value = format!("{}.{}.", part(r#"{"alg":"none"}"#), part(&claims));
            let expires_at = Timestamp::from_timestamp(i64::try_from(now).unwrap() + 600, 0).unwrap();
            Ok(Token::new(value, "app", expires_at))
        };
        let options = KafkaOptions::new(server.for_users())
            .with_timeout(Duration::from_secs(5))
            .without_declaring();
        let transport = transport_with(options.clone().with_token(token)).unwrap();
        publish(&transport, &[fixture.message(None, "by token")]).await;
        let (mut intake, settling) = join(&transport, &subscription).await;
        let got = take(&mut intake, 2, SOON).await;
        assert_eq!(got.len(), 2);
        settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
        let options = options.with_delivery_timeout(Duration::from_secs(3));
        let without = options.with_token(|| Err(Error::new(ErrorKind::Unavailable, "the vault is sealed")));
        let outcome = transport_with(without)
            .unwrap()
            .publisher()
            .unwrap()
            .publish_all(&[fixture.message(None, "x")])
            .await;
        assert!(format!("{outcome:?}").contains("the vault is sealed"), "{outcome:?}");
    });
}
