//! Who is in an ordered group, and who has which of its partitions.
//!
//! Of each partition there is a lease, an exclusive queue, which the broker frees when its connection ends. How many members there
//! are says the number of consumers of the members' queue, and of another, how many of them have less than their part.

use crate::{
    connection::{failed, is_reply},
    topology::{hungry_queue, lease_queue, members_queue, partition_queue},
};
use lapin::{
    Channel, Connection, Consumer,
    options::{BasicCancelOptions, BasicConsumeOptions, QueueDeclareOptions, QueueDeleteOptions},
    types::FieldTable,
};
use postrider_core::{Assignment, GroupName, Result};
use std::sync::Arc;

/// What a member knows of its group, and the group of it, for as long as its connection lives.
pub(super) struct Leases {
    connection: Arc<Connection>,
    group: GroupName,
    control: Channel,
    /// Its channel is its own: a refusal closes it.
    leasing: Option<Channel>,
    /// Its mark among the members,
    _mark: Consumer,
    /// and among those that have less than their part.
    short: Option<Consumer>,
    /// Where the search for free partitions begins, so that members do not all try the same first.
    pub(super) first: usize,
}

impl Leases {
    /// Makes this a member.
    pub(super) async fn join(connection: &Arc<Connection>, group: &GroupName) -> Result<Self> {
        let control = connection.create_channel().await.map_err(failed("opening a channel"))?;
        let mark = mark(&control, members_queue(group)).await;
        Ok(Self {
            connection: connection.clone(),
            group: group.clone(),
            control,
            leasing: None,
            _mark: mark.map_err(failed("joining the members of the group"))?,
            short: None,
            first: usize::try_from(Assignment::fresh().0).unwrap_or(0) + std::process::id() as usize,
        })
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
        // Whoever has one consumes its queue, so those that are taken need not be asked for: each refusal closes a channel, and
        // the client has a number for each only once.
        if self.consumers(partition_queue(&self.group, partition)).await? > 0 {
            return Ok(false);
        }
        let channel = match self.leasing.take() {
            Some(channel) => channel,
            None => self
                .connection
                .create_channel()
                .await
                .map_err(failed("opening a channel"))?,
        };
        let options = QueueDeclareOptions {
            exclusive: true,
            ..Default::default()
        };
        let name = lease_queue(&self.group, partition);
        match channel.queue_declare(name.into(), options, FieldTable::default()).await {
            Ok(_) => {
                self.leasing = Some(channel);
                Ok(true)
            }
            // The refusal has closed the channel.
            Err(why) if is_reply(&why, 405) => Ok(false),
            Err(why) => Err(failed("taking a partition")(why)),
        }
    }

    /// Gives a partition back.
    pub(super) async fn free(&self, partition: usize) -> Result<()> {
        let name = lease_queue(&self.group, partition);
        let deleted = self.control.queue_delete(name.into(), QueueDeleteOptions::default());
        deleted.await.map(drop).map_err(failed("handing over a partition"))
    }
}

/// Makes this one of a queue's consumers, which is all that says: the queue has no messages.
async fn mark(channel: &Channel, queue: String) -> lapin::Result<Consumer> {
    let options = BasicConsumeOptions::default();
    channel
        .basic_consume(queue.into(), "".into(), options, FieldTable::default())
        .await
}
