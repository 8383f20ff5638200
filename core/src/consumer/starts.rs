//! Messages that end the process: an abort, a stack overflow, no memory left. No error is ever seen of them, so the times that
//! their handling was begun and not ended are counted in the log.
//!
//! Counting costs a write before the handling and one behind it. It is done only where it may matter: for messages that come
//! again, and, where the broker does not count, for the first ones after the group was joined.

use super::shared::Shared;
use crate::{Delivery, Message, MessageId, log::InboxLog};
use std::sync::{Arc, atomic::Ordering};

/// The handling of a message that is being counted.
pub(super) struct Start {
    inbox: Arc<dyn InboxLog>,
    id: MessageId,
    version: u64,
    /// How often it was begun before, and not ended.
    pub(super) before: u32,
}

impl Shared {
    /// Whether a message may be one that ended the process before.
    pub(super) fn is_suspicious(&self, delivery: &Delivery) -> bool {
        if !self.parks {
            return false;
        }
        if self.counts_deliveries {
            return delivery.delivery_count() > 1;
        }
        let young = &self.young;
        young.load(Ordering::Relaxed) > 0
            && young
                .fetch_update(Ordering::Relaxed, Ordering::Relaxed, |left| left.checked_sub(1))
                .is_ok()
    }

    /// How often the handling of a message was begun before, and not ended. `None` where that cannot be known just now: then it
    /// is handled all the same.
    pub(super) async fn starts(&self, message: &Message) -> Option<Start> {
        let inbox = self.tools.log.as_ref()?.inbox().ok()?.clone();
        // A number of its own: the message's note is for chains and barriers.
        let id = MessageId::derived(message.id(), &self.group, STARTS);
        let note = inbox.note(None, &self.group, id).await.ok()?;
        let version = note.as_ref().map_or(0, |note| note.version);
        let before = note.and_then(|note| note.text.parse().ok()).unwrap_or(0);
        Some(Start {
            inbox,
            id,
            version,
            before,
        })
    }

    /// Counts a start, before the handling.
    pub(super) async fn begin_start(&self, mut start: Start) -> Option<Start> {
        let text = (start.before + 1).to_string();
        let written = start
            .inbox
            .write_note(None, &self.group, start.id, start.version, &text);
        written.await.ok().filter(|written| *written)?;
        start.version += 1;
        Some(start)
    }

    /// The handling has ended, however it went: the process lives.
    pub(super) async fn end_start(&self, start: Start) {
        let Start { inbox, id, version, .. } = start;
        let _ = inbox.write_note(None, &self.group, id, version, "0").await;
    }
}

/// No handler publishes so many events that one of them had this number.
const STARTS: u32 = u32::MAX;
