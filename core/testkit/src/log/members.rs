//! What the members of a group know of each other.

use super::{
    LogFixture,
    fixture::{LONG, SHORT},
};
use postrider_core::{
    GroupName,
    log::{GroupMember, InboxLog, Owner, RegisteredMember},
};
use std::{sync::Arc, time::Duration};

fn member(owner: Owner, types: &[&str]) -> GroupMember {
    GroupMember::new(owner, types.iter().copied(), ["orders.*", "payments"])
}

async fn members(inbox: &Arc<dyn InboxLog>, group: &GroupName) -> Vec<RegisteredMember> {
    inbox.members(group, LONG).await.unwrap()
}

/// A registration is seen by every handle as soon as it returns, is renewed by another one, and expires.
pub async fn members_know_each_other(fixture: &dyn LogFixture) {
    let (log, other) = (fixture.log(), fixture.other().await);
    let (Ok(inbox), Ok(elsewhere)) = (log.inbox(), other.inbox()) else {
        return;
    };
    let (group, another) = (GroupName::new("billing"), GroupName::new("shipping"));
    let (old, new) = (Owner::new(), Owner::new());
    assert_eq!(
        members(inbox, &group).await,
        [],
        "a group that does not exist has no members"
    );
    inbox
        .register(&group, &member(old, &["placed.v1"]), LONG)
        .await
        .unwrap();
    let seen = members(elsewhere, &group).await;
    assert_eq!(seen.len(), 1);
    assert_eq!(seen[0].member, member(old, &["placed.v1"]));
    fixture.advance(SHORT * 3).await;
    // The second one, in another group and in this.
    elsewhere
        .register(&another, &member(new, &["sent.v1"]), LONG)
        .await
        .unwrap();
    elsewhere.register(&group, &member(new, &[]), LONG).await.unwrap();
    let seen = members(inbox, &group).await;
    let owners: Vec<Owner> = seen.iter().map(|member| member.member.owner).collect();
    assert_eq!(owners, [old, new], "the oldest first");
    assert!(
        seen[0].unseen_for >= SHORT * 2 && seen[1].unseen_for < SHORT * 2,
        "{seen:?}"
    );
    assert!(seen[1].member.types.is_empty());
    assert_eq!(members(inbox, &another).await.len(), 1, "groups are apart");
    // Registering again replaces what it handles, and keeps when it came.
    let renewed = GroupMember::new(old, ["placed.v1", "placed.v2 \"{ä}'"], ["a", "b"]);
    inbox.register(&group, &renewed, LONG).await.unwrap();
    let seen = members(elsewhere, &group).await;
    assert_eq!((seen.len(), &seen[0].member), (2, &renewed));
    assert!(
        seen[0].registered_for >= SHORT * 2 && seen[0].unseen_for < SHORT * 2,
        "{seen:?}"
    );
    // Who is unseen for longer than the retention is not listed, and forgotten at the next registration.
    fixture.advance(SHORT * 10).await;
    assert_eq!(inbox.members(&group, SHORT * 5).await.unwrap(), []);
    assert_eq!(
        members(inbox, &group).await.len(),
        2,
        "asked for longer, they are still there"
    );
    inbox
        .register(&group, &member(new, &["x.v1"]), SHORT * 5)
        .await
        .unwrap();
    let seen = members(elsewhere, &group).await;
    assert_eq!((seen.len(), seen[0].member.owner), (1, new));
    assert!(seen[0].registered_for < SHORT * 5, "it starts anew: {seen:?}");
    assert_eq!(members(inbox, &another).await.len(), 1, "other groups keep theirs");
    // For ever is a retention, too.
    inbox.register(&group, &member(old, &[]), Duration::MAX).await.unwrap();
    assert_eq!(inbox.members(&group, Duration::MAX).await.unwrap().len(), 2);
    // Many at once.
    let mut many = tokio::task::JoinSet::new();
    for n in 0..20 {
        let (inbox, group) = (if n % 2 == 0 { inbox } else { elsewhere }.clone(), group.clone());
        many.spawn(async move {
            let owner = Owner::new();
            for _ in 0..3 {
                inbox.register(&group, &member(owner, &["y.v1"]), LONG).await.unwrap();
            }
            let seen = members(&inbox, &group).await;
            assert!(seen.iter().any(|member| member.member.owner == owner));
        });
    }
    many.join_all().await;
    assert_eq!(members(elsewhere, &group).await.len(), 22);
}
