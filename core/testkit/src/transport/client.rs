//! What a transport's own tests do with it, in few words.

use postrider_core::{
    Delivery, Intake, Message, Outcomes, Publisher as _, PublisherExt as _, Settling, Subscription, Taken, Transport,
    publisher::Outcome,
};
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// Joins a group.
pub async fn join(transport: &Transport, subscription: &Subscription) -> (Intake, Settling) {
    let subscriber = transport.subscriber(subscription).expect("a subscriber");
    subscriber.subscribe(subscription).await.expect("a feed").split()
}

/// Publishes all of these.
pub async fn send(transport: &Transport, batch: &[Message]) {
    for outcome in transport.publisher().expect("a publisher").publish_all(batch).await {
        outcome.expect("published");
    }
}

/// Publishes these in one call: the outcomes, and the positions in the order in which they were reported.
pub async fn send_reported(transport: &Transport, batch: &[Message]) -> (Vec<Outcome>, Vec<usize>) {
    let reported: Arc<Mutex<Vec<(usize, Outcome)>>> = Arc::default();
    let list = reported.clone();
    let outcomes = Outcomes::listened_to(batch.len(), move |at, outcome| {
        list.lock().expect("no panic").push((at, outcome));
    });
    let publisher = transport.publisher().expect("a publisher");
    publisher.publish(batch, &outcomes).await;
    let mut all = reported.lock().expect("no panic").clone();
    let order = all.iter().map(|(at, _)| *at).collect();
    all.sort_by_key(|(at, _)| *at);
    (all.into_iter().map(|(_, outcome)| outcome).collect(), order)
}

/// `count` deliveries, or what has come within `limit`.
pub async fn take(intake: &mut Intake, count: usize, limit: Duration) -> Vec<Delivery> {
    let until = Instant::now() + limit;
    let mut taken = Vec::new();
    while taken.len() < count {
        let left = until.saturating_duration_since(Instant::now());
        match tokio::time::timeout(left, intake.next(count - taken.len())).await {
            Ok(Ok(Taken::Batch(batch))) => taken.extend(batch),
            // The broker is away, and was told to be, or a partition goes.
            Ok(Ok(_)) => {}
            Ok(Err(_)) => tokio::time::sleep(Duration::from_millis(20)).await,
            Err(_) => break,
        }
    }
    taken
}

/// The payload of a delivery, as text.
#[must_use]
pub fn text(delivery: &Delivery) -> String {
    String::from_utf8_lossy(delivery.message().payload()).into_owned()
}
