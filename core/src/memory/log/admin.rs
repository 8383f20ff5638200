use super::{
    MemoryLog,
    queue::{Parked, ParkedState, Row, Rows},
};
use crate::{
    Error, ErrorKind, Mailbox, MessageId, Result,
    clock::Timestamp,
    log::{Cursor, Filter, Listing, LogAdmin, Page, RecordState, Stats, Stored},
};
use async_trait::async_trait;
use std::collections::BTreeMap;

fn stored(row: &Row) -> Stored {
    let mut entry = Stored::new(row.message.clone(), row.created_at);
    entry.errors.clone_from(&row.errors);
    entry
}

fn stored_parked(parked: &Parked) -> Stored {
    let mut entry = stored(&parked.row);
    entry.attempts = parked.attempts;
    match parked.state {
        ParkedState::Due(at) => entry.due_at = Some(at),
        ParkedState::Behind | ParkedState::ForTopic => {}
        ParkedState::Failed { at, .. } => {
            entry.state = RecordState::Failed;
            entry.finished_at = Some(at);
        }
    }
    entry
}

/// Every record with what it is ordered by: those with a position of their own first, then the scheduled ones.
fn all(rows: &Rows) -> BTreeMap<(u8, u64), Stored> {
    let hot = rows.hot.iter().map(|(p, row)| ((0, p), stored(row)));
    let parked = rows.parked.iter().map(|(p, parked)| ((0, *p), stored_parked(parked)));
    let done = rows.done.iter().map(|(p, done)| {
        let mut entry = stored(&done.row);
        entry.state = RecordState::Succeeded;
        entry.attempts = done.attempts;
        entry.finished_at = Some(done.at);
        ((0, *p), entry)
    });
    let scheduled = rows.scheduled.iter().map(|((at, p), row)| {
        let mut entry = stored(row);
        entry.due_at = Some(*at);
        ((1, *p), entry)
    });
    hot.chain(parked).chain(done).chain(scheduled).collect()
}

fn failed(rows: &Rows, filter: &Filter, max: u64) -> Vec<u64> {
    let is_failed = |p: &Parked| matches!(p.state, ParkedState::Failed { .. }) && filter.matches(&p.row.message);
    let found = rows.parked.iter().filter(|(_, p)| is_failed(p)).map(|(p, _)| *p);
    found.take(usize::try_from(max).unwrap_or(usize::MAX)).collect()
}

fn position(cursor: &Cursor) -> Result<(u8, u64)> {
    let parsed = cursor
        .0
        .split_once(':')
        .and_then(|(part, p)| Some((part.parse().ok()?, p.parse().ok()?)));
    parsed.ok_or_else(|| {
        Error::new(ErrorKind::Invalid, "not a cursor of a listing").with("cursor", format!("{:?}", cursor.0))
    })
}

fn stats(rows: &Rows, now: Timestamp) -> Stats {
    let is_failed = |p: &&Parked| matches!(p.state, ParkedState::Failed { .. });
    let failed = rows.parked.values().filter(is_failed).count();
    let parked = rows.parked.len() - failed;
    let waiting = rows.parked.values().filter(|p| !is_failed(p)).map(|p| p.row.created_at);
    let oldest = rows.hot.iter().map(|(_, row)| row.created_at).chain(waiting).min();
    Stats {
        pending: (rows.hot.len() + parked + rows.scheduled.len()) as u64,
        parked: parked as u64,
        scheduled: rows.scheduled.len() as u64,
        failed: failed as u64,
        succeeded: rows.done.len() as u64,
        oldest_pending: oldest.map(|at| (now - at).to_std().unwrap_or_default()),
    }
}

#[async_trait]
impl LogAdmin for MemoryLog {
    async fn list(&self, filter: &Filter, page: &Page) -> Result<Listing> {
        let after = page.after.as_ref().map(position).transpose()?;
        let Some(queue) = self.queues().get(&filter.mailbox).cloned() else {
            return Ok(Listing::default());
        };
        let mut entries: Vec<_> = all(&queue.rows())
            .into_iter()
            .filter(|(at, _)| after.is_none_or(|after| *at > after))
            .filter(|(_, s)| filter.matches(&s.message) && filter.state.is_none_or(|state| state == s.state))
            .take(page.size() + 1)
            .collect();
        let more = entries.len() > page.size();
        entries.truncate(page.size());
        let next = entries
            .last()
            .filter(|_| more)
            .map(|((part, p), _)| Cursor(format!("{part}:{p}")));
        Ok(Listing::new(
            entries.into_iter().map(|(_, entry)| entry).collect(),
            next,
        ))
    }

    async fn show(&self, mailbox: &Mailbox, id: MessageId) -> Result<Option<Stored>> {
        let queue = self.queues().get(mailbox).cloned();
        Ok(queue.and_then(|queue| all(&queue.rows()).into_values().find(|s| s.message.id() == id)))
    }

    async fn redrive(&self, filter: &Filter, max: u64) -> Result<u64> {
        let Some(queue) = self.queues().get(&filter.mailbox).cloned() else {
            return Ok(0);
        };
        let mut rows = queue.rows();
        let found = failed(&rows, filter, max);
        for position in &found {
            rows.redrive(
                *position,
                matches!(filter.mailbox, Mailbox::Outbox(_)),
                self.shared.clock.now(),
            );
        }
        drop(rows);
        queue.tell();
        Ok(found.len() as u64)
    }

    async fn discard(&self, filter: &Filter, max: u64) -> Result<u64> {
        let Some(queue) = self.queues().get(&filter.mailbox).cloned() else {
            return Ok(0);
        };
        let mut rows = queue.rows();
        let found = failed(&rows, filter, max);
        for position in &found {
            rows.unpark(*position, self.shared.clock.now());
        }
        drop(rows);
        queue.tell();
        Ok(found.len() as u64)
    }

    async fn count_failed(&self, filter: &Filter) -> Result<u64> {
        let queue = self.queues().get(&filter.mailbox).cloned();
        Ok(queue.map_or(0, |queue| failed(&queue.rows(), filter, u64::MAX).len() as u64))
    }

    async fn mailboxes(&self) -> Result<Vec<Mailbox>> {
        Ok(self.queues().keys().cloned().collect())
    }

    async fn stats(&self) -> Result<BTreeMap<Mailbox, Stats>> {
        let now = self.shared.clock.now();
        let queues = self.queues();
        Ok(queues
            .iter()
            .map(|(mailbox, queue)| (mailbox.clone(), stats(&queue.rows(), now)))
            .collect())
    }
}
