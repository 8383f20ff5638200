//! Handlers that block or compute, on a runtime with several threads.

use crate::OrderPlaced;
use crate::placed;
use postrider_core::{
    Bus, ErrorKind, EventLog, GroupName, Mailbox,
    log::{Claim, EventLogStore as _, Owner, SessionOptions},
    memory::{MemoryLog, MemoryTransport},
};
use std::{
    sync::{Arc, Barrier, Mutex, mpsc},
    time::{Duration, Instant},
};

async fn until(condition: impl Fn() -> bool) {
    let began = Instant::now();
    while !condition() {
        assert!(began.elapsed() < Duration::from_secs(20), "it does not happen");
        tokio::time::sleep(Duration::from_millis(2)).await;
    }
}

fn bus() -> Bus {
    bus_on(MemoryLog::new())
}

fn bus_on(log: impl Into<EventLog>) -> Bus {
    Bus::builder()
        .log(log)
        .transport(MemoryTransport::new())
        .build()
        .unwrap()
}

/// Two handlers that only end together run at once, though neither ever waits.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn handlers_of_a_group_run_on_several_threads() {
    let bus = bus();
    let barrier = Arc::new(Barrier::new(2));
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .state(barrier)
        .handler(async |barrier: &Barrier, _, _| {
            barrier.wait();
            // Handlers that end quickly are taken several at a time, one behind the other.
            let began = Instant::now();
            while began.elapsed() < Duration::from_millis(1) {
                std::hint::spin_loop();
            }
            Ok(())
        })
        .start()
        .await
        .unwrap();
    bus.start().await.unwrap();
    for id in 0..20 {
        bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    until(|| running.report().handled == 20).await;
    bus.shutdown(Duration::from_secs(5)).await.unwrap();
}

/// A handler that blocks its thread stops neither the others, nor what is settled, nor the stop of its group.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn a_handler_that_blocks_stops_only_its_key() {
    let bus = bus();
    let (go, wait) = mpsc::channel::<()>();
    let running = bus
        .subscribe::<OrderPlaced>("g")
        .state(Mutex::new(wait))
        .handler(async |wait: &Mutex<mpsc::Receiver<()>>, order, _| {
            if order.id == 0 {
                let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(30));
            }
            Ok(())
        })
        .start()
        .await
        .unwrap();
    bus.start().await.unwrap();
    for id in 0..200 {
        bus.publish(&placed(id, &format!("c{id}"))).await.unwrap();
    }
    until(|| running.report().handled == 199).await;
    let began = Instant::now();
    let error = running.stop(Duration::from_millis(200)).await.unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unavailable);
    assert!(began.elapsed() < Duration::from_secs(5), "{:?}", began.elapsed());
    go.send(()).unwrap();
    drop(go);
    bus.shutdown(Duration::from_secs(5)).await.unwrap();
}

/// Nobody gets the inbox while a handler of it, which blocks, may still have its effects.
#[tokio::test(flavor = "multi_thread", worker_threads = 3)]
async fn an_inbox_is_not_handed_over_beside_a_handler_that_blocks() {
    let log = MemoryLog::new();
    let bus = bus_on(log.clone());
    let (go, wait) = mpsc::channel::<()>();
    let (began, has_begun) = mpsc::channel::<()>();
    bus.subscribe::<OrderPlaced>("g")
        .durable()
        .state((Mutex::new(wait), began))
        .handler(
            async |(wait, began): &(Mutex<mpsc::Receiver<()>>, mpsc::Sender<()>), _, _| {
                let _ = began.send(());
                let _ = wait.lock().unwrap().recv_timeout(Duration::from_secs(30));
                Ok(())
            },
        )
        .start()
        .await
        .unwrap();
    bus.start().await.unwrap();
    bus.publish(&placed(1, "c")).await.unwrap();
    until(|| has_begun.try_recv().is_ok()).await;
    let _ = bus.shutdown(Duration::ZERO).await;
    let inbox = Mailbox::Inbox(GroupName::new("g"));
    let next = log.open(&inbox, &SessionOptions::new(Owner::new())).await.unwrap();
    let claimed = next.claim(&Claim::new(10)).await.unwrap();
    assert!(claimed.records.is_empty() && !claimed.lease.is_held(), "{claimed:?}");
    drop(go);
}
