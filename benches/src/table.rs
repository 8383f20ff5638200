//! The results, for people and for programs.

use serde_json::json;
use std::time::Duration;

/// A case's rounds.
#[derive(Debug)]
struct Case {
    workload: &'static str,
    case: String,
    unit: &'static str,
    raw: Vec<f64>,
    ours: Vec<f64>,
}

/// All the cases of a run.
#[derive(Debug)]
pub(crate) struct Table {
    json: bool,
    /// Only cases whose names contain this.
    only: String,
    cases: Vec<Case>,
    latencies: Vec<(&'static str, String, Duration, Duration)>,
}

impl Table {
    pub(crate) fn new(json: bool, only: &str) -> Self {
        Self {
            json,
            only: only.to_owned(),
            cases: Vec::new(),
            latencies: Vec::new(),
        }
    }

    /// Runs a case in interleaved rounds. Each closure does `work` units of it and says how long that took.
    #[allow(clippy::too_many_arguments)]
    pub(crate) fn compare(
        &mut self,
        workload: &'static str,
        case: impl Into<String>,
        unit: &'static str,
        rounds: usize,
        work: usize,
        mut raw: impl FnMut() -> anyhow::Result<Duration>,
        mut ours: impl FnMut() -> anyhow::Result<Duration>,
    ) -> anyhow::Result<()> {
        let case = case.into();
        if !self.wants(&case) {
            return Ok(());
        }
        let rate = |took: Duration| work as f64 / took.as_secs_f64().max(1e-9);
        let mut result = Case {
            workload,
            case,
            unit,
            raw: Vec::new(),
            ours: Vec::new(),
        };
        for _ in 0..rounds {
            result.raw.push(rate(raw()?));
            result.ours.push(rate(ours()?));
        }
        if !self.json {
            eprintln!("{} done", result.case);
        }
        self.cases.push(result);
        Ok(())
    }

    pub(crate) fn wants(&self, case: &str) -> bool {
        case.contains(&self.only)
    }

    pub(crate) fn latency(&mut self, workload: &'static str, case: String, p50: Duration, p99: Duration) {
        if !self.json {
            eprintln!("{case} done");
        }
        self.latencies.push((workload, case, p50, p99));
    }

    pub(crate) fn print(&self) {
        if !self.json {
            println!(
                "{:<10} {:<44} {:>14} {:>14} {:>7}",
                "workload", "case", "raw", "ours", "ratio"
            );
        }
        for case in &self.cases {
            let (raw, ours) = (median(&case.raw), median(&case.ours));
            let ratio = ours / raw;
            if self.json {
                let line = json!({
                    "workload": case.workload, "case": case.case, "unit": case.unit,
                    "raw": raw.round(), "ours": ours.round(), "ratio": (ratio * 1000.0).round() / 1000.0,
                });
                println!("{line}");
            } else {
                println!(
                    "{:<10} {:<44} {raw:>10.0} {unit:<3} {ours:>10.0} {unit:<3} {ratio:>7.2}",
                    case.workload,
                    case.case,
                    unit = case.unit
                );
            }
        }
        for (workload, case, p50, p99) in &self.latencies {
            let millis = |time: &Duration| (time.as_secs_f64() * 100_000.0).round() / 100.0;
            let (p50, p99) = (millis(p50), millis(p99));
            if self.json {
                println!(
                    "{}",
                    json!({ "workload": workload, "case": case, "unit": "ms", "p50": p50, "p99": p99 })
                );
            } else {
                println!(
                    "{workload:<10} {case:<44} {:>10} ms  {:>10} ms",
                    format!("p50 {p50}"),
                    format!("p99 {p99}")
                );
            }
        }
    }
}

fn median(figures: &[f64]) -> f64 {
    let mut sorted = figures.to_vec();
    sorted.sort_by(f64::total_cmp);
    sorted.get(sorted.len() / 2).copied().unwrap_or(f64::NAN)
}
