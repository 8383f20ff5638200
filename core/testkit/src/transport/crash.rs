//! The order of keys through real accidents: member processes of one group that are killed (SIGKILL), paused (SIGSTOP) past
//! their lease and told to end (SIGTERM) at random, and the broker killed and restarted under them.
//!
//! A test of it is a program without a test harness that is its own child: its `main` calls [`order_through_accidents`].
#![allow(clippy::print_stdout, clippy::print_stderr, clippy::disallowed_methods)]

use crate::server::signal;
use postrider_core::PublisherExt as _;
use postrider_core::{GroupName, Message, PublishError, Settlement, Subscription, Taken, Topic, Transport};
use std::{
    collections::{BTreeMap, BTreeSet, HashSet},
    fs::File,
    io::Write as _,
    path::Path,
    process::{Child, Command, Stdio},
    sync::{
        Arc, Mutex,
        atomic::{AtomicBool, Ordering},
    },
    time::{Duration, Instant},
};

/// A broker that can be killed, and its connections cut.
pub trait Server {
    /// Starts one.
    fn start() -> Self;
    /// Starts one whose connections can be cut.
    fn behind_proxy() -> Self;
    /// How a member is told where it is.
    fn address(&self) -> String;
    /// Kills it at once.
    fn kill(&mut self);
    /// Starts it again, on the same data.
    fn restart(&mut self);
    /// How long after something was declared a crash may still undo it, whatever was confirmed since.
    fn forgets_within(&self) -> Duration {
        Duration::ZERO
    }
    /// Lets it stand still.
    fn pause(&mut self);
    /// Lets it go on.
    fn resume(&mut self);
    /// Cuts all connections that there are to it, if it was started for that.
    fn cut(&mut self);
}

macro_rules! server {
    ($type:ident, $address:ident, $forgets_within:expr) => {
        impl Server for crate::server::$type {
            fn start() -> Self {
                crate::server::$type::start()
            }
            fn behind_proxy() -> Self {
                crate::server::$type::behind_proxy()
            }
            fn address(&self) -> String {
                self.$address().to_string()
            }
            fn kill(&mut self) {
                crate::server::$type::kill(self);
            }
            fn restart(&mut self) {
                crate::server::$type::restart(self);
            }
            fn forgets_within(&self) -> Duration {
                $forgets_within
            }
            fn pause(&mut self) {
                crate::server::$type::pause(self);
            }
            fn resume(&mut self) {
                crate::server::$type::resume(self);
            }
            fn cut(&mut self) {
                crate::server::$type::cut(self);
            }
        }
    };
}
// Which quorum queues there are it writes with a delay of three seconds: one that is younger has no leader after a crash.
server!(RabbitMq, url, Duration::from_secs(4));
server!(Kafka, brokers, Duration::ZERO);

const KEYS: usize = 60;
const MEMBERS: usize = 3;

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

fn topic() -> Topic {
    Topic::new("accidents")
}

fn subscription() -> Subscription {
    Subscription::new(GroupName::new("members"), vec![topic()]).with_max_in_flight(64)
}

/// Runs it for `POSTRIDER_CRASH_SECONDS`, by default 45, by the seed `POSTRIDER_CRASH_SEED`; a paused member stands still for
/// longer than `lease`. Ends the process with an error if a promise was broken.
///
/// # Panics
/// If a message was lost or overtaken.
pub fn order_through_accidents<S: Server>(
    start: impl FnOnce() -> S,
    transport: impl Fn(&str) -> Transport + Send + 'static,
    lease: Duration,
) {
    let arguments: Vec<String> = std::env::args().collect();
    if let [_, role, address, file] = &arguments[..]
        && role == "member"
    {
        return member(&transport(address), Path::new(file));
    }
    const NAME: &str = "order_is_kept_through_accidents";
    if arguments.iter().any(|argument| argument == "--list") {
        return println!("{NAME}: test");
    }
    let names: Vec<&String> = arguments[1..]
        .iter()
        .filter(|argument| !argument.starts_with('-'))
        .collect();
    if !names.is_empty() && !names.iter().any(|name| NAME.contains(name.as_str())) {
        return println!(
            "\nrunning 0 tests\n\ntest result: ok. 0 passed; 0 failed; 0 ignored; 0 measured; 1 filtered out"
        );
    }
    let number = |name: &str| std::env::var(name).ok().and_then(|text| text.parse::<u64>().ok());
    let seconds = number("POSTRIDER_CRASH_SECONDS").unwrap_or(45);
    let seed = number("POSTRIDER_CRASH_SEED").unwrap_or_else(|| u64::from(std::process::id()));
    println!("\nrunning 1 test (seed {seed}, {seconds} s)");
    accidents(start(), transport, lease, Duration::from_secs(seconds), seed);
    println!("test {NAME} ... ok\n\ntest result: ok. 1 passed; 0 failed; 0 ignored; 0 measured; 0 filtered out");
}

fn accidents<S: Server>(
    mut server: S,
    transport: impl Fn(&str) -> Transport + Send + 'static,
    lease: Duration,
    length: Duration,
    seed: u64,
) {
    let dir = tempfile::tempdir().expect("a directory");
    let seen = dir.path().join("seen.txt");
    File::create(&seen).expect("a file");
    let address = server.address();
    let start = || {
        let exe = std::env::current_exe().expect("this program");
        let mut member = Command::new(exe);
        member.arg("member").arg(&address).arg(&seen).stdin(Stdio::null());
        member.spawn().expect("a member")
    };
    let mut dice = Dice(seed);
    let mut members: Vec<Child> = (0..MEMBERS).map(|_| start()).collect();
    let lines = || std::fs::read_to_string(&seen).unwrap_or_default();
    let (stop, published) = (Arc::new(AtomicBool::new(false)), Arc::new(Mutex::new(BTreeMap::new())));
    let publisher = {
        let (stop, published, transport) = (stop.clone(), published.clone(), transport(&address));
        std::thread::spawn(move || publish(&transport, &stop, &published))
    };
    let began = Instant::now();
    while lines().is_empty() {
        assert!(began.elapsed() < Duration::from_secs(60), "nothing is received");
        std::thread::sleep(Duration::from_millis(20));
    }
    std::thread::sleep(server.forgets_within());
    let (mut kills, mut pauses, mut ends, mut crashes) = (0, 0, 0, 0);
    let until = Instant::now() + length;
    while Instant::now() < until {
        std::thread::sleep(dice.millis(100, 1500));
        let member = &mut members[usize::try_from(dice.below(MEMBERS as u64)).unwrap_or(0)];
        match dice.below(10) {
            0 => {
                server.kill();
                std::thread::sleep(dice.millis(0, 500));
                server.restart();
                crashes += 1;
            }
            1..=3 => {
                signal("-STOP", &[member.id()]);
                std::thread::sleep(lease + dice.millis(200, 1500));
                signal("-CONT", &[member.id()]);
                pauses += 1;
            }
            4..=6 => {
                signal("-TERM", &[member.id()]);
                let began = Instant::now();
                while member.try_wait().expect("its end").is_none() {
                    assert!(began.elapsed() < Duration::from_secs(30), "a member does not end");
                    std::thread::sleep(Duration::from_millis(5));
                }
                *member = start();
                ends += 1;
            }
            _ => {
                member.kill().expect("a kill");
                member.wait().expect("its end");
                *member = start();
                kills += 1;
            }
        }
    }
    stop.store(true, Ordering::Release);
    publisher.join().expect("the publisher");
    let published: BTreeMap<usize, u32> = published.lock().expect("no panic").clone();
    let all: usize = published.values().map(|count| *count as usize).sum();
    // Everything arrives in the end.
    let began = Instant::now();
    loop {
        let distinct: HashSet<(usize, u32)> = parse(&lines()).into_iter().map(|(key, n, _)| (key, n)).collect();
        if distinct.len() >= all || began.elapsed() > Duration::from_secs(90) {
            break;
        }
        std::thread::sleep(Duration::from_millis(100));
    }
    for member in &mut members {
        let _ = member.kill();
        let _ = member.wait();
    }
    let text = lines();
    let seen = parse(&text);
    let (mut last, mut distinct, mut inversions) = (BTreeMap::<usize, u32>::new(), BTreeSet::new(), Vec::new());
    for (key, n, line) in &seen {
        if distinct.insert((*key, *n)) {
            let last = last.entry(*key).or_default();
            if *n < *last {
                inversions.push((*key, *n, *line));
            }
            *last = (*n).max(*last);
        }
    }
    let lost: Vec<(usize, u32)> = published
        .iter()
        .flat_map(|(key, count)| (1..=*count).map(|n| (*key, n)))
        .filter(|of| !distinct.contains(of))
        .collect();
    println!(
        "{kills} kills, {pauses} pauses, {ends} told to end, {crashes} crashes of the broker: {all} published, lost {lost:?}, out of order {inversions:?}, {} duplicates, the last after {:?}",
        seen.len() - distinct.len(),
        began.elapsed()
    );
    for (key, n, line) in inversions.iter().take(3) {
        println!("  around {key} {n}:");
        let of_key = text
            .lines()
            .enumerate()
            .filter(|(_, text)| text.starts_with(&format!("{key} ")));
        for (at, text) in of_key.filter(|(at, _)| at.abs_diff(*line) < 400).take(40) {
            println!("    {at}: {text}");
        }
    }
    assert!(all > 500, "too little happened to say anything");
    assert!(lost.is_empty() && inversions.is_empty(), "a promise was broken");
}

/// Key, number and line of each.
fn parse(text: &str) -> Vec<(usize, u32, usize)> {
    let parse = |(at, line): (usize, &str)| {
        let mut words = line.split(' ');
        Some((words.next()?.parse().ok()?, words.next()?.parse().ok()?, at))
    };
    text.lines().enumerate().filter_map(parse).collect()
}

/// Numbers for each key, each published once the one before is confirmed.
#[tokio::main(flavor = "current_thread")]
async fn publish(transport: &Transport, stop: &AtomicBool, published: &Mutex<BTreeMap<usize, u32>>) {
    let publisher = transport.publisher().expect("a publisher");
    let mut next: Vec<(u32, Message)> = (0..KEYS).map(|key| (1, numbered(key, 1))).collect();
    while !stop.load(Ordering::Acquire) {
        let batch: Vec<Message> = next.iter().map(|(_, message)| message.clone()).collect();
        let outcomes: Vec<Result<(), PublishError>> = publisher.publish_all(&batch).await;
        let is_away = outcomes.iter().any(Result::is_err);
        for ((key, (n, message)), outcome) in next.iter_mut().enumerate().zip(outcomes) {
            if outcome.is_ok() {
                published.lock().expect("no panic").insert(key, *n);
                *n += 1;
                *message = numbered(key, *n);
            }
        }
        tokio::time::sleep(Duration::from_millis(if is_away { 200 } else { 25 })).await;
    }
}

fn numbered(key: usize, n: u32) -> Message {
    Message::new(topic(), "numbered.v1", n.to_string())
        .with_source("kit")
        .with_key(key.to_string())
}

/// A member that notes what it gets, and ends well when it is told to.
#[tokio::main(flavor = "multi_thread", worker_threads = 2)]
async fn member(transport: &Transport, file: &Path) {
    let mut file = File::options().append(true).open(file).expect("the file");
    let mut told = tokio::signal::unix::signal(tokio::signal::unix::SignalKind::terminate()).expect("a signal");
    let subscription = subscription();
    let subscriber = transport.subscriber(&subscription).expect("a subscriber").clone();
    let (mut intake, settling) = loop {
        let joined = tokio::select! {
            joined = subscriber.subscribe(&subscription) => joined,
            _ = told.recv() => return,
        };
        match joined {
            Ok(feed) => break feed.split(),
            Err(error) => eprintln!("(a member cannot join, as it may: {})", error.to_chain()),
        }
        tokio::time::sleep(Duration::from_millis(200)).await;
    };
    let mut dice = Dice(u64::from(std::process::id()));
    loop {
        let taken = tokio::select! {
            taken = intake.next(20) => taken,
            _ = told.recv() => break,
        };
        let batch = match taken {
            Ok(Taken::Batch(batch)) => batch,
            Ok(_) => {
                settling.settle(Vec::new()).await;
                continue;
            }
            Err(_) => {
                tokio::time::sleep(Duration::from_millis(50)).await;
                continue;
            }
        };
        let mut settlements: Vec<Settlement> = Vec::new();
        for delivery in batch {
            if delivery.is_gone() {
                continue;
            }
            let n = String::from_utf8_lossy(delivery.message().payload()).into_owned();
            let line = format!(
                "{} {n} {}\n",
                delivery.message().key().unwrap_or_default(),
                std::process::id()
            );
            file.write_all(line.as_bytes()).expect("a line");
            settlements.push(delivery.ack());
            if dice.below(40) == 0 {
                tokio::time::sleep(dice.millis(1, 20)).await;
            }
        }
        settling.settle(settlements).await;
    }
    let _ = settling.close(Duration::from_secs(10)).await;
}
