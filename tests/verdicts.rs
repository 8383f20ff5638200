//! What each verdict does on each transport, without an event log and with one: the table of `docs::handlers`. And that
//! what a stop cuts off comes again.
#![cfg(unix)]
#![allow(clippy::unwrap_used)]

use postrider::{
    Bus, Context, Event, EventLog, GroupName, HandlerError, Mailbox, MessageId, Middleware, Retry, Running, Topic,
    Transport, Verdict,
    event::DynEvent as _,
    memory::{MemoryLog, MemoryTransport},
    relay::Backoff,
};
use postrider_testkit::{run, server};
use std::{
    collections::HashMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

#[derive(Debug, serde::Serialize, serde::Deserialize, Event)]
#[event(name = "judged", topic = "verdicts", key = "what")]
struct Judged {
    what: String,
}

const AFTER: Duration = Duration::from_millis(700);

/// Says what the event asks for.
struct Judge;

impl Middleware<Judged> for Judge {
    async fn fallback(&self, _: &mut Context, event: Option<&Judged>, _: &HandlerError) -> Option<Verdict> {
        Some(match &*event?.what {
            "ack" => Verdict::Ack,
            "retry" => Verdict::Retry { after: AFTER },
            "requeue" => Verdict::Requeue,
            _ => Verdict::DeadLetter,
        })
    }
}

type Seen = Arc<(Mutex<HashMap<String, Vec<Instant>>>,)>;

/// Handles each event twice if it comes twice: the first time it fails.
async fn judge(bus: &Bus, name: &str, ordered: bool, seen: &Seen) -> Running {
    let subscription = bus
        .subscribe::<Judged>(name)
        .topic(Topic::parse(name.to_owned()).unwrap());
    let subscription = if ordered {
        subscription
    } else {
        subscription.unordered()
    };
    let backoff = Backoff::Fixed(Duration::from_millis(100));
    subscription
        .middleware(Judge)
        .retry(Retry::none().with_backoff(backoff))
        .state(seen.clone())
        .handler(async |(seen,), event, _| {
            let mut seen = seen.lock().unwrap();
            let times = seen.entry(event.what.clone()).or_default();
            times.push(Instant::now());
            if times.len() == 1 {
                Err("the first time")?
            } else {
                Ok(())
            }
        })
        .start()
        .await
        .unwrap()
}

async fn verdicts(transport: Transport, log: Option<EventLog>, ordered: bool) {
    let exact = transport.capabilities().individual_acks;
    let has_log = log.is_some();
    let builder = Bus::builder().transport(transport);
    let bus = match log {
        Some(log) => builder.log(log),
        None => builder,
    };
    let bus = bus.build().unwrap();
    bus.start().await.unwrap();
    let seen = Seen::default();
    // The broker has seen others: a group and a topic of its own.
    let name = format!("verdicts-{}", MessageId::new());
    let running = judge(&bus, &name, ordered, &seen).await;
    for what in ["ack", "retry", "requeue", "dead"] {
        let message = Judged { what: what.to_owned() }.to_message().unwrap();
        let topic = Topic::parse(name.clone()).unwrap();
        bus.publish_direct(message.with_topic(topic)).await.unwrap();
    }
    let times = |what: &str| seen.0.lock().unwrap().get(what).cloned().unwrap_or_default();
    let began = Instant::now();
    let is_done = || times("retry").len() >= 2 && times("requeue").len() >= 2 && running.report().dead_lettered >= 1;
    while !is_done() {
        assert!(
            began.elapsed() < Duration::from_secs(60),
            "{:?} {:?}",
            seen.0.lock().unwrap(),
            running.report()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    // What would come too often is on its way.
    tokio::time::sleep(AFTER * 2).await;
    let retries = times("retry");
    assert!(
        retries[1] - retries[0] >= AFTER,
        "it waited: {:?}",
        retries[1] - retries[0]
    );
    if exact || has_log {
        let counts = ["ack", "retry", "requeue", "dead"].map(|what| times(what).len());
        assert_eq!(counts, [1, 2, 2, 1], "{:?}", running.report());
        assert_eq!(running.report().dead_lettered, 1);
    }
    if let Some(log) = bus.log() {
        let stats = log.admin().unwrap().stats().await.unwrap();
        let inbox = stats[&Mailbox::Inbox(GroupName::parse(name).unwrap())];
        assert_eq!((inbox.failed, inbox.pending), (1, 0));
    }
    bus.shutdown(Duration::from_secs(10)).await.unwrap();
}

/// A stop past its deadline cuts handlers off; what they had in hand comes to the next member.
async fn cut_off(transport: Transport) {
    const EVENTS: usize = 20;
    let bus = Bus::builder()
        .transport(transport)
        .log(MemoryLog::new())
        .build()
        .unwrap();
    bus.start().await.unwrap();
    let name = format!("cut-off-{}", MessageId::new());
    let topic = Topic::parse(name.clone()).unwrap();
    let seen = Seen::default();
    let subscribe = async |hangs: bool| {
        bus.subscribe::<Judged>(name.clone())
            .topic(topic.clone())
            .state(Arc::new((seen.clone(), hangs)))
            .handler(async |(seen, hangs), event, _| {
                if *hangs && event.what != "0" {
                    std::future::pending::<()>().await;
                }
                seen.0
                    .lock()
                    .unwrap()
                    .entry(event.what.clone())
                    .or_default()
                    .push(Instant::now());
                Ok(())
            })
            .start()
            .await
            .unwrap()
    };
    let first = subscribe(true).await;
    for n in 0..EVENTS {
        let message = Judged { what: n.to_string() }.to_message().unwrap();
        bus.publish_direct(message.with_topic(topic.clone())).await.unwrap();
    }
    let began = Instant::now();
    while first.report().delivered < EVENTS as u64 || first.report().handled < 1 {
        assert!(began.elapsed() < Duration::from_secs(60), "{:?}", first.report());
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let error = first.stop(Duration::from_millis(200)).await.unwrap_err();
    assert!(error.to_string().contains("cut off by the deadline"), "{error}");
    let second = subscribe(false).await;
    while seen.0.lock().unwrap().len() < EVENTS {
        assert!(
            began.elapsed() < Duration::from_secs(90),
            "{:?}: {:?}",
            second.report(),
            seen.0.lock().unwrap().keys()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    bus.shutdown(Duration::from_secs(10)).await.unwrap();
}

async fn everywhere(transport: impl AsyncFn() -> Transport) {
    cut_off(transport().await).await;
    for ordered in [false, true] {
        verdicts(transport().await, None, ordered).await;
        verdicts(transport().await, Some(MemoryLog::new().into()), ordered).await;
    }
}

#[test]
fn in_memory() {
    run(everywhere(async || MemoryTransport::new().into()));
}

#[test]
fn on_rabbitmq() {
    run(everywhere(async || {
        let server = server::RabbitMq::shared();
        postrider::rabbitmq::transport(server.url()).unwrap()
    }));
}

#[test]
fn on_kafka() {
    run(everywhere(async || {
        let server = server::Kafka::shared();
        postrider::kafka::transport(server.brokers()).unwrap()
    }));
}
