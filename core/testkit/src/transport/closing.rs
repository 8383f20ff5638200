//! The end of a feed.

use super::{
    Member, TransportFixture,
    fixture::{name, names, publish},
};
use postrider_core::{Delivery, ErrorKind, Taken};
use std::{collections::BTreeSet, time::Duration};

const SOON: Duration = Duration::from_secs(5);

/// A feed closed while messages come and are settled loses none: what was not settled goes to the next member.
pub async fn concurrent_close_loses_nothing(fixture: &dyn TransportFixture) {
    let sent: Vec<String> = (0..200).map(|n| format!("k{}:{n}", n % 20)).collect();
    let mut closing = Member::join(fixture, "g").await;
    publish(fixture, &sent.iter().map(String::as_str).collect::<Vec<_>>()).await;
    let settling = closing.settling.clone();
    let mut acked = BTreeSet::new();
    let mut close = None;
    loop {
        match closing.next().await {
            Ok(Taken::Batch(mut taken)) => {
                let unfinished = taken.split_off(taken.len() / 2);
                let taken_names = names(&taken);
                let errors = closing
                    .settling
                    .settle(taken.into_iter().map(Delivery::ack).collect())
                    .await;
                // A settle that comes after the close is refused: then its messages come again.
                if errors.is_empty() {
                    acked.extend(taken_names);
                }
                if acked.len() >= 40 && close.is_none() {
                    let settling = settling.clone();
                    close = Some(tokio::spawn(async move { settling.close(SOON).await }));
                    tokio::task::yield_now().await;
                }
                drop(unfinished);
            }
            // The partition is let go once the broker has been told of all that came with it.
            Ok(_) => {
                closing.settling.settle(Vec::new()).await;
            }
            Err(error) => {
                assert_eq!(error.kind(), ErrorKind::Closed);
                break;
            }
        }
    }
    close.unwrap().await.unwrap().unwrap();
    drop(closing);
    let rest = Member::join(fixture, "g").await.drain().await;
    let all: BTreeSet<String> = acked.iter().cloned().chain(rest).collect();
    assert_eq!(all.len(), 200, "nothing is lost");
}

/// After a close nothing comes, which is an error of its own kind; a second close does nothing.
pub async fn a_closed_feed_says_so(fixture: &dyn TransportFixture) {
    let mut member = Member::join(fixture, "g").await;
    member.settling.close(SOON).await.unwrap();
    publish(fixture, &["1"]).await;
    assert_eq!(member.next().await.unwrap_err().kind(), ErrorKind::Closed);
    member.settling.close(SOON).await.unwrap();
}

/// A delivery whose member is gone cannot be settled any more, and settles nothing else.
pub async fn a_second_settle_is_an_error(fixture: &dyn TransportFixture) {
    let mut member = Member::join(fixture, "g").await;
    publish(fixture, &["1", "2"]).await;
    let taken = member.take(2).await;
    assert_eq!(taken.len(), 2);
    member.settling.close(SOON).await.unwrap();
    let errors = member
        .settling
        .settle(taken.into_iter().map(Delivery::ack).collect())
        .await;
    assert_eq!(errors.len(), 2, "{errors:?}");
    let mut next = Member::join(fixture, "g").await;
    let back = next.take(2).await;
    let mut got: Vec<String> = back.iter().map(|d| name(d.message())).collect();
    got.sort();
    assert_eq!(got, ["1", "2"]);
    next.settle(back.into_iter().map(Delivery::ack).collect()).await;
}
