//! Handlers going into a chain, with the subscription's state and without.

use super::{AtStep, Batched, Empty, NoState, Subscribing, With};
use crate::{
    Event,
    consumer::{
        Batch, BatchHandlerFn, HandlerError, HandlerFn, ReturningFn, StatefulBatchHandlerFn, StatefulHandlerFn,
        StatefulReturningFn,
        batch::{BoundBatch, PlainBatch},
        handler::{Bound, BoundReturning, Plain, Returning},
    },
};
use std::{any::type_name, marker::PhantomData};

// What rustc says of a closure that captures something names no remedy, but prints the line of the bound: the comments there
// are for its reader.
impl<E: Event> Subscribing<E, NoState, Empty> {
    /// Handles several events at once: `async fn(&[E], &mut BatchContext) -> Vec<HandlerResult>`, one outcome each, in
    /// order. Those that failed are tried again without the others. At most one event of a key is in a batch, unless the
    /// subscription is [`unordered`](Subscribing::unordered).
    ///
    /// Middleware for all events does not go around a call; it is told of each event that
    /// [failed](crate::Middleware::on_failure), and asked for a [verdict](crate::Middleware::fallback). Starting is refused with middleware
    /// for this type, [`durable`](Subscribing::durable), or [`Transactional`](crate::Transactional) around everything.
    pub fn batch_handler<F>(self, how: Batch, handler: F) -> Subscribing<E, NoState, Batched>
    where
        F: BatchHandlerFn<E>, // what it captures: give it to `.state(value)`, and take it as the first argument
    {
        self.batched(how, type_name::<F>(), Box::new(PlainBatch(handler)))
    }
}

impl<E: Event, S: Send + Sync + 'static> Subscribing<E, With<S>, Empty> {
    /// Handles several events at once, with the state: `async fn(&S, &[E], &mut BatchContext) -> Vec<HandlerResult>`, as
    /// [without one](Subscribing::batch_handler).
    pub fn batch_handler<F>(self, how: Batch, handler: F) -> Subscribing<E, With<S>, Batched>
    where
        F: StatefulBatchHandlerFn<S, E>, // captures nothing else: put it into the state
    {
        let run = Box::new(BoundBatch(self.state.0.clone(), handler));
        self.batched(how, type_name::<F>(), run)
    }
}

impl<E: Event, At> Subscribing<E, NoState, At> {
    /// Adds a step: an `async fn(&E, &mut Context) -> HandlerResult`, or an async closure that captures nothing.
    pub fn handler<F>(self, handler: F) -> Subscribing<E, NoState, AtStep>
    where
        F: HandlerFn<E>, // what it captures: give it to `.state(value)`; an error of its own: `.handler_returning`
    {
        self.push(type_name::<F>(), Box::new(Plain(handler)), None)
    }

    /// Adds a step with an error of its own: an `async fn(&E, &mut Context) -> anyhow::Result<()>`, say. A closure names its
    /// type: `async |event, ctx| -> anyhow::Result<()> { … }`.
    ///
    /// What its error means for the next attempt is as `?` makes it in a [`handler`](Subscribing::handler).
    pub fn handler_returning<R, F>(self, handler: F) -> Subscribing<E, NoState, AtStep>
    where
        R: Into<HandlerError> + 'static,
        F: ReturningFn<E, R>,
    {
        self.push(type_name::<F>(), Box::new(Returning(handler, PhantomData)), None)
    }
}

impl<E: Event> Subscribing<E, NoState, AtStep> {
    /// How the step before is taken back when a later one fails.
    pub fn compensate<F>(mut self, compensation: F) -> Self
    where
        F: HandlerFn<E>, // what it captures: give it to `.state(value)`; an error of its own: `.handler_returning`
    {
        self.edit(|step| step.compensate = Some(Box::new(Plain(compensation))));
        self
    }

    /// The same with an error of its own, as that of [`handler_returning`](Subscribing::handler_returning).
    pub fn compensate_returning<R, F>(mut self, compensation: F) -> Self
    where
        R: Into<HandlerError> + 'static,
        F: ReturningFn<E, R>,
    {
        self.edit(|step| step.compensate = Some(Box::new(Returning(compensation, PhantomData))));
        self
    }
}

impl<E: Event, S: Send + Sync + 'static, At> Subscribing<E, With<S>, At> {
    /// Adds a step: an `async fn(&S, &E, &mut Context) -> HandlerResult`, such as a method of the state.
    pub fn handler<F>(self, handler: F) -> Subscribing<E, With<S>, AtStep>
    where
        F: StatefulHandlerFn<S, E>, // captures nothing else: put it into the state
    {
        let run = Box::new(Bound(self.state.0.clone(), handler));
        self.push(type_name::<F>(), run, None)
    }

    /// Adds a step with an error of its own: an `async fn(&S, &E, &mut Context) -> anyhow::Result<()>`, say.
    pub fn handler_returning<R, F>(self, handler: F) -> Subscribing<E, With<S>, AtStep>
    where
        R: Into<HandlerError> + 'static,
        F: StatefulReturningFn<S, E, R>,
    {
        let run = Box::new(BoundReturning(self.state.0.clone(), handler, PhantomData));
        self.push(type_name::<F>(), run, None)
    }
}

impl<E: Event, S: Send + Sync + 'static> Subscribing<E, With<S>, AtStep> {
    /// How the step before is taken back when a later one fails.
    pub fn compensate<F>(mut self, compensation: F) -> Self
    where
        F: StatefulHandlerFn<S, E>, // captures nothing else: put it into the state
    {
        let run = Box::new(Bound(self.state.0.clone(), compensation));
        self.edit(|step| step.compensate = Some(run));
        self
    }

    /// The same with an error of its own.
    pub fn compensate_returning<R, F>(mut self, compensation: F) -> Self
    where
        R: Into<HandlerError> + 'static,
        F: StatefulReturningFn<S, E, R>,
    {
        let run = Box::new(BoundReturning(self.state.0.clone(), compensation, PhantomData));
        self.edit(|step| step.compensate = Some(run));
        self
    }
}
