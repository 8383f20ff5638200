use crate::{
    Error, ErrorKind, Result,
    clock::{Clock, Moment},
};
use std::{
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU64, Ordering},
    },
    time::Duration,
};
use tokio_util::task::AbortOnDropHandle;

/// How long a session still holds what it claimed: shared between the session, which renews it, and the engine, which
/// asks before each hand-over to a broker.
///
/// It ends for good. A session that loses its lease and gets it again has another `Lease`, so records claimed under the
/// first are never taken for held. Counted on this process's monotonic clock from *before* a renewal was sent, less a
/// margin, so that it ends here before it ends for the others, whatever the wall clocks do. (Kleppmann's argument for
/// fencing is why settles are fenced besides.)
#[derive(Clone)]
pub struct Lease {
    clock: Arc<dyn Clock>,
    /// Nanoseconds on `clock`; 0 once it has ended.
    until: Arc<AtomicU64>,
}

impl Lease {
    /// The shortest length allowed.
    pub const SHORTEST: Duration = Duration::from_millis(300);

    /// A lease got by a request that was sent at `sent` (on `clock`), of `length` for the others.
    #[must_use]
    pub fn new(clock: Arc<dyn Clock>, sent: Moment, length: Duration) -> Self {
        Self {
            clock,
            until: Arc::new(AtomicU64::new(nanos(sent + Self::held_for(length)))),
        }
    }

    /// A lease that is not held.
    #[must_use]
    pub fn none(clock: Arc<dyn Clock>) -> Self {
        Self {
            clock,
            until: Arc::new(AtomicU64::new(0)),
        }
    }

    /// How long a lease of `length` counts as held here: four fifths of it. The last fifth is the margin.
    #[must_use]
    pub fn held_for(length: Duration) -> Duration {
        length - length / 5
    }

    /// How often a lease of `length` is renewed: every third of it.
    #[must_use]
    pub fn renewed_every(length: Duration) -> Duration {
        length / 3
    }

    /// Whether `length` can be kept: at least [`SHORTEST`](Lease::SHORTEST).
    ///
    /// # Errors
    /// [`ErrorKind::Config`] otherwise.
    pub fn check(length: Duration) -> Result<()> {
        if length >= Self::SHORTEST {
            return Ok(());
        }
        Err(
            Error::new(ErrorKind::Config, "the lease is too short to be renewed in time")
                .with("lease", format!("{length:?}"))
                .with("shortest", format!("{:?}", Self::SHORTEST)),
        )
    }

    /// What is left of it; `None` once it is over.
    #[must_use]
    pub fn remaining(&self) -> Option<Duration> {
        let until = self.until.load(Ordering::Acquire);
        match until.saturating_sub(nanos(self.clock.elapsed())) {
            0 => None,
            left => Some(Duration::from_nanos(left)),
        }
    }

    /// Whether it is held.
    #[must_use]
    pub fn is_held(&self) -> bool {
        self.remaining().is_some()
    }

    /// Whether the two are one lease.
    #[must_use]
    pub fn is_same(&self, other: &Self) -> bool {
        Arc::ptr_eq(&self.until, &other.until)
    }

    /// Records a renewal that was sent at `sent`. `false`, and the lease stays over, if it had run out before the
    /// answer came: others may have held it meanwhile.
    #[must_use]
    pub fn extend(&self, sent: Moment, length: Duration) -> bool {
        let new = nanos(sent + Self::held_for(length));
        let now = nanos(self.clock.elapsed());
        self.until
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |until| {
                (until > now).then_some(until.max(new))
            })
            .is_ok()
    }

    /// Renews it every third of `length` until it is over: the task a session keeps, and stops by dropping it.
    ///
    /// `renew` answers whether the lease is still the session's; an error is tried again sooner, while time is left.
    pub fn keep_renewed<F, Fut>(&self, length: Duration, renew: F) -> Renewal
    where
        F: Fn() -> Fut + Send + Sync + 'static,
        Fut: Future<Output = Result<bool>> + Send,
    {
        let lease = self.clone();
        let every = Self::renewed_every(length);
        Renewal(AbortOnDropHandle::new(tokio::spawn(async move {
            let mut pause = every;
            while lease.is_held() {
                lease.clock.sleep(pause).await;
                let sent = lease.clock.elapsed();
                pause = match renew().await {
                    Ok(true) if lease.extend(sent, length) => every,
                    Ok(_) => break,
                    Err(error) => {
                        tracing::warn!(%error, "a lease could not be renewed, trying again");
                        every / 8
                    }
                };
            }
            lease.end();
        })))
    }

    /// Ends it now: a renewal was refused, or the session is closing.
    pub fn end(&self) {
        self.until.store(0, Ordering::Release);
    }
}

/// The task that renews a lease: a session keeps it. Dropping it ends the renewal; the lease then runs out.
#[derive(Debug)]
#[must_use = "dropping it ends the renewal"]
pub struct Renewal(#[allow(dead_code)] AbortOnDropHandle<()>);

impl fmt::Debug for Lease {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Lease({:?} left)", self.remaining().unwrap_or_default())
    }
}

fn nanos(moment: Moment) -> u64 {
    u64::try_from(moment.since_the_beginning().as_nanos()).unwrap_or(u64::MAX)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::clock::ManualClock;

    #[test]
    fn it_ends_before_it_ends_for_the_others_and_for_good() {
        let clock = ManualClock::shared();
        let length = Duration::from_secs(15);
        let lease = Lease::new(clock.clone(), clock.elapsed(), length);
        clock.advance(Duration::from_secs(5));
        assert_eq!(lease.remaining(), Some(Duration::from_secs(7)));
        assert!(lease.extend(clock.elapsed(), length));
        assert_eq!(lease.remaining(), Some(Duration::from_secs(12)));
        clock.advance(Duration::from_secs(12));
        assert!(!lease.is_held());
        assert!(!lease.extend(clock.elapsed(), length));
        assert!(!lease.is_held());
    }

    #[test]
    fn a_wall_clock_that_jumps_does_not_matter() {
        let clock = ManualClock::shared();
        let lease = Lease::new(clock.clone(), clock.elapsed(), Duration::from_secs(10));
        clock.jump_to(clock.now() + Duration::from_secs(86_400));
        assert!(lease.is_held());
        clock.jump_to(clock.now() - Duration::from_secs(999_999));
        clock.advance(Duration::from_secs(8));
        assert!(!lease.is_held());
    }
}
