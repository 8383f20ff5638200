//! Events that other languages append.

use crate::fixture::{LONG, PostgresFixture, claim, done, open, options, record};
use postrider_core::{
    Mailbox, Message, Topic,
    log::{EventLogStore as _, NewRecord},
};
use postrider_testkit::{run, server::Postgres};
use proptest::{
    strategy::{Strategy as _, ValueTree as _},
    test_runner::TestRunner,
};
use std::process::Command;

/// What `psql` says to a statement; an error is one too.
fn psql(fixture: &PostgresFixture, sql: &str) -> Result<String, String> {
    let program = Postgres::programs().join("psql");
    let mut psql = Command::new(program);
    psql.args([
        "-X",
        "-q",
        "-A",
        "-t",
        "-v",
        "ON_ERROR_STOP=1",
        "-c",
        &fixture.fill(sql),
    ]);
    let output = psql.arg(Postgres::shared().url()).output().expect("psql runs");
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).trim().to_owned();
    if output.status.success() {
        Ok(text(&output.stdout))
    } else {
        Err(text(&output.stderr))
    }
}

#[test]
fn what_psql_appends_is_relayed_in_order_beside_ours() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let ours = |n: u32| [record(Some("order-1"), &n.to_string())];
        for n in 0..10 {
            if n % 2 == 0 {
                fixture.log.append(&Mailbox::outbox(), &ours(n)).await.unwrap();
            } else {
                let sql = format!("SELECT {{append}}('t', 't.v1', '{n}', key => 'order-1')");
                psql(&fixture, &sql).unwrap();
            }
        }
        let id = psql(
            &fixture,
            "BEGIN; SELECT {append}('orders', 'order.placed.v1', '{\"n\": 1}'::jsonb, key => 'ä', headers => '{\"trace\": \"x\"}', source => 'php'); COMMIT",
        )
        .unwrap();
        psql(
            &fixture,
            "SELECT {append}('orders', 'typed.v1', 'plain', content_type => 'text/plain', occurred_at => '2026-01-01 00:00:00+00', headers => '{\"h\": \"1\"}', \
             attributes => '{\"tenantid\": \"acme\", \"level\": 3, \"urgent\": true}')",
        )
        .unwrap();
        psql(&fixture, "SELECT {append}('orders', 'json.v1', '{ }'::json)").unwrap();
        psql(
            &fixture,
            "SELECT {append}('orders', 'raw.v1', '\\x00ff'::bytea, headers => '[[\"a\", \"\"], [\"a\", \"2\"]]')",
        )
        .unwrap();
        psql(&fixture, "BEGIN; SELECT {append}('orders', 'never.v1', '{}'); ROLLBACK").unwrap();
        let session = open(&fixture.log, options(LONG)).await;
        let records = claim(&*session).await.records;
        done(&*session, &records).await;
        let of_key: Vec<_> = records.iter().filter(|r| r.message.key() == Some("order-1")).collect();
        let names: Vec<_> = of_key
            .iter()
            .map(|r| String::from_utf8_lossy(r.message.payload()).into_owned())
            .collect();
        assert_eq!(names, ["0", "1", "2", "3", "4", "5", "6", "7", "8", "9"]);
        assert_eq!(records.len(), 14);
        let of = |kind: &str| &records.iter().find(|r| r.message.kind() == kind).unwrap().message;
        let typed = of("typed.v1");
        assert_eq!(
            (
                typed.attribute("tenantid"),
                typed.attribute("level"),
                typed.attribute("urgent")
            ),
            (Some(&"acme".into()), Some(&3.into()), Some(&true.into()))
        );
        assert_eq!((typed.headers().len(), typed.content_type()), (1, "text/plain"));
        assert_eq!(typed.time().unwrap().timestamp(), 1_767_225_600);
        assert!(typed.id().is_ours(), "consumers know it by the id that `append` gave");
        assert_eq!(&of("json.v1").payload()[..], b"{ }");
        let placed = &records
            .iter()
            .find(|r| r.message.id().to_string() == id)
            .unwrap()
            .message;
        assert_eq!(
            (placed.topic().as_str(), placed.kind(), placed.key()),
            ("orders", "order.placed.v1", Some("ä"))
        );
        assert_eq!(
            (placed.source(), placed.content_type()),
            (Some("php"), "application/json")
        );
        assert_eq!(placed.headers(), [("trace".to_owned(), "x".to_owned())]);
        assert_eq!(&placed.payload()[..], br#"{"n": 1}"#);
        assert!(placed.time().is_some());
        let raw = &records.iter().find(|r| r.message.kind() == "raw.v1").unwrap().message;
        assert_eq!(&raw.payload()[..], [0, 255]);
        assert_eq!(raw.headers().len(), 2);
    });
}

#[test]
fn what_is_wrong_is_refused_with_the_reason() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let long = "x".repeat(513);
        for (arguments, says) in [
            ("'', 't.v1', '{}'".to_owned(), "the topic has to be"),
            ("'a..b', 't.v1', '{}'".to_owned(), "the topic has to be"),
            ("'a b', 't.v1', '{}'".to_owned(), "the topic has to be"),
            ("NULL, 't.v1', '{}'".to_owned(), "the topic has to be"),
            ("'t', '', '{}'".to_owned(), "the type has to have"),
            ("'t', 't.v1', NULL::text".to_owned(), "the payload is null"),
            ("'t', 't.v1', '{}', key => ''".to_owned(), "the key has to have"),
            (format!("'t', 't.v1', '{{}}', key => '{long}'"), "the key has to have"),
            ("'t', 't.v1', '{}', headers => '3'".to_owned(), "the headers have to be"),
            (
                "'t', 't.v1', '{}', headers => '[[\"a\"]]'".to_owned(),
                "a header has to be",
            ),
            (
                "'t', 't.v1', '{}', headers => '{\"\": \"b\"}'".to_owned(),
                "a header has to be",
            ),
            (
                "'t', 't.v1', '{}', headers => '{\"a\": 1}'".to_owned(),
                "a header has to be",
            ),
            ("'t', 't.v1', '{}', source => ''".to_owned(), "the source has to have"),
            (
                "'t', 't.v1', '{}', route => 'nowhere'".to_owned(),
                "there is no route 'nowhere'",
            ),
            (
                "'t', 't.v1', repeat('x', 921600)::bytea".to_owned(),
                "keep the bulk elsewhere",
            ),
            (
                "'t', 't.v1', 'no JSON'".to_owned(),
                "invalid input syntax for type json",
            ),
            (
                "'t', 't.v1', '{}', attributes => '{\"tenantId\": \"x\"}'".to_owned(),
                "letters a to z",
            ),
            (
                "'t', 't.v1', '{}', attributes => '{\"id\": \"x\"}'".to_owned(),
                "a parameter of its own",
            ),
            (
                "'t', 't.v1', '{}', attributes => '{\"n\": 1.5}'".to_owned(),
                "an integer of 32 bits",
            ),
            (
                "'t', 't.v1', '{}', attributes => '[]'".to_owned(),
                "the attributes have to be an object",
            ),
            (
                "'t', 't.v1', '{}', key => E'a\\000b'".to_owned(),
                "invalid byte sequence",
            ),
        ] {
            let error = psql(&fixture, &format!("SELECT {{append}}({arguments})")).unwrap_err();
            assert!(error.contains(says), "{arguments}: {error}");
        }
        assert_eq!(fixture.number("SELECT count(*) FROM {event}").await, 0);
        // What fits just so goes.
        psql(
            &fixture,
            "SELECT {append}('t', 't.v1', repeat('x', 921600 - 20)::bytea, content_type => 'c', source => 's')",
        )
        .unwrap();
        psql(
            &fixture,
            "SELECT {append}('t', 't.v1', '{}', not_before => now() - interval '1 hour')",
        )
        .unwrap();
        psql(
            &fixture,
            "SELECT {append}('t', 't.v1', '{}', not_before => now() + interval '1 hour')",
        )
        .unwrap();
        assert_eq!(fixture.number("SELECT count(*) FROM {event}").await, 2);
        assert_eq!(fixture.number("SELECT count(*) FROM {scheduled}").await, 1);
    });
}

#[test]
fn sql_and_rust_put_every_key_into_the_same_lane() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let keys = proptest::collection::vec(
            "\\PC{1,40}|[\u{1}-\u{1f}]{1,5}|.{1,20}".prop_filter("no NUL", |key| !key.contains('\0')),
            300,
        );
        let keys: Vec<String> = keys.new_tree(&mut TestRunner::default()).unwrap().current();
        let message = |key: Option<&String>| {
            let message = Message::new(Topic::new("t"), "t.v1", "").with_source("test");
            NewRecord::new(match key {
                Some(key) => message.with_key(key.clone()),
                None => message,
            })
        };
        let batch: Vec<NewRecord> = keys
            .iter()
            .map(|key| message(Some(key)))
            .chain((0..100).map(|_| message(None)))
            .collect();
        fixture.log.append(&Mailbox::outbox(), &batch).await.unwrap();
        let all = fixture.number("SELECT count(*) FROM {event}").await;
        assert_eq!(all, 400);
        assert_eq!(
            fixture
                .number("SELECT count(*) FROM {event} WHERE lane <> {lane_of}(key, message_id)")
                .await,
            0
        );
        assert!(
            fixture.number("SELECT count(DISTINCT lane) FROM {event}").await > 50,
            "they are spread"
        );
    });
}
