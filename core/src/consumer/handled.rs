//! What becomes of a message, and where it can wait.

use super::{HandlerError, HandlerErrorKind, Retry, Verdict, context::Tools, gate::Gate};
use crate::{
    Message,
    clock::{Timestamp, later},
    log::AttemptError,
};
use std::time::Duration;
use tokio_util::sync::CancellationToken;

/// What became of a message.
#[derive(Debug)]
pub(super) enum Handled {
    Done,
    /// Not handled: the inbox knew it. It may wait there itself, and those of its key with it.
    Dropped {
        waits: bool,
    },
    /// Not handled: nobody in the group handles its type.
    Ignored,
    /// To wait by itself for a service that is away, without an attempt.
    Deferred {
        after: Duration,
        attempts: u32,
        error: AttemptError,
    },
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
        attempts: u32,
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

/// What comes after a failed attempt.
pub(super) enum After {
    /// The next one, in place, after this wait.
    Here(Duration),
    /// No other here.
    Ends(Handled),
}

/// Where a message waits that does not wait in place.
enum Elsewhere {
    Inbox,
    Broker(Duration),
}

impl HandledBy<'_> {
    pub(super) fn parks(&self) -> bool {
        matches!(self.origin, Origin::Inbox | Origin::Broker { parks: true, .. })
    }

    fn waits_with_broker(&self) -> bool {
        matches!(
            self.origin,
            Origin::Broker {
                delays: true,
                ordered: false,
                ..
            }
        )
    }

    /// What comes after an attempt that found a service away which others can reach.
    pub(super) fn after_unavailable(&self, wait: Duration, attempts: u32, why: String) -> After {
        if !self.parks() {
            return After::Here(wait);
        }
        After::Ends(Handled::Deferred {
            after: wait,
            attempts,
            error: AttemptError::new(self.tools.clock.now(), 0, why),
        })
    }

    /// Tells of a message that waits: an operator sees it before it is a dead letter.
    pub(super) fn tell_of_waiting(&self, message: &Message, handled: &Handled, error: &HandlerError) {
        let (after, attempt, what) = match handled {
            Handled::Parked {
                after: Some(after),
                attempts,
                ..
            } => (
                *after,
                *attempts,
                "an attempt failed: the message waits in the inbox for the next one",
            ),
            Handled::Retried { after, attempts } => {
                let what = "an attempt failed: the message waits with the broker for the next one";
                (*after, *attempts, what)
            }
            _ => return,
        };
        let due = later(self.tools.clock.now(), after);
        tracing::warn!(
            message = %message.id(), topic = %message.topic(), group = %self.tools.group, attempt,
            of = self.retry.max_attempts, due = %due.to_rfc3339(), error = error.to_chain(), "{what}"
        );
    }

    /// Tells of a message that was handled after it had waited for that.
    pub(super) fn tell_of_recovery(&self, message: &Message, failed: u32) {
        if self.attempts > 0 {
            tracing::info!(
                message = %message.id(), topic = %message.topic(), group = %self.tools.group, attempt = failed + 1,
                of = self.retry.max_attempts, "the message was handled, after attempts that failed"
            );
        }
    }

    /// What comes after an attempt that failed with `error`: with a verdict if it was the last.
    pub(super) fn after_failure(
        &self,
        message: &Message,
        error: &HandlerError,
        attempts: u32,
        errors: &mut Vec<AttemptError>,
        verdict: Option<Verdict>,
    ) -> After {
        let told = match error.kind() {
            HandlerErrorKind::RetryAfter(wait) => Some(wait),
            _ => None,
        };
        let ends = match verdict {
            Some(verdict) => self.carry_out(verdict, attempts, std::mem::take(errors)),
            None => match self.wait(attempts, told) {
                Ok(wait) => return After::Here(wait),
                Err(Elsewhere::Inbox) => Handled::Parked {
                    after: Some(told.unwrap_or_else(|| self.backoff(attempts))),
                    attempts,
                    errors: std::mem::take(errors),
                },
                Err(Elsewhere::Broker(after)) => Handled::Retried { after, attempts },
            },
        };
        match ends {
            // There is nowhere else to wait.
            Handled::Parked {
                after, errors: kept, ..
            } if !self.parks() => {
                *errors = kept;
                After::Here(after.unwrap_or(self.retry.max_wait))
            }
            ends => {
                self.tell_of_waiting(message, &ends, error);
                After::Ends(ends)
            }
        }
    }

    pub(super) fn backoff(&self, attempts: u32) -> Duration {
        self.retry.backoff.after(attempts, &mut fastrand::Rng::new())
    }

    /// How long to wait in place, or where else.
    fn wait(&self, attempts: u32, told: Option<Duration>) -> Result<Duration, Elsewhere> {
        let retry = self.retry;
        let wait = told.unwrap_or_else(|| retry.wait_after(attempts));
        let is_short = attempts < retry.in_place && wait <= retry.max_wait;
        match self.origin {
            Origin::Inbox => Err(Elsewhere::Inbox),
            Origin::Broker { .. } if is_short => Ok(wait),
            Origin::Broker { parks: true, .. } => Err(Elsewhere::Inbox),
            Origin::Broker {
                delays: true,
                ordered: false,
                ..
            } => {
                let after = told.unwrap_or_else(|| self.backoff(attempts));
                Err(Elsewhere::Broker(after))
            }
            Origin::Broker { .. } => Ok(wait),
        }
    }

    /// What a verdict makes of a message.
    fn carry_out(&self, verdict: Verdict, attempts: u32, errors: Vec<AttemptError>) -> Handled {
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
            ) => Handled::Retried { after, attempts },
            (Verdict::Requeue | Verdict::Retry { .. }, _) => Handled::Parked {
                after: match verdict {
                    Verdict::Retry { after } => Some(after),
                    _ => Some(self.backoff(attempts)),
                },
                attempts,
                errors,
            },
        }
    }

    /// The same of a message that cannot be decoded, which it will no better for waiting in place.
    pub(super) fn carry_out_undecoded(
        &self,
        message: &Message,
        error: &HandlerError,
        verdict: Verdict,
        errors: Vec<AttemptError>,
    ) -> Handled {
        let handled = match verdict {
            Verdict::Retry { .. } | Verdict::Requeue if !self.parks() && !self.waits_with_broker() => Handled::Dead {
                attempts: self.attempts,
                errors,
            },
            verdict => self.carry_out(verdict, self.attempts, errors),
        };
        self.tell_of_waiting(message, &handled, error);
        handled
    }
}
