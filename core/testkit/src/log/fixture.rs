use async_trait::async_trait;
use postrider_core::{
    EventLog, Mailbox, Message, Topic,
    clock::{Clock, ManualClock},
    log::{
        AttemptError, Claim, Claimed, NewRecord, Outcome, Owner, Parking, Record, Session, SessionOptions,
        SettleReport, Settled, Until,
    },
};
use std::{sync::Arc, time::Duration};

/// A fresh, empty log to be tested, and the time it lives in.
#[async_trait]
pub trait LogFixture: Send + Sync {
    /// The log.
    fn log(&self) -> EventLog;

    /// The same log through another handle, as another process has it.
    async fn other(&self) -> EventLog;

    /// The log's clock, as far as a test may know it: for a log on a database's clock, the system's.
    fn clock(&self) -> Arc<dyn Clock>;

    /// Lets at least `duration` pass for the log.
    async fn advance(&self, duration: Duration);
}

/// A log that takes the time from a [`ManualClock`].
#[derive(Debug)]
pub struct ClockedLog {
    clock: Arc<ManualClock>,
    log: EventLog,
    other: EventLog,
    /// What the log lives in: dropped after it.
    _storage: Option<Box<dyn std::any::Any + Send + Sync>>,
}

impl ClockedLog {
    /// A log whose handles are all the same.
    pub async fn new<Fut>(make: impl FnOnce(Arc<dyn Clock>) -> Fut) -> Self
    where
        Fut: Future<Output = EventLog>,
    {
        let clock = ManualClock::shared();
        let log = make(clock.clone()).await;
        Self {
            clock,
            other: log.clone(),
            log,
            _storage: None,
        }
    }

    /// A log of which `make` makes handles that share nothing but the storage.
    pub async fn with_handles<Fut>(mut make: impl FnMut(Arc<dyn Clock>) -> Fut) -> Self
    where
        Fut: Future<Output = EventLog>,
    {
        let clock = ManualClock::shared();
        Self {
            log: make(clock.clone()).await,
            other: make(clock.clone()).await,
            clock,
            _storage: None,
        }
    }

    /// Keeps `storage`, such as a temporary directory, for as long as the log is tested.
    #[must_use]
    pub fn keeping(mut self, storage: impl std::any::Any + Send + Sync) -> Self {
        self._storage = Some(Box::new(storage));
        self
    }
}

#[async_trait]
impl LogFixture for ClockedLog {
    fn log(&self) -> EventLog {
        self.log.clone()
    }
    async fn other(&self) -> EventLog {
        self.other.clone()
    }
    fn clock(&self) -> Arc<dyn Clock> {
        self.clock.clone()
    }
    async fn advance(&self, duration: Duration) {
        self.clock.advance(duration);
    }
}

/// A message whose payload is its name.
pub(super) fn message(topic: &'static str, key: Option<&str>, name: &str) -> Message {
    let message = Message::new(Topic::new(topic), "test.v1", name.to_owned()).with_source("kit");
    let message = message.with_time(postrider_core::clock::Timestamp::UNIX_EPOCH);
    match key {
        None => message,
        Some(key) => message.with_key(key),
    }
}

pub(super) fn name(message: &Message) -> String {
    String::from_utf8_lossy(message.payload()).into_owned()
}

/// A lease nothing in a test outlasts, and one that a test can wait for.
pub(super) const LONG: Duration = Duration::from_secs(3600);
pub(super) const SHORT: Duration = Duration::from_secs(1);

/// A session, with the shorthands a test wants.
pub(super) struct Desk {
    pub(super) session: Box<dyn Session>,
    pub(super) mailbox: Mailbox,
    log: EventLog,
    at: Arc<dyn Clock>,
}

#[allow(clippy::expect_used)]
impl Desk {
    pub(super) async fn open(fixture: &dyn LogFixture) -> Self {
        Self::with(
            fixture,
            fixture.log(),
            SessionOptions::new(Owner::new()).with_lease(LONG),
        )
        .await
    }

    pub(super) async fn with(fixture: &dyn LogFixture, log: EventLog, options: SessionOptions) -> Self {
        Self::on(fixture, log, options, Mailbox::outbox()).await
    }

    pub(super) async fn on(fixture: &dyn LogFixture, log: EventLog, options: SessionOptions, mailbox: Mailbox) -> Self {
        let session = log.store().open(&mailbox, &options).await.expect("a session");
        Self {
            session,
            mailbox,
            log,
            at: fixture.clock(),
        }
    }

    pub(super) async fn append(&self, batch: &[NewRecord]) {
        self.log.store().append(&self.mailbox, batch).await.expect("appended");
    }

    /// Appends messages of one topic, each given as `key:name`, or `name` without a key.
    pub(super) async fn put(&self, names: &[&str]) {
        let record = |text: &&str| {
            let (key, name) = text
                .split_once(':')
                .map_or((None, *text), |(key, name)| (Some(key), name));
            NewRecord::new(message("t", key, name))
        };
        self.append(&names.iter().map(record).collect::<Vec<_>>()).await;
    }

    pub(super) async fn claim(&self, max: usize) -> Claimed {
        self.session.claim(&Claim::new(max)).await.expect("a claim")
    }

    /// Everything that can be claimed at once, by its names.
    pub(super) async fn take(&self) -> Vec<Record> {
        self.claim(1000).await.records
    }

    pub(super) async fn settle(&self, settled: Vec<(&Record, Outcome)>) -> SettleReport {
        let batch: Vec<_> = settled
            .into_iter()
            .map(|(record, outcome)| Settled {
                tag: record.tag,
                outcome,
            })
            .collect();
        self.session.settle(&batch).await.expect("a settle")
    }

    pub(super) async fn done(&self, records: &[Record]) {
        let report = self.settle(records.iter().map(|r| (r, Outcome::Done)).collect()).await;
        assert!(report.lost.is_empty(), "nothing is lost");
    }

    pub(super) fn error(&self, text: &str) -> AttemptError {
        AttemptError::new(self.at.now(), 1, text)
    }

    pub(super) fn parked(&self, after: Duration) -> Outcome {
        Outcome::Parked(Parking::new(Until::After(after), 1, vec![self.error("refused")]))
    }

    pub(super) fn failed(&self, hold_key: bool) -> Outcome {
        Outcome::Failed {
            attempts: 3,
            errors: vec![self.error("hopeless")],
            hold_key,
        }
    }

    /// Claims and finishes until nothing more comes, and gives the names in order.
    pub(super) async fn drain(&self) -> Vec<String> {
        let mut all = Vec::new();
        loop {
            let records = self.take().await;
            if records.is_empty() {
                return all;
            }
            all.extend(names(&records));
            self.done(&records).await;
        }
    }
}

pub(super) fn names(records: &[Record]) -> Vec<String> {
    records.iter().map(|record| name(&record.message)).collect()
}

/// Only those of a key, by their names.
pub(super) fn of_key(records: &[Record], key: &str) -> Vec<String> {
    let of_key = records.iter().filter(|record| record.message.key() == Some(key));
    of_key.map(|record| name(&record.message)).collect()
}
