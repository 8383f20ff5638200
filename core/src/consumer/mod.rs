//! The consumer: a group's messages through ordered chains of handlers.
//!
//! A subscription is a group, its topics, and a chain of steps for each event type, with middleware around it. The steps of
//! a chain run in order. When one fails, the compensations of those before it run in reverse, and the chain is tried again:
//! a few times in place, then from the group's *inbox* in the event log, where the message waits while others pass it and
//! later ones of its key queue behind it. When its attempts are used up it is a dead letter, in the same inbox.

mod barrier;
mod batch;
mod chain;
mod context;
mod crew;
mod durable;
mod error;
mod gate;
mod gathering;
mod handled;
mod handler;
mod inbox;
mod joining;
mod members;
mod middleware;
mod options;
mod retry;
mod running;
mod shared;
mod starting;
mod starts;
mod steps;
mod subscribing;
mod unacknowledged;
mod worker;

pub use barrier::Barrier;
pub use batch::{Batch, BatchContext, BatchHandlerFn, BatchResult, StatefulBatchHandlerFn};
pub use context::Context;
pub use error::{HandlerError, HandlerErrorKind, HandlerResult};
pub use handler::{Handler, HandlerFn, ReturningFn, StatefulHandlerFn, StatefulReturningFn};
pub use middleware::{
    CatchPanic, CircuitBreaker, Middleware, Next, RetryInside, Throttle, Timeout, Tracing, Transactional, Verdict,
};
pub use options::{OnExhausted, SubscriptionOptions, Unknown};
pub use retry::Retry;
pub use running::{Flow, Running, SubscriptionReport};
pub use steps::OnFailure;
pub use subscribing::{AtStep, Batched, Empty, NoState, Subscribing, With};

pub(crate) use middleware::Layer;
