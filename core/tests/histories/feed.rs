//! A group as its member reaches it: its place is taken away while handlers run, outcomes get lost on the way, and the broker
//! notices a death late.

use crate::{process::Reach, process::away, world::short};
use async_trait::async_trait;
use postrider_core::{
    Assignment, Deliveries, DeliveryTag, Disposition, ErrorKind, Feed, Incoming, Result, Settler, Subscriber,
    Subscription,
};
use std::{
    collections::BTreeMap,
    sync::{Arc, Mutex, MutexGuard},
    time::Duration,
};
use tokio::sync::Notify;

#[derive(Debug)]
pub(crate) struct FaultySubscriber {
    inner: Arc<dyn Subscriber>,
    reach: Reach,
}

impl FaultySubscriber {
    pub(crate) fn new(inner: Arc<dyn Subscriber>, reach: &Reach) -> Self {
        let reach = reach.clone();
        Self { inner, reach }
    }
}

#[async_trait]
impl Subscriber for FaultySubscriber {
    async fn declare(&self, subscription: &Subscription) -> Result<()> {
        self.inner.declare(subscription).await
    }
    async fn subscribe(&self, subscription: &Subscription) -> Result<Feed> {
        self.reach.life.pass().await?;
        let (inner, settler) = self.inner.subscribe(subscription).await?.into_parts();
        let seat = Arc::new(Seat {
            state: Mutex::new(State {
                settler,
                assignment: 1,
                outstanding: BTreeMap::new(),
                is_evicted: false,
                is_closed: false,
            }),
            changed: Notify::new(),
        });
        self.reach.seats.lock().unwrap().push(seat.clone());
        let deliveries = FaultyDeliveries {
            subscriber: self.inner.clone(),
            subscription: subscription.clone(),
            inner: Some(inner),
            seat: seat.clone(),
            reach: self.reach.clone(),
        };
        let reach = self.reach.clone();
        Ok(Feed::new(deliveries, FaultySettler { seat, reach }))
    }
}

/// A member's place in a group.
#[derive(Debug)]
pub(crate) struct Seat {
    state: Mutex<State>,
    changed: Notify,
}

#[derive(Debug)]
struct State {
    settler: Arc<dyn Settler>,
    assignment: u64,
    /// What is to be settled, with whom.
    outstanding: BTreeMap<DeliveryTag, Arc<dyn Settler>>,
    is_evicted: bool,
    is_closed: bool,
}

impl Seat {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap()
    }

    /// The member loses its place, and others get what it has at once.
    pub(crate) async fn evict(&self) {
        let settler = {
            let mut state = self.state();
            if state.is_closed || state.is_evicted {
                return;
            }
            state.is_evicted = true;
            state.settler.clone()
        };
        let _ = settler.close(Duration::ZERO).await;
    }
}

#[derive(Debug)]
struct FaultyDeliveries {
    subscriber: Arc<dyn Subscriber>,
    subscription: Subscription,
    inner: Option<Box<dyn Deliveries>>,
    seat: Arc<Seat>,
    reach: Reach,
}

#[async_trait]
impl Deliveries for FaultyDeliveries {
    async fn next(&mut self, max: usize) -> Result<Incoming> {
        self.reach.life.pass().await?;
        let rates = self.reach.world.rates();
        if self.reach.world.fault(|dice| dice.chance(rates.receives)) {
            return Err(away());
        }
        loop {
            let Some(inner) = &mut self.inner else {
                // A process takes a place again only when nothing of its last one is in hand.
                let mut changed = std::pin::pin!(self.seat.changed.notified());
                changed.as_mut().enable();
                if !self.seat.state().outstanding.is_empty() {
                    changed.await;
                    continue;
                }
                let (deliveries, settler) = self.subscriber.subscribe(&self.subscription).await?.into_parts();
                let mut state = self.seat.state();
                state.settler = settler;
                state.assignment += 1;
                state.is_evicted = false;
                self.inner = Some(deliveries);
                continue;
            };
            return match inner.next(max).await {
                Ok(Incoming::Batch(mut received)) => {
                    let mut state = self.seat.state();
                    for received in &mut received {
                        received.assignment = Assignment(state.assignment);
                        let settler = state.settler.clone();
                        state.outstanding.insert(received.tag, settler);
                    }
                    drop(state);
                    let ids: Vec<String> = received.iter().map(|r| short(r.message.id())).collect();
                    self.reach
                        .world
                        .note(format_args!("{} receives {}", self.reach.name, ids.join(" ")));
                    Ok(Incoming::Batch(received))
                }
                Err(error) if error.kind() == ErrorKind::Closed && self.seat.state().is_evicted => {
                    self.inner = None;
                    self.reach
                        .world
                        .note(format_args!("{} hears that its place is gone", self.reach.name));
                    Ok(Incoming::Lost(Assignment(self.seat.state().assignment)))
                }
                other => other,
            };
        }
    }
}

#[derive(Debug)]
struct FaultySettler {
    seat: Arc<Seat>,
    reach: Reach,
}

#[async_trait]
impl Settler for FaultySettler {
    async fn settle(&self, batch: &[(DeliveryTag, Disposition)]) -> Vec<Result<()>> {
        let all_fail = || batch.iter().map(|_| Err(away())).collect();
        let world = &self.reach.world;
        if self.reach.life.pass().await.is_err() {
            return all_fail();
        }
        let rates = world.rates();
        let fails = world.fault(|dice| dice.chance(rates.settles).then(|| dice.roll(4)));
        if let Some(way) = fails {
            world.note(format_args!("{} settles in vain: {way}", self.reach.name));
            world.ledger.count("settles of deliveries that failed");
        }
        match fails {
            Some(0) => self.seat.evict().await,
            Some(1) => self.reach.clock.sleep(Duration::from_millis(800)).await,
            _ => {}
        }
        let mut outcomes = Vec::with_capacity(batch.len());
        for (tag, disposition) in batch {
            let settler = self.seat.state().outstanding.remove(tag);
            // What does not get through comes again.
            let said = if fails == Some(2) {
                Disposition::Release
            } else {
                *disposition
            };
            outcomes.push(match settler {
                Some(settler) => settler.settle(&[(*tag, said)]).await.remove(0),
                None => Err(away()),
            });
        }
        self.seat.changed.notify_waiters();
        if self.reach.life.pass().await.is_err() || matches!(fails, Some(0 | 2 | 3)) {
            return all_fail();
        }
        outcomes
    }

    async fn close(&self, deadline: Duration) -> Result<()> {
        self.reach.life.pass().await?;
        let settler = {
            let mut state = self.seat.state();
            state.is_closed = true;
            state.outstanding.clear();
            state.settler.clone()
        };
        settler.close(deadline).await
    }
}

/// The broker finds out some time after the death of a member that it is gone.
impl Drop for FaultySettler {
    fn drop(&mut self) {
        if !self.reach.life.is_over() || tokio::runtime::Handle::try_current().is_err() {
            return;
        }
        let (seat, world) = (self.seat.clone(), self.reach.world.clone());
        self.reach
            .seats
            .lock()
            .unwrap()
            .retain(|other| !Arc::ptr_eq(other, &seat));
        let late = world.fault(|dice| dice.pick(&[0, 0, 1_000, 8_000]));
        tokio::spawn(async move {
            world.pass(Duration::from_millis(late)).await;
            drop(seat);
        });
    }
}
