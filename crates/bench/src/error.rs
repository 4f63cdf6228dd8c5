//! What can keep a run from giving a result.

use crate::live::Live;
use std::time::Duration;

/// Why there is no report, or why a wait ended early.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The wishes contradict each other.
    #[error("load specification: {0}")]
    Spec(String),
    /// The generator could not set up or run its own loop.
    #[error("load generator: {action}: {source}")]
    Generator {
        /// What it was doing.
        action: &'static str,
        /// The kernel's answer.
        source: std::io::Error,
    },
    /// A connection was lost track of; the numbers would mean nothing.
    #[error(
        "load generator: {issued} connections issued but {settled} fates recorded; this is a bug in the generator"
    )]
    Unbalanced {
        /// Connections begun.
        issued: u64,
        /// Connections with a fate.
        settled: u64,
    },
    /// The generator's thread panicked.
    #[error("load generator: its thread panicked")]
    Panicked,
    /// The awaited state did not come in time.
    #[error("load: not reached within {waited:?}: {so_far}")]
    Deadline {
        /// How long was waited.
        waited: Duration,
        /// The counters at that moment.
        so_far: Box<Live>,
    },
    /// The run ended before the awaited state came.
    #[error("load: the run ended before the awaited state: {0}")]
    Ended(Box<Live>),
}

impl Error {
    pub(crate) fn generator(action: &'static str, source: impl Into<std::io::Error>) -> Self {
        Self::Generator { action, source: source.into() }
    }
}
