//! Random histories of the whole engine, on the memory log and transport and on one clock: each follows from its seed.

#![allow(
    clippy::unwrap_used,
    clippy::print_stderr,
    clippy::print_stdout,
    clippy::disallowed_methods,
    missing_docs
)]

mod consumer;
mod dice;
mod feed;
mod handlers;
mod ledger;
mod log;
mod process;
mod publisher;
mod relay;
mod world;

use std::{collections::BTreeMap, sync::Arc};
use world::World;

/// How many histories of each kind there are unless the environment says otherwise.
const HISTORIES: u64 = 200;

fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// The seeds to be tried.
fn seeds() -> Vec<u64> {
    match number("POSTRIDER_HISTORY_SEED") {
        Some(seed) => vec![seed],
        None => (0..number("POSTRIDER_HISTORIES").unwrap_or(HISTORIES)).collect(),
    }
}

fn replay(kind: &str, seed: u64) -> String {
    format!("POSTRIDER_HISTORY_SEED={seed} cargo test -p postrider-core --test histories {kind} -- --nocapture")
}

fn live(kind: &str, seed: u64) -> Arc<World> {
    let world = match kind {
        "relays" => relay::world(seed),
        _ => consumer::world(seed),
    };
    let (lived, replay) = (world.clone(), replay(kind, seed));
    world::run(&world, seed, &replay, async move {
        match kind {
            "relays" => relay::live(lived, seed).await,
            _ => consumer::live(lived, seed).await,
        }
    });
    world
}

/// Lives through all histories of a kind; what is counted in them has to have happened.
fn all(kind: &str, happened: &[&str]) {
    let mut counts: BTreeMap<&'static str, u64> = BTreeMap::new();
    let mut failed = Vec::new();
    let seeds = seeds();
    for seed in &seeds {
        let world = live(kind, *seed);
        let book = world.ledger.book();
        if seeds.len() == 1 {
            println!(
                "{}{:?}\n{} lines, {:016x}",
                world.trace.text(),
                book.counts,
                world.trace.count(),
                world.trace.hash()
            );
        }
        for (what, count) in &book.counts {
            *counts.entry(what).or_default() += count;
        }
        if !book.broken.is_empty() {
            eprintln!("seed {seed}: {}\n  {}", book.broken.join("\n  "), replay(kind, *seed));
            failed.push(*seed);
        }
        // Enough is known.
        if failed.len() == 5 {
            break;
        }
    }
    println!("{} histories of {kind}: {counts:?}", seeds.len());
    assert!(
        failed.is_empty(),
        "{} of {} seeds failed: {failed:?}",
        failed.len(),
        seeds.len()
    );
    if seeds.len() as u64 >= HISTORIES {
        for what in happened {
            assert!(counts.contains_key(what), "never: {what}");
        }
    }
}

#[test]
fn relays() {
    all(
        "relays",
        &["crashes", "dead letters", "shutdowns", "settles without a lease"],
    );
}

#[test]
fn consumers() {
    all("consumers", &["crashes", "dead letters", "shutdowns"]);
}

/// A seed says everything: what happens, in which order, and when.
#[test]
fn a_seed_repeats_its_history() {
    for kind in ["relays", "consumers"] {
        for seed in 0..12 {
            let (first, second) = (live(kind, seed), live(kind, seed));
            assert_eq!(first.trace.hash(), second.trace.hash(), "{kind}, seed {seed}");
            assert!(first.trace.count() > 20, "{kind}, seed {seed}");
        }
    }
}
