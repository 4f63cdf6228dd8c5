//! The ends a connection can come to, and the ways of being a client.

use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::fmt;

/// What became of one connection.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Fate {
    /// Every request on it got its whole, right response.
    Answered,
    /// The SYN was answered by RST.
    Refused,
    /// RST before the first byte of a response.
    ResetBeforeResponse,
    /// RST after some bytes of a response.
    ResetDuringResponse,
    /// FIN before the first byte of a response.
    EofBeforeResponse,
    /// FIN after some but not all bytes of a response.
    Short,
    /// The SYN was never answered.
    TimeoutConnect,
    /// Connected, but the response did not come, or not wholly, in time.
    TimeoutResponse,
    /// A whole response, but not the right one (status other than 200, another text than asked for).
    Wrong,
    /// The generator could not even send a SYN (descriptors, ports, routes): its own fault, not a loss.
    LocalError,
}

impl Fate {
    /// All fates, in report order.
    pub const ALL: [Self; 10] = [
        Self::Answered,
        Self::Refused,
        Self::ResetBeforeResponse,
        Self::ResetDuringResponse,
        Self::EofBeforeResponse,
        Self::Short,
        Self::TimeoutConnect,
        Self::TimeoutResponse,
        Self::Wrong,
        Self::LocalError,
    ];

    /// Whether the server broke its promise.
    #[must_use]
    pub fn is_loss(self) -> bool {
        !matches!(self, Self::Answered | Self::LocalError)
    }

    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::Answered => "answered",
            Self::Refused => "refused",
            Self::ResetBeforeResponse => "reset_before_response",
            Self::ResetDuringResponse => "reset_during_response",
            Self::EofBeforeResponse => "eof_before_response",
            Self::Short => "short",
            Self::TimeoutConnect => "timeout_connect",
            Self::TimeoutResponse => "timeout_response",
            Self::Wrong => "wrong",
            Self::LocalError => "local_error",
        }
    }
}

impl fmt::Display for Fate {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}

/// How many connections came to each end. Every fate is present, also those that nobody met.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Fates(BTreeMap<Fate, u64>);

impl Default for Fates {
    fn default() -> Self {
        Self(Fate::ALL.into_iter().map(|fate| (fate, 0)).collect())
    }
}

impl Fates {
    pub(crate) fn add(&mut self, fate: Fate, connections: u64) {
        *self.0.entry(fate).or_default() += connections;
    }

    /// Connections that came to this end.
    #[must_use]
    pub fn count(&self, fate: Fate) -> u64 {
        self.0.get(&fate).copied().unwrap_or(0)
    }

    /// Every fate with its count, in report order.
    pub fn iter(&self) -> impl Iterator<Item = (Fate, u64)> {
        self.0.iter().map(|(fate, connections)| (*fate, *connections))
    }

    /// Connections with any fate.
    #[must_use]
    pub fn total(&self) -> u64 {
        self.iter().map(|(_, connections)| connections).sum()
    }

    /// Connections whose fate breaks the promise.
    #[must_use]
    pub fn lost(&self) -> u64 {
        self.iter().filter(|(fate, _)| fate.is_loss()).map(|(_, connections)| connections).sum()
    }
}

/// How a client behaves.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// Arrives at a steady or Poisson rate, asks at once.
    New,
    /// Arrives in a crowd, asks at once.
    Burst,
    /// Connected, says nothing for a while; half of them, by chance, send their request in pieces meanwhile.
    Slow,
    /// Connected but wholly silent for a while: half open for a server with TCP_DEFER_ACCEPT.
    HalfOpen,
    /// Asks again and again on one connection.
    KeepAlive,
}

impl Kind {
    /// The name in reports.
    #[must_use]
    pub fn name(self) -> &'static str {
        match self {
            Self::New => "new",
            Self::Burst => "burst",
            Self::Slow => "slow",
            Self::HalfOpen => "half_open",
            Self::KeepAlive => "keep_alive",
        }
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.pad(self.name())
    }
}
