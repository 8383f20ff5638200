use super::Bus;
use crate::Result;
use futures_util::future::BoxFuture;
use std::fmt;
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
    pub(super) async fn run(self, ctx: TaskContext, kill: CancellationToken) {
        let name = self.name;
        match kill.run_until_cancelled((self.run)(ctx)).await {
            Some(Ok(())) => tracing::debug!(task = name, "a background task has ended"),
            Some(Err(error)) => tracing::error!(task = name, error = error.to_chain(), "a background task has failed"),
            None => tracing::warn!(
                task = name,
                "a background task was cut off by the deadline of the shutdown"
            ),
        }
    }
}

impl fmt::Debug for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Task({})", self.name)
    }
}
