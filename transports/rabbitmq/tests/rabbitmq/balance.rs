use crate::fixture::{Fixture, join};
use postrider_core::{Intake, Settling, Taken, Transport};
use postrider_testkit::run;
use std::{
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

/// A member that takes what comes, and counts the partitions it has by the messages it gets.
struct Member {
    settling: Settling,
    task: tokio::task::JoinHandle<()>,
    got: Arc<Mutex<Vec<String>>>,
}

impl Member {
    async fn join(fixture: &Fixture, transport: &Transport) -> Self {
        let (intake, settling) = join(transport, &fixture.ordered()).await;
        let got = Arc::new(Mutex::new(Vec::new()));
        let task = tokio::spawn(Self::work(intake, settling.clone(), got.clone()));
        Self { settling, task, got }
    }

    async fn work(mut intake: Intake, settling: Settling, got: Arc<Mutex<Vec<String>>>) {
        loop {
            match intake.next(20).await {
                Ok(Taken::Batch(batch)) => {
                    let keys = batch
                        .iter()
                        .map(|delivery| delivery.message().key().unwrap_or_default().to_owned());
                    got.lock().unwrap().extend(keys);
                    settling
                        .settle(batch.into_iter().map(postrider_core::Delivery::ack).collect())
                        .await;
                }
                Ok(_) => {}
                Err(_) => return,
            }
        }
    }
}

/// One key for each partition.
fn keys() -> Vec<String> {
    let partition = |key: &str| {
        usize::from(postrider_core::partition::slot_of(
            Some(key),
            postrider_core::MessageId::new(),
        )) * 8
            / 64
    };
    (0..8)
        .map(|wanted| {
            (0..)
                .map(|n| format!("k{n}"))
                .find(|key| partition(key) == wanted)
                .unwrap()
        })
        .collect()
}

/// How many partitions each member has, most first, as messages to all of them show.
async fn parts(fixture: &Fixture, transport: &Transport, members: &[Member]) -> Vec<usize> {
    for member in members {
        member.got.lock().unwrap().clear();
    }
    let batch: Vec<_> = keys().iter().map(|key| fixture.message(Some(key), "x")).collect();
    for outcome in transport.publisher().unwrap().publish(&batch).await {
        outcome.unwrap();
    }
    let count = || {
        members
            .iter()
            .map(|member| member.got.lock().unwrap().len())
            .collect::<Vec<_>>()
    };
    let until = Instant::now() + Duration::from_secs(2);
    while count().iter().sum::<usize>() < 8 && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    let mut parts = count();
    parts.sort_unstable_by(|a, b| b.cmp(a));
    parts
}

async fn until(fixture: &Fixture, transport: &Transport, members: &[Member], wanted: &[usize]) {
    let began = Instant::now();
    loop {
        let found = parts(fixture, transport, members).await;
        if found == wanted {
            println!("{wanted:?} after {:?}", began.elapsed());
            return;
        }
        assert!(
            began.elapsed() < Duration::from_secs(30),
            "{found:?} instead of {wanted:?}"
        );
    }
}

#[test]
fn members_share_the_partitions_fairly_as_they_come_and_go() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let mut members = vec![Member::join(&fixture, &transport).await];
        until(&fixture, &transport, &members, &[8]).await;
        for wanted in [&[4, 4][..], &[3, 3, 2], &[2, 2, 2, 2]] {
            members.push(Member::join(&fixture, &transport).await);
            until(&fixture, &transport, &members, wanted).await;
        }
        for wanted in [&[3, 3, 2][..], &[4, 4], &[8]] {
            let leaving = members.remove(0);
            leaving.settling.close(Duration::from_secs(5)).await.unwrap();
            leaving.task.await.unwrap();
            until(&fixture, &transport, &members, wanted).await;
        }
    });
}
