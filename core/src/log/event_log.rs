use super::{EventLogStore, InboxLog, LogAdmin, LogSchema, TransactionalLog};
use crate::{Error, ErrorKind, Result};
use std::{fmt, sync::Arc};

/// What a log can do, told honestly: what is not declared is refused before it is tried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct LogCapabilities {
    /// Keeps the order of each (topic, key).
    pub order_by_key: bool,
    /// Takes records that are due later.
    pub scheduling: bool,
    /// Keeps what succeeded, while the retention lasts.
    pub history: bool,
    /// Has two transactions that write open side by side. Without it, a second one that a handler begins beside its own waits
    /// for ever, so it is refused.
    pub concurrent_writers: bool,
}

impl LogCapabilities {
    /// Everything there is.
    #[must_use]
    pub const fn all() -> Self {
        Self {
            order_by_key: true,
            scheduling: true,
            history: true,
            concurrent_writers: true,
        }
    }
    /// Sets whether it keeps the order of a key.
    #[must_use]
    pub const fn with_order_by_key(mut self, yes: bool) -> Self {
        self.order_by_key = yes;
        self
    }
    /// Sets whether it takes records that are due later.
    #[must_use]
    pub const fn with_scheduling(mut self, yes: bool) -> Self {
        self.scheduling = yes;
        self
    }
    /// Sets whether two transactions that write can be open side by side.
    #[must_use]
    pub const fn with_concurrent_writers(mut self, yes: bool) -> Self {
        self.concurrent_writers = yes;
        self
    }
    /// Sets whether it keeps what succeeded.
    #[must_use]
    pub const fn with_history(mut self, yes: bool) -> Self {
        self.history = yes;
        self
    }
}

/// A log as a bus holds it: the required part, the optional ones it has, and what it can do. The twin of
/// [`Transport`](crate::Transport).
///
/// An optional part that is missing is one [`ErrorKind::Unsupported`], raised here; so a wrapper around one part
/// forwards nothing of the others.
#[derive(Clone)]
pub struct EventLog {
    name: &'static str,
    store: Arc<dyn EventLogStore>,
    transactions: Option<Arc<dyn TransactionalLog>>,
    admin: Option<Arc<dyn LogAdmin>>,
    inbox: Option<Arc<dyn InboxLog>>,
    schema: Option<Arc<dyn LogSchema>>,
    capabilities: LogCapabilities,
}

impl EventLog {
    /// A log called `name` (its Cargo feature and configuration kind) with the required part only.
    #[must_use]
    pub fn new(name: &'static str, store: impl EventLogStore, capabilities: LogCapabilities) -> Self {
        Self {
            name,
            store: Arc::new(store),
            transactions: None,
            admin: None,
            inbox: None,
            schema: None,
            capabilities,
        }
    }

    /// Adds the part that writes in transactions.
    #[must_use]
    pub fn with_transactions(mut self, part: impl TransactionalLog) -> Self {
        self.transactions = Some(Arc::new(part));
        self
    }

    /// Adds the administration.
    #[must_use]
    pub fn with_admin(mut self, part: impl LogAdmin) -> Self {
        self.admin = Some(Arc::new(part));
        self
    }

    /// Adds the inbox.
    #[must_use]
    pub fn with_inbox(mut self, part: impl InboxLog) -> Self {
        self.inbox = Some(Arc::new(part));
        self
    }

    /// Adds the tables' part.
    #[must_use]
    pub fn with_schema(mut self, part: impl LogSchema) -> Self {
        self.schema = Some(Arc::new(part));
        self
    }

    /// Wraps the store, to meter it or to inject faults, and leaves the other parts as they are.
    #[must_use]
    pub fn map_store<S: EventLogStore>(mut self, wrap: impl FnOnce(Arc<dyn EventLogStore>) -> S) -> Self {
        self.store = Arc::new(wrap(self.store));
        self
    }

    /// What it is called.
    #[must_use]
    pub fn name(&self) -> &'static str {
        self.name
    }

    /// The required part.
    #[must_use]
    pub fn store(&self) -> &Arc<dyn EventLogStore> {
        &self.store
    }

    /// The part that writes in transactions.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if this log has none.
    pub fn transactions(&self) -> Result<&Arc<dyn TransactionalLog>> {
        self.transactions.as_ref().ok_or_else(|| self.lacks("transactions"))
    }

    /// The administration.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if this log has none.
    pub fn admin(&self) -> Result<&Arc<dyn LogAdmin>> {
        self.admin.as_ref().ok_or_else(|| self.lacks("administration"))
    }

    /// The inbox.
    ///
    /// # Errors
    /// [`ErrorKind::Unsupported`] if this log has none.
    pub fn inbox(&self) -> Result<&Arc<dyn InboxLog>> {
        self.inbox.as_ref().ok_or_else(|| self.lacks("inbox"))
    }

    /// The tables, where this log has any to be made.
    #[must_use]
    pub fn schema(&self) -> Option<&Arc<dyn LogSchema>> {
        self.schema.as_ref()
    }

    /// What it can do.
    #[must_use]
    pub fn capabilities(&self) -> &LogCapabilities {
        &self.capabilities
    }

    pub(crate) fn lacks(&self, what: &'static str) -> Error {
        Error::new(ErrorKind::Unsupported, "this event log does not offer this")
            .with("missing", what)
            .with("log", self.name)
    }
}

impl fmt::Debug for EventLog {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("EventLog")
            .field("name", &self.name)
            .field("transactions", &self.transactions.is_some())
            .field("admin", &self.admin.is_some())
            .field("inbox", &self.inbox.is_some())
            .field("schema", &self.schema.is_some())
            .field("capabilities", &self.capabilities)
            .finish_non_exhaustive()
    }
}
