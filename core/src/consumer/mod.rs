//! The consumer: a group's messages through ordered chains of handlers.
//!
//! A subscription is a group, its topics, and a chain of steps for each event type. The steps of a chain run in the
//! order written. When one fails, the compensations of those before it run in reverse, and the chain is tried again in
//! place, a few times; then the message is a dead letter, in the log's inbox of the group.

mod chain;
mod context;
mod error;
mod handler;
mod retry;
mod running;
mod subscribing;
mod worker;

pub use context::Context;
pub use error::{HandlerError, HandlerErrorKind, HandlerResult};
pub use handler::{Handler, HandlerFn, StatefulHandlerFn};
pub use retry::Retry;
pub use running::{Running, SubscriptionReport};
pub use subscribing::{AtStep, Empty, NoState, Subscribing, With};
