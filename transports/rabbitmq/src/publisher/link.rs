//! One connection, one channel, many unconfirmed messages.
//!
//! Messages are handed over one behind the other without waiting for the socket (the first poll of the client's future
//! hands them over), and confirms are taken as they come. A message that reached no queue is *returned* before it is
//! confirmed, but the client attaches what was returned to whichever confirm it resolves next, which may be another
//! message's. So a confirm is believed only after everything that was resolved together with it has been looked at, and
//! what was returned is found by its message id.

use super::{Job, Work, unavailable};
use crate::{
    connection::{Broker, Connection, failed, is_reply, within},
    topology::{Declaring, routing_key},
    wire::{self, Layout},
};
use futures_util::{FutureExt as _, Stream, StreamExt as _, future::BoxFuture, stream::FuturesUnordered};
use lapin::{
    BasicProperties, Channel, Confirmation, Event, ExchangeKind,
    options::{BasicPublishOptions, ConfirmSelectOptions, ExchangeDeclareOptions},
    types::FieldTable,
};
use postrider_core::{
    PublishError,
    publisher::{Calls, Place},
};
use rustc_hash::FxHashMap;
use std::{
    pin::Pin,
    sync::{
        Arc,
        atomic::{AtomicBool, Ordering},
    },
    task::{Context, Poll, Wake, Waker},
    time::{Duration, Instant},
};
use tokio::sync::mpsc;

/// What has not been confirmed for so long counts in no window.
const SILENT: Duration = Duration::from_millis(100);

/// What a frame has beside the properties.
const FRAME: usize = 64;

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

/// What it was sent as: its id, its routing key, and the bytes of its payload.
type Sent = (String, String, usize);
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

pub(super) struct Link {
    connection: Arc<Connection>,
    /// The most time that anything may take.
    limit: Duration,
    channel: Channel,
    events: Pin<Box<dyn Stream<Item = Event> + Send>>,
    exchange: String,
    layout: Layout,
    plain_routing_keys: bool,
    window: usize,
    /// Why the broker takes nothing just now.
    blocked: Option<String>,
    /// What the broker said last that it will not do.
    refused: Option<lapin::Error>,
    /// The most bytes of properties that a frame holds, as was agreed on with the broker.
    max_properties: usize,
    calls: Calls<Work>,
    in_flight: FuturesUnordered<Confirming>,
    /// The longest that a confirm may take.
    patience: Duration,
    /// How many of them have not been confirmed for a moment, when it was last looked.
    silent: usize,
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
        // No limit is told by nothing.
        let max_properties = match connection.configuration().frame_max() {
            0 => usize::MAX,
            bytes => (bytes as usize).saturating_sub(FRAME),
        };
        Ok(Self {
            connection,
            limit: options.timeout,
            channel,
            events,
            exchange: options.exchange.clone(),
            layout: Layout::of(options),
            plain_routing_keys: options.plain_routing_keys,
            window: options.window,
            blocked: None,
            refused: None,
            max_properties,
            calls: Calls::default(),
            in_flight: FuturesUnordered::new(),
            patience: options.confirm_timeout,
            silent: 0,
            resolved: Vec::new(),
            returned: FxHashMap::default(),
        })
    }

    /// Works until the connection is lost, or nobody is left to work for.
    pub(super) async fn serve(mut self, first: Job, jobs: &mut mpsc::Receiver<Job>) {
        self.begin(first);
        let mut looks = tokio::time::interval(SILENT.min(self.patience / 10));
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
                        self.calls.fail_all(&PublishError::connection(format!("RabbitMQ takes no messages: {reason}")));
                        self.blocked = Some(reason);
                    }
                    Some(Event::ConnectionUnblocked) => {
                        tracing::info!("RabbitMQ takes messages again");
                        self.blocked = None;
                    }
                    Some(Event::Error(error)) => self.refused = Some(error),
                    Some(_) => {}
                    None => return self.calls.fail_all(&PublishError::connection("the connection to RabbitMQ has ended")),
                },
                Some(resolved) = self.in_flight.next(), if !self.in_flight.is_empty() => {
                    self.resolved.push(resolved);
                    self.judge();
                }
                // What cannot be handed over waits in the channel, and so do those who call.
                job = jobs.recv(), if self.calls.is_handed_over() => match job {
                    Some(job) => self.begin(job),
                    None => return,
                },
                _ = looks.tick() => {
                    self.give_up();
                    if self.calls.late() > MOST_LATE * self.window {
                        return self.calls.fail_all(&PublishError::connection("RabbitMQ confirms too little"));
                    }
                }
            }
            if !self.channel.status().connected() {
                return self.fail_all();
            }
            // It was about another channel of the connection.
            self.refused = None;
        }
    }

    /// What is not confirmed fails for what the broker has closed the channel over.
    fn fail_all(&mut self) {
        let Some(why) = self.why_closed() else {
            let text = "the channel to RabbitMQ has been closed";
            return self.calls.fail_all(&PublishError::connection(text));
        };
        self.calls.fail_all(&refusal(&why, None));
    }

    /// The error that the broker has closed the channel or the connection with.
    fn why_closed(&mut self) -> Option<lapin::Error> {
        while let Some(Some(event)) = self.events.next().now_or_never() {
            if let Event::Error(error) = event {
                self.refused = Some(error);
            }
        }
        self.refused.clone()
    }

    fn begin(&mut self, job: Job) {
        if let Some(reason) = &self.blocked {
            let error = PublishError::connection(format!("RabbitMQ takes no messages: {reason}"));
            job.outcomes.report_rest(Err(error));
            return;
        }
        if let Work::Check = job.work {
            let (connection, exchange, limit) = (self.connection.clone(), self.exchange.clone(), self.limit);
            tokio::spawn(async move {
                let asked = ask(&connection, &exchange, limit).await;
                job.outcomes.report(0, asked.map_err(unavailable));
                drop(job.open);
            });
            return;
        }
        let count = job.work.len();
        self.calls.begin(job.work, count, job.outcomes, job.open);
    }

    /// Answers what has not been confirmed for too long, and takes it out of the window; what has been silent for a moment
    /// leaves the window, too, so that a queue that does not confirm keeps no place from the others.
    fn give_up(&mut self) {
        let (now, patience) = (Instant::now(), self.patience);
        self.silent = self.calls.silent(now, SILENT).min(MOST_LATE * self.window);
        self.calls.give_up(now, patience, || {
            PublishError::destination(format!(
                "RabbitMQ did not confirm it within {patience:?}, though it is there: a queue may have lost its majority"
            ))
        });
    }

    /// Hands over as much as the window lets.
    fn hand_over(&mut self) {
        let now = Instant::now();
        while self.in_flight.len() < self.window + self.silent + self.calls.late() {
            let Some((place, work)) = self.calls.hand_over(now) else {
                return;
            };
            let (exchange, key, (properties, payload)) = match work {
                Work::Messages(messages) => {
                    let message = &messages[place.1];
                    (
                        &*self.exchange,
                        routing_key(message, self.plain_routing_keys),
                        wire::write(message, self.layout, None),
                    )
                }
                Work::Copy(copy) => {
                    let (message, queue, copied) = &**copy;
                    ("", queue.clone(), wire::write(message, self.layout, Some(copied)))
                }
                Work::Probe(key) => {
                    let gone = BasicProperties::default().with_expiration("0".into());
                    (&*self.exchange, key.clone(), (gone, bytes::Bytes::new()))
                }
                Work::Check => continue,
            };
            // A larger frame ends the connection, and with it everybody else's messages.
            let size = wire::size(&properties);
            if size > self.max_properties {
                let most = self.max_properties;
                let text = format!("its headers have {size} bytes, and RabbitMQ takes {most} (frame_max)");
                self.calls.confirm(place, Err(PublishError::invalid(text)));
                continue;
            }
            let id = properties.message_id().clone().map(String::from).unwrap_or_default();
            let payload_size = payload.len();
            let sent = (place, (id, key.clone(), payload_size));
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

    fn confirmed(&mut self, (place, (id, key, bytes)): (Place, Sent), result: lapin::Result<Confirmation>) {
        // Whoever called may be gone; what was returned is told of all the same.
        let returned = match (&result, self.returned.entry((id, key))) {
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
            (Err(error), _) => {
                let why = self.why_closed().unwrap_or(error);
                Err(refusal(&why, Some(bytes)))
            }
            (Ok(_), Some(why)) => Err(PublishError::unroutable(format!(
                "no queue is bound for it on exchange `{}`: {why}; subscribe or declare a group for its topic, or set unroutable = Drop",
                self.exchange
            ))),
            (Ok(Confirmation::Nack(_)), None) => Err(PublishError::destination(
                "RabbitMQ refused to store it: a queue is full, or has no majority",
            )),
            (Ok(_), None) => Ok(()),
        };
        self.calls.confirm(place, outcome);
    }
}

/// What the broker's error means for a message with so many bytes of payload, if it is known which one that was:
///
/// | reply code | of publishing |
/// |---|---|
/// | 403 no right to write, 404 no exchange | the destination is away |
/// | 406 a message is larger than `max_message_size` | that one is invalid; the others are sent again |
/// | anything else | the connection is lost |
fn refusal(error: &lapin::Error, bytes: Option<usize>) -> PublishError {
    let why = failed("publishing")(error.clone());
    if is_reply(error, 403) || is_reply(error, 404) {
        return PublishError::destination(why);
    }
    let text = error.to_string();
    let is_named = |bytes: usize| text.contains(&format!("message size {bytes} is larger"));
    match is_reply(error, 406) && bytes.is_some_and(is_named) {
        true => PublishError::invalid(why),
        false => PublishError::connection(why),
    }
}
