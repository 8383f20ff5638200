//! Publishing: librdkafka's own thread sends and confirms, and reports each outcome itself.

use crate::{
    client::{Cluster, off_thread},
    topology::Topology,
    wire,
};
use async_trait::async_trait;
use postrider_core::{ErrorKind, Message, Outcomes, PublishError, Publisher, Reachability};
use rdkafka::{
    ClientContext,
    client::OAuthToken,
    config::{FromClientConfigAndContext as _, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer},
};
use std::{
    fmt,
    sync::{
        Arc, Mutex, PoisonError,
        atomic::{AtomicBool, AtomicUsize, Ordering},
    },
    time::Duration,
};
use tokio::sync::{Semaphore, SemaphorePermit, oneshot};

type Producer = ThreadedProducer<Confirms>;

/// A message of so many bytes is taken by itself, wherever its topic's limit makes sense.
const ALWAYS_TAKEN: usize = 10_000;

/// The sending side. Clones share one client, which is made when it is first used.
#[derive(Debug, Clone)]
pub(crate) struct KafkaPublisher {
    shared: Arc<Shared>,
}

struct Shared {
    cluster: Cluster,
    topology: Topology,
    producer: Mutex<Option<Arc<Producer>>>,
    window: Semaphore,
}

impl fmt::Debug for Shared {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Shared")
            .field("cluster", &self.cluster)
            .finish_non_exhaustive()
    }
}

/// What is told of confirms.
struct Confirms(Cluster);

impl ClientContext for Confirms {
    const ENABLE_REFRESH_OAUTH_TOKEN: bool = true;

    fn generate_oauth_token(&self, _: Option<&str>) -> Result<OAuthToken, Box<dyn std::error::Error>> {
        self.0.token()
    }
    fn log(&self, level: RDKafkaLogLevel, facility: &str, text: &str) {
        self.0.said(level, facility, text);
    }
    fn error(&self, error: KafkaError, reason: &str) {
        tracing::debug!(%error, "librdkafka: {reason}");
    }
}

impl ProducerContext for Confirms {
    type DeliveryOpaque = Box<Slot>;

    fn delivery(&self, result: &DeliveryResult<'_>, slot: Box<Slot>) {
        let outcome = match result {
            Ok(_) => Ok(()),
            Err((error, _)) => Err(error.clone()),
        };
        slot.call.ended(slot.at, outcome);
    }
}

/// A message's place in its call.
struct Slot {
    call: Arc<Call>,
    at: usize,
}

/// Messages on their way, of one call.
struct Call {
    shared: Arc<Shared>,
    /// Each with its position in the batch that the outcomes are about.
    messages: Vec<(usize, Message)>,
    copy_to: Option<String>,
    outcomes: Outcomes,
    left: AtomicUsize,
    any_confirmed: AtomicBool,
    /// Those the client has given up, without saying whether it was the destination or every broker.
    late: Mutex<Vec<usize>>,
    /// Those refused for something that may be another's fault, which travelled with them.
    together: Mutex<Vec<usize>>,
    /// Nothing else is with the client: what is refused is refused for itself.
    is_alone: bool,
    /// Dropped with the last message.
    open: Mutex<Option<oneshot::Sender<()>>>,
}

impl Call {
    /// The client is done with the message at this place.
    fn ended(&self, at: usize, outcome: Result<(), KafkaError>) {
        match outcome {
            Ok(()) => {
                self.any_confirmed.store(true, Ordering::Release);
                self.outcomes.report(self.messages[at].0, Ok(()));
            }
            Err(error) if error.rdkafka_error_code() == Some(RDKafkaErrorCode::MessageTimedOut) => {
                self.late.lock().unwrap_or_else(PoisonError::into_inner).push(at);
            }
            Err(error) if !self.is_alone && is_of_batch(&error) => {
                self.together.lock().unwrap_or_else(PoisonError::into_inner).push(at);
            }
            Err(error) => self.refused(at, self.shared.cause(error), None),
        }
        self.shared.window.add_permits(1);
        if self.left.fetch_sub(1, Ordering::AcqRel) == 1 {
            self.open.lock().unwrap_or_else(PoisonError::into_inner).take();
        }
    }

    fn refused(&self, at: usize, error: KafkaError, unreachable: Option<&str>) {
        let (place, message) = &self.messages[at];
        let timeout = self.shared.cluster.options().delivery_timeout;
        let error = refusal(error, message, timeout, unreachable);
        if error.is_unroutable() {
            let topic = self.copy_to.as_deref().unwrap_or(message.topic().as_str());
            self.shared.topology.forget(topic);
        }
        self.outcomes.report(*place, Err(error));
    }
}

impl KafkaPublisher {
    pub(crate) fn new(cluster: Cluster) -> Self {
        let window = Semaphore::new(cluster.options().window);
        Self {
            shared: Arc::new(Shared {
                topology: Topology::new(cluster.clone()),
                cluster,
                producer: Mutex::default(),
                window,
            }),
        }
    }

    pub(crate) fn topology(&self) -> &Topology {
        &self.shared.topology
    }

    fn producer(&self) -> postrider_core::Result<Arc<Producer>> {
        let mut producer = self.shared.producer.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(producer) = &*producer {
            return Ok(producer.clone());
        }
        let options = self.shared.cluster.options();
        let mut config = self.shared.cluster.config();
        config
            .set("enable.idempotence", "true")
            .set("acks", "all")
            .set("partitioner", "murmur2_random")
            .set("linger.ms", format!("{:.3}", options.linger.as_secs_f64() * 1000.0))
            .set("message.timeout.ms", options.delivery_timeout.as_millis().to_string())
            .set("message.max.bytes", options.max_message_bytes.to_string())
            .set("queue.buffering.max.messages", "100000");
        let cluster = &self.shared.cluster;
        let made = Producer::from_config_and_context(&cluster.with_properties(config), Confirms(cluster.clone()))
            .map_err(cluster.failed("connecting"))?;
        Ok(producer.insert(Arc::new(made)).clone())
    }

    /// The client can do nothing more: the next call has a new one.
    fn renew(&self, failed: &Arc<Producer>) {
        let old = {
            let mut producer = self.shared.producer.lock().unwrap_or_else(PoisonError::into_inner);
            producer.take_if(|producer| Arc::ptr_eq(producer, failed))
        };
        if let Some(old) = old {
            tracing::warn!("Kafka's producer has failed for good: a new one takes its place");
            std::thread::spawn(move || drop(old));
        }
    }

    /// Publishes to the topic of each message, or a copy of it to `copy_to`.
    pub(crate) async fn send(&self, batch: &[Message], copy_to: Option<&str>, outcomes: &Outcomes) {
        let producer = match self.producer() {
            Ok(producer) => producer,
            Err(error) => return outcomes.report_rest(Err(PublishError::connection(error))),
        };
        let topic_of = |message: &Message| copy_to.unwrap_or(message.topic().as_str()).to_owned();
        // A topic that has to be declared, or looked for, keeps no other waiting.
        let mut unknown = self
            .shared
            .topology
            .unknown(batch.iter().map(|m| copy_to.unwrap_or(m.topic().as_str())));
        unknown.sort_unstable();
        let mut known = Vec::with_capacity(batch.len());
        let mut apart: Vec<Vec<(usize, Message)>> = unknown.iter().map(|_| Vec::new()).collect();
        for (at, message) in batch.iter().enumerate() {
            let messages = match unknown.is_empty() {
                true => &mut known,
                false => match unknown.binary_search(&topic_of(message)) {
                    Ok(topic) => &mut apart[topic],
                    Err(_) => &mut known,
                },
            };
            messages.push((at, message.clone()));
        }
        let producer = &producer;
        let of_unknown = unknown.iter().zip(apart).map(|(topic, messages)| async move {
            let limit = self.shared.cluster.options().delivery_timeout;
            let ensured = self.shared.topology.ensure(std::iter::once(topic.as_str()));
            let ensured = tokio::time::timeout(limit, ensured).await;
            let refused = match ensured {
                Ok(Ok(())) => None,
                Ok(Err(error)) => Some(match error.kind() {
                    ErrorKind::Config if !self.shared.cluster.options().declares => PublishError::unroutable(error),
                    // Brokers answered, and said it of this topic.
                    ErrorKind::Config | ErrorKind::Conflict => PublishError::destination(error),
                    _ => PublishError::connection(error),
                }),
                // Where brokers answer it is the topic's fault.
                Err(_) => Some(match brokers_answer(producer).await {
                    true => PublishError::destination(format!(
                        "topic `{topic}` could not be looked for within {limit:?}, though brokers answer"
                    )),
                    false => PublishError::connection(format!(
                        "Kafka did not answer within {limit:?}: {}",
                        self.shared.cluster.why_silent()
                    )),
                }),
            };
            match refused {
                None => self.send_all(producer, messages, copy_to, outcomes).await,
                Some(error) => {
                    for (at, _) in messages {
                        outcomes.report(at, Err(error.clone()));
                    }
                }
            }
        });
        let of_unknown = futures_util::future::join_all(of_unknown);
        futures_util::future::join(self.send_all(producer, known, copy_to, outcomes), of_unknown).await;
    }

    async fn send_all(
        &self,
        producer: &Arc<Producer>,
        messages: Vec<(usize, Message)>,
        copy_to: Option<&str>,
        outcomes: &Outcomes,
    ) {
        let most = self.shared.cluster.options().window.div_ceil(2);
        let mut messages = messages.into_iter().peekable();
        let mut calls = Vec::new();
        while messages.peek().is_some() {
            let part: Vec<_> = messages.by_ref().take(most).collect();
            let wanted = u32::try_from(part.len()).unwrap_or(u32::MAX);
            // It is never closed.
            let places = self.shared.window.acquire_many(wanted).await.ok();
            calls.push(self.hand_over(producer, part, copy_to, outcomes, places, false).await);
        }
        for (call, ended) in calls {
            // Nothing is sent: it is dropped.
            let _ = ended.await;
            self.judge_late(producer, &call).await;
            self.send_apart(producer, &call, copy_to, outcomes).await;
        }
        if producer.client().fatal_error().is_some() {
            self.renew(producer);
        }
    }

    /// Hands over so many messages as there are places.
    async fn hand_over(
        &self,
        producer: &Arc<Producer>,
        messages: Vec<(usize, Message)>,
        copy_to: Option<&str>,
        outcomes: &Outcomes,
        mut places: Option<SemaphorePermit<'_>>,
        is_alone: bool,
    ) -> (Arc<Call>, oneshot::Receiver<()>) {
        let count = messages.len();
        let (open, ended) = oneshot::channel();
        let call = Arc::new(Call {
            shared: self.shared.clone(),
            messages,
            copy_to: copy_to.map(str::to_owned),
            outcomes: outcomes.clone(),
            left: AtomicUsize::new(count),
            any_confirmed: AtomicBool::new(false),
            late: Mutex::default(),
            together: Mutex::default(),
            is_alone,
            open: Mutex::new(Some(open)),
        });
        // Each message takes its place with it and gives it back; those that are not sent do so here.
        let (format, tombstones) = (
            self.shared.cluster.options().format,
            self.shared.cluster.options().tombstones,
        );
        for (at, (_, message)) in call.messages.iter().enumerate() {
            let (headers, payload) = wire::write(message, format, copy_to.map(|_| message.topic()));
            let slot = Box::new(Slot { call: call.clone(), at });
            let mut record =
                BaseRecord::with_opaque_to(copy_to.unwrap_or(message.topic().as_str()), slot).headers(headers);
            if !(tombstones && payload.is_empty() && message.key().is_some()) {
                record = record.payload(&payload[..]);
            }
            if let Some(key) = message.key() {
                record = record.key(key.as_bytes());
            }
            // Without the event's time: brokers keep and delete by the record's, and what was delayed for long would be gone at once.
            let mut sent = producer.send(record);
            while let Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) = sent {
                // Others than us fill it: our window is smaller.
                tokio::time::sleep(Duration::from_millis(5)).await;
                sent = producer.send(again);
            }
            if let Some(place) = places.as_mut().and_then(|places| places.split(1)) {
                place.forget();
            }
            if let Err((error, record)) = sent {
                record.delivery_opaque.call.ended(at, Err(error));
            }
        }
        (call, ended)
    }

    /// Brokers refuse a whole batch for one record: those that travelled together go one by one, and each with nothing else at the
    /// client, which makes batches of what several calls send.
    async fn send_apart(&self, producer: &Arc<Producer>, call: &Call, copy_to: Option<&str>, outcomes: &Outcomes) {
        let mut together = std::mem::take(&mut *call.together.lock().unwrap_or_else(PoisonError::into_inner));
        together.sort_unstable();
        for at in together {
            let all = u32::try_from(self.shared.cluster.options().window).unwrap_or(u32::MAX);
            let mut all = self.shared.window.acquire_many(all).await.ok();
            let place = all.as_mut().and_then(|places| places.split(1));
            let message = vec![call.messages[at].clone()];
            let (alone, ended) = self.hand_over(producer, message, copy_to, outcomes, place, true).await;
            let _ = ended.await;
            drop(all);
            self.judge_late(producer, &alone).await;
        }
    }

    /// The client tries for as long as a message may take, and then says no more than that it is late. Where brokers
    /// answer, it is the destination that is not there: without a leader, or with too few replicas.
    async fn judge_late(&self, producer: &Arc<Producer>, call: &Call) {
        let late = std::mem::take(&mut *call.late.lock().unwrap_or_else(PoisonError::into_inner));
        if late.is_empty() {
            return;
        }
        let is_topic = call.any_confirmed.load(Ordering::Acquire) || brokers_answer(producer).await;
        let why = match is_topic {
            true => None,
            false => Some(self.shared.cluster.why_silent()),
        };
        for at in late {
            let error = KafkaError::MessageProduction(RDKafkaErrorCode::MessageTimedOut);
            call.refused(at, error, why.as_deref());
        }
    }
}

/// Whether brokers say it of a whole batch, for one record of it.
fn is_of_batch(error: &KafkaError) -> bool {
    use RDKafkaErrorCode as Code;
    let of_batch = [
        Code::InvalidTimestamp,
        Code::InvalidRecord,
        Code::InvalidMessage,
        Code::MessageSizeTooLarge,
        Code::InvalidMessageSize,
        Code::PolicyViolation,
        Code::InvalidDifferentRecord,
    ];
    error.rdkafka_error_code().is_some_and(|code| of_batch.contains(&code))
}

impl Shared {
    /// What the client has failed for good for, where it says no more than that it has.
    fn cause(&self, error: KafkaError) -> KafkaError {
        use RDKafkaErrorCode as Code;
        let is_fatal = matches!(
            error.rdkafka_error_code(),
            Some(Code::Fatal | Code::PurgeQueue | Code::PurgeInflight)
        );
        let producer = self.producer.lock().unwrap_or_else(PoisonError::into_inner);
        match producer
            .as_ref()
            .filter(|_| is_fatal)
            .and_then(|producer| producer.client().fatal_error())
        {
            Some((cause, _)) => KafkaError::MessageProduction(cause),
            None => error,
        }
    }
}

/// Whether any broker answers just now.
async fn brokers_answer(producer: &Arc<Producer>) -> bool {
    let (asked, limit) = (producer.clone(), Duration::from_secs(2));
    let answer = off_thread(move || asked.client().fetch_metadata(None, limit).is_ok());
    answer.await.unwrap_or(false)
}

/// What a broker's refusal means. `unreachable` is why no broker answers, if none does.
fn refusal(error: KafkaError, message: &Message, timeout: Duration, unreachable: Option<&str>) -> PublishError {
    use RDKafkaErrorCode as Code;
    let topic = message.topic();
    match error.rdkafka_error_code() {
        Some(Code::UnknownTopicOrPartition | Code::UnknownTopic | Code::UnknownPartition | Code::InvalidTopic) => {
            PublishError::unroutable(format!("topic `{topic}` is missing on Kafka: {error}"))
        }
        Some(Code::NotEnoughReplicas | Code::NotEnoughReplicasAfterAppend) => {
            PublishError::destination(format!("topic `{topic}` has too few replicas: {error}"))
        }
        // The second one of a user who may write to no topic at all.
        Some(Code::TopicAuthorizationFailed | Code::ClusterAuthorizationFailed) => PublishError::destination(format!(
            "topic `{topic}` may not be written to, the user needs WRITE and DESCRIBE on it (Kafka's ACLs): {error}"
        )),
        // A batch may be too large where its messages are not.
        Some(Code::MessageSizeTooLarge) if message.size() < ALWAYS_TAKEN => PublishError::rejected(error),
        Some(Code::MessageSizeTooLarge | Code::InvalidMessage | Code::InvalidMessageSize) => {
            PublishError::invalid(error)
        }
        // Of this one, or of another that the client has put into one batch with it.
        Some(Code::PolicyViolation | Code::InvalidDifferentRecord | Code::InvalidRecord | Code::InvalidTimestamp) => {
            PublishError::rejected(error)
        }
        Some(Code::MessageTimedOut) => match unreachable {
            None => PublishError::destination(format!(
                "topic `{topic}` did not confirm within {timeout:?}, though brokers answer: it has no leader, or too few replicas"
            )),
            Some(why) => PublishError::connection(format!("Kafka did not confirm within {timeout:?}: {why}")),
        },
        _ => PublishError::connection(error),
    }
}

impl Drop for Shared {
    fn drop(&mut self) {
        let producer = self.producer.get_mut().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(producer) = producer {
            // It waits for its threads.
            std::thread::spawn(move || drop(producer));
        }
    }
}

#[async_trait]
impl Publisher for KafkaPublisher {
    async fn publish(&self, batch: &[Message], outcomes: &Outcomes) {
        if !batch.is_empty() {
            self.send(batch, None, outcomes).await;
        }
    }

    async fn check(&self) -> Reachability {
        let producer = match self.producer() {
            Ok(producer) => producer,
            Err(error) => return Reachability::Down(PublishError::connection(error)),
        };
        let timeout = self.shared.cluster.options().timeout;
        // Its cluster's id the client would remember.
        match off_thread(move || producer.client().fetch_metadata(None, timeout).map(drop)).await {
            Ok(Ok(())) => Reachability::Up,
            Ok(Err(error)) => {
                Reachability::Down(PublishError::connection(self.shared.cluster.failed("asking brokers")(
                    error,
                )))
            }
            Err(error) => Reachability::Down(PublishError::connection(error)),
        }
    }
}
