//! One generation: a plan and its seats.

use crate::command::Asked;
use crate::event::Wait;
use crate::id::{Generation, GroupId, Ticket, Time, WorkerId};
use crate::plan::Plan;
use crate::receipt::Receipt;
use crate::restart::Backoff;
use crate::trial::Trial;
use alloc::collections::{BTreeMap, BTreeSet};
use alloc::vec::Vec;
use core::time::Duration;
use serde::{Deserialize, Serialize};

/// Where a generation is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub enum GenerationState {
    /// Starting; gets no connection.
    Launching,
    /// A part of the new connections goes to it.
    Canary,
    /// New connections go to it.
    Active,
    /// None goes to it, but all may again at any time.
    Standby,
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
    /// Takes the place of the worker as soon as it serves.
    #[serde(default)]
    pub(crate) next: Option<WorkerId>,
    /// Clients that wait for that.
    #[serde(default)]
    pub(crate) waiting: Vec<Ticket>,
    /// One of the next generation serves in its place.
    #[serde(default)]
    pub(crate) is_given_up: bool,
}

/// Workers of one generation on their way out together.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Retirement {
    pub(crate) generation: Generation,
    /// The generation goes, and not only some of its workers.
    pub(crate) is_whole: bool,
    pub(crate) workers: BTreeSet<WorkerId>,
    /// Clients that wait until their listeners are gone.
    pub(crate) waiting: Vec<Ticket>,
    /// The switch, or the stop.
    pub(crate) since: Time,
    pub(crate) step: RetireStep,
    pub(crate) pause: Duration,
    /// Groups whose answer of the present look is still to come.
    pub(crate) looking: BTreeSet<GroupId>,
    /// Whoever waited has been told that its listeners are gone, but for those with flows that go on.
    #[serde(default)]
    pub(crate) is_answered: bool,
}

/// The steps that all of them take together.
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
    /// The receipt of the upgrade that replaces this generation, kept open until its workers are gone.
    pub(crate) receipt: Option<Receipt>,
    /// Clients that wait until its workers are gone.
    pub(crate) waiting: Vec<Caller>,
    /// When draining began.
    pub(crate) draining_since: Option<Time>,
    /// Sockets of its workers of which it is still to be told how many datagrams nobody got.
    #[serde(default)]
    pub(crate) discarding: u32,
    /// Its workers were found without a master: what they were started from is not known.
    #[serde(default)]
    pub(crate) is_found: bool,
}

impl SeatRecord {
    /// Nobody sits on it, or will soon, though somebody should.
    pub(crate) fn is_vacant(&self) -> bool {
        self.worker.is_none() && self.next.is_none() && !self.is_given_up
    }
}

impl GenerationRecord {
    /// Its seats are to be filled: connections go to it, or may again.
    pub(crate) fn serves(&self) -> bool {
        matches!(self.state, GenerationState::Active | GenerationState::Standby)
    }

    pub(crate) fn new(plan: Plan) -> GenerationRecord {
        let seats = (0..plan.workers).map(|_| SeatRecord::default()).collect();
        GenerationRecord {
            plan,
            state: GenerationState::Launching,
            seats,
            receipt: None,
            waiting: Vec::new(),
            draining_since: None,
            discarding: 0,
            is_found: false,
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
    pub(crate) waiting: Vec<Caller>,
    /// Seats of the new generation that have been filled.
    #[serde(default)]
    pub(crate) launched: u16,
    /// Old workers that were replaced batch by batch, as long as they are there.
    #[serde(default)]
    pub(crate) batches: Vec<BTreeSet<WorkerId>>,
    /// Steps of the canary that have begun.
    #[serde(default)]
    pub(crate) shares: u16,
    #[serde(default)]
    pub(crate) trial: Option<Trial>,
    /// Since then the kernel is being told that no new connection goes to the new generation.
    #[serde(default)]
    pub(crate) steering_back: Option<Time>,
}

/// A client that waits for the end of an upgrade.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Caller {
    pub(crate) ticket: Ticket,
    pub(crate) wait: Wait,
    pub(crate) asked: Asked,
}

/// What new connections are steered for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Goal {
    /// The next step of the canary.
    Share,
    /// A batch.
    Batch,
    /// The switch.
    All,
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
    Steering(Goal, BTreeSet<GroupId>),
    /// The new generation has a share of the new connections.
    Canary,
    /// It has them all, and the old one stands by.
    Baking,
    /// The old workers of a batch leave.
    Replacing,
    /// The old generation's listeners leave.
    Retiring,
    /// The old workers that were replaced are launched again.
    Restoring,
    /// The kernel is told that no new connection goes to the new generation.
    SteeringBack,
    /// The new generation is taken back.
    RollingBack,
}

/// An upgrade that waits for the present one to end. There is at most one: the latest wins.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Wish {
    pub(crate) plan: Plan,
    pub(crate) trigger: crate::event::Trigger,
    pub(crate) waiting: Vec<Caller>,
}
