//! Tables change under a program that lives on: a failover to a standby that is behind, a restore, a test that empties them.

use crate::fixture::{LONG, PostgresFixture, claim, done, drain, names, options, record};
use postrider_core::{
    GroupName, Mailbox, MessageId,
    log::{Admission, Arrival, EventLogStore as _, InboxLog as _, Session, TransactionalLog as _},
};
use postrider_testkit::run;
use std::time::{Duration, Instant};

/// Drains until so many came, for as long as a lease may take to be missed.
async fn drain_all(session: &dyn Session, count: usize) -> Vec<String> {
    let (mut all, began) = (Vec::new(), Instant::now());
    while all.len() < count && began.elapsed() < Duration::from_secs(10) {
        let records = claim(session).await.records;
        let lost = done(session, &records).await.lost;
        all.extend(names(
            &records
                .into_iter()
                .filter(|r| !lost.contains(&r.tag))
                .collect::<Vec<_>>(),
        ));
        session.wait(Duration::from_millis(100)).await.unwrap();
    }
    all.extend(drain(session).await);
    all.sort();
    all
}

const DAMAGES: [&str; 5] = [
    "TRUNCATE {mailbox}, {lane}, {relay}, {event}, {parked}, {scheduled}, {receipt}, {note} RESTART IDENTITY",
    "TRUNCATE {mailbox}, {event}",
    "DELETE FROM {mailbox}",
    // The ids are others' now.
    "UPDATE {mailbox} SET name = name || '2'",
    "TRUNCATE {lane}, {relay}",
];

#[test]
fn a_mailbox_that_is_gone_comes_into_being_again() {
    run(async {
        for damage in DAMAGES {
            let fixture = PostgresFixture::new().await;
            let log = fixture.handle().await;
            let group = GroupName::new("billing");
            let mailboxes = [Mailbox::outbox(), Mailbox::Inbox(group.clone())];
            let mut sessions = Vec::new();
            for mailbox in &mailboxes {
                let session = log.open(mailbox, &options(Duration::from_secs(1))).await.unwrap();
                log.append(mailbox, &[record(Some("k"), "before")]).await.unwrap();
                assert_eq!(drain(&*session).await, ["before"]);
                sessions.push(session);
            }
            fixture.sql(damage).await;
            for mailbox in &mailboxes {
                let many: Vec<_> = (0..5).map(|n| record(Some("k"), &n.to_string())).collect();
                log.append(mailbox, &many[..1]).await.unwrap();
                log.append(mailbox, &many[1..]).await.unwrap();
                let mut tx = log.begin().await.unwrap();
                log.append_in(tx.lend(), mailbox, &[record(None, "5")]).await.unwrap();
                tx.commit().await.unwrap();
                log.append(mailbox, &[record(None, "6").after(Duration::from_millis(10))])
                    .await
                    .unwrap();
            }
            // Receipts and notes find their mailbox too.
            let arrival = [Arrival::new(&record(None, "x").message)];
            for expected in [Admission::New, Admission::Duplicate] {
                let mut tx = log.begin().await.unwrap();
                assert_eq!(
                    log.admit(tx.lend(), &group, &arrival).await.unwrap(),
                    [expected],
                    "{damage}"
                );
                tx.commit().await.unwrap();
            }
            assert_eq!(log.look(&group, &arrival).await.unwrap(), [Admission::Duplicate]);
            assert!(log.write_note(None, &group, MessageId::new(), 0, "x").await.unwrap());
            for (session, mailbox) in sessions.iter().zip(&mailboxes) {
                let found = drain_all(&**session, 7).await;
                assert_eq!(found, ["0", "1", "2", "3", "4", "5", "6"], "{damage}: {mailbox}");
            }
        }
    });
}

#[test]
fn a_group_that_was_never_opened_takes_receipts_and_notes() {
    run(async {
        let fixture = PostgresFixture::new().await;
        let group = GroupName::new("new");
        let id = MessageId::new();
        assert_eq!(fixture.log.note(None, &group, id).await.unwrap(), None);
        assert!(fixture.log.write_note(None, &group, id, 0, "x").await.unwrap());
        assert!(!fixture.log.write_note(None, &group, id, 0, "y").await.unwrap());
        let session = fixture.log.open(&Mailbox::Inbox(group), &options(LONG)).await.unwrap();
        assert!(claim(&*session).await.records.is_empty());
    });
}
