//! Everything the core waits for in time, as one table; its minimum is the next deadline.

use crate::id::{Generation, GroupId, RetirementId, Seat, Time, WorkerId};
use alloc::collections::BTreeMap;
use alloc::vec::Vec;
use serde::{Deserialize, Serialize};

/// What may be waited for. At most one of each is armed.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(crate) enum Timer {
    /// The worker must be ready by then.
    Ready(WorkerId),
    /// Look for the worker's listeners again.
    Look(WorkerId),
    /// The worker's process group is killed then.
    Kill(WorkerId),
    /// Ask again whether processes of the ended worker are left.
    Remains(WorkerId),
    /// The seat is filled again then.
    Respawn(Generation, Seat),
    /// The breaker closes then.
    Breaker,
    /// Look again how far the retirement is.
    Retire(RetirementId),
    /// Steer this group again, or ask again for leftovers to be taken.
    Group(GroupId),
    /// `cbpf`: look again which handshakes of the group are half open.
    Settle(GroupId),
    /// Look whether workers still have their listeners.
    Watch,
    /// The worker must have given a sign of life by then.
    Watchdog(WorkerId),
    /// The service manager is given a sign of life.
    Beat,
    /// The new program must have read the state by then.
    Preflight,
    /// A keeper is started again.
    Keeper,
    /// The waiting upgrade begins then.
    Wish,
    /// The canary step, or the bake, has lasted long enough.
    Hold,
    /// The generation on trial is checked again.
    Check,
    /// The check must have ended by then.
    CheckLimit,
    /// The canary's accept queues are compared with its siblings'.
    Compare,
}

/// The armed timers.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Vec<(Timer, Time)>", into = "Vec<(Timer, Time)>")]
pub(crate) struct Timers(BTreeMap<Timer, Time>);

// Text formats have no maps with such keys.
impl From<Vec<(Timer, Time)>> for Timers {
    fn from(armed: Vec<(Timer, Time)>) -> Timers {
        Timers(armed.into_iter().collect())
    }
}

impl From<Timers> for Vec<(Timer, Time)> {
    fn from(timers: Timers) -> Vec<(Timer, Time)> {
        timers.0.into_iter().collect()
    }
}

impl Timers {
    /// Arms or moves a timer.
    pub(crate) fn arm(&mut self, timer: Timer, at: Time) {
        self.0.insert(timer, at);
    }

    /// Arms a timer, or moves it if it would fire later.
    pub(crate) fn arm_by(&mut self, timer: Timer, at: Time) {
        let armed = self.0.entry(timer).or_insert(at);
        *armed = at.min(*armed);
    }

    /// Forgets a timer.
    pub(crate) fn disarm(&mut self, timer: Timer) {
        self.0.remove(&timer);
    }

    /// Whether it is armed.
    pub(crate) fn is_armed(&self, timer: Timer) -> bool {
        self.0.contains_key(&timer)
    }

    /// The earliest point anything is waited for.
    pub(crate) fn next(&self) -> Option<Time> {
        self.0.values().min().copied()
    }

    /// Takes one timer that is due, the earliest first.
    pub(crate) fn take_due(&mut self, now: Time) -> Option<Timer> {
        let (&timer, _) = self.0.iter().filter(|(_, at)| **at <= now).min_by_key(|(_, at)| **at)?;
        self.0.remove(&timer);
        Some(timer)
    }

    /// When this timer fires.
    pub(crate) fn at(&self, timer: Timer) -> Option<Time> {
        self.0.get(&timer).copied()
    }
}
