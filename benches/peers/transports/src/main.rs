//! Other messaging libraries of Rust, measured on a broker that is running: `postrider-transport-peers <peer>
//! <rabbitmq|kafka> <address> <publish|consume> <count> <bytes>` prints the seconds. `--list` tells the peers.
//!
//! The same for all: a fresh durable queue (or a topic of four partitions), made before the clock starts; much
//! the headers and keys of our own bench, as far as a peer can carry them; uncompressed; two worker threads. After the clock
//! has stopped, a plain client looks whether everything has arrived, or has been acknowledged: if not, the run fails.

mod bridge;
mod kafka;
mod list;
mod omni;
mod rabbitmq;
mod rust_stream;
mod sea;

use anyhow::{Context as _, bail};
use list::{PEERS, Peer};
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

async fn measure(peer: &Peer, job: &str, work: Work) -> anyhow::Result<Duration> {
    let publishes = match job {
        "publish" => true,
        "consume" => false,
        other => bail!("unknown job {other:?}: known are `publish` and `consume`"),
    };
    let rabbitmq = peer.broker == "rabbitmq";
    if rabbitmq {
        rabbitmq::prepare(&work, if publishes { "quorum" } else { peer.consumes }).await?;
    } else {
        kafka::prepare(&work).await?;
    }
    let took = if publishes {
        tokio::spawn((peer.publish)(work.clone())).await??
    } else {
        if rabbitmq {
            rabbitmq::fill(&work).await?;
        } else {
            kafka::fill(&work).await?;
        }
        tokio::spawn((peer.consume)(work.clone())).await??
    };
    match (rabbitmq, publishes) {
        (true, true) => rabbitmq::check(&work, work.count + 1).await?,
        (true, false) => rabbitmq::check(&work, 0).await?,
        (false, true) => kafka::check(&work, work.count + 1, false).await?,
        (false, false) => kafka::check(&work, work.count, true).await?,
    }
    Ok(took)
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["--list"] => {
            for peer in &PEERS {
                println!(
                    "{} {} {} publish,consume {}",
                    peer.name, peer.version, peer.broker, peer.remark
                );
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
            let runtime = tokio::runtime::Builder::new_multi_thread()
                .worker_threads(2)
                .enable_all()
                .build()?;
            println!("{}", runtime.block_on(measure(peer, job, work))?.as_secs_f64());
        }
        _ => bail!("usage: <peer> <rabbitmq|kafka> <address> <publish|consume> <count> <bytes>, or --list"),
    }
    Ok(())
}
