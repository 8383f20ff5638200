//! Who is in an ordered group, and who has which of its partitions.
//!
//! Consumers of queues that get no messages say all of it, and the broker forgets them when their connection ends. Whoever is the only
//! consumer of a partition's lease has it: of two that try at the same time one at least sees the other. How many members there
//! are says the number of consumers of the members' queue, and of another, how many of them have less than their part.

use crate::{
    connection::{Connection, failed},
    topology::{hungry_queue, lease_queue, members_queue},
};
use futures_util::{FutureExt as _, StreamExt as _};
use lapin::{
    Channel, Consumer,
    options::{BasicCancelOptions, BasicConsumeOptions, QueueDeclareOptions},
    types::FieldTable,
};
use postrider_core::{Assignment, GroupName, Result};
use rustc_hash::FxHashMap;

/// What a member knows of its group, and the group of it, for as long as its connection lives.
pub(super) struct Leases {
    group: GroupName,
    partitions: usize,
    control: Channel,
    /// Its marks on the leases of partitions,
    held: FxHashMap<usize, Consumer>,
    /// among the members,
    mark: Consumer,
    /// and among those that have less than their part.
    short: Option<Consumer>,
    /// Where the search for free partitions begins, so that members do not all try the same first.
    pub(super) first: usize,
}

impl Leases {
    /// Makes this a member.
    pub(super) async fn join(connection: &Connection, group: &GroupName, partitions: usize) -> Result<Self> {
        let control = connection.create_channel().await.map_err(failed("opening a channel"))?;
        let mark = mark(&control, members_queue(group)).await;
        Ok(Self {
            group: group.clone(),
            partitions,
            control,
            held: FxHashMap::default(),
            mark: mark.map_err(failed("joining the members of the group"))?,
            short: None,
            first: usize::try_from(Assignment::fresh().0).unwrap_or(0) + std::process::id() as usize,
        })
    }

    /// Whether the broker has ended one of its marks: a queue of them was deleted, or its node was away. The others do not see it any
    /// more then.
    pub(super) fn has_lost_a_mark(&mut self) -> bool {
        let marks = std::iter::once(&mut self.mark).chain(&mut self.short);
        let mut marks = marks.chain(self.held.values_mut());
        // Nothing ever comes out of their queues.
        marks.any(|mark| mark.next().now_or_never().is_some())
    }

    /// How many consumers a queue has.
    async fn consumers(&self, queue: String) -> Result<usize> {
        let passive = QueueDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let found = self.control.queue_declare(queue.into(), passive, FieldTable::default());
        let found = found.await.map_err(failed("counting consumers"))?;
        Ok(usize::try_from(found.consumer_count()).unwrap_or(usize::MAX))
    }

    /// How many members there are.
    pub(super) async fn members(&self) -> Result<usize> {
        self.consumers(members_queue(&self.group)).await
    }

    /// Whether some member has less than its part.
    pub(super) async fn is_any_short(&self) -> Result<bool> {
        Ok(self.consumers(hungry_queue(&self.group)).await? > 0)
    }

    /// Says to the others whether this one has.
    pub(super) async fn say_short(&mut self, is_short: bool) -> Result<()> {
        match self.short.take() {
            None if is_short => {
                let mark = mark(&self.control, hungry_queue(&self.group)).await;
                self.short = Some(mark.map_err(failed("asking for a partition"))?);
            }
            Some(mark) if !is_short => {
                let ended = self.control.basic_cancel(mark.tag(), BasicCancelOptions::default());
                ended.await.map_err(failed("asking for no partition"))?;
            }
            unchanged => self.short = unchanged,
        }
        Ok(())
    }

    /// Takes a partition, unless somebody else has it.
    pub(super) async fn take(&mut self, partition: usize) -> Result<bool> {
        let lease = lease_queue(&self.group, partition, self.partitions);
        if self.consumers(lease.clone()).await? > 0 {
            return Ok(false);
        }
        let mark = mark(&self.control, lease.clone()).await;
        self.held.insert(partition, mark.map_err(failed("taking a partition"))?);
        // Those that tried at the same time all let go, and try again each in its own time.
        let is_alone = self.consumers(lease).await? == 1;
        if !is_alone {
            self.free(partition).await?;
        }
        Ok(is_alone)
    }

    /// Gives a partition back.
    pub(super) async fn free(&mut self, partition: usize) -> Result<()> {
        let Some(mark) = self.held.remove(&partition) else {
            return Ok(());
        };
        let ended = self.control.basic_cancel(mark.tag(), BasicCancelOptions::default());
        ended.await.map_err(failed("handing over a partition"))
    }
}

/// Makes this one of a queue's consumers, which is all that says: the queue has no messages.
async fn mark(channel: &Channel, queue: String) -> lapin::Result<Consumer> {
    let options = BasicConsumeOptions::default();
    channel
        .basic_consume(queue.into(), "".into(), options, FieldTable::default())
        .await
}
