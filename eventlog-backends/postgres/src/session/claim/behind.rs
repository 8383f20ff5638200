//! Events that wait behind what is parked of their key.

use super::Claiming;
use crate::{
    append::KeyOf,
    error::doing,
    row::place,
    session::{lanes, settle},
};
use postrider_core::Result;
use sqlx::{Connection as _, Row as _};
use std::collections::BTreeSet;

impl Claiming<'_> {
    /// Parks events behind others of their keys, but for keys that somebody else is just parking: that may take as long
    /// as a stranger's transaction, and is not waited for. Says which keys were parked.
    pub(super) async fn park_behind(&mut self, behind: &[(i16, i64, u64, KeyOf)]) -> Result<BTreeSet<KeyOf>> {
        let failed = doing("parking events behind others of their key");
        let log = &self.shared.log;
        let (owner, fence) = {
            let held = self.shared.held();
            let lanes: BTreeSet<i16> = behind.iter().map(|(lane, ..)| *lane).collect();
            let epoch = |lane: &i16| held.lanes.get(lane).map_or(-1, |lane| lane.epoch);
            let fence: (Vec<i16>, Vec<i64>) = lanes.iter().map(|lane| (*lane, epoch(lane))).unzip();
            (held.owner, fence)
        };
        let keys: BTreeSet<KeyOf> = behind.iter().map(|(.., key)| key.clone()).collect();
        let mut tx = self.connection.begin().await.map_err(&failed)?;
        if settle::standing(self.shared, &mut tx, owner, &fence).await?.len() < fence.0.len() {
            tx.rollback().await.map_err(failed)?;
            self.shared.held().end_tenure();
            return Ok(BTreeSet::new());
        }
        let mut keys = log.try_turns(&mut tx, self.shared.mailbox(), keys).await?;
        let of_these = behind.iter().filter(|(.., key)| keys.contains(key));
        let (in_lanes, ids): (Vec<i16>, Vec<i64>) = of_these.map(|(lane, at, ..)| (*lane, *at)).unzip();
        let others = log
            .park_behind(&mut tx, self.shared.mailbox(), &in_lanes, &ids, &keys)
            .await?;
        keys.extend(others);
        // Whatever they were to wait behind may have gone since.
        log.right_keys(&mut tx, self.shared.mailbox(), &keys).await?;
        tx.commit().await.map_err(failed)?;
        self.shared.held().due.checked_at = None;
        Ok(keys)
    }

    /// Learns of keys that others have parked.
    pub(super) async fn learn_parked(&mut self, lanes: BTreeSet<i16>) -> Result<()> {
        let (certain, in_lanes, cursors) = {
            let held = self.shared.held();
            let known = lanes
                .iter()
                .filter_map(|lane| Some((*lane, held.lanes.get(lane)?.parked_cursor)));
            let (in_lanes, cursors): (Vec<i16>, Vec<i64>) = known.unzip();
            (held.floor.position(), in_lanes, cursors)
        };
        let newly = sqlx::query(self.shared.log.sql().newly_parked.clone()).bind(self.shared.mailbox());
        let newly = newly
            .bind(&in_lanes)
            .bind(cursors)
            .fetch_all(&mut *self.connection)
            .await;
        let newly = newly.map_err(doing("looking for parked keys"))?;
        let mut held = self.shared.held();
        for row in &newly {
            let (lane, at) = place(row, 0);
            let hash = lanes::key_hash(row.get(2), row.get(3));
            if let Some(lane) = held.lanes.get_mut(&lane) {
                let last = lane.parked.entry(hash).or_default();
                *last = at.max(*last);
            }
        }
        for lane in in_lanes {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.parked_cursor = lane.parked_cursor.max(certain);
            }
        }
        Ok(())
    }
}
