//! Real processes on one SQLite file, killed (SIGKILL) and paused (SIGSTOP) at random: afterwards every committed event
//! has been sent, no rolled-back one has, and each key's first appearances are in order. Repeats are counted.
//!
//! About 40 s; `POSTRIDER_CRASH_SECONDS=600` for longer. It has no test harness: this program is its own child.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::disallowed_methods
)]

mod child;
mod ledger;

use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};

/// A small generator, so that a run can be told by its seed.
struct Dice(u64);

impl Dice {
    fn below(&mut self, sides: u64) -> u64 {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) % sides
    }
    fn millis(&mut self, from: u64, to: u64) -> Duration {
        Duration::from_millis(from + self.below(to - from))
    }
}

fn spawn(dir: &Path, what: &str) -> Child {
    let exe = std::env::current_exe().unwrap();
    Command::new(exe)
        .arg("child")
        .arg(dir)
        .arg(what)
        .stdin(Stdio::null())
        .spawn()
        .unwrap()
}

fn signal(child: &Child, name: &str) {
    let told = Command::new("kill")
        .arg(name)
        .arg(child.id().to_string())
        .status()
        .unwrap();
    assert!(told.success(), "kill {name} failed");
}

/// Two processes at a time, each killed or paused after a random while and followed by another, then one that finishes.
fn kill_at_random(seconds: u64, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(seed);
    let (mut kills, mut pauses) = (0, 0);
    let mut children = [spawn(dir.path(), "work"), spawn(dir.path(), "work")];
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        std::thread::sleep(dice.millis(30, 600));
        let child = &mut children[usize::try_from(dice.below(2)).unwrap()];
        assert!(child.try_wait().unwrap().is_none(), "a child ended by itself");
        if dice.below(4) == 0 {
            signal(child, "-STOP");
            // Longer than the lease, so that the other takes over meanwhile.
            std::thread::sleep(child::LEASE + dice.millis(100, 800));
            signal(child, "-CONT");
            pauses += 1;
        } else {
            child.kill().unwrap();
            child.wait().unwrap();
            kills += 1;
            *child = spawn(dir.path(), "work");
        }
    }
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let finished = spawn(dir.path(), "finish").wait().unwrap();
    assert!(finished.success(), "the last process could not finish");
    let report = ledger::compare(dir.path());
    println!("{kills} kills, {pauses} pauses: {report}");
    assert!(report.committed > 100, "too little happened to say anything");
    assert!(report.is_kept(), "a promise was broken");
}

/// A process that is told to end (SIGTERM) ends well and at once, and leaves nothing for the next to wait for.
fn told_to_end() {
    let dir = tempfile::tempdir().unwrap();
    let mut child = spawn(dir.path(), "serve");
    let until = Instant::now() + Duration::from_secs(20);
    while std::fs::read_to_string(ledger::broker(dir.path()))
        .unwrap_or_default()
        .lines()
        .count()
        < 20
    {
        assert!(Instant::now() < until, "nothing is sent");
        std::thread::sleep(Duration::from_millis(10));
    }
    signal(&child, "-TERM");
    assert!(child.wait().unwrap().success(), "it did not end well");
    assert!(spawn(dir.path(), "finish").wait().unwrap().success());
    let report = ledger::compare(dir.path());
    println!("told to end: {report}");
    assert!(report.is_kept(), "a promise was broken");
}

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, dir, what] = &arguments[..]
        && role == "child"
    {
        child::run(Path::new(dir), what);
        return;
    }
    if arguments.iter().any(|argument| argument == "--list") {
        println!("told_to_end: test\nkilled_and_paused_at_random: test");
        return;
    }
    let seconds = std::env::var("POSTRIDER_CRASH_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(40);
    let seed = u64::from(std::process::id());
    println!("\nrunning 2 tests (seed {seed}, {seconds} s)");
    told_to_end();
    println!("test told_to_end ... ok");
    kill_at_random(seconds, seed);
    println!(
        "test killed_and_paused_at_random ... ok\n\ntest result: ok. 2 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out"
    );
}
