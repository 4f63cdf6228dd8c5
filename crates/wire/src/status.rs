//! What `status --json` and the receipt of an upgrade say.
//!
//! Field names are a promise to scripts: fields may be added, never renamed. What is not known is
//! null, never 0. Times of day are RFC 3339 text, durations whole milliseconds.

use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;

use serde::{Deserialize, Serialize};

/// An enum of bare words: the word in JSON is the word on the screen.
macro_rules! words {
    ($(#[$meta:meta])* $name:ident { $($(#[$doc:meta])* $variant:ident = $word:literal,)+ }) => {
        $(#[$meta])*
        #[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        pub enum $name {
            $($(#[$doc])* #[serde(rename = $word)] $variant,)+
        }

        impl $name {
            /// The word used in JSON, logs and metrics.
            #[must_use]
            pub const fn as_str(self) -> &'static str {
                match self { $(Self::$variant => $word,)+ }
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(self.as_str())
            }
        }
    };
}

words! {
    /// What the master is about.
    MasterState {
        /// The first generation is being launched.
        Starting = "starting",
        /// One generation serves and no upgrade is under way.
        Steady = "steady",
        /// A new generation starts beside the active one.
        Launching = "launching",
        /// A share of new connections goes to the new generation.
        Canary = "canary",
        /// All new connections go to the new generation, the old one stands by.
        Baking = "baking",
        /// The old generation gives up its listeners.
        Retiring = "retiring",
        /// The new generation failed and is being stopped.
        RollingBack = "rolling_back",
        /// The whole service stops.
        Stopping = "stopping",
        /// Workers exit too often: the breaker is open.
        Degraded = "degraded",
    }
}

words! {
    /// What a generation is about.
    GenerationState {
        /// Its workers start; it gets no connection.
        Launching = "launching",
        /// It gets a share of new connections.
        Canary = "canary",
        /// It gets all new connections.
        Active = "active",
        /// It gets none, and is ready to get all again.
        Standby = "standby",
        /// It gives up its listeners.
        Retiring = "retiring",
        /// It has no listener and finishes open connections.
        Draining = "draining",
    }
}

words! {
    /// What a worker is about.
    WorkerState {
        /// Started, not ready yet.
        Starting = "starting",
        /// Ready, not serving yet.
        Ready = "ready",
        /// Accepts connections.
        Serving = "serving",
        /// Gives up its listeners.
        Retiring = "retiring",
        /// Has no listener and finishes open connections.
        Draining = "draining",
        /// Exited; its seat waits for the respawn.
        Backoff = "backoff",
    }
}

words! {
    /// A step of an upgrade.
    Phase {
        /// The new generation starts.
        Launching = "launching",
        /// It gets a share of new connections.
        Canary = "canary",
        /// All new connections are turned to it.
        Switch = "switch",
        /// The old generation stands by.
        Baking = "baking",
        /// The old generation gives up its listeners.
        Retiring = "retiring",
        /// The old generation finishes open connections.
        Draining = "draining",
        /// The new generation failed and is being stopped.
        RollingBack = "rolling_back",
        /// The whole service stops (in progress messages only).
        Stopping = "stopping",
    }
}

words! {
    /// How an upgrade ended.
    Outcome {
        /// The new generation serves.
        Completed = "completed",
        /// The new generation failed; the old one serves as before.
        RolledBack = "rolled_back",
        /// No new generation was started.
        Refused = "refused",
        /// A later wish took its place before it began.
        Superseded = "superseded",
    }
}

words! {
    /// What asked for an upgrade.
    Trigger {
        /// SIGHUP.
        Signal = "signal",
        /// A client on the control socket.
        Command = "command",
        /// The service manager.
        Systemd = "systemd",
        /// The start of the master.
        Start = "start",
        /// A client that wanted the previous generation back.
        Rollback = "rollback",
        /// A master that found workers which had neither master nor keeper.
        Orphans = "orphans",
        /// The start of a master that takes over from a server no master has started.
        Takeover = "takeover",
    }
}

words! {
    /// How connections are steered to the active generation.
    Engine {
        /// An `sk_reuseport` program with a map of listeners.
        Ebpf = "ebpf",
        /// A classic BPF program returning slot numbers.
        Cbpf = "cbpf",
        /// The kernel's hash over the whole group.
        None = "none",
    }
}

words! {
    /// Transport of a listener.
    Protocol {
        /// TCP.
        Tcp = "tcp",
        /// UDP.
        Udp = "udp",
    }
}

words! {
    /// Who binds a listener.
    Bind {
        /// The worker.
        Worker = "worker",
        /// The master, which passes the socket on.
        Master = "master",
    }
}

/// The whole answer of `status --json`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Status {
    /// Name of the application.
    pub app: String,
    /// What the master is about.
    pub state: MasterState,
    /// Why, where the state alone does not tell (`degraded`).
    #[serde(default)]
    pub state_reason: Option<String>,
    /// The master itself.
    pub master: MasterInfo,
    /// The generation new connections go to; null before the first is ready.
    pub active_generation: Option<u32>,
    /// Every generation with a process, oldest first.
    pub generations: Vec<GenerationStatus>,
    /// Every configured listener.
    pub listeners: Vec<ListenerStatus>,
    /// Another number of workers than the config says was asked for; null if not.
    #[serde(default)]
    pub scaled: Option<Scaled>,
    /// An upgrade waits for the present one to end, or for others to join it.
    #[serde(default)]
    pub upgrade_waits: bool,
    /// Milliseconds the present canary step, or the bake, lasts at least; null outside of these.
    #[serde(default)]
    pub hold_ms: Option<u64>,
    /// Receipt of the last upgrade; null before the first.
    pub last_upgrade: Option<Receipt>,
}

/// A number of workers that lasts until the config changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Scaled {
    /// Workers there are to be.
    pub workers: u32,
    /// Workers the config says.
    pub configured: u32,
}

/// The master itself.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MasterInfo {
    /// Process id; unchanged by a re-exec.
    pub pid: u32,
    /// Version of the running binary.
    pub version: String,
    /// When this process started, RFC 3339.
    pub started_at: String,
    /// How often it has executed its binary anew.
    pub reexecs: u32,
    /// Whether it took over workers of a master that crashed.
    pub adopted: bool,
    /// Process id of its keeper; null without one.
    #[serde(default)]
    pub keeper: Option<u32>,
}

/// One generation.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct GenerationStatus {
    /// Its number.
    pub generation: u32,
    /// What it is about.
    pub state: GenerationState,
    /// Share of new connections it gets, 0 to 1.
    pub share: f64,
    /// What it runs.
    pub executable: ExecutableInfo,
    /// Open connections of all its workers.
    pub connections: Option<u64>,
    /// Milliseconds until those of its workers that are told to end, and have not, are killed; null while none is.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// Its workers, by seat.
    pub workers: Vec<WorkerStatus>,
}

/// What a generation runs.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExecutableInfo {
    /// Path at the time of the upgrade.
    pub path: String,
    /// Inode of the file.
    pub inode: u64,
    /// SHA-256 of its content, hexadecimal.
    pub sha256: Option<String>,
    /// Whether a respawn runs this very file; false for scripts, whose interpreter loads what is there.
    #[serde(default)]
    pub pinned: bool,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    /// Its place in the generation, counted from 0.
    pub seat: u32,
    /// Process id; null while no process is on the seat.
    pub pid: Option<u32>,
    /// What it is about.
    pub state: WorkerState,
    /// Respawns on this seat in this generation.
    pub restarts: u32,
    /// When the process started, RFC 3339; null while there is none.
    pub started_at: Option<String>,
    /// The worker's own words (`STATUS=`).
    pub status: Option<String>,
    /// Its listening sockets.
    pub listeners: Vec<WorkerListener>,
}

/// One listening socket of a worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerListener {
    /// Name of the listener in the config.
    pub name: String,
    /// Connections waiting to be accepted; null for UDP.
    pub accept_queue: Option<u32>,
    /// Most connections that may wait; null for UDP.
    pub backlog: Option<u32>,
    /// UDP: bytes of the kernel's memory that waiting datagrams take up; null for TCP.
    #[serde(default)]
    pub receive_queue: Option<u32>,
    /// Connections, or datagrams, that the kernel dropped here because too many waited.
    #[serde(default)]
    pub drops: Option<u32>,
}

/// One configured listener.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ListenerStatus {
    /// Its name in the config.
    pub name: String,
    /// Address and port.
    pub address: String,
    /// Transport.
    pub protocol: Protocol,
    /// Who binds it.
    pub bind: Bind,
    /// How connections are steered.
    pub engine: Engine,
    /// Why this engine.
    pub engine_reason: String,
    /// Sockets in the group that belong to no worker of ours.
    pub strangers: Option<u32>,
    /// Connections of ended workers that a sibling accepted, since the master started.
    #[serde(default)]
    pub leftovers_taken: u64,
    /// Connections, or datagrams, of ended workers that had no one to go to, since the master started: lost, and counted
    /// here.
    #[serde(default)]
    pub leftovers_lost: u64,
    /// UDP: flows that began; null where none are remembered.
    #[serde(default)]
    pub flows_begun: Option<u64>,
    /// UDP: of flows that were not idle at least so many were forgotten, because the table is too small.
    #[serde(default)]
    pub flows_forgotten: Option<u64>,
}

/// What an upgrade did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Receipt {
    /// Generation before; null for the first.
    pub from: Option<u32>,
    /// Generation after, or the one that failed; null when refused.
    pub to: Option<u32>,
    /// What asked for it.
    pub trigger: Trigger,
    /// How it ended.
    pub outcome: Outcome,
    /// Why, unless completed.
    pub reason: Option<String>,
    /// When it began, RFC 3339.
    pub started_at: String,
    /// From the trigger to the outcome, in milliseconds.
    pub duration_ms: u64,
    /// The phases it went through, in order.
    pub phases: Vec<PhaseTime>,
    /// What happened on each listener.
    pub listeners: Vec<ReceiptListener>,
    /// Workers that had to be killed after `drain_timeout`.
    pub forced_kills: u32,
    /// Open connections these still had.
    pub connections_cut: Option<u32>,
    /// Only in the answer to a client whose wish a later one took the place of: the generation of that later one,
    /// whose receipt this is.
    #[serde(default)]
    pub superseded_by: Option<u32>,
    /// From the failure of a generation on trial to the kernel's confirmation that no new connection goes to it any more,
    /// on all listeners, in microseconds; null if nothing was steered back.
    #[serde(default)]
    pub steer_back_us: Option<u64>,
    /// Runs of `upgrade.check` that passed.
    #[serde(default)]
    pub checks_passed: u32,
}

/// How long a phase took.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct PhaseTime {
    /// The phase.
    pub phase: Phase,
    /// Milliseconds.
    pub ms: u64,
}

/// What an upgrade did on one listener, the old generation's sockets taken together; counts of connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReceiptListener {
    /// Name of the listener in the config.
    pub name: String,
    /// In the accept queues when new connections were turned away.
    pub queued_at_switch: Option<u32>,
    /// With an unfinished handshake at that moment.
    pub half_open_at_switch: Option<u32>,
    /// Whose handshake was still unfinished after `settle_timeout`.
    #[serde(default)]
    pub half_open_abandoned: Option<u32>,
    /// Moved by the kernel from a closing listener to a living one.
    pub migrated: Option<u32>,
    /// That the kernel could not move; a counter of the whole network namespace.
    pub migrate_failures: Option<u32>,
    /// Dropped by the listeners themselves (full queues).
    pub listen_drops: Option<u32>,
    /// Accepted by a living worker from a dead one's listener.
    #[serde(default)]
    pub leftovers_taken: Option<u32>,
    /// Lost in the queue of a dead worker.
    #[serde(default)]
    pub leftovers_lost: Option<u32>,
}
