//! Postrider's transport over RabbitMQ 3.10 and later, through [lapin](https://docs.rs/lapin).
//!
//! # How messages lie there
//! Everything goes to one durable direct exchange, under the routing key `<topic>.@.<slot>`: the slot, 0 to 63, is that of the
//! message's key. A group has queues of its own, all of them quorum queues:
//!
//! | queue | of | what for |
//! |---|---|---|
//! | `<group>` | an unordered group | everything; its members compete |
//! | `<group>:0` … `<group>:7` | an ordered group | a range of slots each, with one consumer at a time |
//! | `<group>:each:<id>` | a broadcast | everything, for one member; gone with it, or 10 minutes after it died |
//! | `<group>:retry:<ms>:<queue>` | both | messages that wait for a retry, dead-lettered back by the broker |
//! | `<group>:dead` | both | dead letters, for groups without an event log; and what a policy's `delivery-limit` takes out of a queue |
//! | `<group>:members`, `<group>:hungry`, `<group>:<n>/<partitions>:lease` | an ordered group | who is there, who has too little, and who has which partition; never any messages |
//!
//! A plain client publishes to the exchange with the routing key `<topic>`; its messages arrive at an unordered group, and at
//! the first partition of an ordered one. One that consumes binds its queue with `<topic>.@.0` to `<topic>.@.63`. What it
//! needs to write of the rest is in [`wire`](postrider_core::wire): attributes are headers `cloudEvents_type` and so on, the
//! content type is AMQP's own.
//!
//! Groups that subscribe to patterns of topics need a topic exchange: [`RabbitMqOptions::with_wildcards`].
//!
//! A group keeps its queues and bindings when its members go, which is what makes messages wait for it. Of a topic that it no
//! longer wants, or when it changes between ordered and unordered, unbind or delete the old ones by hand.
//!
//! # What is promised
//! A message is published when the broker has confirmed it *and* it has reached a queue (`mandatory`): quorum queues confirm
//! what a majority has on disk. A message that reaches no queue, and one that a full queue refuses, is an unavailable
//! destination; a blocked connection (the broker is low on memory or disk) is an unavailable broker, and told as soon as the
//! broker tells it.
//!
//! An ordered group shares its partitions fairly: a member that joins gets its part within about a second, those of a member
//! that died are taken when the broker notices: at once for a killed process, within two heartbeats for a paused one. The
//! broker's single active consumer fences: a member that has lost a partition gets nothing more of it. Of each partition
//! up to 256 messages lie ready at the member that has it, whatever it may have in flight: that is its memory, and where
//! handlers need more than some seconds for one message, the broker's `consumer_timeout` (30 minutes) has to be longer than
//! they need for 256, or it ends the channel, and what was not settled comes again, in order.
//!
//! # What the broker's errors mean
//!
//! | the broker says | publishing | joining, declaring | settling |
//! |---|---|---|---|
//! | connection refused or lost, 320, 541, heartbeat missed | the connection is away: the relay probes, no attempt is counted | `Unavailable`, tried again | the outcome is lost, the message comes again |
//! | 403 no right | the destination is away: its topics are paused, no attempt is counted | `Config`: which right, of what | as a lost connection |
//! | 404 no exchange or queue | the destination is away; the next call declares it again | `Config` with `without_declaring`, else it is declared | as a lost connection |
//! | 406 declared otherwise | the destination is away | `Config`: what to delete, or to call otherwise | – |
//! | 406 larger than `max_message_size` | that message is invalid, the others are sent again | – | a copy is not stored: the message comes again |
//! | headers larger than `frame_max` | that message is invalid, before it is sent | – | – |
//! | returned, 312 no queue bound | unroutable: the topic is paused, or dropped if it says so | – | – |
//! | nack, a queue is full | the destination is away | – | a copy is not stored |
//! | no confirm within `confirm_timeout` | the destination is away: it may have lost its majority | a partition is passed over, and tried again every 5 s | – |
//! | `connection.blocked` | the connection is away until it is unblocked | – | – |
//!
//! # When an exchange is deleted
//! Its bindings go with it, and whoever declares it anew gives it none. Members of groups notice that within 5 s and bind their queues
//! again, with a WARN; what was published meanwhile was unroutable (and waits in the outbox), or reached only groups that joined later.
//! Exchanges that are somebody else's (`bind`), topic exchanges and `without_declaring` are not watched.
//!
//! # Payloads in log lines
//! lapin logs every message that RabbitMQ returns, payload included, as a WARN of the target `lapin::returned_messages`: each
//! probe of a topic that leads nowhere is one. It does so in a thread of its own, before this crate sees the message, so only
//! the application's filter can silence it: `RUST_LOG=info,lapin::returned_messages=off`. Nothing is lost by that. The relay
//! reports the topic and the broker's reason itself. Debug lines of lapin print frames and their payloads, too.
//!
//! # The choices behind it
//! The recipe for order and the traps it avoids are those found by trying: handing over with `basic.cancel`, with a nack, or
//! to a consumer with a smaller prefetch puts messages behind those that follow them.

mod config;
mod connection;
mod publisher;
mod subscriber;
mod topology;
mod wire;

pub use config::{AttributePrefix, Login, RabbitMqOptions};

use postrider_core::{Capabilities, Order, Result, Transport};
use publisher::RabbitMqPublisher;
use subscriber::RabbitMqSubscriber;

/// What the transport is called: its feature and its kind in a configuration.
pub const NAME: &str = "rabbitmq";

/// A transport over the broker at this address, with default options.
///
/// # Errors
/// As [`transport_with`].
pub fn transport(url: impl Into<String>) -> Result<Transport> {
    transport_with(RabbitMqOptions::new(url))
}

/// A transport with these options. It connects when it is first used, and again whenever the connection is lost.
///
/// # Errors
/// [`ErrorKind::Config`](postrider_core::ErrorKind::Config) for an address or an option that makes no sense.
pub fn transport_with(options: RabbitMqOptions) -> Result<Transport> {
    options.check()?;
    let wildcards = options.wildcards;
    let broker = connection::Broker::new(options)?;
    let publisher = RabbitMqPublisher::new(broker.clone());
    let mut capabilities = Capabilities::default()
        .with_order(Order::Partitioned)
        .with_delayed_retry()
        .with_dead_letter()
        .with_delivery_count()
        .with_individual_acks()
        .with_broadcast()
        .with_queue_options(&["queue_expiry", "message_expiry", "dead_letter_to", "bind", "declare"])
        // What RabbitMQ 4 takes unless it is told otherwise.
        .with_max_message_bytes(16 * 1024 * 1024);
    if wildcards {
        capabilities = capabilities.with_wildcards();
    }
    // Copies have a link of their own: what the broker does not permit of them ends no channel of the others.
    let subscriber = RabbitMqSubscriber::new(broker.clone(), RabbitMqPublisher::new(broker));
    Ok(Transport::new(NAME, capabilities)
        .with_publisher(publisher)
        .with_subscriber(subscriber))
}
