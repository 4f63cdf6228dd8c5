//! Sockets that take datagrams. They are in their group from `bind()` on, nobody takes over what waits in one that closes,
//! and where flows are kept, a worker on its way out is left alone until its own have ended.

use crate::command::Report;
use crate::event::Depth;
use crate::generation::{RetireStep, Retirement};
use crate::group::Listener;
use crate::id::{Generation, GroupId, ListenerId, RetirementId, Time, WorkerId};
use crate::master::Master;
use crate::plan::{Engine, Plan};
use crate::timers::Timer;
use crate::worker::{LOOK_PAUSE, WorkerState};
use alloc::vec::Vec;
use core::time::Duration;

/// Before the end of the drain: what the last flows have sent is still to be read.
const LAST_WORDS: Duration = Duration::from_secs(1);
/// The longest pause between two looks whether flows have ended.
pub(crate) const FLOWS_PAUSE_MAX: Duration = Duration::from_secs(1);

impl Master {
    pub(crate) fn takes_datagrams(&self, group: GroupId) -> bool {
        self.groups.get(&group).is_some_and(|group| group.is_datagram)
    }

    pub(crate) fn on_discarded(&mut self, group: GroupId, generation: Generation, count: u32) {
        if let Some(record) = self.generations.get_mut(&generation) {
            record.discarding = record.discarding.saturating_sub(1);
        }
        if count == 0 {
            return;
        }
        if let Some(listener) = self.receipt_listener(generation, group) {
            listener.leftovers_lost = listener.leftovers_lost.saturating_add(count);
        }
        self.report(Report::DatagramsLost(group, count));
    }

    /// How long a flow of this listener may be idle; `None`: none are kept. The kernel forgets the flows of all generations
    /// by the active one's wish.
    fn flow_timeout(&self, listener: &Listener) -> Option<Duration> {
        let wish = |plan: &Plan| {
            plan.flow_groups.iter().find(|(group, _)| *group == listener.group).map(|(_, timeout)| *timeout)
        };
        let plan = |generation| self.generations.get(&generation).map(|record| &record.plan);
        let own = wish(plan(listener.generation)?)?;
        match self.active.and_then(plan).filter(|active| active.groups.contains(&listener.group)) {
            Some(active) => wish(active).map(|in_force| in_force.min(own)),
            None => Some(own),
        }
    }

    /// Flows may go to it whatever the group is steered to: it has a key, and somebody reads.
    fn is_open_to_flows(&self, listener: &Listener) -> bool {
        let worker = self.workers.get(&listener.worker).map(|worker| worker.state);
        let reads = matches!(worker, Some(WorkerState::Serving | WorkerState::Emptying));
        let is_there = listener.key.is_some() && !listener.leaving && !listener.gone;
        let can_be = self.engine == Engine::Ebpf && self.stopping.is_none();
        can_be && reads && is_there && self.takes_datagrams(listener.group)
    }

    /// Flows are to stay with it.
    pub(crate) fn has_flows(&self, listener: &Listener) -> bool {
        self.is_open_to_flows(listener) && self.flow_timeout(listener).is_some()
    }

    /// A worker on its way out whose flows go on, and nothing else.
    pub(crate) fn has_only_flows(&self, id: WorkerId) -> bool {
        let is_leaving = self.workers.get(&id).is_some_and(|worker| worker.state == WorkerState::Emptying);
        let mut of_worker = self.listeners.values().filter(|listener| listener.worker == id);
        let is_done = |l: &Listener| l.depth.is_some_and(|depth| depth.queued == 0);
        is_leaving
            && of_worker.clone().any(|listener| self.has_flows(listener))
            && of_worker.all(|listener| self.has_flows(listener) || is_done(listener))
    }

    /// The retirement goes on, but nobody has to wait for it any more than for open connections.
    pub(crate) fn waits_for_flows(&self, retirement: &Retirement, worker: WorkerId) -> bool {
        retirement.step == RetireStep::Emptying && self.has_only_flows(worker)
    }

    /// Until then flows may stay with workers on their way out.
    pub(crate) fn flows_until(&self, retirement: &Retirement) -> Time {
        let record = self.generations.get(&retirement.generation);
        let drain = record.map_or(Duration::ZERO, |record| record.plan.drain_timeout);
        retirement.since.after(drain.saturating_sub(LAST_WORDS.min(drain / 2)))
    }

    /// Ends the flows of workers where all are idle, or must be; or where only another generation wanted them kept: what
    /// still comes of them begins anew, elsewhere.
    pub(crate) fn end_flows(&mut self, id: RetirementId) {
        let Some(retirement) = self.retirements.get(&id) else { return };
        let until = self.flows_until(retirement);
        let is_late = self.now >= until;
        let is_over =
            |l: &Listener| is_late || self.flow_timeout(l).is_none_or(|timeout| is_idle(l.depth, timeout));
        let mut over: Vec<ListenerId> = Vec::new();
        for worker in &retirement.workers {
            let is_its = |l: &Listener| l.worker == *worker && self.is_open_to_flows(l);
            let of_worker = || self.listeners.iter().filter(|(_, l)| is_its(l));
            // All of a worker's together: it is told to stop but once.
            if of_worker().all(|(_, listener)| is_over(listener)) {
                over.extend(of_worker().map(|(id, _)| *id));
            }
        }
        if !is_late {
            self.timers.arm_by(Timer::Retire(id), until);
        }
        if let Some(retirement) = self.retirements.get_mut(&id).filter(|_| !over.is_empty()) {
            retirement.pause = LOOK_PAUSE;
            self.timers.arm_by(Timer::Retire(id), self.now.after(LOOK_PAUSE));
        }
        for id in over {
            self.end_flows_of(id);
        }
    }

    fn end_flows_of(&mut self, id: ListenerId) {
        let Some(listener) = self.listeners.get_mut(&id) else { return };
        listener.flows_ended = Some(self.now);
        let group = listener.group;
        self.evict(id);
        self.outdate_looks(group);
    }

    /// What it shows of what waits may be older than its last flow.
    pub(crate) fn may_still_come(&self, listener: &Listener) -> bool {
        self.has_flows(listener) || listener.flows_ended.is_some_and(|ended| ended >= self.now)
    }
}

/// No flow's datagram has come for so long. What is not known counts as busy, what is not kept as idle.
fn is_idle(depth: Option<Depth>, timeout: Duration) -> bool {
    depth.is_some_and(|depth| depth.quiet.is_none_or(|quiet| quiet >= timeout))
}
