//! A process that handles: what dies.

use crate::{
    broker::Broker,
    fate::{Fate, mortal},
};
use postrider::{
    Bus, Context, Event, EventLog, HandlerError, HandlerResult, Mailbox, MessageId, OnFailure, RelayOptions, Retry,
    Transactional,
    postgres::{PostgresLog, PostgresOptions},
    relay::Backoff,
    sqlite::{SqliteLog, SqliteOptions},
};
use sqlx::{PgConnection, SqliteConnection};
use std::{
    collections::HashMap,
    num::NonZeroUsize,
    path::Path,
    sync::Arc,
    time::{Duration, Instant},
};

/// What happens to a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Scene {
    /// One effect and one follow-up, in one transaction.
    Plain,
    /// The same after attempts that fail: parked in the inbox in between.
    Parked,
    /// Several messages share a transaction; one of them fails the first time.
    Batch,
    /// A statement fails and its handler does not care; a step that may fail does, in SQL.
    Swallowed,
    /// A durable chain that comes to its end.
    Done,
    /// A durable chain whose last step fails for good.
    Undone,
    /// On RabbitMQ, with processes killed at random.
    Random,
    /// The last process of those.
    Finish,
}

impl Scene {
    pub(crate) const WITH_BOUNDARIES: [Self; 6] = [
        Self::Plain,
        Self::Parked,
        Self::Batch,
        Self::Swallowed,
        Self::Done,
        Self::Undone,
    ];

    pub(crate) fn name(self) -> &'static str {
        match self {
            Self::Plain => "plain",
            Self::Parked => "parked",
            Self::Batch => "batch",
            Self::Swallowed => "swallowed",
            Self::Done => "done",
            Self::Undone => "undone",
            Self::Random => "random",
            Self::Finish => "finish",
        }
    }
    fn parse(name: &str) -> Self {
        let all = Self::WITH_BOUNDARIES.into_iter().chain([Self::Random, Self::Finish]);
        all.into_iter().find(|scene| scene.name() == name).expect("a scene")
    }
    pub(crate) fn messages(self) -> u32 {
        if self == Self::Batch { 2 } else { 1 }
    }
    /// Effects in the database, follow-ups at the broker.
    pub(crate) fn expected(self) -> (i64, usize) {
        match self {
            // Three steps, each with an effect.
            Self::Done => (3, 1),
            Self::Undone => (0, 0),
            _ => (1, 1),
        }
    }
    pub(crate) fn least_deaths(self) -> u32 {
        match self {
            Self::Plain => 12,
            _ => 16,
        }
    }
}

#[derive(Debug, Clone, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "ordered", topic = "orders", key = |e: &Self| e.n)]
pub(crate) struct Ordered {
    pub(crate) n: u32,
}

#[derive(Debug, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "invoiced", topic = "invoices")]
struct Invoiced {
    n: u32,
}

/// The database: the log, and a table of effects.
#[derive(Debug, Clone)]
pub(crate) enum Store {
    Sqlite(SqliteLog),
    Postgres(PostgresLog),
}

const TABLES: &str = "CREATE TABLE IF NOT EXISTS effect (message TEXT NOT NULL, step TEXT NOT NULL); \
    CREATE TABLE IF NOT EXISTS taken (name TEXT PRIMARY KEY); \
    CREATE TABLE IF NOT EXISTS sent (n BIGINT PRIMARY KEY)";

impl Store {
    pub(crate) async fn open(place: &str) -> anyhow::Result<Self> {
        if let Some(file) = place.strip_prefix("sqlite:") {
            let log = SqliteLog::open_with(file, SqliteOptions::default().with_max_connections(4)).await?;
            return Ok(Self::Sqlite(log));
        }
        let log = PostgresLog::connect_with(place, PostgresOptions::default().with_max_connections(6)).await?;
        Ok(Self::Postgres(log))
    }

    /// Makes the tables.
    pub(crate) async fn make(place: &str) -> anyhow::Result<Self> {
        let store = Self::open(place).await?;
        if let Some(schema) = store.log().schema() {
            schema.migrate().await?;
        }
        match &store {
            Self::Sqlite(log) => sqlx::raw_sql(TABLES).execute(log.pool()).await.map(drop)?,
            Self::Postgres(log) => sqlx::raw_sql(TABLES).execute(log.pool()).await.map(drop)?,
        }
        Ok(store)
    }

    fn log(&self) -> EventLog {
        match self {
            Self::Sqlite(log) => log.clone().into(),
            Self::Postgres(log) => log.clone().into(),
        }
    }

    pub(crate) async fn effects(&self, message: MessageId) -> i64 {
        let of_it = format!("SELECT count(*) FROM effect WHERE message = '{message}'");
        let of_it = sqlx::AssertSqlSafe(of_it);
        match self {
            Self::Sqlite(log) => sqlx::query_scalar(of_it).fetch_one(log.pool()).await.unwrap(),
            Self::Postgres(log) => sqlx::query_scalar(of_it).fetch_one(log.pool()).await.unwrap(),
        }
    }

    /// What was sent by the random test, and how often each has had its effect, and its follow-up.
    pub(crate) async fn of_random(&self) -> (usize, HashMap<String, i64>, HashMap<String, i64>) {
        let Self::Postgres(log) = self else {
            unreachable!("it runs on Postgres")
        };
        let sent: i64 = sqlx::query_scalar("SELECT count(*) FROM sent")
            .fetch_one(log.pool())
            .await
            .unwrap();
        let of = |step: &'static str| async move {
            let rows = sqlx::query_as("SELECT message, count(*) FROM effect WHERE step = $1 GROUP BY message");
            let rows: Vec<(String, i64)> = rows.bind(step).fetch_all(log.pool()).await.unwrap();
            rows.into_iter().collect()
        };
        (
            usize::try_from(sent).unwrap(),
            of("ordered").await,
            of("invoiced").await,
        )
    }

    async fn effect(&self, ctx: &mut Context, message: &str, step: &str) -> HandlerResult {
        match self {
            Self::Sqlite(_) => {
                let insert = sqlx::query("INSERT INTO effect VALUES (?, ?)").bind(message).bind(step);
                insert.execute(ctx.tx::<SqliteConnection>()?).await?;
            }
            Self::Postgres(_) => {
                let insert = sqlx::query("INSERT INTO effect VALUES ($1, $2)")
                    .bind(message)
                    .bind(step);
                insert.execute(ctx.tx::<PgConnection>()?).await?;
            }
        }
        Ok(())
    }

    async fn take_back(&self, ctx: &mut Context, step: &str) -> HandlerResult {
        let delete = format!(
            "DELETE FROM effect WHERE message = '{}' AND step = '{step}'",
            ctx.message().id()
        );
        let delete = sqlx::raw_sql(sqlx::AssertSqlSafe(delete));
        match self {
            Self::Sqlite(_) => delete.execute(ctx.tx::<SqliteConnection>()?).await.map(drop)?,
            Self::Postgres(_) => delete.execute(ctx.tx::<PgConnection>()?).await.map(drop)?,
        }
        Ok(())
    }

    /// A statement that fails, in the transaction.
    async fn fails(&self, ctx: &mut Context) -> Result<(), sqlx::Error> {
        const TWICE: &str = "INSERT INTO taken VALUES ('x'), ('x')";
        match self {
            Self::Sqlite(_) => sqlx::raw_sql(TWICE)
                .execute(ctx.tx::<SqliteConnection>().unwrap())
                .await
                .map(drop),
            Self::Postgres(_) => sqlx::raw_sql(TWICE)
                .execute(ctx.tx::<PgConnection>().unwrap())
                .await
                .map(drop),
        }
    }
}

/// What handlers get.
struct World {
    store: Store,
    fate: &'static Fate,
    scene: Scene,
}

impl World {
    async fn handle(&self, ordered: &Ordered, ctx: &mut Context) -> HandlerResult {
        self.fate.decides("handle");
        let id = ctx.message().id().to_string();
        self.store.effect(ctx, &id, "once").await?;
        self.fate.decides("effect");
        ctx.publish(&Invoiced { n: ordered.n }).await?;
        self.fate.decides("published");
        match self.scene {
            Scene::Parked if ctx.attempt() < 3 => Err("not yet")?,
            Scene::Batch if ctx.attempt() < 2 && ordered.n == 1 => Err("not in a batch")?,
            // Postgres would answer a commit with a rollback, and a driver take that for success.
            Scene::Swallowed if ctx.attempt() < 2 => {
                let swallowed = self.store.fails(ctx).await;
                if matches!(self.store, Store::Sqlite(_)) {
                    // There a failed statement undoes itself alone.
                    swallowed?;
                }
                Ok(())
            }
            _ => Ok(()),
        }
    }

    async fn may_fail(&self, _: &Ordered, ctx: &mut Context) -> HandlerResult {
        if self.scene == Scene::Swallowed {
            let id = ctx.message().id().to_string();
            self.store.effect(ctx, &id, "never").await?;
            self.store.fails(ctx).await?;
        }
        Ok(())
    }

    async fn act(&self, step: &'static str, ctx: &mut Context) -> HandlerResult {
        self.fate.decides("step");
        if ctx.barrier(step).await?.forward(ctx.transaction()?).await? {
            let id = ctx.message().id().to_string();
            self.store.effect(ctx, &id, step).await?;
        }
        self.fate.decides("stepped");
        Ok(())
    }

    async fn undo(&self, step: &'static str, ctx: &mut Context) -> HandlerResult {
        self.fate.decides("undo");
        if ctx.barrier(step).await?.compensate(ctx.transaction()?).await? {
            self.store.take_back(ctx, step).await?;
        }
        self.fate.decides("undone");
        Ok(())
    }
}

fn retry() -> Retry {
    let backoff = Backoff::Fixed(Duration::from_millis(30));
    Retry::default()
        .with_in_place(1)
        .with_max_attempts(100)
        .with_backoff(backoff)
}

#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
pub(crate) async fn run(place: &str, scene: &str, dies_at: u64, dir: &Path) {
    let scene = Scene::parse(scene);
    let fate = Fate::at(dies_at);
    let store = Store::open(place).await.expect("the database");
    // What dies has a short lease, so that another need not wait for its end; that one must not lose its own on a slow machine.
    let lease = if dies_at == u64::MAX { 5_000 } else { 400 };
    let relay = RelayOptions::default()
        .with_lease(Duration::from_millis(lease))
        .with_poll_interval(Duration::from_millis(20))
        .with_backoff(Backoff::Fixed(Duration::from_millis(20)));
    let builder = Bus::builder().relay(relay).source("effects");
    if matches!(scene, Scene::Random | Scene::Finish) {
        return random(builder, store, scene, dir).await;
    }
    let bus = builder
        .log(mortal(store.log(), fate))
        .transport(Broker::transport(dir, fate))
        .build()
        .expect("a bus");
    bus.start().await.expect("a start");
    // A group of its own for each: what another left in its inbox has nothing to do with this.
    let group = format!("g{}", dir.file_name().unwrap().to_str().unwrap().replace('.', "-"));
    let world = Arc::new(World {
        store: store.clone(),
        fate,
        scene,
    });
    let subscription = bus.subscribe::<Ordered>(group.clone()).retry(retry());
    let running = match scene {
        Scene::Done | Scene::Undone => {
            subscription
                .durable()
                .state(world)
                .handler(async |world: &World, _, ctx| world.act("one", ctx).await)
                .compensate(async |world: &World, _, ctx| world.undo("one", ctx).await)
                .named("one")
                .handler(async |world: &World, _, ctx| world.act("two", ctx).await)
                .compensate(async |world: &World, _, ctx| world.undo("two", ctx).await)
                .named("two")
                .handler(async |world: &World, ordered, ctx| {
                    world.act("three", ctx).await?;
                    if world.scene == Scene::Undone {
                        return Err(HandlerError::permanent("never"));
                    }
                    ctx.publish(&Invoiced { n: ordered.n }).await?;
                    Ok(())
                })
                .compensate(async |world: &World, _, ctx| world.undo("three", ctx).await)
                .named("three")
                .start()
                .await
        }
        _ => {
            let how = match scene {
                Scene::Batch => Transactional::batch(NonZeroUsize::new(8).expect("not zero")),
                _ => Transactional::new(),
            };
            subscription
                .middleware(how)
                .state(world)
                .handler(World::handle)
                .handler(World::may_fail)
                .on_failure(OnFailure::Ignore)
                .start()
                .await
        }
    };
    let running = running.expect("a subscription");
    let began = Instant::now();
    while !(Broker::is_done(dir, scene.expected().1) && is_quiet(&store, &group, scene).await) {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "it does not come to its end: {running:?}"
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    if dies_at == u64::MAX {
        bus.shutdown(Duration::from_secs(10)).await.expect("a clean shutdown");
    }
    std::process::exit(0);
}

/// Whether nothing waits in the inbox.
async fn is_quiet(store: &Store, group: &str, scene: Scene) -> bool {
    let log = store.log();
    let stats = log.admin().expect("it can be asked").stats().await.expect("numbers");
    let inbox = Mailbox::Inbox(postrider::GroupName::parse(group.to_owned()).expect("a name"));
    let inbox = stats.get(&inbox).copied().unwrap_or_default();
    let failed = u64::from(scene == Scene::Undone);
    assert!(inbox.failed <= failed, "a dead letter that should not be");
    inbox.pending == 0 && inbox.failed == failed
}

/// Publishes, handles, and handles the follow-ups, over RabbitMQ.
async fn random(builder: postrider::BusBuilder, store: Store, scene: Scene, dir: &Path) {
    let url = std::fs::read_to_string(dir.join("amqp")).expect("the broker's address");
    let transport = postrider::rabbitmq::transport(url).expect("a transport");
    let bus = builder.log(store.log()).transport(transport).build().expect("a bus");
    bus.start().await.expect("a start");
    let Store::Postgres(log) = store.clone() else {
        unreachable!("it runs on Postgres")
    };
    bus.subscribe::<Ordered>("orders")
        .middleware(Transactional::new())
        .retry(retry())
        .state(Arc::new((store.clone(),)))
        .handler(async |(store,), ordered, ctx| {
            store.effect(ctx, &ordered.n.to_string(), "ordered").await?;
            ctx.publish(&Invoiced { n: ordered.n }).await?;
            if ctx.attempt() == 1 && ordered.n % 7 == 0 {
                Err("not yet")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .expect("a subscription");
    bus.subscribe::<Invoiced>("invoices")
        .middleware(Transactional::batch(NonZeroUsize::new(20).expect("not zero")))
        .state(Arc::new((store.clone(),)))
        .handler(async |(store,), invoiced, ctx| store.effect(ctx, &invoiced.n.to_string(), "invoiced").await)
        .start()
        .await
        .expect("a subscription");
    if scene == Scene::Random {
        loop {
            let mut tx = log.pool().begin().await.expect("a transaction");
            let n: i64 = sqlx::query_scalar(
                "INSERT INTO sent SELECT coalesce(max(n), 0) + 1 FROM sent ON CONFLICT DO NOTHING RETURNING n",
            )
            .fetch_optional(&mut *tx)
            .await
            .expect("a number")
            .unwrap_or(0);
            if n > 0 {
                bus.publish_in(
                    &mut tx,
                    &Ordered {
                        n: u32::try_from(n).expect("small"),
                    },
                )
                .await
                .expect("published");
                tx.commit().await.expect("committed");
            }
            tokio::time::sleep(Duration::from_millis(3)).await;
        }
    }
    let began = Instant::now();
    loop {
        let (sent, _, follow_ups) = store.of_random().await;
        if follow_ups.len() >= sent {
            break;
        }
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "{sent} sent, {} followed up",
            follow_ups.len()
        );
        tokio::time::sleep(Duration::from_millis(100)).await;
    }
    // Repeats, if there are any, are on their way.
    tokio::time::sleep(Duration::from_secs(1)).await;
    bus.shutdown(Duration::from_secs(10)).await.expect("a clean shutdown");
}
