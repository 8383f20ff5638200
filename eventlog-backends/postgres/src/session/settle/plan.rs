//! What a settle is to do, worked out in memory.

use crate::{
    append::{KeyOf, state},
    log::unexpected,
    row::{errors_to_text, secs},
    session::{Held, Out, claim::PARKED_AT_ONCE, id, lanes, position, untag},
    tid::Tid,
};
use postrider_core::{
    Result,
    log::{AttemptError, Outcome, RecordTag, Settled, Until},
};
use rustc_hash::FxHashSet;
use std::{
    collections::{BTreeMap, BTreeSet},
    time::Duration,
};
use uuid::Uuid;

/// Records, by lane and id.
#[derive(Debug, Default)]
pub(super) struct Places {
    pub(super) lanes: Vec<i16>,
    pub(super) ids: Vec<i64>,
}

impl Places {
    fn push(&mut self, (lane, at): (i16, i64)) {
        self.lanes.push(lane);
        self.ids.push(at);
    }
    pub(super) fn is_empty(&self) -> bool {
        self.ids.is_empty()
    }
}

/// Records that are parked, or dead letters.
#[derive(Debug, Default)]
pub(super) struct Parkings {
    pub(super) places: Places,
    pub(super) attempts: Vec<i32>,
    pub(super) states: Vec<i16>,
    pub(super) after: Vec<f64>,
    pub(super) errors: Vec<String>,
}

/// What a settle is to do: worked out in memory, written in one transaction, and then done in memory.
pub(super) struct Plan {
    pub(super) tenure: u64,
    pub(super) owner: Uuid,
    pub(super) fence: (Vec<i16>, Vec<i64>),
    /// The records that are ours to settle.
    pub(super) known: Vec<RecordTag>,
    pub(super) done: Places,
    /// Where they lay.
    pub(super) done_at: Vec<Tid>,
    pub(super) done_parked: Places,
    pub(super) park: Parkings,
    pub(super) set_parked: Parkings,
    pub(super) park_behind: Places,
    pub(super) give_back_parked: Places,
    /// Keys of which what is parked changes.
    pub(super) keys: BTreeSet<KeyOf>,
    pub(super) effects: Effects,
}

/// What is to happen in memory once it is written.
#[derive(Default)]
pub(super) struct Effects {
    let_go: Vec<(i16, i64)>,
    give_back: Vec<(i16, i64)>,
    /// Parked now, and still out.
    kept: Vec<(i16, i64)>,
    /// Passed over, and parked now behind the head of their key.
    forget: Vec<(i16, u64, FxHashSet<u64>)>,
    /// Parked of a key, up to a position.
    parked: Vec<(i16, u64, i64)>,
    /// No longer parked.
    pub(super) unparked: Vec<(i16, u64, i64)>,
}

impl Plan {
    pub(super) fn of(held: &Held, batch: &[Settled]) -> Result<(Self, Vec<RecordTag>)> {
        let mut plan = Self {
            tenure: held.tenure,
            owner: held.owner,
            fence: (Vec::new(), Vec::new()),
            known: Vec::with_capacity(batch.len()),
            done: Places::default(),
            done_at: Vec::new(),
            done_parked: Places::default(),
            park: Parkings::default(),
            set_parked: Parkings::default(),
            park_behind: Places::default(),
            give_back_parked: Places::default(),
            keys: BTreeSet::new(),
            effects: Effects::default(),
        };
        let (mut lost, mut released, mut lanes) = (Vec::new(), Vec::new(), BTreeMap::new());
        for settled in batch {
            let (tenure, lane, at) = untag(settled.tag);
            let state = held.lanes.get(&lane).filter(|_| tenure == held.tenure);
            let Some((state, out)) = state.and_then(|state| Some((state, state.records.get(&at)?))) else {
                lost.push(settled.tag);
                continue;
            };
            plan.known.push(settled.tag);
            lanes.insert(lane, state.epoch);
            match &settled.outcome {
                Outcome::Done => plan.done((lane, at), out),
                Outcome::Parked(parking) => {
                    let (state, after) = match parking.until {
                        Until::After(delay) => (state::DUE, delay),
                        _ => (state::FOR_TOPIC, Duration::ZERO),
                    };
                    plan.park(held, (lane, at), out, state, after, parking.attempts, &parking.errors)?;
                    if parking.keep {
                        plan.effects.kept.push((lane, at));
                    } else {
                        plan.effects.let_go.push((lane, at));
                    }
                }
                Outcome::Failed {
                    attempts,
                    errors,
                    hold_key,
                } => {
                    let holds = *hold_key && out.message.key().is_some();
                    let state = if holds {
                        state::FAILED_AND_HOLDING
                    } else {
                        state::FAILED
                    };
                    plan.park(held, (lane, at), out, state, Duration::ZERO, *attempts, errors)?;
                    plan.effects.let_go.push((lane, at));
                }
                // Last: what is released waits behind what the same batch parks of its key.
                Outcome::Released => released.push(((lane, at), out)),
                _ => return Err(unexpected("the Postgres log does not know this outcome of a record")),
            }
        }
        for (place, out) in released {
            plan.release(held, place, out);
        }
        plan.fence = lanes.into_iter().unzip();
        Ok((plan, lost))
    }

    fn done(&mut self, place: (i16, i64), out: &Out) {
        match out.at.filter(|_| !out.is_parked) {
            Some(at) => {
                self.done.push(place);
                self.done_at.push(at);
            }
            None => {
                self.done_parked.push(place);
                self.unpark(place, out);
            }
        }
        self.effects.let_go.push(place);
    }

    /// A parked row goes: the next of its key may go on.
    fn unpark(&mut self, (lane, at): (i16, i64), out: &Out) {
        if let (Some(key), Some(hash)) = (key_of(lane, out), out.message.key_hash()) {
            self.keys.insert(key);
            self.effects.unparked.push((lane, hash, at));
        }
    }

    #[allow(clippy::too_many_arguments)]
    fn park(
        &mut self,
        held: &Held,
        place: (i16, i64),
        out: &Out,
        state: i16,
        after: Duration,
        attempts: u32,
        errors: &[AttemptError],
    ) -> Result<()> {
        let parkings = if out.is_parked {
            &mut self.set_parked
        } else {
            &mut self.park
        };
        parkings.places.push(place);
        parkings.attempts.push(i32::try_from(attempts).unwrap_or(i32::MAX));
        parkings.states.push(state);
        parkings.after.push(secs(after));
        parkings.errors.push(errors_to_text(errors)?);
        let (Some(key), Some(hash)) = (key_of(place.0, out), out.message.key_hash()) else {
            return Ok(());
        };
        if state == state::FAILED {
            if out.is_parked {
                self.unpark(place, out);
            }
            return Ok(());
        }
        self.keys.insert(key);
        self.effects.parked.push((place.0, hash, place.1));
        // It keeps its place: what was passed over of its key waits behind it. (Of keys that collide too: they then wait
        // for nobody, and go on at once.)
        let Some(lane) = held.lanes.get(&place.0) else {
            return Ok(());
        };
        // A part of it: the rest is parked by the claims to come, which find the key parked.
        let passed_over = lane.holdings.first_passed_over(hash, PARKED_AT_ONCE);
        if passed_over.is_empty() || self.effects.forget.iter().any(|(_, other, _)| *other == hash) {
            return Ok(());
        }
        for at in &passed_over {
            self.park_behind.push((place.0, id(*at)));
            self.effects.parked.push((place.0, hash, id(*at)));
        }
        self.effects
            .forget
            .push((place.0, hash, passed_over.into_iter().collect()));
        Ok(())
    }

    fn release(&mut self, held: &Held, place: (i16, i64), out: &Out) {
        if out.is_parked {
            // If it is a head it is due again; behind one it waits as before.
            self.give_back_parked.push(place);
            self.effects.let_go.push(place);
            return;
        }
        let (Some(key), Some(hash)) = (key_of(place.0, out), out.message.key_hash()) else {
            self.effects.give_back.push(place);
            return;
        };
        let is_parked = held
            .lanes
            .get(&place.0)
            .is_some_and(|lane| lane.parked.contains_key(&hash));
        if is_parked
            || self
                .effects
                .parked
                .iter()
                .any(|(lane, other, _)| (*lane, *other) == (place.0, hash))
        {
            self.park_behind.push(place);
            self.keys.insert(key);
            self.effects.parked.push((place.0, hash, place.1));
            self.effects.let_go.push(place);
        } else {
            self.effects.give_back.push(place);
        }
    }

    /// Whether there is nothing but events that are done.
    pub(super) fn is_plain(&self) -> bool {
        self.known.len() == self.done.ids.len()
    }

    pub(super) fn has_done(&self) -> bool {
        !self.done.is_empty() || !self.done_parked.is_empty()
    }

    pub(super) fn apply(self, held: &mut Held, still_parked: &BTreeSet<KeyOf>) {
        held.floor.settled();
        if !self.is_plain() {
            held.due.checked_at = None;
        }
        let effects = self.effects;
        for (lane, key, last) in effects.parked {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                let known = lane.parked.entry(key).or_default();
                *known = last.max(*known);
            }
        }
        let still_parked: FxHashSet<(i16, u64)> = still_parked
            .iter()
            .map(|(lane, topic, key)| (*lane, lanes::key_hash(topic, key)))
            .collect();
        for (lane, key, at) in effects.unparked {
            // Not all before it need be done: a topic may have a key's records sent at once.
            if still_parked.contains(&(lane, key)) {
                continue;
            }
            if let Some(lane) = held.lanes.get_mut(&lane)
                && lane.parked.get(&key) == Some(&at)
            {
                lane.parked.remove(&key);
            }
        }
        for (lane, at) in effects.kept {
            if let Some(out) = held.lanes.get_mut(&lane).and_then(|lane| lane.records.get_mut(&at)) {
                out.is_parked = true;
            }
        }
        for (lane, key, positions) in effects.forget {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.holdings.forget_key(key, |position| positions.contains(&position));
            }
        }
        for (lane, at) in effects.let_go {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.holdings.let_go(position(at));
                lane.records.remove(&at);
            }
        }
        for (lane, at) in effects.give_back {
            if let Some(lane) = held.lanes.get_mut(&lane) {
                lane.holdings.give_back(position(at));
                lane.records.remove(&at);
            }
        }
    }
}

fn key_of(lane: i16, out: &Out) -> Option<KeyOf> {
    Some((
        lane,
        out.message.topic().as_str().to_owned(),
        out.message.key()?.to_owned(),
    ))
}
