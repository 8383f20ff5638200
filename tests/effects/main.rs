//! Exactly-once effects, and chains that end all done or all taken back, wherever their process dies: a process dies at
//! every boundary there is in its handling of a message, one after the other, and another one finishes. Then of each
//! message there is one effect in the database and one follow-up at the broker.
//!
//! About a minute. It has no test harness: this program is its own child. Of the names given as arguments only those tests
//! run. The broker is a stand-in, two files that outlive every process: that what is unsettled comes back from real ones
//! is shown by the conformance suite, and `random_kills` runs on RabbitMQ.

#![allow(
    clippy::unwrap_used,
    clippy::print_stdout,
    clippy::expect_used,
    clippy::disallowed_methods,
    clippy::exit
)]

mod broker;
mod child;
mod fate;

use broker::Broker;
use child::{Scene, Store};
use postrider::{DynEvent, Message};
use postrider_testkit::server::{Postgres, RabbitMq};
use std::{
    fs::File,
    path::Path,
    process::{Child, Command, Stdio},
    sync::Arc,
    time::{Duration, Instant},
};

fn spawn(dir: &Path, place: &str, scene: Scene, dies_at: u64) -> Child {
    let exe = std::env::current_exe().unwrap();
    Command::new(exe)
        .args(["child", place, scene.name(), &dies_at.to_string()])
        .arg(dir)
        .stdin(Stdio::null())
        .stderr(File::create(dir.join("stderr")).unwrap())
        .spawn()
        .unwrap()
}

/// What the last process there said before it ended.
fn last_words(dir: &Path) -> String {
    std::fs::read_to_string(dir.join("stderr")).unwrap()
}

/// Dies at the first boundary, the second, and so on, until a process comes through alive; several at a time.
async fn dies_everywhere(place: &str, scene: Scene) {
    const AT_ONCE: u64 = 6;
    let store = Store::make(place).await.unwrap();
    // They share the outbox, and so what is published of one may be published by another.
    let root = Arc::new(tempfile::tempdir().unwrap());
    let (mut deaths, began) = (0, Instant::now());
    for first in (1..).step_by(AT_ONCE as usize) {
        let several = (first..first + AT_ONCE).map(|at| {
            let (place, store, root) = (place.to_owned(), store.clone(), root.clone());
            tokio::spawn(async move { dies_at(&place, &store, root.path(), scene, at).await })
        });
        let mut all_died = true;
        for one in several.collect::<Vec<_>>() {
            let died = one.await.unwrap();
            deaths += u32::from(died);
            all_died &= died;
        }
        if !all_died {
            break;
        }
    }
    let kind = place.split(':').next().unwrap();
    println!("{scene:?} on {kind}: {deaths} deaths, {:.1?}", began.elapsed());
    assert!(
        deaths >= scene.least_deaths(),
        "too few boundaries to say anything: {deaths}"
    );
}

/// Whether the process died; another one has finished then.
async fn dies_at(place: &str, store: &Store, root: &Path, scene: Scene, at: u64) -> bool {
    let dir = tempfile::tempdir_in(root).unwrap();
    let messages: Vec<Message> = (0..scene.messages())
        .map(|n| DynEvent::to_message(&child::Ordered { n }).unwrap())
        .collect();
    Broker::send(dir.path(), &messages);
    let end = async |at: u64| {
        let mut child = spawn(dir.path(), place, scene, at);
        tokio::task::spawn_blocking(move || child.wait().unwrap())
            .await
            .unwrap()
    };
    let died = !end(at).await.success();
    if died {
        assert!(
            end(u64::MAX).await.success(),
            "{scene:?} on {place}: after the death at {at} nobody could finish: {}",
            last_words(dir.path())
        );
    }
    for message in &messages {
        let found = (
            store.effects(message.id()).await,
            Broker::published(dir.path(), message.id()),
        );
        let text = format!("{scene:?} on {place}: the process died at {at}, and then: effects, follow-ups");
        assert_eq!(found, scene.expected(), "{text}");
    }
    died
}

/// Real processes on a real broker, killed at random.
async fn random_kills(place: &str, rabbitmq: &RabbitMq, seconds: u64) {
    let store = Store::make(place).await.unwrap();
    let dir = tempfile::tempdir().unwrap();
    std::fs::write(dir.path().join("amqp"), rabbitmq.url()).unwrap();
    let start = || spawn(dir.path(), place, Scene::Random, u64::MAX);
    let mut children = [start(), start()];
    let until = Instant::now() + Duration::from_secs(seconds);
    let (mut dice, mut kills) = (0x2545_f491_4f6c_dd1d_u64, 0);
    while Instant::now() < until {
        dice ^= dice << 13;
        dice ^= dice >> 7;
        dice ^= dice << 17;
        tokio::time::sleep(Duration::from_millis(100 + dice % 900)).await;
        let child = &mut children[usize::try_from(dice >> 40).unwrap() % 2];
        assert!(child.try_wait().unwrap().is_none(), "a child ended by itself");
        child.kill().unwrap();
        child.wait().unwrap();
        kills += 1;
        *child = start();
    }
    for child in &mut children {
        child.kill().unwrap();
        child.wait().unwrap();
    }
    let last = spawn(dir.path(), place, Scene::Finish, u64::MAX).wait().unwrap();
    assert!(
        last.success(),
        "the last process could not finish: {}",
        last_words(dir.path())
    );
    let (sent, effects, follow_ups) = store.of_random().await;
    let repeated = effects.values().filter(|n| **n != 1).count();
    println!(
        "random kills on RabbitMQ and Postgres: {kills} kills, {sent} sent, {} with an effect, {repeated} with more than one, {} follow-ups",
        effects.len(),
        follow_ups.len()
    );
    assert!(sent > 50, "too little happened to say anything");
    assert_eq!((effects.len(), repeated), (sent, 0));
    assert_eq!(follow_ups.len(), sent, "each has its follow-up handled");
    assert!(follow_ups.values().all(|n| *n == 1));
}

fn main() {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if args.first().is_some_and(|a| a == "child") {
        child::run(&args[1], &args[2], args[3].parse().unwrap(), Path::new(&args[4]));
        return;
    }
    let names: Vec<&String> = args.iter().filter(|a| !a.starts_with("--")).collect();
    let wanted = |name: &str| names.is_empty() || names.iter().any(|wanted| name.contains(wanted.as_str()));
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(2)
        .enable_all()
        .build()
        .unwrap();
    let postgres = Postgres::start();
    let dir = tempfile::tempdir().unwrap();
    let sqlite = format!("sqlite:{}", dir.path().join("shop.db").display());
    let mut has_run = false;
    for (kind, place) in [("sqlite", sqlite), ("postgres", postgres.url())] {
        for scene in Scene::WITH_BOUNDARIES {
            let name = format!("{kind}_{}", scene.name());
            if wanted(&name) {
                runtime.block_on(dies_everywhere(&place, scene));
                println!("test {name} ... ok");
                has_run = true;
            }
        }
    }
    if wanted("random_kills") {
        let rabbitmq = RabbitMq::start();
        let seconds = std::env::var("POSTRIDER_CRASH_SECONDS")
            .ok()
            .and_then(|s| s.parse().ok())
            .unwrap_or(10);
        runtime.block_on(random_kills(&postgres.url(), &rabbitmq, seconds));
        println!("test random_kills ... ok");
        has_run = true;
    }
    assert!(has_run, "no test has such a name: {names:?}");
}
