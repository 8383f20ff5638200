//! What was committed, what was sent, and whether the two agree.

use crate::store::{Place, Store};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fmt,
    path::{Path, PathBuf},
    time::SystemTime,
};

pub(crate) fn broker(dir: &Path) -> PathBuf {
    dir.join("broker.txt")
}

/// The calls of brokers that are not fast, each with who made it.
pub(crate) fn begun(dir: &Path) -> PathBuf {
    dir.join("begun.txt")
}

/// With who sent it and when, for whoever has to find out how it came to be.
pub(crate) fn line(key: i64, n: i64) -> String {
    let now = SystemTime::now()
        .duration_since(SystemTime::UNIX_EPOCH)
        .unwrap_or_default();
    format!("{key} {n} {} {}\n", std::process::id(), now.as_micros())
}

pub(crate) struct Report {
    pub(crate) committed: usize,
    sent: usize,
    lost: Vec<(i64, i64)>,
    /// Sent, though never committed.
    invented: Vec<(i64, i64)>,
    inversions: Vec<(i64, i64)>,
    duplicates: usize,
}

impl Report {
    pub(crate) fn is_kept(&self) -> bool {
        self.lost.is_empty() && self.invented.is_empty() && self.inversions.is_empty()
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(
            f,
            "{} committed, {} sent, lost {:?}, sent though rolled back {:?}, out of order {:?}, {} duplicates",
            self.committed, self.sent, self.lost, self.invented, self.inversions, self.duplicates
        )
    }
}

#[tokio::main(flavor = "current_thread")]
pub(crate) async fn compare(dir: &Path, place: &Place) -> Report {
    let committed: BTreeSet<(i64, i64)> = Store::open(dir, place).await.unwrap().committed().await;
    let text = std::fs::read_to_string(broker(dir)).unwrap();
    let sent: Vec<(i64, i64)> = text
        .lines()
        .map(|line| {
            let mut words = line.split(' ').map(|word| word.parse().unwrap());
            (words.next().unwrap(), words.next().unwrap())
        })
        .collect();
    let history = |key: i64| {
        text.lines()
            .filter(|line| line.starts_with(&format!("{key} ")))
            .collect::<Vec<_>>()
    };
    let mut seen = HashSet::new();
    let mut last: BTreeMap<i64, i64> = BTreeMap::new();
    let mut inversions = Vec::new();
    for (key, n) in sent.iter().copied() {
        if seen.insert((key, n)) {
            let last = last.entry(key).or_default();
            if n < *last {
                inversions.push((key, n));
                let lines = history(key);
                let at = lines
                    .iter()
                    .position(|line| line.starts_with(&format!("{key} {n} ")))
                    .unwrap_or(0);
                println!(
                    "around {key} {n}: {:#?}",
                    &lines[at.saturating_sub(12)..(at + 8).min(lines.len())]
                );
            }
            *last = n;
        }
    }
    Report {
        committed: committed.len(),
        lost: committed
            .iter()
            .filter(|event| !seen.contains(event))
            .copied()
            .collect(),
        invented: seen
            .iter()
            .filter(|event| !committed.contains(event))
            .copied()
            .collect(),
        inversions,
        duplicates: sent.len() - seen.len(),
        sent: sent.len(),
    }
}
