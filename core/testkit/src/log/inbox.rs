//! What a group has handled, and what it has waiting.

use super::{
    Desk, LogFixture,
    fixture::{LONG, SHORT},
    message,
};
use postrider_core::{
    ErrorKind, GroupName, Mailbox, Message,
    log::{
        Admission, Arrival, InboxLog, Lent, LogTransaction, NewRecord, Owner, Placement, Purge, Savepoint,
        SessionOptions,
    },
};
use std::{sync::Arc, time::Duration};

use Admission::{Duplicate, HeldBack, New, Parked};

fn group() -> GroupName {
    GroupName::new("billing")
}

fn messages(count: usize) -> Vec<Message> {
    (0..count)
        .map(|n| message("t", Some(&format!("k{n}")), &n.to_string()))
        .collect()
}

async fn admit(inbox: &Arc<dyn InboxLog>, tx: &mut Box<dyn LogTransaction>, messages: &[&Message]) -> Vec<Admission> {
    let arrivals: Vec<Arrival> = messages.iter().map(|message| Arrival::new(message)).collect();
    inbox.admit(tx.lend(), &group(), &arrivals).await.unwrap()
}

/// A message is new once: its receipt comes with the transaction of its effects, or not at all.
pub async fn messages_are_admitted_once(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let (Ok(inbox), Ok(transactions)) = (log.inbox(), log.transactions()) else {
        // The part is optional; where it is missing, that is what has to be said.
        assert_eq!(log.inbox().map(|_| ()).unwrap_err().kind(), ErrorKind::Unsupported);
        return;
    };
    let m = messages(4);
    let mut undone = transactions.begin().await.unwrap();
    assert_eq!(
        admit(inbox, &mut undone, &[&m[0], &m[1], &m[0]]).await,
        [New, New, Duplicate]
    );
    undone.rollback().await.unwrap();
    let mut dropped = transactions.begin().await.unwrap();
    assert_eq!(admit(inbox, &mut dropped, &[&m[0]]).await, [New]);
    drop(dropped);
    let mut kept = transactions.begin().await.unwrap();
    assert_eq!(
        admit(inbox, &mut kept, &[&m[1], &m[0], &m[1]]).await,
        [New, New, Duplicate]
    );
    assert_eq!(
        admit(inbox, &mut kept, &[&m[0], &m[2]]).await,
        [Duplicate, New],
        "in the same transaction too"
    );
    assert_eq!(admit(inbox, &mut kept, &[]).await, []);
    kept.commit().await.unwrap();
    let mut later = transactions.begin().await.unwrap();
    assert_eq!(
        admit(inbox, &mut later, &[&m[2], &m[3], &m[0]]).await,
        [Duplicate, New, Duplicate]
    );
    later.commit().await.unwrap();
    let other_group = GroupName::new("shipping");
    let mut tx = transactions.begin().await.unwrap();
    let arrivals = [Arrival::new(&m[0])];
    assert_eq!(
        inbox.admit(tx.lend(), &other_group, &arrivals).await.unwrap(),
        [New],
        "groups are apart"
    );
    drop(tx);
    let wrong = inbox
        .admit(Lent::exclusive(&mut 7_u8), &group(), &arrivals)
        .await
        .unwrap_err();
    assert_eq!(wrong.kind(), ErrorKind::WrongTransaction);
    // Two batches at once, in other orders: one of them waits, none is admitted twice, nothing deadlocks.
    let many = messages(50);
    let round = |reverse: bool| {
        let (inbox, transactions, mut batch) = (inbox.clone(), transactions.clone(), many.clone());
        async move {
            if reverse {
                batch.reverse();
            }
            let mut tx = transactions.begin().await.unwrap();
            let answers = admit(&inbox, &mut tx, &batch.iter().collect::<Vec<_>>()).await;
            tokio::time::sleep(Duration::from_millis(50)).await;
            tx.commit().await.unwrap();
            answers.iter().filter(|answer| **answer == New).count()
        }
    };
    let (one, two) = tokio::join!(round(false), round(true));
    assert_eq!(one + two, 50);
    // Receipts are kept as long as asked.
    let purge = |age| Purge::new(Mailbox::Inbox(group()), 40).receipts_after(age);
    assert_eq!(log.store().purge(&purge(LONG)).await.unwrap(), 0);
    fixture.advance(SHORT * 2).await;
    assert_eq!(log.store().purge(&purge(SHORT)).await.unwrap(), 40);
    assert_eq!(log.store().purge(&purge(SHORT)).await.unwrap(), 14);
    let mut tx = transactions.begin().await.unwrap();
    assert_eq!(admit(inbox, &mut tx, &[&m[0]]).await, [New], "what is forgotten is new");
}

/// What waits in the inbox is not handled beside it, and holds back what comes behind it.
pub async fn admission_knows_what_waits(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let (Ok(inbox), Ok(transactions)) = (log.inbox(), log.transactions()) else {
        return;
    };
    let options = SessionOptions::new(Owner::new()).with_lease(LONG);
    let desk = Desk::on(fixture, fixture.log(), options, Mailbox::Inbox(group())).await;
    let parked = |message: &Message| {
        let (after, attempts, errors) = (SHORT, 1, vec![desk.error("refused")]);
        NewRecord::new(message.clone()).placed(Placement::Parked {
            after,
            attempts,
            errors,
        })
    };
    let dead = message("t", Some("dead"), "dead");
    let (first, second, keyless) = (
        message("t", Some("k"), "1"),
        message("t", Some("k"), "2"),
        message("t", None, "3"),
    );
    let other_topic = message("u", Some("k"), "4");
    let failed = NewRecord::new(dead.clone()).placed(Placement::Failed {
        hold_key: false,
        attempts: 3,
        errors: Vec::new(),
    });
    desk.append(&[parked(&first), parked(&keyless), failed]).await;
    let mut tx = transactions.begin().await.unwrap();
    let asked = [&first, &second, &keyless, &other_topic, &dead];
    assert_eq!(
        admit(inbox, &mut tx, &asked).await,
        [Parked, HeldBack, Parked, New, Parked]
    );
    // The follower is parked in the same transaction, and waits behind its head.
    transactions
        .append_in(tx.lend(), &desk.mailbox, &[parked(&second)])
        .await
        .unwrap();
    tx.commit().await.unwrap();
    fixture.advance(SHORT * 2).await;
    let records = desk.take().await;
    let names: Vec<_> = super::fixture::of_key(&records, "k");
    assert_eq!((names, records.len()), (vec!["1".to_owned(), "2".to_owned()], 3));
    // Tried again, it is not held back by itself; its receipt and its end are two transactions.
    let mut tx = transactions.begin().await.unwrap();
    let own = [Arrival::parked(&first), Arrival::parked(&second)];
    assert_eq!(inbox.admit(tx.lend(), &group(), &own).await.unwrap(), [New, New]);
    tx.commit().await.unwrap();
    let mut tx = transactions.begin().await.unwrap();
    assert_eq!(
        inbox.admit(tx.lend(), &group(), &own[..1]).await.unwrap(),
        [Duplicate],
        "a crash came between"
    );
    drop(tx);
    desk.done(&records).await;
    let mut tx = transactions.begin().await.unwrap();
    assert_eq!(
        admit(inbox, &mut tx, &[&first, &message("t", Some("k"), "5")]).await,
        [Duplicate, New]
    );
}

/// The same question outside of a transaction: it leaves no receipt, and sees what is committed.
pub async fn a_look_writes_nothing(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let (Ok(inbox), Ok(transactions)) = (log.inbox(), log.transactions()) else {
        return;
    };
    let look = async |messages: &[&Message]| {
        let arrivals: Vec<Arrival> = messages.iter().map(|message| Arrival::new(message)).collect();
        inbox.look(&group(), &arrivals).await.unwrap()
    };
    let m = messages(3);
    assert_eq!(look(&[]).await, []);
    assert_eq!(look(&[&m[0], &m[1]]).await, [New, New]);
    assert_eq!(look(&[&m[0]]).await, [New], "nothing was written");
    let mut tx = transactions.begin().await.unwrap();
    assert_eq!(admit(inbox, &mut tx, &[&m[0]]).await, [New]);
    tx.commit().await.unwrap();
    let behind = message("t", Some("k1"), "behind");
    let after = LONG;
    let parked = NewRecord::new(m[1].clone()).placed(Placement::Parked {
        after,
        attempts: 1,
        errors: Vec::new(),
    });
    let mailbox = Mailbox::Inbox(group());
    log.store().append(&mailbox, &[parked]).await.unwrap();
    let answers = look(&[&m[0], &m[1], &behind, &m[2]]).await;
    assert_eq!(answers, [Duplicate, Parked, HeldBack, New]);
    let own = inbox.look(&group(), &[Arrival::parked(&m[1])]).await.unwrap();
    assert_eq!(own, [New], "it does not wait for itself");
    let elsewhere = inbox
        .look(&GroupName::new("shipping"), &[Arrival::new(&m[1])])
        .await
        .unwrap();
    assert_eq!(elsewhere, [New], "groups are apart");
}

/// A note is written by whoever knows its version; of two at once one succeeds; what is rolled back was never there.
pub async fn notes_are_compared_and_set(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let (Ok(inbox), Ok(transactions)) = (log.inbox(), log.transactions()) else {
        return;
    };
    let id = messages(1)[0].id();
    let read = async || {
        inbox
            .note(None, &group(), id)
            .await
            .unwrap()
            .map(|n| (n.version, n.text))
    };
    let write = async |expected: u64, text: &str| inbox.write_note(None, &group(), id, expected, text).await.unwrap();
    assert_eq!(read().await, None);
    assert!(!write(1, "too early").await);
    assert!(write(0, "one").await && !write(0, "again").await);
    assert!(write(1, "two, with \"quotes\" and ünïcode").await && !write(1, "stale").await);
    assert_eq!(read().await, Some((2, "two, with \"quotes\" and ünïcode".to_owned())));
    // In a transaction: seen there at once, elsewhere with the commit.
    let mut tx = transactions.begin().await.unwrap();
    assert!(
        inbox
            .write_note(Some(tx.lend()), &group(), id, 2, "three")
            .await
            .unwrap()
    );
    assert!(
        inbox
            .write_note(Some(tx.lend()), &group(), id, 3, "four")
            .await
            .unwrap()
    );
    let own = inbox.note(Some(tx.lend()), &group(), id).await.unwrap().unwrap();
    assert_eq!((own.version, &*own.text), (4, "four"));
    tx.rollback().await.unwrap();
    assert_eq!(read().await.map(|n| n.0), Some(2));
    // Two at once: the second waits for the first, and is told.
    let round = |text: &'static str| {
        let (inbox, transactions) = (inbox.clone(), transactions.clone());
        async move {
            let mut tx = transactions.begin().await.unwrap();
            let written = inbox.write_note(Some(tx.lend()), &group(), id, 2, text).await.unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            tx.commit().await.unwrap();
            written
        }
    };
    let (one, two) = tokio::join!(round("a"), round("b"));
    assert!(one != two, "one of them: {one}, {two}");
    assert_eq!(read().await.map(|n| n.0), Some(3));
    // Two that write the first version.
    let other = messages(1)[0].id();
    let first = |text: &'static str| {
        let (inbox, transactions) = (inbox.clone(), transactions.clone());
        async move {
            let mut tx = transactions.begin().await.unwrap();
            let written = inbox
                .write_note(Some(tx.lend()), &group(), other, 0, text)
                .await
                .unwrap();
            tokio::time::sleep(Duration::from_millis(50)).await;
            tx.commit().await.unwrap();
            written
        }
    };
    let (one, two) = tokio::join!(first("a"), first("b"));
    assert!(one != two, "one of them: {one}, {two}");
    // Other groups and other messages have notes of their own.
    assert_eq!(inbox.note(None, &GroupName::new("shipping"), id).await.unwrap(), None);
}

/// Notes are kept as long as receipts are, and longer while their message waits.
pub async fn notes_are_kept_while_their_message_waits(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let Ok(inbox) = log.inbox() else { return };
    let (mailbox, m) = (Mailbox::Inbox(group()), messages(3));
    let parked = NewRecord::new(m[2].clone()).placed(Placement::Parked {
        after: LONG,
        attempts: 1,
        errors: Vec::new(),
    });
    log.store().append(&mailbox, &[parked]).await.unwrap();
    for message in &m {
        let is_written = inbox.write_note(None, &group(), message.id(), 0, "begun").await;
        assert!(is_written.unwrap());
    }
    let purge = |age| Purge::new(mailbox.clone(), 1).receipts_after(age);
    assert_eq!(log.store().purge(&purge(LONG)).await.unwrap(), 0);
    fixture.advance(SHORT * 2).await;
    for removed in [1, 1, 0] {
        assert_eq!(log.store().purge(&purge(SHORT)).await.unwrap(), removed);
    }
    let mut kept = Vec::new();
    for message in &m {
        kept.push(inbox.note(None, &group(), message.id()).await.unwrap().is_some());
    }
    assert_eq!(kept, [false, false, true]);
}

/// What was written since the savepoint is undone, and the transaction goes on.
pub async fn a_savepoint_undoes_a_part(fixture: &dyn LogFixture) {
    let log = fixture.log();
    let (Ok(inbox), Ok(transactions)) = (log.inbox(), log.transactions()) else {
        return;
    };
    let m = messages(6);
    let outbox = Mailbox::outbox();
    let mut tx = transactions.begin().await.unwrap();
    admit(inbox, &mut tx, &[&m[0]]).await;
    tx.savepoint(Savepoint::Set).await.unwrap();
    admit(inbox, &mut tx, &[&m[1]]).await;
    tx.savepoint(Savepoint::Release).await.unwrap();
    tx.savepoint(Savepoint::Set).await.unwrap();
    admit(inbox, &mut tx, &[&m[2]]).await;
    let record = NewRecord::new(m[2].clone());
    transactions.append_in(tx.lend(), &outbox, &[record]).await.unwrap();
    tx.savepoint(Savepoint::Return).await.unwrap();
    tx.savepoint(Savepoint::Set).await.unwrap();
    admit(inbox, &mut tx, &[&m[3]]).await;
    tx.savepoint(Savepoint::Return).await.unwrap();
    let record = NewRecord::new(m[4].clone());
    transactions.append_in(tx.lend(), &outbox, &[record]).await.unwrap();
    tx.commit().await.unwrap();
    let mut tx = transactions.begin().await.unwrap();
    let answers = admit(inbox, &mut tx, &[&m[0], &m[1], &m[2], &m[3]]).await;
    assert_eq!(answers, [Duplicate, Duplicate, New, New]);
    tx.rollback().await.unwrap();
    let options = SessionOptions::new(Owner::new()).with_lease(LONG);
    let desk = Desk::on(fixture, fixture.log(), options, outbox).await;
    let records = desk.take().await;
    let ids: Vec<_> = records.iter().map(|record| record.message.id()).collect();
    assert_eq!(ids, [m[4].id()]);
}
