//! The result of a run.

use crate::fate::{Fate, Fates, Kind};
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;

/// Everything a run found out. Times ending in `_us` are microseconds; instants count from the start of the run.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Report {
    /// Where the load went.
    pub target: SocketAddr,
    /// Length of the run, stragglers included.
    pub elapsed_us: u64,
    /// Connections begun.
    pub issued: u64,
    /// Right answers: more than answered connections where keep-alive clients took part.
    pub answers: u64,
    pub(crate) valid: bool,
    pub(crate) lost: u64,
    /// What became of the connections; sums up to `issued`.
    pub fates: Fates,
    /// Answers from a generation that a mark had declared replaced before the connection was begun.
    pub strays: u64,
    /// The same by kind of client.
    pub kinds: BTreeMap<Kind, KindReport>,
    /// Answers by the `generation=` tag in them.
    pub generations: BTreeMap<u32, GenerationReport>,
    /// Answers without a `generation=` tag.
    pub untagged: u64,
    /// Answers by the `pid=` tag in them.
    pub pids: BTreeMap<u32, u64>,
    /// The most that the generator was late with a connection: its own delay, part of the latencies.
    pub start_lag_max_us: u64,
    /// The first losses and local errors, at most 20.
    pub losses: Vec<Loss>,
}

/// The part of a report on one kind of client.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct KindReport {
    /// Connections begun.
    pub issued: u64,
    /// Right answers.
    pub answers: u64,
    /// What became of the connections.
    pub fates: Fates,
    /// From the moment the request was due to be out to the whole answer.
    pub latency: Latency,
}

/// Latencies of right answers.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Latency {
    /// Median.
    pub p50_us: u64,
    /// 99th percentile.
    pub p99_us: u64,
    /// 99.9th percentile.
    pub p999_us: u64,
    /// The longest.
    pub max_us: u64,
}

impl Latency {
    /// Nearest-rank percentiles.
    pub(crate) fn of(mut micros: Vec<u32>) -> Self {
        micros.sort_unstable();
        let rank = |per_mille: usize| {
            let rank = (micros.len() * per_mille).div_ceil(1000).max(1);
            micros.get(rank - 1).map_or(0, |micros| u64::from(*micros))
        };
        Self { p50_us: rank(500), p99_us: rank(990), p999_us: rank(999), max_us: rank(1000) }
    }
}

/// What one generation answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationReport {
    /// Right answers.
    pub answers: u64,
    /// When the first answer came.
    pub first_us: u64,
    /// When the last answer came.
    pub last_us: u64,
    /// When the youngest connection was begun that this generation answered.
    pub last_begun_us: u64,
    /// Answers by the `seat=` tag in them.
    pub seats: BTreeMap<u32, u64>,
}

/// One connection that did not go well.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Loss {
    /// How it ended.
    pub fate: Fate,
    /// What kind of client it was.
    pub kind: Kind,
    /// Its local address, where it got one.
    pub source: Option<SocketAddr>,
    /// When it was begun.
    pub begun_us: u64,
    /// When it ended.
    pub ended_us: u64,
    /// What exactly was met.
    pub detail: String,
}

impl fmt::Display for Loss {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { fate, kind, detail, .. } = self;
        write!(f, "{:.3} s: {fate}: {kind} connection", seconds(self.ended_us))?;
        if let Some(source) = self.source {
            write!(f, " from {source}")?;
        }
        write!(f, ", begun {:.3} s: {detail}", seconds(self.begun_us))
    }
}

impl Report {
    /// Connections whose fate breaks the promise.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether the run says anything: the generator had no faults of its own and something was answered or lost.
    #[must_use]
    pub fn valid(&self) -> bool {
        self.valid
    }
}

pub(crate) fn seconds(micros: u64) -> f64 {
    micros as f64 / 1e6
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, issued, answers, lost, strays, .. } = self;
        let elapsed = seconds(self.elapsed_us);
        writeln!(f, "{target}: {issued} connections in {elapsed:.2} s, {answers} answers, {lost} lost")?;
        if !self.valid {
            writeln!(f, "NOT VALID: the generator itself failed, or nothing was tried; see local_error")?;
        }
        writeln!(
            f,
            "{:<11}{:>9}{:>9}{:>8}{:>11}{:>11}{:>11}{:>11}",
            "kind", "issued", "answers", "lost", "p50 ms", "p99 ms", "p99.9 ms", "max ms"
        )?;
        for (kind, part) in &self.kinds {
            write!(f, "{kind:<11}{:>9}{:>9}{:>8}", part.issued, part.answers, part.fates.lost())?;
            let Latency { p50_us, p99_us, p999_us, max_us } = part.latency;
            for micros in [p50_us, p99_us, p999_us, max_us] {
                write!(f, "{:>11.3}", micros as f64 / 1e3)?;
            }
            writeln!(f)?;
        }
        for (fate, connections) in self.fates.iter().filter(|(_, connections)| *connections > 0) {
            writeln!(f, "  {fate:<22} {connections:>9}")?;
        }
        for (generation, part) in &self.generations {
            let (first, last) = (seconds(part.first_us), seconds(part.last_us));
            writeln!(f, "  generation {generation:<11} {:>9}  from {first:.3} to {last:.3} s", part.answers)?;
        }
        if *strays > 0 {
            writeln!(f, "  strays {strays:>25}")?;
        }
        writeln!(f, "  generator late by at most {:.3} ms", self.start_lag_max_us as f64 / 1e3)?;
        self.losses.iter().try_for_each(|loss| writeln!(f, "  {loss}"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_are_nearest_rank() {
        let latency = Latency::of((1..=1000).rev().collect());
        assert_eq!(latency, Latency { p50_us: 500, p99_us: 990, p999_us: 999, max_us: 1000 });
        assert_eq!(Latency::of(vec![7]), Latency { p50_us: 7, p99_us: 7, p999_us: 7, max_us: 7 });
        assert_eq!(Latency::of(vec![]), Latency::default());
    }
}
