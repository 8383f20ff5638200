//! What brokers have in common that keep the order of keys by partitions, for authors of transports and logs.

mod hold;
mod membership;
mod share;

pub use hold::{Copies, Hold, not_outstanding};
pub use membership::{Membership, Source, Working};
pub use share::{Leases, balance, fair_share};

use crate::MessageId;
use md5::{Digest as _, Md5};
use std::collections::VecDeque;

/// How many slots keys are spread over, in logs and on brokers: part of the format.
pub const SLOTS: u8 = 64;

/// The slot of a key, or of a message without one: the first byte of the MD5 digest of the key's UTF-8, or of the id's
/// 16 bytes, modulo 64. The same in every version and language.
#[must_use]
pub fn slot_of(key: Option<&str>, id: MessageId) -> u8 {
    let digest = match key {
        Some(key) => Md5::digest(key.as_bytes()),
        None => Md5::digest(id.as_uuid().as_bytes()),
    };
    digest[0] % SLOTS
}

/// What was handed out of a partition, in order, each with a value, and how much of it is settled without a gap.
///
/// Positions ascend; they need not follow one another.
#[derive(Debug)]
pub struct Prefix<T> {
    out: VecDeque<(u64, State<T>)>,
    outstanding: usize,
}

#[derive(Debug)]
enum State<T> {
    Out(T),
    Settled,
    /// To be handed out again, from here on.
    Released,
}

impl<T> Default for Prefix<T> {
    fn default() -> Self {
        Self {
            out: VecDeque::new(),
            outstanding: 0,
        }
    }
}

impl<T> Prefix<T> {
    /// Notes that `position`, which is behind all others, was handed out.
    pub fn push(&mut self, position: u64, value: T) {
        debug_assert!(self.out.back().is_none_or(|(last, _)| *last < position));
        self.out.push_back((position, State::Out(value)));
        self.outstanding += 1;
    }

    /// What is outstanding at `position`.
    #[must_use]
    pub fn get(&self, position: u64) -> Option<&T> {
        match &self.out[self.find(position)?].1 {
            State::Out(value) => Some(value),
            _ => None,
        }
    }

    fn find(&self, position: u64) -> Option<usize> {
        self.out.binary_search_by_key(&position, |(position, _)| *position).ok()
    }

    /// Notes that it is settled, and gives its value; `None` if it is not outstanding.
    pub fn settle(&mut self, position: u64) -> Option<T> {
        self.end(position, State::Settled)
    }

    /// Notes that it is to be handed out again: nothing from there on is settled without a gap any more.
    pub fn release(&mut self, position: u64) -> Option<T> {
        self.end(position, State::Released)
    }

    fn end(&mut self, position: u64, state: State<T>) -> Option<T> {
        let at = self.find(position)?;
        let entry = &mut self.out[at].1;
        if !matches!(entry, State::Out(_)) {
            return None;
        }
        self.outstanding -= 1;
        match std::mem::replace(entry, state) {
            State::Out(value) => Some(value),
            _ => None,
        }
    }

    /// Forgets what is settled up to the first that is not, and gives its last position.
    pub fn advance(&mut self) -> Option<u64> {
        let mut last = None;
        while let Some((position, State::Settled)) = self.out.front() {
            last = Some(*position);
            self.out.pop_front();
        }
        last
    }

    /// The first that is not settled, of what is known.
    #[must_use]
    pub fn first_unsettled(&self) -> Option<u64> {
        let first = self.out.iter().find(|(_, state)| !matches!(state, State::Settled));
        first.map(|(position, _)| *position)
    }

    /// What is settled behind something that is not, in order.
    pub fn settled(&self) -> impl Iterator<Item = u64> {
        let settled = self.out.iter().filter(|(_, state)| matches!(state, State::Settled));
        settled.map(|(position, _)| *position)
    }

    /// How many are neither settled nor released.
    #[must_use]
    pub fn outstanding(&self) -> usize {
        self.outstanding
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_prefix_has_no_gaps() {
        let mut prefix = Prefix::default();
        for position in [3, 4, 7, 9, 10] {
            prefix.push(position, position * 10);
        }
        assert_eq!(
            (prefix.settle(4), prefix.settle(4), prefix.settle(5)),
            (Some(40), None, None)
        );
        assert_eq!(prefix.advance(), None);
        assert_eq!(prefix.settle(3), Some(30));
        assert_eq!(
            (prefix.advance(), prefix.advance(), prefix.outstanding()),
            (Some(4), None, 3)
        );
        assert_eq!(
            (prefix.settle(10), prefix.get(7), prefix.get(10)),
            (Some(100), Some(&70), None)
        );
        assert_eq!(prefix.settled().collect::<Vec<_>>(), [10]);
        assert_eq!(
            (prefix.release(9), prefix.settle(9), prefix.settle(7)),
            (Some(90), None, Some(70))
        );
        assert_eq!(
            (prefix.advance(), prefix.advance(), prefix.outstanding()),
            (Some(7), None, 0)
        );
    }

    #[test]
    fn shares_are_fair() {
        let shares: Vec<_> = (1..=5).map(|members| fair_share(8, members)).collect();
        assert_eq!(shares, [(8, 8), (4, 4), (2, 3), (2, 2), (1, 2)]);
        assert_eq!((fair_share(8, 0), fair_share(8, 20)), ((8, 8), (0, 1)));
    }
}
