use crate::fixture::{Fixture, join, publish, take, text};
use postrider_core::{Delivery, ErrorKind, Message, Taken};
use postrider_kafka::{KafkaOptions, Start, transport_with};
use postrider_testkit::{
    run, run_within,
    server::{Kafka, fresh_name},
};
use rdkafka::{
    ClientConfig, TopicPartitionList,
    consumer::{BaseConsumer, Consumer as _, StreamConsumer},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    time::{Duration, Instant},
};

const SOON: Duration = Duration::from_secs(20);

fn numbers(fixture: &Fixture, range: std::ops::Range<usize>) -> Vec<Message> {
    range
        .map(|n| fixture.message(Some(&format!("k{}", n % 16)), &n.to_string()))
        .collect()
}

/// The offsets that a group has committed, by partition.
fn committed(fixture: &Fixture) -> BTreeMap<i32, i64> {
    let consumer: BaseConsumer = ClientConfig::new()
        .set("bootstrap.servers", &fixture.brokers)
        .set("group.id", &fixture.name)
        .create()
        .unwrap();
    let mut list = TopicPartitionList::new();
    list.add_partition_range(fixture.topic().as_str(), 0, 3);
    let found = consumer.committed_offsets(list, Duration::from_secs(10)).unwrap();
    let known = found
        .elements()
        .iter()
        .filter_map(|part| Some((part.partition(), part.offset().to_raw()?)))
        .collect::<Vec<_>>();
    known.into_iter().filter(|(_, offset)| *offset >= 0).collect()
}

/// Committing the highest offset that is finished would pass over what is not.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn nothing_is_committed_past_a_gap() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        let batch: Vec<Message> = (0..10).map(|n| fixture.message(Some("k"), &n.to_string())).collect();
        publish(&transport, &batch).await;
        let mut taken = take(&mut intake, 10, SOON).await;
        assert_eq!(
            taken.iter().map(text).collect::<Vec<_>>(),
            (0..10).map(|n| n.to_string()).collect::<Vec<_>>()
        );
        let kept = taken.remove(3);
        assert!(
            settling
                .settle(taken.into_iter().map(Delivery::ack).collect())
                .await
                .is_empty()
        );
        settling.close(Duration::from_secs(10)).await.unwrap();
        drop(kept);
        assert_eq!(committed(&fixture).into_values().collect::<Vec<_>>(), [3]);
        drop(intake);
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        let back = take(&mut intake, 7, SOON).await;
        assert_eq!(text(&back[0]), "3", "what was not settled comes first");
        assert!(
            settling
                .settle(back.into_iter().map(Delivery::ack).collect())
                .await
                .is_empty()
        );
        settling.close(Duration::from_secs(10)).await.unwrap();
        assert_eq!(committed(&fixture).into_values().collect::<Vec<_>>(), [10]);
    });
}

/// What was given back comes again, and what was settled behind it does not.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn a_released_message_comes_again_alone() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        let batch: Vec<Message> = (0..100).map(|n| fixture.message(Some("k"), &n.to_string())).collect();
        publish(&transport, &batch).await;
        let mut taken = take(&mut intake, 100, SOON).await;
        let released = taken.remove(50);
        let mut acks: Vec<_> = taken.into_iter().map(Delivery::ack).collect();
        acks.reverse();
        assert!(settling.settle(acks).await.is_empty());
        assert!(settling.settle(vec![released.release()]).await.is_empty());
        publish(&transport, &[fixture.message(Some("k"), "next")]).await;
        let back = take(&mut intake, 3, Duration::from_secs(4)).await;
        assert_eq!(back.iter().map(text).collect::<Vec<_>>(), ["50", "next"]);
    });
}

/// With work in hand: it is finished first, the partition goes then, and nothing comes twice.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn a_partition_is_handed_over_when_its_work_is_done() {
    run(async {
        let fixture = Fixture::new();
        for new_protocol in [false, true] {
            let fixture = Fixture {
                name: format!("{}-{new_protocol}", fixture.name),
                brokers: fixture.brokers.clone(),
            };
            let options = if new_protocol {
                fixture.options().with_new_group_protocol()
            } else {
                fixture.options()
            };
            let transport = transport_with(options).unwrap();
            let (mut first, first_settling) = join(&transport, &fixture.subscription()).await;
            publish(&transport, &numbers(&fixture, 0..200)).await;
            let held = take(&mut first, 200, SOON).await;
            assert_eq!(held.len(), 200);
            let (mut second, second_settling) = join(&transport, &fixture.subscription()).await;
            // It is told that partitions go, and nobody has them before it is done with them.
            let began = Instant::now();
            let mut gone = 0;
            while gone < 2 && began.elapsed() < SOON {
                tokio::select! {
                    taken = first.next(10) => if let Ok(Taken::Gone(_)) = taken { gone += 1 },
                    taken = take(&mut second, 1, Duration::from_millis(100)) => assert!(taken.is_empty()),
                }
            }
            assert_eq!(gone, 2, "new protocol: {new_protocol}");
            assert!(held.iter().any(|delivery| delivery.is_gone()));
            assert!(
                first_settling
                    .settle(held.into_iter().map(Delivery::ack).collect())
                    .await
                    .is_empty()
            );
            publish(&transport, &numbers(&fixture, 200..400)).await;
            let mut got = BTreeSet::new();
            let mut shares = [0, 0];
            let until = Instant::now() + SOON;
            while got.len() < 200 && Instant::now() < until {
                for (n, (intake, settling)) in [(&mut first, &first_settling), (&mut second, &second_settling)]
                    .into_iter()
                    .enumerate()
                {
                    let taken = take(intake, 50, Duration::from_millis(100)).await;
                    shares[n] += taken.len();
                    assert!(
                        taken.iter().all(|delivery| got.insert(text(delivery))),
                        "something came twice"
                    );
                    settling.settle(taken.into_iter().map(Delivery::ack).collect()).await;
                }
            }
            println!(
                "handed over after {:?}: {shares:?}, new protocol: {new_protocol}",
                began.elapsed()
            );
            assert!(shares[0] > 0 && shares[1] > 0 && got.len() == 200, "{shares:?}");
            assert!(got.iter().all(|n| n.parse::<usize>().unwrap() >= 200), "{got:?}");
        }
    });
}

/// A partition that comes back to a member that had it wakes that member again: of a partition there is one queue with one
/// callback, whoever else has a handle on it.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn a_partition_that_comes_back_wakes_its_member() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut first, first_settling) = join(&transport, &fixture.subscription()).await;
        publish(&transport, &numbers(&fixture, 0..64)).await;
        let held = take(&mut first, 64, SOON).await;
        assert_eq!(held.len(), 64);
        let (second, second_settling) = join(&transport, &fixture.subscription()).await;
        // Told twice that a partition goes, it asks for more and sleeps, with the old queues in hand.
        let mut gone = 0;
        while gone < 2 {
            if let Ok(Taken::Gone(_)) = first.next(10).await {
                gone += 1;
            }
        }
        let asleep = tokio::time::timeout(Duration::from_millis(200), first.next(10)).await;
        assert!(asleep.is_err(), "{asleep:?}");
        assert!(
            first_settling
                .settle(held.into_iter().map(Delivery::ack).collect())
                .await
                .is_empty()
        );
        tokio::time::sleep(Duration::from_secs(2)).await;
        second_settling.close(Duration::from_secs(10)).await.unwrap();
        drop(second);
        for round in 0..3 {
            // Everything is the first one's again; let it sleep before each message.
            let from = 64 + round * 64;
            let asleep = tokio::time::timeout(Duration::from_secs(2), take(&mut first, 1, SOON)).await;
            assert!(asleep.is_err(), "nothing is there yet");
            publish(&transport, &numbers(&fixture, from..from + 64)).await;
            let taken = take(&mut first, 64, SOON).await;
            assert_eq!(taken.len(), 64, "round {round}");
            assert!(
                first_settling
                    .settle(taken.into_iter().map(Delivery::ack).collect())
                    .await
                    .is_empty()
            );
        }
    });
}

/// A member that takes nothing for longer than its session, and longer than Kafka lets pass between two polls, goes on being
/// one: whoever joins meanwhile gets a part, and what the first has in hand is still its own.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn a_busy_member_is_no_dead_member() {
    run(async {
        let fixture = Fixture::new();
        let options = fixture.options().with_property("max.poll.interval.ms", "4000");
        let transport = transport_with(options).unwrap();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        publish(&transport, &numbers(&fixture, 0..100)).await;
        let taken = take(&mut intake, 10, SOON).await;
        tokio::time::sleep(Duration::from_secs(7)).await;
        assert!(
            settling
                .settle(taken.into_iter().map(Delivery::ack).collect())
                .await
                .is_empty()
        );
        let rest = take(&mut intake, 90, SOON).await;
        assert_eq!(rest.len(), 90, "nothing comes twice, and nothing is missing");
        assert!(
            settling
                .settle(rest.into_iter().map(Delivery::ack).collect())
                .await
                .is_empty()
        );
    });
}

/// And the other way round: a plain client that polls too seldom loses its partitions, which is what the test above would show.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn a_plain_member_that_polls_too_seldom_is_put_out() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (_intake, settling) = join(&transport, &fixture.subscription()).await;
        settling.close(Duration::from_secs(10)).await.unwrap();
        publish(&transport, &numbers(&fixture, 0..100)).await;
        let plain: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .set("group.id", &fixture.name)
            .set("auto.offset.reset", "earliest")
            .set("session.timeout.ms", "2000")
            .set("max.poll.interval.ms", "4000")
            .create()
            .unwrap();
        plain.subscribe(&[fixture.topic().as_str()]).unwrap();
        let began = Instant::now();
        while plain
            .poll(Duration::from_millis(100))
            .is_none_or(|polled| polled.is_err())
        {
            assert!(began.elapsed() < SOON, "it gets nothing");
        }
        tokio::time::sleep(Duration::from_secs(7)).await;
        let mut is_put_out = false;
        for _ in 0..300 {
            match plain.poll(Duration::from_millis(10)) {
                Some(Err(error)) => is_put_out |= format!("{error:?}").contains("PollExceeded"),
                Some(Ok(_)) => {}
                None if is_put_out => break,
                None => {}
            }
        }
        assert!(is_put_out);
    });
}

/// The client's own drop waits for its threads, which nobody on the runtime should.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn dropping_a_feed_stops_nobody() {
    run(async {
        let fixture = Fixture::new();
        let transport = fixture.transport();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        publish(&transport, &numbers(&fixture, 0..10)).await;
        drop(take(&mut intake, 10, SOON).await);
        let plain: BaseConsumer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .set("group.id", format!("{}-plain", fixture.name))
            .create()
            .unwrap();
        plain.subscribe(&[fixture.topic().as_str()]).unwrap();
        plain.poll(Duration::from_secs(1));
        let time = |work: Box<dyn FnOnce()>| {
            let began = Instant::now();
            work();
            began.elapsed()
        };
        let clients = time(Box::new(move || drop(plain)));
        let ours = time(Box::new(move || drop((intake, settling, transport))));
        println!("dropping the client takes {clients:?}, the feed and the transport {ours:?}");
        assert!(ours < clients / 2, "{ours:?}, and the client {clients:?}");
    });
}

/// The coordinator keeps a place for whoever has asked to join, and lets nobody else in while it does, until the session of
/// one that has gone ends. So a member that is closed while it joins, here by a broker that is slow to answer, finishes that
/// first.
#[test]
#[cfg_attr(feature = "mock", ignore = "there is no Apache Kafka here to be slow")]
fn a_member_that_is_closed_while_it_joins_keeps_nobody_waiting() {
    run_within(Duration::from_secs(240), async {
        let mut server = Kafka::start();
        let mut longest = Duration::ZERO;
        let protocols = [false, true].into_iter();
        let cases = protocols.flat_map(|new| [0, 2, 4, 6, 8, 10, 15, 20, 30].map(|after| (after, new)));
        for (after, new_protocol) in cases {
            let name = fresh_name();
            let brokers = server.brokers().to_owned();
            let fixture = Fixture { name, brokers };
            let mut options = KafkaOptions::new(&fixture.brokers).with_partitions(4);
            options = options.with_session_timeout(Duration::from_secs(10));
            options.new_group_protocol = new_protocol;
            let transport = transport_with(options).unwrap();
            publish(&transport, &[fixture.message(None, "waits")]).await;
            let (intake, settling) = join(&transport, &fixture.subscription()).await;
            tokio::time::sleep(Duration::from_millis(after)).await;
            server.pause();
            let closing = tokio::spawn(async move { settling.close(Duration::from_secs(10)).await });
            tokio::time::sleep(Duration::from_millis(200)).await;
            server.resume();
            closing.await.unwrap().unwrap();
            drop(intake);
            let (mut intake, _settling) = join(&transport, &fixture.subscription()).await;
            let began = Instant::now();
            assert_eq!(take(&mut intake, 1, Duration::from_secs(30)).await.len(), 1);
            println!(
                "closed after {after} ms (new protocol: {new_protocol}): the next one has what waits after {:?}",
                began.elapsed()
            );
            longest = longest.max(began.elapsed());
        }
        assert!(
            longest < Duration::from_secs(5),
            "the session of the one before is waited for: {longest:?}"
        );
    });
}

/// There may be more members than partitions: those that get none have joined all the same.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group of real members")]
fn a_member_without_partitions_leaves_at_once() {
    run(async {
        for new_protocol in [false, true] {
            let fixture = Fixture::new();
            let mut options = fixture.options().with_partitions(1);
            options.new_group_protocol = new_protocol;
            let transport = transport_with(options).unwrap();
            publish(&transport, &[fixture.message(None, "x")]).await;
            let (mut first, _settling) = join(&transport, &fixture.subscription()).await;
            assert_eq!(take(&mut first, 1, SOON).await.len(), 1);
            let (second, settling) = join(&transport, &fixture.subscription()).await;
            tokio::time::sleep(Duration::from_secs(3)).await;
            let began = Instant::now();
            settling.close(SOON).await.unwrap();
            println!("left after {:?}", began.elapsed());
            assert!(began.elapsed() < Duration::from_secs(4), "{:?}", began.elapsed());
            drop(second);
        }
    });
}

/// The memory of this process, in MiB.
fn memory() -> usize {
    let status = std::fs::read_to_string("/proc/self/status").unwrap();
    let line = status.lines().find(|line| line.starts_with("VmRSS:")).unwrap();
    line.split_whitespace().nth(1).unwrap().parse::<usize>().unwrap() / 1024
}

/// What a member has fetched ahead of its handlers is bounded by bytes, however many partitions it has.
#[test]
#[cfg(target_os = "linux")]
fn a_member_that_takes_nothing_holds_little() {
    run_within(Duration::from_secs(120), async {
        let fixture = Fixture::new();
        let options = fixture.options().with_partitions(48).with_fetch_memory(32 << 20);
        let transport = transport_with(options).unwrap();
        // 240 MB.
        for _ in 0..10 {
            let large = (0..30).map(|n| fixture.message(Some(&format!("k{n}")), &"x".repeat(800_000)));
            publish(&transport, &large.collect::<Vec<_>>()).await;
        }
        let before = memory();
        let subscription = fixture.subscription().with_max_in_flight(1);
        let (mut intake, settling) = join(&transport, &subscription).await;
        let got = take(&mut intake, 1, SOON).await;
        assert_eq!(got.len(), 1);
        let mut most = 0;
        for _ in 0..50 {
            tokio::time::sleep(Duration::from_millis(100)).await;
            most = most.max(memory().saturating_sub(before));
        }
        println!("{most} MiB of 240 MB lie ready, where 32 MiB may");
        assert!(most < 110, "{most} MiB");
        settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
    });
}

/// A member that the group does not take, since the others speak another protocol, says so: it does not look healthy.
#[test]
#[cfg_attr(feature = "mock", ignore = "the mock cluster takes any protocol")]
fn a_member_of_another_protocol_is_told() {
    run(async {
        let fixture = Fixture::new();
        publish(&fixture.transport(), &[fixture.message(None, "declares")]).await;
        let plain: StreamConsumer = ClientConfig::new()
            .set("bootstrap.servers", &fixture.brokers)
            .set("group.id", fixture.subscription().group.as_str())
            .set("partition.assignment.strategy", "range")
            .set("auto.offset.reset", "earliest")
            .create()
            .unwrap();
        plain.subscribe(&[fixture.topic().as_str()]).unwrap();
        plain.recv().await.unwrap();
        let polling = tokio::spawn(async move {
            loop {
                let _ = plain.recv().await;
            }
        });
        let (mut intake, _settling) = join(&fixture.transport(), &fixture.subscription()).await;
        let until = Instant::now() + Duration::from_secs(30);
        let error = loop {
            match tokio::time::timeout(Duration::from_secs(30), intake.next(10)).await {
                Ok(Err(error)) => break error,
                Ok(Ok(_)) => assert!(Instant::now() < until, "it was taken in"),
                Err(_) => panic!("it hears nothing"),
            }
        };
        assert_eq!(error.kind(), ErrorKind::Config, "{error:?}");
        assert!(error.to_string().contains("protocol"), "{error}");
        // While it lasts it is told again, sooner than core takes it to be over.
        let again = tokio::time::timeout(Duration::from_secs(20), intake.next(10)).await;
        assert!(again.expect("it is told again").is_err());
        polling.abort();
    });
}

/// A group that begins with the latest passes over what was there before, and nothing after it has joined.
#[test]
#[cfg_attr(feature = "mock", ignore = "it takes a real group")]
fn a_group_may_begin_with_what_comes() {
    run(async {
        let fixture = Fixture::new();
        publish(&fixture.transport(), &[fixture.message(Some("k"), "before")]).await;
        let transport = transport_with(fixture.options().with_start(Start::Latest)).unwrap();
        let (mut intake, settling) = join(&transport, &fixture.subscription()).await;
        // Until it has its partitions it has not begun.
        assert!(take(&mut intake, 1, Duration::from_secs(8)).await.is_empty());
        publish(&transport, &[fixture.message(Some("k"), "after")]).await;
        let got = take(&mut intake, 1, SOON).await;
        assert_eq!(got.iter().map(text).collect::<Vec<_>>(), ["after"]);
        settling.settle(got.into_iter().map(Delivery::ack).collect()).await;
    });
}
