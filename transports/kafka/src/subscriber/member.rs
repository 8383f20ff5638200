//! The thread of a member: it serves the client, and does what the group's coordinator wants when it can be done.

use super::{
    Shared,
    hold::{Hold, Queue},
};
use crate::client::{failed, log};
use postrider_core::{Assignment, Incoming, Result, Topic};
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    config::{FromClientConfigAndContext as _, RDKafkaLogLevel},
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol},
    error::KafkaError,
    types::RDKafkaRespErr,
};
use rustc_hash::FxHashMap;
use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, PoisonError, Weak,
        atomic::{AtomicBool, AtomicU64, Ordering},
    },
    time::{Duration, Instant},
};
use tokio::sync::watch;

pub(super) type Consumer = BaseConsumer<Rebalances>;

/// Between looks at what is to be done, while something is.
const SOON: Duration = Duration::from_millis(5);
/// And while nothing is.
const LATER: Duration = Duration::from_millis(50);
/// How long leaving a group may take.
const LONGEST_CLOSE: Duration = Duration::from_secs(30);

/// What the group's coordinator wants.
#[derive(Debug, Default)]
pub(super) struct Rebalances {
    wanted: Mutex<VecDeque<Wanted>>,
    /// The client is closing: whatever it wants is done at once.
    closing: AtomicBool,
}

/// Partitions that are assigned, or else revoked.
type Wanted = (bool, Vec<(String, i32)>);

impl ClientContext for Rebalances {
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        log(level, facility, text);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, "librdkafka: {reason}");
    }
}

impl ConsumerContext for Rebalances {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        if self.closing.load(Ordering::Acquire) {
            let _ = match consumer.rebalance_protocol() {
                RebalanceProtocol::Cooperative => consumer.incremental_unassign(list),
                _ => consumer.unassign(),
            };
            return;
        }
        let elements = list.elements();
        let partitions = elements
            .iter()
            .map(|element| (element.topic().to_owned(), element.partition()));
        let is_assigned = what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        let mut wanted = self.wanted.lock().unwrap_or_else(PoisonError::into_inner);
        wanted.push_back((is_assigned, partitions.collect()));
    }
}

fn next_assignment() -> Assignment {
    static LAST: AtomicU64 = AtomicU64::new(0);
    Assignment(LAST.fetch_add(1, Ordering::Relaxed) + 1)
}

/// Joins the group, and starts the thread that serves it.
pub(super) fn start(shared: &Arc<Shared>, ended: watch::Sender<bool>) -> Result<()> {
    let options = shared.cluster.options();
    let millis = |duration: Duration| duration.as_millis().to_string();
    let mut config = shared.cluster.config();
    config
        .set("group.id", shared.subscription.group.as_str())
        .set("auto.offset.reset", "earliest")
        .set("enable.auto.offset.store", "false")
        .set("enable.auto.commit", "true")
        .set("auto.commit.interval.ms", millis(options.commit_interval))
        // Once the queue is full, fetching begins again at once when it is not.
        .set("fetch.queue.backoff.ms", "10")
        // Of each partition; the rest stays where it is.
        .set("queued.max.messages.kbytes", "8192")
        .set("queued.min.messages", (shared.subscription.max_in_flight.saturating_mul(20)).clamp(10_000, 100_000).to_string())
        .set("fetch.wait.max.ms", "100");
    if options.new_group_protocol {
        config.set("group.protocol", "consumer");
    } else {
        config
            .set("partition.assignment.strategy", "cooperative-sticky")
            .set("session.timeout.ms", millis(options.session_timeout))
            .set(
                "heartbeat.interval.ms",
                millis(Duration::from_millis(500).min(options.session_timeout / 3)),
            );
    }
    let consumer = Consumer::from_config_and_context(&config, Rebalances::default()).map_err(failed("connecting"))?;
    let topics: Vec<&str> = shared.subscription.topics.iter().map(Topic::as_str).collect();
    consumer.subscribe(&topics).map_err(failed("joining the group"))?;
    let member = Member {
        shared: Arc::downgrade(shared),
        consumer: Arc::new(consumer),
        queues: FxHashMap::default(),
        revoking: None,
    };
    let name = format!("kafka {}", shared.subscription.group);
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        member.serve();
        let _ = ended.send(true);
    });
    thread.map(drop).map_err(|why| {
        postrider_core::Error::new(postrider_core::ErrorKind::Unexpected, "no thread for Kafka").because(why)
    })
}

struct Member {
    shared: Weak<Shared>,
    consumer: Arc<Consumer>,
    /// Each partition's queue, once it has been this member's: there is one, with one callback, whoever else has a handle on it.
    queues: FxHashMap<(String, i32), Arc<Queue>>,
    /// What the coordinator waits for.
    revoking: Option<Revoking>,
}

/// Partitions that go to others, once what is out of them is settled, or until then.
struct Revoking {
    partitions: Vec<(String, i32)>,
    until: Instant,
}

impl Member {
    fn serve(mut self) {
        let mut told: Option<KafkaError> = None;
        loop {
            let Some(shared) = self.shared.upgrade() else { break };
            if shared.is_closing() {
                break;
            }
            let is_busy = self.revoking.is_some() || shared.holds().values().any(|hold| hold.is_leaving());
            drop(shared);
            match self.consumer.poll(if is_busy { SOON } else { LATER }) {
                None => {}
                Some(Err(KafkaError::MessageConsumptionFatal(why))) => {
                    self.fail(why);
                    break;
                }
                Some(Err(error)) => {
                    // It is tried again by itself.
                    let is_told = told.replace(error.clone()).is_some_and(|last| last == error);
                    if !is_told {
                        tracing::warn!(%error, "Kafka reports an error of the group");
                    }
                }
                // It came before its partition had a queue: it comes once more, there.
                Some(Ok(record)) => {
                    use rdkafka::Message as _;
                    let (topic, partition, at) = (record.topic().to_owned(), record.partition(), record.offset());
                    drop(record);
                    let _ = self
                        .consumer
                        .seek(&topic, partition, Offset::Offset(at), Duration::from_secs(5));
                }
            }
            let Some(shared) = self.shared.upgrade() else { break };
            self.finish_revoking(&shared);
            if self.revoking.is_none() {
                let wanted = {
                    let mut wanted = self
                        .consumer
                        .context()
                        .wanted
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner);
                    wanted.pop_front()
                };
                match wanted {
                    Some((true, partitions)) => self.assign(&shared, &partitions),
                    Some((false, partitions)) => self.revoke(&shared, partitions),
                    None => {}
                }
            }
            self.begin_again(&shared);
        }
        self.leave();
    }

    /// The client can do nothing more, for a reason that somebody has to mend.
    fn fail(&self, why: rdkafka::types::RDKafkaErrorCode) {
        tracing::error!(%why, "Kafka's client has failed for good: the subscription has ended");
        if let Some(shared) = self.shared.upgrade() {
            let error = postrider_core::Error::new(
                postrider_core::ErrorKind::Config,
                "Kafka refuses this member of the group for good: the group's protocol, its rights or its size",
            );
            shared.tell(Err(error.because(why)));
            shared.has_failed.store(true, Ordering::Release);
        }
    }

    fn list(&self, partitions: &[(String, i32)]) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for (topic, partition) in partitions {
            list.add_partition(topic, *partition);
        }
        list
    }

    fn assign(&mut self, shared: &Arc<Shared>, partitions: &[(String, i32)]) {
        let mut holds = Vec::new();
        for (name, partition) in partitions {
            // Its messages come here from the first on.
            let (Some(queue), Ok(topic)) = (self.queue(shared, name, *partition), Topic::parse(name.clone())) else {
                tracing::error!(topic = name, partition, "a partition cannot be consumed");
                continue;
            };
            holds.push(self.hold(topic, *partition, queue, BTreeSet::new()));
        }
        let list = self.list(partitions);
        let assigned = match self.consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => self.consumer.incremental_assign(&list),
            _ => self.consumer.assign(&list),
        };
        if let Err(error) = assigned {
            tracing::warn!(%error, "partitions cannot be taken");
        }
        holds.into_iter().for_each(|hold| shared.add(hold));
    }

    fn queue(&mut self, shared: &Arc<Shared>, topic: &str, partition: i32) -> Option<Arc<Queue>> {
        let place = (topic.to_owned(), partition);
        if let Some(queue) = self.queues.get(&place) {
            return Some(queue.clone());
        }
        let mut queue = self.consumer.split_partition_queue(topic, partition)?;
        let news = shared.news.clone();
        queue.set_nonempty_callback(move || news.notify_one());
        Some(self.queues.entry(place).or_insert(Arc::new(queue)).clone())
    }

    fn hold(&self, topic: Topic, partition: i32, queue: Arc<Queue>, settled: BTreeSet<i64>) -> Arc<Hold> {
        Arc::new(Hold::new(
            next_assignment(),
            topic,
            partition,
            queue,
            &self.consumer,
            settled,
        ))
    }

    fn revoke(&mut self, shared: &Arc<Shared>, partitions: Vec<(String, i32)>) {
        let is_lost = self.consumer.assignment_lost();
        for hold in holds_of(shared, &partitions) {
            if is_lost {
                hold.lose();
                shared.tell(Ok(Incoming::Lost(hold.assignment)));
            } else if hold.leave() {
                shared.tell(Ok(Incoming::Revoked(hold.assignment)));
            }
        }
        let wait = if is_lost {
            Duration::ZERO
        } else {
            shared.cluster.options().handover_timeout
        };
        self.revoking = Some(Revoking {
            partitions,
            until: Instant::now() + wait,
        });
        self.finish_revoking(shared);
    }

    fn finish_revoking(&mut self, shared: &Arc<Shared>) {
        let Some(revoking) = &self.revoking else { return };
        let holds = holds_of(shared, &revoking.partitions);
        let is_late = Instant::now() >= revoking.until;
        if !is_late && holds.iter().any(|hold| !hold.is_idle()) {
            return;
        }
        for hold in holds {
            if !hold.is_idle() {
                tracing::warn!(topic = %hold.topic, partition = hold.partition, "a partition goes to another member with messages unsettled: they come again there");
            }
            hold.lose();
            shared.remove(hold.assignment);
        }
        self.commit();
        let list = self.list(&revoking.partitions);
        let unassigned = match self.consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => self.consumer.incremental_unassign(&list),
            _ => self.consumer.unassign(),
        };
        if let Err(error) = unassigned {
            tracing::warn!(%error, "partitions cannot be given up");
        }
        self.revoking = None;
    }

    fn commit(&self) {
        match self.consumer.commit_consumer_state(CommitMode::Sync) {
            Ok(()) | Err(KafkaError::ConsumerCommit(rdkafka::types::RDKafkaErrorCode::NoOffset)) => {}
            Err(error) => tracing::warn!(%error, "offsets were not committed: what was settled last may come again"),
        }
    }

    /// Goes back to what was released, once nothing is out of its partition.
    fn begin_again(&self, shared: &Arc<Shared>) {
        let revoked = self.revoking.as_ref().map_or(&[][..], |revoking| &revoking.partitions);
        let idle: Vec<Arc<Hold>> = {
            let holds = shared.holds();
            let of_others = |hold: &Hold| {
                let is =
                    |(topic, partition): &(String, i32)| topic == hold.topic.as_str() && *partition == hold.partition;
                revoked.iter().any(is)
            };
            let ready = holds
                .values()
                .filter(|hold| hold.is_leaving() && hold.is_idle() && !of_others(hold));
            ready.cloned().collect()
        };
        for hold in idle {
            let Some((from, settled)) = hold.begins_again() else {
                continue;
            };
            hold.lose();
            let sought = self.consumer.seek(
                hold.topic.as_str(),
                hold.partition,
                Offset::Offset(from),
                shared.cluster.options().timeout,
            );
            if let Err(error) = sought {
                tracing::warn!(%error, topic = %hold.topic, partition = hold.partition, "a partition cannot begin again: it is tried by its next member");
            }
            shared.remove(hold.assignment);
            shared.add(self.hold(hold.topic.clone(), hold.partition, hold.queue.clone(), settled));
        }
    }

    /// Ends in order: what was settled without a gap is committed, everything else comes again.
    fn leave(self) {
        self.consumer.context().closing.store(true, Ordering::Release);
        if let Some(shared) = self.shared.upgrade() {
            let holds = std::mem::take(&mut *shared.holds());
            holds.values().for_each(|hold| hold.lose());
            shared.changed.fetch_add(1, Ordering::Release);
        }
        self.commit();
        // What the coordinator still waits for is done now.
        let undone = {
            let mut wanted = self
                .consumer
                .context()
                .wanted
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            std::mem::take(&mut *wanted)
        };
        let revoked = undone
            .into_iter()
            .filter(|(is_assigned, _)| !is_assigned)
            .map(|(_, partitions)| partitions);
        for partitions in self
            .revoking
            .iter()
            .map(|revoking| revoking.partitions.clone())
            .chain(revoked)
        {
            let _ = match self.consumer.rebalance_protocol() {
                RebalanceProtocol::Cooperative => self.consumer.incremental_unassign(&self.list(&partitions)),
                _ => self.consumer.unassign(),
            };
        }
        // Here and not where the last handle is dropped, which may be long after.
        match self.consumer.close_queue() {
            Ok(()) => {
                let until = Instant::now() + LONGEST_CLOSE;
                while !self.consumer.closed() && Instant::now() < until {
                    let _ = self.consumer.poll(Duration::from_millis(20));
                }
            }
            Err(error) => {
                tracing::warn!(%error, "the group was not left in order: its others wait for this member's session to end");
            }
        }
    }
}

fn holds_of(shared: &Shared, partitions: &[(String, i32)]) -> Vec<Arc<Hold>> {
    let holds = shared.holds();
    let is_of = |hold: &&Arc<Hold>| {
        partitions
            .iter()
            .any(|(topic, partition)| topic == hold.topic.as_str() && *partition == hold.partition)
    };
    holds.values().filter(is_of).cloned().collect()
}
