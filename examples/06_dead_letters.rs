//! Dead letters: what could not be handled is kept with its errors, to be looked at, redriven or discarded by a person.
//! The same for inboxes and the outbox, whatever the database and the broker.
//!
//! ```text
//! cargo run --example 06_dead_letters
//! ```

#![allow(clippy::print_stdout)]

use postrider::{
    Bus, Event, GroupName, HandlerError, Mailbox, Message, Retry, Topic, log::Pace, memory::MemoryTransport,
    relay::Backoff, sqlite::SqliteLog,
};
use std::{
    num::NonZeroU32,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    time::Duration,
};

#[derive(serde::Serialize, serde::Deserialize, Event)]
#[event(name = "parcel.sent", topic = "parcels", key = "to")]
struct ParcelSent {
    to: String,
}

#[tokio::main]
async fn main() -> anyhow::Result<()> {
    let dir = tempfile::tempdir()?;
    let log = SqliteLog::open(dir.path().join("post.db")).await?;
    let bus = Bus::builder()
        .log(log)
        .transport(MemoryTransport::new())
        .source("post")
        .build()?;
    let is_fixed = Arc::new(AtomicBool::new(false));
    let running = bus
        .subscribe::<ParcelSent>("labels")
        .retry(
            Retry::default()
                .with_max_attempts(3)
                .with_backoff(Backoff::Fixed(Duration::from_millis(50))),
        )
        .state(Arc::new((is_fixed.clone(),)))
        .handler(async |(is_fixed,), parcel, _| match &*parcel.to {
            "Nowhere" => Err(HandlerError::permanent("there is no such place")),
            "Åmål" if !is_fixed.load(Ordering::SeqCst) => Err("the printer knows no Å")?,
            _ => Ok(()),
        })
        .start()
        .await?;
    bus.start().await?;
    for to in ["Rome", "Nowhere", "Åmål", "Åmål", "Oslo"] {
        bus.publish(&ParcelSent { to: to.to_owned() }).await?;
    }
    bus.publish(Message::new(Topic::new("parcels"), "parcel.sent.v1", vec![0xff, 0x00]))
        .await?;
    while running.report().dead_lettered < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }

    let letters = bus.dead_letters(Mailbox::Inbox(GroupName::new("labels")))?;
    println!("{} dead letters:", letters.count().await?);
    for letter in letters.list(None, 100).await?.entries {
        println!(
            "\n   {} {:?}, after {} attempts",
            letter.message.id(),
            letter.message.key(),
            letter.attempts
        );
        println!("   payload {:?}", String::from_utf8_lossy(letter.message.payload()));
        for error in &letter.errors {
            println!(
                "   {}  attempt {}: {}",
                error.at.format("%H:%M:%S%.3f"),
                error.attempt,
                error.text
            );
        }
    }

    println!("\nThe printer is mended: those for Åmål are redriven, not more than 5 a second.");
    is_fixed.store(true, Ordering::SeqCst);
    let to_redrive = letters.clone().only(|filter| filter.with_key("Åmål"));
    println!("   it would redrive {}", to_redrive.count().await?);
    let pace = Pace::PerSecond(NonZeroU32::new(5).unwrap_or(NonZeroU32::MIN));
    println!("   redriven {}", to_redrive.redrive(pace).await?);
    while running.report().handled < 4 {
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    println!("   handled");
    println!("\nThe others are beyond help: {} discarded.", letters.discard().await?);
    println!("Left: {}", letters.count().await?);
    bus.shutdown(Duration::from_secs(5)).await?;
    Ok(())
}
