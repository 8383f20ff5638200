use crate::fixture::{Fixture, join, publish, take, text};
use futures_util::StreamExt as _;
use lapin::options::{BasicConsumeOptions, BasicNackOptions, BasicQosOptions, QueueDeclareOptions};
use postrider_core::{Delivery, Message, Taken, partition::slot_of};
use postrider_testkit::{run, run_within, server::RabbitMq};
use std::time::Duration;

const SOON: Duration = Duration::from_secs(5);

fn numbers(fixture: &Fixture, count: usize) -> Vec<Message> {
    (0..count).map(|n| fixture.message(Some("k"), &n.to_string())).collect()
}

/// Acknowledged, and closed at once, quorum queues deliver some of it again unless they are asked something in between.
#[test]
fn what_was_acknowledged_before_a_close_does_not_come_back() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        for subscription in [fixture.ordered(), fixture.ordered().unordered()] {
            let subscription = subscription.with_max_in_flight(1000);
            let (mut intake, settling) = join(&transport, &subscription).await;
            publish(&transport, &numbers(&fixture, 2000)).await;
            for _ in 0..6 {
                let taken = take(&mut intake, 250, SOON).await;
                assert_eq!(taken.len(), 250);
                // One by one, which is the worst for it.
                for delivery in taken {
                    assert!(settling.settle(vec![delivery.ack()]).await.is_empty());
                }
            }
            settling.close(SOON).await.unwrap();
            drop(intake);
            let (mut intake, settling) = join(&transport, &subscription).await;
            let mut rest = Vec::new();
            loop {
                let taken = take(&mut intake, 200, Duration::from_secs(1)).await;
                if taken.is_empty() {
                    break;
                }
                rest.extend(taken.iter().map(text));
                let refused = settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
                assert!(refused.is_empty());
            }
            let expected: Vec<String> = (1500..2000).map(|n| n.to_string()).collect();
            assert_eq!(rest, expected);
            settling.close(SOON).await.unwrap();
            fixture
                .plain()
                .await
                .1
                .queue_delete(fixture.name.as_str().into(), Default::default())
                .await
                .unwrap();
        }
    });
}

/// Deliveries of a connection that is lost are settled in vain, and acknowledge nothing of the one that follows it.
#[test]
fn a_tag_of_a_lost_connection_acknowledges_nothing() {
    run_within(Duration::from_secs(120), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        let transport = fixture.transport();
        for subscription in [fixture.ordered(), fixture.ordered().unordered()] {
            let (mut intake, settling) = join(&transport, &subscription).await;
            publish(&transport, &numbers(&fixture, 20)).await;
            let before = take(&mut intake, 20, SOON).await;
            assert_eq!(before.len(), 20);
            server.ctl(&["close_all_connections", "a test"]);
            let after = take(&mut intake, 20, Duration::from_secs(10)).await;
            assert_eq!(after.len(), 20, "they come again on the next connection");
            let errors = settling.settle(before.into_iter().map(Delivery::ack).collect()).await;
            assert_eq!(errors.len(), 20);
            // Those of this one are all there.
            assert!(
                settling
                    .settle(after.into_iter().map(Delivery::ack).collect())
                    .await
                    .is_empty()
            );
            settling.close(SOON).await.unwrap();
            drop(intake);
            let (mut intake, settling) = join(&transport, &subscription).await;
            assert!(take(&mut intake, 1, Duration::from_secs(1)).await.is_empty());
            settling.close(SOON).await.unwrap();
            drop(intake);
            let plain = fixture.plain().await;
            for queue in (0..8)
                .map(|n| format!("{}:{n}", fixture.name))
                .chain([fixture.name.clone()])
            {
                let _ = plain.1.queue_delete(queue.into(), Default::default()).await;
            }
        }
    });
}

/// What is settled out of order, and what is given back in between.
#[test]
fn any_order_of_settling_will_do() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.ordered()).await;
        publish(&transport, &numbers(&fixture, 100)).await;
        let mut taken = take(&mut intake, 100, SOON).await;
        let released = taken.remove(50);
        let (mut odd, mut even) = (Vec::new(), Vec::new());
        for (n, delivery) in taken.into_iter().enumerate() {
            if n % 2 == 0 {
                even.push(delivery.ack())
            } else {
                odd.push(delivery.ack())
            }
        }
        odd.reverse();
        assert!(settling.settle(odd).await.is_empty());
        for settlement in even {
            assert!(settling.settle(vec![settlement]).await.is_empty());
        }
        assert!(settling.settle(vec![released.release()]).await.is_empty());
        let back = take(&mut intake, 2, Duration::from_secs(3)).await;
        assert_eq!(
            back.iter().map(text).collect::<Vec<_>>(),
            ["50"],
            "nothing else comes again"
        );
        assert_eq!(back[0].delivery_count(), 2);
    });
}

/// While nothing is taken, the broker keeps what is more than the prefetch.
#[test]
fn a_member_that_takes_nothing_holds_little() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let subscription = fixture.ordered().unordered().with_max_in_flight(50);
        let (mut intake, _settling) = join(&transport, &subscription).await;
        publish(&transport, &numbers(&fixture, 1000)).await;
        tokio::time::sleep(Duration::from_millis(500)).await;
        let (_connection, plain) = fixture.plain().await;
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let queue = plain
            .queue_declare(fixture.name.as_str().into(), passive, Default::default())
            .await
            .unwrap();
        assert_eq!(queue.message_count(), 900, "twice what may be in flight is on its way");
        assert!(matches!(intake.next(10).await, Ok(Taken::Batch(batch)) if batch.len() == 10));
    });
}

/// Plain members of the group of a fixture: the queue of the key `k`, twenty messages of it, and nobody else.
async fn plain_members(fixture: &Fixture) -> [(lapin::Connection, lapin::Channel, lapin::Consumer); 2] {
    let transport = fixture.transport();
    // It declares the queues, and has no member.
    let (intake, settling) = join(&transport, &fixture.ordered()).await;
    settling.close(SOON).await.unwrap();
    drop(intake);
    publish(&transport, &numbers(fixture, 20)).await;
    [
        plain_member(fixture, "first", 10).await,
        plain_member(fixture, "second", 10).await,
    ]
}

async fn plain_member(
    fixture: &Fixture,
    tag: &str,
    prefetch: u16,
) -> (lapin::Connection, lapin::Channel, lapin::Consumer) {
    let partition = slot_of(Some("k"), fixture.message(None, "").id()) / 8;
    let queue = format!("{}:{partition}", fixture.name);
    let (connection, channel) = fixture.plain().await;
    channel.basic_qos(prefetch, BasicQosOptions::default()).await.unwrap();
    let options = BasicConsumeOptions::default();
    let consumer = channel.basic_consume(queue.as_str().into(), tag.into(), options, Default::default());
    let consumer = consumer.await.unwrap();
    (connection, channel, consumer)
}

async fn next(consumer: &mut lapin::Consumer) -> (u64, usize) {
    let delivery = consumer.next().await.unwrap().unwrap();
    let n = String::from_utf8(delivery.data).unwrap();
    (delivery.delivery_tag, n.parse().unwrap())
}

/// What the transport does not do, and why: the next consumer begins behind what a cancelled one has not settled, which comes
/// after it.
#[test]
fn handing_over_by_cancel_is_what_breaks_order() {
    run(async {
        let fixture = Fixture::new();
        let [(_first, first_channel, mut first), (_second, _, mut second)] = plain_members(&fixture).await;
        for n in 0..10 {
            assert_eq!(next(&mut first).await.1, n);
        }
        let cancelled = first_channel.basic_cancel("first".into(), Default::default());
        cancelled.await.unwrap();
        assert_eq!(next(&mut second).await.1, 10);
    });
}

/// Nor this: a quorum queue puts what a consumer leaves behind what others have left, so one that had room for less than the
/// one before it leaves that behind the rest.
#[test]
fn a_smaller_prefetch_is_what_breaks_order() {
    run(async {
        let fixture = Fixture::new();
        let [(first, _, mut one), (second, _, _two)] = plain_members(&fixture).await;
        for n in 0..10 {
            assert_eq!(next(&mut one).await.1, n);
        }
        second.close(200, "OK".into()).await.unwrap();
        first.close(200, "OK".into()).await.unwrap();
        let (small, _, mut small_one) = plain_member(&fixture, "small", 1).await;
        assert_eq!(next(&mut small_one).await.1, 0);
        small.close(200, "OK".into()).await.unwrap();
        let (_last, _, mut last) = plain_member(&fixture, "last", 20).await;
        let mut seen = Vec::new();
        for _ in 0..20 {
            seen.push(next(&mut last).await.1);
        }
        let expected: Vec<usize> = (1..10).chain([0]).chain(10..20).collect();
        assert_eq!(seen, expected);
    });
}

/// Whatever the members of a group may have in flight.
#[test]
fn members_of_different_sizes_keep_the_order() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let mut first = join(&transport, &fixture.ordered().with_max_in_flight(300)).await;
        publish(&transport, &numbers(&fixture, 1000)).await;
        assert_eq!(take(&mut first.0, 100, SOON).await.len(), 100);
        drop(first);
        for size in [1, 100, 3] {
            let (mut intake, settling) = join(&transport, &fixture.ordered().with_max_in_flight(size)).await;
            assert_eq!(text(&take(&mut intake, 1, SOON).await[0]), "0");
            settling.close(SOON).await.unwrap();
        }
        let (mut intake, settling) = join(&transport, &fixture.ordered().with_max_in_flight(300)).await;
        let mut seen = Vec::new();
        while seen.len() < 1000 {
            let taken = take(&mut intake, 100, SOON).await;
            assert!(!taken.is_empty(), "{} came", seen.len());
            seen.extend(taken.iter().map(text));
            settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
        }
        let expected: Vec<String> = (0..1000).map(|n| n.to_string()).collect();
        assert_eq!(seen, expected);
    });
}

/// Nor this: what is given back by a nack comes behind what its channel has already got of what follows it.
#[test]
fn giving_back_by_nack_is_what_breaks_order() {
    run(async {
        let fixture = Fixture::new();
        let [(_first, channel, mut first), _second] = plain_members(&fixture).await;
        let (tag, n) = next(&mut first).await;
        assert_eq!(n, 0);
        let back = BasicNackOptions {
            multiple: false,
            requeue: true,
        };
        channel.basic_nack(tag, back).await.unwrap();
        let after: Vec<usize> = [next(&mut first).await.1, next(&mut first).await.1].to_vec();
        assert_eq!(after, [1, 2], "the one given back is overtaken");
        // And comes at last.
        let mut rest = Vec::new();
        while !rest.contains(&0) {
            rest.push(next(&mut first).await.1);
        }
    });
}

/// A broker that is low on memory takes nothing from publishers, and what consumers acknowledge: else it would stay low. So a member's
/// connection publishes nothing, not even to find out whether its bindings are there.
#[test]
fn a_broker_that_is_low_on_memory_is_emptied() {
    run_within(Duration::from_secs(120), async {
        let mut server = RabbitMq::start();
        let fixture = Fixture::on(&server);
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.ordered()).await;
        publish(&transport, &numbers(&fixture, 20)).await;
        server.ctl(&["set_vm_memory_high_watermark", "absolute", "1MB"]);
        // Longer than between two looks at the bindings.
        for n in 0..20 {
            let got = take(&mut intake, 1, SOON).await;
            assert_eq!(got.iter().map(text).collect::<Vec<_>>(), [n.to_string()]);
            tokio::time::sleep(Duration::from_millis(700)).await;
            assert!(
                settling
                    .settle(got.into_iter().map(Delivery::ack).collect())
                    .await
                    .is_empty()
            );
        }
        settling.close(SOON).await.unwrap();
        // What it shows of quorum queues is some seconds old.
        let began = std::time::Instant::now();
        loop {
            let queues = server.ctl(&["list_queues", "messages"]);
            let mut left = queues.lines().filter_map(|line| line.trim().parse::<u32>().ok());
            if left.all(|left| left == 0) {
                break;
            }
            assert!(began.elapsed() < Duration::from_secs(20), "{queues}");
        }
    });
}
