//! What becomes of a message, and where it can wait.

use super::{Retry, Verdict, context::Tools, gate::Gate};
use crate::{clock::Timestamp, log::AttemptError};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What became of a message.
#[derive(Debug)]
pub(super) enum Handled {
    Done,
    /// Not finished when the subscription was stopped, or asked to go back.
    Released,
    /// To wait in the inbox.
    Parked {
        /// `None`: as long as the backoff says.
        after: Option<Duration>,
        attempts: u32,
        errors: Vec<AttemptError>,
    },
    /// To wait behind another of its key.
    HeldBack,
    /// To wait with the broker.
    Retried {
        after: Duration,
    },
    /// A dead letter, with its attempts and errors.
    Dead {
        attempts: u32,
        errors: Vec<AttemptError>,
    },
}

impl Handled {
    pub(super) fn dead(at: Timestamp, why: impl Into<String>) -> Self {
        Self::Dead {
            attempts: 0,
            errors: vec![AttemptError::new(at, 0, why)],
        }
    }
}

/// Where a message came from, and so where it can wait.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    /// The broker.
    Broker {
        /// There is an inbox it can be parked in.
        parks: bool,
        /// The broker itself can deliver it again after a delay.
        delays: bool,
        /// The order of its key counts.
        ordered: bool,
    },
    /// The inbox, which makes one attempt at a time.
    Inbox,
}

/// What a chain is run with.
#[derive(Debug, Clone, Copy)]
pub(super) struct HandledBy<'a> {
    pub(super) retry: &'a Retry,
    pub(super) tools: &'a Tools,
    pub(super) gate: &'a Gate,
    /// What is done with a message whose attempts are exhausted, unless a middleware says something else.
    pub(super) on_exhausted: Verdict,
    /// Ends the waits between attempts, never an attempt.
    pub(super) stop: &'a CancellationToken,
    pub(super) origin: Origin,
    /// The attempts made before.
    pub(super) attempts: u32,
}

/// Where a message waits for its next attempt.
pub(super) enum Wait {
    Here(Duration),
    Inbox,
    Broker(Duration),
}

impl HandledBy<'_> {
    pub(super) fn parks(&self) -> bool {
        matches!(self.origin, Origin::Inbox | Origin::Broker { parks: true, .. })
    }

    pub(super) fn waits_with_broker(&self) -> bool {
        matches!(
            self.origin,
            Origin::Broker {
                delays: true,
                ordered: false,
                ..
            }
        )
    }

    pub(super) fn where_to_wait(&self, attempts: u32, told: Option<Duration>) -> Wait {
        let retry = self.retry;
        let wait = told.unwrap_or_else(|| retry.wait_after(attempts));
        let is_short = attempts < retry.in_place && wait <= retry.max_wait;
        match self.origin {
            Origin::Inbox => Wait::Inbox,
            Origin::Broker { .. } if is_short => Wait::Here(wait),
            Origin::Broker { parks: true, .. } => Wait::Inbox,
            Origin::Broker {
                delays: true,
                ordered: false,
                ..
            } => Wait::Broker(told.unwrap_or_else(|| retry.backoff.after(attempts, &mut fastrand::Rng::new()))),
            Origin::Broker { .. } => Wait::Here(wait),
        }
    }

    /// What a verdict makes of a message.
    pub(super) fn carry_out(&self, verdict: Verdict, attempts: u32, errors: Vec<AttemptError>) -> Handled {
        match (verdict, self.origin) {
            (Verdict::Ack, _) => Handled::Done,
            (Verdict::DeadLetter, _) => Handled::Dead { attempts, errors },
            (Verdict::Requeue, Origin::Broker { ordered: false, .. } | Origin::Broker { parks: false, .. }) => {
                Handled::Released
            }
            (
                Verdict::Retry { after },
                Origin::Broker {
                    parks: false,
                    delays: true,
                    ordered: false,
                },
            ) => Handled::Retried { after },
            (Verdict::Requeue | Verdict::Retry { .. }, _) => Handled::Parked {
                after: match verdict {
                    Verdict::Retry { after } => Some(after),
                    _ => None,
                },
                attempts,
                errors,
            },
        }
    }
}
