//! Postrider's transport over Apache Kafka, through [rdkafka](https://docs.rs/rdkafka) (librdkafka).
//!
//! # How messages lie there
//! A topic is a Kafka topic of the same name, declared with [`KafkaOptions::partitions`] unless it is there. The key of a
//! message is the record's key, and Java's partitioner (murmur2) spreads keys over partitions, so that producers in other
//! languages agree. Records without a key go anywhere. Attributes are headers as CloudEvents' binding for Kafka says: `ce_type`
//! and so on, and `content-type`; see [`wire`](postrider_core::wire). Dead letters of a group without an event log go to the
//! topic `<group>.dead`, or to the one that `dead_letter_to` names, each with the header `postrider-topic`.
//!
//! # What is promised
//! A message is published when every replica in sync has it (`acks=all`, idempotent). A topic that is missing, that may not be
//! written, or that has too few replicas is an unavailable destination.
//!
//! A group's members share the partitions, and each keeps the order of its keys. What is committed is the last offset before
//! which everything is settled, so a crash repeats what was settled out of order behind it, and loses nothing. When a partition
//! goes to another member, what this one has of it is finished first, for as long as [`KafkaOptions::handover_timeout`].
//! Adding partitions to a topic moves keys between partitions: drain it first.
//!
//! Kafka neither counts deliveries nor delays them: retries belong to the group's inbox, in the event log.
//!
//! Records carry the broker's time, not the event's, which is the attribute `time`: brokers delete and compact by the record's.
//!
//! # What the brokers' errors mean
//!
//! | brokers say | publishing | joining, consuming |
//! |---|---|---|
//! | nothing, connection refused, user or password refused | the connection is away: the relay probes, no attempt is counted | `Unavailable`, tried again |
//! | `UnsupportedSaslMechanism` | the same | `Config` |
//! | `TopicAuthorizationFailed`, `ClusterAuthorizationFailed` (of a user who may write to no topic), also as the cause of a fatal error | the topic's destination is away | `Config`, told every 10 s and shown in health while it lasts |
//! | `GroupAuthorizationFailed`, `InconsistentGroupProtocol` | – | the same |
//! | `UnknownTopicOrPartition` | unroutable: the topic is paused, or dropped if it says so | `Config` with `without_declaring`, else it is declared |
//! | `InvalidReplicationFactor`, `PolicyViolation` while declaring | the topic's destination is away | `Config` |
//! | `NotEnoughReplicas`, no leader, no confirm within `delivery_timeout` though brokers answer | the topic's destination is away | – |
//! | `MessageSizeTooLarge`, `InvalidMessage` | that message is invalid; its neighbours go one by one | – |
//! | `InvalidRecord`, `InvalidTimestamp`, `PolicyViolation` of a record | that message is rejected: an attempt is counted; its neighbours go one by one | – |
//! | `OffsetOutOfRange` | – | what was deleted unread is counted ([`SubscriptionReport::missed`](postrider_core::consumer::SubscriptionReport::missed)), told and shown for 10 minutes; the group goes on with the earliest message there is |
//! | `AllBrokersDown` | the connection is away | `Unavailable`: the subscription shows it until a broker answers |
//! | `FencedInstanceId`, `UnsupportedVersion` and other fatal errors of a consumer | – | the feed ends, and the subscription joins anew |
//!
//! # TLS
//! TLS, SCRAM and tokens (`OAUTHBEARER`) come with the feature `tls` (`kafka-tls` of the facade), which needs OpenSSL to build.

mod client;
mod config;
mod publisher;
mod subscriber;
mod topology;
mod wire;

pub use config::{KafkaOptions, Login, Start, Token, TopicOptions};

use postrider_core::{Capabilities, Order, Result, Transport, wire::Format};
use publisher::KafkaPublisher;
use subscriber::KafkaSubscriber;

/// What the transport is called: its feature and its kind in a configuration.
pub const NAME: &str = "kafka";

/// A transport over these brokers, `host:port,host:port`, with default options.
///
/// # Errors
/// As [`transport_with`].
pub fn transport(brokers: impl Into<String>) -> Result<Transport> {
    transport_with(KafkaOptions::new(brokers))
}

/// A transport with these options. It connects when it is first used, and again whenever a connection is lost.
///
/// # Errors
/// [`ErrorKind::Config`](postrider_core::ErrorKind::Config) for an option that makes no sense.
pub fn transport_with(options: KafkaOptions) -> Result<Transport> {
    options.check()?;
    let (most, format) = (options.max_message_bytes as usize, options.format);
    let cluster = client::Cluster::new(options);
    cluster.check()?;
    let publisher = KafkaPublisher::new(cluster.clone());
    let capabilities = Capabilities::default()
        .with_order(Order::Partitioned)
        .with_dead_letter()
        .with_broadcast()
        .with_queue_options(&["dead_letter_to"])
        // Less what a batch adds, and in structured mode what JSON and base64 do.
        .with_max_message_bytes(match format {
            Format::Structured => most / 20 * 13,
            _ => most / 20 * 19,
        });
    let subscriber = KafkaSubscriber::new(cluster, publisher.clone());
    Ok(Transport::new(NAME, capabilities)
        .with_publisher(publisher)
        .with_subscriber(subscriber))
}
