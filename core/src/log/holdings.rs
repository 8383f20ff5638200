use rustc_hash::FxHashMap;
use std::collections::VecDeque;

/// What a session holds, for authors of logs: which records are out, which keys are busy, and what was passed over for
/// a busy key and is to be given once the key is free.
///
/// For logs read with a cursor, behind which everything is known. Keys are hashes
/// ([`Message::key_hash`](crate::Message::key_hash)): two keys that collide only wait for each other.
///
/// What is passed over costs its position, eight bytes, however much it is: a backlog of one key must not keep the cursor
/// from the others.
#[derive(Debug, Default)]
pub struct Holdings {
    held: FxHashMap<u64, Option<u64>>,
    keys: FxHashMap<u64, Key>,
    /// Keys that became free with something passed over.
    freed: VecDeque<u64>,
    claim: u64,
}

#[derive(Debug, Default)]
struct Key {
    held: usize,
    /// The claim that gave what is held: the same claim may give more of it, no other.
    claim: u64,
    passed_over: VecDeque<u64>,
}

impl Holdings {
    /// Begins a claim: what it takes of one key counts as one run.
    pub fn begin_claim(&mut self) {
        self.claim += 1;
    }

    /// Takes the record at `position`, or passes it over because its key is busy: then it is remembered and the answer
    /// is `false`. Called in ascending order of positions, as far as one claim goes; not for records that are
    /// [known](Holdings::known_above).
    pub fn take(&mut self, position: u64, key: Option<u64>) -> bool {
        if let Some(hash) = key {
            let claim = self.claim;
            let entry = self.keys.entry(hash).or_default();
            let busy = (entry.held > 0 && entry.claim != claim) || !entry.passed_over.is_empty();
            if busy {
                let at = entry.passed_over.partition_point(|p| *p < position);
                entry.passed_over.insert(at, position);
                return false;
            }
            entry.held += 1;
            entry.claim = claim;
        }
        self.held.insert(position, key);
        true
    }

    /// Takes a record of a key whose order somebody else has already seen to (a parked run): never passes it over.
    pub fn take_run(&mut self, position: u64, key: Option<u64>) {
        if let Some(hash) = key {
            let entry = self.keys.entry(hash).or_default();
            entry.held += 1;
            entry.claim = self.claim;
        }
        self.held.insert(position, key);
    }

    /// The positions passed over whose keys have become free, up to `max`, taken in order.
    pub fn take_freed(&mut self, max: usize) -> Vec<u64> {
        let mut taken = Vec::new();
        while taken.len() < max {
            let Some(&hash) = self.freed.front() else { break };
            let claim = self.claim;
            let Some(key) = self.keys.get_mut(&hash) else {
                self.freed.pop_front();
                continue;
            };
            if key.held > 0 && key.claim != claim {
                self.freed.pop_front();
                continue;
            }
            let Some(position) = key.passed_over.pop_front() else {
                self.freed.pop_front();
                self.forget_if_idle(hash);
                continue;
            };
            key.held += 1;
            key.claim = claim;
            self.held.insert(position, Some(hash));
            taken.push(position);
        }
        taken
    }

    /// Lets go of a record. `false` if it was not held.
    pub fn let_go(&mut self, position: u64) -> bool {
        let Some(key) = self.held.remove(&position) else {
            return false;
        };
        if let Some(hash) = key {
            if let Some(entry) = self.keys.get_mut(&hash) {
                entry.held -= 1;
                if entry.held == 0 && !entry.passed_over.is_empty() {
                    self.freed.push_back(hash);
                }
            }
            self.forget_if_idle(hash);
        }
        true
    }

    /// Gives a record back to be claimed again, before anything of its key that was passed over.
    pub fn give_back(&mut self, position: u64) {
        match self.held.get(&position).copied() {
            None => {}
            Some(None) => {
                // Keyless: any free place will do, so it queues as a key of its own.
                self.held.remove(&position);
                self.remember(position ^ KEYLESS, position);
            }
            Some(Some(hash)) => {
                self.remember(hash, position);
                self.let_go(position);
            }
        }
    }

    fn remember(&mut self, hash: u64, position: u64) {
        let key = self.keys.entry(hash).or_default();
        let at = key.passed_over.partition_point(|p| *p < position);
        key.passed_over.insert(at, position);
        if key.held == 0 {
            self.freed.push_back(hash);
        }
    }

    /// What was passed over for a key, in order.
    #[must_use]
    pub fn passed_over(&self, key: u64) -> Vec<u64> {
        self.keys
            .get(&key)
            .map_or_else(Vec::new, |key| key.passed_over.iter().copied().collect())
    }

    /// The first of what was passed over for a key, up to `max`, in order.
    #[must_use]
    pub fn first_passed_over(&self, key: u64, max: usize) -> Vec<u64> {
        self.keys
            .get(&key)
            .map_or_else(Vec::new, |key| key.passed_over.iter().take(max).copied().collect())
    }

    /// Whether anything was passed over for a key.
    #[must_use]
    pub fn has_passed_over(&self, key: u64) -> bool {
        self.keys.get(&key).is_some_and(|key| !key.passed_over.is_empty())
    }

    /// What was passed over for a key and `belongs` to it (hashes collide), forgotten here: it is being parked behind
    /// its head.
    pub fn forget_key(&mut self, hash: u64, mut belongs: impl FnMut(u64) -> bool) -> Vec<u64> {
        let Some(key) = self.keys.get_mut(&hash) else {
            return Vec::new();
        };
        let mut forgotten = Vec::new();
        key.passed_over.retain(|position| {
            let forget = belongs(*position);
            if forget {
                forgotten.push(*position);
            }
            !forget
        });
        self.forget_if_idle(hash);
        forgotten
    }

    fn forget_if_idle(&mut self, hash: u64) {
        if self
            .keys
            .get(&hash)
            .is_some_and(|k| k.held == 0 && k.passed_over.is_empty())
        {
            self.keys.remove(&hash);
        }
    }

    /// Whether the record is out.
    #[must_use]
    pub fn is_held(&self, position: u64) -> bool {
        self.held.contains_key(&position)
    }

    /// The positions behind `cursor` that are out or passed over: not to be read again.
    pub fn known_above(&self, cursor: u64) -> impl Iterator<Item = u64> {
        let passed_over = self.keys.values().flat_map(move |key| {
            let first = key.passed_over.partition_point(|position| *position <= cursor);
            key.passed_over.range(first..)
        });
        let held = self.held.keys().filter(move |position| **position > cursor);
        held.chain(passed_over).copied()
    }

    /// Whether something of this key is out, given by an earlier claim than the one begun last.
    #[must_use]
    pub fn is_busy(&self, key: u64) -> bool {
        let claim = self.claim;
        self.keys.get(&key).is_some_and(|k| k.held > 0 && k.claim != claim)
    }

    /// Whether something passed over could be given now.
    #[must_use]
    pub fn has_freed(&self) -> bool {
        !self.freed.is_empty()
    }

    /// How many records are out.
    #[must_use]
    pub fn len(&self) -> usize {
        self.held.len()
    }

    /// Whether nothing is out.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.held.is_empty()
    }

    /// Forgets everything: the lease is lost, and the cursor begins anew.
    pub fn clear(&mut self) {
        *self = Self {
            claim: self.claim,
            ..Self::default()
        };
    }
}

const KEYLESS: u64 = 0xA5A5_5A5A_0F0F_F0F0;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_run_is_given_whole_and_the_rest_waits_for_it() {
        let mut h = Holdings::default();
        h.begin_claim();
        assert!(h.take(1, Some(7)) && h.take(2, None) && h.take(3, Some(7)));
        h.begin_claim();
        assert!(!h.take(4, Some(7)) && h.take(5, Some(8)) && !h.take(6, Some(7)));
        h.let_go(1);
        assert!(!h.has_freed());
        h.let_go(3);
        assert!(h.has_freed());
        h.begin_claim();
        assert_eq!(h.take_freed(1), [4]);
        assert!(!h.take(9, Some(7)), "6 comes first");
        h.begin_claim();
        assert_eq!(h.take_freed(10), [] as [u64; 0]);
        h.let_go(4);
        h.begin_claim();
        assert_eq!(h.take_freed(10), [6, 9]);
        assert_eq!(h.len(), 4);
    }

    #[test]
    fn what_is_given_back_comes_again_first() {
        let mut h = Holdings::default();
        h.begin_claim();
        assert!(h.take(1, Some(7)) && h.take(2, Some(7)) && h.take(3, None));
        h.begin_claim();
        assert!(!h.take(4, Some(7)));
        for position in [2, 1, 3] {
            h.give_back(position);
        }
        h.begin_claim();
        let mut again = h.take_freed(10);
        again.sort_unstable();
        assert_eq!(again, [1, 2, 3, 4]);
        assert!(h.is_held(4));
        assert_eq!(h.forget_key(7, |_| true), [] as [u64; 0]);
    }
}
