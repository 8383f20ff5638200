//! A message's way, and the outcomes it can have.

use super::{
    Member, TransportFixture,
    fixture::{name, names, publish},
};
use postrider_core::{
    Delivery, ErrorKind, Message, Order, Outcomes, Publisher as _, PublisherExt as _, Subscription, clock::Timestamp,
};
use std::{
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

const SHORT: Duration = Duration::from_secs(1);

/// Id, type, source, key, headers, content type, time and payload arrive as they were sent.
pub async fn content_is_intact(fixture: &dyn TransportFixture) {
    let mut member = Member::join(fixture, "g").await;
    let time = Timestamp::from_timestamp_micros(1_767_225_600_123_456).unwrap();
    let mut sent = Vec::new();
    for (n, payload) in [
        vec![],
        (0..=255).collect::<Vec<u8>>(),
        vec![0xff, 0x00],
        vec![7; 200_000],
    ]
    .into_iter()
    .enumerate()
    {
        let message = Message::new(fixture.topic("t"), "order.placed.v2", payload)
            .with_source("urn:shop/1")
            .with_key(format!("ключ {n} 'x\""))
            .with_header("tenant", "ünï 🦀")
            .with_header("empty", "")
            .with_content_type("application/json")
            .with_time(time);
        sent.push(message);
    }
    sent.push(Message::new(fixture.topic("t"), "bare.v1", "x").with_source("s"));
    for outcome in fixture.transport().publisher().unwrap().publish_all(&sent).await {
        outcome.unwrap();
    }
    let mut taken = member.take(sent.len()).await;
    taken.sort_by_key(|delivery| delivery.message().id());
    sent.sort_by_key(Message::id);
    assert_eq!(taken.len(), sent.len());
    for (sent, taken) in sent.iter().zip(&taken) {
        let got = taken.message();
        assert_eq!(
            (sent.id(), sent.kind(), sent.source()),
            (got.id(), got.kind(), got.source())
        );
        assert_eq!(
            (sent.topic(), sent.key(), sent.content_type()),
            (got.topic(), got.key(), got.content_type())
        );
        for (name, value) in sent.headers() {
            assert_eq!(got.header(name), Some(value.as_str()), "{name}");
        }
        assert!(sent.time().is_none_or(|time| got.time() == Some(time)));
        assert!(sent.payload() == got.payload(), "payload of {sent:?}");
        assert_eq!(taken.delivery_count(), 1);
    }
    member.settle(taken.into_iter().map(Delivery::ack).collect()).await;
}

/// A retried message comes back after its delay, counted once more where that is declared.
pub async fn what_is_retried_comes_back(fixture: &dyn TransportFixture) {
    if !fixture.transport().capabilities().delayed_retry {
        return undeclared_is_refused(fixture).await;
    }
    let mut member = Member::join(fixture, "g").await;
    publish(fixture, &["again", "once"]).await;
    let taken = member.take(2).await;
    let settlements = taken
        .into_iter()
        .map(|delivery| match name(delivery.message()).as_str() {
            "again" => delivery.retry(SHORT, 3),
            _ => delivery.ack(),
        });
    member.settle(settlements.collect()).await;
    assert!(member.take(1).await.is_empty(), "not before its time");
    fixture.advance(SHORT + SHORT / 2).await;
    let back = member.take(2).await;
    assert_eq!(names(&back), ["again"]);
    if fixture.transport().capabilities().delivery_count {
        assert_eq!(back[0].delivery_count(), 2);
    }
    assert_eq!(back[0].attempts(), 3, "attempts are carried through the wait");
    member.settle(back.into_iter().map(Delivery::ack).collect()).await;
    fixture.advance(SHORT * 2).await;
    assert!(member.take(1).await.is_empty());
}

/// What is released comes back at once, before what follows it in its key.
pub async fn what_is_released_comes_back_in_order(fixture: &dyn TransportFixture) {
    let mut member = Member::join(fixture, "g").await;
    publish(fixture, &["k:1", "k:2", "k:3"]).await;
    let taken = member.take(3).await;
    member.settle(taken.into_iter().map(Delivery::release).collect()).await;
    let back = member.take(3).await;
    let mut got = names(&back);
    if fixture.transport().capabilities().order == Order::None {
        got.sort();
    }
    assert_eq!(got, ["1", "2", "3"]);
    if fixture.transport().capabilities().delivery_count {
        assert!(back.iter().all(|delivery| delivery.delivery_count() == 2));
    }
    member.settle(back.into_iter().map(Delivery::ack).collect()).await;
}

/// A delivery that is dropped, and one whose member dies, comes back.
pub async fn unsettled_comes_back(fixture: &dyn TransportFixture) {
    let mut member = Member::join(fixture, "g").await;
    publish(fixture, &["1", "2"]).await;
    let mut taken = member.take(2).await;
    taken.sort_by_key(|delivery| name(delivery.message()));
    let second = taken.pop().unwrap();
    drop(taken);
    member.settle(vec![second.ack()]).await;
    let back = member.take(2).await;
    assert_eq!(names(&back), ["1"], "what was dropped is released with the next settle");
    // The member dies with it in hand.
    std::mem::forget(back);
    drop(member);
    let mut next = Member::join(fixture, "g").await;
    let got = next.drain().await;
    if fixture.transport().capabilities().individual_acks {
        assert_eq!(got, ["1"]);
    } else {
        // What counts is up to where everything is acknowledged: that is before it.
        assert!(got == ["1"] || got == ["1", "2"] || got == ["2", "1"], "{got:?}");
    }
}

/// A dead letter is out of the group's way.
pub async fn dead_letters_do_not_come_back(fixture: &dyn TransportFixture) {
    if !fixture.transport().capabilities().dead_letter {
        return undeclared_is_refused(fixture).await;
    }
    let mut member = Member::join(fixture, "g").await;
    publish(fixture, &["k:dead", "k:next"]).await;
    let taken = member.take(2).await;
    let settlements = taken
        .into_iter()
        .map(|delivery| match name(delivery.message()).as_str() {
            "dead" => delivery.dead_letter(),
            _ => delivery.ack(),
        });
    member.settle(settlements.collect()).await;
    assert!(member.take(1).await.is_empty());
    drop(member);
    assert!(Member::join(fixture, "g").await.take(1).await.is_empty());
}

/// What is not declared is refused, before or when it is asked for.
pub async fn undeclared_is_refused(fixture: &dyn TransportFixture) {
    let transport = fixture.transport();
    let can = *transport.capabilities();
    if can.order == Order::None {
        let ordered = Subscription::new(fixture.group("o"), vec![fixture.topic("t")]);
        assert_eq!(
            transport.subscriber(&ordered).unwrap_err().kind(),
            ErrorKind::Unsupported
        );
    }
    let mut member = Member::join(fixture, "g").await;
    for (declared, settle) in [
        (
            can.delayed_retry,
            Box::new(|d: Delivery| d.retry(SHORT, 1)) as Box<dyn Fn(Delivery) -> _ + Send>,
        ),
        (can.dead_letter, Box::new(Delivery::dead_letter)),
    ] {
        if declared {
            continue;
        }
        publish(fixture, &["x"]).await;
        let delivery = member.take(1).await.remove(0);
        let errors = member.settling.settle(vec![settle(delivery)]).await;
        assert_eq!(
            errors.iter().map(postrider_core::Error::kind).collect::<Vec<_>>(),
            [ErrorKind::Unsupported]
        );
        drop(member);
        member = Member::join(fixture, "g").await;
        assert_eq!(member.drain().await, ["x"], "what was refused is not lost");
    }
}

/// A call reports one outcome for each message, none twice, and none once it has ended.
pub async fn each_message_has_one_outcome(fixture: &dyn TransportFixture) {
    let mut member = Member::join(fixture, "g").await;
    let transport = fixture.transport();
    let publisher = transport.publisher().unwrap();
    let reported: Arc<Mutex<Vec<usize>>> = Arc::default();
    let has_ended = Arc::new(AtomicBool::new(false));
    let batch: Vec<Message> = (0..300)
        .map(|n| Message::new(fixture.topic("t"), "test.v1", format!("{n}")).with_source("kit"))
        .collect();
    let (list, ended) = (reported.clone(), has_ended.clone());
    let outcomes = Outcomes::listened_to(batch.len(), move |at, outcome| {
        outcome.expect("published");
        assert!(!ended.load(Ordering::Acquire), "an outcome after the call has ended");
        list.lock().unwrap().push(at);
    });
    publisher.publish(&batch, &outcomes).await;
    has_ended.store(true, Ordering::Release);
    assert!(outcomes.is_complete());
    let mut positions = reported.lock().unwrap().clone();
    positions.sort_unstable();
    assert_eq!(positions, (0..300).collect::<Vec<_>>());
    assert_eq!(member.take(300).await.len(), 300);
}

/// An empty batch has no outcomes, and a reachable broker says so.
pub async fn publishing_nothing_is_fine(fixture: &dyn TransportFixture) {
    let transport = fixture.transport();
    let publisher = transport.publisher().unwrap();
    assert!(publisher.publish_all(&[]).await.is_empty());
    let answer = publisher.check().await;
    assert!(!matches!(answer, postrider_core::Reachability::Down(_)), "{answer:?}");
}
