//! The start of a subscription: what was described is checked, registered with its group, and run.

use super::{
    Layer, Running, SubscriptionOptions, Verdict,
    chain::AnyChain,
    context::Tools,
    gate::Gate,
    inbox::FromInbox,
    joining::Joining,
    members::Members,
    options::{OnExhausted, Unknown},
    running::Counters,
    shared::Shared,
    unacknowledged::Unacknowledged,
};
use crate::{
    AnyEvent, Bus, Error, ErrorKind, GroupName, Mailbox, RelayOptions, Result, Subscription, Topic,
    clock::check_timers,
    health::{Part, PartState, Status},
    log::{GroupMember, Owner},
    relay::{TopicPattern, Wake},
    supervise::{self, supervise},
};
use rustc_hash::FxHashMap;
use std::{
    sync::{Arc, Mutex, atomic::AtomicUsize},
    time::Duration,
};
use tokio::sync::oneshot;
use tokio_util::task::TaskTracker;

/// What does not depend on the event type.
pub(super) struct About {
    pub(super) bus: Bus,
    pub(super) group: String,
    pub(super) finished: Vec<Result<Arc<dyn AnyChain>>>,
    pub(super) for_all: Vec<Layer<AnyEvent>>,
    /// Topics beside those of the event types.
    pub(super) more: Vec<TopicPattern>,
    pub(super) options: SubscriptionOptions,
}

/// How long receipts are kept unless somebody says otherwise.
const RECEIPTS: Duration = Duration::from_secs(7 * 24 * 3600);
/// How long a start waits for the first try to join; after that it goes on in the background.
const FIRST_JOIN: Duration = Duration::from_secs(3);
/// The most messages of the inbox that are being handled at once.
const FROM_INBOX_AT_ONCE: usize = 32;

impl About {
    pub(super) async fn start(self) -> Result<Running> {
        check_timers()?;
        let bus = self.bus.clone();
        let group = GroupName::parse(self.group)?;
        let of_configuration = bus.subscription_options(&group).cloned().unwrap_or_default();
        let options = self.options.overridden_by(&of_configuration);
        options.validate().map_err(|e| e.with("group", &group))?;
        let chains: Vec<_> = self
            .finished
            .into_iter()
            .collect::<Result<_>>()
            .map_err(|e| e.with("group", &group))?;
        let is_broadcast = options.broadcast.unwrap_or(false);
        let ordered = options
            .ordered
            .unwrap_or_else(|| chains.iter().any(|chain| chain.keyed()));
        let log = bus.log().cloned();
        // Instances of a broadcast have no names that last, so nothing waits for them.
        let parks = !is_broadcast && log.as_ref().is_some_and(|log| log.inbox().is_ok());
        let can = *bus.transport().capabilities();
        if log.is_none() && !can.dead_letter {
            let text = "a subscription needs somewhere for dead letters: an event log, or a transport that keeps them";
            return Err(Error::new(ErrorKind::Unsupported, text).with("group", group));
        }
        let mut topics: Vec<Topic> = Vec::new();
        let mut by_kind: FxHashMap<String, Arc<dyn AnyChain>> = FxHashMap::default();
        for chain in chains {
            if chain.admits() || chain.is_durable() {
                needs_transactions(&bus, &*chain, parks).map_err(|e| e.with("group", &group))?;
            }
            if !topics.contains(&chain.topic()) {
                topics.push(chain.topic());
            }
            let kind = chain.kind().into_owned();
            if by_kind.insert(kind.clone(), chain).is_some() {
                let text = "a group has two chains for one event type: put their steps in one chain";
                return Err(Error::new(ErrorKind::Config, text)
                    .with("type", kind)
                    .with("group", group));
            }
        }
        let mut patterns = Vec::new();
        for more in self.more {
            match more.as_topic() {
                Some(topic) if topics.contains(&topic) => {}
                Some(topic) => topics.push(topic),
                None => patterns.push(more),
            }
        }
        let max_in_flight = options.max_in_flight.unwrap_or(256);
        let mut subscription = Subscription::new(group.clone(), topics).with_max_in_flight(max_in_flight);
        subscription.ordered = ordered;
        subscription.broadcast = is_broadcast;
        subscription.patterns = patterns;
        subscription.queue = options.queue();
        let (stop, kill) = bus.new_part()?;
        let subscriber = bus.transport().subscriber(&subscription)?.clone();
        // Broadcasts share nothing, so they do not get in each other's way.
        let in_group = bus.enter_group(&group);
        if in_group.is_none() && !is_broadcast {
            let text =
                "a subscription of this group runs on this bus already: add the event type to it with `.and::<E>()`";
            return Err(Error::new(ErrorKind::Config, text).with("group", group));
        }
        let retry = options.retry.unwrap_or_default();
        let status = Status::new(
            Part::Subscription(group.clone()),
            bus.clock().clone(),
            PartState::Connecting,
        );
        let inbox = log
            .as_ref()
            .filter(|_| parks)
            .map(|log| log.inbox())
            .transpose()?
            .cloned();
        let members = inbox.map(|inbox| {
            let asked_for = subscription.topics.iter().cloned().map(TopicPattern::from);
            let asked_for: Vec<TopicPattern> = asked_for.chain(subscription.patterns.iter().cloned()).collect();
            let topics = asked_for.iter().map(TopicPattern::as_str);
            let me = GroupMember::new(Owner::new(), by_kind.keys().map(String::as_str), topics);
            Members::new(inbox, group.clone(), me, asked_for)
        });
        let shared = Arc::new(Shared {
            tools: Arc::new(Tools {
                group: group.clone(),
                bus: bus.clone(),
                log,
                clock: bus.clock().clone(),
                ordered,
            }),
            group: Arc::new(group.clone()),
            any_gathers: by_kind.values().any(|chain| chain.gathering().is_some()),
            // What waits must not be overtaken, what was parked not handled twice. Chains that admit ask by themselves.
            asks_the_inbox: parks && by_kind.values().any(|chain| !chain.admits()),
            chains: by_kind,
            retry,
            gate: Gate::of(status.clone()),
            wake: Arc::new(Wake::default()),
            counters: Arc::new(Counters::default()),
            stop: stop.clone(),
            max_in_flight: AtomicUsize::new(max_in_flight),
            ordered,
            parks,
            has_dead_letters: can.dead_letter,
            counts_deliveries: can.delivery_count,
            young: AtomicUsize::new(0),
            delays: can.delayed_retry,
            on_exhausted: match options.on_exhausted.unwrap_or_default() {
                OnExhausted::DeadLetter => Verdict::DeadLetter,
                OnExhausted::Requeue => Verdict::Requeue,
            },
            dead_letter_unknown: options.unknown == Some(Unknown::DeadLetter),
            members,
            from_inbox: TaskTracker::new(),
            suspects: tokio::sync::Semaphore::new(1),
            warned: Mutex::default(),
            lag: Mutex::default(),
            unacknowledged: Unacknowledged::default(),
            status: status.clone(),
            connected: tokio::sync::watch::Sender::new(false),
        });
        let tasks = TaskTracker::new();
        // Before it joins: from then on no other member acknowledges what this one handles.
        if let Some(members) = &shared.members {
            members.register().await.map_err(|e| e.with("group", &group))?;
        }
        // The inbox first: what is parked from now on finds its relay.
        if parks {
            let of_inbox = RelayOptions {
                local_max_attempts: 1,
                max_attempts: u32::MAX,
                backoff: retry.backoff,
                max_publishing: FROM_INBOX_AT_ONCE,
                batch_size: 2 * FROM_INBOX_AT_ONCE,
                max_in_flight: 8 * FROM_INBOX_AT_ONCE,
                topics: if ordered {
                    bus.relay_options().topics_of_inbox()
                } else {
                    Vec::new()
                },
                on_exhausted: None,
                ..bus.relay_options().clone()
            };
            let mailbox = Mailbox::Inbox(group.clone());
            let receipts = options.receipts.unwrap_or(RECEIPTS);
            let attempts = Arc::new(FromInbox(shared.clone()));
            let parts = bus.relay_parts(mailbox, of_inbox, attempts, shared.wake.clone())?;
            let session = bus.open_session(&parts).await?;
            bus.spawn_relay(parts, session, Some(receipts), &tasks, &stop, &kill);
        }
        bus.board().show(status.clone());
        let (first, joined) = oneshot::channel();
        let joining = Arc::new(Joining::new(
            shared.clone(),
            subscriber,
            subscription,
            kill.clone(),
            first,
        ));
        let clock = bus.clock().clone();
        let part = supervise(status.clone(), clock.clone(), stop.clone(), move || {
            joining.clone().run()
        });
        let run = async move {
            part.await;
            drop(in_group);
        };
        bus.spawn(tasks.track_future(run));
        if shared.members.is_some() {
            let (shared, stop) = (shared.clone(), stop.clone());
            let renewing = supervise(status, clock.clone(), stop.clone(), move || {
                let (shared, stop) = (shared.clone(), stop.clone());
                async move {
                    if let Some(members) = &shared.members {
                        members
                            .keep_registered(&*shared.tools.clock, &shared.status, &stop)
                            .await;
                    }
                    supervise::Next::Ended
                }
            });
            bus.spawn(tasks.track_future(renewing));
        }
        tasks.close();
        let joined = tokio::select! {
            biased;
            joined = joined => joined.unwrap_or(Ok(())),
            // It goes on trying.
            () = clock.sleep(FIRST_JOIN) => Ok(()),
        };
        match joined {
            Err(error)
                if !matches!(
                    error.kind(),
                    ErrorKind::Unavailable
                        | ErrorKind::Busy
                        | ErrorKind::Conflict
                        | ErrorKind::Closed
                        | ErrorKind::LeaseLost
                ) =>
            {
                stop.cancel();
                kill.cancel();
                let _ = tokio::time::timeout(FIRST_JOIN, tasks.wait()).await;
                Err(error)
            }
            _ => Ok(Running { shared, kill, tasks }),
        }
    }
}

/// What is handled in transactions needs a log that has them, and an inbox.
fn needs_transactions(bus: &Bus, chain: &dyn AnyChain, parks: bool) -> Result<()> {
    let what = if chain.is_durable() {
        "durable()"
    } else {
        "Transactional"
    };
    let needs = |error: Error| error.with("what", what).with("type", chain.kind());
    let Some(log) = bus.log() else {
        let text = "this needs an event log: build the bus with `.log(…)`";
        return Err(needs(Error::new(ErrorKind::Unsupported, text)));
    };
    log.transactions().map_err(needs)?;
    log.inbox().map_err(needs)?;
    if !parks {
        let text = "this needs an inbox, and instances of a broadcast have none";
        return Err(needs(Error::new(ErrorKind::Unsupported, text)));
    }
    Ok(())
}
