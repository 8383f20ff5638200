//! Chance out of a seed, and the trace of what it led to.

use std::{
    collections::VecDeque,
    fmt,
    sync::{Mutex, MutexGuard},
    time::Duration,
};

/// A small generator (SplitMix64).
#[derive(Debug)]
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    pub(crate) fn number(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    /// Below `sides`.
    pub(crate) fn roll(&mut self, sides: usize) -> usize {
        usize::try_from(self.number() % sides.max(1) as u64).unwrap()
    }

    pub(crate) fn between(&mut self, least: usize, most: usize) -> usize {
        least + self.roll(most - least + 1)
    }

    /// `true` so many times in a thousand.
    pub(crate) fn chance(&mut self, per_mille: usize) -> bool {
        self.roll(1000) < per_mille
    }

    pub(crate) fn pick<T: Copy>(&mut self, of: &[T]) -> T {
        of[self.roll(of.len())]
    }

    pub(crate) fn millis(&mut self, least: usize, most: usize) -> Duration {
        Duration::from_millis(self.between(least, most) as u64)
    }
}

/// What happened, as text for whoever replays a history, and as a hash that two runs of one seed share.
#[derive(Debug)]
pub(crate) struct Trace(Mutex<Lines>);

#[derive(Debug)]
struct Lines {
    hash: u64,
    count: usize,
    last: VecDeque<String>,
}

impl Trace {
    pub(crate) fn new() -> Self {
        Self(Mutex::new(Lines {
            hash: 0xCBF2_9CE4_8422_2325,
            count: 0,
            last: VecDeque::new(),
        }))
    }

    fn lines(&self) -> MutexGuard<'_, Lines> {
        self.0.lock().unwrap()
    }

    pub(crate) fn note(&self, at: Duration, what: fmt::Arguments<'_>) {
        let line = format!("{:>10.3} {what}", at.as_secs_f64());
        let mut lines = self.lines();
        for byte in line.bytes() {
            lines.hash = (lines.hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01B3);
        }
        lines.count += 1;
        lines.last.push_back(line);
        if lines.last.len() > 4000 {
            lines.last.pop_front();
        }
    }

    pub(crate) fn hash(&self) -> u64 {
        self.lines().hash
    }

    pub(crate) fn count(&self) -> usize {
        self.lines().count
    }

    pub(crate) fn text(&self) -> String {
        let lines = self.lines();
        lines.last.iter().map(|line| format!("{line}\n")).collect()
    }
}
