use crate::fixture::{Fixture, join, publish, take};
use postrider_core::{AttributeValue, Limits, Message, MessageId, clock::Timestamp, wire::Format};
use postrider_kafka::transport_with;
use postrider_testkit::run;
use rdkafka::{
    ClientConfig, Message as _,
    consumer::{Consumer as _, StreamConsumer},
    message::{BorrowedMessage, Header, Headers as _, OwnedHeaders},
    producer::{FutureProducer, FutureRecord},
};
use std::time::Duration;

fn message(fixture: &Fixture) -> Message {
    Message::new(fixture.topic(), "order.placed.v2", r#"{"id":1}"#)
        .with_id("018f4e6a-7c00-7000-8000-000000000001".parse().unwrap())
        .with_source("urn:shop")
        .with_key("order-1")
        .with_header("tenant", "ünï")
        .with_header("tenant", "second")
        .with_attribute("correlationid", "c-1")
        .with_attribute("level", 3)
        .with_content_type("application/json")
        .with_time(Timestamp::from_timestamp_micros(1_767_225_600_123_456).unwrap())
        .with_sequence(42)
}

/// What a plain client sees, as the file says.
fn shown(record: &BorrowedMessage<'_>) -> String {
    let text = |bytes: &[u8]| String::from_utf8(bytes.to_vec()).unwrap();
    let mut lines = vec![
        format!("partition of 4: {}", record.partition()),
        format!("key: {}", text(record.key().unwrap())),
    ];
    let headers = record.headers().unwrap().iter();
    lines.extend(headers.map(|header| format!("header {}: {}", header.key, text(header.value.unwrap()))));
    lines.push(format!("body: {}", text(record.payload().unwrap())));
    lines.join("\n") + "\n"
}

#[test]
fn a_plain_client_reads_what_the_golden_files_say() {
    run(async {
        let fixture = Fixture::new();
        publish(&fixture.transport(), &[message(&fixture)]).await;
        let structured = transport_with(fixture.options().with_format(Format::Structured)).unwrap();
        publish(&structured, &[message(&fixture)]).await;
        let consumer: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .set("group.id", format!("{}-plain", fixture.name))
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        consumer.subscribe(&[fixture.topic().as_str()]).unwrap();
        for (format, expected) in [
            ("binary", include_str!("binary.golden")),
            ("structured", include_str!("structured.golden")),
        ] {
            let record = consumer.recv().await.unwrap();
            assert_eq!(shown(&record), expected, "{format}");
        }
    });
}

#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn records_of_a_plain_client_are_taken() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, _settling) = join(&transport, &fixture.subscription()).await;
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .create()
            .unwrap();
        let topic = fixture.topic();
        let headers = [
            ("ce_id", "A-1"),
            ("ce_source", "/crm"),
            ("ce_type", "crm.changed"),
            ("content-type", "text/plain"),
            ("x", "y"),
        ];
        let headers = headers.iter().fold(OwnedHeaders::new(), |headers, (key, value)| {
            headers.insert(Header {
                key,
                value: Some(*value),
            })
        });
        let event = FutureRecord::to(topic.as_str())
            .key("k")
            .payload("hello")
            .headers(headers);
        producer.send(event, Duration::from_secs(10)).await.unwrap();
        let bare: FutureRecord<'_, str, str> = FutureRecord::to(topic.as_str()).key("k").payload("bare");
        producer.send(bare, Duration::from_secs(10)).await.unwrap();
        let taken = take(&mut intake, 2, Duration::from_secs(20)).await;
        let (event, bare) = (taken[0].message(), taken[1].message());
        assert_eq!(
            (event.id(), event.kind()),
            (MessageId::foreign("/crm", "A-1"), "crm.changed")
        );
        assert_eq!(
            (event.header("x"), event.content_type(), event.key()),
            (Some("y"), "text/plain", Some("k"))
        );
        assert_eq!(
            (bare.kind(), bare.key(), bare.source()),
            (topic.as_str(), Some("k"), Some(&*format!("kafka:{topic}")))
        );
        // What came from elsewhere can be published again, under the id it came with.
        assert_eq!(event.event_id(), "A-1");
        for message in [event, bare] {
            Limits::default().check(message).unwrap();
            publish(&transport, std::slice::from_ref(message)).await;
            let again = take(&mut intake, 1, Duration::from_secs(20)).await;
            assert_eq!(again[0].message(), message);
        }
        assert!(bare.time().is_some(), "the broker's");
        assert_eq!(event.topic(), &topic);
    });
}

/// Events as the official SDKs of Python and JavaScript write them (`transports/interop`) are read field for field.
#[test]
fn events_of_the_official_sdks_are_read() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, _settling) = join(&transport, &fixture.subscription()).await;
        let producer: FutureProducer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .create()
            .unwrap();
        let topic = fixture.topic();
        for (name, golden) in [
            (
                "python binary",
                include_str!("../../../interop/python-kafka-binary.json"),
            ),
            (
                "python structured",
                include_str!("../../../interop/python-kafka-structured.json"),
            ),
            (
                "javascript binary",
                include_str!("../../../interop/javascript-kafka-binary.json"),
            ),
            (
                "javascript structured",
                include_str!("../../../interop/javascript-kafka-structured.json"),
            ),
        ] {
            let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
            let headers = golden["headers"].as_object().unwrap().iter();
            let headers = headers.fold(OwnedHeaders::new(), |headers, (key, value)| {
                let value = value.as_str().map_or_else(|| value.to_string(), str::to_owned);
                headers.insert(Header {
                    key,
                    value: Some(&value),
                })
            });
            let record = FutureRecord::to(topic.as_str())
                .key(golden["key"].as_str().unwrap())
                .payload(golden["body"].as_str().unwrap())
                .headers(headers);
            producer.send(record, Duration::from_secs(10)).await.unwrap();
            let taken = take(&mut intake, 1, Duration::from_secs(20)).await;
            let event = taken[0].message();
            assert_eq!(
                (&*event.event_id(), event.source()),
                ("Ünï-1", Some("/shop/eu")),
                "{name}"
            );
            assert_eq!(
                (event.kind(), event.key()),
                ("com.example.order.placed", Some("order-1")),
                "{name}"
            );
            assert_eq!(event.time().unwrap().timestamp_millis(), 1_767_225_600_123, "{name}");
            assert_eq!(event.content_type(), "application/json", "{name}");
            // In binary mode all values are texts.
            let (level, urgent): (AttributeValue, AttributeValue) = match name {
                "python binary" => ("3".into(), "True".into()),
                "javascript binary" => ("3".into(), "true".into()),
                _ => (3.into(), true.into()),
            };
            let attributes: Vec<(&str, &AttributeValue)> = event
                .attributes()
                .iter()
                .map(|(name, value)| (name.as_str(), value))
                .collect();
            assert_eq!(
                attributes,
                [
                    ("level", &level),
                    ("subject", &"orders/1".into()),
                    ("tenantid", &"acme".into()),
                    ("urgent", &urgent)
                ],
                "{name}"
            );
            let data: serde_json::Value = serde_json::from_slice(event.payload()).unwrap();
            assert_eq!(data, serde_json::json!({"id": 1, "text": "ü"}), "{name}");
            assert!(event.headers().is_empty(), "{name}: {:?}", event.headers());
        }
    });
}
