//! Everything that can happen.

use crate::id::{Generation, GroupId, ListenerId, Seat, Ticket, WorkerId};
use crate::plan::Plan;
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// What the shell tells the core. An errno is the kernel's own number.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Event {
    /// SIGHUP, `upgrade` or a systemd reload: the configuration is valid and the executable pinned.
    Upgrade {
        /// What the next generation is to be.
        plan: Plan,
        /// Who asked.
        trigger: Trigger,
        /// The client that waits for the outcome, and for which part of it.
        by: Option<(Ticket, Wait)>,
    },
    /// The generation that is launched or on trial shall not be: the one before serves on.
    TakeBack {
        /// The client that waits for the outcome.
        by: Option<Ticket>,
    },
    /// The upgrade that waits for a place among the draining shall not: the oldest of them ends now.
    Hurry,
    /// A stop was asked for.
    Stop {
        /// How.
        mode: StopMode,
        /// The client that waits.
        by: Option<Ticket>,
    },
    /// So many workers from now on, until the config changes.
    Scale {
        /// How many.
        to: Number,
        /// The client that waits until it is so.
        by: Option<Ticket>,
    },
    /// Another worker for this seat.
    Replace {
        /// Which.
        seat: Seat,
        /// The client that waits until it is so.
        by: Option<Ticket>,
    },

    /// SIGUSR2 or `reexec`.
    Reexec {
        /// The client that waits.
        by: Option<Ticket>,
    },
    /// Answer to `Preflight`.
    Preflighted {
        /// The new program can read the state.
        readable: bool,
    },
    /// Answer to `Reexec`: in the new image, or in the old one if there is no new one.
    Reexecuted {
        /// This is the new one.
        done: bool,
    },
    /// Answer to `Save`.
    Saved,
    /// There is no keeper of this program: none was started yet, or it has ended.
    KeeperMissing,
    /// The service manager wants a sign of life so often, or not at all.
    Supervised {
        /// Half of what it waits for.
        every: Option<Duration>,
    },
    /// This memory is that of a master that was killed, and perhaps somewhat old.
    Adopted {
        /// Listeners of which it has no handle any more.
        lost: Vec<ListenerId>,
    },
    /// Processes that serve and were left behind by a master of which no more is known: the first generation.
    Orphans {
        /// Its number: the highest of theirs.
        generation: Generation,
        /// A seat for each.
        plan: Plan,
        /// With the listeners that the master has handles of.
        workers: Vec<(WorkerId, Vec<(GroupId, ListenerId)>)>,
        /// `cbpf`: the sockets of each group in the order of their slots, as that master last knew it.
        slots: Vec<(GroupId, Vec<u64>)>,
    },

    /// A server that no master has started: generation 0, from which an upgrade follows.
    Foreign {
        /// One seat.
        plan: Plan,
        /// The server with all its processes.
        server: WorkerId,
        /// Its listeners, of each of which the master has a handle.
        listeners: Vec<(GroupId, ListenerId)>,
    },

    /// The process exists.
    Spawned {
        /// Which.
        worker: WorkerId,
    },
    /// Answer to `Bind`: the socket listens, and the master holds it.
    Bound {
        /// In which group.
        group: GroupId,
        /// For the seat of this worker.
        worker: WorkerId,
        /// An errno on failure.
        result: Result<ListenerId, i32>,
    },
    /// It could not be started.
    SpawnFailed {
        /// Which.
        worker: WorkerId,
        /// Why.
        errno: i32,
    },
    /// It ended and has not been reaped yet: exactly once for each spawned worker.
    Exited {
        /// Which.
        worker: WorkerId,
        /// How it ended.
        how: Exit,
        /// Other processes of its process group still live.
        remains: bool,
    },

    /// `ready` on the handover channel: the listeners are bound, the master holds handles, nothing listens yet.
    Ready {
        /// Which.
        worker: WorkerId,
        /// Its listeners; each group at least once, or the worker is at fault.
        listeners: Vec<(GroupId, ListenerId)>,
    },
    /// READY=1 on the notify socket.
    Notified {
        /// Which.
        worker: WorkerId,
    },
    /// WATCHDOG=1 on the notify socket.
    Alive {
        /// Which.
        worker: WorkerId,
    },
    /// WATCHDOG=trigger on the notify socket: it says itself that it is stuck.
    Stuck {
        /// Which.
        worker: WorkerId,
    },
    /// EXTEND_TIMEOUT_USEC on the notify socket.
    Extended {
        /// Which.
        worker: WorkerId,
        /// From now.
        by: Duration,
    },
    /// `drained` on the channel: its listeners were accepted empty and closed by it.
    Drained {
        /// Which.
        worker: WorkerId,
    },
    /// `taken` on the channel.
    Taken {
        /// Whose leftovers.
        listener: ListenerId,
        /// Connections accepted from it.
        count: u32,
    },

    /// Answer to `Discard`.
    Discarded {
        /// In which group.
        group: GroupId,
        /// Of which generation.
        generation: Generation,
        /// Datagrams that nobody got.
        count: u32,
    },

    /// Answer to `Find`.
    Found {
        /// Which.
        worker: WorkerId,
        /// What was found.
        found: Found,
    },
    /// Answer to `Prove`.
    Proved {
        /// Which.
        worker: WorkerId,
        /// What is known by now.
        verdict: Verdict,
    },
    /// Answer to `Check`.
    Checked {
        /// Which.
        run: u32,
        /// `None`: it passed.
        failure: Option<CheckFailure>,
    },
    /// Answer to `Listen`.
    Listening {
        /// Which.
        listener: ListenerId,
        /// An errno on failure.
        result: Result<(), i32>,
    },
    /// Answer to `Steer` or `Attach`.
    Steered {
        /// Which group.
        group: GroupId,
        /// An errno on failure.
        result: Result<(), i32>,
    },
    /// Answer to `Admit`.
    Admitted {
        /// Which.
        listener: ListenerId,
        /// An errno on failure.
        result: Result<(), i32>,
    },
    /// Answer to `Anchor`.
    Anchored {
        /// Which.
        listener: ListenerId,
        /// An errno on failure.
        result: Result<(), i32>,
    },
    /// Answer to `Owns`.
    Owned {
        /// Which.
        listener: ListenerId,
        /// Some process of its worker still holds the socket.
        owned: bool,
    },
    /// Answer to `CheckRemains`.
    Remains {
        /// Whose.
        worker: WorkerId,
        /// Some process of its group still lives.
        left: bool,
    },
    /// Answer to `Observe`.
    Observed {
        /// Which group.
        group: GroupId,
        /// The kernel's picture of it.
        view: GroupView,
    },
    /// Answer to `Count`: open connections of workers.
    Counted {
        /// Every worker asked about.
        connections: Vec<(WorkerId, u32)>,
    },
    /// The time [`next_deadline`](crate::Master::next_deadline) named has come.
    Deadline,
}

/// Who asked for an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Trigger {
    /// The first generation.
    Start,
    /// SIGHUP.
    Signal,
    /// A control client.
    Command,
    /// A control client that wants the previous generation back.
    Rollback,
    /// Workers without a master were found.
    Orphans,
    /// A server that no master has started is to be replaced.
    Takeover,
}

/// Which part of an upgrade a client waits for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Wait {
    /// Until the old generation's listeners are gone.
    Retired,
    /// Until its workers are gone too.
    Drained,
}

/// How many workers are asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Number {
    /// So many, at least 1.
    Exactly(u16),
    /// One more.
    More,
    /// One fewer.
    Fewer,
}

/// Why a check did not pass.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum CheckFailure {
    /// It ended like this.
    Ended(Exit),
    /// It could not be started.
    NotStarted(i32),
    /// It took too long.
    Late,
}

/// How to stop.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum StopMode {
    /// Refuse new connections where the engine can, finish begun ones, then exit.
    Graceful,
    /// SIGKILL everything now.
    Fast,
}

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Exit {
    /// With this exit code.
    Code(i32),
    /// By this signal.
    Signal(i32),
    /// It was no child of this master, and the kernel does not tell.
    Unknown,
}

/// What became of the attempt to prove a worker.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Verdict {
    /// Nothing yet: ask again.
    Waiting,
    /// It accepted, or answered as it should.
    Passed,
    /// It did not.
    Failed,
}

/// What looking for a worker's own listeners brought.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Found {
    /// A listener in every group; the master holds a handle of each.
    All(Vec<(GroupId, ListenerId)>),
    /// Something is missing that may still come.
    NotYet(Problem),
    /// Something is wrong that will not mend itself.
    Never(Problem),
}

/// Why a worker's listeners are not what the configuration says. The shell keeps the details for people.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Problem {
    /// It listens on none of its addresses.
    NotListening(GroupId),
    /// It listens, but elsewhere.
    WrongAddress(GroupId),
    /// Its listener is not set SO_REUSEPORT.
    NoReuseport(GroupId),
    /// It listens, but does not accept.
    NotAccepting,
    /// It does not answer as it should.
    NotHealthy,
    /// Its descriptors can't be reached.
    NotPermitted(GroupId),
    /// Looking failed with this errno.
    Failed(i32),
}

/// The kernel's picture of one group at one moment.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct GroupView {
    /// Every listening socket, in the order in which they began to listen. That is the order in which they took their
    /// slots; but a socket that leaves moves the last slot into its place, and this list it only shortens.
    pub members: Vec<Member>,
    /// Queue of each known listener.
    pub depths: Vec<(ListenerId, Depth)>,
    /// Half-open handshakes of the port, by the kernel's cookie. Nothing says whose they are.
    pub half_open: Vec<u64>,
    /// Connections the steering program has migrated so far; `None` where nothing counts them.
    pub migrated: Option<u64>,
    /// Failed migrations of the whole network namespace so far.
    pub migrate_failures: Option<u64>,
    /// `net.ipv4.tcp_migrate_req` is on: the kernel moves a closing listener's queue by hash.
    pub migrates_by_hash: bool,
}

/// A listening socket of a group.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Member {
    /// The kernel's name for the socket, never used again.
    pub cookie: u64,
    /// `None` is a stranger's, or a worker's that is not ready yet.
    pub listener: Option<ListenerId>,
}

/// What waits in a listener.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Depth {
    /// Finished handshakes not accepted yet; of datagrams the bytes they take up.
    pub queued: u32,
    /// The limit given to `listen()`.
    pub backlog: u32,
    /// Connections the kernel dropped here since the socket exists; or datagrams.
    pub drops: Option<u32>,
    /// Where flows are kept: how long no datagram of one has come.
    #[serde(default)]
    pub quiet: Option<Duration>,
}
