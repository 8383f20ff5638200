//! Over RabbitMQ: `cargo run --features rabbitmq --example rabbitmq [amqp://guest:guest@localhost:5672/%2f]`
#![allow(clippy::print_stdout)]

mod program;

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let given = std::env::args().nth(1);
    let url = given.unwrap_or_else(|| "amqp://guest:guest@localhost:5672/%2f".to_owned());
    program::run(postrider::rabbitmq::transport(url)?).await
}
