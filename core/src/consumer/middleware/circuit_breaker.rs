use super::{Context, HandlerError, HandlerResult, Middleware, Next};
use crate::{clock::Moment, consumer::HandlerErrorKind};
use std::{
    num::NonZeroU32,
    sync::{Mutex, PoisonError},
    time::Duration,
};

/// Stops trying when so many attempts in a row have failed: for a service that is down and does not say so. While it is
/// open, attempts are answered with [`unavailable`](HandlerError::unavailable), so the subscription pauses and nothing is
/// counted; after `wait` one is let through, and closes it if it succeeds. Permanent errors, which are the message's, do
/// not count. As in Nygard's "Release It!".
#[derive(Debug)]
pub struct CircuitBreaker {
    failures: NonZeroU32,
    wait: Duration,
    state: Mutex<State>,
}

#[derive(Debug, Clone, Copy)]
enum State {
    /// So many have failed in a row.
    Closed(u32),
    Open {
        until: Moment,
    },
    /// One has been let through.
    HalfOpen,
}

impl CircuitBreaker {
    /// Opens after so many failures in a row, for that long.
    #[must_use]
    pub fn new(failures: NonZeroU32, wait: Duration) -> Self {
        Self {
            failures,
            wait,
            state: Mutex::new(State::Closed(0)),
        }
    }

    fn may_try(&self, now: Moment) -> bool {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        match *state {
            State::Closed(_) => true,
            State::Open { until } if until <= now => {
                *state = State::HalfOpen;
                true
            }
            State::Open { .. } | State::HalfOpen => false,
        }
    }

    fn answered(&self, result: &HandlerResult, now: Moment) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        let counts = |error: &HandlerError| {
            matches!(
                error.kind(),
                HandlerErrorKind::Transient | HandlerErrorKind::RetryAfter(_) | HandlerErrorKind::Unavailable
            )
        };
        *state = match (&*state, result) {
            (State::Closed(before), Err(error)) if counts(error) => {
                if before + 1 >= self.failures.get() {
                    tracing::warn!(failures = before + 1, wait = ?self.wait, error = error.to_chain(), "the circuit breaker opens");
                    State::Open { until: now + self.wait }
                } else {
                    State::Closed(before + 1)
                }
            }
            (State::HalfOpen, Err(error)) if counts(error) => State::Open { until: now + self.wait },
            // One that was under way when it opened.
            (State::Open { until }, _) => State::Open { until: *until },
            _ => State::Closed(0),
        };
    }
}

/// Lets another one through if the one that was is cut off.
struct Trying<'a>(Option<&'a CircuitBreaker>);

impl Drop for Trying<'_> {
    fn drop(&mut self) {
        if let Some(breaker) = self.0 {
            let mut state = breaker.state.lock().unwrap_or_else(PoisonError::into_inner);
            if matches!(*state, State::HalfOpen) {
                *state = State::Open { until: Moment::ZERO };
            }
        }
    }
}

impl<E: Sync + 'static> Middleware<E> for CircuitBreaker {
    async fn execute(&self, ctx: &mut Context, event: &E, next: Next<'_, E>) -> HandlerResult {
        let clock = ctx.tools().clock.clone();
        if !self.may_try(clock.elapsed()) {
            return Err(HandlerError::unavailable("the circuit breaker is open"));
        }
        let mut trying = Trying(Some(self));
        let result = next.run(ctx, event).await;
        trying.0 = None;
        self.answered(&result, clock.elapsed());
        result
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_opens_lets_one_through_and_closes() {
        let secs = |n| Moment::new(Duration::from_secs(n));
        let breaker = CircuitBreaker::new(NonZeroU32::new(2).unwrap(), Duration::from_secs(10));
        let failed: HandlerResult = Err(HandlerError::from("no"));
        breaker.answered(&failed, secs(1));
        breaker.answered(&Err(HandlerError::permanent("the message's own")), secs(1));
        breaker.answered(&failed, secs(1));
        assert!(
            breaker.may_try(secs(1)),
            "a success or a permanent error begins the count anew"
        );
        breaker.answered(&failed, secs(1));
        assert!(!breaker.may_try(secs(10)));
        assert!(breaker.may_try(secs(11)), "one is let through");
        assert!(!breaker.may_try(secs(11)), "and only one");
        breaker.answered(&failed, secs(12));
        assert!(!breaker.may_try(secs(21)));
        assert!(breaker.may_try(secs(22)));
        breaker.answered(&Ok(()), secs(22));
        assert!(breaker.may_try(secs(22)));
    }
}
