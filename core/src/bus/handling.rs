//! A mark around handlers that run in a transaction of the event log, so that publishing beside it is told from publishing in it.

use super::Bus;
use crate::{Error, ErrorKind, Result};
use std::sync::Arc;

tokio::task_local! {
    /// The bus whose transaction the handler of this task runs in.
    static IN_TRANSACTION: usize;
}

impl Bus {
    fn mark(&self) -> usize {
        Arc::as_ptr(&self.0).addr()
    }

    /// Runs handlers inside a transaction of this bus's log.
    pub(crate) async fn in_transaction<T>(&self, run: impl Future<Output = T> + Send) -> T {
        IN_TRANSACTION.scope(self.mark(), run).await
    }

    /// Refuses what would begin another transaction beside that of the handler: on SQLite it waits for the handler's own write
    /// lock, and elsewhere it is committed though the handler fails.
    pub(super) fn not_beside_a_transaction(&self, what: &'static str) -> Result<()> {
        match IN_TRANSACTION.try_with(|mark| *mark == self.mark()) {
            Ok(true) => {
                let text = "this would be a transaction of its own beside the one that the handler runs in: use \
                            `ctx.publish(…)` or `ctx.tx()` for what is committed with the handler, or `publish_direct` for \
                            what is sent at once";
                Err(Error::new(ErrorKind::WrongTransaction, text).with("called", what))
            }
            _ => Ok(()),
        }
    }
}
