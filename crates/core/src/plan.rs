//! What a generation is to be: the part of the configuration that decisions depend on, already validated.

use crate::id::GroupId;
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// How new connections are moved in the kernel. Chosen once by the shell, before the core is made.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Engine {
    /// An `sk_reuseport` program over sockets named by key; the kernel migrates what a closing listener leaves.
    Ebpf,
    /// A classic program naming slots; the master holds a handle of every listener.
    Cbpf,
    /// No steering: the kernel hashes over whoever listens. Loses connections.
    None,
}

/// How a worker is known to be ready. A `ready` on the handover channel counts with either.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Readiness {
    /// READY=1 on the notify socket.
    Notify,
    /// Owning a listener on every configured address, and accepting from it.
    Listen,
    /// Answering requests made to this very worker, several times in a row.
    Http,
}

/// How a worker is chosen among those of a generation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum Policy {
    /// By the connection's hash, or by chance.
    #[default]
    Hash,
    /// The seat of the processor that the connection came in on.
    Cpu,
}

/// When a retired worker is told to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopWhen {
    /// As soon as its accept queue is empty.
    Drained,
    /// When its open connections are gone too, or `idle_timeout` has passed.
    Idle,
    /// `Idle` for unmodified workers, `Drained` for those that speak the handover protocol.
    Auto,
}

/// Stops respawning after too many exits in a window.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Breaker {
    /// Exits within `window` that open it.
    pub exits: u16,
    /// The window.
    pub window: Duration,
    /// How long it stays open.
    pub cooldown: Duration,
}

/// A step of a canary.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct CanaryStep {
    /// The new generation's part of the new connections, 1 to 1000.
    pub share: u16,
    /// How long it has to do well with that.
    pub hold: Duration,
}

/// What the decisions about one generation need to know. The command line and the executable stay with the shell.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Plan {
    /// Names the config: the same for generations of equal configs.
    #[serde(default)]
    pub config: u64,
    /// Seats of the generation, at least 1.
    pub workers: u16,
    /// Seats the config says.
    #[serde(default)]
    pub configured: u16,
    /// The groups every worker has to listen in.
    pub groups: Vec<GroupId>,
    /// Those of them whose sockets the master makes: one for each seat, handed to its workers one after the other.
    pub seat_groups: Vec<GroupId>,
    /// Those whose sockets take datagrams: in their group from `bind()` on, and nobody takes over what waits in them.
    #[serde(default)]
    pub datagram_groups: Vec<GroupId>,
    /// Those of them whose flows stay with the generation they began with, until they are idle for so long. Only under
    /// [`Engine::Ebpf`], and not with sockets of seats.
    #[serde(default)]
    pub flow_groups: Vec<(GroupId, Duration)>,
    /// How a worker is chosen.
    #[serde(default)]
    pub policy: Policy,
    /// How a worker is known to be ready.
    pub readiness: Readiness,
    /// `Http`: answers in a row, at least 1.
    pub passes: u16,
    /// `Http`: the pause between two requests.
    pub interval: Duration,
    /// A worker not ready by then has failed.
    pub ready_timeout: Duration,
    /// How long half-open handshakes may take after the switch.
    pub settle_timeout: Duration,
    /// When retired workers are told to stop.
    pub stop_when: StopWhen,
    /// The bound of waiting for open connections under [`StopWhen::Idle`].
    pub idle_timeout: Duration,
    /// From the switch (or the stop) to SIGKILL.
    pub drain_timeout: Duration,
    /// Old generations that may drain at once.
    pub max_draining: u16,
    /// So many seats are replaced at a time; `None`: all at once.
    #[serde(default)]
    pub batch: Option<u16>,
    /// Shares of the new connections, ascending, before the switch.
    #[serde(default)]
    pub canary: Vec<CanaryStep>,
    /// How long the old generation stands by after the switch.
    #[serde(default)]
    pub bake: Duration,
    /// The pause between two checks of a generation on trial; `None` if there is nothing to check with.
    #[serde(default)]
    pub check_interval: Option<Duration>,
    /// A ready worker that gives no sign of life for so long is killed.
    #[serde(default)]
    pub watchdog: Option<Duration>,
    /// First pause before a respawn; doubles.
    pub backoff: Duration,
    /// The longest pause.
    pub backoff_max: Duration,
    /// A worker that ran so long resets its seat's backoff.
    pub stable_after: Duration,
    /// Stops respawning for a while.
    pub breaker: Breaker,
}
