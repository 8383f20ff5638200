//! The records a relay has in its hands.

use crate::{
    clock::Moment,
    log::{AttemptError, Record},
};

/// Where a record in hand is found.
pub(super) type Place = usize;

/// A record in hand.
#[derive(Debug)]
pub(super) struct Held {
    pub(super) record: Record,
    /// The next of its key, which waits for this one.
    pub(super) next: Option<Place>,
    /// The tenure it was claimed in: records of an earlier one are not ours any more.
    pub(super) tenure: u64,
    /// Tries made in this attempt.
    pub(super) tries: u32,
    /// Since when it has been in the local tier: parked in the log, and kept.
    pub(super) kept_since: Option<Moment>,
    /// How often the connection died with this message alone in flight.
    pub(super) deaths: u8,
    /// Errors not yet written to the log.
    pub(super) errors: Vec<AttemptError>,
}

/// A slab of them. Places are used again.
#[derive(Debug, Default)]
pub(super) struct InHand {
    places: Vec<Option<Held>>,
    free: Vec<Place>,
    bytes: usize,
}

impl InHand {
    pub(super) fn put(&mut self, record: Record, tenure: u64) -> Place {
        self.bytes += record.message.payload().len();
        let held = Held {
            record,
            next: None,
            tenure,
            tries: 0,
            kept_since: None,
            deaths: 0,
            errors: Vec::new(),
        };
        match self.free.pop() {
            Some(place) => {
                self.places[place] = Some(held);
                place
            }
            None => {
                self.places.push(Some(held));
                self.places.len() - 1
            }
        }
    }

    pub(super) fn get(&self, place: Place) -> Option<&Held> {
        self.places.get(place)?.as_ref()
    }

    pub(super) fn get_mut(&mut self, place: Place) -> Option<&mut Held> {
        self.places.get_mut(place)?.as_mut()
    }

    pub(super) fn take(&mut self, place: Place) -> Option<Held> {
        let held = self.places.get_mut(place)?.take()?;
        self.free.push(place);
        self.bytes -= held.record.message.payload().len();
        Some(held)
    }

    /// The bytes of payload in hand.
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    pub(super) fn len(&self) -> usize {
        self.places.len() - self.free.len()
    }
}
