//! Deliveries that are gathered to be handled together.

use super::chain::AnyChain;
use crate::{
    Delivery,
    clock::{Clock, Moment},
};
use std::{num::NonZeroUsize, sync::Arc, time::Duration};

/// How many batches may be handled at once: while so many are, what comes gathers into larger ones.
const AT_ONCE: usize = 4;

/// How deliveries are gathered that are handled together.
#[derive(Debug, Clone, Copy)]
pub(super) struct Gathering {
    pub(super) max: NonZeroUsize,
    /// How long to wait for more; not at all where they only share what is there at once.
    pub(super) wait: Duration,
}

/// What has been gathered, for each chain.
#[derive(Default)]
pub(super) struct Gatherings {
    gathered: Vec<Gathered>,
    len: usize,
    /// Batches being handled.
    under_way: usize,
}

struct Gathered {
    chain: Arc<dyn AnyChain>,
    how: Gathering,
    deliveries: Vec<(Delivery, Option<u64>)>,
    /// When the first of them came.
    since: Moment,
}

type Batch = Vec<(Delivery, Option<u64>)>;

impl Gatherings {
    pub(super) fn len(&self) -> usize {
        self.len
    }

    pub(super) fn add(&mut self, chain: Arc<dyn AnyChain>, delivery: Delivery, key: Option<u64>, clock: &dyn Clock) {
        self.len += 1;
        let kind = chain.kind();
        if let Some(gathered) = self.gathered.iter_mut().find(|gathered| gathered.chain.kind() == kind) {
            if gathered.deliveries.is_empty() {
                gathered.since = clock.elapsed();
            }
            gathered.deliveries.push((delivery, key));
        } else if let Some(how) = chain.gathering() {
            drop(kind);
            self.gathered.push(Gathered {
                chain,
                how,
                deliveries: vec![(delivery, key)],
                since: clock.elapsed(),
            });
        }
    }

    /// The next batch that is to be handled now.
    pub(super) fn next(&mut self, clock: &dyn Clock) -> Option<(Arc<dyn AnyChain>, Batch)> {
        if self.len == 0 || self.under_way >= AT_ONCE {
            return None;
        }
        let now = clock.elapsed();
        let is_due = |g: &&mut Gathered| {
            let is_full = g.deliveries.len() >= g.how.max.get();
            is_full || (!g.deliveries.is_empty() && g.since + g.how.wait <= now)
        };
        let gathered = self.gathered.iter_mut().find(is_due)?;
        let most = gathered.how.max.get().min(gathered.deliveries.len());
        let batch: Batch = gathered.deliveries.drain(..most).collect();
        gathered.since = now;
        self.len -= batch.len();
        self.under_way += 1;
        Some((gathered.chain.clone(), batch))
    }

    /// How long until the next batch has gathered long enough.
    pub(super) fn wait(&self, clock: &dyn Clock) -> Option<Duration> {
        if self.len == 0 || self.under_way >= AT_ONCE {
            return None;
        }
        let now = clock.elapsed();
        let gathered = self.gathered.iter().filter(|g| !g.deliveries.is_empty());
        gathered.map(|g| (g.since + g.how.wait).saturating_sub(now)).min()
    }

    /// A batch has been handled.
    pub(super) fn ended(&mut self) {
        self.under_way -= 1;
    }

    /// Gives everything back.
    pub(super) fn drain(&mut self) -> Batch {
        self.len = 0;
        self.gathered.iter_mut().flat_map(|g| g.deliveries.drain(..)).collect()
    }
}
