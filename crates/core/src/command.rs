//! Everything that can be asked for, and everything worth telling.

use crate::event::{CheckFailure, Exit, Problem, Trigger};
use crate::id::{Generation, GroupId, ListenerId, Seat, Ticket, WorkerId};
use crate::plan::Policy;
use crate::receipt::{Phase, Receipt};
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// What the shell is to do. Each says which event, if any, answers it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Command {
    /// Start a process. Answer: `Spawned` or `SpawnFailed`.
    Spawn {
        /// Its identity.
        worker: WorkerId,
        /// What it belongs to.
        generation: Generation,
        /// Its place.
        seat: Seat,
    },
    /// Make the socket of a seat, listening. Comes before the seat's `Spawn`. Answer: `Bound`.
    Bind {
        /// In which group.
        group: GroupId,
        /// For the seat of this worker.
        worker: WorkerId,
        /// Of which generation.
        generation: Generation,
        /// Which seat.
        seat: Seat,
    },
    /// Send a signal, through the pidfd.
    Signal {
        /// To whom.
        worker: WorkerId,
        /// Which.
        signal: Signal,
    },
    /// Collect the exit status of an ended worker, and forget the process; of one that was let go of, only that.
    Reap {
        /// Which.
        worker: WorkerId,
    },
    /// Say something on the handover channel.
    Tell {
        /// To whom.
        worker: WorkerId,
        /// What.
        order: Order,
    },
    /// Look for the listeners of an unmodified worker. Answer: `Found`.
    Find {
        /// Whose.
        worker: WorkerId,
    },
    /// Connect to each listener of an unmodified worker, past all others, if that has not been done; and see whether
    /// it accepted. Answer: `Proved`.
    Prove {
        /// Which.
        worker: WorkerId,
    },
    /// Call `listen()` through the handle; here the slot appears. Answer: `Listening`.
    Listen {
        /// Which.
        listener: ListenerId,
    },
    /// `ebpf`: put a listener under a key, so that a plan can name it. Answer: `Admitted`.
    Admit {
        /// Which.
        listener: ListenerId,
        /// Its place in the array of its group.
        key: u32,
    },
    /// `ebpf`: empty a key.
    Evict {
        /// Whose array.
        group: GroupId,
        /// Which key.
        key: u32,
    },
    /// `ebpf`: empty all keys but these.
    KeepKeys {
        /// Whose array.
        group: GroupId,
        /// Which keys stay.
        kept: Vec<u32>,
    },
    /// `ebpf`: choose among these ranges from now on; none at all refuses new connections. Answer: `Steered`.
    Steer {
        /// Which group.
        group: GroupId,
        /// Weights are relative to their sum.
        ranges: Vec<Range>,
    },
    /// `cbpf`: choose among these slots from now on. Answer: `Steered`.
    Attach {
        /// Which group.
        group: GroupId,
        /// Weights are relative to their sum.
        shares: Vec<Share>,
    },
    /// Take a handle of a worker's listener again. Answer: `Anchored`.
    Anchor {
        /// Which.
        listener: ListenerId,
    },
    /// Does any process of the worker still hold this socket, and does it still listen, if it is one that can? Answer: `Owned`.
    Owns {
        /// Which.
        listener: ListenerId,
        /// Whose processes.
        worker: WorkerId,
    },
    /// Are other processes of an ended worker's group still there? Answer: `Remains`.
    CheckRemains {
        /// Whose.
        worker: WorkerId,
    },
    /// Leave a foreign server's listeners, whose groups nobody else is in, as they were found. A `Release` follows.
    LetGo {
        /// All of them, with a handle or without.
        listeners: Vec<ListenerId>,
    },
    /// Drop the master's handle; with `shutdown`, take the socket out of its group even if others hold it.
    Release {
        /// Which.
        listener: ListenerId,
        /// Call `shutdown(SHUT_RD)` first.
        shutdown: bool,
    },
    /// Read and throw away the datagrams that wait in a socket nobody reads any more, and count them. Answer: `Discarded`.
    Discard {
        /// Which.
        listener: ListenerId,
        /// In which group.
        group: GroupId,
        /// Whose.
        generation: Generation,
    },
    /// Look at a group in the kernel. Answer: `Observed`.
    Observe {
        /// Which.
        group: GroupId,
    },
    /// Count open connections. Answer: `Counted`.
    Count {
        /// Whose.
        workers: Vec<WorkerId>,
    },
    /// Tell the service manager.
    Notify(Notice),
    /// Tell a waiting client that the service has ended.
    ReplyStopped {
        /// Whom.
        to: Ticket,
    },
    /// Tell a waiting client how the upgrade ended.
    Reply {
        /// Whom.
        to: Ticket,
        /// The number of the receipt reported before.
        receipt: u32,
        /// What it had asked for.
        asked: Asked,
    },
    /// Tell a client that waits for a number of workers, or another worker, how it ended.
    ReplyDone {
        /// Whom.
        to: Ticket,
        /// Why it is not so.
        failure: Option<Reason>,
    },
    /// Run the check of a generation on trial. Answer: `Checked`.
    Check {
        /// Its number.
        run: u32,
        /// Whose workers.
        generation: Generation,
    },
    /// It takes too long, or nobody needs its answer any more: kill it.
    EndCheck {
        /// Its number.
        run: u32,
    },
    /// Tell a client that waits for a re-exec how it ended.
    ReplyReexec {
        /// Whom.
        to: Ticket,
        /// This is the new image.
        done: bool,
    },
    /// Have the new program read the state, as a child. Answer: `Preflighted`.
    Preflight,
    /// It takes too long: kill it. Its answer follows.
    EndPreflight,
    /// Execute the new program in place, once nothing is left to be done. Answer: `Reexecuted`, in either image.
    Reexec,
    /// Have the next master know all this, once nothing else is left to be done. Answer: `Saved`, also where nobody keeps
    /// anything.
    Save,
    /// Start a keeper and fill it. Answer: `KeeperMissing` if that fails, or when it ends.
    StartKeeper,
    /// A fact for log, metrics and status.
    Report(Report),
    /// Leave the loop with this exit code.
    Exit {
        /// 0 or 1.
        code: u8,
    },
}

/// What a client that waits for an upgrade had asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Asked {
    /// This upgrade.
    This,
    /// An earlier one, which this one took the place of.
    Earlier,
    /// That it be taken back.
    Back,
}

/// A range of keys with its part of the new connections.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Range {
    /// Whose listeners.
    pub generation: Generation,
    /// Relative to the sum of all.
    pub weight: u16,
    /// First key.
    pub base: u32,
    /// Keys, holes included.
    pub count: u32,
    /// Keys to a seat, where the seat is chosen by the processor; 0: any key, by hash.
    #[serde(default)]
    pub step: u32,
}

/// A set of slots with its part of the new connections.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Share {
    /// Relative to the sum of all.
    pub weight: u16,
    /// Ascending; by processor: those of the seats, one after the other.
    pub slots: Vec<u16>,
    /// How one of them is chosen.
    #[serde(default)]
    pub policy: Policy,
}

/// An order on the handover channel.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Order {
    /// Its listeners listen: accept.
    Serve,
    /// Accept until nothing waits, close the listeners, say `drained`, finish, exit.
    Stop,
    /// Accept what a dead worker's listener holds. Answer: `Taken`.
    Take(ListenerId),
}

/// Signals the core sends.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Signal {
    /// The configured stop signal, to the worker's first process.
    Stop,
    /// SIGTERM to what is left of its process group.
    TerminateGroup,
    /// SIGKILL to its whole process group.
    KillGroup,
}

/// What the service manager is told.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Notice {
    /// The service serves, or an upgrade ended.
    Ready,
    /// An upgrade began.
    Reloading,
    /// The service ends.
    Stopping,
    /// The present phase may take so long.
    Extend(Duration),
    /// A sign of life.
    Alive,
}

/// A typed fact. The shell turns it into one log event, and into status and metrics.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Report {
    /// A generation is about to be launched.
    Launching(Generation, Trigger),
    /// It waits until an old generation has finished draining.
    Queued(Generation),
    /// A wish was replaced by a later one before it began.
    Superseded(Trigger),
    /// The upgrade entered a phase.
    Entered(Generation, Phase),
    /// A worker can serve.
    WorkerReady(WorkerId),
    /// The upgrade to this generation can't go on, for this reason.
    Failing(Generation, Reason),
    /// So much of the new connections, of 1000, goes to this generation on trial.
    Shared(Generation, u16),
    /// So many seats of this generation serve, and so many shall.
    Rolled(Generation, u16, u16),
    /// No new connection goes to this generation any more, so long after its failure.
    SteeredBack(Generation, Duration),
    /// The generation has so many seats now.
    Scaled(Generation, u16),
    /// Another worker serves on this seat.
    SeatReplaced(Generation, Seat),
    /// New connections go to this generation only.
    Switched(Generation),
    /// An upgrade ended, or (again) what happened after its end is known.
    Ended(Receipt),
    /// A worker ended.
    WorkerExited {
        /// Which.
        worker: WorkerId,
        /// How.
        how: Exit,
        /// The master had asked for it.
        asked: bool,
    },
    /// A seat will be filled again after this pause.
    Respawning(Generation, Seat, Duration),
    /// A worker that should serve has not become ready, and is ended.
    Replaced(WorkerId, Reason),
    /// Too many exits: no respawns for so long.
    BreakerOpened(Duration),
    /// Respawns again.
    BreakerClosed,
    /// A sibling accepted so many connections of a dead or retired listener.
    LeftoversTaken(ListenerId, u32),
    /// So many connections of a listener had no one to go to.
    LeftoversLost(ListenerId, u32),
    /// So many datagrams waited in a socket of this group whose worker was gone, or killed.
    DatagramsLost(GroupId, u32),
    /// Several sockets left a group unasked: who sits in which slot is a guess now.
    SlotsUnsure(GroupId),
    /// The kernel refused to steer; tried again soon.
    SteerFailed(GroupId, i32),
    /// An anchored worker no longer holds its listener.
    ListenerLost(ListenerId),
    /// A worker was killed at its deadline with so many open connections.
    Killed(WorkerId, Option<u32>),
    /// The whole old generation is gone.
    Drained(Generation),
    /// The program of the master was replaced.
    Reexecuted,
    /// It was not: the new one can't go on where the old one is, or the service stops.
    ReexecRefused,
    /// So many workers of a master that was killed are now this one's.
    Adopted(usize),
    /// Something impossible was asked or told; nothing was changed.
    Bug(&'static str),
}

/// Why something failed. The shell adds names, exit status and last output lines.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum Reason {
    /// The process could not be started.
    SpawnFailed(Seat, WorkerId, i32),
    /// It ended before the generation was serving.
    Exited(Seat, WorkerId, Exit),
    /// It was not ready in time.
    NotReady(Seat, WorkerId, Option<Problem>),
    /// It said it was ready, but its listeners are wrong.
    WrongListeners(Seat, WorkerId, Problem),
    /// The socket of its seat could not be made.
    BindFailed(Seat, GroupId, i32),
    /// `listen()` failed on its socket.
    ListenFailed(Seat, WorkerId, i32),
    /// It gave no sign of life.
    Stuck(Seat, WorkerId),
    /// The kernel refused to steer this group.
    SteerFailed(GroupId, i32),
    /// It ended while its generation was on trial.
    Crashed(Seat, WorkerId, Exit),
    /// The check of the generation on trial did not pass.
    CheckFailed(CheckFailure),
    /// The canary's accept queues in this group grow beyond its siblings'.
    QueueGrows(GroupId),
    /// Somebody asked for it.
    TakenBack,
    /// It is too late to take the generation back: the one before has begun to leave.
    TooLate,
    /// Not while an upgrade is under way.
    Busy,
    /// There is no such seat; there are so many.
    NoSuchSeat(Seat, u16),
    /// A later wish was for another number of workers, or another config came.
    Overtaken,
    /// The master was told to stop.
    Stopped,
}
