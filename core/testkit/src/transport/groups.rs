//! Groups and their members.

use super::{
    Member, TransportFixture,
    fixture::{names, publish},
};
use postrider_core::PublisherExt as _;
use postrider_core::{Delivery, ErrorKind, Order, Subscription, relay::TopicPattern};
use std::collections::BTreeSet;

/// Each group gets each message once, whichever of its topics it was sent to.
pub async fn every_message_once_to_each_group(fixture: &dyn TransportFixture) {
    let mut one = Member::join(fixture, "one").await;
    let both = vec![fixture.topic("t"), fixture.topic("u")];
    let mut two = Member::on(fixture, Subscription::new(fixture.group("two"), both)).await;
    let sent: Vec<String> = (0..50).map(|n| n.to_string()).collect();
    publish(fixture, &sent.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let other = postrider_core::Message::new(fixture.topic("u"), "test.v1", "u").with_source("kit");
    fixture
        .transport()
        .publisher()
        .unwrap()
        .publish_all(&[other])
        .await
        .remove(0)
        .unwrap();
    let sort = |mut names: Vec<String>| {
        names.sort();
        names
    };
    let expected = sort(sent.clone());
    assert_eq!(sort(one.drain().await), expected);
    let mut with_other = sent;
    with_other.push("u".to_owned());
    assert_eq!(sort(two.drain().await), sort(with_other));
}

/// The members of a group share its messages.
pub async fn competing_consumers_share(fixture: &dyn TransportFixture) {
    let (mut a, mut b) = (Member::join(fixture, "g").await, Member::join(fixture, "g").await);
    let sent: Vec<String> = (0..200).map(|n| format!("k{n}:{n}")).collect();
    publish(fixture, &sent.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (mut from_a, mut from_b) = (Vec::new(), Vec::new());
    for _ in 0..400 {
        for (member, got) in [(&mut a, &mut from_a), (&mut b, &mut from_b)] {
            let taken = member.some(5).await;
            got.extend(names(&taken));
            member.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        }
        if from_a.len() + from_b.len() >= 200 {
            break;
        }
    }
    let all: BTreeSet<&String> = from_a.iter().chain(&from_b).collect();
    assert_eq!((all.len(), from_a.len() + from_b.len()), (200, 200), "each once");
    assert!(
        !from_a.is_empty() && !from_b.is_empty(),
        "{} and {}",
        from_a.len(),
        from_b.len()
    );
}

/// What comes while a group has no member waits for it.
pub async fn a_late_subscriber_gets_what_waited(fixture: &dyn TransportFixture) {
    let member = Member::join(fixture, "late").await;
    member.settling.close(std::time::Duration::from_secs(5)).await.unwrap();
    drop(member);
    publish(fixture, &["1", "2", "3"]).await;
    let mut late = Member::join(fixture, "late").await;
    let mut got = late.drain().await;
    got.sort();
    assert_eq!(got, ["1", "2", "3"]);
}

/// A group that was declared before it has ever had a member gets what was published meanwhile, in order and once, however often
/// it is declared, and a member that is there is not disturbed.
pub async fn what_is_published_to_a_declared_group_waits_for_it(fixture: &dyn TransportFixture) {
    let transport = fixture.transport();
    let subscription = || {
        let subscription = Subscription::new(fixture.group("declared"), vec![fixture.topic("t")]);
        match transport.capabilities().order {
            Order::None => subscription.unordered(),
            _ => subscription,
        }
    };
    let declare = async || {
        let asked = subscription();
        let subscriber = transport.subscriber(&asked).expect("a subscriber");
        subscriber.declare(&asked).await.expect("it is declared");
    };
    declare().await;
    declare().await;
    let sent: Vec<String> = (0..20).map(|n| format!("k:{n:02}")).collect();
    let names = |sent: &[String]| sent.iter().map(|name| name[2..].to_owned()).collect::<Vec<_>>();
    publish(fixture, &sent.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut member = Member::on(fixture, subscription()).await;
    let mut got = member.drain().await;
    if transport.capabilities().order == Order::None {
        got.sort();
    }
    assert_eq!(got, names(&sent));
    declare().await;
    publish(fixture, &["k:more"]).await;
    assert_eq!(member.drain().await, ["more"]);
    let broadcast = subscription().broadcast();
    if transport.capabilities().broadcast {
        let refused = transport.subscriber(&broadcast).unwrap().declare(&broadcast).await;
        assert_eq!(refused.unwrap_err().kind(), ErrorKind::Unsupported);
    }
}

/// Of a broadcast each member gets everything from when it joined, and nothing waits for one that has gone.
pub async fn a_broadcast_reaches_every_member(fixture: &dyn TransportFixture) {
    let broadcast = || Subscription::new(fixture.group("g"), vec![fixture.topic("t")]).broadcast();
    let transport = fixture.transport();
    if !transport.capabilities().broadcast {
        let refused = transport.subscriber(&broadcast().unordered()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        return;
    }
    let mut sharing = Member::join(fixture, "g").await;
    publish(fixture, &["k:before"]).await;
    let mut members = vec![
        Member::on(fixture, broadcast()).await,
        Member::on(fixture, broadcast()).await,
    ];
    let sent: Vec<String> = (0..20).map(|n| format!("k:{n:02}")).collect();
    publish(fixture, &sent.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let expected: Vec<String> = (0..20).map(|n| format!("{n:02}")).collect();
    for member in &mut members {
        assert_eq!(member.drain().await, expected);
    }
    // What one gives back comes again, to it alone.
    publish(fixture, &["k:again"]).await;
    let again = members[0].take(1).await;
    members[0]
        .settle(again.into_iter().map(Delivery::release).collect())
        .await;
    assert_eq!(members[0].drain().await, ["again"]);
    assert_eq!(members[1].drain().await, ["again"]);
    // The group of the same name whose members share is another.
    assert_eq!(sharing.drain().await.len(), 22);
    let gone = members.remove(0);
    gone.settling.close(std::time::Duration::from_secs(5)).await.unwrap();
    drop(gone);
    publish(fixture, &["k:after"]).await;
    assert_eq!(members[0].drain().await, ["after"]);
    let mut late = Member::on(fixture, broadcast()).await;
    assert!(late.take(1).await.is_empty());
}

/// A pattern takes every topic that matches, those that come to be included, in order, and no other.
pub async fn a_pattern_takes_every_topic_that_matches(fixture: &dyn TransportFixture) {
    let transport = fixture.transport();
    let pattern = TopicPattern::parse(format!("{}.*", fixture.topic("likes"))).unwrap();
    let subscription = |group: &str| Subscription::new(fixture.group(group), Vec::new()).with_pattern(pattern.clone());
    if !transport.capabilities().wildcards {
        let refused = transport.subscriber(&subscription("g").unordered()).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::Unsupported);
        assert!(refused.to_string().contains("pattern"), "{refused}");
        return;
    }
    // One that is there before, which only those who keep what nobody wanted yet still have.
    let mut ordered = Member::on(fixture, subscription("ordered")).await;
    let mut unordered = Member::on(fixture, subscription("unordered").unordered()).await;
    // Somebody has to want those that do not match, or a publisher may be told that they lead nowhere.
    let near = ["likes", "likes2.a", "dislikes"]
        .map(|name| fixture.topic(name))
        .to_vec();
    let others = Subscription::new(fixture.group("others"), near).unordered();
    let mut others = Member::on(fixture, others).await;
    let send = async |topic: &str, name: String| {
        let message = postrider_core::Message::new(fixture.topic(topic), "test.v1", name).with_source("kit");
        let outcome = transport
            .publisher()
            .unwrap()
            .publish_all(&[message.with_key("k")])
            .await
            .remove(0);
        outcome.unwrap();
    };
    for n in 0..10 {
        for topic in ["likes.a", "likes.b.c"] {
            send(topic, format!("{topic} {n}")).await;
        }
    }
    for topic in ["likes", "likes2.a", "dislikes"] {
        send(topic, format!("{topic} no")).await;
    }
    let got = ordered.drain().await;
    for topic in ["likes.a ", "likes.b.c "] {
        let of_it: Vec<&String> = got.iter().filter(|name| name.starts_with(topic)).collect();
        let expected: Vec<String> = (0..10).map(|n| format!("{topic}{n}")).collect();
        assert_eq!(of_it, expected.iter().collect::<Vec<_>>());
    }
    assert_eq!(got.len(), 20, "{got:?}");
    assert_eq!(unordered.drain().await.len(), 20);
    assert_eq!(others.drain().await.len(), 3);
}
