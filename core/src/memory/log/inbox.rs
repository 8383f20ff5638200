//! Receipts in memory.

use super::{MemoryConnection, MemoryLog, queue::Queue};
use crate::{
    GroupName, Mailbox, MessageId, Result,
    clock::Timestamp,
    log::{Admission, Arrival, InboxLog, Lent},
};
use async_trait::async_trait;
use std::sync::Arc;

/// The receipts of a transaction, until it commits. Dropped, they were never there.
#[derive(Debug, Default)]
pub(super) struct Reserved(Vec<(Arc<Queue>, MessageId)>);

impl Reserved {
    pub(super) fn commit(&mut self, now: Timestamp) {
        for (queue, id) in self.0.drain(..) {
            queue.rows().receipts.insert(id, Some(now));
            queue.tell();
        }
    }

    fn holds(&self, id: MessageId) -> bool {
        self.0.iter().any(|(_, reserved)| *reserved == id)
    }
}

impl Drop for Reserved {
    fn drop(&mut self) {
        for (queue, id) in self.0.drain(..) {
            queue.rows().receipts.remove(&id);
            queue.tell();
        }
    }
}

fn admit(queue: &Arc<Queue>, reserved: &mut Reserved, arrival: &Arrival) -> Option<Admission> {
    let mut rows = queue.rows();
    match rows.receipts.get(&arrival.id) {
        Some(Some(_)) => return Some(Admission::Duplicate),
        Some(None) if reserved.holds(arrival.id) => return Some(Admission::Duplicate),
        // Another transaction has it: what becomes of that decides.
        Some(None) => return None,
        None => {}
    }
    if !arrival.was_parked {
        if rows.is_parked_id(arrival.id) {
            return Some(Admission::Parked);
        }
        if rows.holds_back(&arrival.topic, arrival.key.as_deref()) {
            return Some(Admission::HeldBack);
        }
    }
    rows.receipts.insert(arrival.id, None);
    reserved.0.push((queue.clone(), arrival.id));
    Some(Admission::New)
}

#[async_trait]
impl InboxLog for MemoryLog {
    async fn admit(&self, tx: Lent<'_>, group: &GroupName, arrivals: &[Arrival]) -> Result<Vec<Admission>> {
        let connection: &mut MemoryConnection = tx.get_mut()?;
        let queue = self.queue(&Mailbox::Inbox(group.clone()));
        let mut answers = vec![Admission::New; arrivals.len()];
        // In the order of their ids, so that two transactions do not wait for each other.
        let mut order: Vec<usize> = (0..arrivals.len()).collect();
        order.sort_by_key(|n| arrivals[*n].id);
        for n in order {
            answers[n] = loop {
                let seen = queue.news_count();
                if let Some(answer) = admit(&queue, &mut connection.receipts, &arrivals[n]) {
                    break answer;
                }
                queue.news_after(seen).await;
            };
        }
        Ok(answers)
    }
}
