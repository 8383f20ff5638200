//! Handlers that block or compute, on a runtime with several threads.

use crate::OrderPlaced;
use crate::placed;
use postrider_core::{
    Bus, ErrorKind,
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
    Bus::builder()
        .log(MemoryLog::new())
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
