//! What comes out is what went in.

use super::{
    Desk, LogFixture, NEEDS_ADMIN,
    fixture::{LONG, name, names},
    message,
};
use postrider_core::{
    GroupName, Mailbox, Message, Topic,
    log::{Claim, NewRecord, Outcome, Owner, Placement, Purge, SessionOptions},
};
use std::{collections::BTreeSet, time::Duration};

/// What is appended is claimed once, in order, and gone when it is done.
pub async fn append_claim_settle_round_trip(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    assert!(desk.take().await.is_empty());
    desk.put(&["a:1", "2", "a:3", "b:4"]).await;
    desk.append(&[]).await;
    let records = desk.take().await;
    let all: BTreeSet<String> = names(&records).into_iter().collect();
    assert_eq!(all.len(), 4, "{all:?}");
    assert!(
        records
            .iter()
            .all(|r| r.attempts == 0 && r.message.sequence().is_some())
    );
    assert!(desk.take().await.is_empty(), "what is held is not given again");
    desk.done(&records).await;
    assert!(desk.take().await.is_empty());
    let again = desk.settle(records.iter().map(|r| (r, Outcome::Done)).collect()).await;
    assert_eq!(again.lost.len(), 4, "what is settled cannot be settled again");
}

/// A transaction's events appear with its commit, or never.
pub async fn rollback_leaves_nothing(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let log = fixture.log();
    let transactions = match log.transactions() {
        Ok(transactions) => transactions,
        // The part is optional; where it is missing, that is what has to be said.
        Err(error) => {
            assert_eq!(error.kind(), postrider_core::ErrorKind::Unsupported);
            return;
        }
    };
    let batch = |name: &str| [NewRecord::new(message("t", None, name))];
    let mut kept = transactions.begin().await.unwrap();
    transactions
        .append_in(kept.lend(), &Mailbox::outbox(), &batch("kept"))
        .await
        .unwrap();
    kept.commit().await.unwrap();
    let mut undone = transactions.begin().await.unwrap();
    transactions
        .append_in(undone.lend(), &Mailbox::outbox(), &batch("undone"))
        .await
        .unwrap();
    undone.rollback().await.unwrap();
    let mut dropped = transactions.begin().await.unwrap();
    transactions
        .append_in(dropped.lend(), &Mailbox::outbox(), &batch("dropped"))
        .await
        .unwrap();
    drop(dropped);
    assert_eq!(desk.drain().await, ["kept"]);
    let wrong = postrider_core::log::Lent::exclusive(&mut 7_u8)
        .get_mut::<String>()
        .unwrap_err();
    assert_eq!(wrong.kind(), postrider_core::ErrorKind::WrongTransaction);
    let error = transactions
        .append_in(
            postrider_core::log::Lent::exclusive(&mut 7_u8),
            &Mailbox::outbox(),
            &batch("x"),
        )
        .await
        .unwrap_err();
    assert_eq!(error.kind(), postrider_core::ErrorKind::WrongTransaction, "{error}");
}

/// Delayed records come when their time has come; parked ones too.
pub async fn due_times_are_kept(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let later = |name, secs| NewRecord::new(message("t", None, name)).after(Duration::from_secs(secs));
    desk.append(&[later("second", 2), later("first", 1)]).await;
    desk.put(&["now"]).await;
    let claimed = desk.claim(10).await;
    assert_eq!(names(&claimed.records), ["now"]);
    let next = claimed.next_due.unwrap();
    assert!(next <= Duration::from_secs(1) && !next.is_zero(), "{next:?}");
    desk.settle(vec![(&claimed.records[0], desk.parked(Duration::from_millis(1500)))])
        .await;
    assert!(desk.take().await.is_empty());
    fixture.advance(Duration::from_millis(1100)).await;
    assert_eq!(desk.drain().await, ["first"]);
    fixture.advance(Duration::from_millis(1000)).await;
    let mut rest = desk.drain().await;
    rest.sort();
    assert_eq!(rest, ["now", "second"]);
    assert_eq!(desk.claim(10).await.next_due, None);
}

/// Payload, headers, key and the rest come back byte for byte.
pub async fn bytes_come_back_as_they_were(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let hostile = [
        "",
        "'; DROP TABLE x; --",
        "ünï©ødé 🦀",
        "a\nb\r\tc",
        "\u{1}\u{7f}\u{2028}",
        "%s\\\"{}[],:",
        "\u{fffd}",
    ];
    let mut sent: Vec<Message> = Vec::new();
    for payload in [
        vec![],
        vec![0],
        (0..=255).collect::<Vec<u8>>(),
        vec![0xff, 0xfe, 0x80],
        vec![b'x'; 900_000],
    ] {
        sent.push(Message::new(Topic::new("bytes"), "b.v1", payload).with_source("s"));
    }
    for text in hostile {
        let mut message = Message::new(Topic::new("A-z_0.9"), format!("t{text}"), "p")
            .with_source(format!("s{text}"))
            .with_content_type(format!("c{text}"))
            .with_header("same", text)
            .with_header(format!("h{text}"), "")
            .with_header("same", "again");
        if !text.is_empty() {
            message = message.with_key(text);
        }
        sent.push(message);
    }
    sent.push(
        Message::new(Topic::new("k"), "k.v1", "")
            .with_source("s")
            .with_key("k".repeat(512)),
    );
    let time = fixture.clock().now();
    // Logs keep microseconds.
    let time = chrono_micros(time);
    let sent: Vec<Message> = sent.into_iter().map(|m| m.with_time(time)).collect();
    let records: Vec<NewRecord> = sent.iter().cloned().map(NewRecord::new).collect();
    desk.append(&records).await;
    let mut got = Vec::new();
    loop {
        let records = desk.take().await;
        if records.is_empty() {
            break;
        }
        desk.done(&records).await;
        got.extend(records.into_iter().map(|r| r.message));
    }
    got.sort_by_key(Message::id);
    let mut sent = sent;
    sent.sort_by_key(Message::id);
    assert_eq!(sent.len(), got.len());
    for (sent, got) in sent.iter().zip(&got) {
        let same = (
            sent.id(),
            sent.kind(),
            sent.source(),
            sent.topic(),
            sent.key(),
            sent.headers(),
        ) == (
            got.id(),
            got.kind(),
            got.source(),
            got.topic(),
            got.key(),
            got.headers(),
        );
        assert!(same, "{sent:?} came back as {got:?}");
        assert_eq!((sent.content_type(), sent.time()), (got.content_type(), got.time()));
        assert!(sent.payload() == got.payload(), "payload of {sent:?}");
    }
}

fn chrono_micros(time: postrider_core::clock::Timestamp) -> postrider_core::clock::Timestamp {
    postrider_core::clock::Timestamp::from_timestamp_micros(time.timestamp_micros()).unwrap_or(time)
}

/// A second parked or failed record of one id changes nothing.
pub async fn parked_and_failed_are_unique(fixture: &dyn LogFixture) {
    let mailbox = Mailbox::Inbox(GroupName::new("unique"));
    let options = SessionOptions::new(Owner::new()).with_lease(LONG);
    let desk = Desk::on(fixture, fixture.log(), options, mailbox).await;
    let record = |attempts| {
        let (after, errors) = (Duration::from_secs(60), Vec::new());
        NewRecord::new(message("t", Some("k"), "once").with_id(id())).placed(Placement::Parked {
            after,
            attempts,
            errors,
        })
    };
    let dead = NewRecord::new(message("t", None, "dead").with_id(dead_id())).placed(Placement::Failed {
        hold_key: false,
        attempts: 1,
        errors: vec![desk.error("no")],
    });
    desk.append(&[record(1), dead.clone()]).await;
    desk.append(&[record(2)]).await;
    desk.append(&[dead.clone(), record(3)]).await;
    let log = fixture.log();
    let stats = log.admin().expect(NEEDS_ADMIN).stats().await.unwrap()[&desk.mailbox];
    assert_eq!((stats.parked, stats.failed, stats.pending), (1, 1, 1));
    let stored = log
        .admin()
        .expect(NEEDS_ADMIN)
        .show(&desk.mailbox, id())
        .await
        .unwrap()
        .unwrap();
    assert_eq!(stored.attempts, 1);
}

fn id() -> postrider_core::MessageId {
    postrider_core::MessageId::foreign("kit", "once")
}
fn dead_id() -> postrider_core::MessageId {
    postrider_core::MessageId::foreign("kit", "dead")
}

/// Mailboxes share nothing: neither records, nor keys, nor the lease.
pub async fn mailboxes_are_apart(fixture: &dyn LogFixture) {
    let options = || SessionOptions::new(Owner::new()).with_lease(LONG);
    let one = Desk::open(fixture).await;
    let two = Desk::on(fixture, fixture.log(), options(), Mailbox::Inbox(GroupName::new("g"))).await;
    one.put(&["k:1", "k:2"]).await;
    two.put(&["k:3"]).await;
    let first = one.take().await;
    one.settle(vec![
        (&first[0], one.parked(Duration::from_secs(60))),
        (&first[1], Outcome::Released),
    ])
    .await;
    two.put(&["k:4"]).await;
    assert_eq!(two.drain().await, ["3", "4"]);
    assert!(one.take().await.is_empty());
}

/// However many retries are due, there is room for what is new.
pub async fn retries_do_not_starve_what_is_new(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let old: Vec<String> = (0..20).map(|n| format!("old{n}")).collect();
    desk.put(&old.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let records = desk.take().await;
    let outcome = desk.parked(Duration::from_secs(1));
    desk.settle(records.iter().map(|r| (r, outcome.clone())).collect())
        .await;
    desk.put(&["new"]).await;
    fixture.advance(Duration::from_millis(1100)).await;
    let claimed = desk.session.claim(&Claim::new(10).with_max_parked(3)).await.unwrap();
    let got = names(&claimed.records);
    assert_eq!(got.iter().filter(|n| n.starts_with("old")).count(), 3, "{got:?}");
    assert!(got.contains(&"new".to_owned()), "{got:?}");
    assert!(
        claimed
            .records
            .iter()
            .all(|r| r.attempts == u32::from(name(&r.message) != "new"))
    );
}

/// A claim gives no more once its bytes are reached, and nothing is forgotten for it.
pub async fn claims_are_bounded_by_bytes(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let large = |n: usize| {
        let message = Message::new(Topic::new("large"), "l.v1", vec![b'x'; 100_000]).with_source("kit");
        NewRecord::new(message.with_key(format!("k{}", n % 7)))
    };
    desk.append(&(0..40).map(large).collect::<Vec<_>>()).await;
    let (mut got, mut most) = (0, 0);
    for _ in 0..60 {
        let claimed = desk
            .session
            .claim(&Claim::new(1000).with_max_bytes(450_000))
            .await
            .unwrap();
        most = most.max(claimed.records.len());
        got += claimed.records.len();
        desk.done(&claimed.records).await;
    }
    assert_eq!((got, most), (40, 5));
    desk.append(&(0..3).map(large).collect::<Vec<_>>()).await;
    let claimed = desk.session.claim(&Claim::new(1000).with_max_bytes(1)).await.unwrap();
    assert_eq!(claimed.records.len(), 1, "one always goes");
    desk.done(&claimed.records).await;
    desk.drain().await;
    // What was passed over while its key was busy, and what is parked behind the first of its key, are bounded too.
    for is_parked in [false, true] {
        let of_a_key = |n: usize| large(n * 7);
        desk.append(&[of_a_key(0)]).await;
        let first = desk.take().await;
        desk.append(&(1..13).map(of_a_key).collect::<Vec<_>>()).await;
        assert!(desk.take().await.is_empty(), "the key is busy");
        if is_parked {
            desk.settle(vec![(&first[0], desk.parked(Duration::ZERO))]).await;
        } else {
            desk.done(&first).await;
        }
        let (mut got, mut most) = (0, 0);
        for _ in 0..60 {
            let claim = Claim::new(1000).with_max_bytes(450_000);
            let records = desk.session.claim(&claim).await.unwrap().records;
            most = most.max(records.len());
            got += records.len();
            desk.done(&records).await;
        }
        assert_eq!(got, 12 + usize::from(is_parked));
        assert!(most <= 5, "{most} at once, parked: {is_parked}");
    }
}

/// Durations without end, as an application writes "never", are waits like any other: nothing panics, nothing else waits.
pub async fn never_is_a_time_like_any_other(fixture: &dyn LogFixture) {
    let options = SessionOptions::new(Owner::new())
        .with_lease(Duration::MAX)
        .with_poll_interval(Duration::MAX);
    let desk = Desk::with(fixture, fixture.log(), options).await;
    let waits = |placement| NewRecord::new(message("t", Some("waits"), "waits")).placed(placement);
    desk.append(&[
        NewRecord::new(message("t", None, "later")).after(Duration::MAX),
        waits(Placement::Parked {
            after: Duration::MAX,
            attempts: 1,
            errors: Vec::new(),
        }),
    ])
    .await;
    desk.put(&["k:1", "j:2"]).await;
    let records = desk.take().await;
    assert_eq!(records.len(), 2);
    let outcomes = records.iter().map(|record| (record, desk.parked(Duration::MAX)));
    desk.settle(outcomes.collect()).await;
    let purge = Purge::new(desk.mailbox.clone(), 10)
        .succeeded_after(Duration::MAX)
        .failed_after(Duration::MAX)
        .receipts_after(Duration::MAX);
    assert_eq!(fixture.log().store().purge(&purge).await.unwrap(), 0);
    desk.put(&["x:3"]).await;
    assert_eq!(desk.drain().await, ["3"]);
    desk.session.close().await.unwrap();
    let next = Desk::open(fixture).await;
    next.put(&["4"]).await;
    assert_eq!(next.drain().await, ["4"]);
}
