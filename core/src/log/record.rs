use crate::{
    Message,
    clock::{Timestamp, bounded},
};
use std::{fmt, time::Duration};
use uuid::Uuid;

/// Where a record is in its life. The [table](crate::log) says what each state means.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum RecordState {
    /// Waiting: for a first try, a retry, its time, or the one before it.
    Pending,
    /// Claimed by a session whose lease holds. Logs do not store it: a listing shows such a record as `Pending`.
    InProgress,
    /// Confirmed by the broker, or handled.
    Succeeded,
    /// A dead letter: its attempts are exhausted, or its error was permanent.
    Failed,
}

/// A failed attempt, as it is kept with the record: the last [ten](AttemptError::KEPT) of them.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize, serde::Deserialize)]
pub struct AttemptError {
    /// When it failed.
    pub at: Timestamp,
    /// The attempt it belongs to, from 1; 0 where no attempt was counted.
    pub attempt: u32,
    /// What went wrong: at most [1000](AttemptError::MAX_TEXT_BYTES) bytes.
    pub text: String,
}

impl AttemptError {
    /// How many are kept with a record.
    pub const KEPT: usize = 10;
    /// How many bytes of text are kept.
    pub const MAX_TEXT_BYTES: usize = 1000;

    /// An error of `attempt`; a longer text is cut, and NUL, which no database keeps, is written as `␀`.
    #[must_use]
    pub fn new(at: Timestamp, attempt: u32, text: impl Into<String>) -> Self {
        let mut text = text.into();
        if text.len() > Self::MAX_TEXT_BYTES {
            let cut = (0..=Self::MAX_TEXT_BYTES).rev().find(|i| text.is_char_boundary(*i));
            text.truncate(cut.unwrap_or(0));
        }
        if text.contains('\0') {
            text = text.replace('\0', "␀");
        }
        Self { at, attempt, text }
    }

    /// Appends `new` to `kept` and drops the oldest beyond [`KEPT`](AttemptError::KEPT).
    pub fn keep(kept: &mut Vec<Self>, new: &[Self]) {
        kept.extend_from_slice(new);
        let excess = kept.len().saturating_sub(Self::KEPT);
        kept.drain(..excess);
    }
}

/// A record to be appended.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub struct NewRecord {
    /// What it carries: already checked against the limits.
    pub message: Message,
    /// Where it goes.
    pub placement: Placement,
}

/// Where a new record goes.
#[derive(Debug, Clone, PartialEq)]
#[non_exhaustive]
pub enum Placement {
    /// Due at once, behind everything appended before.
    Due,
    /// Due after a delay, counted by the log's clock. It gives up its place: it enters at the end when its time comes.
    Scheduled {
        /// How long to wait.
        after: Duration,
    },
    /// Parked at once: it keeps its place, later ones of its key wait behind it. Unique by mailbox and message id: a
    /// second one changes nothing.
    Parked {
        /// How long to wait.
        after: Duration,
        /// The attempts counted so far.
        attempts: u32,
        /// What went wrong so far.
        errors: Vec<AttemptError>,
    },
    /// A dead letter at once. Unique by mailbox and message id: a second one changes nothing.
    Failed {
        /// The attempts counted.
        attempts: u32,
        /// What went wrong.
        errors: Vec<AttemptError>,
        /// Whether later ones of its key wait until a person has redriven or discarded it.
        hold_key: bool,
    },
}

impl NewRecord {
    /// A record that is due at once.
    #[must_use]
    pub fn new(message: Message) -> Self {
        Self {
            message,
            placement: Placement::Due,
        }
    }

    /// Puts it somewhere else. A wait is at most [`LONGEST`](crate::clock::LONGEST).
    #[must_use]
    pub fn placed(mut self, mut placement: Placement) -> Self {
        if let Placement::Scheduled { after } | Placement::Parked { after, .. } = &mut placement {
            *after = bounded(*after);
        }
        self.placement = placement;
        self
    }

    /// Delays it by `delay`.
    #[must_use]
    pub fn after(self, delay: Duration) -> Self {
        self.placed(if delay.is_zero() {
            Placement::Due
        } else {
            Placement::Scheduled { after: delay }
        })
    }
}

/// How a session names a record it gave: chosen by the log, opaque to everybody else, valid until it is settled.
///
/// It carries what the settle is fenced by (an epoch, say), so that a record given before a lease was lost is told
/// from the same record given after.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct RecordTag(pub u128);

/// A claimed record.
#[derive(Debug, Clone)]
#[non_exhaustive]
pub struct Record {
    /// What to settle it by.
    pub tag: RecordTag,
    /// What it carries, with its position in the log as [`Message::sequence`].
    pub message: Message,
    /// The attempts counted so far: 0 for a record that was never refused.
    pub attempts: u32,
}

impl Record {
    /// A record as a session gives it.
    #[must_use]
    pub fn new(tag: RecordTag, message: Message, attempts: u32) -> Self {
        Self { tag, message, attempts }
    }
}

/// Who holds a lease: fresh for every session, so that a restarted process is not taken for the one before.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Owner(Uuid);

impl Owner {
    /// A fresh owner.
    #[must_use]
    #[allow(clippy::new_without_default)]
    pub fn new() -> Self {
        Self(Uuid::now_v7())
    }
    /// An owner as a log has stored it.
    #[must_use]
    pub const fn from_uuid(uuid: Uuid) -> Self {
        Self(uuid)
    }
    /// The UUID it is stored as.
    #[must_use]
    pub const fn as_uuid(&self) -> &Uuid {
        &self.0
    }
}

impl fmt::Debug for Owner {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn errors_are_cut_at_a_character() {
        let error = AttemptError::new(Timestamp::UNIX_EPOCH, 1, "ä\0".repeat(1000));
        assert!(error.text.starts_with('ä') && !error.text.contains('\0'));
        let mut kept = Vec::new();
        for attempt in 1..=15 {
            AttemptError::keep(
                &mut kept,
                &[AttemptError {
                    attempt,
                    ..error.clone()
                }],
            );
        }
        assert_eq!((kept.len(), kept[0].attempt), (10, 6));
    }
}
