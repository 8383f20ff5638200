//! A rolling deploy: two versions of a program in one group, the new one with more event types.

use super::TransportFixture;
use postrider_core::{
    Bus, Codec, Event, EventLog, GroupName, Mailbox, Message, PublisherExt as _, Result, Retry, Running, Topic,
    Transactional, Transport,
    log::{Filter, Page},
    memory::MemoryLog,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, PoisonError},
    time::{Duration, Instant},
};

/// How long the whole may take.
const LIMIT: Duration = Duration::from_secs(120);
/// How often an event of each kind is published to each key.
const ROUNDS: u32 = 12;
const KEYS: u32 = 6;

/// Text as it is.
#[derive(Debug)]
struct Plain;

macro_rules! events {
    ($($type:ident $name:literal $topic:literal;)*) => {$(
        #[derive(Debug)]
        struct $type(String);
        impl Event for $type {
            const NAME: &'static str = $name;
            const TOPIC: Topic = Topic::new($topic);
            const KEYED: bool = true;
            type Codec = Plain;
        }
        impl Codec<$type> for Plain {
            const CONTENT_TYPE: &'static str = "text/plain";
            fn encode(event: &$type) -> Result<bytes::Bytes> {
                Ok(event.0.clone().into_bytes().into())
            }
            fn decode(payload: &bytes::Bytes) -> Result<$type> {
                Ok($type(String::from_utf8_lossy(payload).into_owned()))
            }
        }
    )*};
}

events! {
    Known "kit.known" "kit.deploy.known";
    OnOldTopic "kit.on-old-topic" "kit.deploy.known";
    OnNewTopic "kit.on-new-topic" "kit.deploy.new";
}

/// What was handled, in order, and in which member.
#[derive(Debug, Clone, Default)]
struct Handled(Arc<Mutex<Vec<String>>>);

impl Handled {
    fn note(&self, text: &str) {
        self.0
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text.to_owned());
    }
    fn all(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }
}

/// A process of its own, but for its memory.
struct Process {
    bus: Bus,
    running: Running,
}

impl Process {
    fn bus(log: &MemoryLog, transport: Transport) -> Bus {
        let bus = Bus::builder()
            .log(EventLog::from(log.clone()))
            .transport(transport)
            .build();
        bus.expect("a bus")
    }

    async fn old(fixture: &dyn TransportFixture, log: &MemoryLog, handled: &Handled) -> Self {
        let bus = Self::bus(log, fixture.transport());
        let running = bus
            .subscribe::<Known>(fixture.group("g").as_str())
            .topic(fixture.topic("old"))
            .retry(Retry::default().with_in_place(1))
            .middleware_for_all(Transactional::new())
            .state(handled.0.clone())
            .handler(async |handled: &Mutex<Vec<String>>, event: &Known, _| {
                Handled::of(handled, &event.0);
                Ok(())
            })
            .start()
            .await
            .expect("it starts");
        Self { bus, running }
    }

    async fn new(fixture: &dyn TransportFixture, log: &MemoryLog, handled: &Handled) -> Self {
        let bus = Self::bus(log, fixture.transport());
        let running = bus
            .subscribe::<Known>(fixture.group("g").as_str())
            .topic(fixture.topic("old"))
            .topic(fixture.topic("new"))
            .retry(Retry::default().with_in_place(1))
            .middleware_for_all(Transactional::new())
            .state(handled.0.clone())
            .handler(async |handled: &Mutex<Vec<String>>, event: &Known, _| {
                Handled::of(handled, &event.0);
                Ok(())
            })
            .and::<OnOldTopic>()
            .handler(async |handled: &Mutex<Vec<String>>, event: &OnOldTopic, _| {
                Handled::of(handled, &event.0);
                Ok(())
            })
            .and::<OnNewTopic>()
            .handler(async |handled: &Mutex<Vec<String>>, event: &OnNewTopic, _| {
                Handled::of(handled, &event.0);
                Ok(())
            })
            .start()
            .await
            .expect("it starts");
        Self { bus, running }
    }
}

impl Handled {
    fn of(handled: &Mutex<Vec<String>>, text: &str) {
        handled
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .push(text.to_owned());
    }
}

/// Publishes one round: of each key a known event and one of a new type to the old topic, and one to the new topic.
async fn publish(fixture: &dyn TransportFixture, round: u32, with_new: bool, published: &Handled) {
    let mut batch = Vec::new();
    for key in 0..KEYS {
        let mut add = |topic: &str, kind: std::borrow::Cow<'static, str>, n: u32| {
            let text = format!("{topic} {key} {n}");
            published.note(&text);
            let message = Message::new(fixture.topic(topic), kind.into_owned(), text).with_source("kit");
            batch.push(message.with_key(key.to_string()));
        };
        add("old", Known::kind(), 2 * round);
        if with_new {
            add("old", OnOldTopic::kind(), 2 * round + 1);
            add("new", OnNewTopic::kind(), round);
        }
    }
    let transport = fixture.transport();
    for outcome in transport.publisher().expect("a publisher").publish_all(&batch).await {
        outcome.expect("published");
    }
}

async fn left_behind(log: &MemoryLog, group: &GroupName) -> usize {
    let log = EventLog::from(log.clone());
    let admin = log.admin().expect("the memory log has it").clone();
    let filter = Filter::of(Mailbox::Inbox(group.clone()));
    let page = admin.list(&filter, &Page::first(1000)).await.expect("it lists");
    let open = page
        .entries
        .iter()
        .filter(|stored| stored.state != postrider_core::log::RecordState::Succeeded);
    open.count()
}

/// An old version of a program and a new one, which handles one more event type on an old topic and one on a new topic, are
/// members of one group for a while, then the old one goes: every event is handled exactly once, the order of each key is
/// kept, and nothing is left behind.
pub async fn a_rolling_deploy_loses_nothing(fixture: &dyn TransportFixture) {
    let (log, handled, published) = (MemoryLog::new(), Handled::default(), Handled::default());
    let began = Instant::now();
    let old = Process::old(fixture, &log, &handled).await;
    publish(fixture, 0, false, &published).await;
    while handled.all().len() < published.all().len() {
        assert!(began.elapsed() < LIMIT, "the old version handles what it knows");
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let new = Process::new(fixture, &log, &handled).await;
    for round in 1..=ROUNDS {
        publish(fixture, round, true, &published).await;
        // Both are members for a while.
        tokio::time::sleep(Duration::from_millis(150)).await;
    }
    old.running
        .stop(Duration::from_secs(20))
        .await
        .expect("it stops in time");
    old.bus
        .shutdown(Duration::from_secs(20))
        .await
        .expect("it shuts down in time");
    publish(fixture, ROUNDS + 1, true, &published).await;
    while handled.all().len() < published.all().len() {
        let (got, sent) = (handled.all().len(), published.all().len());
        assert!(
            began.elapsed() < LIMIT,
            "{got} of {sent} handled, {:?}",
            new.running.report()
        );
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let report = (old.running.report(), new.running.report());
    assert_eq!((report.0.ignored, report.1.ignored), (0, 0), "{report:?}");
    assert_eq!(
        left_behind(&log, &fixture.group("g")).await,
        0,
        "nothing is left behind"
    );
    let mut all = handled.all();
    let mut last: BTreeMap<(String, String), u32> = BTreeMap::new();
    for text in &all {
        let words: Vec<&str> = text.split(' ').collect();
        let n: u32 = words[2].parse().expect("a number");
        let before = last.insert((words[0].to_owned(), words[1].to_owned()), n);
        assert!(
            before.is_none_or(|before| before < n),
            "{text} came behind {before:?}: {all:?}"
        );
    }
    let mut expected = published.all();
    all.sort_unstable();
    expected.sort_unstable();
    assert_eq!(all, expected, "each exactly once");
    new.bus
        .shutdown(Duration::from_secs(20))
        .await
        .expect("it shuts down in time");
}
