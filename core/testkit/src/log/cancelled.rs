//! Calls that are cut off: a client disconnects, a time-out passes.

use super::{Desk, LogFixture, fixture::LONG, message};
use postrider_core::{
    EventLog, GroupName, Mailbox,
    log::{Arrival, Filter, GroupMember, NewRecord, Owner, Page, Placement, Purge, SessionOptions},
};
use std::{future::poll_fn, pin::pin, task::Poll, time::Duration};

/// Polls a future so many times, whenever it is to be polled, and drops it. `true` if it ended by then.
pub async fn cut_off_after<F: Future>(polls: usize, future: F) -> bool {
    let (mut future, mut left) = (pin!(future), polls);
    poll_fn(|context| {
        if left == 0 {
            return Poll::Ready(false);
        }
        left -= 1;
        match future.as_mut().poll(context) {
            Poll::Ready(_) => Poll::Ready(true),
            // It was the last time: nobody waits for it any more.
            Poll::Pending if left == 0 => Poll::Ready(false),
            Poll::Pending => Poll::Pending,
        }
    })
    .await
}

fn group() -> GroupName {
    GroupName::new("cut-off")
}

fn dead(name: &str) -> NewRecord {
    NewRecord::new(message("t", None, name)).placed(Placement::Failed {
        hold_key: false,
        attempts: 1,
        errors: Vec::new(),
    })
}

fn waiting(name: &str) -> NewRecord {
    NewRecord::new(message("t", Some(name), name)).placed(Placement::Parked {
        after: LONG,
        attempts: 1,
        errors: Vec::new(),
    })
}

/// Cuts a call off after each number of polls until it ends by itself, and appends after each: `names` are those that
/// the log has answered for.
async fn cut_off<F: Future>(log: &EventLog, names: &mut Vec<String>, mut call: impl FnMut() -> F) {
    for polls in 1..=10 {
        cut_off_after(polls, call()).await;
        // More than a pool in a test has connections, so that each is used again.
        for _ in 0..6 {
            let name = format!("event {}", names.len());
            let batch = [NewRecord::new(message("t", None, &name))];
            let appended = log.store().append(&Mailbox::Inbox(group()), &batch).await;
            appended.expect("appended");
            names.push(name);
        }
        if polls % 5 == 0 {
            let batch = [waiting(&format!("w{}", names.len()))];
            let parked = log.store().append(&Mailbox::Inbox(group()), &batch).await;
            parked.expect("parked");
            let batch = [dead(&format!("d{}", names.len()))];
            let failed = log.store().append(&Mailbox::Inbox(group()), &batch).await;
            failed.expect("a dead letter");
        }
    }
}

/// Every call that a caller may drop.
async fn cut_off_everything(log: &EventLog, names: &mut Vec<String>) {
    let scraps = &Mailbox::Inbox(GroupName::new("scraps"));
    let store = log.store();
    if let Ok(transactions) = log.transactions() {
        cut_off(log, names, || transactions.begin()).await;
        let in_transaction = || async {
            let mut tx = transactions.begin().await?;
            let batch = [NewRecord::new(message("t", None, "cut off"))];
            transactions.append_in(tx.lend(), scraps, &batch).await?;
            tx.commit().await
        };
        cut_off(log, names, in_transaction).await;
    }
    let (one, many) = (
        &[NewRecord::new(message("t", None, "cut off"))],
        &[waiting("cut off"), dead("cut off too")],
    );
    cut_off(log, names, || store.append(scraps, one)).await;
    cut_off(log, names, || store.append(scraps, many)).await;
    let purge = Purge::new(Mailbox::Inbox(group()), 10).receipts_after(LONG);
    let purge = &purge.failed_after(LONG).succeeded_after(LONG);
    cut_off(log, names, || store.purge(purge)).await;
    if let Ok(inbox) = log.inbox() {
        let (group, id) = (&group(), message("t", None, "x").id());
        let arrival = &[Arrival::new(&message("t", Some("k"), "x"))];
        let member = &GroupMember::new(Owner::new(), ["a.v1"], ["a"]);
        cut_off(log, names, || inbox.look(group, arrival)).await;
        cut_off(log, names, || inbox.note(None, group, id)).await;
        cut_off(log, names, || inbox.write_note(None, group, id, 0, "a")).await;
        cut_off(log, names, || inbox.register(group, member, LONG)).await;
        cut_off(log, names, || inbox.members(group, LONG)).await;
    }
    if let Ok(admin) = log.admin() {
        let (filter, page) = (&Filter::of(scraps.clone()), &Page::default());
        cut_off(log, names, || admin.list(filter, page)).await;
        cut_off(log, names, || admin.redrive(filter, 1)).await;
        cut_off(log, names, || admin.discard(filter, 1)).await;
        cut_off(log, names, || admin.count_failed(filter)).await;
        cut_off(log, names, || admin.stats()).await;
    }
}

/// Whatever was cut off before, an append that has returned is committed: other handles see it.
pub async fn an_append_after_a_cancelled_begin_is_durable(fixture: &dyn LogFixture) {
    let (log, other) = (fixture.log(), fixture.other().await);
    let mut expected = Vec::new();
    cut_off_everything(&log, &mut expected).await;
    // As another process has it.
    let mailbox = Mailbox::Inbox(group());
    let options = SessionOptions::new(Owner::new()).with_lease(LONG);
    let desk = Desk::on(fixture, other.clone(), options, mailbox.clone()).await;
    let mut found = desk.drain().await;
    found.sort();
    expected.sort();
    assert_eq!(found, expected, "everything that was answered with Ok is there");
    if let Ok(admin) = other.admin() {
        let stats = admin.stats().await.expect("numbers");
        let (of_group, each) = (&stats[&mailbox], expected.len() as u64 / 30);
        assert_eq!((of_group.parked, of_group.failed), (each, each), "{of_group:?}");
    }
    // And the calls that were cut off have left no lock behind.
    let last = [waiting("last")];
    let again = tokio::time::timeout(Duration::from_secs(20), log.store().append(&mailbox, &last));
    again.await.expect("it waits for nobody").expect("parked");
}
