//! One worker's life.

use crate::event::Problem;
use crate::id::{Generation, Seat, Time};
use serde::{Deserialize, Serialize};

/// How a worker works with the master.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerKind {
    /// It speaks on the handover channel: the master calls `listen()` and holds a handle of each listener.
    Handover,
    /// It listens by itself and knows nothing of the master.
    Unmodified,
}

/// Where a worker is. What exists only in a state lives in that state.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum WorkerState {
    /// Asked for, not there yet.
    Spawning,
    /// Running, not ready.
    Starting {
        /// READY=1 came; its listeners are being looked for.
        notified: bool,
    },
    /// Its listeners exist; whether it accepts from them is being tried.
    Proving,
    /// Proven: its listeners exist, or are bound. Not chosen by anyone.
    Ready,
    /// Its bound sockets are being listened on.
    Joining {
        /// It still has to be proven after that.
        unproven: bool,
    },
    /// It accepts and is, or is about to be, chosen.
    Serving,
    /// Steered away from; accepts what still waits.
    Emptying,
    /// Its queues are empty; open connections may finish before it is told to stop.
    Idling {
        /// Told then at the latest.
        until: Time,
    },
    /// Told to stop; its listeners are still to go.
    Stopping {
        /// When it was told.
        told: Time,
        /// It said that it accepted everything and closed its listeners.
        drained: bool,
    },
    /// Its listeners are gone; it finishes open connections.
    Draining,
    /// To end without ever having served, or killed.
    Dying,
    /// Ended; other processes of its group are still to go.
    Remains {
        /// Killed then.
        until: Time,
    },
}

impl WorkerState {
    /// Whether it ever got to the point of being proven.
    pub(crate) fn is_starting(self) -> bool {
        match self {
            WorkerState::Spawning
            | WorkerState::Starting { .. }
            | WorkerState::Proving
            | WorkerState::Joining { unproven: true } => true,
            WorkerState::Ready
            | WorkerState::Joining { unproven: false }
            | WorkerState::Serving
            | WorkerState::Emptying
            | WorkerState::Idling { .. }
            | WorkerState::Stopping { .. }
            | WorkerState::Draining
            | WorkerState::Dying
            | WorkerState::Remains { .. } => false,
        }
    }

    /// Whether it serves no new connection any more, though it lives.
    pub(crate) fn is_retiring(self) -> bool {
        matches!(self, WorkerState::Emptying | WorkerState::Idling { .. }) || self.is_ending()
    }

    /// Whether its end is, or was, asked for.
    pub(crate) fn is_ending(self) -> bool {
        match self {
            WorkerState::Stopping { .. }
            | WorkerState::Draining
            | WorkerState::Dying
            | WorkerState::Remains { .. } => true,
            WorkerState::Spawning
            | WorkerState::Starting { .. }
            | WorkerState::Proving
            | WorkerState::Ready
            | WorkerState::Joining { .. }
            | WorkerState::Serving
            | WorkerState::Emptying
            | WorkerState::Idling { .. } => false,
        }
    }
}

/// One process started by the master.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Worker {
    pub(crate) generation: Generation,
    pub(crate) seat: Seat,
    pub(crate) state: WorkerState,
    /// `None` until it says, or shows, which it is.
    pub(crate) kind: Option<WorkerKind>,
    pub(crate) spawned: Time,
    /// A handover worker has been told to serve.
    pub(crate) told_serve: bool,
    /// It gave no sign of life in time, as far as has been read.
    pub(crate) silent: bool,
    /// Requests it has answered in a row.
    pub(crate) passes: u16,
    /// What was missing when its listeners were last looked for.
    pub(crate) missing: Option<Problem>,
    /// The pause before its listeners are looked for again, or its remains.
    pub(crate) pause: core::time::Duration,
    /// Killed at its deadline, and its open connections have not been counted yet.
    pub(crate) cut_uncounted: bool,
}

impl Worker {
    pub(crate) fn new(generation: Generation, seat: Seat, now: Time) -> Worker {
        Worker {
            generation,
            seat,
            state: WorkerState::Spawning,
            kind: None,
            spawned: now,
            told_serve: false,
            silent: false,
            passes: 0,
            missing: None,
            pause: LOOK_PAUSE,
            cut_uncounted: false,
        }
    }
}

/// The first pause between two looks at something the kernel gives no event for; doubles.
pub(crate) const LOOK_PAUSE: core::time::Duration = core::time::Duration::from_millis(10);
/// The longest such pause.
pub(crate) const LOOK_PAUSE_MAX: core::time::Duration = core::time::Duration::from_millis(100);
