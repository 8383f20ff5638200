//! The order of keys.

use super::{
    Member, TransportFixture,
    fixture::{name, names, numbered, publish_all},
};
use postrider_core::{Delivery, Order};
use std::collections::HashMap;

/// First appearances of a key are in the order of publishing, with two members that take turns.
pub async fn order_per_key(fixture: &dyn TransportFixture) {
    if fixture.transport().capabilities().order == Order::None {
        return super::undeclared_is_refused(fixture).await;
    }
    let (mut a, mut b) = (Member::join(fixture, "g").await, Member::join(fixture, "g").await);
    for round in 0..5 {
        for key in ["x", "y", "z"] {
            publish_all(fixture, &numbered(key, round * 10..(round + 1) * 10)).await;
        }
    }
    let mut seen = HashMap::<String, Vec<String>>::new();
    let mut count = 0;
    for _ in 0..500 {
        for member in [&mut a, &mut b] {
            let taken = member.some(7).await;
            count += taken.len();
            note(&mut seen, &taken);
            member.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        }
        if count >= 150 {
            break;
        }
    }
    check(&seen, 50);
}

/// And with a member that dies with messages in hand: repeats may follow, nothing is overtaken.
pub async fn order_per_key_through_a_member_that_dies(fixture: &dyn TransportFixture) {
    if fixture.transport().capabilities().order == Order::None {
        return super::undeclared_is_refused(fixture).await;
    }
    let mut seen = HashMap::<String, Vec<String>>::new();
    let mut survivor = Member::join(fixture, "g").await;
    for key in ["x", "y"] {
        publish_all(fixture, &numbered(key, 0..30)).await;
    }
    for _ in 0..3 {
        let mut dying = Member::join(fixture, "g").await;
        let mut taken = dying.take(10).await;
        note(&mut seen, &taken);
        let rest = taken.split_off(taken.len() / 2);
        dying.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        std::mem::forget(rest);
        drop(dying);
        let taken = survivor.take(4).await;
        note(&mut seen, &taken);
        survivor.settle(taken.into_iter().map(Delivery::ack).collect()).await;
    }
    loop {
        let taken = survivor.take(20).await;
        if taken.is_empty() {
            break;
        }
        note(&mut seen, &taken);
        survivor.settle(taken.into_iter().map(Delivery::ack).collect()).await;
    }
    check(&seen, 30);
}

/// Notes first appearances.
fn note(seen: &mut HashMap<String, Vec<String>>, taken: &[Delivery]) {
    debug_assert_eq!(names(taken).len(), taken.len());
    for delivery in taken {
        let of_key = seen
            .entry(delivery.message().key().unwrap_or("").to_owned())
            .or_default();
        let name = name(delivery.message());
        if !of_key.contains(&name) {
            of_key.push(name);
        }
    }
}

fn check(seen: &HashMap<String, Vec<String>>, of_each: u32) {
    for (key, got) in seen {
        let expected: Vec<String> = (0..of_each).map(|n| format!("{key}{n}")).collect();
        assert_eq!(got, &expected);
    }
}
