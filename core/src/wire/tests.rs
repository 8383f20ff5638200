use super::*;
use crate::{Topic, clock::Timestamp};

const NAMES: Names = crate::wire_names!("ce_", also "ce-", "cloudEvents:");

fn message() -> Message {
    let time = Timestamp::from_timestamp_micros(1_767_225_600_123_456).unwrap();
    Message::new(Topic::new("orders"), "order.placed.v2", r#"{"id": 1, "text":"ü"}"#)
        .with_id("018f4e6a-7c00-7000-8000-000000000001".parse().unwrap())
        .with_source("urn:shop")
        .with_key("ключ")
        .with_header("tenant", "a")
        .with_header("tenant", "b")
        .with_header("correlationid", "c-1")
        .with_header("traceparent", "00-x-y-01")
        .with_content_type("application/json")
        .with_time(time)
        .with_sequence(42)
}

fn write(message: &Message, format: Format) -> (Vec<(String, String)>, Body) {
    let mut headers = Vec::new();
    let body = NAMES.write(message, format, |name, value| {
        headers.push((name.to_owned(), value.to_owned()))
    });
    (headers, body)
}

fn read(headers: &[(String, String)], content_type: Option<&str>, payload: Bytes, place: Option<&str>) -> Message {
    let mut reader = Reader::default();
    let mut reading = reader.begin(&NAMES);
    for (name, value) in headers {
        reading.header(name, value.as_bytes());
    }
    let topic = Topic::new("orders");
    reading.finish(Arrived {
        content_type,
        place: place.map(str::to_owned),
        ..Arrived::new(&topic, payload)
    })
}

#[test]
fn binary_mode_is_the_format_that_was_agreed_on() {
    let (headers, body) = write(&message(), Format::Binary);
    let expected = [
        ("ce_specversion", "1.0"),
        ("ce_id", "018f4e6a-7c00-7000-8000-000000000001"),
        ("ce_type", "order.placed.v2"),
        ("ce_source", "urn:shop"),
        ("ce_time", "2026-01-01T00:00:00.123456Z"),
        ("ce_partitionkey", "ключ"),
        ("ce_sequence", "00000000000000000042"),
        ("tenant", "a"),
        ("tenant", "b"),
        ("ce_correlationid", "c-1"),
        ("traceparent", "00-x-y-01"),
    ];
    let expected: Vec<(String, String)> = expected
        .iter()
        .map(|(n, v)| ((*n).to_owned(), (*v).to_owned()))
        .collect();
    assert_eq!(headers, expected);
    assert_eq!(&*body.content_type, "application/json");
    assert_eq!(body.payload, message().payload());
}

#[test]
fn structured_mode_is_the_format_that_was_agreed_on() {
    let (headers, body) = write(&message(), Format::Structured);
    assert_eq!(headers.len(), 3, "what is no attribute stays a header: {headers:?}");
    assert_eq!(&*body.content_type, STRUCTURED);
    let expected = r#"{"specversion":"1.0","id":"018f4e6a-7c00-7000-8000-000000000001","type":"order.placed.v2","source":"urn:shop","time":"2026-01-01T00:00:00.123456Z","partitionkey":"ключ","sequence":"00000000000000000042","correlationid":"c-1","datacontenttype":"application/json","data":{"id": 1, "text":"ü"}}"#;
    assert_eq!(std::str::from_utf8(&body.payload).unwrap(), expected);
    let binary = message().with_content_type("application/x-thing");
    let (_, body) = write(&binary, Format::Structured);
    assert!(
        std::str::from_utf8(&body.payload)
            .unwrap()
            .ends_with(r#""data_base64":"eyJpZCI6IDEsICJ0ZXh0Ijoiw7wifQ=="}"#)
    );
}

#[test]
fn what_is_written_is_read() {
    let odd = Message::new(Topic::new("orders"), "x.v1", vec![0xff, 0, 0x22]).with_source("s");
    let not_json = message().with_content_type("application/json; charset=utf-8");
    let not_json = Message::new(Topic::new("orders"), not_json.kind().to_owned(), "not json")
        .with_source("s")
        .with_content_type("application/json");
    for sent in [message(), odd, not_json] {
        for format in [Format::Binary, Format::Structured] {
            let (headers, body) = write(&sent, format);
            let mut got = read(&headers, Some(&body.content_type), body.payload, None);
            // Attributes come before headers in structured mode.
            let sorted = |m: &Message| {
                let mut headers = m.headers().to_vec();
                headers.sort();
                headers
            };
            assert_eq!(sorted(&got), sorted(&sent));
            got = sent
                .headers()
                .iter()
                .fold(without_headers(&got), |m, (n, v)| m.with_header(n, v));
            assert_eq!(got, sent, "{format:?}");
        }
    }
}

fn without_headers(message: &Message) -> Message {
    let mut bare = Message::new(
        message.topic().clone(),
        message.kind().to_owned(),
        message.payload().clone(),
    )
    .with_id(message.id())
    .with_content_type(message.content_type().to_owned());
    if let Some(source) = message.source() {
        bare = bare.with_source(source.to_owned());
    }
    if let Some(key) = message.key() {
        bare = bare.with_key(key);
    }
    if let Some(time) = message.time() {
        bare = bare.with_time(time);
    }
    match message.sequence() {
        Some(position) => bare.with_sequence(position),
        None => bare,
    }
}

#[test]
fn messages_of_others_are_taken_as_they_are() {
    // Nothing but bytes.
    let bare = read(&[], None, "x".into(), Some("kafka:orders/3/17"));
    assert_eq!((bare.kind(), bare.source(), bare.key()), ("orders", None, None));
    assert_eq!(bare.id(), read(&[], None, "y".into(), Some("kafka:orders/3/17")).id());
    assert_ne!(bare.id(), read(&[], None, "x".into(), Some("kafka:orders/3/18")).id());
    assert_ne!(
        read(&[], None, "x".into(), None).id(),
        read(&[], None, "x".into(), None).id()
    );
    // A CloudEvent whose id is no UUID, with attributes of its own, in other names.
    let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
    let headers = [
        header("ce-id", "A-1"),
        header("CE-source", "/crm"),
        header("cloudEvents:type", "crm.changed"),
        header("ce_dept", "sales"),
        header("Content-Type", "text/plain"),
        header("ce_sequence", "not a number"),
        header("n", "a\0b"),
    ];
    let event = read(&headers, None, "x".into(), Some("ignored"));
    assert_eq!((event.kind(), event.source()), ("crm.changed", Some("/crm")));
    assert_eq!(event.id(), MessageId::foreign("/crm", "A-1"));
    assert_eq!(event.content_type(), "text/plain");
    assert_eq!(
        (event.header("dept"), event.header("n")),
        (Some("sales"), Some("a\u{fffd}b"))
    );
    assert_eq!(
        (event.sequence(), event.header("sequence")),
        (None, Some("not a number"))
    );
    // And it goes out under the id it came with.
    let (again, _) = write(&event, Format::Binary);
    assert!(again.contains(&header("ce_id", "A-1")), "{again:?}");
    assert!(again.iter().all(|(name, _)| name != ORIGINAL_ID));
}

#[test]
fn structured_events_of_others_are_read() {
    for (text, content_type, payload) in [
        (
            r#"{"specversion":"1.0","id":"1","type":"t","source":"s","data":{"a": 1}}"#,
            "application/json",
            r#"{"a": 1}"#,
        ),
        (
            r#"{"specversion":"1.0","id":"1","type":"t","source":"s","datacontenttype":"text/plain","data":"hi \"you\""}"#,
            "text/plain",
            r#"hi "you""#,
        ),
        (
            r#"{"specversion":"1.0","id":"1","type":"t","source":"s","datacontenttype":"a/b","data_base64":"aGk="}"#,
            "a/b",
            "hi",
        ),
        (
            r#"{"specversion":"1.0","id":"1","type":"t","source":"s","n":1}"#,
            "application/json",
            "",
        ),
    ] {
        let event = read(
            &[],
            Some("application/cloudevents+json; charset=UTF-8"),
            text.into(),
            None,
        );
        assert_eq!((event.kind(), event.content_type()), ("t", content_type), "{text}");
        assert_eq!(event.payload(), payload);
        assert_eq!(event.id(), MessageId::foreign("s", "1"));
    }
    for not in [
        "",
        "{",
        "[]",
        r#"{"id":1}"#,
        r#"{"specversion":"1.0","data_base64":"%"}"#,
    ] {
        let kept = read(&[], Some(STRUCTURED), not.to_owned().into(), None);
        assert_eq!(
            (kept.payload(), kept.content_type()),
            (&Bytes::from(not.to_owned()), STRUCTURED)
        );
    }
}

#[test]
fn names_that_would_be_taken_for_attributes_are_refused() {
    for name in ["ce_x", "CE-id", "cloudEvents:x", "Content-Type", "postrider-x"] {
        assert!(is_reserved(name), "{name}");
    }
    for name in ["traceparent", "cell", "ce", "content", "ключ"] {
        assert!(!is_reserved(name), "{name}");
    }
}
