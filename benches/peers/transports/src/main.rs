//! Other messaging libraries of Rust, measured on a broker that is running: `postrider-transport-peers <peer>
//! <rabbitmq|kafka> <address> <publish|consume> <count> <bytes>` prints the seconds. `--list` tells the peers.
//!
//! The same for all: a fresh durable queue (or a topic of four partitions), made before the clock starts; the headers and
//! keys of our own bench, as far as a peer can carry them; uncompressed; two worker threads. After the clock has stopped, a
//! plain client looks whether everything has arrived, or has been acknowledged: if not, the run fails.

mod bridge;
mod omni;
mod plain;
mod rust_stream;
mod sea;

use anyhow::{Context as _, bail};
use futures_util::{FutureExt as _, future::BoxFuture};
use std::time::{Duration, SystemTime};

/// The headers of every message, besides its key.
const HEADERS: [(&str, &str); 5] = [
    ("ce_specversion", "1.0"),
    ("ce_id", "018f4e6a-7c00-7000-8000-000000000001"),
    ("ce_type", "bench.v1"),
    ("ce_source", "bench"),
    ("ce_sequence", "00000000000000000042"),
];

/// So many messages of such a size, with a queue, topic and group of a name of their own.
#[derive(Clone)]
struct Work {
    address: String,
    name: String,
    count: usize,
    bytes: usize,
}

impl Work {
    fn payload(&self) -> Vec<u8> {
        vec![b'x'; self.bytes]
    }

    fn key(n: usize) -> String {
        format!("key-{}", n % 1000)
    }
}

fn knob(name: &str, default: usize) -> usize {
    std::env::var(name).ok().and_then(|v| v.parse().ok()).unwrap_or(default)
}

type Measure = fn(Work) -> BoxFuture<'static, anyhow::Result<Duration>>;

struct Peer {
    name: &'static str,
    version: &'static str,
    broker: &'static str,
    remark: &'static str,
    /// The type of the queue it consumes from; it publishes to a quorum queue in any case.
    consumes: &'static str,
    /// To the broker's last confirm. One message more goes before, for the connection to be warm.
    publish: Measure,
    /// From the first message to the acknowledgement of the last.
    consume: Measure,
}

const PEERS: [Peer; 6] = [
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

async fn measure(peer: &Peer, job: &str, work: Work) -> anyhow::Result<Duration> {
    let publishes = match job {
        "publish" => true,
        "consume" => false,
        other => bail!("unknown job {other:?}: known are `publish` and `consume`"),
    };
    let rabbitmq = peer.broker == "rabbitmq";
    match rabbitmq {
        true => plain::rabbitmq_prepare(&work, if publishes { "quorum" } else { std::env::var("KIND").ok().map_or(peer.consumes, |k| k.leak()) }).await?,
        false => plain::kafka_prepare(&work).await?,
    }
    if !publishes {
        match rabbitmq {
            true => plain::rabbitmq_fill(&work).await?,
            false => plain::kafka_fill(&work).await?,
        }
    }
    let took = tokio::spawn(if publishes { peer.publish } else { peer.consume }(work.clone())).await??;
    match (rabbitmq, publishes) {
        (true, _) => plain::rabbitmq_check(&work, if publishes { work.count + 1 } else { 0 }).await?,
        (false, true) => plain::kafka_check(&work, work.count + 1, false).await?,
        (false, false) => plain::kafka_check(&work, work.count, true).await?,
    }
    Ok(took)
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["--list"] => {
            for peer in &PEERS {
                println!("{} {} {} publish,consume {}", peer.name, peer.version, peer.broker, peer.remark);
            }
        }
        [name, broker, address, job, count, bytes] => {
            let peer = PEERS.iter().find(|peer| peer.name == name && peer.broker == broker);
            let peer = peer.with_context(|| format!("no peer {name} for {broker}: see --list"))?;
            let nanos = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH)?.as_nanos();
            let work = Work {
                address: address.to_owned(),
                name: format!("peers-{}-{nanos}", std::process::id()),
                count: count.parse()?,
                bytes: bytes.parse()?,
            };
            let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
            println!("{}", runtime.block_on(measure(peer, job, work))?.as_secs_f64());
        }
        _ => bail!("usage: <peer> <rabbitmq|kafka> <address> <publish|consume> <count> <bytes>, or --list"),
    }
    Ok(())
}
