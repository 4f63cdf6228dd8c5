//! The part of the judge that reads receipts: what was lost and cut of the generation that went is in them, when they are
//! final at the latest.

use crate::kernel::Kernel;
use crate::workers::Worker;
use reuseportd_core::{
    Command, Event, Generation, GroupId, ListenerId, Order, Outcome, Receipt, Report, WorkerId,
};
use std::collections::{BTreeMap, BTreeSet};

type Workers = BTreeMap<WorkerId, Worker>;

/// So often somebody may be asked to accept what one listener has left, before that is given up and told.
const ASKED_MAX: u32 = 6;

/// What went wrong with a generation since the upgrade away from it, or to it, began.
#[derive(Default)]
struct Harm {
    lost: BTreeMap<GroupId, u32>,
    kills: u32,
    cut: u32,
    /// No master was killed meanwhile: nothing can have been counted twice.
    is_exact: bool,
}

#[derive(Default)]
pub(crate) struct Receipts {
    harm: BTreeMap<Generation, Harm>,
    /// Of these the last word has been said.
    last: BTreeSet<Generation>,
    asked: BTreeMap<ListenerId, u32>,
}

impl Receipts {
    /// Another master goes on with an older memory.
    pub(crate) fn adopted(&mut self) {
        for harm in self.harm.values_mut() {
            *harm = Harm::default();
        }
        self.last.clear();
        self.asked.clear();
    }

    pub(crate) fn command(&mut self, command: &Command) {
        if let Command::Tell { order: Order::Take(listener), .. } = command {
            let asked = self.asked.entry(*listener).or_default();
            *asked += 1;
            assert!(*asked <= ASKED_MAX, "somebody is asked again and again to accept from {listener:?}");
        }
    }

    pub(crate) fn event(&mut self, event: &Event, is_stopping: bool) {
        let Event::Discarded { group, generation, count } = event else { return };
        let is_late = *count > 0 && self.last.contains(generation) && !is_stopping;
        assert!(!is_late, "{event:?}, and the receipt of {generation:?} is final");
        *self.harm.entry(*generation).or_default().lost.entry(*group).or_default() += count;
    }

    pub(crate) fn report(&mut self, report: &Report, kernel: &Kernel, workers: &Workers) {
        match report {
            Report::Ended(receipt) => self.judge(receipt),
            Report::Killed(worker, open) => {
                let harm = self.harm.entry(workers[worker].generation).or_default();
                harm.kills += 1;
                harm.cut += open.unwrap_or_default();
            }
            Report::LeftoversLost(listener, count) => {
                let socket = &kernel.sockets[listener];
                if let Some(owner) = socket.owner.filter(|_| socket.seat.is_none()) {
                    let harm = self.harm.entry(workers[&owner].generation).or_default();
                    *harm.lost.entry(socket.group).or_default() += count;
                }
            }
            _ => {}
        }
    }

    /// From here on it counts.
    pub(crate) fn launching(&mut self, from: Option<Generation>) {
        from.into_iter()
            .for_each(|from| drop(self.harm.insert(from, Harm { is_exact: true, ..Harm::default() })));
    }

    fn judge(&mut self, receipt: &Receipt) {
        let Some(from) = receipt.from.filter(|_| receipt.is_final && receipt.outcome == Outcome::Completed)
        else {
            return;
        };
        self.last.insert(from);
        let harm = self.harm.remove(&from).unwrap_or_default();
        for (group, lost) in harm.lost {
            let told = receipt.listeners.iter().find(|listener| listener.group == group);
            let told = told.map_or(u32::MAX, |listener| listener.leftovers_lost);
            assert!(told >= lost, "{lost} of {group:?} were lost, and {told} are told: {receipt:?}");
        }
        assert!(receipt.forced_kills >= harm.kills, "{} were killed: {receipt:?}", harm.kills);
        let is_true = |cut: u32| cut == harm.cut || (cut > harm.cut && !harm.is_exact);
        let is_true = receipt.connections_cut.is_none_or(is_true);
        assert!(is_true, "{} connections were cut: {receipt:?}", harm.cut);
    }
}
