use super::Shared;
use crate::{connection, wire::Copied};
use async_trait::async_trait;
use lapin::{
    Channel, Consumer,
    options::{BasicAckOptions, BasicConsumeOptions, BasicNackOptions, BasicQosOptions},
    types::FieldTable,
};
use postrider_core::{
    Assignment, Disposition, Error, Message, Result,
    partition::{self, Hold as _, Prefix, not_outstanding},
};
use std::{
    sync::{Mutex, MutexGuard, PoisonError},
    task::{Context, Waker},
    time::Duration,
};

/// A queue that this member consumes: a channel, and what is out of it.
#[derive(Debug)]
pub(super) struct Hold {
    assignment: Assignment,
    pub(super) queue: String,
    /// Which one, of a group whose members share them.
    pub(super) partition: Option<usize>,
    /// Whether nothing may be handed out before what comes back.
    pub(super) ordered: bool,
    channel: Channel,
    /// Kept until the channel is closed: dropped before, it would cancel the consumer, and the next one would begin behind
    /// what is not settled.
    consumer: Consumer,
    state: Mutex<State>,
}

/// So many acknowledgements are said at once; fewer a moment later.
const TOGETHER: usize = 100;
/// Each acknowledgement is a command for the queue. A quorum queue's client holds back what is more than 32 that are not
/// applied yet, and forgets that when the channel is closed. So what lies behind something unsettled, and has to be
/// acknowledged one by one, is left until it need not be, or there is much of it, and then done so many at a time.
const ONE_BY_ONE: usize = 16;
const MUCH: usize = 64;
/// How long a queue may take to apply them.
const APPLIED_IN: Duration = Duration::from_millis(5);

#[derive(Debug, Default)]
struct State {
    out: Prefix<Out>,
    /// Settled up to here without a gap.
    settled_to: u64,
    /// Done with, and not said yet.
    acked: Vec<(u64, Message)>,
    /// Done with before this channel was opened, though the queue may not know. Whole messages: two that share an id are two.
    settled_before: Vec<Message>,
    /// Nothing more is handed out.
    is_leaving: bool,
    /// And somebody else is to have it.
    is_given_up: bool,
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
        connection: &connection::Connection,
        shared: &Shared,
        queue: String,
        partition: Option<usize>,
        settled_before: Vec<Message>,
    ) -> lapin::Result<Self> {
        let channel = connection.create_channel().await?;
        channel.basic_qos(shared.prefetch(), BasicQosOptions::default()).await?;
        let name = queue.as_str().into();
        let consumer = channel
            .basic_consume(name, "".into(), BasicConsumeOptions::default(), FieldTable::default())
            .await?;
        Ok(Self {
            assignment: Assignment::fresh(),
            queue,
            partition,
            ordered: shared.subscription.ordered,
            channel,
            consumer,
            state: Mutex::new(State {
                settled_before,
                ..State::default()
            }),
        })
    }

    pub(super) fn consumer(&self) -> &Consumer {
        &self.consumer
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that a message is handed out. `false` if it must not be, any more or once more.
    pub(super) fn hand_out(&self, tag: u64, message: &Message, deliveries: u32, redelivered: bool) -> bool {
        let mut state = self.state();
        if state.is_leaving {
            return false;
        }
        if !redelivered {
            // Whatever went back has come by now.
            state.settled_before.clear();
        }
        let settled = state.settled_before.iter().position(|settled| settled == message);
        if let Some(at) = settled {
            state.settled_before.swap_remove(at);
        }
        let out = Out {
            message: message.clone(),
            deliveries,
        };
        state.out.push(tag, out);
        if settled.is_some()
            && let Some(out) = state.out.settle(tag)
        {
            state.acked.push((tag, out.message));
        }
        settled.is_none()
    }

    /// Somebody else is to have it, once it has ended.
    pub(super) fn give_up(&self) {
        self.state().is_given_up = true;
    }

    pub(super) fn is_given_up(&self) -> bool {
        self.state().is_given_up
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
    pub(super) fn copy(&self, tag: u64, kind: &str, group: &str, attempts: u32) -> Option<(Message, Copied)> {
        let state = self.state();
        let Out { message, deliveries } = state.out.get(tag)?;
        let copied = Copied {
            deliveries: *deliveries,
            attempts,
            id: format!("{}:{group}:{kind}:{deliveries}", message.id()),
        };
        Some((message.clone(), copied))
    }

    /// Whether something is to be acknowledged.
    pub(super) fn has_acked(&self) -> bool {
        !self.state().acked.is_empty()
    }

    /// Acknowledges what is done with, but for a little that lies behind something that is not.
    pub(super) async fn acknowledge(&self) -> lapin::Result<()> {
        self.acknowledge_but(MUCH).await
    }

    async fn acknowledge_but(&self, left: usize) -> lapin::Result<()> {
        let mut said = Vec::new();
        self.say_acked(&mut self.state(), left, &mut said);
        all_said(said).await
    }

    /// Under the lock, so that nobody acknowledges behind what is acknowledged here.
    fn say_acked(&self, state: &mut State, left: usize, said: &mut Vec<Said>) {
        state.settled_to = state.out.advance().unwrap_or(0).max(state.settled_to);
        let settled_to = state.settled_to;
        // One answer for all up to the last of these that has nothing unsettled before it.
        let before = state.acked.iter().map(|(tag, _)| *tag).filter(|tag| *tag <= settled_to);
        if let Some(last) = before.max() {
            said.push(self.say_ack(last, true));
            state.acked.retain(|(tag, _)| *tag > settled_to);
        }
        let more = state.acked.len().saturating_sub(left).min(ONE_BY_ONE);
        said.extend(state.acked.drain(..more).map(|(tag, _)| self.say_ack(tag, false)));
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

    /// How many messages lie ready in the queue.
    pub(super) async fn waiting(&self) -> lapin::Result<u32> {
        connection::ask(&self.channel, &self.queue).await
    }

    /// Whether more is to be acknowledged one by one than is left for later.
    pub(super) fn has_much(&self) -> bool {
        self.state().acked.len() > MUCH
    }

    /// Ends the channel, so that what is not settled goes back to its place in the queue. Gives what may go back though it is
    /// settled, should the queue have come to all of it too late.
    pub(super) async fn end(&self) -> lapin::Result<Vec<Message>> {
        self.leave();
        self.acknowledge().await?;
        let settled = {
            let mut state = self.state();
            let mut settled = std::mem::take(&mut state.settled_before);
            settled.extend(state.acked.iter().map(|(_, message)| message.clone()));
            settled
        };
        while self.has_acked() {
            self.acknowledge_but(0).await?;
            connection::ask(&self.channel, &self.queue).await?;
            tokio::time::sleep(APPLIED_IN).await;
        }
        self.lose();
        // What was acknowledged on a channel has arrived when the broker answers a question asked behind it. Acknowledged
        // and closed at once, quorum queues deliver some of it again.
        connection::ask(&self.channel, &self.queue).await?;
        self.channel.close(200, "OK".into()).await?;
        Ok(settled)
    }
}

#[async_trait]
impl partition::Hold for Hold {
    fn assignment(&self) -> Assignment {
        self.assignment
    }

    fn leave(&self) -> bool {
        !std::mem::replace(&mut self.state().is_leaving, true)
    }

    fn lose(&self) {
        let mut state = self.state();
        state.is_leaving = true;
        state.is_gone = true;
    }

    /// Those of `Ack` are acknowledged soon, those of `Release` go back: of an ordered group nothing can be given back but
    /// everything, and the hold begins anew.
    async fn settle(&self, batch: &[(u64, Disposition)]) -> (Vec<Result<()>>, bool) {
        let (mut outcomes, mut said, mut restarts) = (Vec::with_capacity(batch.len()), Vec::new(), false);
        {
            let mut state = self.state();
            let is_gone = state.is_gone || !self.is_connected();
            for (tag, disposition) in batch {
                let is_ack = *disposition == Disposition::Ack;
                let known = match is_ack {
                    _ if is_gone => None,
                    false if self.ordered => state.out.release(*tag),
                    _ => state.out.settle(*tag),
                };
                outcomes.push(known.as_ref().map(drop).ok_or_else(|| not_outstanding(*tag)));
                match (known, is_ack) {
                    (Some(out), true) => state.acked.push((*tag, out.message)),
                    (Some(_), false) if self.ordered => restarts = true,
                    (Some(_), false) => said.push(self.say_nack(*tag)),
                    (None, _) => {}
                }
            }
            state.is_leaving |= restarts;
            if state.acked.len() >= TOGETHER {
                self.say_acked(&mut state, MUCH, &mut said);
            }
        }
        if let Err(why) = all_said(said).await {
            // Which of them arrived is not known.
            let why = connection::failed("settling messages")(why);
            let failed = || Error::new(why.kind(), why.to_chain());
            outcomes
                .iter_mut()
                .filter(|outcome| outcome.is_ok())
                .for_each(|outcome| *outcome = Err(failed()));
        }
        (outcomes, restarts)
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

async fn all_said(said: Vec<Said>) -> lapin::Result<()> {
    let mut all = Ok(());
    for said in said {
        all = all.and(said.await);
    }
    all
}
