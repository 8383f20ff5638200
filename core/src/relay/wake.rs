use std::sync::atomic::{AtomicBool, Ordering};
use tokio::sync::Notify;

/// How the bus wakes a relay of this process.
#[derive(Debug, Default)]
pub(crate) struct Wake {
    notify: Notify,
    commit_to_come: AtomicBool,
}

impl Wake {
    /// Something has been committed.
    pub(crate) fn committed(&self) {
        self.notify.notify_one();
    }

    /// Something has been appended in a transaction whose commit nobody will tell of: poll quickly for a while.
    pub(crate) fn commit_to_come(&self) {
        self.commit_to_come.store(true, Ordering::Release);
        self.notify.notify_one();
    }

    /// Waits for either; `true` if a commit is still to come. Cancel-safe.
    pub(super) async fn called(&self) -> bool {
        self.notify.notified().await;
        self.commit_to_come.swap(false, Ordering::AcqRel)
    }
}
