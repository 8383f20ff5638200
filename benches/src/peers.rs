//! Other projects beside ours: programs of their own, which print how many seconds their work took.

use anyhow::Context as _;
use std::{process::Command, time::Duration};

/// Runs such a program.
pub(crate) fn run(program: &mut Command) -> anyhow::Result<Duration> {
    let output = program.output().with_context(|| format!("{program:?}"))?;
    anyhow::ensure!(
        output.status.success(),
        "{program:?}: {}",
        String::from_utf8_lossy(&output.stderr)
    );
    let seconds = String::from_utf8_lossy(&output.stdout).trim().parse();
    Ok(Duration::from_secs_f64(
        seconds.with_context(|| format!("{program:?}"))?,
    ))
}

/// A program of a workspace of its own, since its dependencies clash with ours.
pub(crate) fn cargo(manifest: &str) -> Command {
    let mut peer = Command::new("cargo");
    peer.args([
        "run",
        "-q",
        "--release",
        "--manifest-path",
        manifest,
        "--target-dir",
        "target/peers",
        "--",
    ]);
    peer
}
