//! `HoldKey`: a key of which a message has died waits for a person, on the consumer's side, too.

use crate::{
    Diary, OrderPlaced, dead, placed,
    world::{World, options, secs},
};
use postrider_core::{
    Event as _, GroupName, HandlerError, Mailbox, Message, Retry, Transactional,
    log::Pace,
    relay::{Backoff, OnFailed, TopicOptions, TopicPattern},
};

/// Where the first message dies: at once, after attempts in the inbox, in a transaction, or since it does not decode.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Dies {
    AtOnce,
    InTheInbox,
    Transactional,
    Undecoded,
}

async fn dies(how: Dies, holds: bool, redrives: bool) {
    let topic = TopicPattern::from(OrderPlaced::TOPIC);
    let on_failed = if holds { OnFailed::HoldKey } else { OnFailed::ReleaseKey };
    let world = World::start(options().topic(topic, TopicOptions::default().with_on_failed(on_failed))).await;
    let diary = Diary::default();
    let mut retry = Retry::none();
    if how == Dies::InTheInbox {
        retry = Retry::default()
            .with_in_place(1)
            .with_max_attempts(2)
            .with_backoff(Backoff::Fixed(secs(1)));
    }
    let mut subscribing = world.bus.subscribe::<OrderPlaced>("g").retry(retry);
    if how == Dies::Transactional {
        subscribing = subscribing.middleware(Transactional::new());
    }
    let running = subscribing
        .state(diary.clone())
        .handler(async |diary: &Diary, order, _| {
            diary.note(format!("{} {}", order.customer, order.id));
            let is_first_time = diary.count("ada 1") < 3;
            if order.id == 1 && order.customer == "ada" && is_first_time {
                return Err(HandlerError::from("no"));
            }
            Ok(())
        })
        .start()
        .await
        .unwrap();
    if how == Dies::Undecoded {
        let message = Message::new(OrderPlaced::TOPIC, OrderPlaced::kind(), "{").with_key("ada");
        world.bus.publish(message).await.unwrap();
    } else {
        world.bus.publish(&placed(1, "ada")).await.unwrap();
    }
    // Some are in hand with it, some come later.
    for id in 2..5 {
        world.bus.publish(&placed(id, "ada")).await.unwrap();
    }
    world.bus.publish(&placed(1, "bob")).await.unwrap();
    world.pass(secs(10)).await;
    world.until(|_| running.report().dead_lettered == 1).await;
    world.bus.publish(&placed(5, "ada")).await.unwrap();
    world.pass(secs(10)).await;
    let of_ada = |diary: &Diary| -> Vec<String> {
        let lines = diary.lines().into_iter();
        lines
            .filter(|line| line.starts_with("ada") && line != "ada 1")
            .collect()
    };
    assert_eq!(diary.count("bob 1"), 1, "{how:?}: another key passes");
    let rest = ["ada 2", "ada 3", "ada 4", "ada 5"];
    if !holds {
        assert_eq!(of_ada(&diary), rest, "{how:?}");
        return;
    }
    assert!(of_ada(&diary).is_empty(), "{how:?}: {:?}", diary.lines());
    assert_eq!(dead(&world, "g").await.len(), 1);
    let letters = world.bus.dead_letters(Mailbox::Inbox(GroupName::new("g"))).unwrap();
    if redrives && how != Dies::Undecoded {
        // It fails until its third attempt.
        for _ in 0..3 {
            letters.redrive(Pace::AtOnce).await.unwrap();
            world.pass(secs(10)).await;
        }
    } else {
        assert_eq!(letters.discard().await.unwrap(), 1);
    }
    world.pass(secs(10)).await;
    world.until(|_| of_ada(&diary).len() == 4).await;
    assert_eq!(of_ada(&diary), rest, "{how:?}");
}

#[tokio::test]
async fn a_key_that_is_held_waits_wherever_its_message_died() {
    for how in [Dies::AtOnce, Dies::InTheInbox, Dies::Transactional, Dies::Undecoded] {
        for (holds, redrives) in [(true, true), (true, false), (false, false)] {
            dies(how, holds, redrives).await;
        }
    }
}
