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
        .with_attribute("correlationid", "c-1")
        .with_attribute("level", 3)
        .with_header("traceparent", "00-x-y-01")
        .with_content_type("application/json")
        .with_time(time)
        .with_sequence(42)
}

fn write(message: &Message, format: Format) -> (Vec<(String, String)>, Body) {
    let mut headers = Vec::new();
    let body = NAMES.write(message, format, |name, value| {
        headers.push((name.to_owned(), value.as_text().into_owned()))
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
        ("ce_correlationid", "c-1"),
        ("ce_level", "3"),
        ("tenant", "a"),
        ("tenant", "b"),
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
    let expected = r#"{"specversion":"1.0","id":"018f4e6a-7c00-7000-8000-000000000001","type":"order.placed.v2","source":"urn:shop","time":"2026-01-01T00:00:00.123456Z","partitionkey":"ключ","sequence":"00000000000000000042","correlationid":"c-1","level":3,"datacontenttype":"application/json","data":{"id": 1, "text":"ü"}}"#;
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
            let got = read(&headers, Some(&body.content_type), body.payload, None);
            // The id is none of ours, so it is known by its source, too.
            let sent = sent.clone().arrived();
            match format {
                // Headers are texts here.
                Format::Binary if sent.attribute("level").is_some() => {
                    assert_eq!(got.attribute("level"), Some(&AttributeValue::from("3")));
                    assert_eq!(got.with_attribute("level", 3), sent);
                }
                _ => assert_eq!(got, sent, "{format:?}"),
            }
        }
    }
}

#[test]
fn messages_of_others_are_taken_as_they_are() {
    // Nothing but bytes.
    let bare = read(&[], None, "x".into(), Some("kafka:orders/3/17"));
    assert_eq!((bare.kind(), bare.source(), bare.key()), ("orders", None, None));
    assert_eq!(bare.event_id(), "kafka:orders/3/17");
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
        (event.attribute("dept"), event.header("n")),
        (Some(&"sales".into()), Some("a\u{fffd}b"))
    );
    assert_eq!(
        (event.sequence(), event.attribute("sequence")),
        (None, Some(&"not a number".into()))
    );
    // And it goes out under the id it came with.
    let (again, _) = write(&event, Format::Binary);
    assert!(again.contains(&header("ce_id", "A-1")), "{again:?}");
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

/// An event is identified by its source and its id together, as texts.
#[test]
fn identity_is_source_and_id() {
    const UUID: &str = "6ba7b810-9dad-41d1-80b4-00c04fd430c8";
    let of = |source: &str, id: &str| {
        let header = |name: &str, value: &str| (name.to_owned(), value.to_owned());
        read(
            &[header("ce_source", source), header("ce_id", id)],
            None,
            "x".into(),
            None,
        )
    };
    let one = of("/a", UUID);
    assert_eq!(one.event_id(), UUID);
    assert_eq!(one.id(), of("/a", UUID).id());
    assert_ne!(one.id(), of("/b", UUID).id());
    assert_ne!(one.id(), of("/a", &UUID.to_uppercase()).id());
    assert_ne!(of("/a", "A").id(), of("/a", "a").id());
    // What a transport that hands on messages themselves delivers is known by the same.
    let sent = Message::new(Topic::new("orders"), "t", "x")
        .with_source("/a")
        .with_id(UUID.parse().unwrap());
    assert_eq!(sent.arrived().id(), one.id());
    // One of ours is itself.
    let ours = MessageId::new();
    assert_eq!(of("/a", &ours.to_string()).id(), ours);
    assert_eq!(of("/a", &ours.to_string()).event_id(), ours.to_string());
}

/// Whatever came from elsewhere can be published again, and arrives as the same event: random headers, in either mode.
#[test]
fn what_was_read_can_be_published_and_read_again() {
    const PIECES: [&str; 14] = [
        "",
        "a",
        "A-1",
        "ключ",
        "\0",
        "ce_",
        "6ba7b810-9dad-41d1-80b4-00c04fd430c8",
        "2026-01-01T00:00:00Z",
        "true",
        "-7",
        "\"",
        "\u{feff}",
        " ",
        "urn:x",
    ];
    const NAMES_OF: [&str; 16] = [
        "ce_id",
        "ce_source",
        "ce_type",
        "ce_time",
        "ce_partitionkey",
        "ce_sequence",
        "ce_subject",
        "ce_My-Attr",
        "ce-dept",
        "cloudEvents:n",
        "ce_datacontenttype",
        "Content-Type",
        "postrider-x",
        "traceparent",
        "plain",
        "",
    ];
    let limits = crate::Limits::default();
    for seed in 0..5000 {
        let mut rng = fastrand::Rng::with_seed(seed);
        let some = |rng: &mut fastrand::Rng| {
            let pieces = rng.usize(..3);
            (0..pieces)
                .map(|_| PIECES[rng.usize(..PIECES.len())])
                .collect::<String>()
        };
        let headers: Vec<(String, String)> = (0..rng.usize(..8))
            .map(|_| (NAMES_OF[rng.usize(..NAMES_OF.len())].to_owned(), some(&mut rng)))
            .collect();
        let (payload, content_type) = match rng.u8(..3) {
            0 => (some(&mut rng), "text/plain"),
            1 => (r#"{"specversion":"1.0","id":"1","type":"t","source":"s","n":1,"yes":true,"x":1.5,"o":{"a":[]},"data":[1]}"#.to_owned(), STRUCTURED),
            _ => ("{ }".to_owned(), "application/json"),
        };
        let first = read(&headers, Some(content_type), payload.into(), Some("place"));
        limits
            .check(&first)
            .unwrap_or_else(|error| panic!("seed {seed}: {error}"));
        let stored = crate::log::Headers::from_text(&crate::log::Headers::to_text(&first).unwrap()).unwrap();
        assert_eq!(
            (&*stored.attributes, &*stored.headers),
            (first.attributes(), first.headers())
        );
        for format in [Format::Structured, Format::Binary] {
            let (written, body) = write(&first, format);
            let second = read(&written, Some(&body.content_type), body.payload, Some("another"));
            let texts = |m: &Message| -> Vec<(String, String)> {
                m.attributes()
                    .iter()
                    .map(|(n, v)| (n.to_string(), v.to_string()))
                    .collect()
            };
            match format {
                Format::Structured => assert_eq!(second, first, "seed {seed}"),
                _ => {
                    assert_eq!(texts(&second), texts(&first), "seed {seed}");
                    let same = first
                        .attributes()
                        .iter()
                        .fold(second, |m, (n, v)| m.with_attribute(n.clone(), v.clone()));
                    assert_eq!(same, first, "seed {seed}");
                }
            }
        }
    }
}

/// A header that is no text is kept as a data URL, and is the same bytes when the message is written again. A text that looks like one
/// stays a text.
#[test]
fn headers_that_are_no_text_are_bytes_again() {
    let mut reader = Reader::default();
    let mut reading = reader.begin(&NAMES);
    let bytes = [0xff, 0, b'a'];
    reading.header("trace-bin", &bytes);
    reading.typed_header("digest", AttributeValue::Binary(vec![0xfe].into()));
    reading.header("looks-so", b"data:;base64,YQ==");
    let topic = Topic::new("orders");
    let read = reading.finish(Arrived::new(&topic, Bytes::new()));
    assert_eq!(read.header("trace-bin"), Some("data:;base64,/wBh"));
    let mut written = Vec::new();
    NAMES.write(&read, Format::Binary, |name, value| {
        if let Value::Bytes(bytes) = value {
            written.push((name.to_owned(), bytes.to_vec()));
        } else if name == "looks-so" {
            assert_eq!(value, Value::Text("data:;base64,YQ=="));
        }
    });
    assert_eq!(
        written,
        [
            ("trace-bin".to_owned(), bytes.to_vec()),
            ("digest".to_owned(), vec![0xfe])
        ]
    );
}

/// Whatever a stranger wrote comes back as the same event when it is written again, in either mode.
#[test]
fn what_strangers_write_survives_being_written_again() {
    let id = [("ce_id", "A-1"), ("ce_source", "/crm"), ("ce_type", "x")];
    let event = |more: &[(&str, &str)], payload: &str| {
        let headers: Vec<_> = id
            .iter()
            .chain(more)
            .map(|(name, value)| ((*name).to_owned(), (*value).to_owned()))
            .collect();
        read(
            &headers,
            Some("application/json"),
            payload.to_owned().into(),
            Some("orders/0/5"),
        )
    };
    let deep = format!("{}{}", "[".repeat(200), "]".repeat(200));
    for (more, payload) in [
        (&[][..], "null"),
        (&[], "1e999"),
        (&[], r#""\ud800""#),
        (&[], &deep),
        (&[("ce_data", "x"), ("ce_data_base64", "!")], "{}"),
        (&[("ce_time", "2026-01-01T00:00:00")], "{}"),
        (&[("ce_time", "yesterday"), ("ce_sequence", "A01")], "{}"),
        (&[("CE_id", "another"), ("CloudEvents", "x")], "{}"),
    ] {
        // Through an outbox, say, which numbers it.
        let first = event(more, payload).with_sequence(7);
        crate::Limits::default().check(&first).unwrap();
        for format in [Format::Binary, Format::Structured] {
            let (headers, body) = write(&first, format);
            let mut names: Vec<_> = headers.iter().map(|(name, _)| name).collect();
            names.sort();
            names.dedup();
            assert_eq!(names.len(), headers.len(), "{headers:?}");
            let again = read(&headers, Some(&body.content_type), body.payload, None);
            let known = |message: &Message| {
                let text = |text: Option<&str>| text.map(str::to_owned);
                let named = (
                    message.id(),
                    message.kind().to_owned(),
                    text(message.source()),
                    message.event_id().into_owned(),
                );
                (
                    named,
                    message.attributes().to_vec(),
                    message.headers().to_vec(),
                    message.payload().clone(),
                )
            };
            assert_eq!(known(&again), known(&first), "{format:?} {more:?} {payload}");
        }
    }
    let time = event(&[("ce_time", "2026-01-01T00:00:00")], "{}").time();
    assert_eq!(time, Timestamp::from_timestamp(1_767_225_600, 0), "it counts as UTC");
}

/// A message whose payload is an event in structured mode is not taken for that event.
#[test]
fn an_event_in_an_event_stays_inside() {
    let inner = r#"{"specversion":"1.0","id":"inner","type":"t","source":"s","data":1}"#;
    let message = Message::new(Topic::new("orders"), "raw.v1", inner)
        .with_source("s")
        .with_content_type("application/cloudevents+json");
    for format in [Format::Binary, Format::Structured] {
        let (headers, body) = write(&message, format);
        let again = read(&headers, Some(&body.content_type), body.payload, None);
        assert_eq!(
            (again.id(), again.kind(), &again.payload()[..]),
            (message.id(), "raw.v1", inner.as_bytes())
        );
    }
}
