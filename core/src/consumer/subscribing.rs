use super::{
    Handler, HandlerFn, Retry, Running, StatefulHandlerFn,
    chain::{AnyChain, Chain, Step},
    handler::{Bound, Compensate, Execute, Plain, Run},
    running::Counters,
    worker::{Shared, Worker},
};
use crate::{Bus, Error, ErrorKind, Event, GroupName, Result, Subscription, Topic};
use rustc_hash::FxHashMap;
use std::{any::type_name, fmt, marker::PhantomData, sync::Arc};
use tokio_util::task::TaskTracker;

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

/// A subscription being described; [`start`](Subscribing::start) starts it.
#[must_use = "a subscription does nothing until `.start().await`"]
pub struct Subscribing<E: Event, S = NoState, At = Empty> {
    about: About,
    steps: Vec<Step<E>>,
    state: S,
    at: PhantomData<fn() -> At>,
}

/// What does not depend on the event type.
struct About {
    bus: Bus,
    group: String,
    finished: Vec<Box<dyn AnyChain>>,
    max_in_flight: usize,
    ordered: Option<bool>,
    broadcast: bool,
    retry: Retry,
}

impl<E: Event> Subscribing<E> {
    pub(crate) fn new(bus: Bus, group: impl Into<String>) -> Self {
        Self {
            about: About {
                bus,
                group: group.into(),
                finished: Vec::new(),
                max_in_flight: 256,
                ordered: None,
                broadcast: false,
                retry: Retry::default(),
            },
            steps: Vec::new(),
            state: NoState(()),
            at: PhantomData,
        }
    }

    /// Hands `&S` to every handler, as its first argument: methods of `S` are handlers.
    pub fn state<S: Send + Sync + 'static>(self, state: impl Into<Arc<S>>) -> Subscribing<E, With<S>> {
        Subscribing {
            about: self.about,
            steps: Vec::new(),
            state: With(state.into()),
            at: PhantomData,
        }
    }
}

impl<E: Event, S, At> Subscribing<E, S, At> {
    /// Sets how many messages may be taken from the broker and not yet settled; 256 unless set.
    pub fn max_in_flight(mut self, messages: usize) -> Self {
        self.about.max_in_flight = messages;
        self
    }

    /// Does without the order of keys, which keyed events ask for by themselves: faster, and every transport can.
    pub fn unordered(mut self) -> Self {
        self.about.ordered = Some(false);
        self
    }

    /// Gives every instance of the application every event, from when it has started until it stops, in place of a share:
    /// for caches to be told, and screens to be refreshed. Nothing waits for an instance that is not there. Where the transport cannot, `start` refuses.
    pub fn broadcast(mut self) -> Self {
        self.about.broadcast = true;
        self
    }

    /// Sets how a chain is tried again in place.
    pub fn retry(mut self, retry: Retry) -> Self {
        self.about.retry = retry;
        self
    }

    /// Adds a step that is a type of its own, with its compensation.
    pub fn step<H: Handler<E>>(self, handler: H) -> Subscribing<E, S, AtStep> {
        let handler = Arc::new(handler);
        let compensate = Some(Box::new(Compensate(handler.clone())) as Box<dyn Run<E>>);
        self.push(type_name::<H>(), Box::new(Execute(handler)), compensate)
    }

    fn push<T>(
        mut self,
        name: &'static str,
        run: Box<dyn Run<E>>,
        compensate: Option<Box<dyn Run<E>>>,
    ) -> Subscribing<E, S, T> {
        self.steps.push(Step { name, run, compensate });
        self.moved()
    }

    fn moved<T>(self) -> Subscribing<E, S, T> {
        Subscribing {
            about: self.about,
            steps: self.steps,
            state: self.state,
            at: PhantomData,
        }
    }

    fn set_compensation(mut self, compensation: Box<dyn Run<E>>) -> Self {
        if let Some(step) = self.steps.last_mut() {
            step.compensate = Some(compensation);
        }
        self
    }
}

impl<E: Event, At> Subscribing<E, NoState, At> {
    /// Adds a step: an `async fn(&E, &mut Context) -> HandlerResult`, or an async closure that captures nothing.
    pub fn handler<F: HandlerFn<E>>(self, handler: F) -> Subscribing<E, NoState, AtStep> {
        self.push(type_name::<F>(), Box::new(Plain(handler)), None)
    }
}

impl<E: Event> Subscribing<E, NoState, AtStep> {
    /// How the step before is taken back when a later one fails.
    pub fn compensate<F: HandlerFn<E>>(self, compensation: F) -> Self {
        self.set_compensation(Box::new(Plain(compensation)))
    }
}

impl<E: Event, S: Send + Sync + 'static, At> Subscribing<E, With<S>, At> {
    /// Adds a step: an `async fn(&S, &E, &mut Context) -> HandlerResult`, such as a method of the state.
    pub fn handler<F: StatefulHandlerFn<S, E>>(self, handler: F) -> Subscribing<E, With<S>, AtStep> {
        let run = Box::new(Bound(self.state.0.clone(), handler));
        self.push(type_name::<F>(), run, None)
    }
}

impl<E: Event, S: Send + Sync + 'static> Subscribing<E, With<S>, AtStep> {
    /// How the step before is taken back when a later one fails.
    pub fn compensate<F: StatefulHandlerFn<S, E>>(self, compensation: F) -> Self {
        let run = Box::new(Bound(self.state.0.clone(), compensation));
        self.set_compensation(run)
    }
}

impl<E: Event, S> Subscribing<E, S, AtStep> {
    /// Another event type in the same group and consumer, with a chain of its own.
    pub fn and<E2: Event>(mut self) -> Subscribing<E2, S> {
        self.about.finished.push(Box::new(Chain::new(self.steps)));
        Subscribing {
            about: self.about,
            steps: Vec::new(),
            state: self.state,
            at: PhantomData,
        }
    }

    /// Joins the group and begins to handle.
    ///
    /// # Errors
    /// [`ErrorKind::Config`] or [`ErrorKind::Invalid`] if the description makes no sense; [`ErrorKind::Unsupported`] if
    /// the transport cannot give what it asks for; [`ErrorKind::Unavailable`] if the broker cannot be reached.
    pub async fn start(mut self) -> Result<Running> {
        self.about.finished.push(Box::new(Chain::new(self.steps)));
        self.about.start().await
    }
}

impl About {
    async fn start(self) -> Result<Running> {
        let bus = self.bus.clone();
        let group = GroupName::parse(self.group)?;
        self.retry.validate().map_err(|e| e.with("group", &group))?;
        if self.max_in_flight == 0 {
            let text = "max_in_flight is 0: it has to be at least 1";
            return Err(Error::new(ErrorKind::Config, text).with("group", group));
        }
        let ordered = self
            .ordered
            .unwrap_or_else(|| self.finished.iter().any(|chain| chain.keyed()));
        let mut topics: Vec<Topic> = Vec::new();
        let mut chains: FxHashMap<String, Box<dyn AnyChain>> = FxHashMap::default();
        for chain in self.finished {
            if !topics.contains(&chain.topic()) {
                topics.push(chain.topic());
            }
            let kind = chain.kind().into_owned();
            if chains.insert(kind.clone(), chain).is_some() {
                let text = "a group has two chains for one event type: put their steps in one chain";
                return Err(Error::new(ErrorKind::Config, text)
                    .with("type", kind)
                    .with("group", group));
            }
        }
        if bus.log().is_none() && !bus.transport().capabilities().dead_letter {
            let text = "a subscription needs somewhere for dead letters: an event log, or a transport that keeps them";
            return Err(Error::new(ErrorKind::Unsupported, text).with("group", group));
        }
        let mut subscription = Subscription::new(group.clone(), topics).with_max_in_flight(self.max_in_flight);
        subscription.ordered = ordered;
        subscription.broadcast = self.broadcast;
        let (stop, kill) = bus.new_part()?;
        let subscriber = bus.transport().subscriber(&subscription)?;
        let (intake, settling) = subscriber.subscribe(&subscription).await?.split();
        let group = Arc::new(group);
        let counters = Arc::new(Counters::default());
        let shared = Shared {
            group: group.clone(),
            chains,
            retry: self.retry,
            bus: bus.as_dyn(),
            log: bus.log().cloned(),
            clock: bus.clock().clone(),
            counters: counters.clone(),
            stop: stop.clone(),
        };
        let worker = Worker {
            shared: Arc::new(shared),
            intake,
            settling,
            max_in_flight: self.max_in_flight,
            ordered,
            kill: kill.clone(),
        };
        let tasks = TaskTracker::new();
        bus.spawn(tasks.track_future(worker.run()));
        tasks.close();
        let clock = bus.clock().clone();
        Ok(Running {
            group,
            counters,
            clock,
            stop,
            kill,
            tasks,
        })
    }
}

impl<E: Event, S, At> fmt::Debug for Subscribing<E, S, At> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Subscribing")
            .field("group", &self.about.group)
            .field("event", &E::NAME)
            .field("steps", &self.steps.iter().map(|s| s.name).collect::<Vec<_>>())
            .finish_non_exhaustive()
    }
}

impl<S> fmt::Debug for With<S> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("With(…)")
    }
}
