//! A backlog of one key.

use super::{
    Desk, LogFixture,
    fixture::{SHORT, name, names, of_key},
    message,
};
use postrider_core::log::{Claim, NewRecord, Outcome, Record};

/// More than any log should need to remember before it reads on.
const BACKLOG: usize = 70_000;

async fn put_hot(desk: &Desk, count: usize) {
    for first in (0..count).step_by(5000) {
        let batch: Vec<_> = (first..count.min(first + 5000))
            .map(|n| NewRecord::new(message("t", Some("hot"), &n.to_string())))
            .collect();
        desk.append(&batch).await;
    }
}

/// Claims the head of the hot key with what follows it.
async fn take_head(desk: &Desk) -> Vec<Record> {
    let out = desk.session.claim(&Claim::new(10)).await.expect("a claim").records;
    assert_eq!(of_key(&out, "hot").len(), 10, "a run from its head");
    out
}

/// Appends to other keys, and takes that, whatever the hot key has waiting.
async fn others_go_on(desk: &Desk, round: usize) {
    let put: Vec<String> = (0..5).map(|n| format!("other{n}:{round}.{n}")).collect();
    desk.put(&put.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let mut found = Vec::new();
    for _ in 0..100 {
        let records = desk.take().await;
        assert_eq!(of_key(&records, "hot"), [] as [String; 0], "its head is not settled");
        desk.done(&records).await;
        found.extend(names(&records));
        if found.len() == 5 {
            break;
        }
    }
    found.sort();
    let expected: Vec<String> = (0..5).map(|n| format!("{round}.{n}")).collect();
    assert_eq!(found, expected, "round {round}: other keys go on");
}

/// Takes the hot key up to `end`, in order.
async fn drain_hot(fixture: &dyn LogFixture, desk: &Desk, end: usize) {
    let (mut next, mut idle) = (0, 0);
    while next < end && idle < 100 {
        let records = desk.take().await;
        for record in &records {
            assert_eq!(name(&record.message), next.to_string(), "the hot key is in order");
            next += 1;
        }
        desk.done(&records).await;
        idle = if records.is_empty() { idle + 1 } else { 0 };
        if idle > 0 {
            fixture.advance(SHORT / 50).await;
        }
    }
    assert!(next >= end, "and complete: {next} of {end}");
}

/// However much one key has waiting behind its head, other keys go on.
pub async fn a_backlog_of_one_key_hinders_no_other(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    put_hot(&desk, BACKLOG).await;
    let out = take_head(&desk).await;
    others_go_on(&desk, 0).await;
    others_go_on(&desk, 1).await;
    desk.settle(out.iter().map(|record| (record, Outcome::Released)).collect())
        .await;
    drain_hot(fixture, &desk, 3000).await;
}

/// A long run of a key whose head is refused waits behind it, stays in order, and hinders no other key.
pub async fn a_long_run_waits_behind_its_head_in_order(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    put_hot(&desk, 4000).await;
    let out = take_head(&desk).await;
    // So that all of it has been passed over.
    others_go_on(&desk, 0).await;
    let mut outcomes = vec![(&out[0], desk.parked(SHORT))];
    outcomes.extend(out[1..].iter().map(|record| (record, Outcome::Released)));
    desk.settle(outcomes).await;
    put_later(&desk).await;
    others_go_on(&desk, 1).await;
    fixture.advance(SHORT * 2).await;
    drain_hot(fixture, &desk, 4001).await;
    others_go_on(&desk, 2).await;
}

/// One more of the hot key, behind everything.
async fn put_later(desk: &Desk) {
    desk.append(&[NewRecord::new(message("t", Some("hot"), "4000"))]).await;
}
