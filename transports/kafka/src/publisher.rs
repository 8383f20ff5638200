//! Publishing: librdkafka's own thread sends and confirms; a call is answered by the confirm of its last message.

use crate::{
    client::{Cluster, off_thread},
    topology::Topology,
    wire,
};
use async_trait::async_trait;
use postrider_core::{Message, PublishError, Publisher, Reachability, Topic, publisher::Outcome};
use rdkafka::{
    ClientContext,
    config::{FromClientConfigAndContext as _, RDKafkaLogLevel},
    error::{KafkaError, RDKafkaErrorCode},
    message::DeliveryResult,
    producer::{BaseRecord, Producer as _, ProducerContext, ThreadedProducer},
};
use std::{
    fmt,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::Duration,
};
use tokio::sync::{OwnedSemaphorePermit, Semaphore, oneshot};

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
    window: Arc<Semaphore>,
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
        slot.call.confirmed(slot.at, outcome);
    }
}

/// A message's place in its call.
struct Slot {
    call: Arc<Call>,
    at: usize,
}

/// A call that is not answered yet.
struct Call(Mutex<State>);

struct State {
    outcomes: Vec<Result<(), KafkaError>>,
    left: usize,
    reply: Option<oneshot::Sender<Vec<Result<(), KafkaError>>>>,
    _permits: Option<OwnedSemaphorePermit>,
}

impl Call {
    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn confirmed(&self, at: usize, outcome: Result<(), KafkaError>) {
        let mut state = self.state();
        state.outcomes[at] = outcome;
        state.left -= 1;
        if state.left == 0 {
            state._permits = None;
            let outcomes = std::mem::take(&mut state.outcomes);
            if let Some(reply) = state.reply.take() {
                let _ = reply.send(outcomes);
            }
        }
    }
}

impl KafkaPublisher {
    pub(crate) fn new(cluster: Cluster) -> Self {
        let window = Arc::new(Semaphore::new(cluster.options().window));
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
    pub(crate) async fn send(&self, batch: &[Message], copy_to: Option<&str>) -> Vec<Outcome> {
        let refused = |error: postrider_core::Error| {
            let error = match error.kind() {
                postrider_core::ErrorKind::Config => PublishError::unroutable(error),
                _ => PublishError::connection(error),
            };
            error.for_all(batch)
        };
        let mut outcomes = Vec::with_capacity(batch.len());
        let producer = match self.producer() {
            Ok(producer) => producer,
            Err(error) => return refused(error),
        };
        let topics = batch.iter().map(|message| copy_to.unwrap_or(message.topic().as_str()));
        if let Err(error) = self.shared.topology.ensure(topics).await {
            if batch.len() == 1 || error.kind() != postrider_core::ErrorKind::Config {
                return refused(error);
            }
            // One topic is wrong: the others are not.
            return self.send_apart(batch, copy_to).await;
        }
        for part in batch.chunks(self.shared.cluster.options().window.div_ceil(2)) {
            outcomes.extend(self.send_part(&producer, part, copy_to).await);
        }
        outcomes
    }

    /// By topic, so that each has an outcome of its own.
    async fn send_apart(&self, batch: &[Message], copy_to: Option<&str>) -> Vec<Outcome> {
        let mut topics: Vec<&Topic> = batch.iter().map(Message::topic).collect();
        topics.sort_unstable();
        topics.dedup();
        if topics.len() == 1 {
            let outcomes = Box::pin(self.send(&batch[..1], copy_to)).await;
            return match outcomes.into_iter().next() {
                Some(Err(error)) => error.for_all(batch),
                _ => PublishError::connection("the topic has just come back: try again").for_all(batch),
            };
        }
        let mut outcomes: Vec<Option<Outcome>> = batch.iter().map(|_| None).collect();
        for topic in topics {
            let (places, of_topic): (Vec<usize>, Vec<Message>) = batch
                .iter()
                .enumerate()
                .filter(|(_, message)| message.topic() == topic)
                .map(|(at, message)| (at, message.clone()))
                .unzip();
            for (at, outcome) in places.into_iter().zip(Box::pin(self.send(&of_topic, copy_to)).await) {
                outcomes[at] = Some(outcome);
            }
        }
        let unknown = || Err(PublishError::connection("the outcome is not known"));
        outcomes
            .into_iter()
            .map(|outcome| outcome.unwrap_or_else(unknown))
            .collect()
    }

    async fn send_part(&self, producer: &Arc<Producer>, part: &[Message], copy_to: Option<&str>) -> Vec<Outcome> {
        let wanted = u32::try_from(part.len()).unwrap_or(u32::MAX);
        let permits = self.shared.window.clone().acquire_many_owned(wanted).await.ok();
        let (reply, confirmed) = oneshot::channel();
        let call = Arc::new(Call(Mutex::new(State {
            outcomes: vec![Ok(()); part.len()],
            left: part.len(),
            reply: Some(reply),
            _permits: permits,
        })));
        let format = self.shared.cluster.options().format;
        for (at, message) in part.iter().enumerate() {
            let (headers, payload) = wire::write(message, format, copy_to.map(|_| message.topic()));
            let slot = Box::new(Slot { call: call.clone(), at });
            let mut record = BaseRecord::with_opaque_to(copy_to.unwrap_or(message.topic().as_str()), slot)
                .payload(&payload[..])
                .headers(headers);
            if let Some(key) = message.key() {
                record = record.key(key.as_bytes());
            }
            if let Some(time) = message.time() {
                record = record.timestamp(time.timestamp_millis());
            }
            let mut sent = producer.send(record);
            while let Err((KafkaError::MessageProduction(RDKafkaErrorCode::QueueFull), again)) = sent {
                // Others than us fill it: our window is smaller.
                tokio::time::sleep(Duration::from_millis(5)).await;
                sent = producer.send(again);
            }
            if let Err((error, record)) = sent {
                record.delivery_opaque.call.confirmed(at, Err(error));
            }
        }
        let Ok(outcomes) = confirmed.await else {
            return PublishError::connection("Kafka's producer has ended").for_all(part);
        };
        if producer.client().fatal_error().is_some() {
            self.renew(producer);
        }
        let timeout = self.shared.cluster.options().delivery_timeout;
        let is_late = |outcome: &Result<(), KafkaError>| {
            let code = outcome.as_ref().err().and_then(KafkaError::rdkafka_error_code);
            code == Some(RDKafkaErrorCode::MessageTimedOut)
        };
        // The client tries for as long as a message may take, and then says no more than that it is late. Where brokers
        // answer, it is the destination that is not there: without a leader, or with too few replicas.
        let brokers_answer = outcomes.iter().any(is_late) && {
            let (asked, limit) = (producer.clone(), Duration::from_secs(2));
            let answer = off_thread(move || asked.client().fetch_metadata(None, limit).is_ok()).await;
            outcomes.iter().any(Result::is_ok) || answer.unwrap_or(false)
        };
        let why_late = match brokers_answer {
            true => None,
            false => Some(self.shared.cluster.recent_trouble().unwrap_or_default()),
        };
        let outcomes = part.iter().zip(outcomes).map(|(message, outcome)| {
            outcome.map_err(|error| {
                let error = refusal(error, message, timeout, why_late.as_deref());
                if error.is_unroutable() {
                    self.shared.topology.forget(copy_to.unwrap_or(message.topic().as_str()));
                }
                error
            })
        });
        outcomes.collect()
    }
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
        Some(Code::TopicAuthorizationFailed) => {
            PublishError::destination(format!("topic `{topic}` may not be written to: {error}"))
        }
        // A batch may be too large where its messages are not.
        Some(Code::MessageSizeTooLarge) if message.size() < ALWAYS_TAKEN => PublishError::rejected(error),
        Some(
            Code::MessageSizeTooLarge
            | Code::InvalidMessage
            | Code::InvalidMessageSize
            | Code::InvalidRecord
            | Code::InvalidTimestamp,
        ) => PublishError::invalid(error),
        // Another one of its batch was invalid.
        Some(Code::PolicyViolation | Code::InvalidDifferentRecord) => PublishError::rejected(error),
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
    async fn publish(&self, batch: &[Message]) -> Vec<Outcome> {
        if batch.is_empty() {
            return Vec::new();
        }
        self.send(batch, None).await
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
