//! `cargo run --release -p postrider-benches -- <workload> [<kind of transport>] [--quick] [--json] [--peers] [--case=<part of a name>]`
//!
//! Each case is run in interleaved rounds: the raw limit, ours, the raw limit, ours. The figures are medians, the ratio is
//! ours ÷ raw of the same run.

#![allow(clippy::print_stdout)]

mod consumer;
mod engine;
mod peers;
mod postgres;
mod sqlite;
mod table;
mod transport;

use anyhow::bail;
use table::Table;

/// How much work a run does.
#[derive(Debug, Clone, Copy)]
struct Size {
    quick: bool,
    /// Whether other projects are measured beside ours; they have to be built for it.
    peers: bool,
}

impl Size {
    fn rounds(self) -> usize {
        if self.quick { 1 } else { 3 }
    }
    /// `full`, or a twentieth of it for a smoke test.
    fn of(self, full: usize) -> usize {
        if self.quick { full / 20 } else { full }
    }
}

fn main() -> anyhow::Result<()> {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let has = |flag: &str| arguments.iter().any(|argument| argument == flag);
    let size = Size {
        quick: has("--quick"),
        peers: has("--peers"),
    };
    let case = arguments.iter().find_map(|argument| argument.strip_prefix("--case="));
    let mut table = Table::new(has("--json"), case.unwrap_or(""));
    let mut words = arguments.iter().filter(|argument| !argument.starts_with("--"));
    let workload = words.next();
    match workload.map(String::as_str) {
        Some("consumer") => consumer::run(size, &mut table)?,
        Some("engine") => engine::run(size, &mut table)?,
        Some("postgres") => postgres::run(size, &mut table)?,
        Some("sqlite") => sqlite::run(size, &mut table)?,
        Some("transport") => transport::run(words.next().map_or("", String::as_str), size, &mut table)?,
        other => bail!(
            "unknown workload {:?}: known are `consumer`, `engine`, `postgres`, `sqlite` and `transport <kind>`",
            other.unwrap_or("")
        ),
    }
    table.print();
    Ok(())
}
