//! A member of a group: its connection, and which queues it has.
//!
//! A partition is handed over by finishing what is out of it, asking the broker something behind the last acknowledgement,
//! closing its channel, and only then giving its lease back.

use super::{
    Shared,
    bindings::{self, Canary},
    hold::Hold,
    leases::Leases,
};
use crate::{
    connection::{Connection, failed, is_reply, within},
    topology::{Declaring, partition_queue},
};
use async_trait::async_trait;
use futures_util::{Stream, StreamExt as _};
use lapin::{
    Event,
    options::{BasicConsumeOptions, BasicQosOptions, QueueDeleteOptions},
    types::FieldTable,
};
use postrider_core::{
    Error, ErrorKind, Message, Result,
    partition::{self, Hold as _, fair_share},
};
use rustc_hash::FxHashMap;
use std::{
    pin::Pin,
    sync::{Arc, Mutex, MutexGuard, PoisonError},
    time::{Duration, Instant},
};
use tokio::task::JoinHandle;

/// Between tries to connect.
const SHORTEST_PAUSE: Duration = Duration::from_millis(100);
const LONGEST_PAUSE: Duration = Duration::from_secs(5);
/// How long an acknowledgement waits for others.
const ACKNOWLEDGE_AFTER: Duration = Duration::from_millis(3);
/// Between tries of a partition that cannot be consumed.
const TRIED_AGAIN_AFTER: Duration = Duration::from_secs(5);
/// Between two looks at how many messages wait.
const LAG_EVERY: Duration = Duration::from_secs(5);
/// Between looks at queues that may have been deleted, where nothing else is looked at.
const LOOK_EVERY: Duration = Duration::from_secs(1);

pub(super) struct Member {
    connection: Arc<Connection>,
    /// In a lock that is never taken, for it may be sent but not shared.
    events: Mutex<Pin<Box<dyn Stream<Item = Event> + Send>>>,
    /// Of a group whose members share its partitions.
    leases: Option<Leases>,
    balanced_at: Instant,
    /// `None` where the bindings are not watched.
    canary: Option<Canary>,
    /// Whether they still are.
    asking: Option<JoinHandle<Option<bool>>>,
    watched_at: Instant,
    /// When it was last looked how much waits in its queues.
    counted_at: Option<Instant>,
    counting: Option<JoinHandle<()>>,
}

/// Has members of one feed one after another, until the feed is closed.
pub(super) async fn run(shared: &Shared, first: Member) {
    let mut member = Some(first);
    let mut pause = SHORTEST_PAUSE;
    while !shared.membership.is_closing() || member.is_some() {
        if let Some(mut member) = member.take() {
            pause = SHORTEST_PAUSE;
            if member.serve(shared).await {
                return;
            }
            tracing::warn!(group = %shared.subscription.group, "the connection to RabbitMQ is lost: it is tried again");
            shared.membership.lose_all();
            if shared.membership.is_closing() {
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
                shared.membership.lose_all();
                shared.membership.tell(Err(error));
            }
        }
        tokio::select! {
            () = tokio::time::sleep(pause) => pause = (pause * 2).min(LONGEST_PAUSE),
            () = shared.membership.work() => {}
        }
    }
}

impl Shared {
    fn broken(&self) -> MutexGuard<'_, FxHashMap<usize, Instant>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
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
            shared.membership.lose_all();
        }
    }

    pub(super) async fn join(shared: &Shared) -> Result<Self> {
        let group = &shared.subscription.group;
        let connection = Arc::new(shared.broker.connect(&format!("group {group}")).await?);
        has_channels(&connection, shared)?;
        let events = Mutex::new(Box::pin(connection.events_listener()) as Pin<Box<_>>);
        let mut member = Self {
            connection,
            events,
            leases: None,
            balanced_at: Instant::now(),
            canary: None,
            asking: None,
            watched_at: Instant::now(),
            counted_at: None,
            counting: None,
        };
        let declaring = Declaring::on(&member.connection, &shared.broker).await?;
        declaring.exchange().await?;
        match shared.subscription.broadcast {
            true => declaring.broadcast(&shared.queue, &shared.subscription).await?,
            false => declaring.group(&member.connection, &shared.subscription).await?,
        }
        let joining = async {
            declaring.end().await?;
            if shared.is_shared() {
                member.leases =
                    Some(Leases::join(&member.connection, group, shared.broker.options().partitions).await?);
                member.balance(shared).await
            } else {
                open(&member.connection, shared, shared.queue.clone(), None, Vec::new()).await
            }
        };
        shared.broker.in_time("joining the group", joining).await?;
        member.watch(shared).await;
        Ok(member)
    }

    /// Works until the connection is lost, which is `false`, or the feed ends.
    async fn serve(&mut self, shared: &Shared) -> bool {
        let interval = shared.broker.options().balance_interval;
        loop {
            if shared.membership.is_closing() {
                self.leave(shared).await;
                return true;
            }
            let holds = shared.membership.holds();
            for hold in holds.iter().filter(|hold| hold.has_acked()) {
                // Where it fails, the connection is lost, or the channel, which is mended.
                let _ = hold.acknowledge().await;
            }
            self.count_what_waits(shared, &holds);
            let looks = holds.iter().any(|hold| hold.is_leaving() || !hold.is_connected());
            let balances = self.leases.is_some() && self.balanced_at.elapsed() >= interval;
            if let Err(error) = self.look_at_bindings(shared).await {
                tracing::warn!(group = %shared.subscription.group, error = error.to_chain(), "the bindings cannot be made again: the member begins anew");
                return false;
            }
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
            let drips = shared.membership.holds().iter().any(|hold| hold.has_much());
            let next = if drips {
                ACKNOWLEDGE_AFTER
            } else if self.leases.is_some() {
                interval.saturating_sub(self.balanced_at.elapsed())
            } else {
                LOOK_EVERY
            };
            let events = self.events.get_mut().unwrap_or_else(PoisonError::into_inner);
            tokio::select! {
                event = events.next() => match event {
                    None => return false,
                    Some(Event::Error(_)) if !self.connection.status().connected() => return false,
                    Some(Event::Error(why)) if is_consumer_timeout(&why) => {
                        let group = &shared.subscription.group;
                        tracing::warn!(%group, error = %why, "the broker has taken messages back that were not settled within its `consumer_timeout`: they come again, even if they are still being handled. Raise that time-out, or have fewer messages lie ready (`with_prefetch`)");
                    }
                    Some(_) => {}
                },
                // What is settled meanwhile is acknowledged with it.
                () = shared.membership.work() => tokio::time::sleep(ACKNOWLEDGE_AFTER).await,
                () = tokio::time::sleep(next) => {}
            }
        }
    }

    /// Counts the messages in this member's queues every [`LAG_EVERY`]. A task of its own does it, because a queue that does not
    /// answer must not delay the acknowledgements of the others.
    fn count_what_waits(&mut self, shared: &Shared, holds: &[Arc<Hold>]) {
        let is_due = self.counted_at.is_none_or(|at| at.elapsed() >= LAG_EVERY);
        if !is_due || self.counting.as_ref().is_some_and(|counting| !counting.is_finished()) {
            return;
        }
        self.counted_at = Some(Instant::now());
        let mut holds = holds.to_vec();
        holds.retain(|hold| hold.is_connected());
        let (broker, lag) = (shared.broker.clone(), shared.membership.lag().clone());
        self.counting = Some(tokio::spawn(async move {
            let counted = broker.in_time("counting messages", async {
                let mut waiting = 0;
                for hold in holds {
                    waiting += u64::from(hold.waiting().await.map_err(failed("counting messages"))?);
                }
                Ok(waiting)
            });
            match counted.await {
                Ok(waiting) => lag.set(waiting),
                Err(_) => lag.forget(),
            }
        }));
    }

    /// Begins to watch the bindings: those that are ours, of an exchange of which nobody else gets what is sent to find out.
    async fn watch(&mut self, shared: &Shared) {
        let options = shared.broker.options();
        if !options.declares || options.wildcards || shared.broker.queue().bind.is_some() {
            return;
        }
        let making = shared.broker.in_time(
            "watching the bindings",
            Canary::new(&self.connection, shared.publisher.clone(), &options.exchange),
        );
        match making.await {
            Ok(canary) => self.canary = Some(canary),
            Err(error) => {
                tracing::debug!(error = error.to_chain(), "the bindings of the group are not watched");
            }
        }
    }

    /// Binds again what has lost its bindings.
    async fn look_at_bindings(&mut self, shared: &Shared) -> Result<()> {
        // Nobody waits for the answer: a broker that is low on memory gives none.
        let Some(asking) = self.asking.take_if(|asking| asking.is_finished()) else {
            if let Some(canary) = self.canary.clone()
                && self.asking.is_none()
                && self.watched_at.elapsed() >= bindings::EVERY
            {
                self.watched_at = Instant::now();
                self.asking = Some(tokio::spawn(async move { canary.lives().await }));
            }
            return Ok(());
        };
        match asking.await.unwrap_or(Some(true)) {
            Some(true) => return Ok(()),
            Some(false) => {}
            None => {
                self.canary = None;
                return Ok(());
            }
        }
        let (group, exchange) = (&shared.subscription.group, &shared.broker.options().exchange);
        tracing::warn!(%group, exchange, "the bindings of the group are gone: the exchange was deleted, and declared anew; they are made again, but what was published meanwhile did not reach the group");
        let declaring = Declaring::on(&self.connection, &shared.broker).await?;
        declaring.exchange().await?;
        match shared.subscription.broadcast {
            true => declaring.broadcast(&shared.queue, &shared.subscription).await?,
            false => declaring.group(&self.connection, &shared.subscription).await?,
        }
        declaring.end().await?;
        self.watch(shared).await;
        Ok(())
    }

    /// Hands over, or begins anew, what has nothing out any more.
    async fn mend(&mut self, shared: &Shared) -> Result<()> {
        let mut leaving = shared.membership.holds();
        leaving.retain(|hold| hold.is_leaving() || !hold.is_connected());
        for hold in leaving {
            let mut settled = Vec::new();
            let mut keeps = true;
            if !hold.is_connected() {
                // The queue was deleted, or the broker has ended the channel.
                shared.membership.remove(hold.assignment());
                shared.membership.lose(&hold);
            } else if hold.is_idle() {
                keeps = !hold.is_given_up() && (hold.partition.is_none() || self.keeps(shared).await?);
                settled = hold.end().await.map_err(failed("handing over a queue"))?;
                shared.membership.remove(hold.assignment());
            } else {
                continue;
            }
            match (hold.partition, &mut self.leases) {
                (Some(partition), Some(leases)) if !keeps => leases.free(partition).await?,
                (partition, _) => open(&self.connection, shared, hold.queue.clone(), partition, settled).await?,
            }
        }
        Ok(())
    }

    /// Whether all partitions that it has are its part.
    async fn keeps(&self, shared: &Shared) -> Result<bool> {
        let Some(leases) = &self.leases else { return Ok(true) };
        let (_, most) = fair_share(shared.broker.options().partitions, leases.members().await?);
        Ok(shared.membership.holds().len() <= most)
    }

    /// Gives up what is more than its part, and takes what is free of it.
    async fn balance(&mut self, shared: &Shared) -> Result<()> {
        let Some(leases) = &mut self.leases else { return Ok(()) };
        if leases.has_lost_a_mark() {
            let text = "the broker has ended what makes this one a member of its group";
            return Err(Error::new(ErrorKind::Unavailable, text));
        }
        let mut staying = shared.membership.holds();
        let held: Vec<usize> = staying.iter().filter_map(|hold| hold.partition).collect();
        staying.retain(|hold| !hold.is_leaving());
        let (partitions, first) = (shared.broker.options().partitions, leases.first);
        let mut taking = Taking {
            connection: &self.connection,
            leases,
            shared,
        };
        let too_many = partition::balance(&mut taking, partitions, first, &held, staying.len()).await?;
        for hold in staying.iter().take(too_many) {
            hold.give_up();
            shared.membership.revoke(hold);
        }
        Ok(())
    }

    /// Ends in order: what was acknowledged has arrived, everything else goes back to its place.
    async fn leave(&mut self, shared: &Shared) {
        let holds = shared.membership.take();
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
                let deleted = channel.queue_delete(shared.queue.as_str().into(), QueueDeleteOptions::default());
                deleted.await.map_err(failed("deleting a queue"))?;
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

/// How many channels a member has beside those of its partitions: for declaring, for its leases, and for the bindings' watch.
const OTHER_CHANNELS: usize = 4;

/// Whether one connection may have as many channels as a member that has every partition.
fn has_channels(connection: &Connection, shared: &Shared) -> Result<()> {
    let partitions = if shared.is_shared() {
        shared.broker.options().partitions
    } else {
        1
    };
    let (wanted, granted) = (
        partitions + OTHER_CHANNELS,
        usize::from(connection.configuration().channel_max()),
    );
    // No limit is told by nothing.
    if granted == 0 || wanted <= granted {
        return Ok(());
    }
    let text = "RabbitMQ permits a connection fewer channels than the group needs, one for each partition: raise the broker's \
        `channel_max`, or have fewer partitions";
    Err(Error::new(ErrorKind::Config, text)
        .with("group", &shared.subscription.group)
        .with("channel_max", granted)
        .with("needed", wanted))
}

/// Whether the broker has closed a channel because what it handed out was not settled for too long.
fn is_consumer_timeout(why: &lapin::Error) -> bool {
    is_reply(why, 406) && why.to_string().contains("delivery acknowledgement")
}

/// Begins to consume a queue. One that cannot be consumed is passed over for a while.
async fn open(
    connection: &Connection,
    shared: &Shared,
    queue: String,
    partition: Option<usize>,
    settled_before: Vec<Message>,
) -> Result<()> {
    let opening = async {
        let opened = Hold::open(connection, shared, queue, partition, settled_before).await;
        opened.map_err(failed("consuming a queue"))
    };
    let opened = within(shared.broker.options().timeout / 2, "consuming a queue", opening).await;
    if let (Some(partition), Err(_)) = (partition, &opened) {
        shared.broken().insert(partition, Instant::now());
    }
    shared.membership.add(Arc::new(opened?));
    Ok(())
}

/// What it takes to take a partition.
struct Taking<'a> {
    connection: &'a Connection,
    leases: &'a mut Leases,
    shared: &'a Shared,
}

#[async_trait]
impl partition::Leases for Taking<'_> {
    async fn members(&mut self) -> Result<usize> {
        self.leases.members().await
    }

    async fn is_any_short(&mut self) -> Result<bool> {
        self.leases.is_any_short().await
    }

    async fn say_short(&mut self, is_short: bool) -> Result<()> {
        self.leases.say_short(is_short).await
    }

    async fn take(&mut self, partition: usize) -> Result<bool> {
        let shared = self.shared;
        let broken = shared.broken().get(&partition).map(Instant::elapsed);
        if broken.is_some_and(|since| since < TRIED_AGAIN_AFTER) || !self.leases.take(partition).await? {
            return Ok(false);
        }
        let queue = partition_queue(&shared.subscription.group, partition);
        if broken.is_some() && !is_sound(shared, &queue).await {
            shared.broken().insert(partition, Instant::now());
            self.leases.free(partition).await?;
            return Ok(false);
        }
        shared.broken().remove(&partition);
        open(self.connection, shared, queue, Some(partition), Vec::new()).await?;
        Ok(true)
    }
}

/// Whether a queue can be consumed, tried on a connection of its own: where it cannot, the broker ends the connection. What
/// it hands out meanwhile goes back to its place, for it is as much as any member takes.
async fn is_sound(shared: &Shared, queue: &str) -> bool {
    let trying = async {
        let connection = shared.broker.connect("trying a queue").await?;
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
        tried.await.map_err(failed("trying a queue"))
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
