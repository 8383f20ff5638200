//! Getting the lease, and keeping it.

use super::{Held, Shared};
use crate::error::doing;
use postrider_core::{
    Result,
    clock::Moment,
    log::{Holdings, Lease, Renewal},
};
use sqlx::{Connection as _, Row as _, SqliteConnection};
use std::{
    sync::{Arc, atomic::Ordering},
    time::Duration,
};

/// Somebody else's lease, and since when it has not moved.
#[derive(Debug, Clone)]
pub(super) struct Observed {
    state: LeaseRow,
    since: Moment,
}

#[derive(Debug, Clone, PartialEq)]
struct LeaseRow {
    owner: Option<Vec<u8>>,
    epoch: i64,
    beat: i64,
    lease_ms: i64,
}

/// What came of trying to get the lease.
pub(super) enum Acquired {
    /// It is ours.
    Held,
    /// It is somebody else's, at least for so long.
    NotYet(Duration),
}

impl LeaseRow {
    /// `None` if the mailbox is gone.
    async fn read(shared: &Shared, connection: &mut SqliteConnection) -> Result<Option<Self>> {
        let read = sqlx::query(shared.log.sql().read_lease.clone()).bind(shared.name.to_string());
        let row = read
            .fetch_optional(connection)
            .await
            .map_err(doing("reading the lease"))?;
        let Some(row) = row else { return Ok(None) };
        shared.mailbox.store(row.get(4), Ordering::Release);
        Ok(Some(Self {
            owner: row.get(0),
            epoch: row.get(1),
            beat: row.get(2),
            lease_ms: row.get(3),
        }))
    }

    fn length(&self) -> Duration {
        Duration::from_millis(u64::try_from(self.lease_ms).unwrap_or(0))
    }
}

pub(super) async fn acquire(shared: &Arc<Shared>, connection: &mut SqliteConnection) -> Result<Acquired> {
    if shared.held().lease.is_held() {
        return Ok(Acquired::Held);
    }
    let owner = &shared.options.owner.as_uuid().as_bytes()[..];
    // Looked at without a lock first: a standby does not disturb the writers.
    let Some(seen) = LeaseRow::read(shared, connection).await? else {
        // Lost with a restored copy or by hand: it comes into being again.
        let failed = doing("opening a mailbox");
        let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
        shared.log.mailbox_in(&mut tx, &shared.name).await?;
        tx.commit().await.map_err(failed)?;
        return Ok(Acquired::NotYet(Duration::ZERO));
    };
    let is_free = seen.owner.as_deref().is_none_or(|holder| holder == owner);
    if !is_free {
        let now = shared.elapsed();
        let mut held = shared.held();
        let since = match &held.observed {
            Some(observed) if observed.state == seen => observed.since,
            _ => now,
        };
        let left = seen.length().saturating_sub(now.saturating_sub(since));
        held.observed = Some(Observed {
            state: seen.clone(),
            since,
        });
        if !left.is_zero() {
            return Ok(Acquired::NotYet(left));
        }
    }
    let failed = doing("taking the lease");
    let sent = shared.elapsed();
    let mut tx = connection.begin_with("BEGIN IMMEDIATE").await.map_err(&failed)?;
    if LeaseRow::read(shared, &mut tx).await?.as_ref() != Some(&seen) {
        // Somebody was quicker.
        tx.rollback().await.map_err(failed)?;
        return Ok(Acquired::NotYet(Duration::ZERO));
    }
    let take = sqlx::query_scalar(shared.log.sql().take_lease.clone())
        .bind(shared.mailbox())
        .bind(owner)
        .bind(i64::try_from(shared.options.lease.as_millis()).unwrap_or(i64::MAX))
        .bind(shared.held().epoch);
    let epoch: i64 = take.fetch_one(&mut *tx).await.map_err(&failed)?;
    tx.commit().await.map_err(failed)?;
    begin_tenure(shared, &mut shared.held(), epoch, sent);
    Ok(Acquired::Held)
}

fn begin_tenure(shared: &Arc<Shared>, held: &mut Held, epoch: i64, sent: Moment) {
    held.lease = Lease::new(shared.log.clock().clone(), sent, shared.options.lease);
    held.epoch = epoch;
    held.holdings = Holdings::default();
    held.records.clear();
    held.cursor = 0;
    held.waiting_told = false;
    held.observed = None;
    held.renewal = Some(renewal(shared, &held.lease, epoch));
}

fn renewal(shared: &Arc<Shared>, lease: &Lease, epoch: i64) -> Renewal {
    // A session that is dropped takes the task with it, so the task may hold what the session holds only weakly.
    let session = Arc::downgrade(shared);
    lease.keep_renewed(shared.options.lease, move || {
        let session = session.clone();
        async move {
            let Some(shared) = session.upgrade() else {
                return Ok(false);
            };
            shared
                .with_connection(async |connection| {
                    let renew = sqlx::query(shared.log.sql().renew_lease.clone())
                        .bind(shared.mailbox())
                        .bind(&shared.options.owner.as_uuid().as_bytes()[..])
                        .bind(epoch)
                        .bind(shared.name.to_string());
                    let renewed = renew.execute(connection).await.map_err(doing("renewing the lease"))?;
                    Ok(renewed.rows_affected() == 1)
                })
                .await
        }
    })
}
