//! A member of a group: its connection, and which queues it has.
//!
//! Of an ordered group each partition has a lease, an exclusive queue, which the broker frees when its connection ends. How
//! many members there are says the number of consumers of the members' queue. A partition is handed over by finishing what
//! is out of it, asking the broker something behind the last acknowledgement, closing its channel, and only then deleting
//! the lease.

use super::{Change, Shared, hold::Hold};
use crate::{
    connection::{close_soon, failed, is_reply, within},
    topology::{Declaring, hungry_queue, lease_queue, members_queue, partition_queue},
};
use futures_util::{Stream, StreamExt as _};
use lapin::{
    Channel, Connection, Consumer, Event,
    options::{BasicCancelOptions, BasicConsumeOptions, BasicQosOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};
use postrider_core::{
    Assignment, Error, MessageId, Result,
    partition::{Hold as _, fair_share},
};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    hash::BuildHasher as _,
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};

/// Between tries to connect.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long an acknowledgement waits for others.
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(3);
/// Between tries of a partition that cannot be consumed.
const TRIED_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Between looks at queues that may have been deleted, where nothing else is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Member {
    connection: Arc<Connection>,
    /// In a lock that is never taken, for it may be sent but not shared.
    events: Mutex<Pin<Box<dyn Stream<Item = Event> + Send>>>,
    /// Of an ordered group: what it asks on, and its mark among the members.
    sharing: Option<Sharing>,
    balanced_at: Instant,
}

struct Sharing {
    control: Channel,
    /// Its channel is its own: a refusal closes it.
    leasing: Option<Channel>,
    _mark: Consumer,
    /// Its mark among those that have less than their part.
    hungry: Option<Consumer>,
    /// Where the search for free partitions begins, so that members do not all try the same first.
    first: usize,
}

/// Has members of one feed one after another, until the feed is closed.
pub(super) async fn run(shared: &Shared, first: Member) {
    let mut member = Some(first);
    let mut pause = SHORTEST_PAUSE;
    while !shared.is_closing() || member.is_some() {
        if let Some(mut member) = member.take() {
            pause = SHORTEST_PAUSE;
            if member.serve(shared).await {
                return;
            }
            tracing::warn!(group = %shared.subscription.group, "the connection to RabbitMQ is lost: it is tried again");
            shared.lose_all();
            if shared.is_closing() {
                return;
            }
        }
        match Member::join(shared).await {
            Ok(joined) => {
                member = Some(joined);
                continue;
            }
            Err(error) => {
                // What it had got by then.
                shared.lose_all();
                shared.tell(Change::Failed(error));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            () = shared.stir.notified() => {}
        }
    }
}

impl Shared {
    fn broken(&self) -> MutexGuard<'_, FxHashMap<usize, Instant>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn lose_all(&self) {
        for hold in self.holds.take() {
            hold.lose();
            self.tell(Change::Lost(hold.assignment()));
        }
    }
}

impl Drop for Member {
    /// Channels that others hold would keep the connection, and with it the leases.
    fn drop(&mut self) {
        close_soon(self.connection.clone());
    }
}

impl Member {
    /// The first time: a partition that cannot be consumed is passed over.
    pub(super) async fn first(shared: &Shared) -> Result<Self> {
        loop {
            let broken = shared.broken().len();
            let joined = Self::join(shared).await;
            if joined.is_ok() || shared.broken().len() == broken {
                return joined;
            }
            shared.lose_all();
        }
    }

    pub(super) async fn join(shared: &Shared) -> Result<Self> {
        let group = &shared.subscription.group;
        let connection = Arc::new(shared.broker.connect(&format!("group {group}")).await?);
        let events = Mutex::new(Box::pin(connection.events_listener()) as Pin<Box<_>>);
        let mut member = Self {
            connection,
            events,
            sharing: None,
            balanced_at: Instant::now(),
        };
        let joining = async {
            let declaring = Declaring::on(&member.connection, &shared.broker).await?;
            declaring.exchange().await?;
            match shared.subscription.broadcast {
                true => declaring.broadcast(&shared.queue, &shared.subscription).await?,
                false => declaring.group(&shared.subscription).await?,
            }
            declaring.end().await?;
            if shared.is_shared() {
                let control = member
                    .connection
                    .create_channel()
                    .await
                    .map_err(failed("opening a channel"))?;
                let options = BasicConsumeOptions::default();
                let mark = control
                    .basic_consume(members_queue(group).into(), "".into(), options, FieldTable::default())
                    .await;
                member.sharing = Some(Sharing {
                    control,
                    leasing: None,
                    _mark: mark.map_err(failed("joining the members of the group"))?,
                    hungry: None,
                    first: usize::try_from(Assignment::fresh().0).unwrap_or(0) + std::process::id() as usize,
                });
                member.balance(shared).await
            } else {
                member
                    .open(shared, shared.queue.clone(), None, FxHashSet::default())
                    .await
            }
        };
        shared.broker.in_time("joining the group", joining).await?;
        Ok(member)
    }

    async fn open(
        &self,
        shared: &Shared,
        queue: String,
        partition: Option<usize>,
        settled_before: FxHashSet<MessageId>,
    ) -> Result<()> {
        let opening = async {
            let opened = Hold::open(&self.connection, shared, queue, partition, settled_before).await;
            opened.map_err(failed("consuming a queue"))
        };
        let opened = within(shared.broker.options().timeout / 2, "consuming a queue", opening).await;
        if let (Some(partition), Err(_)) = (partition, &opened) {
            shared.broken().insert(partition, Instant::now());
        }
        let (hold, consumer) = opened?;
        let hold = Arc::new(hold);
        shared.holds.add(hold.clone());
        shared.tell(Change::Opened(hold, consumer));
        Ok(())
    }

    /// Works until the connection is lost, which is `false`, or the feed ends.
    async fn serve(&mut self, shared: &Shared) -> bool {
        let interval = shared.broker.options().balance_interval;
        loop {
            if shared.is_closing() {
                self.leave(shared).await;
                return true;
            }
            let holds = shared.holds.all();
            for hold in holds.iter().filter(|hold| hold.has_acked()) {
                // Where it fails, the connection is lost, or the channel, which is mended.
                let _ = hold.acknowledge().await;
            }
            let looks = holds.iter().any(|hold| hold.is_leaving() || !hold.is_connected());
            let balances = self.sharing.is_some() && self.balanced_at.elapsed() >= interval;
            let looked = shared.broker.in_time("sharing the partitions", async {
                if looks {
                    self.mend(shared).await?;
                }
                if balances {
                    self.balance(shared).await?;
                    self.balanced_at = Instant::now();
                }
                Ok(())
            });
            if let Err(error) = looked.await {
                if self.connection.status().connected() {
                    tracing::warn!(group = %shared.subscription.group, error = error.to_chain(), "the partitions cannot be shared: the member begins anew");
                }
                return false;
            }
            let drips = shared.holds.all().iter().any(|hold| hold.has_much());
            let next = if drips {
                ACKNOWLEDGE_AFTER
            } else if self.sharing.is_some() {
                interval.saturating_sub(self.balanced_at.elapsed())
            } else {
                LOOK_EVERY
            };
            let events = self.events.get_mut().unwrap_or_else(PoisonError::into_inner);
            tokio::select! {
                event = events.next() => match event {
                    None => return false,
                    // Of a channel too: a partition that somebody else has is one.
                    Some(Event::Error(_)) if !self.connection.status().connected() => return false,
                    Some(_) => {}
                },
                // What is settled meanwhile is acknowledged with it.
                () = shared.stir.notified() => tokio::time::sleep(ACKNOWLEDGE_AFTER).await,
                () = tokio::time::sleep(next) => {}
            }
        }
    }

    /// Hands over, or begins anew, what has nothing out any more.
    async fn mend(&mut self, shared: &Shared) -> Result<()> {
        let mut leaving = shared.holds.all();
        leaving.retain(|hold| hold.is_leaving() || !hold.is_connected());
        for hold in leaving {
            let mut settled = FxHashSet::default();
            let mut keeps = true;
            if !hold.is_connected() {
                // The queue was deleted, or the broker has ended the channel.
                hold.lose();
                shared.holds.remove(hold.assignment());
                shared.tell(Change::Lost(hold.assignment()));
            } else if hold.is_idle() {
                keeps = !hold.is_given_up() && (hold.partition.is_none() || self.keeps(shared).await?);
                settled = hold.end().await.map_err(failed("handing over a queue"))?;
                shared.holds.remove(hold.assignment());
            } else {
                continue;
            }
            match hold.partition {
                Some(partition) if !keeps => self.free(shared, partition).await?,
                partition => self.open(shared, hold.queue.clone(), partition, settled).await?,
            }
        }
        Ok(())
    }

    /// How many partitions are this member's part: the least and the most.
    async fn share(&self, shared: &Shared) -> Result<(usize, usize)> {
        let members = self.consumers(&members_queue(&shared.subscription.group)).await?;
        Ok(fair_share(
            shared.broker.options().partitions,
            usize::try_from(members).unwrap_or(1),
        ))
    }

    /// How many consumers a queue has. Whoever has a partition consumes its queue, so asking for a lease can be spared
    /// those that are taken: each refusal would close a channel, and the client has a number for each only once.
    async fn consumers(&self, queue: &str) -> Result<u32> {
        let Some(sharing) = &self.sharing else { return Ok(0) };
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let found = sharing
            .control
            .queue_declare(queue.into(), passive, FieldTable::default());
        Ok(found.await.map_err(failed("counting consumers"))?.consumer_count())
    }

    /// Whether all partitions that it has are its part.
    async fn keeps(&self, shared: &Shared) -> Result<bool> {
        let (_, most) = self.share(shared).await?;
        Ok(shared.holds.all().len() <= most)
    }

    /// Gives up what is more than its part, and takes what is free of it.
    async fn balance(&mut self, shared: &Shared) -> Result<()> {
        if self.sharing.is_none() {
            return Ok(());
        }
        let group = &shared.subscription.group;
        let (least, most) = self.share(shared).await?;
        let mut staying = shared.holds.all();
        let held: Vec<usize> = staying.iter().filter_map(|hold| hold.partition).collect();
        staying.retain(|hold| !hold.is_leaving());
        let mut keeps = most;
        if least < most && staying.len() == most && self.consumers(&hungry_queue(group)).await? > 0 && coin() {
            keeps = least;
        }
        for hold in staying.iter().skip(keeps) {
            if hold.give_up() {
                shared.tell(Change::Revoked(hold.assignment()));
                shared.stir.notify_one();
            }
        }
        let partitions = shared.broker.options().partitions;
        let mut room = keeps.saturating_sub(held.len());
        let first = self.sharing.as_ref().map_or(0, |sharing| sharing.first);
        for partition in (0..partitions).map(|n| (first + n) % partitions) {
            if room == 0 {
                break;
            }
            let queue = partition_queue(group, partition);
            let broken = shared.broken().get(&partition).map(Instant::elapsed);
            if held.contains(&partition) || broken.is_some_and(|since| since < TRIED_AGAIN_AFTER) {
                continue;
            }
            if self.consumers(&queue).await? > 0 || !self.lease(shared, partition).await? {
                continue;
            }
            if broken.is_some() && !is_sound(shared, &queue).await {
                shared.broken().insert(partition, Instant::now());
                self.free(shared, partition).await?;
                continue;
            }
            shared.broken().remove(&partition);
            room -= 1;
            self.open(shared, queue, Some(partition), FxHashSet::default()).await?;
        }
        self.say_hungry(shared, keeps.saturating_sub(room) < least).await
    }

    /// Says to the others whether it has less than its part.
    async fn say_hungry(&mut self, shared: &Shared, is_hungry: bool) -> Result<()> {
        let Some(sharing) = &mut self.sharing else {
            return Ok(());
        };
        let name = hungry_queue(&shared.subscription.group);
        match sharing.hungry.take() {
            None if is_hungry => {
                let options = BasicConsumeOptions::default();
                let mark = sharing
                    .control
                    .basic_consume(name.into(), "".into(), options, FieldTable::default());
                sharing.hungry = Some(mark.await.map_err(failed("asking for a partition"))?);
            }
            Some(mark) if !is_hungry => {
                let ended = sharing.control.basic_cancel(mark.tag(), BasicCancelOptions::default());
                ended.await.map_err(failed("asking for no partition"))?;
            }
            unchanged => sharing.hungry = unchanged,
        }
        Ok(())
    }

    /// Takes a partition, unless somebody else has it.
    async fn lease(&mut self, shared: &Shared, partition: usize) -> Result<bool> {
        let connection = &self.connection;
        let Some(sharing) = &mut self.sharing else {
            return Ok(false);
        };
        let channel = match sharing.leasing.take() {
            Some(channel) => channel,
            None => connection.create_channel().await.map_err(failed("opening a channel"))?,
        };
        let options = QueueDeclareOptions {
            exclusive: true,
            ..Default::default()
        };
        let name = lease_queue(&shared.subscription.group, partition);
        match channel.queue_declare(name.into(), options, FieldTable::default()).await {
            Ok(_) => {
                sharing.leasing = Some(channel);
                Ok(true)
            }
            // The refusal has closed the channel.
            Err(why) if is_reply(&why, 405) => Ok(false),
            Err(why) => Err(failed("taking a partition")(why)),
        }
    }

    async fn free(&self, shared: &Shared, partition: usize) -> Result<()> {
        let Some(sharing) = &self.sharing else { return Ok(()) };
        let name = lease_queue(&shared.subscription.group, partition);
        delete(&sharing.control, &name)
            .await
            .map_err(failed("handing over a partition"))
    }

    /// Ends in order: what was acknowledged has arrived, everything else goes back to its place.
    async fn leave(&mut self, shared: &Shared) {
        let holds = shared.holds.take();
        let leaving = async {
            for hold in &holds {
                hold.end().await.map_err(failed("handing over a queue"))?;
            }
            if shared.subscription.broadcast {
                let channel = self
                    .connection
                    .create_channel()
                    .await
                    .map_err(failed("opening a channel"))?;
                delete(&channel, &shared.queue)
                    .await
                    .map_err(failed("deleting a queue"))?;
            }
            self.connection
                .close(200, "OK".into())
                .await
                .map_err(failed("closing the connection"))
        };
        if let Err(error) = shared.broker.in_time("leaving the group", leaving).await {
            let error: Error = error;
            tracing::warn!(group = %shared.subscription.group, error = error.to_chain(), "the group was not left in order");
        }
    }
}

/// So that not everyone who may gives one up.
fn coin() -> bool {
    std::hash::RandomState::new().hash_one(()).is_multiple_of(2)
}

/// Whether a queue can be consumed, tried on a connection of its own: where it cannot, the broker ends the connection. What
/// it hands out meanwhile goes back to its place, for it is as much as any member takes.
async fn is_sound(shared: &Shared, queue: &str) -> bool {
    let trying = async {
        let connection = Arc::new(shared.broker.connect("trying a queue").await?);
        let tried = async {
            let channel = connection.create_channel().await?;
            channel.basic_qos(shared.prefetch(), BasicQosOptions::default()).await?;
            let options = BasicConsumeOptions::default();
            let consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
            let consumer = consumer.await?;
            connection.close(200, "OK".into()).await?;
            drop(consumer);
            Ok(())
        };
        let tried = tried.await.map_err(failed("trying a queue"));
        close_soon(connection);
        tried
    };
    let tried = within(shared.broker.options().timeout / 4, "trying a queue", trying).await;
    if let Err(error) = &tried {
        tracing::warn!(
            queue,
            error = error.to_chain(),
            "a queue cannot be consumed: it may have lost its majority"
        );
    }
    tried.is_ok()
}

async fn delete(channel: &Channel, queue: &str) -> lapin::Result<()> {
    let deleted = channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await;
    deleted.map(drop)
}
