//! What a person does with a log.

use super::{
    Desk, LogFixture, NEEDS_ADMIN,
    fixture::{LONG, SHORT, name, names},
    message,
};
use postrider_core::{
    ErrorKind, Mailbox, MessageId, RouteName,
    log::{Admission, Arrival, Cursor, Filter, NewRecord, Outcome, Page, Placement, RecordState},
};
use std::{collections::BTreeMap, time::Duration};

/// A dead letter is found, shown, redriven from the beginning, or discarded; nothing else is touched.
pub async fn failed_records_are_redriven_and_discarded(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let admin = log.admin().expect(NEEDS_ADMIN);
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1", "k:2", "3", "4"]).await;
    let records = desk.take().await;
    let find = |wanted: &str| records.iter().find(|r| name(&r.message) == wanted).unwrap();
    desk.settle(vec![
        (find("1"), desk.failed(false)),
        (find("3"), desk.failed(false)),
        (find("4"), desk.parked(LONG)),
    ])
    .await;
    let failed = Filter::of(desk.mailbox.clone()).with_state(RecordState::Failed);
    let listed = admin.list(&failed, &Page::default()).await.unwrap();
    assert_eq!(
        listed.entries.iter().map(|s| name(&s.message)).collect::<Vec<_>>(),
        ["1", "3"]
    );
    let shown = admin
        .show(&desk.mailbox, find("1").message.id())
        .await
        .unwrap()
        .unwrap();
    assert_eq!((shown.state, shown.attempts), (RecordState::Failed, 3));
    assert_eq!(shown.errors[0].text, "hopeless");
    assert!(shown.finished_at.is_some());
    // The key went on without it.
    desk.done(std::slice::from_ref(find("2"))).await;
    assert_eq!(
        admin
            .redrive(&failed.clone().with_id(MessageId::new()), 10)
            .await
            .unwrap(),
        0
    );
    assert_eq!(admin.count_failed(&failed).await.unwrap(), 2);
    assert_eq!(admin.count_failed(&failed.clone().with_key("k")).await.unwrap(), 1);
    let elsewhere = Filter::of(postrider_core::Mailbox::Inbox(postrider_core::GroupName::new("nobody")));
    assert_eq!(admin.count_failed(&elsewhere).await.unwrap(), 0);
    assert_eq!(admin.redrive(&failed.clone().with_key("k"), 10).await.unwrap(), 1);
    desk.put(&["k:5"]).await;
    let again = desk.claim(1).await.records;
    assert_eq!(
        (names(&again), again[0].attempts),
        (vec!["1".to_owned()], 0),
        "its attempts begin anew"
    );
    let id = again[0].message.id();
    let shown = admin.show(&desk.mailbox, id).await.unwrap().unwrap();
    assert_eq!((shown.state, shown.attempts), (RecordState::Pending, 0));
    assert_eq!(shown.errors[0].text, "hopeless", "its errors are kept");
    desk.settle(vec![(&again[0], desk.parked(SHORT))]).await;
    let shown = admin.show(&desk.mailbox, id).await.unwrap().unwrap();
    assert_eq!(shown.errors.len(), 2, "{:?}", shown.errors);
    fixture.advance(SHORT * 2).await;
    let again = desk.claim(1).await.records;
    assert_eq!(names(&again), ["1"]);
    desk.done(&again).await;
    assert_eq!(desk.drain().await, ["5"]);
    let everything = Filter::of(desk.mailbox.clone());
    assert_eq!(admin.discard(&everything, 0).await.unwrap(), 0);
    assert_eq!(
        admin.discard(&everything, 10).await.unwrap(),
        1,
        "the parked one is not failed"
    );
    assert_eq!(admin.show(&desk.mailbox, find("3").message.id()).await.unwrap(), None);
    let stats = admin.stats().await.unwrap()[&desk.mailbox];
    assert_eq!((stats.failed, stats.pending), (0, 1));
}

/// A redriven record that is refused again does not leave its key without anything that is due.
pub async fn a_redriven_record_may_be_refused_again(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let desk = Desk::open(fixture).await;
    desk.put(&["k:dead"]).await;
    let dead = desk.take().await;
    desk.settle(vec![(&dead[0], desk.failed(false))]).await;
    desk.put(&["k:1", "k:2"]).await;
    assert_eq!(
        log.admin()
            .expect(NEEDS_ADMIN)
            .redrive(&Filter::of(desk.mailbox.clone()), 1)
            .await
            .unwrap(),
        1
    );
    desk.put(&["k:3"]).await;
    for _ in 0..6 {
        let records = desk.take().await;
        let Some(first) = records.first() else { break };
        let rest = records[1..].iter().map(|r| (r, Outcome::Released));
        desk.settle(std::iter::once((first, desk.parked(SHORT))).chain(rest).collect())
            .await;
        fixture.advance(SHORT * 2).await;
    }
    let mut got = Vec::new();
    for _ in 0..6 {
        got.extend(desk.drain().await);
        fixture.advance(SHORT * 2).await;
    }
    let in_order: Vec<&String> = got.iter().filter(|name| *name != "dead").collect();
    assert_eq!(in_order, ["1", "2", "3"]);
    assert_eq!(got.len(), 4, "{got:?}");
}

/// A failed record that holds its key lets nothing of it pass until a person decides.
pub async fn a_failed_record_can_hold_its_key(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let admin = log.admin().expect(NEEDS_ADMIN);
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1", "k:2", "j:1", "j:2"]).await;
    let records = desk.take().await;
    let outcomes = records.iter().map(|r| match name(&r.message).as_str() {
        "1" => (r, desk.failed(true)),
        _ => (r, Outcome::Released),
    });
    desk.settle(outcomes.collect()).await;
    desk.put(&["k:3", "j:3", "x:x"]).await;
    fixture.advance(SHORT).await;
    assert_eq!(desk.drain().await, ["x"]);
    let of = |key| Filter::of(desk.mailbox.clone()).with_key(key);
    assert_eq!(admin.redrive(&of("k"), 10).await.unwrap(), 1);
    assert_eq!(desk.drain().await, ["1", "2", "3"], "redriven, it goes on in its place");
    assert_eq!(admin.discard(&of("j"), 10).await.unwrap(), 1);
    assert_eq!(desk.drain().await, ["2", "3"], "discarded, the next goes on");
}

/// The same for one that comes as a dead letter: what waits of its key, and what comes later, goes on when a person has decided.
pub async fn a_record_that_failed_on_arrival_can_hold_its_key(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let admin = log.admin().expect(NEEDS_ADMIN);
    let mailbox = Mailbox::Inbox(postrider_core::GroupName::new("holding"));
    let options = postrider_core::log::SessionOptions::new(postrider_core::log::Owner::new()).with_lease(LONG);
    let desk = Desk::on(fixture, fixture.log(), options, mailbox).await;
    let dead = |key, name, hold_key| {
        NewRecord::new(message("t", Some(key), name)).placed(Placement::Failed {
            attempts: 2,
            errors: vec![desk.error("hopeless")],
            hold_key,
        })
    };
    let behind = |key, name| {
        NewRecord::new(message("t", Some(key), name)).placed(Placement::Parked {
            after: Duration::ZERO,
            attempts: 0,
            errors: Vec::new(),
        })
    };
    for key in ["k", "j"] {
        desk.append(&[dead(key, "1", true)]).await;
        desk.append(&[behind(key, "2")]).await;
    }
    desk.append(&[dead("i", "1", false), behind("i", "2")]).await;
    if let Ok(inbox) = log.inbox() {
        let Mailbox::Inbox(group) = &desk.mailbox else {
            panic!("it is an inbox")
        };
        let arrival = Arrival::new(&message("t", Some("k"), "3"));
        let answers = inbox.look(group, &[arrival]).await.unwrap();
        assert_eq!(answers, [Admission::HeldBack]);
    }
    fixture.advance(SHORT * 2).await;
    assert_eq!(desk.drain().await, ["2"], "of the key that nobody holds");
    desk.append(&[behind("k", "3")]).await;
    fixture.advance(SHORT * 2).await;
    assert!(desk.take().await.is_empty());
    let of = |key| Filter::of(desk.mailbox.clone()).with_key(key);
    assert_eq!(admin.redrive(&of("k"), 10).await.unwrap(), 1);
    assert_eq!(desk.drain().await, ["1", "2", "3"], "redriven, it goes on in its place");
    assert_eq!(admin.discard(&of("j"), 10).await.unwrap(), 1);
    assert_eq!(desk.drain().await, ["2"], "discarded, the next goes on");
}

/// The numbers are right.
pub async fn stats_count(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let admin = log.admin().expect(NEEDS_ADMIN);
    let desk = Desk::open(fixture).await;
    desk.put(&["1", "2", "3", "4", "k:5", "k:6"]).await;
    let later = NewRecord::new(message("t", None, "later")).after(LONG);
    desk.append(&[later]).await;
    fixture.advance(SHORT * 3).await;
    let records = desk.take().await;
    let outcomes = records.iter().filter_map(|r| match name(&r.message).as_str() {
        "1" => Some((r, Outcome::Done)),
        "2" => Some((r, desk.failed(false))),
        "5" => Some((r, desk.parked(LONG))),
        "6" => Some((r, Outcome::Released)),
        _ => None,
    });
    desk.settle(outcomes.collect()).await;
    let stats = admin.stats().await.unwrap()[&desk.mailbox];
    assert_eq!(
        (stats.pending, stats.parked, stats.scheduled, stats.failed),
        (5, 2, 1, 1)
    );
    assert_eq!(stats.succeeded, u64::from(log.capabilities().history));
    let oldest = stats.oldest_pending.unwrap();
    assert!(oldest >= SHORT * 3 && oldest < Duration::from_secs(60), "{oldest:?}");
}

/// Pages show each record once that stays what it is, whatever happens beside it.
pub async fn pages_are_stable_under_writes(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let admin = log.admin().expect(NEEDS_ADMIN);
    let desk = Desk::open(fixture).await;
    let all: Vec<String> = (0..60).map(|n| format!("k{n}:{n}")).collect();
    desk.put(&all.iter().map(String::as_str).collect::<Vec<_>>()).await;
    desk.append(&[NewRecord::new(message("t", None, "scheduled")).after(LONG)])
        .await;
    let records = desk.take().await;
    let find = |n: usize| records.iter().find(|r| name(&r.message) == n.to_string()).unwrap();
    // Every third is failed, and stays so; the rest is moved about while a reader pages.
    let failed = (0..60).step_by(3).map(|n| (find(n), desk.failed(false)));
    desk.settle(failed.collect()).await;
    let filter = Filter::of(desk.mailbox.clone());
    let (mut seen, mut after, mut step) = (BTreeMap::new(), None::<Cursor>, 1);
    loop {
        let page = after.map_or_else(|| Page::first(7), |cursor| Page::after(cursor, 7));
        let listing = admin.list(&filter, &page).await.unwrap();
        assert!(listing.entries.len() <= 7);
        for entry in listing.entries {
            *seen
                .entry((name(&entry.message), entry.state == RecordState::Failed))
                .or_insert(0) += 1;
        }
        for (n, outcome) in [(step, Outcome::Done), (step + 1, desk.parked(LONG))] {
            if n < 60 && n % 3 != 0 {
                desk.settle(vec![(find(n), outcome)]).await;
            }
        }
        desk.put(&["new"]).await;
        step += 3;
        match listing.next {
            Some(next) => after = Some(next),
            None => break,
        }
        assert!(step < 400, "pages come to an end");
    }
    for n in (0..60).step_by(3) {
        assert_eq!(seen.get(&(n.to_string(), true)), Some(&1), "{n}");
    }
    assert_eq!(seen.get(&("scheduled".to_owned(), false)), Some(&1));
    let by_key = admin
        .list(&filter.clone().with_key("k3"), &Page::default())
        .await
        .unwrap();
    assert_eq!(by_key.entries.len(), 1);
    let nowhere = Filter::of(Mailbox::Outbox(RouteName::new("nowhere")));
    assert!(admin.list(&nowhere, &Page::default()).await.unwrap().entries.is_empty());
    let error = admin
        .list(&filter, &Page::after(Cursor("nonsense".to_owned()), 1))
        .await
        .unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Invalid);
}

/// A mailbox is there once something has used it, and looking for dead letters of one that is not brings none into being.
pub async fn mailboxes_are_known_by_name(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let admin = log.admin().expect(NEEDS_ADMIN);
    let inbox = |group: &str| Mailbox::Inbox(postrider_core::GroupName::parse(group.to_owned()).unwrap());
    let _desk = Desk::on(
        fixture,
        fixture.log(),
        postrider_core::log::SessionOptions::new(postrider_core::log::Owner::new()),
        inbox("here"),
    )
    .await;
    let misspelt = Filter::of(inbox("heer"));
    assert_eq!(admin.count_failed(&misspelt).await.unwrap(), 0);
    assert_eq!(admin.redrive(&misspelt, 10).await.unwrap(), 0);
    assert_eq!(admin.discard(&misspelt, 10).await.unwrap(), 0);
    assert!(
        admin
            .list(&misspelt, &Page::default())
            .await
            .unwrap()
            .entries
            .is_empty()
    );
    assert_eq!(admin.show(&inbox("heer"), MessageId::new()).await.unwrap(), None);
    let known = admin.mailboxes().await.unwrap();
    assert!(
        known.contains(&inbox("here")) && !known.contains(&inbox("heer")),
        "{known:?}"
    );
}
