//! Who holds what.

use super::{
    Desk, LogFixture, NEEDS_ADMIN,
    fixture::{LONG, SHORT, names},
};
use postrider_core::{
    ErrorKind,
    log::{Claim, Lease, Outcome, Owner, SessionOptions},
};
use std::{collections::BTreeSet, time::Duration};

fn options(lease: Duration) -> SessionOptions {
    SessionOptions::new(Owner::new()).with_lease(lease)
}

/// Two sessions never hold one record.
pub async fn claims_are_exclusive(fixture: &dyn LogFixture) {
    let one = Desk::open(fixture).await;
    let two = Desk::with(fixture, fixture.other().await, options(LONG)).await;
    let all: Vec<String> = (0..200).map(|n| format!("k{}:{n}", n % 17)).collect();
    one.put(&all.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let (mut seen, mut given) = (BTreeSet::new(), 0);
    for _ in 0..10 {
        for desk in [&one, &two] {
            let records = desk.claim(30).await.records;
            given += records.len();
            seen.extend(names(&records));
            // What is held stays held for a while, so that both hold something where they can.
            if given % 2 == 0 {
                desk.done(&records).await;
            }
        }
    }
    assert_eq!(seen.len(), given, "none was given twice");
}

/// A holder that fell silent is followed by the next, who gets everything that was not settled.
pub async fn an_expired_lease_is_taken_over(fixture: &dyn LogFixture) {
    let dying = Desk::with(fixture, fixture.log(), options(SHORT)).await;
    dying.put(&["a:1", "a:2", "3"]).await;
    let held = dying.take().await;
    assert_eq!(held.len(), 3);
    let first = held.iter().find(|r| r.message.key().is_some()).cloned().unwrap();
    dying.done(&[first]).await;
    let next = Desk::with(fixture, fixture.other().await, options(SHORT)).await;
    let waiting = next.claim(10).await;
    assert!(waiting.records.is_empty() && !waiting.lease.is_held());
    drop(dying);
    let mut got = Vec::new();
    for _ in 0..4 {
        fixture.advance(SHORT).await;
        let records = next.take().await;
        got.extend(names(&records));
        next.done(&records).await;
    }
    got.sort();
    assert_eq!(got, ["2", "3"]);
}

/// What was claimed under a lease since lost cannot be settled, whoever has it now.
pub async fn a_stale_settle_changes_nothing(fixture: &dyn LogFixture) {
    let paused = Desk::with(fixture, fixture.log(), options(SHORT)).await;
    paused.put(&["k:1", "k:2"]).await;
    let claimed = paused.claim(10).await;
    assert!(claimed.lease.is_held());
    // Both renewals and claims stop while a process is paused; the clock of the log goes on.
    let next = Desk::with(fixture, fixture.other().await, options(LONG)).await;
    assert!(next.take().await.is_empty());
    let mut taken = Vec::new();
    for _ in 0..4 {
        fixture.advance(SHORT * 2).await;
        taken.extend(next.take().await);
    }
    assert_eq!(names(&taken), ["1", "2"]);
    assert!(!claimed.lease.is_held(), "the paused holder can tell by itself");
    for outcome in [
        Outcome::Done,
        paused.failed(true),
        paused.parked(SHORT),
        Outcome::Released,
    ] {
        let report = paused
            .settle(claimed.records.iter().map(|r| (r, outcome.clone())).collect())
            .await;
        assert_eq!(report.lost.len(), 2, "{outcome:?}");
    }
    assert_eq!(
        paused
            .session
            .resume(claimed.records[0].message.topic(), 1)
            .await
            .unwrap(),
        0
    );
    next.done(&taken).await;
    let log = fixture.log();
    let stats = log.admin().expect(NEEDS_ADMIN).stats().await.unwrap()[&next.mailbox];
    assert_eq!((stats.pending, stats.failed), (0, 0));
    next.session.close().await.unwrap();
    // It may come back, under another lease, and what it had before stays lost.
    paused.put(&["k:3"]).await;
    let again = paused.claim(10).await;
    assert_eq!(names(&again.records), ["3"]);
    assert!(!again.lease.is_same(&claimed.lease));
    let report = paused.settle(vec![(&claimed.records[0], Outcome::Done)]).await;
    assert_eq!(report.lost.len(), 1);
}

/// A session keeps its lease for as long as it lives, without being asked for anything.
pub async fn a_live_lease_is_renewed(fixture: &dyn LogFixture) {
    let holder = Desk::with(fixture, fixture.log(), options(SHORT)).await;
    holder.put(&["1"]).await;
    let claimed = holder.claim(10).await;
    let other = Desk::with(fixture, fixture.other().await, options(SHORT)).await;
    for _ in 0..60 {
        fixture.advance(SHORT / 20).await;
        // The renewal is a task of the session's: it needs a moment of real time for each step of the clock.
        tokio::time::sleep(Duration::from_millis(30)).await;
        assert!(other.take().await.is_empty());
    }
    assert!(claimed.lease.is_held());
    holder.done(&claimed.records).await;
}

/// A session that is closed leaves nothing to wait for.
pub async fn close_hands_over_at_once(fixture: &dyn LogFixture) {
    let one = Desk::open(fixture).await;
    let two = Desk::with(fixture, fixture.other().await, options(LONG)).await;
    one.put(&["k:1", "k:2", "3"]).await;
    let held = one.claim(10).await;
    assert_eq!(held.records.len(), 3);
    one.session.close().await.unwrap();
    one.session.close().await.unwrap();
    assert!(!held.lease.is_held());
    let closed = one.session.claim(&Claim::new(1)).await.unwrap_err();
    assert_eq!(closed.kind(), ErrorKind::Closed);
    assert_eq!(one.session.settle(&[]).await.unwrap_err().kind(), ErrorKind::Closed);
    let mut got = two.drain().await;
    got.sort();
    assert_eq!(got, ["1", "2", "3"]);
    let short = options(Lease::SHORTEST / 2);
    let error = fixture.log().store().open(&two.mailbox, &short).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Config);
}

/// A wait ends soon after another process has committed something, and at the latest with its time.
pub async fn a_wait_ends_with_news_or_with_its_time(fixture: &dyn LogFixture) {
    let desk = Desk::open(fixture).await;
    assert!(desk.take().await.is_empty());
    // How many seconds of the log's clock it takes.
    let waits = async |at_most| {
        let mut wait = std::pin::pin!(desk.session.wait(at_most));
        for secs in 0..60 {
            if let Ok(ended) = tokio::time::timeout(Duration::from_millis(100), &mut wait).await {
                ended.expect("a wait");
                return secs;
            }
            fixture.advance(SHORT).await;
        }
        panic!("a wait of {at_most:?} does not end");
    };
    assert!(waits(SHORT * 5).await <= 10);
    let other = fixture.other().await;
    let record = postrider_core::log::NewRecord::new(super::message("t", None, "news"));
    other.store().append(&desk.mailbox, &[record]).await.expect("appended");
    assert!(waits(LONG).await <= 10);
    // (A wait may end for no reason, before the news.)
    let mut got = Vec::new();
    for _ in 0..5 {
        got.extend(names(&desk.take().await));
        fixture.advance(SHORT).await;
    }
    assert_eq!(got, ["news"]);
}
