//! The thread of a member: it serves the client, and does what the group's coordinator wants when it can be done.

use super::{
    Shared, beginning,
    hold::{Hold, Queue},
};
use crate::{client::Cluster, config::Start};
use postrider_core::{
    Error, ErrorKind, Incoming, MessageId, Result, Topic,
    partition::{Hold as _, Working},
    subscriber::Lag,
};
use rdkafka::{
    ClientContext, Offset, TopicPartitionList,
    client::OAuthToken,
    config::{FromClientConfigAndContext as _, RDKafkaLogLevel},
    consumer::{BaseConsumer, CommitMode, Consumer as _, ConsumerContext, RebalanceProtocol},
    error::{KafkaError, KafkaResult, RDKafkaErrorCode},
    statistics::Statistics,
    types::RDKafkaRespErr,
};
use rustc_hash::FxHashMap;
use std::{
    collections::{BTreeSet, VecDeque},
    sync::{
        Arc, Mutex, MutexGuard, PoisonError,
        atomic::{AtomicBool, Ordering},
        mpsc::{self, RecvTimeoutError},
    },
    time::{Duration, Instant},
};

pub(super) type Consumer = BaseConsumer<Rebalances>;

/// Between looks at what is to be done, while something is.
const SOON: Duration = Duration::from_millis(5);
/// And while nothing is.
const LATER: Duration = Duration::from_millis(50);
/// A refusal that lasts is told again.
const REPEATED_AFTER: Duration = Duration::from_secs(10);
/// Between tries to place a partition anew.
const PLACED_AGAIN_AFTER: Duration = Duration::from_millis(500);
/// Between two looks at how much waits with the brokers.
const LAG_EVERY: Duration = Duration::from_secs(5);
/// How long leaving a group may take.
const LONGEST_CLOSE: Duration = Duration::from_secs(30);
/// How long joining it takes at most, for one that leaves before it hears of partitions; with the new protocol it does not hear
/// that it gets none.
const LONGEST_JOIN: Duration = Duration::from_secs(5);

/// What the group's coordinator wants.
#[derive(Debug)]
pub(super) struct Rebalances {
    cluster: Cluster,
    wanted: Mutex<VecDeque<Wanted>>,
    /// The group knows this member, and what it has of it.
    has_joined: AtomicBool,
    /// The client is closing: whatever it wants is done at once.
    closing: AtomicBool,
    /// It has been given a token to log in with.
    has_token: AtomicBool,
    begins_with_earliest: bool,
    lag: Lag,
}

/// Partitions that are assigned, or else revoked.
type Wanted = (bool, Vec<Place>);

impl Rebalances {
    fn wanted(&self) -> MutexGuard<'_, VecDeque<Wanted>> {
        self.wanted.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Gives partitions up, as the group's protocol has it.
fn unassign(consumer: &Consumer, list: &TopicPartitionList) -> KafkaResult<()> {
    match consumer.rebalance_protocol() {
        RebalanceProtocol::Cooperative => consumer.incremental_unassign(list),
        _ => consumer.unassign(),
    }
}

impl ClientContext for Rebalances {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, _: Option<&str>) -> std::result::Result<OAuthToken, Box<dyn std::error::Error>> {
        let token = self.cluster.token()?;
        self.has_token.store(true, Ordering::Release);
        Ok(token)
    }
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.cluster.said(level, facility, text);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, "librdkafka: {reason}");
    }

    /// What is not settled yet, of the partitions that this member has.
    fn stats(&self, statistics: Statistics) {
        let partitions = statistics.topics.values().flat_map(|topic| topic.partitions.values());
        let its_own = partitions.filter(|partition| partition.fetch_state == "active");
        let lags = its_own.filter_map(|partition| {
            // Where nothing is settled yet: of a group that begins with the earliest, all that there is.
            let first = match self.begins_with_earliest {
                true => partition.lo_offset,
                false => partition.next_offset,
            };
            let places = [partition.stored_offset, partition.committed_offset, first];
            let settled = places.into_iter().find(|at| *at >= 0)?;
            u64::try_from(partition.ls_offset - settled).ok()
        });
        self.lag.set(lags.sum());
    }
}

impl ConsumerContext for Rebalances {
    fn rebalance(&self, consumer: &BaseConsumer<Self>, what: RDKafkaRespErr, list: &mut TopicPartitionList) {
        self.has_joined.store(true, Ordering::Release);
        if self.closing.load(Ordering::Acquire) {
            let _ = unassign(consumer, list);
            return;
        }
        let elements = list.elements();
        let partitions = elements
            .iter()
            .map(|element| (element.topic().to_owned(), element.partition()));
        let is_assigned = what == RDKafkaRespErr::RD_KAFKA_RESP_ERR__ASSIGN_PARTITIONS;
        self.wanted().push_back((is_assigned, partitions.collect()));
    }
}

/// Joins the group, whose topics have so many partitions, and starts the thread that serves it.
pub(super) fn start(shared: Arc<Shared>, partitions: usize, working: Working<Hold>) -> Result<()> {
    let options = shared.cluster.options();
    // Of each partition, all of which this member may have.
    let fetched_ahead = (options.fetch_memory / partitions / 1024).clamp(64, 8192);
    let millis = |duration: Duration| duration.as_millis().to_string();
    let mut config = shared.cluster.config();
    let group = &shared.subscription.group;
    let broadcast = shared.subscription.broadcast;
    let group = match broadcast {
        // A group of its own, which goes with it.
        true => format!("{group}.each.{}", MessageId::new()),
        false => group.to_string(),
    };
    config
        .set("group.id", &group)
        // Where it is not known: then this transport says.
        .set("auto.offset.reset", "error")
        .set("enable.auto.offset.store", "false")
        .set("enable.auto.commit", if broadcast { "false" } else { "true" })
        .set("auto.commit.interval.ms", millis(options.commit_interval))
        // Once the queue is full, fetching begins again at once when it is not.
        .set("fetch.queue.backoff.ms", "10")
        // The rest stays where it is.
        .set("queued.max.messages.kbytes", fetched_ahead.to_string())
        .set("fetch.max.bytes", options.fetch_memory.clamp(1 << 20, 50 << 20).to_string())
        .set("queued.min.messages", (shared.subscription.max_in_flight.saturating_mul(20)).clamp(10_000, 100_000).to_string())
        .set("statistics.interval.ms", millis(LAG_EVERY))
        // New partitions are noticed soon.
        .set("topic.metadata.refresh.interval.ms", "30000")
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
    let cluster = &shared.cluster;
    let rebalances = Rebalances {
        cluster: cluster.clone(),
        wanted: Mutex::default(),
        has_joined: AtomicBool::new(false),
        closing: AtomicBool::new(false),
        has_token: AtomicBool::new(false),
        begins_with_earliest: options.start == Start::Earliest && !broadcast,
        lag: shared.membership.lag().clone(),
    };
    let mut config = cluster.with_properties(config);
    for (name, value) in options.of_group(&shared.subscription.group) {
        config.set(name, value);
    }
    let consumer = Consumer::from_config_and_context(&config, rebalances);
    let consumer = consumer.map_err(cluster.failed("connecting"))?;
    if options.token().is_some() {
        // It is asked for by polling.
        let until = Instant::now() + options.timeout;
        while !consumer.context().has_token.load(Ordering::Acquire) && Instant::now() < until {
            let _ = consumer.poll(SOON);
        }
    }
    let topics: Vec<&str> = shared.subscription.topics.iter().map(Topic::as_str).collect();
    // Whoever subscribes hears if there is no broker; joining the group says nothing. And a topic that brokers do not know yet
    // would be assigned minutes later.
    let partitions = partitions_of(&consumer, &topics, options.timeout)?;
    let from = if broadcast {
        ends_of(&consumer, partitions, options.timeout).map_err(cluster.failed("looking where topics end"))?
    } else {
        FxHashMap::default()
    };
    consumer
        .subscribe(&topics)
        .map_err(cluster.failed("joining the group"))?;
    let name = format!("kafka {}", shared.subscription.group);
    let member = Member {
        shared,
        consumer: Arc::new(consumer),
        queues: FxHashMap::default(),
        from,
        begun: FxHashMap::default(),
        failed_at: None,
        revoking: None,
        since: Instant::now(),
    };
    let thread = std::thread::Builder::new().name(name).spawn(move || {
        member.serve();
        drop(working);
    });
    thread
        .map(drop)
        .map_err(|why| Error::new(ErrorKind::Unexpected, "no thread for Kafka").because(why))
}

/// A topic and a partition of it.
pub(super) type Place = (String, i32);

/// The partitions of these topics, which were declared: brokers may hear of that a moment later.
fn partitions_of(consumer: &Consumer, topics: &[&str], limit: Duration) -> Result<Vec<Place>> {
    let until = Instant::now() + limit;
    let mut partitions = Vec::new();
    for topic in topics {
        let before = partitions.len();
        while partitions.len() == before {
            let metadata = consumer.fetch_metadata(Some(topic), limit);
            let metadata = metadata
                .map_err(|why| consumer.context().cluster.failed("looking for a topic")(why).with("topic", topic))?;
            let found = metadata.topics().iter().flat_map(|topic| topic.partitions());
            partitions.extend(found.map(|partition| ((*topic).to_owned(), partition.id())));
            if partitions.len() == before && Instant::now() >= until {
                let text = "the topic has been declared on Kafka, but brokers do not know it yet: try again";
                return Err(Error::new(ErrorKind::Unavailable, text)
                    .with("topic", topic)
                    .with("timeout", format!("{limit:?}")));
            }
            if partitions.len() == before {
                // Nobody else has this consumer yet: it waits by polling.
                let _ = consumer.poll(SOON);
            }
        }
    }
    Ok(partitions)
}

/// Where these partitions end.
fn ends_of(consumer: &Consumer, partitions: Vec<Place>, limit: Duration) -> KafkaResult<FxHashMap<Place, i64>> {
    let end = |place: Place| {
        let (_, end) = consumer.fetch_watermarks(&place.0, place.1, limit)?;
        Ok((place, end))
    };
    partitions.into_iter().map(end).collect()
}

struct Member {
    shared: Arc<Shared>,
    consumer: Arc<Consumer>,
    /// Each partition's queue, once it has been this member's: there is one, with one callback, whoever else has a handle on it.
    queues: FxHashMap<Place, Arc<Queue>>,
    /// Of a broadcast, which commits nothing: where each partition goes on.
    from: FxHashMap<Place, i64>,
    /// Where partitions began that had nothing committed.
    begun: beginning::Begun,
    /// When a partition could not be placed anew, the last time.
    failed_at: Option<Instant>,
    /// What the coordinator waits for.
    revoking: Option<Revoking>,
    /// When it began to join.
    since: Instant,
}

/// Partitions that go to others, once what is out of them is settled, or until then.
struct Revoking {
    partitions: Vec<Place>,
    until: Instant,
}

impl Member {
    fn serve(mut self) {
        let mut told: Option<KafkaError> = None;
        let mut refused: Option<(RDKafkaErrorCode, Instant)> = None;
        loop {
            if self.shared.membership.is_closing() {
                break;
            }
            let holds = self.shared.membership.holds();
            let is_busy = self.revoking.is_some() || holds.iter().any(|hold| hold.is_leaving());
            let mut refusal = holds.iter().find_map(|hold| hold.take_refusal());
            match self.consumer.poll(if is_busy { SOON } else { LATER }) {
                None => {}
                Some(Err(KafkaError::MessageConsumptionFatal(why))) => {
                    self.fail(why);
                    break;
                }
                Some(Err(error)) if is_refusal(&error) => refusal = error.rdkafka_error_code(),
                Some(Err(error)) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::AllBrokersDown) => {
                    let error = self.shared.cluster.failed("consuming")(error);
                    self.shared.membership.tell(Err(error));
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
            self.finish_revoking();
            if self.revoking.is_none() {
                let wanted = self.consumer.context().wanted().pop_front();
                match wanted {
                    Some((true, partitions)) => self.assign(&partitions),
                    Some((false, partitions)) => self.revoke(partitions),
                    None => {}
                }
            }
            self.begin_again();
            self.find_places();
            // One that the client reports again and again is told now, and repeated below.
            if let Some(code) = refusal
                && refused.is_none_or(|(known, _)| known != code)
            {
                refused = Some((code, Instant::now()));
                self.tell_refused(code);
            }
            if let Some((code, since)) = refused
                && since.elapsed() >= REPEATED_AFTER
            {
                if self.may_place() {
                    self.ask_again();
                }
                refused = self.is_refused(code).then(|| (code, Instant::now()));
                if refused.is_some() {
                    self.tell_refused(code);
                }
            }
        }
        self.leave();
    }

    /// Tells that this member gets nothing, or not all of it, and will not until somebody mends that.
    fn tell_refused(&self, code: RDKafkaErrorCode) {
        let why = match code {
            RDKafkaErrorCode::GroupAuthorizationFailed => {
                "the user may not read as this group: it needs READ on the group (Kafka's ACLs), under its name or a prefix"
            }
            RDKafkaErrorCode::TopicAuthorizationFailed => {
                "the user may not read a topic of this group: it needs READ and DESCRIBE on each (Kafka's ACLs)"
            }
            _ => {
                "the members of the group do not share a protocol: all have to use the same, `with_new_group_protocol` or not"
            }
        };
        let error = Error::new(ErrorKind::Config, why).with("group", &self.shared.subscription.group);
        self.shared.membership.tell(Err(error.because(code)));
    }

    /// Whether it still is so.
    fn is_refused(&self, code: RDKafkaErrorCode) -> bool {
        if code != RDKafkaErrorCode::TopicAuthorizationFailed {
            return self.shared.membership.holds().is_empty();
        }
        let mut topics = self.shared.subscription.topics.iter();
        topics.any(|topic| {
            let metadata = self
                .consumer
                .fetch_metadata(Some(topic.as_str()), Duration::from_secs(2));
            let is_refused = |found: &rdkafka::metadata::MetadataTopic| {
                found.error() == Some(RDKafkaRespErr::RD_KAFKA_RESP_ERR_TOPIC_AUTHORIZATION_FAILED)
            };
            metadata.is_ok_and(|metadata| metadata.topics().iter().any(is_refused))
        })
    }

    /// Whether partitions may be placed anew: the client takes any change for the answer to what its group wants just now.
    fn may_place(&self) -> bool {
        let is_settled = self.revoking.is_none() && self.consumer.context().wanted().is_empty();
        is_settled && self.failed_at.is_none_or(|at| at.elapsed() >= PLACED_AGAIN_AFTER)
    }

    /// Has brokers say once more that they refuse a partition, if they still do.
    fn ask_again(&mut self) {
        let mut refused = self.shared.membership.holds();
        refused.retain(|hold| !hold.is_leaving() && hold.asks_again());
        for hold in refused {
            let place = (hold.topic.to_string(), hold.partition);
            let next = hold.next_offset().or_else(|| self.from.get(&place).copied());
            let options = self.shared.cluster.options();
            let at = match next {
                Some(next) => Ok(Offset::Offset(next)),
                None => beginning::of(&self.consumer, &place, options.start, &mut self.begun, options.timeout),
            };
            let placed = at.and_then(|at| beginning::place_again(&self.consumer, &place, at));
            if let Err(error) = placed {
                tracing::debug!(%error, topic = place.0, partition = place.1, "a refused partition cannot be asked for again");
            }
        }
    }

    /// The client can do nothing more, for a reason that somebody has to mend.
    fn fail(&self, why: rdkafka::types::RDKafkaErrorCode) {
        tracing::error!(%why, "Kafka's client has failed for good: the subscription has ended");
        let error = Error::new(
            ErrorKind::Config,
            "Kafka refuses this member of the group for good: the group's protocol, its rights or its size",
        );
        self.shared.membership.tell(Err(error.because(why)));
    }

    fn list(&self, partitions: &[Place]) -> TopicPartitionList {
        let mut list = TopicPartitionList::with_capacity(partitions.len());
        for (topic, partition) in partitions {
            list.add_partition(topic, *partition);
        }
        list
    }

    fn assign(&mut self, partitions: &[Place]) {
        let mut holds = Vec::new();
        for (name, partition) in partitions {
            // Its messages come here from the first on.
            let (Some(queue), Ok(topic)) = (self.queue(name, *partition), Topic::parse(name.clone())) else {
                tracing::error!(topic = name, partition, "a partition cannot be consumed");
                continue;
            };
            holds.push(self.hold(topic, *partition, queue, BTreeSet::new()));
        }
        let mut list = self.list(partitions);
        for (place, at) in self.from.iter().filter(|(place, _)| partitions.contains(place)) {
            let _ = list.set_partition_offset(&place.0, place.1, Offset::Offset(*at));
        }
        if !self.shared.subscription.broadcast {
            let options = self.shared.cluster.options();
            let chosen = beginning::choose(
                &self.consumer,
                &mut list,
                options.start,
                &mut self.begun,
                options.timeout,
            );
            if let Err(error) = chosen {
                tracing::debug!(%error, "what the group has committed cannot be known just now");
            }
        }
        let assigned = match self.consumer.rebalance_protocol() {
            RebalanceProtocol::Cooperative => self.consumer.incremental_assign(&list),
            _ => self.consumer.assign(&list),
        };
        if let Err(error) = assigned {
            tracing::warn!(%error, "partitions cannot be taken");
        }
        holds.into_iter().for_each(|hold| self.shared.membership.add(hold));
    }

    fn queue(&mut self, topic: &str, partition: i32) -> Option<Arc<Queue>> {
        let place = (topic.to_owned(), partition);
        if let Some(queue) = self.queues.get(&place) {
            return Some(queue.clone());
        }
        let mut queue = self.consumer.split_partition_queue(topic, partition)?;
        let news = self.shared.membership.news();
        queue.set_nonempty_callback(move || news.notify_one());
        Some(self.queues.entry(place).or_insert(Arc::new(queue)).clone())
    }

    fn hold(&self, topic: Topic, partition: i32, queue: Arc<Queue>, settled: BTreeSet<i64>) -> Arc<Hold> {
        Arc::new(Hold::new(topic, partition, queue, &self.consumer, settled))
    }

    fn revoke(&mut self, partitions: Vec<Place>) {
        let is_lost = self.consumer.assignment_lost();
        for hold in holds_of(&self.shared, &partitions) {
            match is_lost {
                true => self.shared.membership.lose(&hold),
                false => self.shared.membership.revoke(&hold),
            }
        }
        let wait = if is_lost {
            Duration::ZERO
        } else {
            self.shared.cluster.options().handover_timeout
        };
        self.revoking = Some(Revoking {
            partitions,
            until: Instant::now() + wait,
        });
        self.finish_revoking();
    }

    fn finish_revoking(&mut self) {
        let Some(revoking) = &self.revoking else { return };
        let holds = holds_of(&self.shared, &revoking.partitions);
        let is_late = Instant::now() >= revoking.until;
        if !is_late && holds.iter().any(|hold| !hold.is_idle()) {
            return;
        }
        for hold in holds {
            if !hold.is_idle() {
                tracing::warn!(topic = %hold.topic, partition = hold.partition, "a partition goes to another member with messages unsettled: they come again there");
            }
            hold.lose();
            self.shared.membership.remove(hold.assignment());
            if let Some(next) = hold.next_offset().filter(|_| !self.from.is_empty()) {
                self.from.insert((hold.topic.to_string(), hold.partition), next);
            }
        }
        self.commit();
        if let Err(error) = unassign(&self.consumer, &self.list(&revoking.partitions)) {
            tracing::warn!(%error, "partitions cannot be given up");
        }
        self.revoking = None;
    }

    fn commit(&self) {
        if self.shared.subscription.broadcast {
            return;
        }
        match self.consumer.commit_consumer_state(CommitMode::Sync) {
            Ok(()) | Err(KafkaError::ConsumerCommit(rdkafka::types::RDKafkaErrorCode::NoOffset)) => {}
            Err(error) => tracing::warn!(%error, "offsets were not committed: what was settled last may come again"),
        }
    }

    /// Goes back to what was released, once nothing is out of its partition.
    fn begin_again(&self) {
        let revoked = self.revoking.as_ref().map_or(&[][..], |revoking| &revoking.partitions);
        let mut idle = self.shared.membership.holds();
        idle.retain(|hold| hold.is_leaving() && hold.is_idle() && !is_of(hold, revoked));
        for hold in idle {
            let Some((from, settled)) = hold.begins_again() else {
                continue;
            };
            let place = (hold.topic.to_string(), hold.partition);
            let Some(queue) = self.queues.get(&place).cloned() else {
                continue;
            };
            hold.lose();
            let sought = self.consumer.seek(
                hold.topic.as_str(),
                hold.partition,
                Offset::Offset(from),
                self.shared.cluster.options().timeout,
            );
            if let Err(error) = sought {
                tracing::warn!(%error, topic = %hold.topic, partition = hold.partition, "a partition cannot begin again: it is tried by its next member");
            }
            self.shared.membership.remove(hold.assignment());
            self.shared
                .membership
                .add(self.hold(hold.topic.clone(), hold.partition, queue, settled));
        }
    }

    /// Goes on elsewhere where the brokers do not have what comes next, once nothing is out of the partition. One at a time: it may
    /// take a while.
    fn find_places(&mut self) {
        if !self.may_place() {
            return;
        }
        let mut lost = self.shared.membership.holds();
        lost.retain(|hold| hold.has_lost_place() && hold.is_idle());
        let Some(hold) = lost.pop() else { return };
        let place = (hold.topic.to_string(), hold.partition);
        let Some(queue) = self.queues.get(&place).cloned() else {
            return;
        };
        let options = self.shared.cluster.options();
        let next = hold.next_offset().or_else(|| self.from.get(&place).copied());
        let at = (&hold.topic, hold.partition);
        let found = beginning::find(
            &self.consumer,
            at,
            next,
            options.start,
            &mut self.begun,
            options.timeout,
        );
        let placed = found.and_then(|found| beginning::place_again(&self.consumer, &place, found.at).map(|()| found));
        let found = match placed {
            Ok(found) => found,
            Err(error) => {
                tracing::debug!(%error, topic = place.0, partition = place.1, "a partition has lost its place, and cannot go on yet");
                self.failed_at = Some(Instant::now());
                return;
            }
        };
        hold.lose();
        self.shared.membership.remove(hold.assignment());
        if let Some((messages, why)) = found.missed {
            self.shared.membership.tell(Ok(Incoming::Missed { messages, why }));
        }
        let anew = self.hold(hold.topic.clone(), hold.partition, queue, BTreeSet::new());
        self.shared.membership.add(anew);
    }

    /// Whoever has asked to join has a place kept for it until its session ends, and partitions with it, or nobody else gets in.
    /// The client cannot give that place back before it has been told of it.
    fn finish_joining(&self) {
        let context = self.consumer.context();
        let until = self.since + LONGEST_JOIN;
        while !context.has_joined.load(Ordering::Acquire) && Instant::now() < until {
            if let Some(Err(KafkaError::MessageConsumptionFatal(_))) = self.consumer.poll(SOON) {
                return;
            }
        }
    }

    /// Ends in order: what was settled without a gap is committed, everything else comes again.
    fn leave(self) {
        self.consumer.context().closing.store(true, Ordering::Release);
        self.finish_joining();
        self.shared.membership.take().iter().for_each(|hold| hold.lose());
        self.commit();
        // What the coordinator still waits for is done now.
        let undone = std::mem::take(&mut *self.consumer.context().wanted());
        let revoked = undone.into_iter().filter(|(is_assigned, _)| !is_assigned);
        let revoking = self.revoking.iter().map(|revoking| revoking.partitions.clone());
        for partitions in revoking.chain(revoked.map(|(_, partitions)| partitions)) {
            let _ = unassign(&self.consumer, &self.list(&partitions));
        }
        let Self {
            shared,
            mut consumer,
            queues,
            ..
        } = self;
        drop(queues);
        let (leaving, left) = mpsc::channel();
        let closing = move || {
            // Whoever looks at a message or notes an offset just now has a handle for that long.
            let alone = loop {
                match Arc::try_unwrap(consumer) {
                    Ok(alone) => break alone,
                    Err(again) => consumer = again,
                }
                std::thread::park_timeout(Duration::from_millis(1));
            };
            // It leaves the group, and waits for the answer.
            drop(alone);
            let _ = leaving.send(());
        };
        let name = format!("kafka {} leaving", shared.subscription.group);
        let started = std::thread::Builder::new().name(name).spawn(closing);
        if started.is_err() || left.recv_timeout(LONGEST_CLOSE) == Err(RecvTimeoutError::Timeout) {
            tracing::warn!(group = %shared.subscription.group, "the group was not left in order: its others wait for this member's session to end");
        }
    }
}

/// Whether brokers say that this member is to have nothing, or not all that it asks for.
pub(super) fn is_refusal(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    let refusals = [
        Code::GroupAuthorizationFailed,
        Code::TopicAuthorizationFailed,
        Code::InconsistentGroupProtocol,
    ];
    error.rdkafka_error_code().is_some_and(|code| refusals.contains(&code))
}

fn holds_of(shared: &Shared, partitions: &[Place]) -> Vec<Arc<Hold>> {
    let mut holds = shared.membership.holds();
    holds.retain(|hold| is_of(hold, partitions));
    holds
}

fn is_of(hold: &Hold, partitions: &[Place]) -> bool {
    let is = |(topic, partition): &Place| topic == hold.topic.as_str() && *partition == hold.partition;
    partitions.iter().any(is)
}
