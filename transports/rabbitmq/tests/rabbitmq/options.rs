//! What operators, and users of the plain client, tell a client.

use crate::fixture::{Fixture, join, publish, take, text};
use lapin::options::{BasicGetOptions, QueueDeclareOptions};
use postrider_core::{Delivery, ErrorKind, PublishErrorKind, PublisherExt as _, Reachability, Scope, Transport};
use postrider_rabbitmq::{Login, RabbitMqOptions, transport_with};
use postrider_testkit::{run, server::RabbitMq};
use std::{
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
    time::Duration,
};

const SOON: Duration = Duration::from_secs(20);

async fn is_up(transport: &Transport) -> bool {
    matches!(transport.publisher().unwrap().check().await, Reachability::Up)
}

/// A node that is away is passed over, in whichever place it stands.
#[test]
fn any_node_that_answers_will_do() {
    run(async {
        let fixture = Fixture::new();
        let away = "amqp://u:secret@127.0.0.1:1/%2f";
        for (first, second) in [(away, fixture.url.as_str()), (fixture.url.as_str(), away)] {
            let options = RabbitMqOptions::new(first)
                .with_further_url(second)
                .with_exchange(&fixture.name);
            assert!(!format!("{options:?}").contains("secret"));
            assert!(is_up(&transport_with(options).unwrap()).await);
        }
        let nowhere = RabbitMqOptions::new(away).with_further_url("amqp://127.0.0.1:2/");
        let Reachability::Down(error) = transport_with(nowhere).unwrap().publisher().unwrap().check().await else {
            panic!("nobody is there");
        };
        let shown = format!("{error:?}");
        assert!(
            shown.contains("127.0.0.1:1") && shown.contains("2 nodes") && !shown.contains("secret"),
            "{shown}"
        );
        let error = transport_with(RabbitMqOptions::new(away).with_further_url("nonsense")).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
    });
}

/// The login is asked for with each connection, so that a password may change.
#[test]
fn a_password_may_change() {
    let mut server = RabbitMq::start();
    server.ctl(&["add_user", "app", "old"]);
    server.ctl(&["set_permissions", "app", ".*", ".*", ".*"]);
    run(async {
        let fixture = Fixture::on(&server);
        let asked = Arc::new(AtomicU32::new(0));
        let login = {
            let asked = asked.clone();
            move || {
                let password = if asked.fetch_add(1, Ordering::SeqCst) == 0 {
                    "old"
                } else {
                    "new"
                };
                Ok(Login::new("app", password))
            }
        };
        let options = fixture.options().with_login(login);
        assert!(!format!("{options:?}").contains("old"));
        let transport = transport_with(options).unwrap();
        assert!(is_up(&transport).await);
        server.ctl(&["change_password", "app", "new"]);
        server.ctl(&["close_all_connections", "the password has changed"]);
        let began = std::time::Instant::now();
        while !is_up(&transport).await {
            assert!(began.elapsed() < SOON, "the new password is not used");
        }
        assert!(asked.load(Ordering::SeqCst) >= 2);
    });
}

/// A certificate of the client's is shown to the broker, and can be its login.
#[test]
fn a_client_may_log_in_by_its_certificate() {
    let mut server = RabbitMq::start();
    let (url, authority) = server.tls();
    let (certificate, key) = server.client_certificate();
    server.ctl(&["add_user", "app", "not used"]);
    server.ctl(&["set_permissions", "app", ".*", ".*", ".*"]);
    run(async {
        let (_, place) = url.rsplit_once('@').unwrap();
        let url = format!("amqps://{place}?auth_mechanism=external");
        let options = RabbitMqOptions::new(url).with_ca_file(&authority);
        let without = transport_with(options.clone()).unwrap();
        assert!(!is_up(&without).await, "without a certificate nobody is let in");
        let transport = transport_with(options.clone().with_client_certificate(certificate, key)).unwrap();
        let Reachability::Up = transport.publisher().unwrap().check().await else {
            panic!("{:?}", transport.publisher().unwrap().check().await);
        };
        let error = transport_with(options.with_client_certificate("no/such.pem", "no/such.key")).unwrap_err();
        assert!(error.to_string().contains("no/such.pem"), "{error}");
    });
}

/// Queues have the prefix and the arguments that they are told, and messages the routing key of a plain client.
#[test]
fn queues_and_routing_keys_may_be_an_operators() {
    run(async {
        let fixture = Fixture::new();
        let options = fixture
            .options()
            .with_queue_prefix("staging.")
            .with_queue_argument("x-max-length", 2)
            .with_plain_routing_keys();
        let transport = transport_with(options.clone()).unwrap();
        let subscription = fixture.ordered().unordered();
        let (intake, settling) = join(&transport, &subscription).await;
        settling.close(SOON).await.unwrap();
        drop(intake);
        let (_connection, plain) = fixture.plain().await;
        let queue = format!("staging.{}", fixture.name);
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        plain
            .queue_declare(queue.as_str().into(), passive, Default::default())
            .await
            .unwrap();
        publish(
            &transport,
            &[fixture.message(Some("k"), "1"), fixture.message(Some("k"), "2")],
        )
        .await;
        let got = plain
            .basic_get(queue.as_str().into(), BasicGetOptions::default())
            .await
            .unwrap()
            .unwrap();
        assert_eq!(got.delivery.routing_key.as_str(), fixture.topic("t").as_str());
        got.delivery
            .reject(lapin::options::BasicRejectOptions { requeue: true })
            .await
            .unwrap();
        // It is full, which is the argument's doing; quorum queues notice a little later. Nothing is dropped for that.
        let is_full = async |n: u32| {
            let more = [fixture.message(None, &n.to_string())];
            let outcomes = transport.publisher().unwrap().publish_all(&more).await;
            outcomes.into_iter().find_map(Result::err)
        };
        let mut n = 3;
        let error = loop {
            if let Some(error) = is_full(n).await {
                break error;
            }
            n += 1;
            assert!(n < 500, "it takes everything");
        };
        assert_eq!(
            error.kind(),
            PublishErrorKind::Unavailable(Scope::Destination),
            "{error:?}"
        );
        assert!(format!("{error:?}").contains("full"), "{error:?}");
        let (mut intake, settling) = join(&transport, &subscription).await;
        let got = take(&mut intake, 2, SOON).await;
        assert_eq!(got.iter().map(text).collect::<Vec<_>>(), ["1", "2"]);
        settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
    });
}
