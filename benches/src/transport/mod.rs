//! A transport beside its raw client: on a broker of its own, in one run, the same messages, confirmed.

mod kafka;
mod rabbitmq;

use crate::{Size, peers, table::Table};
use anyhow::{Context as _, bail};
use postrider::PublisherExt as _;
use postrider::{
    Bus, Context, Delivery, Event, HandlerResult, IntoMessage, Message, RelayOptions, Subscription, Taken, Topic,
    Transport,
    postgres::PostgresLog,
    relay::{SendOrder, TopicOptions, TopicPattern},
};
use postrider_testkit::server::Postgres;
use std::{
    sync::{
        Arc, OnceLock,
        atomic::{AtomicUsize, Ordering},
    },
    time::{Duration, Instant},
};

const ONLY_PUBLISHES: &str = "Watermill in transactions";

/// Other libraries, and the brokers they know.
const RUST_PEERS: [(&str, &[&str]); 4] = [
    ("ruststream", &["rabbitmq", "kafka"]),
    ("mq-bridge", &["rabbitmq", "kafka"]),
    ("omniqueue", &["rabbitmq"]),
    ("sea-streamer", &["kafka"]),
];

/// What a bench needs of a broker, and of its raw client.
trait Broker {
    /// How many unconfirmed messages the raw client has on their way, and ours.
    const WINDOW: usize;
    /// Where it is.
    fn address(&self) -> String;
    /// A fresh transport of ours.
    fn transport(&self) -> anyhow::Result<Transport>;
    /// Publishes to `topic`, confirmed, with the strategy that is fastest.
    async fn publish_raw(&self, work: &Work) -> anyhow::Result<Duration>;
    /// The same one message at a time, from so many tasks.
    async fn publish_raw_from(&self, work: &Work, tasks: usize) -> anyhow::Result<Duration>;
    /// Takes and acknowledges what lies in the group, unordered.
    async fn consume_raw(&self, work: &Work) -> anyhow::Result<Duration>;
}

/// So many messages of such a size, to a topic and a group of their own.
#[derive(Clone)]
struct Work {
    topic: Topic,
    subscription: Subscription,
    count: usize,
    bytes: usize,
}

impl Work {
    fn new(count: usize, bytes: usize) -> anyhow::Result<Self> {
        static LAST: AtomicUsize = AtomicUsize::new(0);
        let name = format!("bench-{}-{}", std::process::id(), LAST.fetch_add(1, Ordering::Relaxed));
        let topic = Topic::parse(name.clone())?;
        let subscription = Subscription::new(postrider::GroupName::parse(name)?, vec![topic.clone()]);
        Ok(Self {
            subscription: subscription.with_max_in_flight(1000),
            topic,
            count,
            bytes,
        })
    }

    fn payload(&self) -> Vec<u8> {
        vec![b'x'; self.bytes]
    }

    fn key(n: usize) -> String {
        format!("key-{}", n % 1000)
    }

    fn message(&self, n: usize) -> Message {
        Message::new(self.topic.clone(), "bench.v1", self.payload())
            .with_source("bench")
            .with_key(Self::key(n))
            .with_content_type("application/json")
            .with_sequence(n as u64)
    }
}

/// The headers that ours come with, for the raw client to write too.
const HEADERS: [(&str, &str); 5] = [
    ("specversion", "1.0"),
    ("id", "018f4e6a-7c00-7000-8000-000000000001"),
    ("type", "bench.v1"),
    ("source", "bench"),
    ("sequence", "00000000000000000042"),
];

/// Declares what the group needs, so that messages reach it while it has no member.
async fn declare(broker: &impl Broker, subscription: &Subscription) -> anyhow::Result<()> {
    let transport = broker.transport()?;
    let (intake, settling) = transport
        .subscriber(subscription)?
        .subscribe(subscription)
        .await?
        .split();
    settling.close(Duration::from_secs(10)).await?;
    drop(intake);
    Ok(())
}

async fn publish_ours<B: Broker>(broker: &B, work: &Work) -> anyhow::Result<Duration> {
    declare(broker, &work.subscription.clone().unordered()).await?;
    let transport = broker.transport()?;
    let publisher = transport.publisher()?.clone();
    warm(&transport, work).await?;
    let messages: Vec<Message> = (0..work.count).map(|n| work.message(n)).collect();
    let began = Instant::now();
    // As the relay does: several calls at once.
    let mut calls = tokio::task::JoinSet::new();
    for batch in messages.chunks(500) {
        if calls.len() == B::WINDOW / 500 {
            calls.join_next().await.context("a call")??;
        }
        let (publisher, batch) = (publisher.clone(), batch.to_vec());
        calls.spawn(async move {
            for outcome in publisher.publish_all(&batch).await {
                assert!(outcome.is_ok(), "{outcome:?}");
            }
        });
    }
    while let Some(done) = calls.join_next().await {
        done?;
    }
    Ok(began.elapsed())
}

async fn publish_ours_from(broker: &impl Broker, work: &Work, tasks: usize) -> anyhow::Result<Duration> {
    declare(broker, &work.subscription.clone().unordered()).await?;
    let transport = broker.transport()?;
    warm(&transport, work).await?;
    let began = Instant::now();
    let mut running = tokio::task::JoinSet::new();
    for task in 0..tasks {
        let publisher = transport.publisher()?.clone();
        let work = work.clone();
        running.spawn(async move {
            for n in 0..work.count / tasks {
                let message = work.message(n * tasks + task);
                let outcomes = publisher.publish_all(std::slice::from_ref(&message)).await;
                assert!(outcomes[0].is_ok(), "{outcomes:?}");
            }
        });
    }
    while let Some(done) = running.join_next().await {
        done?;
    }
    Ok(began.elapsed())
}

/// The connection is there before the clock runs.
async fn warm(transport: &Transport, work: &Work) -> anyhow::Result<()> {
    for outcome in transport.publisher()?.publish_all(&[work.message(0)]).await {
        outcome?;
    }
    Ok(())
}

/// From the first message to the acknowledgement of the last.
async fn consume_ours(broker: &impl Broker, work: &Work, subscription: &Subscription) -> anyhow::Result<Duration> {
    let transport = broker.transport()?;
    let (mut intake, settling) = transport
        .subscriber(subscription)?
        .subscribe(subscription)
        .await?
        .split();
    let (mut count, mut began) = (0, None);
    while count < work.count {
        if let Taken::Batch(batch) = intake.next(500).await? {
            began.get_or_insert_with(Instant::now);
            count += batch.len();
            let errors = settling.settle(batch.into_iter().map(Delivery::ack).collect()).await;
            anyhow::ensure!(errors.is_empty(), "{errors:?}");
        }
    }
    let took = began.context("messages")?.elapsed();
    settling.close(Duration::from_secs(10)).await?;
    Ok(took)
}

/// What lies in a group, to be consumed.
async fn filled(broker: &impl Broker, work: &Work, ordered: bool) -> anyhow::Result<Subscription> {
    let subscription = if ordered {
        work.subscription.clone()
    } else {
        work.subscription.clone().unordered()
    };
    declare(broker, &subscription).await?;
    let transport = broker.transport()?;
    let messages: Vec<Message> = (0..work.count).map(|n| work.message(n)).collect();
    for batch in messages.chunks(2000) {
        for outcome in transport.publisher()?.publish_all(batch).await {
            outcome?;
        }
    }
    Ok(subscription)
}

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "bench.carried", key = |e: &Self| e.n % e.keys)]
struct Carried {
    n: u64,
    keys: u64,
    text: String,
}

/// Publishing and consuming at once, from the first message that arrives to the last.
async fn carry_raw(broker: &impl Broker, work: &Work) -> anyhow::Result<Duration> {
    declare(broker, &work.subscription.clone().unordered()).await?;
    let (_, took) = tokio::try_join!(broker.publish_raw(work), broker.consume_raw(work))?;
    Ok(took)
}

/// What goes from an outbox on Postgres, over the broker, to a handler.
#[derive(Debug, Clone, Copy)]
struct Carry {
    count: usize,
    bytes: usize,
    keys: u64,
    order: SendOrder,
}

async fn end_to_end(broker: &impl Broker, carry: Carry) -> anyhow::Result<Duration> {
    let Carry {
        count,
        bytes,
        keys,
        order,
    } = carry;
    let handled = Arc::new(AtomicUsize::new(0));
    let bus = outbox(broker, order).await?;
    let text = "x".repeat(bytes.saturating_sub(36));
    let event = |n| Carried {
        n,
        keys,
        text: text.clone(),
    };
    // A topic of its own, so that nothing of other rounds comes here, nor of this one goes to their groups.
    let topic = Work::new(0, 0)?.topic;
    let message = |n| anyhow::Ok((&event(n)).into_message()?.with_topic(topic.clone()));
    for first in (0..count as u64).step_by(1000) {
        let batch = (first..count as u64).take(1000).map(message);
        bus.publish_all(batch.collect::<anyhow::Result<Vec<_>>>()?).await?;
    }
    async fn note(handled: &Arc<AtomicUsize>, _: &Carried, _: &mut Context) -> HandlerResult {
        handled.fetch_add(1, Ordering::Relaxed);
        Ok(())
    }
    bus.subscribe::<Carried>(topic.as_str())
        .topic(topic.clone())
        .max_in_flight(2000)
        .state(handled.clone())
        .handler(note)
        .start()
        .await?;
    // The group has been joined, and all is warm, before the clock runs.
    bus.publish_direct(message(count as u64)?).await?;
    let until = async |all: usize| {
        let began = Instant::now();
        while handled.load(Ordering::Relaxed) < all {
            tokio::time::sleep(Duration::from_millis(1)).await;
            anyhow::ensure!(began.elapsed() < Duration::from_secs(300), "not everything was handled");
        }
        Ok(())
    };
    until(1).await?;
    let began = Instant::now();
    bus.start().await?;
    until(count + 1).await?;
    let took = began.elapsed();
    bus.shutdown(Duration::from_secs(20)).await?;
    Ok(took)
}

/// From an outbox on Postgres to the broker, which has a group that wants the events and no member.
async fn outbox_to_broker(broker: &impl Broker, carry: Carry) -> anyhow::Result<Duration> {
    let Carry {
        count,
        bytes,
        keys,
        order,
    } = carry;
    let (bus, work) = (outbox(broker, order).await?, Work::new(0, 0)?);
    declare(broker, &work.subscription).await?;
    let text = "x".repeat(bytes.saturating_sub(36));
    let topic = work.topic.clone();
    let event = |n| Carried {
        n,
        keys,
        text: text.clone(),
    };
    let message = |n| anyhow::Ok((&event(n)).into_message()?.with_topic(topic.clone()));
    for first in (0..count as u64).step_by(1000) {
        let batch = (first..count as u64).take(1000).map(message);
        bus.publish_all(batch.collect::<anyhow::Result<Vec<_>>>()?).await?;
    }
    bus.publish_direct(message(count as u64)?).await?;
    let began = Instant::now();
    bus.start().await?;
    while bus.relay_report().counts.published < count as u64 {
        tokio::time::sleep(Duration::from_millis(1)).await;
        anyhow::ensure!(
            began.elapsed() < Duration::from_secs(300),
            "not everything was published"
        );
    }
    let took = began.elapsed();
    bus.shutdown(Duration::from_secs(20)).await?;
    Ok(took)
}

/// A bus with an empty outbox on Postgres.
async fn outbox(broker: &impl Broker, order: SendOrder) -> anyhow::Result<Bus> {
    static SERVER: OnceLock<Postgres> = OnceLock::new();
    let server = SERVER.get_or_init(|| Postgres::start_with(&["max_wal_size=4GB", "shared_buffers=1GB"]));
    let options = postrider::postgres::PostgresOptions::default().with_schema(server.fresh_name());
    let log = PostgresLog::connect_with(&server.url(), options).await?;
    let relay = RelayOptions::default()
        .with_batch_size(1000)
        .with_max_in_flight(8000)
        .with_retention(Duration::ZERO)
        .topic(TopicPattern::parse("*")?, TopicOptions::default().with_order(order));
    let bus = Bus::builder()
        .log(log)
        .transport(broker.transport()?)
        .relay(relay)
        .source("bench")
        .build()?;
    bus.migrate().await?;
    Ok(bus)
}

pub(crate) fn run(kind: &str, size: Size, table: &mut Table) -> anyhow::Result<()> {
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()?;
    match kind {
        "rabbitmq" => cases(
            "rabbitmq",
            &rabbitmq::RabbitMqBroker::start(),
            40_000,
            size,
            table,
            &runtime,
        ),
        "kafka" => cases("kafka", &kafka::KafkaBroker::start()?, 400_000, size, table, &runtime),
        other => bail!("unknown kind of transport {other:?}: known are `rabbitmq` and `kafka`"),
    }
}

fn cases(
    name: &'static str,
    broker: &impl Broker,
    count: usize,
    size: Size,
    table: &mut Table,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<()> {
    let (count, rounds) = (size.of(count), size.rounds());
    let relayed = size.of(40_000);
    table.compare(
        name,
        "raw publish, and outbox to broker, 256 B",
        "/s",
        rounds,
        relayed,
        || runtime.block_on(async { broker.publish_raw(&Work::new(relayed, 256)?).await }),
        || {
            runtime.block_on(outbox_to_broker(
                broker,
                Carry {
                    count: relayed,
                    bytes: 256,
                    keys: 1000,
                    order: SendOrder::Strict,
                },
            ))
        },
    )?;
    for bytes in [256, 1024] {
        table.compare(
            name,
            format!("publish {bytes} B"),
            "/s",
            rounds,
            count,
            || runtime.block_on(async { broker.publish_raw(&Work::new(count, bytes)?).await }),
            || runtime.block_on(async { publish_ours(broker, &Work::new(count, bytes)?).await }),
        )?;
    }
    table.compare(
        name,
        "publish 256 B, one at a time from 200 tasks",
        "/s",
        rounds,
        count,
        || runtime.block_on(async { broker.publish_raw_from(&Work::new(count, 256)?, 200).await }),
        || runtime.block_on(async { publish_ours_from(broker, &Work::new(count, 256)?, 200).await }),
    )?;
    for (bytes, ordered) in [(256, false), (256, true), (1024, false)] {
        let order = if ordered { "in order" } else { "unordered" };
        table.compare(
            name,
            format!("consume {bytes} B, {order}"),
            "/s",
            rounds,
            count,
            || {
                runtime.block_on(async {
                    let work = Work::new(count, bytes)?;
                    filled(broker, &work, false).await?;
                    broker.consume_raw(&work).await
                })
            },
            || {
                runtime.block_on(async {
                    let work = Work::new(count, bytes)?;
                    let subscription = filled(broker, &work, ordered).await?;
                    consume_ours(broker, &work, &subscription).await
                })
            },
        )?;
    }
    for bytes in [256, 1024] {
        let count = size.of(40_000);
        table.compare(
            name,
            format!("raw publish to consume, and outbox to handler, {bytes} B"),
            "/s",
            rounds,
            count,
            || runtime.block_on(async { carry_raw(broker, &Work::new(count, bytes)?).await }),
            || {
                runtime.block_on(end_to_end(
                    broker,
                    Carry {
                        count,
                        bytes,
                        keys: 1000,
                        order: SendOrder::Strict,
                    },
                ))
            },
        )?;
    }
    // The raw client cannot do better than one at a time either, if the one before is to be confirmed first.
    for (order, tasks, name_of_it) in [(SendOrder::Strict, 1, "strict"), (SendOrder::Pipelined, 0, "pipelined")] {
        let count = size.of(if tasks == 1 { 4_000 } else { 40_000 });
        let work = move || Work::new(count, 256);
        table.compare(
            name,
            format!("one hot key, {name_of_it} (left: raw publish)"),
            "/s",
            rounds,
            count,
            || {
                runtime.block_on(async {
                    match tasks {
                        0 => broker.publish_raw(&work()?).await,
                        tasks => broker.publish_raw_from(&work()?, tasks).await,
                    }
                })
            },
            || {
                runtime.block_on(end_to_end(
                    broker,
                    Carry {
                        count,
                        bytes: 256,
                        keys: 1,
                        order,
                    },
                ))
            },
        )?;
    }
    if size.peers {
        beside_peers(name, broker, count, rounds, table, runtime)?;
    }
    Ok(())
}

/// Other projects on the same broker, and ours doing the same.
fn beside_peers(
    name: &'static str,
    broker: &impl Broker,
    count: usize,
    rounds: usize,
    table: &mut Table,
    runtime: &tokio::runtime::Runtime,
) -> anyhow::Result<()> {
    let address = broker.address();
    let watermill = |tuning: &'static str| {
        let address = address.clone();
        move |what: &str, count: usize| {
            let mut peer = std::process::Command::new("go");
            peer.args(["run", ".", name, &address, what, tuning, &count.to_string(), "256"]);
            peers::run(peer.current_dir("benches/peers/watermill"))
        }
    };
    let rust = |peer: &'static str| {
        let address = address.clone();
        move |what: &str, count: usize| {
            let mut program = peers::cargo("benches/peers/transports/Cargo.toml");
            peers::run(program.args([peer, name, &address, what, &count.to_string(), "256"]))
        }
    };
    type Peer = Box<dyn Fn(&str, usize) -> anyhow::Result<Duration>>;
    // As it comes it waits for each message, so there are fewer.
    let mut all: Vec<(String, usize, Peer)> = vec![
        (
            "Watermill as it comes".to_owned(),
            count / 10,
            Box::new(watermill("default")),
        ),
        ("Watermill tuned".to_owned(), count, Box::new(watermill("tuned"))),
    ];
    if name == "rabbitmq" {
        // For callers that have batches.
        let transactions = Box::new(watermill("transactional"));
        all.push((ONLY_PUBLISHES.to_owned(), count, transactions));
    }
    for peer in RUST_PEERS.into_iter().filter(|peer| peer.1.contains(&name)) {
        all.push((peer.0.to_owned(), count / 2, Box::new(rust(peer.0))));
    }
    for (peer, count, run) in &all {
        table.compare(
            name,
            format!("publish 256 B, {peer} (left)"),
            "/s",
            rounds,
            *count,
            || run("publish", *count),
            || runtime.block_on(async { publish_ours(broker, &Work::new(*count, 256)?).await }),
        )?;
        if peer == ONLY_PUBLISHES {
            continue;
        }
        table.compare(
            name,
            format!("consume 256 B, {peer} (left)"),
            "/s",
            rounds,
            *count,
            || run("consume", *count),
            || {
                runtime.block_on(async {
                    let work = Work::new(*count, 256)?;
                    let subscription = filled(broker, &work, false).await?;
                    consume_ours(broker, &work, &subscription).await
                })
            },
        )?;
    }
    Ok(())
}
