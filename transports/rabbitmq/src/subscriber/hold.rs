use super::Shared;
use crate::{connection, wire::Copied};
use lapin::{
    Channel, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions},
    types::FieldTable,
};
use postrider_core::{Assignment, Disposition, Error, ErrorKind, Message, Result, partition::Prefix};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Waker},
};

/// A queue that this member consumes: a channel, and what is out of it.
#[derive(Debug)]
pub(super) struct Hold {
    pub(super) assignment: Assignment,
    pub(super) queue: String,
    /// Of an ordered group.
    pub(super) partition: Option<usize>,
    channel: Channel,
    /// Kept until the channel is closed: dropped before, it would cancel the consumer, and the next one would begin behind
    /// what is not settled.
    _consumer: Consumer,
    state: Mutex<State>,
}

#[derive(Debug, Default)]
struct State {
    out: Prefix<Out>,
    /// Nothing more is handed out.
    is_leaving: bool,
    is_gone: bool,
}

/// A message that was handed out.
#[derive(Debug)]
pub(super) struct Out {
    pub(super) message: Message,
    pub(super) deliveries: u32,
}

/// What is said of deliveries on the channel, in the order it is said.
type Said = std::pin::Pin<Box<dyn Future<Output = lapin::Result<()>> + Send>>;

impl Hold {
    /// Begins to consume a queue.
    pub(super) async fn open(
        connection: &lapin::Connection,
        shared: &Shared,
        assignment: Assignment,
        queue: String,
        partition: Option<usize>,
    ) -> lapin::Result<(Self, Consumer)> {
        let channel = connection.create_channel().await?;
        channel.basic_qos(shared.prefetch(), BasicQosOptions::default()).await?;
        let name = queue.as_str().into();
        let consumer = channel
            .basic_consume(name, "".into(), BasicConsumeOptions::default(), FieldTable::default())
            .await?;
        let hold = Self {
            assignment,
            queue,
            partition,
            channel,
            _consumer: consumer.clone(),
            state: Mutex::default(),
        };
        Ok((hold, consumer))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a message is handed out. `false` if it must not be any more.
    pub(super) fn hand_out(&self, tag: u64, message: &Message, deliveries: u32) -> bool {
        let mut state = self.state();
        if state.is_leaving {
            return false;
        }
        let message = message.clone();
        state.out.push(tag, Out { message, deliveries });
        true
    }

    /// Hands out nothing more. `false` if it did not before.
    pub(super) fn leave(&self) -> bool {
        !std::mem::replace(&mut self.state().is_leaving, true)
    }

    /// What is settled from now on is in vain.
    pub(super) fn lose(&self) {
        let mut state = self.state();
        state.is_leaving = true;
        state.is_gone = true;
    }

    pub(super) fn is_leaving(&self) -> bool {
        self.state().is_leaving
    }

    /// Whether nothing is out.
    pub(super) fn is_idle(&self) -> bool {
        self.state().out.outstanding() == 0
    }

    pub(super) fn is_connected(&self) -> bool {
        self.channel.status().connected()
    }

    /// A copy of what is out under `tag`, for a retry or as a dead letter.
    pub(super) fn copy(&self, tag: u64, kind: &str, group: &str) -> Option<(Message, Copied)> {
        let state = self.state();
        let Out { message, deliveries } = state.out.get(tag)?;
        let copied = Copied {
            deliveries: *deliveries,
            id: format!("{}:{group}:{kind}:{deliveries}", message.id()),
        };
        Some((message.clone(), copied))
    }

    /// Says what became of deliveries: those of `Ack` are acknowledged, those of `Release` go back. Gives one outcome each,
    /// and whether the hold has to begin anew, since of an ordered group nothing can be given back but everything.
    pub(super) async fn settle(&self, batch: &[(u64, Disposition)]) -> (Vec<Result<()>>, bool) {
        let (mut outcomes, mut said, mut restarts) = (Vec::with_capacity(batch.len()), Vec::new(), false);
        {
            // Under the lock, so that nobody acknowledges behind what is acknowledged here.
            let mut state = self.state();
            let is_gone = state.is_gone || !self.is_connected();
            let mut acked = Vec::with_capacity(batch.len());
            for (tag, disposition) in batch {
                let is_ack = *disposition == Disposition::Ack;
                let known = match is_ack {
                    _ if is_gone => None,
                    false if self.partition.is_some() => state.out.release(*tag),
                    _ => state.out.settle(*tag),
                };
                outcomes.push(known.map(drop).ok_or_else(|| not_outstanding(*tag)));
                let is_known = outcomes.last().is_some_and(Result::is_ok);
                match (is_known, is_ack) {
                    (true, true) => acked.push(*tag),
                    (true, false) if self.partition.is_some() => restarts = true,
                    (true, false) => said.push(self.say_nack(*tag)),
                    (false, _) => {}
                }
            }
            let settled_to = state.out.advance().unwrap_or(0);
            // One answer for all up to the last of these that has nothing unsettled before it.
            let together = acked.iter().copied().filter(|tag| *tag <= settled_to).max();
            if let Some(last) = together {
                said.push(self.say_ack(last, true));
            }
            for tag in acked.into_iter().filter(|tag| *tag > settled_to) {
                said.push(self.say_ack(tag, false));
            }
            state.is_leaving |= restarts;
        }
        let mut failure = None;
        for said in said {
            if let Err(why) = said.await {
                failure = Some(connection::failed("settling messages")(why));
            }
        }
        if let Some(why) = failure {
            // Which of them arrived is not known.
            let failed = || Error::new(why.kind(), why.to_chain());
            outcomes
                .iter_mut()
                .filter(|outcome| outcome.is_ok())
                .for_each(|outcome| *outcome = Err(failed()));
        }
        (outcomes, restarts)
    }

    fn say_ack(&self, tag: u64, multiple: bool) -> Said {
        let channel = self.channel.clone();
        say(async move { channel.basic_ack(tag, BasicAckOptions { multiple }).await })
    }

    fn say_nack(&self, tag: u64) -> Said {
        let channel = self.channel.clone();
        let back = BasicNackOptions {
            multiple: false,
            requeue: true,
        };
        say(async move { channel.basic_nack(tag, back).await })
    }

    /// Ends the channel, so that what is not settled goes back to its place in the queue.
    pub(super) async fn end(&self) -> lapin::Result<()> {
        self.lose();
        connection::close_behind_acks(&self.channel, &self.queue).await
    }
}

/// Sends it now, in the order of the calls; the future waits until it is written.
fn say(saying: impl Future<Output = lapin::Result<()>> + Send + 'static) -> Said {
    let mut saying: Said = Box::pin(saying);
    match saying.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
        std::task::Poll::Ready(said) => Box::pin(std::future::ready(said)),
        std::task::Poll::Pending => saying,
    }
}

pub(super) fn not_outstanding(tag: u64) -> Error {
    let text = "the delivery is not outstanding: its queue has gone to somebody else, or its connection is lost";
    Error::new(ErrorKind::LeaseLost, text).with("delivery", tag)
}
