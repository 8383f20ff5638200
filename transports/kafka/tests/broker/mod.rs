//! The broker that the tests share: a real one, or with the feature `mock`, where none can be had, the client's mock cluster.

use postrider_kafka::KafkaOptions;
use postrider_testkit::server::Kafka;
use rdkafka::mocking::MockCluster;
use std::sync::OnceLock;

/// Options for it.
pub(crate) fn options() -> KafkaOptions {
    if cfg!(feature = "mock") {
        static MOCK: OnceLock<String> = OnceLock::new();
        let brokers = MOCK.get_or_init(|| {
            let cluster = MockCluster::new(1).unwrap();
            let brokers = cluster.bootstrap_servers();
            // For as long as the process.
            Box::leak(Box::new(cluster));
            brokers
        });
        // It makes topics when they are asked for, and does not know how to declare one.
        KafkaOptions::new(brokers).without_declaring()
    } else {
        KafkaOptions::new(Kafka::shared().brokers())
    }
}
