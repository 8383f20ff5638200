use super::Bus;
use crate::{
    Result,
    health::{PartState, Status, Trouble},
    supervise,
};
use futures_util::future::BoxFuture;
use std::{fmt, sync::Arc};
use tokio_util::sync::CancellationToken;

/// What a background task gets.
#[derive(Debug, Clone)]
pub struct TaskContext {
    /// The bus it belongs to.
    pub bus: Bus,
    /// Cancelled when the bus shuts down: the task should then come to its end before the deadline.
    pub stop: CancellationToken,
}

type Run = Box<dyn FnOnce(TaskContext) -> BoxFuture<'static, Result<()>> + Send>;

/// A task of the application's, started and stopped with the bus.
pub(super) struct Task {
    name: String,
    run: Run,
}

impl Task {
    pub(super) fn new<F, Fut>(name: String, run: F) -> Self
    where
        F: FnOnce(TaskContext) -> Fut + Send + 'static,
        Fut: Future<Output = Result<()>> + Send + 'static,
    {
        Self {
            name,
            run: Box::new(move |ctx| Box::pin(run(ctx))),
        }
    }

    /// Runs it to its end, or until `kill`.
    pub(super) async fn run(self, ctx: TaskContext, kill: CancellationToken, status: Arc<Status>) {
        let name = self.name;
        let run = async { kill.run_until_cancelled((self.run)(ctx)).await };
        // It is not run again: what a second run would do is for the application to say.
        match supervise::once(&status, run).await {
            None => return,
            Some(Some(Ok(()))) => tracing::debug!(task = name, "a background task has ended"),
            Some(Some(Err(error))) => {
                tracing::error!(task = name, error = error.to_chain(), "a background task has failed");
                status.raise(Trouble::Crash, PartState::Failed, error.to_chain(), None);
                return;
            }
            Some(None) => tracing::warn!(
                task = name,
                "a background task was cut off by the deadline of the shutdown"
            ),
        }
        status.is(PartState::Stopped);
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Task({})", self.name)
    }
}
