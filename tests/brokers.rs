//! The example of every broker, on a server of the test's own.
#![cfg(unix)]
#![allow(clippy::unwrap_used, clippy::print_stdout)]

#[path = "../examples/brokers/program.rs"]
mod program;

use postrider_testkit::{run, server};

#[test]
fn the_example_runs_on_rabbitmq() {
    let url = server::RabbitMq::shared().url();
    run(async {
        program::run(postrider::rabbitmq::transport(url).unwrap())
            .await
            .unwrap()
    });
}

#[test]
fn the_example_runs_on_kafka() {
    let brokers = server::Kafka::shared().brokers();
    run(async {
        program::run(postrider::kafka::transport(brokers).unwrap())
            .await
            .unwrap()
    });
}
