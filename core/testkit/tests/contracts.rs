//! The contracts in core and the tests that hold implementations to them, kept together: each contract names its tests, each
//! test of the kit is named by a contract, and no name is stale.

#![allow(clippy::unwrap_used, clippy::panic, missing_docs)]

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Every Rust file below.
fn sources(of: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in fs::read_dir(of).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            found.extend(sources(&path));
        } else if path.extension().is_some_and(|ext| ext == "rs") {
            found.push(path);
        }
    }
    found
}

/// The tests that the macros of the kit make, as contracts call them.
fn tests_of_the_kit() -> BTreeSet<String> {
    let kit = fs::read_to_string(root().join("core/testkit/src/lib.rs")).unwrap();
    let mut tests = BTreeSet::new();
    for (name, of) in [
        ("macro_rules! log_conformance", "log"),
        ("macro_rules! transport_conformance", "transport"),
        ("macro_rules! transport_outages", "transport"),
    ] {
        let (_, body) = kit.split_once(name).unwrap_or_else(|| panic!("{name} is gone"));
        let (_, body) = body.split_once("(@each ").unwrap();
        let (body, _) = body.split_once(");").unwrap();
        // The first line says what the tests get; the others are names, some behind how their server starts.
        for line in body.lines().skip(1) {
            if let Some(test) = line.split_whitespace().last() {
                tests.insert(format!("{of}::{test}"));
            }
        }
    }
    tests
}

/// The functions in some files: what `core::…` and `postgres::…` may name.
fn functions(of: &[&str]) -> BTreeSet<String> {
    let files = of.iter().flat_map(|folder| sources(&root().join(folder)));
    let mut names = BTreeSet::new();
    for file in files {
        for line in fs::read_to_string(file).unwrap().lines() {
            if let Some((before, after)) = line.split_once("fn ")
                && before
                    .trim()
                    .split(' ')
                    .all(|word| matches!(word, "" | "async" | "pub"))
                && let Some((name, _)) = after.split_once("()")
            {
                names.insert(name.to_owned());
            }
        }
    }
    names
}

/// A documented item: where it is, its first line of code, and what is said of it.
struct Item {
    at: String,
    docs: String,
}

fn items() -> Vec<Item> {
    let mut items = Vec::new();
    for file in sources(&root().join("core/src")) {
        let text = fs::read_to_string(&file).unwrap();
        let mut docs = String::new();
        for (n, line) in text.lines().enumerate() {
            let line = line.trim();
            if let Some(doc) = line.strip_prefix("///") {
                docs.push_str(doc);
                docs.push('\n');
            } else if !docs.is_empty() && !line.starts_with("#[") {
                let at = format!("{}:{}: {line}", file.display(), n + 1);
                items.push(Item {
                    at,
                    docs: std::mem::take(&mut docs),
                });
            }
        }
    }
    items
}

/// The tests that an item names.
fn named(docs: &str) -> Vec<&str> {
    let kinds = ["log::", "transport::", "core::", "postgres::"];
    let quoted = docs.split('`').skip(1).step_by(2);
    let is_test = |text: &&str| {
        let rest = kinds.iter().find_map(|kind| text.strip_prefix(kind));
        rest.is_some_and(|rest| rest.chars().all(|c| c.is_ascii_lowercase() || c == '_'))
    };
    quoted.filter(is_test).collect()
}

#[test]
fn contracts_and_tests_name_each_other() {
    let kit = tests_of_the_kit();
    assert!(kit.len() > 60, "the kit is not read as it is written: {kit:?}");
    let others = BTreeMap::from([
        ("core", functions(&["core/src", "core/tests"])),
        ("postgres", functions(&["eventlog-backends/postgres/tests"])),
    ]);
    let mut unnamed = kit.clone();
    let mut wrong = Vec::new();
    let mut contracts = 0;
    for item in items() {
        let names = named(&item.docs);
        if item.docs.contains("# Contract") {
            contracts += 1;
            if names.is_empty() {
                wrong.push(format!("a contract without a test: {}", item.at));
            }
        }
        for name in names {
            unnamed.remove(name);
            let (kind, test) = name.split_once("::").unwrap();
            let is_known = kit.contains(name) || others.get(kind).is_some_and(|tests| tests.contains(test));
            if !is_known {
                wrong.push(format!("there is no test {name}, named at {}", item.at));
            }
        }
    }
    assert!(
        contracts > 40,
        "the contracts are not read as they are written: {contracts}"
    );
    wrong.extend(unnamed.iter().map(|test| format!("no contract names the kit's {test}")));
    assert!(wrong.is_empty(), "\n{}", wrong.join("\n"));
}
