//! Figures of one run, and lines of a suite with their targets.

use hdrhistogram::Histogram;
use serde::Serialize;
use std::time::Duration;

/// A histogram of nanoseconds up to a minute, three significant digits.
pub fn histogram() -> anyhow::Result<Histogram<u64>> {
    Ok(Histogram::new_with_bounds(1, 60_000_000_000, 3)?)
}

/// What one run measured. Latencies in microseconds.
#[derive(Clone, Copy, Debug, Default, Serialize)]
pub struct Figures {
    /// Operations done.
    pub operations: u64,
    /// Per second.
    pub iops: f64,
    /// Bytes per second.
    pub bytes_per_second: f64,
    /// Mean latency.
    pub mean_us: f64,
    /// Median latency.
    pub p50_us: f64,
    /// 99th percentile.
    pub p99_us: f64,
    /// 99.9th percentile.
    pub p999_us: f64,
    /// Worst.
    pub max_us: f64,
    /// CPU of client and all servers together, per operation.
    pub cpu_us: Option<f64>,
    /// That of the client alone.
    pub cpu_client_us: Option<f64>,
}

impl Figures {
    /// Figures from a histogram of nanoseconds.
    pub fn new(latency: &Histogram<u64>, operations: u64, elapsed: Duration, block_size: usize) -> Self {
        let us = |ns: u64| ns as f64 / 1000.0;
        let iops = operations as f64 / elapsed.as_secs_f64();
        Self {
            operations,
            iops,
            bytes_per_second: iops * block_size as f64,
            mean_us: latency.mean() / 1000.0,
            p50_us: us(latency.value_at_quantile(0.5)),
            p99_us: us(latency.value_at_quantile(0.99)),
            p999_us: us(latency.value_at_quantile(0.999)),
            max_us: us(latency.max()),
            cpu_us: None,
            cpu_client_us: None,
        }
    }
}

impl std::fmt::Display for Figures {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "{:>9.0} op/s {:>8.1} MiB/s   latency us: mean {:.1} p50 {:.1} p99 {:.1} p99.9 {:.1} max {:.0}",
            self.iops,
            self.bytes_per_second / f64::from(1 << 20),
            self.mean_us,
            self.p50_us,
            self.p99_us,
            self.p999_us,
            self.max_us
        )?;
        if let (Some(cpu), Some(client)) = (self.cpu_us, self.cpu_client_us) {
            write!(f, "   cpu {cpu:.1} us/op (client {client:.1})")?;
        }
        Ok(())
    }
}

/// Which side of its target a value must be on.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Goal {
    /// At most the target.
    AtMost,
    /// At least the target.
    AtLeast,
}

/// One line of a suite.
#[derive(Clone, Debug, Serialize)]
pub struct Line {
    /// What is measured.
    pub name: String,
    /// The value.
    pub value: f64,
    /// Its unit.
    pub unit: &'static str,
    /// The target.
    pub target: f64,
    /// Which side of the target is good.
    pub goal: Goal,
    /// Value divided by target.
    pub ratio: f64,
    /// The target is met.
    pub ok: bool,
    /// What it was compared with, in words.
    pub note: String,
}

impl Line {
    /// A line with its verdict.
    pub fn new(name: &str, value: f64, unit: &'static str, goal: Goal, target: f64, note: String) -> Self {
        let ok = match goal {
            Goal::AtMost => value <= target,
            Goal::AtLeast => value >= target,
        };
        Self { name: name.to_owned(), value, unit, target, goal, ratio: value / target, ok, note }
    }
}

/// Prints the lines as a table.
pub fn print_table(lines: &[Line]) {
    println!("{:<42} {:>12} {:>14} {:>7}  {:<4} note", "measure", "value", "target", "ratio", "ok");
    for line in lines {
        let sign = if line.goal == Goal::AtMost { "<=" } else { ">=" };
        let value = format!("{:.2} {}", line.value, line.unit);
        let target = format!("{sign} {:.2}", line.target);
        let ok = if line.ok { "ok" } else { "no" };
        println!("{:<42} {value:>12} {target:>14} {:>7.2}  {ok:<4} {}", line.name, line.ratio, line.note);
    }
}
