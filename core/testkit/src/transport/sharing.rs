//! Members that come and go.
#![allow(clippy::print_stdout)]

use super::{TransportFixture, join, send};
use postrider_core::{Assignment, Delivery, Intake, Message, Settling, Subscription, Taken};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long members may take to share anew.
const CONVERGES: Duration = Duration::from_secs(30);
/// As many as any test's transport has partitions, several times over.
const KEYS: usize = 200;

/// What a member got: keys, and what they came with.
type Got = Arc<Mutex<Vec<(String, Assignment)>>>;

/// A member that acknowledges what comes, and notes it.
struct Sharing {
    settling: Settling,
    task: tokio::task::JoinHandle<()>,
    got: Got,
}

impl Sharing {
    async fn join(fixture: &dyn TransportFixture) -> Self {
        let subscription = Subscription::new(fixture.group("g"), vec![fixture.topic("t")]);
        let (intake, settling) = join(&fixture.transport(), &subscription).await;
        let got = Got::default();
        let task = tokio::spawn(Self::work(intake, settling.clone(), got.clone()));
        Self { settling, task, got }
    }

    async fn work(mut intake: Intake, settling: Settling, got: Got) {
        loop {
            match intake.next(20).await {
                Ok(Taken::Batch(batch)) => {
                    let noted = batch.iter().map(|delivery| {
                        let key = delivery.message().key().unwrap_or_default().to_owned();
                        (key, delivery.assignment())
                    });
                    got.lock().unwrap_or_else(PoisonError::into_inner).extend(noted);
                    settling.settle(batch.into_iter().map(Delivery::ack).collect()).await;
                }
                Ok(_) => {
                    settling.settle(Vec::new()).await;
                }
                Err(_) => return,
            }
        }
    }

    fn got(&self) -> Vec<(String, Assignment)> {
        self.got.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// Sends a message of each key, and gives what each member got of them.
async fn round(fixture: &dyn TransportFixture, members: &[Sharing], keys: &[String]) -> Vec<Vec<(String, Assignment)>> {
    for member in members {
        member.got.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }
    let message = |key: &String| {
        Message::new(fixture.topic("t"), "test.v1", "x")
            .with_source("kit")
            .with_key(key.clone())
    };
    send(&fixture.transport(), &keys.iter().map(message).collect::<Vec<_>>()).await;
    let until = Instant::now() + Duration::from_secs(5);
    let all = || members.iter().map(Sharing::got).collect::<Vec<_>>();
    while all().iter().map(Vec::len).sum::<usize>() < keys.len() && Instant::now() < until {
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    all()
}

/// So many partitions shared as evenly as can be, most first.
fn even(partitions: usize, members: usize) -> Vec<usize> {
    (0..members)
        .map(|member| partitions / members + usize::from(member < partitions % members))
        .collect()
}

/// From one member to four and more, and back, each gets its part of the partitions, soon.
pub async fn members_share_the_partitions(fixture: &dyn TransportFixture) {
    let mut members = vec![Sharing::join(fixture).await];
    // One key of each partition: they come with another assignment each.
    let keys: Vec<String> = (0..KEYS).map(|n| format!("k{n}")).collect();
    let began = Instant::now();
    let of_each = loop {
        let got = round(fixture, &members, &keys).await.remove(0);
        let of_each: BTreeMap<Assignment, String> = got.iter().cloned().map(|(key, of)| (of, key)).collect();
        if got.len() == KEYS {
            break of_each;
        }
        assert!(began.elapsed() < CONVERGES, "{} of {KEYS} keys came", got.len());
    };
    let keys: Vec<String> = of_each.into_values().collect();
    let mut sizes: Vec<usize> = (1..=5.min(keys.len())).collect();
    sizes.extend((1..sizes.len()).rev());
    for size in sizes {
        while members.len() < size {
            members.push(Sharing::join(fixture).await);
        }
        while members.len() > size {
            let leaving = members.remove(0);
            leaving.settling.close(Duration::from_secs(10)).await.expect("a close");
            leaving.task.await.expect("its end");
        }
        let (began, wanted) = (Instant::now(), even(keys.len(), size));
        loop {
            let mut parts: Vec<usize> = round(fixture, &members, &keys).await.iter().map(Vec::len).collect();
            parts.sort_unstable_by(|a, b| b.cmp(a));
            if parts == wanted {
                break;
            }
            assert!(began.elapsed() < CONVERGES, "{parts:?} in place of {wanted:?}");
        }
        println!("{wanted:?} after {:?}", began.elapsed());
    }
    for member in members {
        member.settling.close(Duration::from_secs(10)).await.expect("a close");
    }
}
