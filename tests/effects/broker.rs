//! A broker that outlives every process: a file of messages, one of acknowledgements, one of what was published.

use crate::fate::Fate;
use async_trait::async_trait;
use postrider::{
    Assignment, Capabilities, Deliveries, DeliveryTag, Disposition, Feed, Incoming, Message, MessageId, Outcomes,
    Publisher, Reachability, Received, Result, Settler, Subscriber, Subscription, Topic, Transport,
};
use std::{
    collections::HashSet,
    fs::File,
    io::Write as _,
    path::{Path, PathBuf},
    sync::Mutex,
};

#[derive(Debug, serde::Serialize, serde::Deserialize)]
struct Line {
    id: String,
    topic: String,
    kind: String,
    key: Option<String>,
    cause: Option<String>,
    payload: String,
}

impl Line {
    fn of(message: &Message) -> Self {
        Self {
            id: message.id().to_string(),
            topic: message.topic().to_string(),
            kind: message.kind().to_owned(),
            key: message.key().map(str::to_owned),
            cause: message.attribute("causationid").map(ToString::to_string),
            payload: String::from_utf8(message.payload().to_vec()).unwrap(),
        }
    }
    fn message(self) -> Message {
        let message = Message::new(Topic::parse(self.topic).unwrap(), self.kind, self.payload)
            .with_id(self.id.parse().unwrap())
            .with_source("test");
        match self.key {
            Some(key) => message.with_key(key),
            None => message,
        }
    }
}

fn append(path: &Path, text: &str) {
    let mut file = File::options().create(true).append(true).open(path).unwrap();
    file.write_all(text.as_bytes()).unwrap();
}

fn lines(path: &Path) -> Vec<String> {
    std::fs::read_to_string(path)
        .unwrap_or_default()
        .lines()
        .map(str::to_owned)
        .collect()
}

/// What was published by all that share an outbox.
fn published(dir: &Path) -> PathBuf {
    dir.parent().unwrap().join("published")
}

#[derive(Debug, Clone)]
pub(crate) struct Broker {
    dir: PathBuf,
    fate: &'static Fate,
}

impl Broker {
    pub(crate) fn transport(dir: &Path, fate: &'static Fate) -> Transport {
        let broker = Self {
            dir: dir.to_owned(),
            fate,
        };
        let can = Capabilities::default()
            .with_order(postrider::transport::Order::Partitioned)
            .with_dead_letter();
        Transport::new("files", can)
            .with_publisher(broker.clone())
            .with_subscriber(broker)
    }

    pub(crate) fn send(dir: &Path, messages: &[Message]) {
        for message in messages {
            let line = serde_json::to_string(&Line::of(message)).unwrap() + "\n";
            append(&dir.join("messages"), &line);
        }
    }

    /// How many follow-ups of a message the broker has got: repeats have the id of the first.
    pub(crate) fn published(dir: &Path, cause: MessageId) -> usize {
        let published = lines(&published(dir));
        let published = published.iter().map(|line| serde_json::from_str::<Line>(line).unwrap());
        let of_it = published.filter(|line| line.cause.as_deref() == Some(&*cause.to_string()));
        of_it.map(|line| line.id).collect::<HashSet<_>>().len()
    }

    /// Whether everything sent has been acknowledged, and has so many follow-ups.
    pub(crate) fn is_done(dir: &Path, follow_ups: usize) -> bool {
        let acks: HashSet<String> = lines(&dir.join("acks")).into_iter().collect();
        lines(&dir.join("messages")).iter().all(|line| {
            let line: Line = serde_json::from_str(line).unwrap();
            acks.contains(&line.id) && Self::published(dir, line.id.parse().unwrap()) >= follow_ups
        })
    }
}

#[async_trait]
impl Publisher for Broker {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        self.fate.decides("publish");
        let lines = batch
            .iter()
            .map(|message| serde_json::to_string(&Line::of(message)).unwrap() + "\n");
        append(&published(&self.dir), &lines.collect::<String>());
        self.fate.decides("published");
        outcomes.report_rest(Ok(()));
    }
    async fn check(&self) -> Reachability {
        Reachability::Up
    }
}

#[derive(Debug)]
struct Waiting(Vec<Received>);

#[async_trait]
impl Deliveries for Waiting {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        if self.0.is_empty() {
            std::future::pending::<()>().await;
        }
        let rest = self.0.split_off(max.min(self.0.len()));
        Ok(Incoming::Batch(std::mem::replace(&mut self.0, rest)))
    }
}

#[derive(Debug)]
struct Acks {
    broker: Broker,
    ids: Mutex<Vec<String>>,
}

#[async_trait]
impl Settler for Acks {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        self.broker.fate.decides("ack");
        for (tag, disposition) in batch {
            if *disposition == Disposition::Ack {
                let id = self.ids.lock().unwrap()[usize::try_from(tag.0).unwrap()].clone();
                append(&self.broker.dir.join("acks"), &format!("{id}\n"));
            }
        }
        self.broker.fate.decides("acked");
        batch.iter().map(|_| Ok(())).collect()
    }
    async fn close(&self, _: std::time::Duration) -> Result<()> {
        Ok(())
    }
}

#[async_trait]
impl Subscriber for Broker {
    /// It keeps everything anyway.
    async fn declare(&self, _: &Subscription) -> Result<()> {
        Ok(())
    }
    async fn subscribe(&self, _: &Subscription) -> Result<Feed> {
        let acks: HashSet<String> = lines(&self.dir.join("acks")).into_iter().collect();
        let all = lines(&self.dir.join("messages"));
        let left = all.iter().map(|line| serde_json::from_str::<Line>(line).unwrap());
        let left: Vec<Message> = left
            .filter(|line| !acks.contains(&line.id))
            .map(Line::message)
            .collect();
        let ids = left.iter().map(|message| message.id().to_string()).collect();
        let received = left.into_iter().zip(0..).map(|(message, tag)| Received {
            message,
            tag: DeliveryTag(tag),
            delivery_count: 1,
            attempts: 0,
            assignment: Assignment::WHOLE,
        });
        let acks = Acks {
            broker: self.clone(),
            ids: Mutex::new(ids),
        };
        Ok(Feed::new(Waiting(received.collect()), acks))
    }
}
