//! The order of keys, and who waits for whom.

use super::{
    Desk, LogFixture, NEEDS_ADMIN,
    fixture::{LONG, SHORT, names, of_key},
    message,
};
use postrider_core::{
    GroupName, Mailbox, Topic,
    log::{NewRecord, Outcome, Owner, Parking, Placement, SessionOptions, Until},
};
use std::time::Duration;

const MINUTE: Duration = Duration::from_secs(60);

/// A key whose head is refused waits; its neighbours do not, however many wait behind it.
pub async fn nothing_waiting_stops_a_neighbour(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let hot: Vec<String> = (0..300).map(|n| format!("hot:{n}")).collect();
    desk.put(&hot.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let head = desk.claim(1).await.records;
    assert_eq!(names(&head), ["0"]);
    desk.put(&["cold:a", "b", "cold:c"]).await;
    // While the head is out, its key is passed over.
    let mut got = Vec::new();
    for _ in 0..100 {
        let records = desk.claim(5).await.records;
        got.extend(names(&records));
        desk.done(&records).await;
    }
    got.sort();
    assert_eq!(got, ["a", "b", "c"]);
    // And when it is parked.
    desk.settle(vec![(&head[0], desk.parked(MINUTE))]).await;
    desk.put(&["cold:d", "hot:300"]).await;
    let mut got = Vec::new();
    for _ in 0..100 {
        let records = desk.claim(5).await.records;
        got.extend(names(&records));
        desk.done(&records).await;
    }
    assert_eq!(got, ["d"]);
    fixture.advance(MINUTE + SHORT).await;
    let expected: Vec<String> = (0..=300).map(|n| n.to_string()).collect();
    assert_eq!(desk.drain().await, expected);
}

/// While something of a key is out, nothing more of it is given; what was passed over comes later, in order.
pub async fn a_busy_key_is_passed_over_and_given_later(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1", "k:2"]).await;
    let run = desk.take().await;
    assert_eq!(names(&run), ["1", "2"]);
    desk.put(&["k:3", "x:a", "k:4"]).await;
    assert_eq!(names(&desk.take().await), ["a"]);
    desk.done(&run[..1]).await;
    assert!(desk.take().await.is_empty(), "2 is still out");
    desk.put(&["k:5"]).await;
    desk.done(&run[1..]).await;
    assert_eq!(names(&desk.claim(2).await.records), ["3", "4"]);
    assert!(desk.take().await.is_empty());
}

/// A dead letter that is redriven waits behind what was passed over meanwhile for its busy key, and so does what comes later.
pub async fn a_redriven_record_lets_nothing_overtake(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    desk.put(&["k:dead"]).await;
    let dead = desk.take().await;
    desk.settle(vec![(&dead[0], desk.failed(false))]).await;
    desk.put(&["k:1"]).await;
    let held = desk.take().await;
    assert_eq!(names(&held), ["1"]);
    desk.put(&["k:2", "k:3"]).await;
    assert!(desk.take().await.is_empty(), "1 is out");
    let admin = fixture.log().admin().expect(NEEDS_ADMIN).clone();
    let filter = postrider_core::log::Filter::of(desk.mailbox.clone());
    assert_eq!(admin.redrive(&filter, 10).await.unwrap(), 1);
    desk.put(&["k:4", "k:5"]).await;
    assert!(desk.take().await.is_empty(), "1 is still out");
    desk.done(&held).await;
    let mut got = desk.drain().await;
    got.retain(|name| name != "dead");
    assert_eq!(got, ["2", "3", "4", "5"]);
}

/// And so it is for the next holder, who finds it parked before it has read those ahead of it.
pub async fn a_redriven_record_lets_nothing_overtake_after_a_take_over(fixture: &dyn LogFixture) {
    let short = SessionOptions::new(Owner::new()).with_lease(SHORT);
    let one = Desk::with(fixture, fixture.log(), short).await;
    one.put(&["k:dead"]).await;
    let dead = one.take().await;
    one.settle(vec![(&dead[0], one.failed(false))]).await;
    one.put(&["k:1", "k:2"]).await;
    assert_eq!(names(&one.take().await), ["1", "2"]);
    let admin = fixture.log().admin().expect(NEEDS_ADMIN).clone();
    let filter = postrider_core::log::Filter::of(one.mailbox.clone());
    assert_eq!(admin.redrive(&filter, 10).await.unwrap(), 1);
    one.put(&["k:3"]).await;
    assert!(one.take().await.is_empty(), "1 and 2 are out");
    one.put(&["k:4"]).await;
    // The holder dies with 1 and 2 unsettled.
    drop(one);
    let long = SessionOptions::new(Owner::new()).with_lease(LONG);
    let two = Desk::with(fixture, fixture.other().await, long).await;
    let mut got = Vec::new();
    for _ in 0..5 {
        fixture.advance(SHORT).await;
        got.extend(two.drain().await);
    }
    got.retain(|name| name != "dead");
    assert_eq!(got, ["1", "2", "3", "4"]);
}

/// A refused record keeps its place: those behind it come behind it.
pub async fn order_survives_failure(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1", "k:2", "k:3", "j:x"]).await;
    let records = desk.take().await;
    let k: Vec<_> = records.iter().filter(|r| r.message.key() == Some("k")).collect();
    let j: Vec<_> = records
        .iter()
        .filter(|r| r.message.key() == Some("j"))
        .cloned()
        .collect();
    desk.settle(vec![
        (k[0], desk.parked(SHORT)),
        (k[1], Outcome::Released),
        (k[2], Outcome::Released),
    ])
    .await;
    desk.done(&j).await;
    desk.put(&["k:4"]).await;
    assert!(desk.take().await.is_empty());
    fixture.advance(SHORT * 2).await;
    let again = desk.take().await;
    assert_eq!(of_key(&again, "k"), ["1", "2", "3", "4"]);
    assert_eq!(again.iter().map(|r| r.attempts).collect::<Vec<_>>(), [1, 0, 0, 0]);
    // Refused in the middle this time, and the settle of the follower comes first.
    desk.settle(vec![(&again[3], Outcome::Released), (&again[0], Outcome::Done)])
        .await;
    desk.settle(vec![(&again[1], desk.parked(SHORT)), (&again[2], Outcome::Released)])
        .await;
    desk.put(&["k:5"]).await;
    assert!(desk.take().await.is_empty());
    fixture.advance(SHORT * 2).await;
    assert_eq!(desk.drain().await, ["2", "3", "4", "5"]);
}

/// A key goes on where it was, whoever relays it.
pub async fn order_survives_a_take_over(fixture: &dyn LogFixture) {
    let one = Desk::with(
        fixture,
        fixture.log(),
        SessionOptions::new(Owner::new()).with_lease(SHORT),
    )
    .await;
    one.put(&["k:1", "k:2", "k:3", "k:4"]).await;
    let records = one.take().await;
    one.settle(vec![
        (&records[0], Outcome::Done),
        (&records[1], one.parked(SHORT)),
        (&records[2], Outcome::Released),
    ])
    .await;
    // 4 was never settled: the holder dies.
    drop(one);
    let two = Desk::with(
        fixture,
        fixture.other().await,
        SessionOptions::new(Owner::new()).with_lease(LONG),
    )
    .await;
    two.put(&["k:5"]).await;
    let mut got = Vec::new();
    for _ in 0..5 {
        fixture.advance(SHORT).await;
        got.extend(two.drain().await);
    }
    assert_eq!(got, ["2", "3", "4", "5"]);
}

/// Records without a key wait for nobody.
pub async fn keyless_records_are_not_held_back(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    desk.put(&["1", "2", "3"]).await;
    let records = desk.take().await;
    let last = names(&records)[2].clone();
    desk.settle(vec![
        (&records[0], desk.parked(MINUTE)),
        (&records[1], desk.failed(true)),
    ])
    .await;
    desk.put(&["4"]).await;
    assert_eq!(names(&desk.take().await), ["4"]);
    desk.settle(vec![(&records[2], Outcome::Released)]).await;
    assert_eq!(names(&desk.take().await), [last]);
}

/// What is given back unattempted comes again, in its place and with its attempts.
pub async fn released_records_keep_their_place(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1", "k:2", "3"]).await;
    let records = desk.take().await;
    desk.put(&["k:4"]).await;
    assert!(desk.take().await.is_empty());
    desk.settle(records.iter().rev().map(|r| (r, Outcome::Released)).collect())
        .await;
    let again = desk.take().await;
    assert_eq!(of_key(&again, "k"), ["1", "2", "4"]);
    assert_eq!(again.len(), 4);
    assert!(again.iter().all(|r| r.attempts == 0));
}

/// The local tier: parked, kept, and settled again by the same tag.
pub async fn a_parked_record_is_settled_again(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1", "k:2", "3"]).await;
    let records = desk.take().await;
    let kept = |attempts| {
        let errors = vec![desk.error("try")];
        Outcome::Parked(Parking::new(Until::After(SHORT), attempts, errors).kept())
    };
    let (k, keyless): (Vec<_>, Vec<_>) = records.iter().partition(|r| r.message.key().is_some());
    desk.settle(vec![(k[0], kept(1)), (k[1], Outcome::Released), (keyless[0], kept(1))])
        .await;
    // Due by the log, but still in this session's hands.
    fixture.advance(SHORT * 2).await;
    assert!(desk.take().await.is_empty());
    desk.settle(vec![(keyless[0], Outcome::Done), (k[0], desk.parked(SHORT))])
        .await;
    assert!(desk.take().await.is_empty());
    fixture.advance(SHORT * 2).await;
    let again = desk.take().await;
    assert_eq!(names(&again), ["1", "2"]);
    desk.settle(vec![(&again[0], kept(2)), (&again[1], Outcome::Released)])
        .await;
    let report = desk.settle(vec![(&again[0], Outcome::Done)]).await;
    assert!(report.lost.is_empty());
    assert_eq!(desk.drain().await, ["2"], "its follower is due at once");
}

/// A delivery parked in an inbox keeps its place: later ones of its key wait behind it.
pub async fn a_record_parked_on_arrival_keeps_its_place(fixture: &dyn LogFixture) {
    let mailbox = Mailbox::Inbox(GroupName::new("parking"));
    let options = SessionOptions::new(Owner::new()).with_lease(LONG);
    let desk = Desk::on(fixture, fixture.log(), options, mailbox).await;
    let parked = |name, key, after| {
        let (attempts, errors) = (2, vec![desk.error("first try")]);
        NewRecord::new(message("t", key, name)).placed(Placement::Parked {
            after,
            attempts,
            errors,
        })
    };
    desk.append(&[
        parked("1", Some("k"), SHORT * 2),
        parked("2", Some("k"), Duration::ZERO),
    ])
    .await;
    desk.put(&["k:3", "j:x"]).await;
    assert_eq!(desk.drain().await, ["x"]);
    fixture.advance(SHORT * 3).await;
    let records = desk.take().await;
    assert_eq!(names(&records), ["1", "2", "3"]);
    assert_eq!(records[0].attempts, 2);
}

/// Records that wait for their topic wait for nothing else, and cost their neighbours nothing.
pub async fn a_topic_is_resumed(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    let of = |topic, key, name| NewRecord::new(message(topic, key, name));
    desk.append(&[
        of("away", None, "1"),
        of("away", Some("k"), "2"),
        of("away", Some("k"), "3"),
        of("here", None, "4"),
    ])
    .await;
    let records = desk.take().await;
    let wait = || Outcome::Parked(Parking::new(Until::Resumed, 0, vec![desk.error("missing")]));
    let outcomes = records
        .iter()
        .map(|r| match names(std::slice::from_ref(r))[0].as_str() {
            "3" => (r, Outcome::Released),
            "4" => (r, Outcome::Done),
            _ => (r, wait()),
        });
    desk.settle(outcomes.collect()).await;
    fixture.advance(MINUTE).await;
    assert!(desk.take().await.is_empty());
    assert_eq!(desk.session.resume(&Topic::new("here"), 10).await.unwrap(), 0);
    assert_eq!(desk.session.resume(&Topic::new("away"), 1).await.unwrap(), 1);
    let probe = desk.take().await;
    assert_eq!(names(&probe), ["1"]);
    assert_eq!(probe[0].attempts, 0);
    desk.settle(vec![(&probe[0], wait())]).await;
    assert!(desk.take().await.is_empty());
    assert_eq!(desk.session.resume(&Topic::new("away"), 10).await.unwrap(), 2);
    assert_eq!(desk.session.resume(&Topic::new("away"), 10).await.unwrap(), 0);
    assert_eq!(desk.drain().await, ["1", "2", "3"]);
}

/// Whoever gets the lease learns which topics are waited for: nobody else would resume them.
pub async fn topics_that_wait_are_told_to_the_next_holder(fixture: &dyn LogFixture) {
    let one = Desk::open(fixture).await;
    one.append(&[
        NewRecord::new(message("away", None, "1")),
        NewRecord::new(message("here", None, "2")),
    ])
    .await;
    let records = one.take().await;
    let wait = || Outcome::Parked(Parking::new(Until::Resumed, 0, Vec::new()));
    let outcomes = records.iter().map(|r| match r.message.topic().as_str() {
        "away" => (r, wait()),
        _ => (r, Outcome::Done),
    });
    one.settle(outcomes.collect()).await;
    assert!(one.claim(1).await.waiting.is_empty());
    one.session.close().await.unwrap();
    let two = Desk::with(
        fixture,
        fixture.other().await,
        SessionOptions::new(Owner::new()).with_lease(LONG),
    )
    .await;
    assert_eq!(two.claim(1).await.waiting, [Topic::new("away")]);
    assert!(two.claim(1).await.waiting.is_empty(), "told once");
    assert_eq!(two.session.resume(&Topic::new("away"), 5).await.unwrap(), 1);
    assert_eq!(two.drain().await, ["1"]);
}

/// Records of one key may be sent at once, so a later one may be done before an earlier one that is refused: what comes
/// after still waits for that.
pub async fn a_key_waits_for_whatever_is_parked_of_it(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1", "k:2", "k:3"]).await;
    let records = desk.take().await;
    let rest = records[1..].iter().map(|r| (r, Outcome::Released));
    desk.settle(std::iter::once((&records[0], desk.parked(SHORT))).chain(rest).collect())
        .await;
    fixture.advance(SHORT * 2).await;
    let parked = desk.take().await;
    assert_eq!(names(&parked), ["1", "2", "3"]);
    desk.settle(vec![
        (&parked[0], desk.parked(MINUTE)),
        (&parked[2], Outcome::Done),
        (&parked[1], Outcome::Released),
    ])
    .await;
    desk.put(&["k:4", "j:x"]).await;
    assert_eq!(desk.drain().await, ["x"]);
    fixture.advance(MINUTE + SHORT).await;
    assert_eq!(desk.drain().await, ["1", "2", "4"]);
}
