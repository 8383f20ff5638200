//! Publishing: calls go to one task, which has one connection after another.

mod link;

use crate::{connection::Broker, wire::Copied};
use async_trait::async_trait;
use link::Link;
use postrider_core::{Error, ErrorKind, Message, Outcomes, PublishError, Publisher, Reachability, publisher::Outcome};
use std::sync::{Arc, Mutex, PoisonError};
use tokio::sync::{mpsc, oneshot};

/// Calls that may wait for the task.
const CALLS: usize = 1024;

/// The sending side. Clones share one connection, which is made when it is first used.
#[derive(Debug, Clone)]
pub(crate) struct RabbitMqPublisher {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    broker: Broker,
    /// To the task, which may end with the runtime that it was started on.
    jobs: Mutex<Option<mpsc::Sender<Job>>>,
}

/// A call. Dropped unanswered, it ends without outcomes.
struct Job {
    work: Work,
    outcomes: Outcomes,
    open: oneshot::Sender<()>,
}

enum Work {
    /// To the exchange.
    Messages(Vec<Message>),
    /// To a queue, as something else than the message.
    Copy(Box<(Message, String, Copied)>),
    /// Nothing, to the exchange under this routing key, gone at once: whether it is bound.
    Probe(String),
    /// Nothing: whether there is a connection.
    Check,
}

impl Work {
    fn len(&self) -> usize {
        match self {
            Self::Messages(messages) => messages.len(),
            Self::Copy(_) | Self::Probe(_) | Self::Check => 1,
        }
    }
}

impl RabbitMqPublisher {
    pub(crate) fn new(broker: Broker) -> Self {
        Self {
            shared: Arc::new(Shared {
                broker,
                jobs: Mutex::default(),
            }),
        }
    }

    /// Works on a call until all of its messages have their outcomes, or the task has ended.
    async fn run(&self, work: Work, outcomes: &Outcomes) {
        let jobs = {
            let mut jobs = self.shared.jobs.lock().unwrap_or_else(PoisonError::into_inner);
            match &*jobs {
                Some(jobs) if !jobs.is_closed() => jobs.clone(),
                _ => {
                    let (sender, receiver) = mpsc::channel(CALLS);
                    tokio::spawn(drive(self.shared.broker.clone(), receiver));
                    jobs.insert(sender).clone()
                }
            }
        };
        let (open, ended) = oneshot::channel();
        let outcomes_of_job = outcomes.clone();
        let job = Job {
            work,
            outcomes: outcomes_of_job,
            open,
        };
        if jobs.send(job).await.is_ok() {
            // Nothing is sent: it is dropped.
            let _ = ended.await;
        }
        // The runtime it was started on has ended.
        outcomes.report_rest(Err(PublishError::connection("the publishing task has ended")));
    }

    /// Whether anything is bound to the exchange under this routing key: `Ok`, or unroutable.
    pub(crate) async fn probe(&self, routing_key: String) -> Outcome {
        let work = Work::Probe(routing_key);
        Outcomes::of_one(|outcomes| async move { self.run(work, &outcomes).await }).await
    }

    /// Publishes a copy to a queue. `Ok` once it is stored there.
    pub(crate) async fn copy(&self, message: Message, queue: String, copied: Copied) -> Outcome {
        let work = Work::Copy(Box::new((message, queue, copied)));
        Outcomes::of_one(|outcomes| async move { self.run(work, &outcomes).await }).await
    }
}

#[async_trait]
impl Publisher for RabbitMqPublisher {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        if !batch.is_empty() {
            self.run(Work::Messages(batch.to_vec()), outcomes).await;
        }
    }

    async fn check(&self) -> Reachability {
        let checked = Outcomes::of_one(|outcomes| async move { self.run(Work::Check, &outcomes).await });
        match checked.await {
            Err(error) => Reachability::Down(error),
            Ok(()) => Reachability::Up,
        }
    }
}

/// Rights that are missing and things that are declared otherwise are no outage: waiting for the broker does not help.
fn unavailable(error: Error) -> PublishError {
    match error.kind() {
        ErrorKind::Config => PublishError::destination(error),
        _ => PublishError::connection(error),
    }
}

/// The task: one connection after another, each made for a call that needs it.
async fn drive(broker: Broker, mut jobs: mpsc::Receiver<Job>) {
    while let Some(job) = jobs.recv().await {
        match Link::open(&broker).await {
            Ok(link) => link.serve(job, &mut jobs).await,
            Err(error) => {
                let error = unavailable(error);
                // Those who called meanwhile need not wait for a try of their own.
                let waiting = std::iter::from_fn(|| jobs.try_recv().ok());
                for job in std::iter::once(job).chain(waiting) {
                    job.outcomes.report_rest(Err(error.clone()));
                }
            }
        }
    }
}
