//! The log as a process reaches it: calls fail, before or after they took effect, take their time, and end with the process.

use crate::{
    ledger::Effect,
    process::{Fate, Reach, away},
    world::short,
};
use async_trait::async_trait;
use postrider_core::{
    GroupName, Mailbox, MessageId, Result, Topic,
    log::{
        Admission, Arrival, Claim, Claimed, EventLogStore, GroupMember, InboxLog, Lent, LogTransaction, NewRecord,
        Note, Outcome, Purge, RegisteredMember, Savepoint, Session, SessionOptions, SettleReport, Settled,
        TransactionalLog,
    },
};
use std::{
    sync::{Arc, Mutex},
    time::Duration,
};

#[derive(Debug)]
pub(crate) struct FaultyLog {
    inner: Arc<dyn EventLogStore>,
    reach: Reach,
}

impl FaultyLog {
    pub(crate) fn new(inner: Arc<dyn EventLogStore>, reach: &Reach) -> Self {
        let reach = reach.clone();
        Self { inner, reach }
    }
}

#[async_trait]
impl EventLogStore for FaultyLog {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        let fate = self.reach.begins("append").await?;
        self.inner.append(mailbox, batch).await?;
        self.reach.world.committed(mailbox, batch);
        self.reach.ends(fate, "append", ()).await
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        let fate = self.reach.begins("open").await?;
        let inner = self.inner.open(mailbox, options).await?;
        let session = FaultySession {
            inner,
            reach: self.reach.clone(),
            mailbox: mailbox.clone(),
            untold: Mutex::default(),
            number: self.reach.world.next_session(),
        };
        self.reach
            .ends(fate, "open", Box::new(session) as Box<dyn Session>)
            .await
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        let fate = self.reach.begins("purge").await?;
        let purged = self.inner.purge(request).await?;
        self.reach.ends(fate, "purge", purged).await
    }
}

#[derive(Debug)]
struct FaultySession {
    inner: Box<dyn Session>,
    reach: Reach,
    mailbox: Mailbox,
    /// What a claim said whose answer was lost.
    untold: Mutex<Vec<Topic>>,
    number: u64,
}

#[async_trait]
impl Session for FaultySession {
    /// One that fails gives back what it took: nothing was taken, says the contract.
    async fn claim(&self, request: &Claim) -> Result<Claimed> {
        let fate = self.reach.begins("claim").await?;
        let mut claimed = self.inner.claim(request).await?;
        if claimed.lease.is_held() {
            self.reach.world.holds(&self.mailbox, self.number);
        }
        claimed.waiting.append(&mut self.untold.lock().unwrap());
        if !claimed.records.is_empty() {
            let ids = claimed.records.iter().map(|record| short(record.message.id()));
            let ids: Vec<String> = ids.collect();
            self.reach.world.note(format_args!(
                "{} claims of {}: {}",
                self.reach.name,
                self.mailbox,
                ids.join(" ")
            ));
        }
        if let Fate::FailsAfter = fate {
            let released = claimed.records.iter().map(|record| Settled {
                tag: record.tag,
                outcome: Outcome::Released,
            });
            self.inner.settle(&released.collect::<Vec<_>>()).await?;
            self.untold.lock().unwrap().append(&mut claimed.waiting);
        }
        self.reach.ends(fate, "claim", claimed).await
    }
    async fn settle(&self, batch: &[Settled]) -> Result<SettleReport> {
        let fate = self.reach.begins("settle").await?;
        let report = self.inner.settle(batch).await?;
        if !report.lost.is_empty() {
            self.reach.world.ledger.count("settles without a lease");
        }
        if report.lost.len() < batch.len() && !self.reach.world.is_held_by(&self.mailbox, self.number) {
            let name = &self.reach.name;
            self.reach
                .world
                .broken(format!("{name} settled what another holds in {}", self.mailbox));
        }
        let outcomes: Vec<String> = batch.iter().map(outcome).collect();
        self.reach.world.note(format_args!(
            "{} settles of {}: {}; {} lost",
            self.reach.name,
            self.mailbox,
            outcomes.join(", "),
            report.lost.len()
        ));
        self.reach.ends(fate, "settle", report).await
    }
    async fn resume(&self, topic: &Topic, max: usize) -> Result<u64> {
        let fate = self.reach.begins("resume").await?;
        let resumed = self.inner.resume(topic, max).await?;
        self.reach.world.note(format_args!(
            "{} resumes {resumed} of {max} of {topic}",
            self.reach.name
        ));
        self.reach.ends(fate, "resume", resumed).await
    }
    async fn wait(&self, at_most: Duration) -> Result<()> {
        self.reach.life.pass().await?;
        self.inner.wait(at_most).await?;
        self.reach.life.pass().await
    }
    /// The dead hand nothing back: their lease runs out.
    async fn close(&self) -> Result<()> {
        let Ok(fate) = self.reach.begins("close").await else {
            return Err(away());
        };
        self.inner.close().await?;
        self.reach.ends(fate, "close", ()).await
    }
}

/// A record by its position, and what became of it.
fn outcome(settled: &Settled) -> String {
    let position = settled.tag.0 & u128::from(u64::MAX);
    match &settled.outcome {
        Outcome::Done => format!("{position} done"),
        Outcome::Released => format!("{position} released"),
        Outcome::Parked(parking) => format!("{position} parked {:?} with {}", parking.until, parking.attempts),
        Outcome::Failed { attempts, .. } => format!("{position} failed with {attempts}"),
        _ => format!("{position} ?"),
    }
}

/// What a transaction lends: the log's own connection, and a table of the application's.
#[derive(Debug)]
pub(crate) struct Connection {
    inner: Box<dyn LogTransaction>,
    appended: Vec<(Mailbox, Vec<NewRecord>)>,
    pub(crate) effects: Vec<Effect>,
    savepoint: (usize, usize),
}

#[derive(Debug)]
pub(crate) struct FaultyTransactions {
    inner: Arc<dyn TransactionalLog>,
    reach: Reach,
}

impl FaultyTransactions {
    pub(crate) fn new(inner: Arc<dyn TransactionalLog>, reach: &Reach) -> Self {
        let reach = reach.clone();
        Self { inner, reach }
    }
}

#[async_trait]
impl TransactionalLog for FaultyTransactions {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        let fate = self.reach.begins("begin").await?;
        let connection = Connection {
            inner: self.inner.begin().await?,
            appended: Vec::new(),
            effects: Vec::new(),
            savepoint: (0, 0),
        };
        let tx: Box<dyn LogTransaction> = Box::new(FaultyTransaction {
            connection,
            reach: self.reach.clone(),
        });
        self.reach.ends(fate, "begin", tx).await
    }
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        let connection: &mut Connection = tx.get_mut()?;
        let fate = self.reach.begins("append in a transaction").await?;
        self.inner.append_in(connection.inner.lend(), mailbox, batch).await?;
        connection.appended.push((mailbox.clone(), batch.to_vec()));
        self.reach.ends(fate, "append in a transaction", ()).await
    }
}

#[derive(Debug)]
struct FaultyTransaction {
    connection: Connection,
    reach: Reach,
}

#[async_trait]
impl LogTransaction for FaultyTransaction {
    fn lend(&mut self) -> Lent<'_> {
        Lent::exclusive(&mut self.connection)
    }
    async fn commit(self: Box<Self>) -> Result<()> {
        let fate = self.reach.begins("commit").await?;
        let (connection, world) = (self.connection, &self.reach.world);
        connection.inner.commit().await?;
        world.took_effect(&connection.effects);
        for (mailbox, batch) in &connection.appended {
            world.committed(mailbox, batch);
        }
        self.reach.ends(fate, "commit", ()).await
    }
    async fn rollback(self: Box<Self>) -> Result<()> {
        let fate = self.reach.begins("rollback").await?;
        self.connection.inner.rollback().await?;
        self.reach.ends(fate, "rollback", ()).await
    }
    async fn savepoint(&mut self, step: Savepoint) -> Result<()> {
        let fate = self.reach.begins("savepoint").await?;
        let connection = &mut self.connection;
        connection.inner.savepoint(step).await?;
        match step {
            Savepoint::Set => connection.savepoint = (connection.appended.len(), connection.effects.len()),
            Savepoint::Release => {}
            Savepoint::Return => {
                connection.appended.truncate(connection.savepoint.0);
                connection.effects.truncate(connection.savepoint.1);
            }
        }
        self.reach.ends(fate, "savepoint", ()).await
    }
}

#[derive(Debug)]
pub(crate) struct FaultyInbox {
    inner: Arc<dyn InboxLog>,
    reach: Reach,
}

impl FaultyInbox {
    pub(crate) fn new(inner: Arc<dyn InboxLog>, reach: &Reach) -> Self {
        let reach = reach.clone();
        Self { inner, reach }
    }
}

fn lent(tx: Lent<'_>) -> Result<Lent<'_>> {
    let connection: &mut Connection = tx.get_mut()?;
    Ok(connection.inner.lend())
}

#[async_trait]
impl InboxLog for FaultyInbox {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let fate = self.reach.begins("admit").await?;
        let admissions = self.inner.admit(lent(tx)?, group, arrivals).await?;
        self.reach.ends(fate, "admit", admissions).await
    }
    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let fate = self.reach.begins("look").await?;
        let admissions = self.inner.look(group, arrivals).await?;
        // An answer that is out of date when it comes is what a look has to fear.
        let rates = self.reach.world.rates();
        let late = self
            .reach
            .world
            .fault(|dice| match rates.log_slow > 0 && dice.chance(400) {
                true => dice.millis(1, 2_500),
                false => Duration::ZERO,
            });
        self.reach.clock.sleep(late).await;
        self.reach.ends(fate, "look", admissions).await
    }
    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        let fate = self.reach.begins("note").await?;
        let tx = tx.map(lent).transpose()?;
        let note = self.inner.note(tx, group, id).await?;
        self.reach.ends(fate, "note", note).await
    }
    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        let fate = self.reach.begins("write of a note").await?;
        let tx = tx.map(lent).transpose()?;
        let written = self.inner.write_note(tx, group, id, expected, text).await?;
        self.reach.ends(fate, "write of a note", written).await
    }
    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        let fate = self.reach.begins("register").await?;
        self.inner.register(group, member, retention).await?;
        self.reach.ends(fate, "register", ()).await
    }
    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        let fate = self.reach.begins("members").await?;
        let members = self.inner.members(group, retention).await?;
        self.reach.ends(fate, "members", members).await
    }
}
