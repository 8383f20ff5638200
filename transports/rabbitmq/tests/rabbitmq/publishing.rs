use crate::fixture::{Fixture, join, publish, take, text};
use lapin::options::{ExchangeDeleteOptions, QueueDeclareOptions};
use postrider_core::{ErrorKind, Message, PublishError, PublishErrorKind, Reachability, Scope, Topic};
use postrider_rabbitmq::transport_with;
use postrider_testkit::{run, run_within, server::RabbitMq};
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
            calls.push(tokio::spawn(async move { (publisher.publish(&batch).await, batch) }));
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
        let outcome = publisher.publish(&[fixture.message(None, "2")]).await;
        assert_eq!(kind(&outcome[0]), CONNECTION);
        // It is there again; bound to nothing, until the group is.
        let outcome = publisher.publish(&[fixture.message(None, "2")]).await;
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
        let outcome = looking.publisher().unwrap().publish(&[third.message(None, "x")]).await;
        assert_eq!(kind(&outcome[0]), CONNECTION);
    });
}

#[test]
fn a_broker_that_cannot_be_reached_is_told_without_the_password() {
    run(async {
        let options = postrider_rabbitmq::RabbitMqOptions::new("amqp://u:secret@127.0.0.1:1/%2f");
        let transport = transport_with(options).unwrap();
        let message = Message::new(Topic::new("t"), "t.v1", "x");
        let outcome = transport.publisher().unwrap().publish(&[message]).await;
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
        let transport = transport_with(postrider_rabbitmq::RabbitMqOptions::new(wrong)).unwrap();
        let outcome = transport
            .publisher()
            .unwrap()
            .publish(&[fixture.message(None, "x")])
            .await;
        let shown = format!("{:?}", outcome[0]);
        assert!(
            shown.contains("refuses the connection") && !shown.contains("secret"),
            "{shown}"
        );
    });
}

/// Killed with messages on their way: what was confirmed is there, and the publisher comes back by itself.
#[test]
fn what_was_confirmed_outlives_the_broker() {
    run_within(Duration::from_secs(120), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        let transport = fixture.transport();
        let subscription = fixture.ordered().unordered().with_max_in_flight(500);
        let (mut intake, settling) = join(&transport, &subscription).await;
        let publisher = transport.publisher().unwrap().clone();
        let name = fixture.message(None, "x");
        let publishing = tokio::spawn(async move {
            let (mut confirmed, mut away, mut back) = (BTreeSet::new(), None, None);
            for call in 0.. {
                let batch: Vec<Message> = (0..100)
                    .map(|n| Message::new(name.topic().clone(), "test.v1", format!("{call}.{n}")).with_source("test"))
                    .collect();
                for (n, outcome) in publisher.publish(&batch).await.into_iter().enumerate() {
                    match outcome {
                        Ok(()) => {
                            confirmed.insert(format!("{call}.{n}"));
                            if away.is_some() {
                                back.get_or_insert_with(Instant::now);
                            }
                        }
                        Err(error) => {
                            assert!(matches!(error.kind(), PublishErrorKind::Unavailable(_)), "{error:?}");
                            away.get_or_insert_with(Instant::now);
                        }
                    }
                }
                if back.is_some_and(|at: Instant| at.elapsed() > Duration::from_secs(1)) {
                    println!("back after {:?}", back.unwrap() - away.unwrap());
                    return confirmed;
                }
                if away.is_some() && back.is_none() {
                    tokio::time::sleep(Duration::from_millis(50)).await;
                }
            }
            unreachable!()
        });
        tokio::time::sleep(Duration::from_millis(1500)).await;
        let killing = tokio::task::spawn_blocking(move || {
            server.kill();
            server.restart();
            server
        });
        let mut got = BTreeSet::new();
        let (mut repeats, mut quiet) = (0, 0);
        loop {
            let taken = take(&mut intake, 200, Duration::from_secs(2)).await;
            if publishing.is_finished() && taken.is_empty() {
                quiet += 1;
                // The member may still be on its way back.
                if quiet == 8 {
                    break;
                }
            }
            repeats += taken.iter().filter(|delivery| !got.insert(text(delivery))).count();
            // Those of the life before are refused, and come again.
            settling
                .settle(taken.into_iter().map(postrider_core::Delivery::ack).collect())
                .await;
        }
        let confirmed = publishing.await.unwrap();
        let lost: Vec<&String> = confirmed.difference(&got).collect();
        println!("{} confirmed, {} got, {repeats} repeats", confirmed.len(), got.len());
        assert!(lost.is_empty(), "{} lost, {:?} first", lost.len(), lost[0]);
        drop(killing.await.unwrap());
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
            let outcome = publisher.publish(&[fixture.message(None, "x")]).await.remove(0);
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
        while publisher.publish(&[fixture.message(None, "after")]).await[0].is_err() {
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
        let bound = channel.queue_bind(
            name.into(),
            name.into(),
            "#".into(),
            Default::default(),
            Default::default(),
        );
        bound.await.unwrap();
        for n in 0..4_000 {
            let batch = [fixture.message(None, &n.to_string())];
            let published = tokio::time::timeout(Duration::from_secs(2), publisher.publish(&batch));
            assert!(published.await.is_ok_and(|outcomes| outcomes[0].is_ok()), "{n}");
        }
    });
}
