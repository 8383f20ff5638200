//! The event log in memory.

mod admin;
mod inbox;
mod queue;
mod session;

use crate::{
    Error, ErrorKind, EventLog, Mailbox, Result,
    clock::{Clock, SystemClock, Timestamp},
    log::{
        EventLogStore, Lease, Lent, LogCapabilities, LogTransaction, NewRecord, Purge, Savepoint, Session,
        SessionOptions, TransactionOf, TransactionalLog,
    },
};
use async_trait::async_trait;
use queue::Queue;
use session::MemorySession;
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
};

/// An event log in memory: the reference implementation. Clones are handles on the same log.
///
/// ```
/// use postrider_core::{Bus, memory::{MemoryLog, MemoryTransport}};
/// let bus = Bus::builder().log(MemoryLog::new()).transport(MemoryTransport::new()).build();
/// # bus.unwrap();
/// ```
#[derive(Debug, Clone)]
pub struct MemoryLog {
    shared: Arc<Shared>,
}

#[derive(Debug)]
struct Shared {
    clock: Arc<dyn Clock>,
    queues: Arc<Mutex<BTreeMap<Mailbox, Arc<Queue>>>>,
}

impl MemoryLog {
    /// An empty log on the system's clock.
    #[must_use]
    pub fn new() -> Self {
        Self::on_clock(SystemClock::shared())
    }

    /// An empty log on another clock.
    #[must_use]
    pub fn on_clock(clock: Arc<dyn Clock>) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock,
                queues: Arc::default(),
            }),
        }
    }

    /// The same log as another process reaches it, whose clock stands still while that process does: for tests of what
    /// becomes of a lease then. The clocks have to show one time.
    #[must_use]
    pub fn reached_on(&self, clock: Arc<dyn Clock>) -> Self {
        Self {
            shared: Arc::new(Shared {
                clock,
                queues: self.shared.queues.clone(),
            }),
        }
    }

    /// Begins a transaction: what is appended in it appears with its commit.
    pub fn transaction(&self) -> MemoryTransaction {
        MemoryTransaction {
            log: self.clone(),
            connection: MemoryConnection::default(),
        }
    }

    fn queues(&self) -> MutexGuard<'_, BTreeMap<Mailbox, Arc<Queue>>> {
        locked(&self.shared.queues)
    }

    fn queue(&self, mailbox: &Mailbox) -> Arc<Queue> {
        let mut queues = self.queues();
        match queues.get(mailbox) {
            Some(queue) => queue.clone(),
            None => queues.entry(mailbox.clone()).or_default().clone(),
        }
    }

    fn now(&self) -> Timestamp {
        self.shared.clock.now()
    }

    fn append_now(&self, mailbox: &Mailbox, batch: &[NewRecord]) {
        let queue = self.queue(mailbox);
        queue.rows().append(batch, self.shared.clock.now());
        queue.tell();
    }
}

impl Default for MemoryLog {
    fn default() -> Self {
        Self::new()
    }
}

/// A panic elsewhere does not spoil the rows: every change is made in steps that cannot panic.
fn locked<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl From<MemoryLog> for EventLog {
    fn from(log: MemoryLog) -> Self {
        Self::new("memory", log.clone(), LogCapabilities::all())
            .with_transactions(log.clone())
            .with_inbox(log.clone())
            .with_admin(log)
    }
}

#[async_trait]
impl EventLogStore for MemoryLog {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        if !batch.is_empty() {
            self.append_now(mailbox, batch);
        }
        Ok(())
    }

    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        Lease::check(options.lease)?;
        let queue = self.queue(mailbox);
        Ok(Box::new(MemorySession::new(
            queue,
            options.clone(),
            self.shared.clock.clone(),
        )))
    }

    async fn purge(&self, request: &Purge) -> Result<u64> {
        let queue = self.queue(&request.mailbox);
        Ok(queue.rows().purge(request, self.shared.clock.now()))
    }
}

/// What a transaction on a [`MemoryLog`] lends: the records, receipts and notes waiting for its commit.
#[derive(Debug, Default)]
pub struct MemoryConnection {
    staged: Vec<(Mailbox, Vec<NewRecord>)>,
    reserved: inbox::Reserved,
    savepoint: Option<(usize, inbox::Mark)>,
}

/// A transaction on a [`MemoryLog`]. Dropping it rolls back.
#[derive(Debug)]
#[must_use = "dropping it rolls back"]
pub struct MemoryTransaction {
    log: MemoryLog,
    connection: MemoryConnection,
}

impl MemoryTransaction {
    /// Makes what was appended appear.
    pub fn commit(mut self) {
        for (mailbox, batch) in &self.connection.staged {
            self.log.append_now(mailbox, batch);
        }
        self.connection.reserved.commit(self.log.now());
    }
}

impl TransactionOf<MemoryLog> for MemoryTransaction {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive(&mut self.connection)
    }
}

#[async_trait]
impl LogTransaction for MemoryTransaction {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive(&mut self.connection)
    }
    async fn commit(self: Box<Self>) -> Result<()> {
        Self::commit(*self);
        Ok(())
    }
    async fn rollback(self: Box<Self>) -> Result<()> {
        Ok(())
    }
    async fn savepoint(&mut self, step: Savepoint) -> Result<()> {
        let connection = &mut self.connection;
        match step {
            Savepoint::Set => connection.savepoint = Some((connection.staged.len(), connection.reserved.mark())),
            Savepoint::Release => connection.savepoint = None,
            Savepoint::Return => {
                if let Some((staged, mark)) = connection.savepoint.take() {
                    connection.staged.truncate(staged);
                    connection.reserved.return_to(mark);
                }
            }
        }
        Ok(())
    }
}

#[async_trait]
impl TransactionalLog for MemoryLog {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        Ok(Box::new(self.transaction()))
    }
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        let connection: &mut MemoryConnection = tx.get_mut()?;
        if !batch.is_empty() {
            connection.staged.push((mailbox.clone(), batch.to_vec()));
        }
        Ok(())
    }
}

fn closed() -> Error {
    Error::new(ErrorKind::Closed, "the session has been closed")
}
