//! A process that dies at a boundary, and the log with the boundaries in it.

use async_trait::async_trait;
use postrider::{
    EventLog, GroupName, Mailbox, MessageId, Result, Topic,
    log::{
        Admission, Arrival, Claim, Claimed, EventLogStore, GroupMember, InboxLog, Lent, LogTransaction, NewRecord,
        Note, Purge, RegisteredMember, Savepoint, Session, SessionOptions, SettleReport, Settled, TransactionalLog,
    },
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};

/// At which boundary the process dies.
#[derive(Debug)]
pub(crate) struct Fate {
    dies_at: u64,
    passed: AtomicU64,
}

impl Fate {
    pub(crate) fn at(dies_at: u64) -> &'static Self {
        Box::leak(Box::new(Self {
            dies_at,
            passed: AtomicU64::new(0),
        }))
    }

    /// A boundary: the process may end here, at once, with nothing closed and nothing said.
    pub(crate) fn decides(&self, _what: &'static str) {
        if self.passed.fetch_add(1, Ordering::SeqCst) + 1 == self.dies_at {
            std::process::abort();
        }
    }
}

/// Puts boundaries around everything that is asked of a log while a message is handled.
pub(crate) fn mortal(log: EventLog, fate: &'static Fate) -> EventLog {
    let transactions = log.transactions().unwrap().clone();
    let inbox = log.inbox().unwrap().clone();
    log.map_store(|inner| Store { inner, fate })
        .with_transactions(Transactions {
            inner: transactions,
            fate,
        })
        .with_inbox(Inbox { inner: inbox, fate })
}

#[derive(Debug)]
struct Store {
    inner: Arc<dyn EventLogStore>,
    fate: &'static Fate,
}

#[async_trait]
impl EventLogStore for Store {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.fate.decides("append");
        let done = self.inner.append(mailbox, batch).await;
        self.fate.decides("appended");
        done
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        let inner = self.inner.open(mailbox, options).await?;
        Ok(Box::new(Held { inner, fate: self.fate }))
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.inner.purge(request).await
    }
}

#[derive(Debug)]
struct Held {
    inner: Box<dyn Session>,
    fate: &'static Fate,
}

#[async_trait]
impl Session for Held {
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        let claimed = self.inner.claim(request).await;
        if claimed.as_ref().is_ok_and(|claimed| !claimed.records.is_empty()) {
            self.fate.decides("claimed");
        }
        claimed
    }
    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        self.fate.decides("settle");
        let report = self.inner.settle(batch).await;
        self.fate.decides("settled");
        report
    }
    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        self.inner.resume(topic, max).await
    }
    async fn wait(&self, at_most: Duration) -> Result<()> {
        self.inner.wait(at_most).await
    }
    async fn close(&self) -> Result<()> {
        self.inner.close().await
    }
}

#[derive(Debug)]
struct Transactions {
    inner: Arc<dyn TransactionalLog>,
    fate: &'static Fate,
}

#[async_trait]
impl TransactionalLog for Transactions {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        self.fate.decides("begin");
        let inner = self.inner.begin().await?;
        Ok(Box::new(Open { inner, fate: self.fate }))
    }
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.fate.decides("append in");
        let done = self.inner.append_in(tx, mailbox, batch).await;
        self.fate.decides("appended in");
        done
    }
}

#[derive(Debug)]
struct Open {
    inner: Box<dyn LogTransaction>,
    fate: &'static Fate,
}

#[async_trait]
impl LogTransaction for Open {
    fn lend(&mut self) -> Lent<'_> {
        self.inner.lend()
    }
    async fn commit(self: Box<Self>) -> Result<()> {
        self.fate.decides("commit");
        let done = self.inner.commit().await;
        self.fate.decides("committed");
        done
    }
    async fn commit_appended(self: Box<Self>) -> Result<()> {
        self.fate.decides("commit");
        let done = self.inner.commit_appended().await;
        self.fate.decides("committed");
        done
    }
    async fn rollback(self: Box<Self>) -> Result<()> {
        self.fate.decides("roll back");
        self.inner.rollback().await
    }
    async fn savepoint(&mut self, step: Savepoint) -> Result<()> {
        self.fate.decides("savepoint");
        self.inner.savepoint(step).await
    }
}

#[derive(Debug)]
struct Inbox {
    inner: Arc<dyn InboxLog>,
    fate: &'static Fate,
}

#[async_trait]
impl InboxLog for Inbox {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        self.fate.decides("admit");
        let answers = self.inner.admit(tx, group, arrivals).await;
        self.fate.decides("admitted");
        answers
    }
    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        self.inner.look(group, arrivals).await
    }
    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        self.inner.note(tx, group, id).await
    }
    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        self.fate.decides("note");
        let written = self.inner.write_note(tx, group, id, expected, text).await;
        self.fate.decides("noted");
        written
    }
    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        self.inner.register(group, member, retention).await
    }
    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        self.inner.members(group, retention).await
    }
}
