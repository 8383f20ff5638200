//! The peers, in the newest versions that build, and what is safe about each.

use super::{Work, bridge, omni, rust_stream, sea};
use futures_util::{FutureExt as _, future::BoxFuture};
use std::time::Duration;

pub type Measure = fn(Work) -> BoxFuture<'static, anyhow::Result<Duration>>;

pub struct Peer {
    pub name: &'static str,
    pub version: &'static str,
    pub broker: &'static str,
    pub remark: &'static str,
    /// The type of the queue it consumes from; it publishes to a quorum queue in any case.
    pub consumes: &'static str,
    /// To the broker's last confirm. One message more goes before, for the connection to be warm.
    pub publish: Measure,
    /// From the first message to the acknowledgement of the last.
    pub consume: Measure,
}

pub const PEERS: [Peer; 6] = [
    Peer {
        name: "ruststream",
        version: "0.7.7/ruststream-lapin-0.7.2",
        broker: "rabbitmq",
        remark: "confirmed, persistent, quorum queue; each message acked",
        consumes: "quorum",
        publish: |work| rust_stream::publish_rabbitmq(work).boxed(),
        consume: |work| rust_stream::consume_rabbitmq(work).boxed(),
    },
    Peer {
        name: "ruststream",
        version: "0.7.7/ruststream-rdkafka-0.7.1",
        broker: "kafka",
        remark: "acks=all, idempotent; offsets stored by each ack, committed in the background and at the end",
        consumes: "",
        publish: |work| rust_stream::publish_kafka(work).boxed(),
        consume: |work| rust_stream::consume_kafka(work).boxed(),
    },
    Peer {
        name: "mq-bridge",
        version: "1.3.0",
        broker: "rabbitmq",
        remark: "confirmed, persistent, quorum queue; consumes from a durable CLASSIC queue only (it declares its queue without x-queue-type); each message acked",
        consumes: "classic",
        publish: |work| bridge::publish_rabbitmq(work).boxed(),
        consume: |work| bridge::consume_rabbitmq(work).boxed(),
    },
    Peer {
        name: "mq-bridge",
        version: "1.3.0",
        broker: "kafka",
        remark: "acks=all, idempotent; a commit for each batch, whose answer it does not wait for",
        consumes: "",
        publish: |work| bridge::publish_kafka(work).boxed(),
        consume: |work| bridge::consume_kafka(work).boxed(),
    },
    Peer {
        name: "omniqueue",
        version: "0.3.0",
        broker: "rabbitmq",
        remark: "publishes UNCONFIRMED (it has no publisher confirms), persistent, quorum queue, no headers; each message acked",
        consumes: "quorum",
        publish: |work| omni::publish(work).boxed(),
        consume: |work| omni::consume(work).boxed(),
    },
    Peer {
        name: "sea-streamer",
        version: "1.0.0-rc.2",
        broker: "kafka",
        remark: "acks=all, idempotent; offsets stored after each batch, committed in the background and at the end",
        consumes: "",
        publish: |work| sea::publish(work).boxed(),
        consume: |work| sea::consume(work).boxed(),
    },
];
