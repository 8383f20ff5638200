//! A broker that goes away and comes back: each of these has a broker of its own.
#![allow(clippy::print_stdout, clippy::disallowed_methods)]

use super::{Server, join, take, text};
use postrider_core::PublisherExt as _;
use postrider_core::{
    Delivery, ErrorKind, GroupName, Message, PublishErrorKind, Publisher, Reachability, Subscription, Topic, Transport,
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::task::block_in_place;

/// The longest anything may take to be as it was.
const RECOVERY: Duration = Duration::from_secs(60);
const CLOSE: Duration = Duration::from_secs(10);

fn subscription(group: &'static str) -> Subscription {
    Subscription::new(GroupName::new(group), vec![topic()]).with_max_in_flight(500)
}

fn topic() -> Topic {
    Topic::new("outages")
}

fn message(key: &str, text: String) -> Message {
    Message::new(topic(), "test.v1", text)
        .with_source("kit")
        .with_key(key.to_owned())
}

/// Killed while messages are published and consumed: what was confirmed arrives, in the order of its key, and publisher and
/// feed come back by themselves.
pub async fn what_was_confirmed_outlives_the_broker<S: Server>(server: S, transport: Transport) {
    confirmed_is_kept(server, transport, |server| {
        server.kill();
        std::thread::sleep(Duration::from_secs(1));
        server.restart();
    })
    .await;
}

/// The same with connections that are cut, again and again, while the broker runs on.
pub async fn what_was_confirmed_outlives_its_connection<S: Server>(server: S, transport: Transport) {
    confirmed_is_kept(server, transport, |server| {
        for pause in [300, 20, 900, 20] {
            server.cut();
            std::thread::sleep(Duration::from_millis(pause));
        }
    })
    .await;
}

async fn confirmed_is_kept<S: Server>(mut server: S, transport: Transport, accident: impl Fn(&mut S)) {
    let (mut intake, settling) = join(&transport, &subscription("kept")).await;
    tokio::time::sleep(server.forgets_within()).await;
    let stop = Arc::new(AtomicBool::new(false));
    let publishing = tokio::spawn(publish_until(
        transport.publisher().expect("a publisher").clone(),
        stop.clone(),
    ));
    let (mut seen, mut first, mut repeats) = (BTreeSet::new(), BTreeMap::<String, u32>::new(), 0);
    let mut phase = Phase::Before;
    let (mut away, mut back) = (Instant::now(), None);
    loop {
        let taken = take(&mut intake, 200, Duration::from_millis(300)).await;
        for delivery in &taken {
            let key = delivery.message().key().unwrap_or_default().to_owned();
            let n: u32 = text(delivery).parse().expect("a number");
            if !seen.insert((key.clone(), n)) {
                repeats += 1;
            } else {
                let last = first.insert(key, n);
                assert!(last.is_none_or(|last| last < n), "{n} came after {last:?}");
                if phase == Phase::Back {
                    back.get_or_insert_with(|| away.elapsed());
                }
            }
        }
        // Those of the life before are refused, and come again.
        let is_none = taken.is_empty();
        settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        match phase {
            Phase::Before if seen.len() > 500 => {
                away = Instant::now();
                block_in_place(|| accident(&mut server));
                phase = Phase::Back;
            }
            Phase::Back if back.is_some() && away.elapsed() > Duration::from_secs(5) => {
                stop.store(true, Ordering::Release);
                phase = Phase::Ending;
            }
            Phase::Ending if publishing.is_finished() && is_none => break,
            Phase::Before | Phase::Back | Phase::Ending => {
                assert!(away.elapsed() < RECOVERY * 2, "{phase:?}: only {} came", seen.len());
            }
        }
    }
    let (confirmed, outage) = publishing.await.expect("the publisher");
    let all = confirmed.values().map(|count| *count as usize).sum::<usize>();
    // What is still on its way has some time.
    let until = Instant::now() + RECOVERY;
    let is_lost = |seen: &BTreeSet<(String, u32)>| {
        let mut all = confirmed
            .iter()
            .flat_map(|(key, count)| (0..*count).map(move |n| (key.clone(), n)));
        all.any(|of| !seen.contains(&of))
    };
    while is_lost(&seen) && Instant::now() < until {
        let taken = take(&mut intake, 200, Duration::from_secs(1)).await;
        seen.extend(taken.iter().map(|delivery| {
            let n = text(delivery).parse().expect("a number");
            (delivery.message().key().unwrap_or_default().to_owned(), n)
        }));
        settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
    }
    println!(
        "{all} confirmed, {repeats} repeats; confirms were back {outage:?} after the first error, deliveries {back:?} after the accident"
    );
    assert!(!is_lost(&seen), "something that was confirmed is lost");
    settling.close(CLOSE).await.expect("a close");
}

#[derive(Debug, PartialEq, Clone, Copy)]
enum Phase {
    Before,
    Back,
    Ending,
}

/// Numbers for each of some keys, each once the one before it is confirmed. Gives how many were, and how long none was.
async fn publish_until(publisher: Arc<dyn Publisher>, stop: Arc<AtomicBool>) -> (BTreeMap<String, u32>, Duration) {
    let mut confirmed: BTreeMap<String, u32> = (0..50).map(|key| (format!("k{key}"), 0)).collect();
    let (mut away, mut outage) = (None, Duration::ZERO);
    while !stop.load(Ordering::Acquire) {
        let batch: Vec<Message> = confirmed.iter().map(|(key, n)| message(key, n.to_string())).collect();
        let outcomes = publisher.publish_all(&batch).await;
        for (n, outcome) in confirmed.values_mut().zip(outcomes) {
            match outcome {
                Ok(()) => {
                    *n += 1;
                    outage += away.take().map_or(Duration::ZERO, |away: Instant| away.elapsed());
                }
                Err(error) => {
                    assert!(matches!(error.kind(), PublishErrorKind::Unavailable(_)), "{error:?}");
                    away.get_or_insert_with(Instant::now);
                }
            }
        }
        tokio::time::sleep(Duration::from_millis(if away.is_some() { 50 } else { 10 })).await;
    }
    (confirmed, outage)
}

/// While the broker is away, everybody is told so within the time-outs; when it is back, what was not settled comes again to
/// the same feed, and what a member had in hand is settled, or refused and comes again.
pub async fn a_feed_outlives_the_broker<S: Server>(mut server: S, transport: Transport) {
    let publisher = transport.publisher().expect("a publisher").clone();
    for (wanted, group) in [
        (subscription("ordered"), "ordered"),
        (subscription("unordered").unordered(), "unordered"),
        (subscription("broadcast").broadcast(), "broadcast"),
    ] {
        if wanted.broadcast && !transport.capabilities().broadcast {
            continue;
        }
        let (mut intake, settling) = join(&transport, &wanted).await;
        let (closing, closing_settling) = join(&transport, &subscription("closing")).await;
        tokio::time::sleep(server.forgets_within()).await;
        let batch: Vec<Message> = (0..20).map(|n| message("k", format!("{group} {n}"))).collect();
        for outcome in publisher.publish_all(&batch).await {
            outcome.expect("published");
        }
        let of_group = |delivery: &Delivery| text(delivery).starts_with(&format!("{group} "));
        let (mut held, until) = (Vec::new(), Instant::now() + RECOVERY);
        while held.len() < 20 && Instant::now() < until {
            // A new group may get what was there before, too.
            let taken = take(&mut intake, 1, Duration::from_secs(1)).await;
            held.extend(taken.into_iter().filter(of_group));
        }
        assert_eq!(held.len(), 20);
        block_in_place(|| server.kill());
        let began = Instant::now();
        let outcome = publisher
            .publish_all(&[message("k", "lost".to_owned())])
            .await
            .remove(0);
        let kind = outcome.as_ref().err().map(postrider_core::PublishError::kind);
        assert!(matches!(kind, Some(PublishErrorKind::Unavailable(_))), "{outcome:?}");
        assert!(matches!(publisher.check().await, Reachability::Down(_)));
        let refused = transport
            .subscriber(&wanted)
            .expect("a subscriber")
            .subscribe(&wanted)
            .await;
        assert_eq!(refused.expect_err("no broker").kind(), ErrorKind::Unavailable);
        let told = began.elapsed();
        let _ = closing_settling.close(Duration::from_secs(2)).await;
        drop(closing);
        assert!(began.elapsed() < RECOVERY, "{:?}", began.elapsed());
        block_in_place(|| server.restart());
        let began = Instant::now();
        while publisher.publish_all(&[message("k", format!("{group} after"))]).await[0].is_err() {
            assert!(began.elapsed() < RECOVERY, "the publisher does not come back");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let published = began.elapsed();
        let mut got: Vec<String> = Vec::new();
        // Half of what is in hand is settled before anything comes.
        let rest = held.split_off(10);
        let refused = settling
            .settle(held.into_iter().map(Delivery::ack).collect())
            .await
            .len();
        drop(rest);
        let mut received = None;
        while !got.iter().any(|text| text.ends_with("after")) || got.len() < 11 + refused.min(10) {
            assert!(began.elapsed() < RECOVERY, "{refused} refused, and only {got:?} came");
            settling.settle(Vec::new()).await;
            let taken = take(&mut intake, 1, Duration::from_secs(1)).await;
            received = received.or_else(|| (!taken.is_empty()).then(|| began.elapsed()));
            for delivery in taken.iter().filter(|delivery| of_group(delivery)) {
                if !got.contains(&text(delivery)) {
                    got.push(text(delivery));
                }
            }
            settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        }
        let first = if refused == 0 { 10 } else { 0 };
        let expected: BTreeSet<String> = (first..20).map(|n| format!("{group} {n}")).collect();
        let missing: Vec<&String> = expected.iter().filter(|text| !got.contains(text)).collect();
        assert!(missing.is_empty(), "{missing:?} never came: {refused} refused, {got:?}");
        println!(
            "{group}: told within {told:?}; after the restart confirms were back after {published:?}, deliveries after {received:?}; {refused} settlements refused"
        );
        settling.close(CLOSE).await.expect("a close");
    }
}

/// A broker that stands still is one that is away, and goes on when it does.
pub async fn a_broker_that_stands_still_is_told<S: Server>(mut server: S, transport: Transport) {
    let publisher = transport.publisher().expect("a publisher").clone();
    let (mut intake, settling) = join(&transport, &subscription("still")).await;
    publisher
        .publish_all(&[message("k", "before".to_owned())])
        .await
        .remove(0)
        .expect("published");
    block_in_place(|| server.pause());
    let began = Instant::now();
    let outcome = publisher
        .publish_all(&[message("k", "during".to_owned())])
        .await
        .remove(0);
    let kind = outcome.as_ref().err().map(postrider_core::PublishError::kind);
    assert!(matches!(kind, Some(PublishErrorKind::Unavailable(_))), "{outcome:?}");
    let told = began.elapsed();
    assert!(told < RECOVERY, "{told:?}");
    block_in_place(|| server.resume());
    let began = Instant::now();
    while publisher.publish_all(&[message("k", "after".to_owned())]).await[0].is_err() {
        assert!(began.elapsed() < RECOVERY, "the publisher does not come back");
        tokio::time::sleep(Duration::from_millis(50)).await;
    }
    println!(
        "told after {told:?}, confirms were back {:?} after it went on",
        began.elapsed()
    );
    let mut got = BTreeSet::new();
    while !got.contains("before") || !got.contains("after") {
        assert!(began.elapsed() < RECOVERY, "only {got:?} came");
        let taken = take(&mut intake, 1, Duration::from_secs(1)).await;
        got.extend(taken.iter().map(text));
        settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
    }
    settling.close(CLOSE).await.expect("a close");
}
