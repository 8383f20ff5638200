//! The same program on every broker: orders are placed with their events, carried, and handled in order by customer.

use postrider::{Bus, Context, Event, HandlerResult, Transport, sqlite::SqliteLog};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex},
    time::{Duration, Instant},
};

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "order.placed", topic = "example.orders", key = "customer")]
struct OrderPlaced {
    id: i64,
    customer: String,
}

type Seen = Arc<Mutex<BTreeMap<String, Vec<i64>>>>;

async fn bill(seen: &Seen, order: &OrderPlaced, _: &mut Context) -> HandlerResult {
    println!("billed order {} of {}", order.id, order.customer);
    if let Ok(mut seen) = seen.lock() {
        seen.entry(order.customer.clone()).or_default().push(order.id);
    }
    Ok(())
}

/// Places 20 orders of 4 customers, and waits until all of them are billed.
pub(crate) async fn run(transport: Transport) -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let log = SqliteLog::open(dir.path().join("shop.db")).await?;
    let name = transport.name();
    let bus = Bus::builder().log(log).transport(transport).source("shop").build()?;
    let seen = Seen::default();
    bus.subscribe::<OrderPlaced>("example-billing")
        .state(seen.clone())
        .handler(bill)
        .start()
        .await?;
    bus.start().await?;
    // A broker may still have orders of an earlier run.
    let first = i64::try_from(std::time::UNIX_EPOCH.elapsed()?.as_micros())?;
    for n in 0..20 {
        let customer = format!("customer {}", n % 4);
        bus.publish(&OrderPlaced {
            id: first + n,
            customer,
        })
        .await?;
    }
    let ours = || {
        let mut all = seen.lock().map(|seen| seen.clone()).unwrap_or_default();
        all.values_mut().for_each(|ids| ids.retain(|id| *id >= first));
        all
    };
    let began = Instant::now();
    while ours().values().map(Vec::len).sum::<usize>() < 20 {
        anyhow::ensure!(
            began.elapsed() < Duration::from_secs(60),
            "not every order was billed: {:?}",
            ours()
        );
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    for (customer, ids) in ours() {
        anyhow::ensure!(
            ids.is_sorted(),
            "the orders of {customer} came in another order: {ids:?}"
        );
    }
    println!("20 orders of 4 customers went over {name}, those of each in order");
    bus.shutdown(Duration::from_secs(10)).await?;
    Ok(())
}
