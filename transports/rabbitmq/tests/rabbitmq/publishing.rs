use crate::fixture::{Fixture, join, publish, take, text};
use lapin::options::{ExchangeDeleteOptions, QueueDeclareOptions};
use postrider_core::{
    Delivery, ErrorKind, Message, PublishError, PublishErrorKind, PublisherExt as _, Reachability, Scope, Subscription,
    Topic, partition::slot_of,
};
use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::{run, run_within, server::RabbitMq, transport::send_reported};
use std::{
    collections::BTreeSet,
    time::{Duration, Instant},
};

fn kind(outcome: &Result<(), PublishError>) -> Option<PublishErrorKind> {
    outcome.as_ref().err().map(PublishError::kind)
}

const DESTINATION: Option<PublishErrorKind> = Some(PublishErrorKind::Unavailable(Scope::Destination));
const CONNECTION: Option<PublishErrorKind> = Some(PublishErrorKind::Unavailable(Scope::Connection));

/// The client attaches what is returned to whichever confirm it resolves next.
#[test]
fn a_returned_message_is_the_one_that_was_returned() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (_intake, _settling) = join(&transport, &fixture.ordered().unordered()).await;
        let nowhere = fixture.topic("nowhere");
        let mut calls = Vec::new();
        for call in 0..8 {
            let batch: Vec<Message> = (0..1000)
                .map(|n| {
                    let message = fixture.message(None, "x");
                    if (n * 7 + call) % 13 == 0 {
                        message.with_topic(nowhere.clone())
                    } else {
                        message
                    }
                })
                .collect();
            let publisher = transport.publisher().unwrap().clone();
            calls.push(tokio::spawn(
                async move { (publisher.publish_all(&batch).await, batch) },
            ));
        }
        for call in calls {
            let (outcomes, batch) = call.await.unwrap();
            for (message, outcome) in batch.iter().zip(&outcomes) {
                let expected = if message.topic() == &nowhere { DESTINATION } else { None };
                assert_eq!(kind(outcome), expected, "{outcome:?}");
                assert_eq!(
                    outcome.as_ref().is_err_and(PublishError::is_unroutable),
                    expected.is_some()
                );
            }
        }
    });
}

/// One message to an exchange that is gone closes the channel for all others: the next call has it declared again.
#[test]
fn an_exchange_that_was_deleted_is_declared_again() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let subscription = fixture.ordered().unordered();
        let (intake, settling) = join(&transport, &subscription).await;
        publish(&transport, &[fixture.message(None, "1")]).await;
        settling.close(Duration::from_secs(5)).await.unwrap();
        drop(intake);
        let (_connection, plain) = fixture.plain().await;
        plain
            .exchange_delete(fixture.name.as_str().into(), ExchangeDeleteOptions::default())
            .await
            .unwrap();
        let publisher = transport.publisher().unwrap();
        let outcome = publisher.publish_all(&[fixture.message(None, "2")]).await;
        assert_eq!(kind(&outcome[0]), DESTINATION);
        // It is there again; bound to nothing, until the group is.
        let outcome = publisher.publish_all(&[fixture.message(None, "2")]).await;
        assert_eq!(kind(&outcome[0]), DESTINATION);
        let (mut intake, _settling) = join(&transport, &subscription).await;
        publish(&transport, &[fixture.message(None, "3")]).await;
        let got: BTreeSet<String> = take(&mut intake, 2, Duration::from_secs(3))
            .await
            .iter()
            .map(text)
            .collect();
        assert!(got.contains("3"), "{got:?}");
    });
}

#[test]
fn what_is_declared_otherwise_is_told() {
    run(async {
        let fixture = Fixture::new();
        let (_connection, plain) = fixture.plain().await;
        let fanout = lapin::ExchangeKind::Fanout;
        let name = fixture.name.as_str();
        plain
            .exchange_declare(name.into(), fanout, Default::default(), Default::default())
            .await
            .unwrap();
        let subscription = fixture.ordered();
        let transport = fixture.transport();
        let error = transport
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(
            error.to_string().contains(name) && error.to_string().contains("declared otherwise"),
            "{error}"
        );
        // The number of partitions is fixed.
        let other = Fixture::new();
        let subscription = other.ordered();
        let _eight = join(&other.transport(), &subscription).await;
        let four = transport_with(other.options().with_partitions(4)).unwrap();
        let error = four
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("another number of partitions"), "{error}");
        // And nothing is declared by those who only look.
        let third = Fixture::new();
        let looking = transport_with(third.options().without_declaring()).unwrap();
        let subscription = third.ordered();
        let error = looking
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config);
        assert!(error.to_string().contains("missing"), "{error}");
        let outcome = looking
            .publisher()
            .unwrap()
            .publish_all(&[third.message(None, "x")])
            .await;
        assert_eq!(kind(&outcome[0]), DESTINATION);
    });
}

#[test]
fn a_broker_that_cannot_be_reached_is_told_without_the_password() {
    run(async {
        let options = RabbitMqOptions::new("amqp://u:secret@127.0.0.1:1/%2f");
        let transport = transport_with(options).unwrap();
        let message = Message::new(Topic::new("t"), "t.v1", "x");
        let outcome = transport.publisher().unwrap().publish_all(&[message]).await;
        assert_eq!(kind(&outcome[0]), CONNECTION);
        let Reachability::Down(down) = transport.publisher().unwrap().check().await else {
            panic!("it is down")
        };
        for shown in [
            format!("{:?}", outcome[0]),
            format!("{down:?}"),
            format!("{transport:?}"),
        ] {
            assert!(!shown.contains("secret"), "{shown}");
        }
        // Wrong passwords too.
        let fixture = Fixture::new();
        let wrong = fixture.url.replace("guest:guest", "guest:secret");
        let transport = transport_with(RabbitMqOptions::new(wrong)).unwrap();
        let outcome = transport
            .publisher()
            .unwrap()
            .publish_all(&[fixture.message(None, "x")])
            .await;
        let shown = format!("{:?}", outcome[0]);
        assert!(
            shown.contains("refuses the connection") && !shown.contains("secret"),
            "{shown}"
        );
    });
}

/// Over TLS, with an authority of one's own to trust; a certificate that nobody vouches for is refused.
#[test]
fn tls_is_spoken_and_certificates_are_checked() {
    run(async {
        let server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        let (url, ca_file) = server.tls();
        let options = RabbitMqOptions::new(&url).with_exchange(&fixture.name);
        let trusting = transport_with(options.clone().with_ca_file(&ca_file)).unwrap();
        let (mut intake, _settling) = join(&trusting, &fixture.ordered()).await;
        publish(&trusting, &[fixture.message(Some("k"), "over TLS")]).await;
        let got = take(&mut intake, 1, Duration::from_secs(5)).await;
        assert_eq!(got.iter().map(text).collect::<Vec<_>>(), ["over TLS"]);
        let doubting = transport_with(options).unwrap();
        let outcome = doubting
            .publisher()
            .unwrap()
            .publish_all(&[fixture.message(None, "x")])
            .await;
        assert_eq!(kind(&outcome[0]), CONNECTION);
        assert!(
            format!("{outcome:?}").to_lowercase().contains("certificate"),
            "{outcome:?}"
        );
        // Certificates without TLS, and none where they should be.
        let plain = RabbitMqOptions::new(server.url()).with_ca_file(&ca_file);
        assert!(transport_with(plain).unwrap_err().to_string().contains("amqps://"));
        let missing = RabbitMqOptions::new(&url).with_ca_file("no/such.pem");
        assert!(transport_with(missing).unwrap_err().to_string().contains("no/such.pem"));
    });
}

/// While the broker is low on memory it takes nothing, and says so.
#[test]
fn a_blocked_broker_is_told_at_once() {
    run_within(Duration::from_secs(120), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        let transport = fixture.transport();
        let (_intake, _settling) = join(&transport, &fixture.ordered().unordered()).await;
        publish(&transport, &[fixture.message(None, "before")]).await;
        server.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
        let publisher = transport.publisher().unwrap();
        let began = Instant::now();
        let outcome = loop {
            // The first may be what the broker blocks the connection for.
            let outcome = publisher.publish_all(&[fixture.message(None, "x")]).await.remove(0);
            if outcome.is_err() {
                break outcome;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "it is not blocked");
        };
        assert_eq!(kind(&outcome), CONNECTION);
        assert!(format!("{outcome:?}").contains("takes no messages"), "{outcome:?}");
        assert!(
            matches!(publisher.check().await, Reachability::Down(_)),
            "whoever probes is told too"
        );
        server.ctl(&["set_vm_memory_high_watermark", "absolute", "2GB"]);
        let began = Instant::now();
        while publisher.publish_all(&[fixture.message(None, "after")]).await[0].is_err() {
            assert!(began.elapsed() < Duration::from_secs(20), "it stays blocked");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    });
}

/// A confirm may be there before its message is handed over for good: it is told of all the same, though nothing follows it.
#[test]
fn a_confirm_that_comes_at_once_is_told() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let publisher = transport.publisher().unwrap();
        assert!(matches!(publisher.check().await, Reachability::Up));
        // A queue in memory confirms within a moment.
        let (_connection, channel) = fixture.plain().await;
        let queue = QueueDeclareOptions {
            exclusive: true,
            ..Default::default()
        };
        let name = fixture.name.as_str();
        channel
            .queue_declare(name.into(), queue, Default::default())
            .await
            .unwrap();
        fixture.bind(&channel, name, &fixture.topic("t")).await;
        for n in 0..4_000 {
            let batch = [fixture.message(None, &n.to_string())];
            let published = tokio::time::timeout(Duration::from_secs(2), publisher.publish_all(&batch));
            assert!(published.await.is_ok_and(|outcomes| outcomes[0].is_ok()), "{n}");
        }
    });
}

/// A queue that has lost its majority confirms nothing and gives nothing: nobody else waits for it, in sending or receiving.
#[test]
fn a_queue_without_its_majority_stops_only_itself() {
    run_within(Duration::from_secs(120), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        let options = fixture.options().with_confirm_timeout(Duration::from_secs(2));
        let transport = transport_with(options).unwrap();
        let (intake, settling) = join(&transport, &fixture.ordered()).await;
        let batch: Vec<Message> = (0..200).map(|n| fixture.message(Some(&n.to_string()), "x")).collect();
        publish(&transport, &batch).await;
        let partition = |message: &Message| slot_of(message.key(), message.id()) / 8;
        // What is out of it then comes back first, and in its order.
        let key = (0..)
            .map(|n| format!("first {n}"))
            .find(|key| slot_of(Some(key), batch[0].id()) / 8 == 3);
        let firsts: Vec<Message> = (0..20)
            .map(|n| fixture.message(key.as_deref(), &n.to_string()))
            .collect();
        publish(&transport, &firsts).await;
        let mut intake = intake;
        let out = take(&mut intake, 220, Duration::from_secs(10)).await;
        assert_eq!(out.len(), 220);
        settling
            .settle(out.into_iter().filter(|d| text(d) == "x").map(Delivery::ack).collect())
            .await;
        let queue = format!("{{'%2F_{}:3', node()}}", fixture.name);
        server.ctl(&["eval", &format!("ra:stop_server(quorum_queues, {queue}).")]);
        let began = Instant::now();
        let (outcomes, reported) = send_reported(&transport, &batch).await;
        println!("told after {:?}", began.elapsed());
        // The others were told of before: nobody waited for it.
        let stuck = batch.iter().filter(|message| partition(message) == 3).count();
        let last = &reported[batch.len() - stuck..];
        assert!(last.iter().all(|at| partition(&batch[*at]) == 3), "{reported:?}");
        for (message, outcome) in batch.iter().zip(&outcomes) {
            let expected = if partition(message) == 3 { DESTINATION } else { None };
            assert_eq!(kind(outcome), expected, "{outcome:?}");
        }
        assert!(format!("{outcomes:?}").contains("majority"));
        // Whoever joins now gets what the other queues have.
        drop((intake, settling));
        let (mut intake, settling) = join(&transport, &fixture.ordered()).await;
        let others = batch.iter().filter(|message| partition(message) != 3).count();
        let mut got = 0;
        while got < others {
            let taken = take(&mut intake, 50, Duration::from_secs(20)).await;
            assert!(!taken.is_empty(), "{got} of {others}");
            got += taken.len();
            settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        }
        println!("the other queues' messages are there after {:?}", began.elapsed());
        server.ctl(&["eval", &format!("ra:restart_server(quorum_queues, {queue}).")]);
        let began = Instant::now();
        while transport
            .publisher()
            .unwrap()
            .publish_all(&batch)
            .await
            .iter()
            .any(Result::is_err)
        {
            assert!(began.elapsed() < Duration::from_secs(40), "it does not come back");
        }
        let (mut of_it, until) = (Vec::new(), Instant::now() + Duration::from_secs(40));
        while of_it.len() < 20 + 200 - others && Instant::now() < until {
            let taken = take(&mut intake, 50, Duration::from_secs(1)).await;
            of_it.extend(taken.iter().filter(|d| partition(d.message()) == 3).map(text));
            settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        }
        println!("everything is there {:?} after it is back", began.elapsed());
        assert!(of_it.len() >= 20 + 200 - others, "{} of {}", of_it.len(), 220 - others);
        assert_eq!(of_it[..20], (0..20).map(|n| n.to_string()).collect::<Vec<_>>());
    });
}

/// A message whose headers no frame holds ends the connection, and everybody else's messages with it: it is not sent.
#[test]
fn headers_that_no_frame_holds_are_refused_alone() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, _settling) = join(&transport, &fixture.ordered()).await;
        let large = fixture
            .message(Some("a"), "large")
            .with_header("h", "x".repeat(131_000));
        let fits = fixture.message(Some("a"), "fits").with_header("h", "x".repeat(120_000));
        assert!(postrider_core::Limits::default().check(&large).is_err());
        postrider_core::Limits::default().check(&fits).unwrap();
        let mut batch: Vec<Message> = (0..20).map(|n| fixture.message(Some("b"), &n.to_string())).collect();
        batch.insert(7, large);
        batch.push(fits);
        let outcomes = transport.publisher().unwrap().publish_all(&batch).await;
        for (at, outcome) in outcomes.iter().enumerate() {
            let expected = if at == 7 { Some(PublishErrorKind::Invalid) } else { None };
            assert_eq!(kind(outcome), expected, "{at}: {outcome:?}");
        }
        assert!(format!("{:?}", outcomes[7]).contains("frame_max"));
        assert_eq!(take(&mut intake, 21, Duration::from_secs(5)).await.len(), 21);
    });
}

/// The right to write is withdrawn and given back: an unavailable destination, which blames no message and ends no other.
#[test]
fn a_right_that_is_withdrawn_blames_no_message() {
    run_within(Duration::from_secs(60), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        server.ctl(&["add_user", "clerk", "secret"]);
        let rights = |server: &mut RabbitMq, write: &str| {
            server.ctl(&["set_permissions", "-p", "/", "clerk", ".*", write, ".*"]);
        };
        rights(&mut server, ".*");
        let (_, place) = fixture.url.split_once("://").unwrap();
        let place = place.rsplit_once('@').map_or(place, |(_, place)| place);
        let options = RabbitMqOptions::new(format!("amqp://clerk:secret@{place}"))
            .with_exchange(&fixture.name)
            .with_timeout(Duration::from_secs(5));
        let transport = transport_with(options).unwrap();
        let (mut intake, settling) = join(&transport, &fixture.ordered()).await;
        publish(&transport, &[fixture.message(Some("a"), "before")]).await;
        let publisher = transport.publisher().unwrap();

        rights(&mut server, "^$");
        // The broker remembers the rights of a channel until that has been idle for a while.
        let batch: Vec<Message> = (0..20).map(|n| fixture.message(Some("a"), &n.to_string())).collect();
        let began = Instant::now();
        loop {
            let outcomes = publisher.publish_all(&batch).await;
            if outcomes.iter().all(Result::is_err) {
                assert!(
                    outcomes.iter().all(|outcome| kind(outcome) == DESTINATION),
                    "{outcomes:?}"
                );
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "it may still write");
            tokio::time::sleep(Duration::from_secs(3)).await;
        }
        // A dead letter goes by a link of its own, whatever that may.
        let taken = take(&mut intake, 1, Duration::from_secs(5)).await;
        let letters = taken.into_iter().map(postrider_core::Delivery::dead_letter).collect();
        assert!(
            !settling.settle(letters).await.is_empty(),
            "it may not write that either"
        );

        rights(&mut server, ".*");
        let began = Instant::now();
        while publisher.publish_all(&batch).await.iter().any(Result::is_err) {
            assert!(began.elapsed() < Duration::from_secs(20), "it does not come back");
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    });
}

/// Copies have a link of their own: one that the broker does not permit ends no other message's channel.
#[test]
fn copies_that_are_not_permitted_end_no_other_message() {
    run_within(Duration::from_secs(60), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        server.ctl(&["add_user", "clerk", "secret"]);
        // The default exchange, which copies go to, has no name: it counts as `amq.default`.
        let write = format!("^{}", fixture.name);
        server.ctl(&["set_permissions", "-p", "/", "clerk", ".*", &write, ".*"]);
        let (_, place) = fixture.url.split_once("://").unwrap();
        let place = place.rsplit_once('@').map_or(place, |(_, place)| place);
        let options = RabbitMqOptions::new(format!("amqp://clerk:secret@{place}"))
            .with_exchange(&fixture.name)
            .with_timeout(Duration::from_secs(5));
        let transport = transport_with(options).unwrap();
        let (mut intake, settling) = join(&transport, &fixture.ordered().unordered()).await;
        let publisher = transport.publisher().unwrap().clone();
        let batch: Vec<Message> = (0..50).map(|n| fixture.message(None, &n.to_string())).collect();
        let publishing = tokio::spawn(async move {
            let mut all = Vec::new();
            for _ in 0..40 {
                all.extend(publisher.publish_all(&batch).await);
            }
            all
        });
        for _ in 0..10 {
            let taken = take(&mut intake, 1, Duration::from_secs(5)).await;
            let letters = taken.into_iter().map(postrider_core::Delivery::dead_letter).collect();
            assert!(!settling.settle(letters).await.is_empty(), "a dead letter was stored");
        }
        let outcomes = publishing.await.unwrap();
        let failed: Vec<_> = outcomes.iter().filter(|outcome| outcome.is_err()).collect();
        assert!(
            failed.is_empty(),
            "{} of {}: {:?}",
            failed.len(),
            outcomes.len(),
            failed[0]
        );
    });
}

/// An exchange that is deleted takes the bindings of every group with it. Members bind again by themselves.
#[test]
fn bindings_that_are_lost_are_made_again() {
    run_within(Duration::from_secs(60), async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let other = Subscription::new(
            postrider_core::GroupName::parse(format!("{}-2", fixture.name)).unwrap(),
            vec![fixture.topic("t")],
        );
        let (mut one, _settling_one) = join(&transport, &fixture.ordered()).await;
        let (mut two, _settling_two) = join(&transport, &other.unordered()).await;
        publish(&transport, &[fixture.message(Some("a"), "before")]).await;
        assert_eq!(take(&mut one, 1, Duration::from_secs(5)).await.len(), 1);
        assert_eq!(take(&mut two, 1, Duration::from_secs(5)).await.len(), 1);
        let (_connection, plain) = fixture.plain().await;
        plain
            .exchange_delete(fixture.name.as_str().into(), ExchangeDeleteOptions::default())
            .await
            .unwrap();
        // Declared anew by a publisher, it has no bindings.
        let publisher = transport.publisher().unwrap();
        let _ = publisher.publish_all(&[fixture.message(Some("a"), "lost")]).await;
        tokio::time::sleep(Duration::from_secs(12)).await;
        publish(&transport, &[fixture.message(Some("a"), "after")]).await;
        for intake in [&mut one, &mut two] {
            let got = take(intake, 1, Duration::from_secs(5)).await;
            assert_eq!(got.iter().map(text).collect::<Vec<_>>(), ["after"]);
        }
    });
}
