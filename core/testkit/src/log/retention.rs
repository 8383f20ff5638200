//! What is kept, and for how long.

use super::{
    Desk, LogFixture, NEEDS_ADMIN,
    fixture::{LONG, SHORT, name},
};
use postrider_core::log::{Outcome, Owner, Parking, Purge, SessionOptions, Until};

/// What succeeded is in the history, or gone, as the session was told.
pub async fn what_succeeded_is_kept_only_if_asked(fixture: &dyn LogFixture) {
    let log = fixture.log();
    for keep in [true, false] {
        let options = SessionOptions::new(Owner::new())
            .with_lease(LONG)
            .with_keep_succeeded(keep);
        let desk = Desk::with(fixture, log.clone(), options).await;
        desk.put(&["1", "k:2"]).await;
        desk.drain().await;
        let stats = log.admin().expect(NEEDS_ADMIN).stats().await.unwrap()[&desk.mailbox];
        let expected = if log.capabilities().history { 2 } else { 0 };
        assert_eq!((stats.succeeded, stats.pending), (expected, 0), "keep: {keep}");
        desk.session.close().await.unwrap();
    }
}

/// A purge takes what is past its age, as much as it is allowed, and nothing that is pending.
pub async fn purge_is_bounded_and_takes_only_what_is_due(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let desk = Desk::open(fixture).await;
    desk.put(&["1", "2", "3", "4", "5", "k:p", "f", "g:g"]).await;
    let records = desk.take().await;
    let outcomes = records.iter().map(|record| match name(&record.message).as_str() {
        "p" => (record, desk.parked(LONG)),
        "f" => (record, desk.failed(false)),
        "g" => (record, desk.failed(true)),
        _ => (record, Outcome::Done),
    });
    desk.settle(outcomes.collect()).await;
    desk.put(&["g:behind", "hot"]).await;
    desk.claim(0).await;
    let purge = |max| Purge::new(desk.mailbox.clone(), max).succeeded_after(SHORT);
    assert_eq!(log.store().purge(&purge(100)).await.unwrap(), 0, "too young");
    fixture.advance(SHORT * 2).await;
    if log.capabilities().history {
        assert_eq!(log.store().purge(&purge(2)).await.unwrap(), 2);
        let (a, b) = (purge(2), purge(2));
        let both = tokio::join!(log.store().purge(&a), log.store().purge(&b));
        assert_eq!(both.0.unwrap() + both.1.unwrap(), 3, "together they take each once");
    }
    assert_eq!(log.store().purge(&purge(100)).await.unwrap(), 0);
    let stats = log.admin().expect(NEEDS_ADMIN).stats().await.unwrap()[&desk.mailbox];
    assert_eq!(
        (stats.failed, stats.pending),
        (2, 3),
        "neither failed nor pending ones go"
    );
    let failed = Purge::new(desk.mailbox.clone(), 100).failed_after(SHORT);
    assert_eq!(log.store().purge(&failed).await.unwrap(), 2, "failed ones go if asked");
    let mut rest = desk.drain().await;
    rest.sort();
    assert_eq!(rest, ["behind", "hot"], "the key of the purged one is free");
}

/// The last ten errors are kept, oldest first.
pub async fn errors_are_kept_the_last_ten(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let desk = Desk::open(fixture).await;
    desk.put(&["k:1"]).await;
    let record = desk.take().await.remove(0);
    for n in 1..=14 {
        let errors = vec![desk.error(&format!("error {n}"))];
        let parking = Parking::new(Until::After(SHORT), n, errors).kept();
        desk.settle(vec![(&record, Outcome::Parked(parking))]).await;
    }
    let stored = log
        .admin()
        .expect(NEEDS_ADMIN)
        .show(&desk.mailbox, record.message.id())
        .await
        .unwrap()
        .unwrap();
    let texts: Vec<&str> = stored.errors.iter().map(|e| e.text.as_str()).collect();
    assert_eq!((texts.len(), texts[0], texts[9]), (10, "error 5", "error 14"));
    assert_eq!(stored.attempts, 14);
}
