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

/// And when one member asks for more while another has messages of the key in hand, at every step.
pub async fn order_per_key_while_another_member_looks(fixture: &dyn TransportFixture) {
    const OF_EACH: u32 = 60;
    if fixture.transport().capabilities().order == Order::None {
        return super::undeclared_is_refused(fixture).await;
    }
    let mut members = [Member::join(fixture, "g").await, Member::join(fixture, "g").await];
    both_get_something(fixture, &mut members).await;
    let mut seen = HashMap::<String, Vec<String>>::new();
    let mut held = [Vec::new(), Vec::new()];
    for n in 0..OF_EACH {
        for key in ["x", "y"] {
            publish_all(fixture, &numbered(key, n..n + 1)).await;
        }
        // One takes a message at a time and settles late, the other takes all it can get and settles at once; they swap,
        // and so does who looks first.
        let slow = n as usize / 10 % 2;
        let quick = 1 - slow;
        let mut looks = [(slow, 1), (quick, 10)];
        if n % 2 == 1 {
            looks.reverse();
        }
        for (at, max) in looks {
            let taken = members[at].at_once(max).await;
            note_of(&["x", "y"], &mut seen, &taken);
            held[at].extend(taken);
        }
        settle(&members[quick], &mut held[quick]).await;
        if n % 4 == 3 {
            settle(&members[slow], &mut held[slow]).await;
        }
    }
    let all = |seen: &HashMap<String, Vec<String>>| ["x", "y"].map(|key| seen.get(key).map_or(0, Vec::len));
    for _ in 0..1000 {
        for (member, held) in members.iter_mut().zip(&mut held) {
            let taken = member.some(7).await;
            note_of(&["x", "y"], &mut seen, &taken);
            held.extend(taken);
            settle(member, held).await;
        }
        if all(&seen) == [OF_EACH as usize; 2] {
            break;
        }
    }
    check(&seen, OF_EACH);
    assert_eq!(seen.len(), 2);
}

/// Waits until the members share what there is, so that nothing is handed over while they hold it.
async fn both_get_something(fixture: &dyn TransportFixture, members: &mut [Member; 2]) {
    for round in 0..60 {
        let sent: Vec<String> = (0..40).map(|n| format!("warm{n}:{round}")).collect();
        publish_all(fixture, &sent).await;
        let (mut got, mut all) = ([false; 2], 0);
        for _ in 0..40 {
            for (at, member) in members.iter_mut().enumerate() {
                let mut taken = member.some(10).await;
                got[at] |= !taken.is_empty();
                all += taken.len();
                settle(member, &mut taken).await;
            }
            if all >= sent.len() {
                break;
            }
        }
        if got == [true; 2] {
            return;
        }
    }
    panic!("the members do not share");
}

/// What was taken away meanwhile comes again.
async fn settle(member: &Member, held: &mut Vec<Delivery>) {
    let settlements = held.drain(..).map(Delivery::ack).collect();
    member.settling.settle(settlements).await;
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

/// Of some keys only.
fn note_of(keys: &[&str], seen: &mut HashMap<String, Vec<String>>, taken: &[Delivery]) {
    for delivery in taken
        .iter()
        .filter(|d| d.message().key().is_some_and(|key| keys.contains(&key)))
    {
        note(seen, std::slice::from_ref(delivery));
    }
}

fn check(seen: &HashMap<String, Vec<String>>, of_each: u32) {
    for (key, got) in seen {
        let expected: Vec<String> = (0..of_each).map(|n| format!("{key}{n}")).collect();
        assert_eq!(got, &expected);
    }
}
