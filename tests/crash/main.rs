//! Real processes on one database, killed (SIGKILL) and paused (SIGSTOP) at random, and the Postgres server killed under
//! them: afterwards every committed event has been sent, no rolled-back one has, and each key's first appearances are in
//! order. Repeats are counted.
//!
//! About a minute and a half; `POSTRIDER_CRASH_SECONDS=600` for longer. It has no test harness: this program is its own
//! child. Of the names given as arguments only those tests run.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::disallowed_methods
)]

mod child;
mod ledger;
mod store;

use postrider_testkit::server::Postgres;
use std::{
    path::Path,
    process::{Child, Command, Stdio},
    time::{Duration, Instant},
};
use store::Place;

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

fn spawn(dir: &Path, place: &Place, what: &str) -> Child {
    let exe = std::env::current_exe().unwrap();
    Command::new(exe)
        .arg("child")
        .arg(dir)
        .arg(place.to_text())
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

/// Two processes at a time, each killed or paused after a random while and followed by another, and now and then the
/// server, if there is one to kill; then a process that finishes.
fn kill_at_random(place: &Place, mut server: Option<&mut Postgres>, seconds: u64, seed: u64) {
    let dir = tempfile::tempdir().unwrap();
    let mut dice = Dice(seed);
    let (mut kills, mut pauses, mut crashes) = (0, 0, 0);
    let start = || spawn(dir.path(), place, "work");
    let mut children = [start(), start()];
    let until = Instant::now() + Duration::from_secs(seconds);
    while Instant::now() < until {
        std::thread::sleep(dice.millis(30, 600));
        let child = &mut children[usize::try_from(dice.below(2)).unwrap()];
        assert!(child.try_wait().unwrap().is_none(), "a child ended by itself");
        match (dice.below(8), &mut server) {
            (0, Some(server)) => {
                server.kill();
                std::thread::sleep(dice.millis(0, 500));
                server.restart();
                crashes += 1;
            }
            (0..=2, _) => {
                signal(child, "-STOP");
                // Longer than the lease, so that the other takes over meanwhile.
                std::thread::sleep(child::LEASE + dice.millis(100, 800));
                signal(child, "-CONT");
                pauses += 1;
            }
            _ => {
                child.kill().unwrap();
                child.wait().unwrap();
                kills += 1;
                *child = start();
            }
        }
    }
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let finished = spawn(dir.path(), place, "finish").wait().unwrap();
    assert!(finished.success(), "the last process could not finish");
    let report = ledger::compare(dir.path(), place);
    println!("{kills} kills, {pauses} pauses, {crashes} crashes of the server: {report}");
    assert!(report.committed > 100, "too little happened to say anything");
    assert!(report.is_kept(), "a promise was broken");
}

/// A process that is told to end (SIGTERM) ends well and at once, and leaves nothing for the next to wait for.
fn told_to_end(place: &Place) {
    let dir = tempfile::tempdir().unwrap();
    let mut child = spawn(dir.path(), place, "serve");
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
    assert!(spawn(dir.path(), place, "finish").wait().unwrap().success());
    let report = ledger::compare(dir.path(), place);
    println!("told to end: {report}");
    assert!(report.is_kept(), "a promise was broken");
}

/// A process that was paused past its lease, and goes on, publishes nothing more of what it held and settles nothing: not
/// even what it was just publishing.
fn paused_past_its_lease(place: &Place) {
    let dir = tempfile::tempdir().unwrap();
    let lines = |path: &Path, of: &Child| {
        let text = std::fs::read_to_string(path).unwrap_or_default();
        let of = of.id().to_string();
        text.lines()
            .filter(|line| line.split(' ').any(|word| word == of))
            .count()
    };
    let (broker, begun) = (ledger::broker(dir.path()), ledger::begun(dir.path()));
    let wait_for = |what: &str, is_so: &dyn Fn() -> bool| {
        let until = Instant::now() + Duration::from_secs(20);
        while !is_so() {
            assert!(Instant::now() < until, "{what}");
            std::thread::sleep(Duration::from_millis(5));
        }
    };
    assert!(spawn(dir.path(), place, "fill").wait().unwrap().success());
    let mut paused = spawn(dir.path(), place, "slow");
    wait_for("nothing is sent", &|| lines(&broker, &paused) >= 40);
    signal(&paused, "-STOP");
    // The next takes it all over, and sends nothing: what is done from now on, the paused one has done.
    let mut next = spawn(dir.path(), place, "hold");
    wait_for("nobody takes over", &|| lines(&begun, &next) > 0);
    let (calls, sent) = (lines(&begun, &paused), lines(&broker, &paused));
    let pending = pending(dir.path(), place);
    assert!(pending > 200, "there is work that both have been given: {pending}");
    signal(&paused, "-CONT");
    std::thread::sleep(child::LEASE * 3);
    let more = lines(&broker, &paused) - sent;
    println!(
        "paused with {pending} pending, past its lease: {} calls begun afterwards, {more} sent by the one under way",
        lines(&begun, &paused) - calls
    );
    assert_eq!(lines(&begun, &paused), calls, "it publishes what is no longer its own");
    assert!(more <= 10, "it sent more than it was just sending");
    assert_eq!(
        self::pending(dir.path(), place),
        pending,
        "it settled what is no longer its own"
    );
    for child in [&mut paused, &mut next] {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    assert!(spawn(dir.path(), place, "finish").wait().unwrap().success());
    let report = ledger::compare(dir.path(), place);
    println!("paused past its lease: {report}");
    assert!(report.is_kept(), "a promise was broken");
}

#[tokio::main(flavor = "current_thread")]
async fn pending(dir: &Path, place: &Place) -> u64 {
    store::Store::open(dir, place).await.unwrap().pending().await
}

/// A server with nothing on it.
fn fresh_server() -> (Postgres, Place) {
    let server = Postgres::start();
    let place = Place::Postgres(server.url());
    (server, place)
}

/// What a test is called, and what it does: for so many seconds, by that seed.
type Test = (&'static str, fn(u64, u64));

const TESTS: [Test; 7] = [
    ("sqlite_told_to_end", |_, _| told_to_end(&Place::Sqlite)),
    ("sqlite_paused_past_its_lease", |_, _| {
        paused_past_its_lease(&Place::Sqlite)
    }),
    ("sqlite_killed_and_paused_at_random", |seconds, seed| {
        kill_at_random(&Place::Sqlite, None, seconds, seed);
    }),
    ("postgres_told_to_end", |_, _| {
        let (_server, place) = fresh_server();
        told_to_end(&place);
    }),
    ("postgres_paused_past_its_lease", |_, _| {
        let (_server, place) = fresh_server();
        paused_past_its_lease(&place);
    }),
    ("postgres_killed_and_paused_at_random", |seconds, seed| {
        let (_server, place) = fresh_server();
        kill_at_random(&place, None, seconds, seed);
    }),
    ("postgres_and_its_server_killed_at_random", |seconds, seed| {
        let (mut server, place) = fresh_server();
        kill_at_random(&place, Some(&mut server), seconds, seed);
    }),
];

fn main() {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, dir, place, what] = &arguments[..]
        && role == "child"
    {
        child::run(Path::new(dir), &Place::parse(place), what);
        return;
    }
    if arguments.iter().any(|argument| argument == "--list") {
        TESTS.iter().for_each(|(name, _)| println!("{name}: test"));
        return;
    }
    let names: Vec<&String> = arguments[1..]
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    let wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| name.contains(wanted.as_str()));
    let seconds = std::env::var("POSTRIDER_CRASH_SECONDS")
        .ok()
        .and_then(|s| s.parse().ok())
        .unwrap_or(25);
    let seed = std::env::var("POSTRIDER_CRASH_SEED").ok().and_then(|s| s.parse().ok());
    let seed = seed.unwrap_or_else(|| u64::from(std::process::id()));
    let (run, left): (Vec<_>, Vec<_>) = TESTS.iter().partition(|(name, _)| wanted(name));
    println!("\nrunning {} tests (seed {seed}, {seconds} s each)", run.len());
    for (name, test) in &run {
        test(seconds, seed);
        println!("test {name} ... ok");
    }
    println!(
        "\ntest result: ok. {} passed; 0 failed; 0 ignored; 0 measured; {} filtered out",
        run.len(),
        left.len()
    );
}
