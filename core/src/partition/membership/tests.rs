use super::*;
use crate::{Message, Topic};
use futures_util::FutureExt as _;

/// Hands out one message after another, and what is settled of it is said at once.
#[derive(Debug)]
struct Queue {
    assignment: Assignment,
    left: Mutex<u64>,
    is_leaving: AtomicBool,
    settled: Mutex<Vec<(u64, Disposition)>>,
}

impl Queue {
    fn of(messages: u64) -> Arc<Self> {
        Arc::new(Self {
            assignment: Assignment::fresh(),
            left: Mutex::new(messages),
            is_leaving: AtomicBool::new(false),
            settled: Mutex::default(),
        })
    }
}

#[async_trait]
impl Hold for Queue {
    fn assignment(&self) -> Assignment {
        self.assignment
    }
    fn leave(&self) -> bool {
        !self.is_leaving.swap(true, Ordering::AcqRel)
    }
    fn lose(&self) {
        self.leave();
    }
    async fn settle(&self, batch: &[(u64, Disposition)]) -> (Vec<Result<()>>, bool) {
        self.settled.lock().unwrap().extend_from_slice(batch);
        let is_released = batch.iter().any(|(_, said)| *said == Disposition::Release);
        (batch.iter().map(|_| Ok(())).collect(), is_released)
    }
}

#[derive(Debug)]
struct Holds(Arc<Membership<Queue>>);

impl Source for Holds {
    fn poll_take(&mut self, _: &mut Context<'_>, max: usize) -> Poll<Vec<Received>> {
        let mut batch = Vec::new();
        for hold in self.0.holds() {
            let mut left = hold.left.lock().unwrap();
            while batch.len() < max && *left > 0 && !hold.is_leaving.load(Ordering::Acquire) {
                batch.push(Received {
                    message: Message::new(Topic::new("t"), "e.v1", ""),
                    tag: DeliveryTag::of(hold.assignment, *left),
                    delivery_count: 1,
                    attempts: 0,
                    assignment: hold.assignment,
                });
                *left -= 1;
            }
        }
        match batch.is_empty() {
            true => Poll::Pending,
            false => Poll::Ready(batch),
        }
    }
}

/// Stores dead letters, and nothing else.
#[derive(Debug)]
struct DeadOnly;

#[async_trait]
impl Copies<Queue> for DeadOnly {
    async fn store(&self, _: &Queue, _: u64, disposition: Disposition) -> Result<()> {
        match disposition {
            Disposition::DeadLetter => Ok(()),
            _ => Err(Error::new(ErrorKind::Unsupported, "no retries")),
        }
    }
}

type Sides = (Taking<Queue, Holds>, Settling<Queue, DeadOnly>);

fn sides(membership: &Arc<Membership<Queue>>) -> Sides {
    let side = Arc::new(Side(membership.clone()));
    let taking = Taking {
        side: side.clone(),
        source: Some(Holds(membership.clone())),
    };
    (
        taking,
        Settling {
            side,
            copies: Arc::new(DeadOnly),
        },
    )
}

async fn batch(taking: &mut Taking<Queue, Holds>, max: usize) -> Vec<Received> {
    match taking.next(max).await {
        Ok(Incoming::Batch(batch)) => batch,
        other => panic!("{other:?}"),
    }
}

#[tokio::test]
async fn whoever_waits_hears_of_everything() {
    let (membership, working) = Membership::begin();
    let (mut taking, settling) = sides(&membership);
    assert!(taking.next(10).now_or_never().is_none());

    let queue = Queue::of(3);
    let (waiting, ()) = tokio::join!(batch(&mut taking, 2), async { membership.add(queue.clone()) });
    assert_eq!((waiting.len(), batch(&mut taking, 10).await.len()), (2, 1));

    // What is told comes before what is there, and once.
    *queue.left.lock().unwrap() = 1;
    membership.revoke(&queue);
    membership.revoke(&queue);
    membership.lose(&queue);
    let told = [taking.next(1).await, taking.next(1).await];
    let [Ok(Incoming::Revoked(revoked)), Ok(Incoming::Lost(lost))] = told else {
        panic!("{told:?}")
    };
    assert_eq!((revoked, lost), (queue.assignment, queue.assignment));

    membership.remove(queue.assignment);
    assert!(taking.next(10).now_or_never().is_none());

    // The task may end by itself.
    membership.tell(Err(Error::new(ErrorKind::Config, "refused")));
    let (refused, ()) = tokio::join!(taking.next(1), async { drop(working) });
    assert_eq!(refused.unwrap_err().kind(), ErrorKind::Config);
    assert_eq!(taking.next(1).await.unwrap_err().kind(), ErrorKind::Closed);
    settling.close(Duration::ZERO).await.unwrap();
}

#[tokio::test]
async fn a_task_that_panics_and_errors_nobody_heard_of_are_told_once() {
    let (membership, working) = Membership::begin();
    let (mut taking, _settling) = sides(&membership);
    membership.add(Queue::of(0));
    for n in 0..100 {
        membership.tell(Err(Error::new(ErrorKind::Unavailable, "away").with("try", n)));
    }
    let error = taking.next(1).await.unwrap_err();
    assert!(error.to_string().contains("99"), "{error}");
    assert!(taking.next(1).now_or_never().is_none());

    let task = tokio::spawn(async move {
        let _working = working;
        panic!("in a test");
    });
    assert!(task.await.is_err());
    assert_eq!(taking.next(1).await.unwrap_err().kind(), ErrorKind::Unexpected);
    assert!(matches!(taking.next(1).await, Ok(Incoming::Lost(_))));
    assert_eq!(taking.next(1).await.unwrap_err().kind(), ErrorKind::Closed);
}

#[tokio::test]
async fn what_cannot_be_copied_is_released() {
    let (membership, _working) = Membership::begin();
    let (mut taking, settling) = sides(&membership);
    let queue = Queue::of(3);
    membership.add(queue.clone());
    let tags: Vec<_> = batch(&mut taking, 10)
        .await
        .iter()
        .map(|received| received.tag)
        .collect();
    let retry = Disposition::Retry {
        after: Duration::ZERO,
        attempts: 1,
    };
    let strange = DeliveryTag::of(Assignment::fresh(), 1);
    let said = [
        (tags[0], Disposition::DeadLetter),
        (strange, Disposition::Ack),
        (tags[1], retry),
        (tags[2], Disposition::Ack),
    ];
    let outcomes = settling.settle(&said).await;
    let kinds: Vec<_> = outcomes
        .iter()
        .map(|outcome| outcome.as_ref().err().map(Error::kind))
        .collect();
    assert_eq!(
        kinds,
        [None, Some(ErrorKind::LeaseLost), Some(ErrorKind::Unsupported), None]
    );
    let settled = queue.settled.lock().unwrap().clone();
    assert_eq!(
        settled,
        [(3, Disposition::Ack), (2, Disposition::Release), (1, Disposition::Ack)]
    );
    // It was told to the task, and that the hold ends to whoever takes.
    membership.work().now_or_never().expect("work");
    assert!(matches!(taking.next(1).await, Ok(Incoming::Revoked(_))));
}

#[tokio::test]
async fn the_member_goes_with_both_sides_or_when_it_is_told() {
    let (membership, working) = Membership::begin();
    let (taking, settling) = sides(&membership);
    drop(taking);
    assert!(!membership.is_closing());
    let error = settling.close(Duration::from_millis(1)).await.unwrap_err();
    assert_eq!((error.kind(), membership.is_closing()), (ErrorKind::Unavailable, true));
    let (closed, ()) = tokio::join!(settling.close(Duration::from_secs(60)), async { drop(working) });
    closed.unwrap();

    let (membership, _working) = Membership::begin();
    drop(sides(&membership));
    assert!(membership.is_closing());
    membership.work().now_or_never().expect("work");
}
