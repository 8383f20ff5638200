//! The consumer, on the memory log and transport and a clock that only moves when told.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

mod barrier;
mod batches;
mod chains;
mod control;
mod durable;
mod holding;
mod inbox;
mod members;
mod middleware;
mod never;
mod outages;
mod policies;
mod privacy;
mod threads;
mod transactional;
mod visible;
#[path = "../world/mod.rs"]
mod world;

use postrider_core::{
    Context, Event, GroupName, HandlerResult, Mailbox,
    log::{Filter, Page, RecordState, Stats, Stored},
};
use serde::{Deserialize, Serialize};
use std::sync::{Arc, Mutex};
use world::World;

#[derive(Debug, Clone, Serialize, Deserialize, Event)]
#[event(
    crate = "postrider_core",
    name = "order.placed",
    topic = "orders",
    version = 2,
    key = "customer"
)]
pub(crate) struct OrderPlaced {
    pub(crate) id: u32,
    pub(crate) customer: String,
}

#[derive(Debug, Serialize, Deserialize, Event)]
#[event(crate = "postrider_core", name = "order.paid", topic = "orders", key = |e: &Self| e.order % 3)]
pub(crate) struct OrderPaid {
    pub(crate) order: u32,
}

pub(crate) fn placed(id: u32, customer: &str) -> OrderPlaced {
    OrderPlaced {
        id,
        customer: customer.to_owned(),
    }
}

/// What handlers did, in order.
#[derive(Debug, Default, Clone)]
pub(crate) struct Diary(pub(crate) Arc<Mutex<Vec<String>>>);

impl Diary {
    pub(crate) fn note(&self, line: impl Into<String>) {
        self.0.lock().unwrap().push(line.into());
    }
    pub(crate) fn did(&self, line: impl Into<String>) -> HandlerResult {
        self.note(line);
        Ok(())
    }
    pub(crate) fn lines(&self) -> Vec<String> {
        self.0.lock().unwrap().clone()
    }
    pub(crate) fn count(&self, line: &str) -> usize {
        self.lines().iter().filter(|l| *l == line).count()
    }
    pub(crate) async fn reserve(&self, order: &OrderPlaced, _: &mut Context) -> HandlerResult {
        self.note(format!("reserve {}", order.id));
        Ok(())
    }
    pub(crate) async fn release(&self, order: &OrderPlaced, _: &mut Context) -> HandlerResult {
        self.note(format!("release {}", order.id));
        Ok(())
    }
    pub(crate) async fn paid(&self, paid: &OrderPaid, ctx: &mut Context) -> HandlerResult {
        self.note(format!("paid {} in {}", paid.order, ctx.group()));
        Ok(())
    }
}

/// The dead letters of a group.
pub(crate) async fn dead(world: &World, group: &'static str) -> Vec<Stored> {
    let admin = world.bus.log().unwrap().admin().unwrap();
    let inbox = Filter::of(Mailbox::Inbox(GroupName::new(group))).with_state(RecordState::Failed);
    admin.list(&inbox, &Page::default()).await.unwrap().entries
}

/// What waits in a group's inbox.
pub(crate) async fn pending(world: &World, group: &'static str) -> Vec<Stored> {
    let admin = world.bus.log().unwrap().admin().unwrap();
    let inbox = Filter::of(Mailbox::Inbox(GroupName::new(group))).with_state(RecordState::Pending);
    admin.list(&inbox, &Page::default()).await.unwrap().entries
}

/// The numbers of a group's inbox.
pub(crate) async fn waiting(world: &World, group: &'static str) -> Stats {
    let stats = world.bus.log().unwrap().admin().unwrap().stats().await.unwrap();
    stats
        .get(&Mailbox::Inbox(GroupName::new(group)))
        .copied()
        .unwrap_or_default()
}
