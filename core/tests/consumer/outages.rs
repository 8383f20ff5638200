//! A log that is away, at every call: it costs no attempt, compensates nothing, and the chain goes on when it is back.

use crate::{
    Diary, OrderPaid, OrderPlaced, dead, placed,
    world::{World, options, secs},
};
use async_trait::async_trait;
use postrider_core::{
    Bus, Context, Error, ErrorKind, EventLog, GroupName, HandlerResult, Mailbox, MessageId, Result, Retry,
    Transactional, Transport,
    log::{
        Admission, Arrival, EventLogStore, GroupMember, InboxLog, Lent, LogTransaction, NewRecord, Note, Purge,
        RegisteredMember, Savepoint, Session, SessionOptions, TransactionalLog,
    },
    relay::Backoff,
};
use std::{
    sync::{
        Arc,
        atomic::{AtomicBool, AtomicU32, Ordering},
    },
    time::Duration,
};

/// Which calls fail: each of these fails so many times, and then works.
#[derive(Debug, Default)]
struct Failures {
    begin: AtomicU32,
    rollback: AtomicU32,
    commit: AtomicU32,
    note: AtomicU32,
    /// Written or committed, and the answer lost.
    happens: AtomicBool,
    append: AtomicU32,
    admit: AtomicU32,
}

/// Errors of a pool whose connections are all in use, in place of those of a database that is away.
#[derive(Debug)]
struct Full(Arc<dyn TransactionalLog>, Arc<AtomicU32>);

#[async_trait]
impl TransactionalLog for Full {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        match fails(&self.1) {
            Err(_) => Err(Error::new(ErrorKind::Busy, "no connection became free")),
            Ok(()) => self.0.begin().await,
        }
    }
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.0.append_in(tx, mailbox, batch).await
    }
}

/// A full pool is no outage: the subscription goes on, and no attempt is counted.
#[tokio::test]
async fn a_full_pool_is_no_outage() {
    let world = World::start(options()).await;
    let full = Arc::new(AtomicU32::new(20));
    let log = EventLog::from(world.log.clone());
    let transactions = log.transactions().unwrap().clone();
    let bus = Bus::builder()
        .log(log.with_transactions(Full(transactions, full.clone())))
        .transport(Transport::from(world.transport.clone()))
        .relay(options())
        .clock(world.clock.clone())
        .build()
        .unwrap();
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .middleware(Transactional::new())
        .retry(Retry::none())
        .handler(async |_, ctx| {
            assert_eq!(ctx.attempt(), 1);
            Ok(())
        })
        .start()
        .await
        .unwrap();
    for id in 0..5 {
        world.bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    while full.load(Ordering::SeqCst) > 0 {
        world.settle().await;
        assert_eq!(running.flow(), postrider_core::consumer::Flow::Running);
        world.clock.advance(Duration::from_millis(50));
    }
    for _ in 0..10 {
        world.pass(Duration::from_millis(100)).await;
    }
    world.until(|_| running.report().handled == 5).await;
}

/// Whether a call fails. The database is away, or full, or takes no writes: no call says anything about the message.
fn fails(left: &AtomicU32) -> Result<()> {
    let before = left.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |n| n.checked_sub(1));
    match before {
        Ok(n) if n % 2 == 0 => Err(Error::new(ErrorKind::Storage, "the disk is full")),
        Ok(_) => Err(Error::new(ErrorKind::Unavailable, "the database is away")),
        Err(_) => Ok(()),
    }
}

#[derive(Debug, Clone)]
struct Ailing<P: ?Sized>(Arc<P>, Arc<Failures>);

#[async_trait]
impl TransactionalLog for Ailing<dyn TransactionalLog> {
    async fn begin(&self) -> Result<Box<dyn LogTransaction>> {
        fails(&self.1.begin)?;
        Ok(Box::new(AilingTx(self.0.begin().await?, self.1.clone())))
    }
    async fn append_in(&self, tx: Lent<'_>, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        self.0.append_in(tx, mailbox, batch).await
    }
}

#[derive(Debug)]
struct AilingTx(Box<dyn LogTransaction>, Arc<Failures>);

#[async_trait]
impl LogTransaction for AilingTx {
    fn lend(&mut self) -> Lent<'_> {
        self.0.lend()
    }
    async fn commit(self: Box<Self>) -> Result<()> {
        if let Err(error) = fails(&self.1.commit) {
            if self.1.happens.load(Ordering::SeqCst) {
                self.0.commit().await?;
            }
            return Err(error);
        }
        self.0.commit().await
    }
    async fn rollback(self: Box<Self>) -> Result<()> {
        fails(&self.1.rollback)?;
        self.0.rollback().await
    }
    async fn savepoint(&mut self, step: Savepoint) -> Result<()> {
        self.0.savepoint(step).await
    }
}

#[async_trait]
impl InboxLog for Ailing<dyn InboxLog> {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        fails(&self.1.admit)?;
        self.0.admit(tx, group, arrivals).await
    }
    async fn look(&self, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        self.0.look(group, arrivals).await
    }
    async fn note(&self, tx: Option<Lent<'_>>, group: &GroupName, id: MessageId) -> Result<Option<Note>> {
        fails(&self.1.note)?;
        self.0.note(tx, group, id).await
    }
    async fn write_note(
        &self,
        tx: Option<Lent<'_>>,
        group: &GroupName,
        id: MessageId,
        expected: u64,
        text: &str,
    ) -> Result<bool> {
        if let Err(error) = fails(&self.1.note) {
            if self.1.happens.load(Ordering::SeqCst) && tx.is_none() {
                self.0.write_note(tx, group, id, expected, text).await?;
            }
            return Err(error);
        }
        self.0.write_note(tx, group, id, expected, text).await
    }
    async fn register(&self, group: &GroupName, member: &GroupMember, retention: Duration) -> Result<()> {
        self.0.register(group, member, retention).await
    }
    async fn members(&self, group: &GroupName, retention: Duration) -> Result<Vec<RegisteredMember>> {
        self.0.members(group, retention).await
    }
}

#[async_trait]
impl EventLogStore for Ailing<dyn EventLogStore> {
    async fn append(&self, mailbox: &Mailbox, batch: &[NewRecord]) -> Result<()> {
        if *mailbox == Mailbox::outbox() {
            fails(&self.1.append)?;
        }
        self.0.append(mailbox, batch).await
    }
    async fn open(&self, mailbox: &Mailbox, options: &SessionOptions) -> Result<Box<dyn Session>> {
        self.0.open(mailbox, options).await
    }
    async fn purge(&self, request: &Purge) -> Result<u64> {
        self.0.purge(request).await
    }
}

fn ailing(world: &World, failures: &Arc<Failures>) -> Bus {
    let log = EventLog::from(world.log.clone());
    let (inbox, transactions) = (log.inbox().unwrap().clone(), log.transactions().unwrap().clone());
    let log = log
        .with_inbox(Ailing(inbox, failures.clone()))
        .with_transactions(Ailing(transactions, failures.clone()))
        .map_store(|store| Ailing(store, failures.clone()));
    Bus::builder()
        .log(log)
        .transport(Transport::from(world.transport.clone()))
        .relay(options())
        .clock(world.clock.clone())
        .build()
        .unwrap()
}

fn twice() -> Retry {
    Retry::default()
        .with_max_attempts(2)
        .with_backoff(Backoff::Fixed(secs(1)))
}

type State = (Diary, Arc<Failures>);

/// The second step of the chain: the first time, the log goes away under it.
async fn pay((diary, failures): &State, order: &OrderPlaced, ctx: &mut Context) -> HandlerResult {
    diary.note(format!("pay, attempt {}", ctx.attempt()));
    if failures.rollback.load(Ordering::SeqCst) > 0 {
        // What a driver says of a connection that dies in a statement is an error like any other.
        Err("connection reset by peer")?;
    }
    // Whatever a handler makes of the error.
    let published = ctx.publish(&OrderPaid { order: order.id }).await;
    published.map_err(|error| format!("cannot publish: {error}"))?;
    Ok(())
}

/// Sets some calls to fail, in one place.
type Ail = fn(&Failures);

/// Times are counted from when the log is asked, so that two outages are two.
fn outages() -> Vec<(&'static str, Ail)> {
    fn set(of: &AtomicU32) {
        of.store(2, Ordering::SeqCst);
    }
    vec![
        ("begin", |f| set(&f.begin)),
        ("rollback", |f| set(&f.rollback)),
        ("commit", |f| set(&f.commit)),
        ("commit that happens", |f| {
            set(&f.commit);
            f.happens.store(true, Ordering::SeqCst);
        }),
        ("note", |f| set(&f.note)),
        ("note that is written", |f| {
            set(&f.note);
            f.happens.store(true, Ordering::SeqCst);
        }),
        ("everything", |f| {
            [&f.begin, &f.rollback, &f.commit, &f.note]
                .into_iter()
                .for_each(|call| call.store(3, Ordering::SeqCst));
        }),
    ]
}

async fn is_handled_once(world: &World, what: &str, group: &'static str, diary: &Diary) {
    for _ in 0..60 {
        world.pass(secs(5)).await;
    }
    let letters = dead(world, group).await;
    assert!(
        letters.is_empty(),
        "{what}: {:?} {:?}",
        letters[0].errors,
        diary.lines()
    );
    let lines = diary.lines();
    assert!(
        !lines.is_empty() && lines.iter().all(|line| !line.starts_with("release")),
        "{what}: {lines:?}"
    );
    assert!(
        lines.iter().all(|line| !line.ends_with("attempt 2")),
        "{what}: {lines:?}"
    );
    let paid = world.transport.published(&postrider_core::Topic::new("orders"));
    let ids: std::collections::HashSet<_> = paid.iter().map(postrider_core::Message::id).collect();
    assert_eq!(ids.len(), 2, "{what}: the order, and that it is paid");
}

#[tokio::test]
async fn a_log_that_goes_away_in_a_durable_step_costs_no_attempt_and_compensates_nothing() {
    for (what, ail) in outages() {
        let world = World::start(options()).await;
        let (diary, failures) = (Diary::default(), Arc::new(Failures::default()));
        let bus = ailing(&world, &failures);
        let state: State = (diary.clone(), failures.clone());
        bus.subscribe::<OrderPlaced>("g")
            .durable()
            .retry(twice())
            .state(Arc::new(state))
            .handler(async |(diary, _): &State, _, _| diary.did("reserve"))
            .compensate(async |(diary, _): &State, _, _| diary.did("release"))
            .named("reserve")
            .handler(pay)
            .named("pay")
            .start()
            .await
            .unwrap();
        ail(&failures);
        world.bus.publish(&placed(1, "ada")).await.unwrap();
        is_handled_once(&world, what, "g", &diary).await;
    }
}

#[tokio::test]
async fn a_log_that_goes_away_in_a_transaction_costs_no_attempt_and_compensates_nothing() {
    let admit: (&str, Ail) = ("admit", |f| f.admit.store(3, Ordering::SeqCst));
    for (what, ail) in outages().into_iter().chain([admit]) {
        let world = World::start(options()).await;
        let (diary, failures) = (Diary::default(), Arc::new(Failures::default()));
        let bus = ailing(&world, &failures);
        let state: State = (diary.clone(), failures.clone());
        bus.subscribe::<OrderPlaced>("g")
            .retry(twice())
            .middleware(Transactional::new())
            .state(Arc::new(state))
            .handler(async |(diary, _): &State, _, _| diary.did("reserve"))
            .compensate(async |(diary, _): &State, _, _| diary.did("release"))
            .handler(pay)
            .start()
            .await
            .unwrap();
        ail(&failures);
        world.bus.publish(&placed(1, "ada")).await.unwrap();
        is_handled_once(&world, what, "g", &diary).await;
    }
}

#[tokio::test]
async fn a_log_that_does_not_take_what_a_handler_publishes_costs_no_attempt() {
    let world = World::start(options()).await;
    for (group, in_batches) in [("plain", false), ("batches", true)] {
        let (diary, failures) = (Diary::default(), Arc::new(Failures::default()));
        let bus = ailing(&world, &failures);
        let state: State = (diary.clone(), failures.clone());
        failures.append.store(3, Ordering::SeqCst);
        let subscribing = bus.subscribe::<OrderPlaced>(group).retry(Retry::none());
        if in_batches {
            subscribing
                .batch_handler(postrider_core::consumer::Batch::default(), async |orders, ctx| {
                    let mut outcomes = Vec::new();
                    for (place, order) in orders.iter().enumerate() {
                        let published = ctx.of(place).publish(&OrderPaid { order: order.id }).await;
                        outcomes.push(published.map(drop).map_err(|error| error.to_string().into()));
                    }
                    outcomes
                })
                .start()
                .await
                .unwrap();
        } else {
            subscribing
                .state(Arc::new(state))
                .handler(async |(diary, _): &State, _, _| diary.did("reserve"))
                .compensate(async |(diary, _): &State, _, _| diary.did("release"))
                .handler(pay)
                .start()
                .await
                .unwrap();
        }
    }
    world.bus.publish(&placed(1, "ada")).await.unwrap();
    for _ in 0..60 {
        world.pass(secs(5)).await;
    }
    for group in ["plain", "batches"] {
        let letters = dead(&world, group).await;
        assert!(letters.is_empty(), "{group}: {:?}", letters[0].errors);
    }
    let paid = world.transport.published(&postrider_core::Topic::new("orders"));
    let ids: std::collections::HashSet<_> = paid.iter().map(postrider_core::Message::id).collect();
    assert_eq!(ids.len(), 3, "the order, and what each group published");
}
