//! No value of a payload is in a log line, or in the errors stored with a dead letter.

use crate::{
    Diary, OrderPlaced, dead,
    world::{World, logs::Logs, options, secs},
};
use postrider_core::{Event as _, Message, Transactional, consumer::Batch};

/// Payloads that do not decode, each with a value that nobody else may see.
const UNREADABLE: [&str; 6] = [
    r#"{"id": "4111111111111111", "customer": "ada"}"#,
    r#"{"id": 4111111111111111, "customer": "ada"}"#,
    r#"{"id": 1, "customer": 4111111111111111}"#,
    r#"{"id": 1, "customer": ["4111111111111111"]}"#,
    r#"{"id": 1, "customer": "4111111111111111"#,
    r#"["4111111111111111"]"#,
];

#[tokio::test]
async fn what_does_not_decode_is_told_without_its_values() {
    let logs = Logs::capture();
    let world = World::start(options()).await;
    let diary = Diary::default();
    let subscribing = |group| world.bus.subscribe::<OrderPlaced>(group);
    let mut running = Vec::new();
    for (group, durable) in [("plain", false), ("durable", true)] {
        let subscribing = subscribing(group);
        let subscribing = if durable { subscribing.durable() } else { subscribing };
        running.push(
            subscribing
                .state(diary.clone())
                .handler(Diary::reserve)
                .start()
                .await
                .unwrap(),
        );
    }
    let together = subscribing("together").middleware(Transactional::batch(std::num::NonZeroUsize::new(9).unwrap()));
    running.push(
        together
            .state(diary.clone())
            .handler(Diary::reserve)
            .start()
            .await
            .unwrap(),
    );
    let batches = subscribing("batches").batch_handler(Batch::default(), async |orders, _| {
        orders.iter().map(|_| Ok(())).collect()
    });
    running.push(batches.start().await.unwrap());
    for payload in UNREADABLE {
        let message = Message::new(OrderPlaced::TOPIC, OrderPlaced::kind(), payload);
        world.bus.publish(message).await.unwrap();
    }
    world.pass(secs(5)).await;
    let all = |n| running.iter().all(|running| running.report().dead_lettered == n);
    world.until(|_| all(UNREADABLE.len() as u64)).await;
    for group in ["plain", "durable", "together", "batches"] {
        for letter in dead(&world, group).await {
            let text = format!("{:?}", letter.errors);
            assert!(
                text.contains("does not decode") && text.contains(" at line 1 column "),
                "{text}"
            );
            assert!(!text.contains("4111"), "{group}: {text}");
        }
    }
    let lines = logs.lines();
    assert!(lines.iter().any(|line| line.contains("dead letter")), "{lines:#?}");
    let quoting: Vec<_> = lines.iter().filter(|line| line.contains("4111")).collect();
    assert!(quoting.is_empty(), "{quoting:#?}");
    assert!(diary.lines().is_empty());
}
