//! One connection, one channel, many unconfirmed messages.
//!
//! Messages are handed over one behind the other without waiting for the socket (the first poll of the client's future
//! hands them over), and confirms are taken as they come. A message that reached no queue is *returned* before it is
//! confirmed, but the client attaches what was returned to whichever confirm it resolves next, which may be another
//! message's. So a confirm is believed only after everything that was resolved together with it has been looked at, and
//! what was returned is found by its message id.

use super::{Job, Outcome, Work, unavailable};
use crate::{
    connection::{Broker, close_soon, failed, within},
    topology::{Declaring, routing_key},
    wire,
};
use futures_util::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    Channel, Confirmation, Connection, Event, ExchangeKind,
    options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions},
    types::FieldTable,
};
use postrider_core::{PublishError, wire::Format};
use rustc_hash::{FxHashMap, FxHashSet};
use std::{
    collections::VecDeque,
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};
use tokio::sync::{mpsc, oneshot};

/// So many windows full of messages may be unconfirmed for too long before the connection is given up.
const MOST_LATE: usize = 4;
/// Asks the broker something, on a channel that a refusal may close.
async fn ask(connection: &Connection, exchange: &str, limit: Duration) -> postrider_core::Result<()> {
    within(limit, "asking RabbitMQ", async {
        let channel = connection.create_channel().await.map_err(failed("opening a channel"))?;
        let passive = ExchangeDeclareOptions {
            passive: true,
            ..Default::default()
        };
        let asked = channel.exchange_declare(exchange.into(), ExchangeKind::Direct, passive, FieldTable::default());
        asked.await.map_err(failed("looking for the exchange"))?;
        channel
            .close(200, "OK".into())
            .await
            .map_err(failed("closing a channel"))
    })
    .await
}

/// Which message of which call.
type Place = (u64, usize);
/// What it was sent as: its id and routing key.
type Sent = (String, String);
type Resolved = ((Place, Sent), lapin::Result<Confirmation>);
type Confirming = BoxFuture<'static, Resolved>;

/// Whether it was woken.
#[derive(Default)]
struct Again(AtomicBool);

impl Wake for Again {
    fn wake(self: Arc<Self>) {
        self.0.store(true, Ordering::Release);
    }
}

/// A call that is not answered yet.
struct Call {
    work: Work,
    reply: oneshot::Sender<Vec<Outcome>>,
    outcomes: Vec<Option<Outcome>>,
    left: usize,
    /// How many have been handed over.
    sent: usize,
}

pub(super) struct Link {
    connection: Arc<Connection>,
    /// The most time that anything may take.
    limit: Duration,
    channel: Channel,
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    exchange: String,
    format: Format,
    window: usize,
    /// Why the broker takes nothing just now.
    blocked: Option<String>,
    calls: FxHashMap<u64, Call>,
    last_call: u64,
    /// Calls that are not wholly handed over, in order.
    waiting: VecDeque<u64>,
    in_flight: FuturesUnordered<Confirming>,
    /// In the order they were handed over, those that are answered among them.
    unanswered: VecDeque<(Instant, Place)>,
    /// Answered before they were confirmed, which they may still be.
    late: FxHashSet<Place>,
    /// The longest that a confirm may take.
    patience: Duration,
    /// Resolved, and not yet believed.
    resolved: Vec<Resolved>,
    /// What was returned, by id and routing key: how often, and the broker's reason.
    returned: FxHashMap<(String, String), (usize, String)>,
}

impl Link {
    pub(super) async fn open(broker: &Broker) -> postrider_core::Result<Self> {
        let connection = Arc::new(broker.connect("publisher").await?);
        let events = Box::pin(connection.events_listener());
        let channel = broker
            .in_time("declaring the exchange", async {
                let declaring = Declaring::on(&connection, broker).await?;
                declaring.exchange().await?;
                declaring.end().await?;
                let channel = connection.create_channel().await.map_err(failed("opening a channel"))?;
                let select = channel.confirm_select(ConfirmSelectOptions::default()).await;
                select.map_err(failed("asking for confirms"))?;
                Ok(channel)
            })
            .await?;
        let options = broker.options();
        Ok(Self {
            connection,
            limit: options.timeout,
            channel,
            events,
            exchange: options.exchange.clone(),
            format: options.format,
            window: options.window,
            blocked: None,
            calls: FxHashMap::default(),
            last_call: 0,
            waiting: VecDeque::new(),
            in_flight: FuturesUnordered::new(),
            unanswered: VecDeque::new(),
            late: FxHashSet::default(),
            patience: options.confirm_timeout,
            resolved: Vec::new(),
            returned: FxHashMap::default(),
        })
    }

    /// Works until the connection is lost, or nobody is left to work for.
    pub(super) async fn serve(mut self, first: Job, jobs: &mut mpsc::Receiver<Job>) {
        self.begin(first);
        let mut looks = tokio::time::interval(self.patience / 10);
        looks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
        loop {
            self.hand_over();
            // What was confirmed while it was handed over is told before anything is waited for.
            self.judge();
            tokio::select! {
                biased;
                event = self.events.next() => match event {
                    Some(Event::ConnectionBlocked(reason)) => {
                        tracing::warn!(reason, "RabbitMQ takes no messages");
                        self.fail_all(&PublishError::connection(format!("RabbitMQ takes no messages: {reason}")));
                        self.blocked = Some(reason);
                    }
                    Some(Event::ConnectionUnblocked) => {
                        tracing::info!("RabbitMQ takes messages again");
                        self.blocked = None;
                    }
                    Some(Event::Error(error)) if !self.connection.status().connected() => return self.fail_all(&lost(&error)),
                    Some(_) => {}
                    None => return self.fail_all(&PublishError::connection("the connection to RabbitMQ has ended")),
                },
                Some(resolved) = self.in_flight.next(), if !self.in_flight.is_empty() => {
                    self.resolved.push(resolved);
                    self.judge();
                }
                // What cannot be handed over waits in the channel, and so do those who call.
                job = jobs.recv(), if self.waiting.is_empty() => match job {
                    Some(job) => self.begin(job),
                    None => return,
                },
                _ = looks.tick() => {
                    self.give_up();
                    if self.late.len() > MOST_LATE * self.window {
                        return self.fail_all(&PublishError::connection("RabbitMQ confirms too little"));
                    }
                }
            }
            if !self.channel.status().connected() {
                return self.fail_all(&PublishError::connection("the channel to RabbitMQ has been closed"));
            }
        }
    }

    fn begin(&mut self, job: Job) {
        if let Some(reason) = &self.blocked {
            let error = PublishError::connection(format!("RabbitMQ takes no messages: {reason}"));
            let _ = job.reply.send(vec![Err(error); job.work.len()]);
            return;
        }
        if let Work::Check = job.work {
            let (connection, exchange, limit) = (self.connection.clone(), self.exchange.clone(), self.limit);
            tokio::spawn(async move {
                let asked = ask(&connection, &exchange, limit).await;
                let _ = job.reply.send(vec![asked.map_err(unavailable)]);
            });
            return;
        }
        let count = job.work.len();
        self.last_call += 1;
        self.waiting.push_back(self.last_call);
        let call = Call {
            work: job.work,
            reply: job.reply,
            outcomes: (0..count).map(|_| None).collect(),
            left: count,
            sent: 0,
        };
        self.calls.insert(self.last_call, call);
    }

    /// Answers what has not been confirmed for too long: it keeps nobody waiting, and no place in the window.
    fn give_up(&mut self) {
        let now = Instant::now();
        while let Some((since, place)) = self.unanswered.front().copied() {
            let is_answered = self
                .calls
                .get(&place.0)
                .is_none_or(|call| call.outcomes[place.1].is_some());
            if !is_answered {
                if now.saturating_duration_since(since) < self.patience {
                    return;
                }
                self.late.insert(place);
                let patience = self.patience;
                self.answer(place, Err(PublishError::destination(format!(
                    "RabbitMQ did not confirm it within {patience:?}, though it is there: a queue may have lost its majority"
                ))));
            }
            self.unanswered.pop_front();
        }
    }

    /// Hands over as much as the window lets.
    fn hand_over(&mut self) {
        let now = Instant::now();
        while self.in_flight.len() < self.window + self.late.len() {
            let Some(&number) = self.waiting.front() else { return };
            let Some(call) = self.calls.get_mut(&number) else {
                self.waiting.pop_front();
                continue;
            };
            // Who has gone does not want the rest to be sent.
            if call.reply.is_closed() {
                call.left -= call.outcomes.len() - call.sent;
                call.outcomes.truncate(call.sent);
                if call.left == 0 {
                    self.calls.remove(&number);
                }
                self.waiting.pop_front();
                continue;
            }
            if call.sent == call.outcomes.len() {
                self.waiting.pop_front();
                continue;
            }
            let place = (number, call.sent);
            call.sent += 1;
            self.unanswered.push_back((now, place));
            let (exchange, key, (properties, payload)) = match &call.work {
                Work::Messages(messages) => {
                    let message = &messages[place.1];
                    (
                        &*self.exchange,
                        routing_key(message),
                        wire::write(message, self.format, None),
                    )
                }
                Work::Copy(copy) => {
                    let (message, queue, copied) = &**copy;
                    ("", queue.clone(), wire::write(message, self.format, Some(copied)))
                }
                Work::Check => continue,
            };
            let id = properties.message_id().clone().map(String::from).unwrap_or_default();
            let sent = (place, (id, key.clone()));
            let (channel, exchange) = (self.channel.clone(), exchange.into());
            let mandatory = BasicPublishOptions {
                mandatory: true,
                immediate: false,
            };
            let mut confirming: Confirming = Box::pin(async move {
                let publish = channel.basic_publish(exchange, key.into(), mandatory, &payload, properties);
                let confirm = async { publish.await?.await };
                (sent, confirm.await)
            });
            // Here it is handed over, in order.
            match confirming.as_mut().poll(&mut Context::from_waker(Waker::noop())) {
                Poll::Ready(resolved) => self.resolved.push(resolved),
                Poll::Pending => self.in_flight.push(confirming),
            }
        }
    }

    /// Believes what has been resolved, once everything resolved with it has been seen.
    fn judge(&mut self) {
        while !self.resolved.is_empty() {
            self.take_resolved();
            let together = self.resolved.len();
            // The client resolves what one answer of the broker confirms under one lock. Whoever has had the lock after
            // the first was resolved finds all of them resolved: this takes the lock, and waits for nothing.
            let _ = self.channel.wait_for_confirms().now_or_never();
            self.take_resolved();
            for (_, result) in &mut self.resolved {
                let returned = match result {
                    Ok(Confirmation::Ack(returned) | Confirmation::Nack(returned)) => returned.take(),
                    _ => None,
                };
                if let Some(returned) = returned {
                    let id = returned.delivery.properties.message_id().clone();
                    let key = returned.delivery.routing_key.as_str().to_owned();
                    let why = format!("{} {}", returned.reply_code, returned.reply_text);
                    let known = self.returned.entry((id.map(String::from).unwrap_or_default(), key));
                    known.or_insert((0, why)).0 += 1;
                }
            }
            let believed: Vec<_> = self.resolved.drain(..together).collect();
            for (place, result) in believed {
                self.confirmed(place, result);
            }
        }
        // Whatever was returned has been confirmed by now, unless something else is still on its way.
        if self.in_flight.is_empty() {
            self.returned.clear();
        }
    }

    /// Takes all that is resolved: a set of futures may pause in between, and says so by waking whoever polls it.
    fn take_resolved(&mut self) {
        let again = Arc::new(Again::default());
        let waker = Waker::from(again.clone());
        let mut cx = Context::from_waker(&waker);
        // Nor may one that wakes itself each time keep it for ever.
        let mut pauses = 0;
        while pauses < 64 {
            match self.in_flight.poll_next_unpin(&mut cx) {
                Poll::Ready(Some(resolved)) => {
                    self.resolved.push(resolved);
                    pauses = 0;
                }
                Poll::Pending if again.0.swap(false, Ordering::AcqRel) => pauses += 1,
                Poll::Ready(None) | Poll::Pending => return,
            }
        }
    }

    fn confirmed(&mut self, (place, sent): (Place, Sent), result: lapin::Result<Confirmation>) {
        self.late.remove(&place);
        // Whoever called may be gone; what was returned is told of all the same.
        let returned = match (&result, self.returned.entry(sent)) {
            (Ok(_), std::collections::hash_map::Entry::Occupied(mut known)) => {
                let why = known.get().1.clone();
                known.get_mut().0 -= 1;
                if known.get().0 == 0 {
                    known.remove();
                }
                Some(why)
            }
            _ => None,
        };
        let outcome = match (result, returned) {
            (Err(error), _) => Err(lost(&error)),
            (Ok(_), Some(why)) => Err(PublishError::unroutable(format!(
                "no queue is bound for it on exchange `{}`: {why}",
                self.exchange
            ))),
            (Ok(Confirmation::Nack(_)), None) => Err(PublishError::destination(
                "RabbitMQ refused to store it: a queue is full, or has no majority",
            )),
            (Ok(_), None) => Ok(()),
        };
        self.answer(place, outcome);
    }

    fn answer(&mut self, (number, at): Place, outcome: Outcome) {
        let Some(call) = self.calls.get_mut(&number) else {
            return;
        };
        if call.outcomes[at].is_none() {
            call.outcomes[at] = Some(outcome);
            call.left -= 1;
        }
        if call.left == 0
            && let Some(call) = self.calls.remove(&number)
        {
            let unknown = || Err(PublishError::connection("the outcome is not known"));
            let outcomes = call.outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(unknown));
            let _ = call.reply.send(outcomes.collect());
        }
    }

    /// Answers every call with what is known of it, and this error for the rest.
    fn fail_all(&mut self, error: &PublishError) {
        self.waiting.clear();
        for (_, call) in self.calls.drain() {
            let failed = || Err(error.clone());
            let outcomes = call.outcomes.into_iter().map(|outcome| outcome.unwrap_or_else(failed));
            let _ = call.reply.send(outcomes.collect());
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        close_soon(self.connection.clone());
    }
}

fn lost(error: &lapin::Error) -> PublishError {
    PublishError::connection(failed("publishing")(error.clone()))
}
