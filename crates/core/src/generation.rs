//! One generation: a plan and its seats.

use crate::event::Wait;
use crate::id::{Generation, GroupId, Ticket, Time, WorkerId};
use crate::plan::Plan;
use crate::receipt::Receipt;
use crate::restart::Backoff;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// Where a generation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GenerationState {
    /// Starting; gets no connection.
    Launching,
    /// New connections go to it.
    Active,
    /// Steered away from; its listeners are emptied and leave.
    Retiring,
    /// Its listeners are gone, its workers finish their connections.
    Draining,
}

/// A numbered place for a worker.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SeatRecord {
    pub(crate) worker: Option<WorkerId>,
    /// When its latest worker was spawned.
    pub(crate) filled: Time,
    pub(crate) restarts: u32,
    pub(crate) backoff: Backoff,
}

/// How far the retirement of a generation is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Retirement {
    /// The switch, or the stop.
    pub(crate) since: Time,
    pub(crate) step: RetireStep,
    pub(crate) pause: Duration,
    /// Groups whose answer of the present look is still to come.
    pub(crate) looking: BTreeSet<GroupId>,
}

/// The steps that the whole generation takes together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum RetireStep {
    /// The first look: what waited at the switch.
    Counting,
    /// Waiting until handshakes begun before the switch are in the snapshot.
    Pausing,
    /// Handshakes of the snapshot that are still half open.
    Settling(BTreeMap<GroupId, BTreeSet<u64>>),
    /// Each worker on its own way out.
    Emptying,
}

/// A generation.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct GenerationRecord {
    pub(crate) plan: Plan,
    pub(crate) state: GenerationState,
    pub(crate) seats: Vec<SeatRecord>,
    pub(crate) retirement: Option<Retirement>,
    /// The receipt of the upgrade that replaces this generation, kept open until its workers are gone.
    pub(crate) receipt: Option<Receipt>,
    /// Clients that wait until its workers are gone.
    pub(crate) waiting: Vec<Ticket>,
    /// When draining began.
    pub(crate) draining_since: Option<Time>,
}

impl GenerationRecord {
    pub(crate) fn new(plan: Plan) -> GenerationRecord {
        let seats = (0..plan.workers).map(|_| SeatRecord::default()).collect();
        GenerationRecord {
            plan,
            state: GenerationState::Launching,
            seats,
            retirement: None,
            receipt: None,
            waiting: Vec::new(),
            draining_since: None,
        }
    }
}

/// The one upgrade that is under way.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Upgrade {
    pub(crate) from: Option<Generation>,
    pub(crate) to: Generation,
    pub(crate) step: UpgradeStep,
    pub(crate) phase_since: Time,
    pub(crate) receipt: Receipt,
    pub(crate) waiting: Vec<(Ticket, Wait)>,
}

/// Where the upgrade is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum UpgradeStep {
    /// Waits until fewer old generations drain.
    Queued,
    /// Seats start and become ready.
    Launching,
    /// Ready sockets are being listened on.
    Joining,
    /// Groups that are not steered yet.
    Steering(BTreeSet<GroupId>),
    /// The old generation's listeners leave.
    Retiring,
    /// The new generation is taken back.
    RollingBack,
}

/// An upgrade that waits for the present one to end. There is at most one: the latest wins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wish {
    pub(crate) plan: Plan,
    pub(crate) trigger: crate::event::Trigger,
    pub(crate) waiting: Vec<(Ticket, Wait)>,
}
