//! The contracts and the engine of Postrider: everything that knows no broker and no database.
//!
//! Applications use the facade crate, `postrider`. Authors of a log or a transport use this one: implement
//! [`EventLogStore`](log::EventLogStore) with [`Session`](log::Session), or [`Publisher`] and [`Subscriber`], and run
//! the conformance suites of `postrider-testkit` on them.
//!
//! The modules stand in the order of the data: event → message → log → relay → publisher ⇒ broker ⇒ subscriber →
//! consumer → handlers; the bus ties them together.

pub mod error;

pub mod event;
pub mod message;

pub mod log;
pub mod publisher;
pub mod relay;
pub mod transport;
pub mod wire;

pub mod consumer;
pub mod partition;
pub mod subscriber;

pub mod bus;
pub mod health;
mod supervise;

pub mod clock;
pub mod memory;

#[cfg(feature = "testing")]
pub mod testing;

pub use bus::{Bus, BusBuilder, EventBus, Publish, TaskContext};
pub use consumer::{
    Context, Handler, HandlerError, HandlerErrorKind, HandlerResult, Middleware, Next, OnFailure, Retry, Running,
    SubscriptionOptions, Transactional, Verdict,
};
pub use error::{Error, ErrorKind, Result};
pub use event::{AnyEvent, Codec, DynEvent, Event, IntoMessage, Json};
pub use health::Health;
pub use log::{EventLog, Mailbox};
pub use message::{AttributeValue, GroupName, Limits, Message, MessageId, MessageParts, RouteName, Topic};
#[cfg(feature = "macros")]
pub use postrider_macros::Event;
pub use publisher::{
    EachOf, Outcomes, PublishError, PublishErrorKind, PublishOne, Publisher, PublisherExt, Reachability, Scope,
};
pub use relay::RelayOptions;
pub use subscriber::{
    Assignment, Deliveries, Delivery, DeliveryTag, Disposition, Feed, Incoming, Intake, Received, Settlement, Settler,
    Settling, Subscriber, Subscription, Taken,
};
pub use transport::{Capabilities, Order, Transport};
