//! What is true of a history, whatever the engine believes: written down by the wrappers around the log and the broker, at
//! the places where something takes effect.

use crate::world::{World, short};
use postrider_core::{
    Mailbox, Message, MessageId,
    log::{NewRecord, Placement},
};
use std::{
    collections::{BTreeMap, BTreeSet},
    sync::{Mutex, MutexGuard},
    time::Duration,
};

/// A record that was committed to the outbox.
#[derive(Debug, Clone)]
pub(crate) struct Committed {
    pub(crate) id: MessageId,
    pub(crate) topic: String,
    pub(crate) key: Option<String>,
    /// When it is due, if that was not at once: it has no place in the order then.
    pub(crate) due: Option<Duration>,
}

/// What the relay was told of a message by the broker.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Told {
    pub(crate) rejected: u32,
    pub(crate) invalid: u32,
    /// Calls that ended without an outcome of it, which counts if it was alone.
    pub(crate) unknown: u32,
}

/// What became of a message in its handlers.
#[derive(Debug, Clone, Default)]
pub(crate) struct Handled {
    /// Errors that count, over all processes.
    pub(crate) failures: u32,
    pub(crate) permanent: bool,
    /// How often a handler had an effect outside of any transaction.
    pub(crate) plain: u32,
    /// What is in force of each step by what was committed, compensations counted as less.
    pub(crate) committed: BTreeMap<u8, i32>,
}

#[derive(Debug, Default)]
pub(crate) struct Book {
    pub(crate) committed: Vec<Committed>,
    /// First and later arrivals at the broker.
    pub(crate) arrived: Vec<(MessageId, Duration)>,
    pub(crate) told: BTreeMap<MessageId, Told>,
    /// First attempts, in order.
    pub(crate) began: Vec<MessageId>,
    began_before: BTreeSet<MessageId>,
    pub(crate) handled: BTreeMap<MessageId, Handled>,
    /// First effects that were committed, in order.
    pub(crate) effects: Vec<MessageId>,
    /// What became a dead letter at some time.
    pub(crate) failed: BTreeSet<MessageId>,
    /// Interruptions of processes, any of which may have cut off a step.
    pub(crate) interruptions: u32,
    pub(crate) broken: Vec<String>,
    /// How often something of each kind happened, to see that the histories are not tame.
    pub(crate) counts: BTreeMap<&'static str, u64>,
}

#[derive(Debug, Default)]
pub(crate) struct Ledger(Mutex<Book>);

/// What a transaction writes beside events: one row of an application's table.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Effect {
    pub(crate) id: MessageId,
    pub(crate) step: u8,
    pub(crate) change: i32,
}

impl Ledger {
    pub(crate) fn book(&self) -> MutexGuard<'_, Book> {
        self.0.lock().unwrap()
    }

    pub(crate) fn broken(&self, what: String) {
        self.book().broken.push(what);
    }

    pub(crate) fn count(&self, what: &'static str) {
        *self.book().counts.entry(what).or_default() += 1;
    }

    pub(crate) fn told(&self, id: MessageId, change: impl FnOnce(&mut Told)) {
        change(self.book().told.entry(id).or_default());
    }

    pub(crate) fn handled(&self, id: MessageId, change: impl FnOnce(&mut Handled)) {
        change(self.book().handled.entry(id).or_default());
    }

    /// A handler has succeeded outside of any transaction.
    pub(crate) fn succeeded(&self, id: MessageId) {
        let mut book = self.book();
        let handled = book.handled.entry(id).or_default();
        handled.plain += 1;
        if handled.plain == 1 {
            book.effects.push(id);
        }
    }

    /// A handler begins with a message.
    pub(crate) fn began(&self, id: MessageId) {
        let mut book = self.book();
        if book.began_before.insert(id) {
            book.began.push(id);
        }
    }
}

impl World {
    /// Records have been committed.
    pub(crate) fn committed(&self, mailbox: &Mailbox, batch: &[NewRecord]) {
        for record in batch {
            let (message, id) = (&record.message, record.message.id());
            self.note(format_args!(
                "committed {} {}:{} to {mailbox}, {}",
                short(id),
                message.topic(),
                message.key().unwrap_or(""),
                placement(&record.placement)
            ));
            let mut book = self.ledger.book();
            if matches!(mailbox, Mailbox::Inbox(_)) {
                if let Placement::Failed { .. } = record.placement {
                    book.failed.insert(id);
                }
                continue;
            }
            book.committed.push(Committed {
                id,
                topic: message.topic().to_string(),
                key: message.key().map(str::to_owned),
                due: match record.placement {
                    Placement::Scheduled { after } => Some(self.elapsed() + after),
                    _ => None,
                },
            });
        }
    }

    /// Effects have been committed.
    pub(crate) fn took_effect(&self, effects: &[Effect]) {
        for Effect { id, step, change } in effects {
            self.note(format_args!("effect of {} step {step}: {change:+}", short(*id)));
            let mut book = self.ledger.book();
            let in_force = book.handled.entry(*id).or_default().committed.entry(*step).or_default();
            *in_force += change;
            let now = *in_force;
            if now == 1 && *step == 0 && !book.effects.contains(id) {
                book.effects.push(*id);
            }
            drop(book);
            if !(0..=1).contains(&now) {
                self.broken(format!("step {step} of {} is in effect {now} times", short(*id)));
            }
        }
    }

    /// A message has reached the broker.
    pub(crate) fn arrived(&self, message: &Message) {
        let (id, now) = (message.id(), self.elapsed());
        self.note(format_args!("arrived {}", short(id)));
        let mut book = self.ledger.book();
        book.arrived.push((id, now));
        let committed = book.committed.iter().find(|committed| committed.id == id).cloned();
        drop(book);
        match committed {
            None => self.broken(format!("{} was sent and never committed", short(id))),
            Some(Committed { due: Some(due), .. }) if due > now => {
                self.broken(format!("{} was sent at {now:?}, and is due at {due:?}", short(id)));
            }
            Some(_) => {}
        }
    }
}

fn placement(placement: &Placement) -> String {
    match placement {
        Placement::Due => "due".to_owned(),
        Placement::Scheduled { after } => format!("after {after:?}"),
        Placement::Parked { after, attempts, .. } => format!("parked for {after:?} with {attempts} attempts"),
        Placement::Failed { attempts, .. } => format!("failed with {attempts} attempts"),
        _ => "?".to_owned(),
    }
}
