//! What a transport has to show while its broker is away.

use postrider_core::Transport;
use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::{server::RabbitMq, transport_outages};
use std::time::Duration;

fn soon_told(server: &RabbitMq) -> Transport {
    transport_with(RabbitMqOptions::new(server.url()).with_heartbeat(Duration::from_secs(1))).unwrap()
}

transport_outages!(RabbitMq, soon_told);
