//! The result of a run.

use crate::report::{Latency, seconds};
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
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams answered.
    pub answers: u64,
    pub(crate) lost: u64,
    pub(crate) valid: bool,
    /// Answers to datagrams that were answered already.
    pub duplicates: u64,
    /// Times the kernel said that nobody has the port (ECONNREFUSED). It does not say so for each datagram.
    pub refused: u64,
    /// Datagrams received that are no answer to what their flow asked.
    pub wrong: u64,
    /// Answers from a generation that a mark had declared replaced before the flow was begun.
    pub strays: u64,
    /// Times that a flow was answered by another worker than before.
    pub moves: u64,
    /// Answers that the client's own sockets had no room for.
    pub dropped_here: u64,
    /// Flows that could not be begun and datagrams that could not be sent: the client's own faults.
    pub local_errors: u64,
    /// Answers by generation.
    pub generations: BTreeMap<u32, GenerationReport>,
    /// From the moment a datagram was due to be out to its answer.
    pub latency: Latency,
    /// The most that the generator was late with a datagram: its own delay, part of the latencies.
    pub start_lag_max_us: u64,
    /// Each flow that sent something: those that last as long as the run first.
    pub flows: Vec<FlowReport>,
    /// The first losses, refusals, wrong answers and local errors in words, at most 20.
    pub notes: Vec<String>,
}

/// What one generation answered.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct GenerationReport {
    /// Datagrams answered.
    pub answers: u64,
    /// When the first answer came.
    pub first_us: u64,
    /// When the last answer came.
    pub last_us: u64,
    /// When the youngest datagram was sent that this generation answered.
    pub last_sent_us: u64,
    /// When the youngest flow was begun that this generation answered.
    pub last_begun_us: u64,
    /// Answers by seat.
    pub seats: BTreeMap<u32, u64>,
}

/// One flow.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct FlowReport {
    /// Its address, which no other flow of the run has.
    pub source: SocketAddr,
    /// When its first datagram was sent.
    pub begun_us: u64,
    /// Datagrams sent.
    pub sent: u64,
    /// Datagrams answered.
    pub answers: u64,
    /// Answers to datagrams that were answered already.
    pub duplicates: u64,
    /// See [`Report::refused`].
    pub refused: u64,
    /// When the datagrams were sent that nobody answered.
    pub lost_us: Vec<u64>,
    /// Who answered, in the order the datagrams were sent in: more than one where the flow moved.
    pub spans: Vec<Span>,
}

/// Who answered.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Who {
    /// Its generation.
    pub generation: u32,
    /// Its seat.
    pub seat: u32,
    /// Its process.
    pub pid: u32,
}

/// Datagrams of a flow that the same worker answered, with none between them that another one did.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Span {
    /// Who answered.
    pub who: Who,
    /// When the first of them was sent.
    pub first_us: u64,
    /// When the last of them was sent.
    pub last_us: u64,
    /// How many they are.
    pub answers: u64,
}

impl Report {
    /// Datagrams that nobody answered.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.lost
    }

    /// Whether the run says anything: something was sent, and nothing went wrong at the client's own end.
    #[must_use]
    pub fn valid(&self) -> bool {
        self.valid
    }
}

impl FlowReport {
    /// The generations that answered, in the order the datagrams were sent in.
    #[must_use]
    pub fn generations(&self) -> Vec<u32> {
        let mut generations: Vec<u32> = self.spans.iter().map(|span| span.who.generation).collect();
        generations.dedup();
        generations
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { target, sent, answers, lost, .. } = self;
        let (flows, elapsed) = (self.flows.len(), seconds(self.elapsed_us));
        writeln!(
            f,
            "{target}: {flows} flows, {sent} datagrams in {elapsed:.2} s, {answers} answers, {lost} lost"
        )?;
        if !self.valid {
            writeln!(f, "NOT VALID: the client itself failed or dropped answers, or nothing was tried")?;
        }
        let counts = [
            ("duplicates", self.duplicates),
            ("refused", self.refused),
            ("wrong", self.wrong),
            ("strays", self.strays),
            ("moves", self.moves),
            ("dropped here", self.dropped_here),
            ("local errors", self.local_errors),
        ];
        for (name, count) in counts.into_iter().filter(|(_, count)| *count > 0) {
            writeln!(f, "  {name:<22} {count:>9}")?;
        }
        for (generation, part) in &self.generations {
            let (first, last) = (seconds(part.first_us), seconds(part.last_us));
            let begun = seconds(part.last_begun_us);
            write!(f, "  generation {generation:<11} {:>9}  from {first:.3} to {last:.3} s", part.answers)?;
            writeln!(f, ", youngest flow begun {begun:.3} s")?;
        }
        let Latency { p50_us, p99_us, p999_us, max_us } = self.latency;
        let [p50, p99, p999, max] = [p50_us, p99_us, p999_us, max_us].map(|micros| micros as f64 / 1e3);
        writeln!(f, "  answered within ms: p50 {p50:.3}, p99 {p99:.3}, p99.9 {p999:.3}, max {max:.3}")?;
        writeln!(f, "  generator late by at most {:.3} ms", self.start_lag_max_us as f64 / 1e3)?;
        self.notes.iter().try_for_each(|note| writeln!(f, "  {note}"))
    }
}
