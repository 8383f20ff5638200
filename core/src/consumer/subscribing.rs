use super::{
    Batch, Handler, Layer, Middleware, OnFailure, Retry, Running, SubscriptionOptions,
    batch::{BatchChain, RunBatch},
    chain::{AnyChain, Chain},
    handler::{Compensate, Execute, Run},
    starting::About,
    steps::{Step, Steps},
};
use crate::{Bus, Error, ErrorKind, Event, Result, Topic, relay::TopicPattern};
use std::{any::type_name, borrow::Cow, fmt, marker::PhantomData, sync::Arc, time::Duration};

mod handlers;

/// A subscription without state.
#[derive(Debug)]
pub struct NoState(());

/// A subscription whose handlers get an `&S` first.
pub struct With<S>(Arc<S>);

/// No step yet: nothing a compensation could belong to.
#[derive(Debug)]
pub enum Empty {}

/// Behind a step.
#[derive(Debug)]
pub enum AtStep {}

/// Behind a handler of batches, which is alone in its chain.
#[derive(Debug)]
pub enum Batched {}

/// A subscription being described; [`start`](Subscribing::start) starts it.
#[must_use = "a subscription does nothing until `.start().await`"]
pub struct Subscribing<E: Event, S = NoState, At = Empty> {
    about: About,
    steps: Vec<Step<E>>,
    stack: Vec<Layer<E>>,
    is_durable: bool,
    state: S,
    at: PhantomData<fn() -> At>,
}

impl<E: Event> Subscribing<E> {
    pub(crate) fn new(bus: Bus, group: impl Into<String>) -> Self {
        Self {
            about: About {
                for_all: bus.layers().to_vec(),
                bus,
                group: group.into(),
                finished: Vec::new(),
                more: Vec::new(),
                options: SubscriptionOptions::default(),
            },
            steps: Vec::new(),
            stack: Vec::new(),
            is_durable: false,
            state: NoState(()),
            at: PhantomData,
        }
    }

    /// Hands `&S` to every handler, as its first argument: methods of `S` are handlers.
    pub fn state<S: Send + Sync + 'static>(self, state: impl Into<Arc<S>>) -> Subscribing<E, With<S>> {
        Subscribing {
            about: self.about,
            steps: Vec::new(),
            stack: self.stack,
            is_durable: self.is_durable,
            state: With(state.into()),
            at: PhantomData,
        }
    }
}

impl<E: Event, S, At> Subscribing<E, S, At> {
    /// Sets several things at once, over what was said before.
    pub fn options(mut self, options: &SubscriptionOptions) -> Self {
        self.about.options = self.about.options.overridden_by(options);
        self
    }

    /// Sets how many messages may be taken from the broker and not yet settled; 256 unless set.
    pub fn max_in_flight(mut self, messages: usize) -> Self {
        self.about.options.max_in_flight = Some(messages);
        self
    }

    /// Does without the order of keys, which keyed events ask for by themselves: faster, and every transport can.
    pub fn unordered(mut self) -> Self {
        self.about.options.ordered = Some(false);
        self
    }

    /// Gives every instance of the application every event, from when it has started until it stops, in place of a share:
    /// for caches to be told, and screens to be refreshed. Nothing waits for an instance that is not there: it has no inbox,
    /// so all attempts are made in place. Where the transport cannot, `start` refuses.
    pub fn broadcast(mut self) -> Self {
        self.about.options.broadcast = Some(true);
        self
    }

    /// Sets how a message is tried again.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.about.options.retry = Some(retry);
        self
    }

    /// Takes events from this topic, too, beside those of the event types; of whatever type of this subscription they are.
    pub fn topic(mut self, topic: Topic) -> Self {
        self.about.more.push(TopicPattern::from(topic));
        self
    }

    /// Takes events from every topic that matches, beside those of the event types: those that are there, and those that
    /// come to be. Where the transport cannot, `start` refuses.
    pub fn topics_like(mut self, pattern: TopicPattern) -> Self {
        self.about.more.push(pattern);
        self
    }

    /// Puts something around the chain of this event type, inside of what was put around it before.
    pub fn middleware(mut self, middleware: impl Middleware<E>) -> Self {
        self.stack.push(Arc::new(middleware));
        self
    }

    /// Puts something around the chains of all event types of this subscription, those behind `.and()` included, inside of
    /// what the bus puts around all of its.
    pub fn middleware_for_all(mut self, middleware: impl Middleware) -> Self {
        self.about.for_all.push(Arc::new(middleware));
        self
    }

    /// Lets the chain of this event type survive the death of its process in the middle of it: it ends all done or all
    /// compensated, or as a dead letter that says which compensation failed.
    ///
    /// Messages are taken into the inbox before they are handled, and each step runs in a transaction of its own
    /// ([`Context::tx`](super::Context::tx)), so it needs an event log with transactions and an inbox. A step that a process
    /// died in is taken back, whether it had happened or not: guard effects by a [`Barrier`](super::Barrier).
    pub fn durable(mut self) -> Self {
        self.is_durable = true;
        self
    }

    /// Adds a step that is a type of its own, with its compensation.
    pub fn step<H: Handler<E>>(self, handler: H) -> Subscribing<E, S, AtStep> {
        let handler = Arc::new(handler);
        let compensate = Some(Box::new(Compensate(handler.clone())) as Box<dyn Run<E>>);
        let (order, on_failure) = (handler.order(), handler.on_failure());
        let mut with_step = self.push(type_name::<H>(), Box::new(Execute(handler)), compensate);
        with_step.edit(|step| (step.order, step.on_failure) = (order, on_failure));
        with_step
    }

    fn push<T>(
        mut self,
        name: &'static str,
        run: Box<dyn Run<E>>,
        compensate: Option<Box<dyn Run<E>>>,
    ) -> Subscribing<E, S, T> {
        self.steps.push(Step {
            name: Cow::Borrowed(name),
            run,
            compensate,
            timeout: None,
            order: None,
            on_failure: OnFailure::default(),
        });
        self.moved()
    }

    fn moved<T>(self) -> Subscribing<E, S, T> {
        Subscribing {
            about: self.about,
            steps: self.steps,
            stack: self.stack,
            is_durable: self.is_durable,
            state: self.state,
            at: PhantomData,
        }
    }

    fn edit(&mut self, change: impl FnOnce(&mut Step<E>)) {
        if let Some(step) = self.steps.last_mut() {
            change(step);
        }
    }
}

impl<E: Event, S> Subscribing<E, S, Empty> {
    fn batched(mut self, how: Batch, name: &'static str, run: Box<dyn RunBatch<E>>) -> Subscribing<E, S, Batched> {
        let is_transactional = self.about.for_all.iter().any(|layer| layer.transaction().is_some());
        let misplaced = (!self.stack.is_empty())
            .then_some("middleware")
            .or(self.is_durable.then_some("durable()"))
            .or(is_transactional.then_some("Transactional"));
        let for_all = self.about.for_all.clone();
        let checked = match misplaced {
            None => for_all.iter().try_for_each(|layer| layer.check()),
            Some(what) => Err(
                Error::new(ErrorKind::Config, "batch handlers do not support this setting")
                    .with("what", what)
                    .with("type", E::kind()),
            ),
        };
        let chain = checked.map(|()| Arc::new(BatchChain::<E>::new(how, name, run, for_all)) as Arc<dyn AnyChain>);
        self.about.finished.push(chain);
        self.stack.clear();
        self.moved()
    }
}

impl<E: Event, S> Subscribing<E, S, AtStep> {
    /// What the step before is called in errors and logs, in place of the name of its function.
    pub fn named(mut self, name: impl Into<Cow<'static, str>>) -> Self {
        self.edit(|step| step.name = name.into());
        self
    }

    /// How long the step before may take, by the bus's clock: then it is cut off where it waits, and has failed. Its
    /// compensation has as long.
    pub fn timeout(mut self, longest: Duration) -> Self {
        self.edit(|step| step.timeout = Some(longest));
        self
    }

    /// Where the step before stands in its chain, in place of where it is written: the lowest first. All steps of a chain
    /// declare it, or none.
    pub fn order(mut self, order: i32) -> Self {
        self.edit(|step| step.order = Some(order));
        self
    }

    /// What the failure of the step before means for its chain.
    pub fn on_failure(mut self, policy: OnFailure) -> Self {
        self.edit(|step| step.on_failure = policy);
        self
    }

    /// Another event type in the same group and consumer, with a chain of its own.
    pub fn and<E2: Event>(self) -> Subscribing<E2, S> {
        self.finished().next_type()
    }

    /// Joins the group and begins to handle.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] or [`ErrorKind::Invalid`] if the description makes no sense; [`ErrorKind::Unsupported`] if
    /// the transport or the log cannot give what it asks for; [`ErrorKind::Unavailable`] if the broker or the log cannot be
    /// reached.
    pub async fn start(self) -> Result<Running> {
        self.finished().about.start().await
    }

    /// The chain of this event type is complete.
    fn finished(mut self) -> Self {
        let steps = Steps::new(std::mem::take(&mut self.steps), self.is_durable);
        let stack = std::mem::take(&mut self.stack);
        let for_all = self.about.for_all.clone();
        let chain = steps.and_then(|steps| Chain::new(for_all, stack, steps).checked());
        self.about
            .finished
            .push(chain.map(|chain| Arc::new(chain) as Arc<dyn AnyChain>));
        self
    }
}

impl<E: Event, S> Subscribing<E, S, Batched> {
    /// Another event type in the same group and consumer, with a chain of its own.
    pub fn and<E2: Event>(self) -> Subscribing<E2, S> {
        self.next_type()
    }

    /// Joins the group and begins to handle.
    ///
    /// # Errors
    /// As that of a chain of steps.
    pub async fn start(self) -> Result<Running> {
        self.about.start().await
    }
}

impl<E: Event, S, At> Subscribing<E, S, At> {
    fn next_type<E2: Event>(self) -> Subscribing<E2, S> {
        Subscribing {
            about: self.about,
            steps: Vec::new(),
            stack: Vec::new(),
            is_durable: false,
            state: self.state,
            at: PhantomData,
        }
    }
}

impl<E: Event, S, At> fmt::Debug for Subscribing<E, S, At> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscribing")
            .field("group", &self.about.group)
            .field("event", &E::NAME)
            .field("steps", &self.steps.iter().map(|s| &s.name).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl<S> fmt::Debug for With<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("With(…)")
    }
}
