//! What a group may ask of its queue.

use crate::fixture::{Fixture, join, publish, take, text};
use lapin::options::{BasicGetOptions, BasicPublishOptions, ExchangeDeclareOptions, QueueDeclareOptions};
use lapin::{BasicProperties, ExchangeKind, types::FieldTable};
use postrider_core::PublisherExt as _;
use postrider_core::{
    ErrorKind, GroupName, Message, Reachability, Subscription, relay::TopicPattern, subscriber::QueueOptions,
};
use postrider_rabbitmq::{RabbitMqOptions, transport_with};
use postrider_testkit::{
    run, run_within,
    server::RabbitMq,
    transport::{NamedTransport, a_pattern_takes_every_topic_that_matches, order_per_key},
};
use std::time::{Duration, Instant};

fn asks(change: impl FnOnce(&mut QueueOptions)) -> QueueOptions {
    let mut queue = QueueOptions::default();
    change(&mut queue);
    queue
}

#[test]
fn messages_that_wait_too_long_go_where_they_are_told() {
    run(async {
        let fixture = Fixture::new();
        let dead = format!("{}-dead", fixture.name);
        let mut subscription = fixture.ordered().unordered();
        subscription.queue = asks(|queue| {
            queue.message_expiry = Some(Duration::from_millis(300));
            queue.dead_letter_to = Some(dead.clone());
        });
        let transport = fixture.transport();
        let (intake, settling) = join(&transport, &subscription).await;
        settling.close(Duration::from_secs(5)).await.unwrap();
        drop(intake);
        publish(&transport, &[fixture.message(None, "too late")]).await;
        let (_connection, channel) = fixture.plain().await;
        let began = std::time::Instant::now();
        let got = loop {
            let got = channel
                .basic_get(dead.as_str().into(), BasicGetOptions { no_ack: true })
                .await
                .unwrap();
            match got {
                Some(got) => break got,
                None => assert!(began.elapsed() < Duration::from_secs(20), "it does not come"),
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        };
        assert_eq!(got.delivery.data, b"too late");
    });
}

#[test]
fn a_queue_nobody_uses_expires() {
    run(async {
        let fixture = Fixture::new();
        let mut subscription = fixture.ordered().unordered();
        subscription.queue = asks(|queue| queue.expiry = Some(Duration::from_millis(500)));
        let (intake, settling) = join(&fixture.transport(), &subscription).await;
        settling.close(Duration::from_secs(5)).await.unwrap();
        drop(intake);
        let (connection, _) = fixture.plain().await;
        let began = std::time::Instant::now();
        loop {
            // A look that fails closes its channel, and one that succeeds would be a use, if it came often enough.
            let channel = connection.create_channel().await.unwrap();
            let passive = QueueDeclareOptions {
                passive: true,
                ..Default::default()
            };
            let look = channel.queue_declare(fixture.name.as_str().into(), passive, FieldTable::default());
            if look.await.is_err() {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "it is still there");
            tokio::time::sleep(Duration::from_secs(2)).await;
        }
    });
}

#[test]
fn a_group_takes_from_the_exchange_it_names_and_declares_nothing_if_told_so() {
    run(async {
        let fixture = Fixture::new();
        let (_connection, channel) = fixture.plain().await;
        let legacy = format!("{}-legacy", fixture.name);
        let durable = ExchangeDeclareOptions {
            durable: true,
            ..Default::default()
        };
        let declared = channel.exchange_declare(
            legacy.as_str().into(),
            ExchangeKind::Topic,
            durable,
            FieldTable::default(),
        );
        declared.await.unwrap();
        let mut subscription = fixture.ordered().unordered();
        subscription.queue = asks(|queue| {
            queue.bind = Some(legacy.clone());
            queue.declare = Some(false);
        });
        // Told to declare nothing, it says what is missing.
        let transport = fixture.transport();
        let missing = transport
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await
            .unwrap_err();
        assert_eq!(missing.kind(), ErrorKind::Config);
        assert!(missing.to_string().contains("is not to be declared"), "{missing}");
        subscription.queue.declare = None;
        let (mut intake, settling) = join(&transport, &subscription).await;
        let topic = fixture.topic("t");
        let sent = channel.basic_publish(
            legacy.as_str().into(),
            topic.as_str().into(),
            BasicPublishOptions::default(),
            b"from there",
            BasicProperties::default(),
        );
        sent.await.unwrap();
        let got = take(&mut intake, 1, Duration::from_secs(10)).await;
        assert_eq!(text(&got[0]), "from there");
        settling
            .settle(got.into_iter().map(postrider_core::Delivery::ack).collect())
            .await;
    });
}

/// Only an exchange that knows patterns has them, and an exchange is one or the other.
#[test]
fn patterns_are_an_option_of_the_exchange() {
    run(async {
        let fixture = Fixture::new();
        let transport = transport_with(fixture.options().with_wildcards()).unwrap();
        let named = NamedTransport::new(fixture.name.clone(), transport.clone(), Duration::from_secs(1));
        a_pattern_takes_every_topic_that_matches(&named).await;
        order_per_key(&named).await;
        let other = fixture.transport();
        let pattern = Subscription::new(fixture.group(), Vec::new()).with_pattern(TopicPattern::parse("t.*").unwrap());
        let refused = other.subscriber(&pattern).unwrap_err();
        assert!(refused.to_string().contains("option of the transport"), "{refused}");
        let outcome = other
            .publisher()
            .unwrap()
            .publish_all(&[fixture.message(None, "x")])
            .await
            .remove(0);
        let refused = format!("{:?}", outcome.unwrap_err());
        assert!(refused.contains("with_wildcards"), "{refused}");
    });
}

/// The exchange of another application may be of the other kind: nobody looks, so what is bound is right on both.
#[test]
fn a_group_takes_from_an_exchange_of_either_kind() {
    run(async {
        let fixture = Fixture::new();
        for (theirs, ours) in [(false, true), (true, false)] {
            let name = format!("{}-{theirs}", fixture.name);
            let with = |wildcards: bool, name: &str| {
                let options = fixture.options().with_exchange(name);
                transport_with(if wildcards { options.with_wildcards() } else { options }).unwrap()
            };
            let owner = with(theirs, &name);
            assert!(matches!(owner.publisher().unwrap().check().await, Reachability::Up));
            let mut subscription = Subscription::new(GroupName::parse(name.clone()).unwrap(), vec![fixture.topic("t")]);
            subscription = subscription.unordered();
            subscription.queue = asks(|queue| queue.bind = Some(name.clone()));
            let transport = with(ours, &format!("{name}-ours"));
            let (mut intake, settling) = join(&transport, &subscription).await;
            publish(&owner, &[fixture.message(Some("k"), "x")]).await;
            let got = take(&mut intake, 1, Duration::from_secs(10)).await;
            assert_eq!(text(&got[0]), "x");
            settling.close(Duration::from_secs(5)).await.unwrap();
        }
    });
}

#[test]
fn a_group_of_many_topics_may_take_longer_than_anything_else() {
    run(async {
        let fixture = Fixture::new();
        let topics: Vec<_> = (0..40).map(|n| fixture.topic(&format!("many-{n}"))).collect();
        let last = topics[39].clone();
        let transport = transport_with(fixture.options().with_timeout(Duration::from_secs(2))).unwrap();
        let subscription = Subscription::new(fixture.group(), topics).unordered();
        let began = Instant::now();
        let (mut intake, settling) = join(&transport, &subscription).await;
        println!("40 topics are bound in {:?}", began.elapsed());
        publish(&transport, &[Message::new(last, "e.v1", "last")]).await;
        assert_eq!(text(&take(&mut intake, 1, Duration::from_secs(10)).await[0]), "last");
        settling.close(Duration::from_secs(5)).await.unwrap();
    });
}

/// An operator's policy takes messages out of a queue that were delivered so often: they go to the group's dead letters.
#[test]
fn a_policy_of_the_operators_loses_nothing() {
    run_within(Duration::from_secs(60), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        let policy = r#"{"delivery-limit": 2}"#;
        server.ctl(&["set_policy", "limits", ".*", policy, "--apply-to", "queues"]);
        let transport = fixture.transport();
        let subscription = fixture.ordered().unordered();
        let (mut intake, settling) = join(&transport, &subscription).await;
        publish(&transport, &[fixture.message(None, "unlucky")]).await;
        let began = Instant::now();
        let (_connection, channel) = fixture.plain().await;
        let dead = format!("{}:dead", fixture.name);
        loop {
            let taken = take(&mut intake, 1, Duration::from_secs(1)).await;
            settling
                .settle(taken.into_iter().map(postrider_core::Delivery::release).collect())
                .await;
            let options = BasicGetOptions { no_ack: true };
            let got = channel.basic_get(dead.as_str().into(), options).await.unwrap();
            if let Some(got) = got {
                assert_eq!(got.delivery.data, b"unlucky");
                return;
            }
            assert!(began.elapsed() < Duration::from_secs(30), "it is lost");
        }
    });
}

/// A member that is told of fewer partitions than there are would never read the others.
#[test]
fn a_member_that_knows_too_few_partitions_is_refused() {
    run(async {
        let fixture = Fixture::new();
        let (_intake, _settling) = join(&fixture.transport(), &fixture.ordered()).await;
        let few = transport_with(fixture.options().with_partitions(4).without_declaring()).unwrap();
        let subscription = fixture.ordered();
        let error = few
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await
            .unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(error.to_string().contains("this number of partitions"), "{error}");
    });
}

/// A connection that may have fewer channels than there are partitions would be torn down for ever.
#[test]
fn a_group_that_needs_more_channels_than_are_permitted_is_refused() {
    run(async {
        let fixture = Fixture::new();
        let url = format!("{}?channel_max=8", fixture.url);
        let options = RabbitMqOptions::new(url).with_exchange(&fixture.name);
        let subscription = fixture.ordered();
        let transport = transport_with(options.clone()).unwrap();
        let error = transport
            .subscriber(&subscription)
            .unwrap()
            .subscribe(&subscription)
            .await;
        let error = error.unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Config, "{error}");
        assert!(
            error.to_string().contains("channel_max: 8") && error.to_string().contains("needed: 12"),
            "{error}"
        );
        let (_intake, _settling) = join(&transport_with(options.with_partitions(4)).unwrap(), &subscription).await;
    });
}

/// Dead letters go to a queue that is there already, of whatever kind.
#[test]
fn dead_letters_go_to_a_queue_of_another_kind() {
    run(async {
        let fixture = Fixture::new();
        let (_connection, channel) = fixture.plain().await;
        let name = format!("{}-classic", fixture.name);
        let durable = QueueDeclareOptions {
            durable: true,
            ..Default::default()
        };
        channel
            .queue_declare(name.as_str().into(), durable, FieldTable::default())
            .await
            .unwrap();
        let mut subscription = fixture.ordered().unordered();
        subscription.queue = asks(|queue| queue.dead_letter_to = Some(name.clone()));
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &subscription).await;
        publish(&transport, &[fixture.message(None, "dead")]).await;
        let taken = take(&mut intake, 1, Duration::from_secs(5)).await;
        let letters = taken.into_iter().map(postrider_core::Delivery::dead_letter).collect();
        assert_eq!(settling.settle(letters).await.len(), 0);
        let got = channel
            .basic_get(name.as_str().into(), BasicGetOptions { no_ack: true })
            .await
            .unwrap();
        assert_eq!(got.unwrap().delivery.data, b"dead");
    });
}
