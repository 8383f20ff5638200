use crate::fixture::{Fixture, join, publish, take, text};
use postrider_core::PublisherExt as _;
use postrider_core::{ErrorKind, PublishErrorKind, Scope};
use postrider_kafka::{KafkaOptions, transport_with};
use postrider_testkit::{
    run_within,
    server::{Kafka, fresh_name},
};
use std::time::Duration;

/// With an authority of one's own to trust; a certificate that nobody vouches for is refused, and that is said.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster speaks no TLS")]
fn tls_is_spoken_and_certificates_are_checked() {
    run_within(Duration::from_secs(120), async {
        let (brokers, ca_file) = Kafka::shared().tls();
        let ca_file = Some(ca_file.display().to_string());
        let fixture = Fixture {
            name: fresh_name(),
            brokers,
        };
        let options = KafkaOptions::new(&fixture.brokers)
            .with_partitions(1)
            .with_timeout(Duration::from_secs(10))
            .with_delivery_timeout(Duration::from_secs(5));
        let trusting = transport_with(options.clone().with_tls(ca_file)).unwrap();
        let (mut intake, settling) = join(&trusting, &fixture.subscription()).await;
        publish(&trusting, &[fixture.message(Some("k"), "over TLS")]).await;
        let got = take(&mut intake, 1, Duration::from_secs(10)).await;
        assert_eq!(got.iter().map(text).collect::<Vec<_>>(), ["over TLS"]);
        settling.close(Duration::from_secs(10)).await.unwrap();

        let doubting = transport_with(options.clone().with_tls(None).without_declaring()).unwrap();
        let publisher = doubting.publisher().unwrap();
        let outcome = publisher.publish_all(&[fixture.message(None, "x")]).await.remove(0);
        let error = outcome.unwrap_err();
        assert_eq!(error.kind(), PublishErrorKind::Unavailable(Scope::Connection));
        assert!(format!("{error:?}").to_lowercase().contains("certificate"), "{error:?}");

        let missing = transport_with(options.with_tls(Some("no/such.pem".to_owned()))).unwrap_err();
        assert!(
            missing.kind() == ErrorKind::Config && missing.to_string().contains("no/such.pem"),
            "{missing}"
        );
    });
}
