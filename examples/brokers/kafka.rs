//! Over Kafka: `cargo run --features kafka --example kafka [localhost:9092]`
#![allow(clippy::print_stdout)]

mod program;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let given = std::env::args().nth(1);
    let brokers = given.unwrap_or_else(|| "localhost:9092".to_owned());
    program::run(postrider::kafka::transport(brokers)?).await
}
