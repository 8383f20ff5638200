//! The inbox of a group: what waits in it, and the relay that takes it through the chains when it is due.

use super::{
    Context,
    handled::{Handled, HandledBy, Origin},
    members::Who,
    shared::Shared,
};
use crate::{
    Delivery, Error, ErrorKind, Mailbox, Message, Reachability,
    log::{Admission, Arrival, AttemptError, Lease, NewRecord, Placement},
    publisher::Outcomes,
    relay::{Attempts, Refusal},
};
use async_trait::async_trait;
use std::{sync::Arc, time::Duration};
use tokio_util::task::AbortOnDropHandle;

/// Between tries to reach a log that failed.
pub(super) const PAUSE: Duration = Duration::from_millis(500);
/// How long a message waits in the inbox of whose type this process knows another version, or none: for one that handles it.
pub(super) const ANOTHER_VERSION: Duration = Duration::from_secs(5);

/// How long a message waits whose handling panicked outside of its handlers.
const AFTER_A_PANIC: Duration = Duration::from_secs(30);

/// Takes what is due in the inbox through its chain, one record a call.
#[derive(Debug)]
pub(super) struct FromInbox(pub(super) Arc<Shared>);

#[async_trait]
impl Attempts for FromInbox {
    fn per_call(&self) -> usize {
        1
    }

    fn has_destinations(&self) -> bool {
        false
    }

    async fn attempt(&self, batch: &[Message], attempts: &[u32], lease: &Lease, _: &Outcomes) -> Result<(), Refusal> {
        match (batch, attempts) {
            ([message], [attempts]) => {
                // A task of its own: a handler that computes or blocks does not hold up the relay.
                let (shared, message, attempts, lease) = (self.0.clone(), message.clone(), *attempts, lease.clone());
                let handling = async move { shared.handle_parked(&message, attempts, lease).await };
                match AbortOnDropHandle::new(self.0.from_inbox.spawn(handling)).await {
                    Ok(outcome) => outcome,
                    Err(_) => {
                        self.0.panicked();
                        Err(Refusal::Deferred {
                            why: "the handling of the message panicked".to_owned(),
                            after: AFTER_A_PANIC,
                        })
                    }
                }
            }
            _ => Err(Refusal::HeldBack),
        }
    }

    async fn have_ended(&self, limit: Duration) -> bool {
        let handlings = &self.0.from_inbox;
        handlings.close();
        let ended = tokio::time::timeout(limit, handlings.wait()).await.is_ok();
        handlings.reopen();
        ended
    }

    async fn stands_by(&self) -> bool {
        match &self.0.members {
            Some(members) => members.is_outdone().await,
            None => false,
        }
    }

    async fn check(&self) -> Reachability {
        Reachability::Unknown
    }
}

impl Shared {
    /// The last error, as the relay writes it down; the ones before it it has written already.
    async fn handle_parked(&self, message: &Message, attempts: u32, lease: Lease) -> Result<(), Refusal> {
        let Some(chain) = self.chains.get(message.kind()) else {
            return Err(self.parked_for_another(message).await);
        };
        let mut ctx = Context::new(message.clone(), self.tools.clone());
        ctx.was_parked = true;
        ctx.lease = Some(lease);
        let by = HandledBy {
            retry: &self.retry,
            tools: &self.tools,
            gate: &self.gate,
            on_exhausted: self.on_exhausted,
            stop: &self.stop,
            origin: Origin::Inbox,
            attempts,
        };
        let why = |errors: Vec<AttemptError>| errors.into_iter().next_back().map(|e| e.text).unwrap_or_default();
        match chain.handle(&mut ctx, &by).await {
            Handled::Done => {
                self.counters.handled(1);
                Ok(())
            }
            Handled::Dropped { .. } => {
                self.counters.dropped(1);
                Ok(())
            }
            Handled::Ignored => Ok(()),
            Handled::Deferred { after, error, .. } => Err(Refusal::Deferred { why: error.text, after }),
            Handled::Parked { after, errors, .. } => Err(Refusal::Rejected {
                why: why(errors),
                after,
            }),
            Handled::Dead { errors, .. } => {
                self.counters.dead_lettered(1);
                Err(Refusal::Invalid { why: why(errors) })
            }
            // (Nothing that comes from the inbox waits with the broker.)
            Handled::HeldBack | Handled::Released | Handled::Retried { .. } => Err(Refusal::HeldBack),
        }
    }

    /// What becomes of a message in the inbox whose type this member lacks.
    async fn parked_for_another(&self, message: &Message) -> Refusal {
        let why = format!("this member of the group does not handle {}", message.kind());
        let Some(members) = &self.members else {
            return Refusal::Deferred {
                why,
                after: ANOTHER_VERSION,
            };
        };
        match self.who_handles(members, message).await {
            None => Refusal::HeldBack,
            Some(Who::Running) => Refusal::Elsewhere { why },
            Some(Who::Recent) => Refusal::Deferred {
                why,
                after: ANOTHER_VERSION,
            },
            // Another version of a type it handles: the next deploy brings it.
            Some(Who::Nobody { .. }) if self.another_version(message).is_some() => {
                self.warn_once(message, "it waits for a member that handles this version of the type");
                Refusal::Deferred {
                    why,
                    after: ANOTHER_VERSION,
                }
            }
            Some(Who::Nobody { .. }) => Refusal::Invalid {
                why: format!("no member of the group has handled {} for a day", message.kind()),
            },
        }
    }

    pub(super) fn inbox(&self) -> Mailbox {
        Mailbox::Inbox((*self.group).clone())
    }

    /// Writes records into the inbox, however long an outage takes: what they are about is not acknowledged before.
    pub(super) async fn store(&self, records: &[NewRecord]) -> Stored {
        let Some(log) = &self.tools.log else {
            return Stored::Stopped;
        };
        while let Err(error) = log.store().append(&self.inbox(), records).await {
            if is_of_a_record(&error) {
                tracing::error!(group = %self.group, records = records.len(), error = error.to_chain(), "the inbox refuses a record");
                self.gate.log_is_back();
                return Stored::Refused;
            }
            tracing::warn!(group = %self.group, records = records.len(), error = error.to_chain(), "the inbox cannot be written to, it will be tried again");
            if error.kind() != ErrorKind::Busy {
                self.gate.log_is_away(error.to_chain());
            }
            if self
                .stop
                .run_until_cancelled(self.tools.clock.sleep(PAUSE))
                .await
                .is_none()
            {
                return Stored::Stopped;
            }
        }
        self.gate.log_is_back();
        self.wake.committed();
        Stored::Yes
    }

    /// What the inbox knows of deliveries; `None` if the subscription was stopped before it answered.
    pub(super) async fn look(&self, deliveries: &[Delivery]) -> Option<Vec<Admission>> {
        let arrivals: Vec<Arrival> = deliveries
            .iter()
            .map(|delivery| Arrival::new(delivery.message()).ordered(self.ordered))
            .collect();
        match self.ask(&arrivals).await? {
            Some(answers) => Some(answers),
            None => {
                // One of them makes no sense to the log: it can neither wait there nor be known there.
                let mut answers = Vec::with_capacity(arrivals.len());
                for arrival in &arrivals {
                    let answer = self.ask(std::slice::from_ref(arrival)).await?;
                    answers.push(
                        answer
                            .and_then(|answers| answers.first().copied())
                            .unwrap_or(Admission::New),
                    );
                }
                Some(answers)
            }
        }
    }

    /// Asks the inbox, however long an outage takes: `Some(None)` if it refuses the question.
    #[allow(clippy::option_option)]
    async fn ask(&self, arrivals: &[Arrival]) -> Option<Option<Vec<Admission>>> {
        let inbox = self.tools.log.as_ref().and_then(|log| log.inbox().ok())?;
        loop {
            match inbox.look(&self.group, arrivals).await {
                Ok(answers) => {
                    self.gate.log_is_back();
                    return Some(Some(answers));
                }
                Err(error) if is_of_a_record(&error) => {
                    tracing::warn!(group = %self.group, messages = arrivals.len(), error = error.to_chain(), "the inbox refuses a question");
                    self.gate.log_is_back();
                    return Some(None);
                }
                Err(error) => {
                    tracing::warn!(group = %self.group, error = error.to_chain(), "the inbox cannot be asked, it will be tried again");
                    if error.kind() != ErrorKind::Busy {
                        self.gate.log_is_away(error.to_chain());
                    }
                }
            }
            self.stop.run_until_cancelled(self.tools.clock.sleep(PAUSE)).await?;
        }
    }
}

/// Whether records were written into the inbox.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stored {
    /// They were.
    Yes,
    /// The subscription was stopped before it came to that.
    Stopped,
    /// The log will never take one of them.
    Refused,
}

/// Whether an error of the log says something about a record, and nothing about the log.
fn is_of_a_record(error: &Error) -> bool {
    matches!(error.kind(), ErrorKind::Invalid)
}

/// A record that waits, or a dead letter.
pub(super) fn record(message: &Message, placement: Placement) -> NewRecord {
    NewRecord::new(message.clone()).placed(placement)
}

/// Waits behind another of its key.
pub(super) fn behind() -> Placement {
    Placement::Parked {
        after: Duration::ZERO,
        attempts: 0,
        errors: Vec::new(),
    }
}
