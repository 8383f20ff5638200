use crate::fixture::{Fixture, join, publish, take};
use futures_util::StreamExt as _;
use lapin::{
    BasicProperties,
    options::{BasicConsumeOptions, BasicPublishOptions, QueueDeclareOptions},
    types::{AMQPValue, FieldTable},
};
use postrider_core::{AttributeValue, Limits, Message, MessageId, clock::Timestamp, wire::Format};
use postrider_rabbitmq::transport_with;
use postrider_testkit::run;
use std::{collections::BTreeMap, time::Duration};

const SOON: Duration = Duration::from_secs(5);

fn message(fixture: &Fixture) -> Message {
    Message::new(fixture.topic("t"), "order.placed.v2", r#"{"id":1}"#)
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
fn shown(delivery: &lapin::message::Delivery) -> String {
    let text = |value: &AMQPValue| match value {
        AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).unwrap(),
        AMQPValue::FieldArray(values) => format!(
            "{:?}",
            values
                .as_slice()
                .iter()
                .map(|value| match value {
                    AMQPValue::LongString(text) => String::from_utf8(text.as_bytes().to_vec()).unwrap(),
                    other => format!("{other:?}"),
                })
                .collect::<Vec<_>>()
        ),
        other => format!("{other:?}"),
    };
    let properties = &delivery.properties;
    let mut lines = vec![
        format!(
            "routing key: {}",
            delivery.routing_key.as_str().rsplit_once(".t.").unwrap().1
        ),
        format!("content type: {}", properties.content_type().as_ref().unwrap().as_str()),
        format!("delivery mode: {}", properties.delivery_mode().unwrap()),
        format!("message id: {}", properties.message_id().as_ref().unwrap().as_str()),
        format!("type: {}", properties.kind().as_ref().unwrap().as_str()),
        format!("app id: {}", properties.app_id().as_ref().unwrap().as_str()),
        format!("timestamp: {}", properties.timestamp().unwrap()),
    ];
    let headers: BTreeMap<_, _> = properties.headers().as_ref().unwrap().inner().iter().collect();
    lines.extend(
        headers
            .iter()
            .map(|(name, value)| format!("header {}: {}", name.as_str(), text(value))),
    );
    lines.push(format!("body: {}", String::from_utf8(delivery.data.clone()).unwrap()));
    lines.join("\n") + "\n"
}

#[test]
fn a_plain_client_reads_what_the_golden_files_say() {
    run(async {
        let fixture = Fixture::new();
        let (_connection, channel) = fixture.plain().await;
        let binary = fixture.transport();
        binary.publisher().unwrap().check().await;
        let queue = channel
            .queue_declare(
                "".into(),
                QueueDeclareOptions {
                    exclusive: true,
                    ..Default::default()
                },
                FieldTable::default(),
            )
            .await
            .unwrap();
        let name = queue.name().clone();
        fixture.bind(&channel, name.as_str(), message(&fixture).topic()).await;
        let mut consumer = channel
            .basic_consume(name, "".into(), BasicConsumeOptions::default(), FieldTable::default())
            .await
            .unwrap();
        publish(&binary, &[message(&fixture)]).await;
        let structured = transport_with(fixture.options().with_format(Format::Structured)).unwrap();
        publish(&structured, &[message(&fixture)]).await;
        for (format, expected) in [
            ("binary", include_str!("binary.golden")),
            ("structured", include_str!("structured.golden")),
        ] {
            let delivery = consumer.next().await.unwrap().unwrap();
            assert_eq!(shown(&delivery), expected, "{format}");
        }
    });
}

/// Under a routing key that is no topic, bound by hand, and with texts longer than AMQP's short ones: nothing of it may be lost, nor stop
/// others when it is copied.
#[test]
fn the_oddest_messages_of_a_plain_client_are_taken() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.ordered().unordered()).await;
        let (_connection, channel) = fixture.plain().await;
        let mut headers = FieldTable::default();
        for name in [
            "cloudEvents:id",
            "cloudEvents:source",
            "cloudEvents:type",
            "cloudEvents:datacontenttype",
        ] {
            headers.insert(name.into(), AMQPValue::LongString("ü".repeat(300).into()));
        }
        let properties = BasicProperties::default().with_headers(headers);
        let (key, exchange) = ("a:c", fixture.name.as_str());
        let bound = channel.queue_bind(
            exchange.into(),
            exchange.into(),
            key.into(),
            Default::default(),
            Default::default(),
        );
        bound.await.unwrap();
        let sent = channel.basic_publish(
            exchange.into(),
            key.into(),
            BasicPublishOptions::default(),
            b"odd",
            properties,
        );
        sent.await.unwrap().await.unwrap();
        publish(&transport, &[fixture.message(None, "even")]).await;
        let mut taken = take(&mut intake, 2, SOON).await;
        taken.sort_by_key(|delivery| delivery.message().payload().clone());
        let odd = taken.pop().unwrap();
        assert_eq!(&odd.message().payload()[..], b"odd");
        assert!(odd.message().kind().starts_with('ü'), "{:?}", odd.message());
        let settled = vec![odd.dead_letter(), taken.remove(0).ack()];
        assert_eq!(settling.settle(settled).await.len(), 0);
        publish(&transport, &[fixture.message(None, "after")]).await;
        assert_eq!(take(&mut intake, 1, SOON).await.len(), 1);
    });
}

#[test]
fn messages_of_a_plain_client_are_taken() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        for (round, subscription) in [fixture.ordered(), fixture.ordered().unordered()]
            .into_iter()
            .enumerate()
        {
            let (mut intake, settling) = join(&transport, &subscription).await;
            let (_connection, channel) = fixture.plain().await;
            let mut headers = FieldTable::default();
            for (name, value) in [
                ("cloudEvents:id", "A-1"),
                ("cloudEvents:source", "/crm"),
                ("cloudEvents:type", "crm.changed"),
                ("x", "y"),
            ] {
                headers.insert(name.into(), AMQPValue::LongString(value.into()));
            }
            headers.insert("n".into(), AMQPValue::LongInt(7));
            if round == 1 {
                // Bytes that are a text, as some clients write texts.
                for (name, value) in [("cloudEvents:source", "/crm"), ("cloudEvents:type", "crm.changed")] {
                    headers.insert(name.into(), AMQPValue::ByteArray(value.as_bytes().to_vec().into()));
                }
            }
            // Types of AMQP's own: the time in seconds, or in milliseconds, as some write it.
            let time = match round {
                0 => AMQPValue::Timestamp(1_767_225_600),
                _ => AMQPValue::LongLongInt(1_767_225_600_000),
            };
            headers.insert("cloudEvents:time".into(), time);
            headers.insert("cloudEvents:level".into(), AMQPValue::LongLongInt(-3));
            headers.insert("cloudEvents:urgent".into(), AMQPValue::Boolean(true));
            headers.insert("ce-digest".into(), AMQPValue::ByteArray(vec![0xff, 0].into()));
            let mut table = FieldTable::default();
            table.insert("a".into(), AMQPValue::LongInt(1));
            headers.insert("table".into(), AMQPValue::FieldTable(table));
            let event = BasicProperties::default()
                .with_headers(headers)
                .with_content_type("text/plain".into());
            // Milliseconds, as some write that, too.
            let bare = BasicProperties::default()
                .with_type("bare".into())
                .with_timestamp(1_767_225_600_000);
            for properties in [event, bare] {
                channel
                    .basic_publish(
                        fixture.name.as_str().into(),
                        fixture.topic("t").as_str().into(),
                        BasicPublishOptions::default(),
                        b"hello",
                        properties,
                    )
                    .await
                    .unwrap()
                    .await
                    .unwrap();
            }
            let mut taken = take(&mut intake, 2, SOON).await;
            let (event, bare) = (&taken[0].message().clone(), taken[1].message().clone());
            assert_eq!(
                (event.id(), event.kind()),
                (MessageId::foreign("/crm", "A-1"), "crm.changed")
            );
            assert_eq!(
                (event.header("x"), event.header("n"), event.content_type()),
                (Some("y"), Some("7"), "text/plain")
            );
            assert_eq!(
                (event.topic(), &event.payload()[..]),
                (&fixture.topic("t"), &b"hello"[..])
            );
            let source = format!("amqp:{}/{}", fixture.name, fixture.topic("t"));
            assert_eq!((bare.kind(), bare.source(), bare.key()), ("bare", Some(&*source), None));
            for message in [event, &bare] {
                assert_eq!(message.time().unwrap().timestamp(), 1_767_225_600);
            }
            assert_eq!(
                (event.attribute("level"), event.attribute("urgent")),
                (Some(&(-3).into()), Some(&true.into()))
            );
            assert_eq!(
                (event.attribute("digest"), event.header("table")),
                (Some(&bytes::Bytes::from_static(&[0xff, 0]).into()), Some(r#"{"a":1}"#))
            );
            assert!(event.header("time").is_none() && event.attribute("time").is_none());
            // What came from elsewhere can be published again, under the id it came with.
            Limits::default().check(event).unwrap();
            publish(&transport, std::slice::from_ref(event)).await;
            let again = take(&mut intake, 1, SOON).await;
            assert_eq!(again[0].message(), event);
            taken.extend(again);
            settling
                .settle(taken.into_iter().map(postrider_core::Delivery::ack).collect())
                .await;
            settling.close(SOON).await.unwrap();
            for queue in (0..8).map(|n| format!("{}:{n}", fixture.name)) {
                channel.queue_delete(queue.into(), Default::default()).await.unwrap();
            }
        }
    });
}

/// The broker takes these for routing keys, and closes the channel where they hold a text.
#[test]
fn headers_with_names_of_the_brokers_own_are_carried() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, _settling) = join(&transport, &fixture.ordered()).await;
        let message = fixture
            .message(Some("k"), "x")
            .with_header("CC", "somebody")
            .with_header("BCC", "somebody else");
        publish(&transport, std::slice::from_ref(&message)).await;
        let got = take(&mut intake, 1, Duration::from_secs(10)).await;
        let got = got[0].message();
        assert_eq!(
            (got.header("CC"), got.header("BCC"), got.headers().len()),
            (Some("somebody"), Some("somebody else"), 2)
        );
    });
}

/// Applications that each number their messages from 1 have sent different messages, whatever the numbers.
#[test]
fn ids_of_strangers_are_unique_only_with_their_source() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.ordered().unordered()).await;
        let (_connection, channel) = fixture.plain().await;
        for (app, id) in [("a", "1"), ("b", "1"), ("a", "2"), ("b", "2"), ("a", "x"), ("a", "X")] {
            let properties = BasicProperties::default()
                .with_message_id(id.into())
                .with_app_id(app.into());
            channel
                .basic_publish(
                    fixture.name.as_str().into(),
                    fixture.topic("t").as_str().into(),
                    BasicPublishOptions::default(),
                    b"hello",
                    properties,
                )
                .await
                .unwrap()
                .await
                .unwrap();
        }
        let taken = take(&mut intake, 6, SOON).await;
        let ids: std::collections::BTreeSet<_> = taken.iter().map(|delivery| delivery.message().id()).collect();
        assert_eq!(ids.len(), 6);
        let first = taken[0].message();
        assert_eq!((first.source(), &*first.event_id()), (Some("a"), "1"));
        settling
            .settle(taken.into_iter().map(postrider_core::Delivery::ack).collect())
            .await;
    });
}

/// Events as the official Python SDK writes them (`transports/interop`), in its bindings for AMQP and for RabbitMQ, are read field for
/// field.
#[test]
fn events_of_the_official_sdk_are_read() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.ordered().unordered()).await;
        let (_connection, channel) = fixture.plain().await;
        for (name, golden) in [
            ("amqp binary", include_str!("../../../interop/python-amqp-binary.json")),
            (
                "amqp structured",
                include_str!("../../../interop/python-amqp-structured.json"),
            ),
            (
                "rabbitmq binary",
                include_str!("../../../interop/python-rabbitmq-binary.json"),
            ),
            (
                "rabbitmq structured",
                include_str!("../../../interop/python-rabbitmq-structured.json"),
            ),
        ] {
            let golden: serde_json::Value = serde_json::from_str(golden).unwrap();
            let mut headers = FieldTable::default();
            for (name, value) in golden["headers"].as_object().unwrap() {
                let value = match value {
                    serde_json::Value::Bool(yes) => AMQPValue::Boolean(*yes),
                    serde_json::Value::Number(n) => AMQPValue::LongLongInt(n.as_i64().unwrap()),
                    text => AMQPValue::LongString(text.as_str().unwrap().into()),
                };
                headers.insert(name.as_str().into(), value);
            }
            let properties = BasicProperties::default()
                .with_headers(headers)
                .with_content_type(golden["content_type"].as_str().unwrap().into());
            channel
                .basic_publish(
                    fixture.name.as_str().into(),
                    fixture.topic("t").as_str().into(),
                    BasicPublishOptions::default(),
                    golden["body"].as_str().unwrap().as_bytes(),
                    properties,
                )
                .await
                .unwrap()
                .await
                .unwrap();
            let taken = take(&mut intake, 1, SOON).await;
            let event = taken[0].message();
            assert_eq!(
                (&*event.event_id(), event.source()),
                ("Ünï-1", Some("/shop/eu")),
                "{name}"
            );
            assert_eq!(event.id(), MessageId::foreign("/shop/eu", "Ünï-1"), "{name}");
            assert_eq!(
                (event.kind(), event.key()),
                ("com.example.order.placed", Some("order-1")),
                "{name}"
            );
            assert_eq!(event.time().unwrap().timestamp_millis(), 1_767_225_600_123, "{name}");
            assert_eq!(event.content_type(), "application/json", "{name}");
            // The binding for RabbitMQ writes all values as texts, in Python's words.
            let is_text = name == "rabbitmq binary";
            let (level, urgent): (AttributeValue, AttributeValue) = match is_text {
                true => ("3".into(), "True".into()),
                false => (3.into(), true.into()),
            };
            let attributes: Vec<(&str, &AttributeValue)> =
                event.attributes().iter().map(|(n, v)| (n.as_str(), v)).collect();
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
            settling
                .settle(taken.into_iter().map(postrider_core::Delivery::ack).collect())
                .await;
        }
    });
}
