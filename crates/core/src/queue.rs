//! Wishes for an upgrade: one is carried out at a time, and of those that come meanwhile the latest.

use crate::command::{Asked, Command, Notice, Reason, Report};
use crate::event::{Trigger, Wait};
use crate::generation::{Caller, GenerationRecord, Upgrade, UpgradeStep, Wish};
use crate::id::{Generation, Ticket};
use crate::master::Master;
use crate::plan::Plan;
use crate::receipt::{Outcome, Receipt, ReceiptListener};
use crate::timers::Timer;
use alloc::vec::Vec;
use core::time::Duration;

/// From the beginning of one upgrade to that of another that was wished meanwhile: others join it, so that many wishes
/// become few upgrades.
const WISH_PAUSE: Duration = Duration::from_secs(1);

/// What stands before the generation that serves, or is about to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Before {
    /// The present one: the next can still be taken back.
    Present,
    /// This one: gone, or going.
    Past(Generation),
    /// None that is known.
    Nothing,
}

impl Master {
    pub(crate) fn on_upgrade(&mut self, plan: Plan, trigger: Trigger, by: Option<(Ticket, Wait)>) {
        let by = by.map(|(ticket, wait)| Caller { ticket, wait, asked: Asked::This });
        let mut wish = Wish { plan, trigger, waiting: by.into_iter().collect() };
        if self.stopping.is_some() {
            return self.refuse(&wish, Reason::Stopped);
        }
        if self.upgrade.is_none() && self.wish.is_none() {
            return self.begin_upgrade(wish);
        }
        if let Some(earlier) = self.supersede() {
            wish.waiting.splice(0..0, earlier);
        }
        self.wish = Some(wish);
    }

    /// The waiting wish gives way to a later one; who waits for it waits for that now.
    fn supersede(&mut self) -> Option<impl Iterator<Item = Caller> + use<>> {
        let replaced = self.wish.take()?;
        self.report(Report::Superseded(replaced.trigger));
        Some(replaced.waiting.into_iter().map(|caller| Caller { asked: Asked::Earlier, ..caller }))
    }

    /// What `rollback` would bring back.
    #[must_use]
    pub fn before(&self) -> Before {
        let past = match &self.upgrade {
            Some(Upgrade { from: Some(_), step, .. }) if *step != UpgradeStep::Retiring => {
                return Before::Present;
            }
            Some(upgrade) => self.known_origin(upgrade.from),
            None => self.previous,
        };
        past.map_or(Before::Nothing, Before::Past)
    }

    /// The generation, if it is known what it was started from.
    pub(crate) fn known_origin(&self, generation: Option<Generation>) -> Option<Generation> {
        let is_found = |id: &Generation| self.generations.get(id).is_some_and(|record| record.is_found);
        generation.filter(|id| !is_found(id))
    }

    /// Whether what this generation is started from may be needed: it is there, or may be brought back.
    #[must_use]
    pub fn remembers(&self, generation: Generation) -> bool {
        self.generations.contains_key(&generation) || self.previous == Some(generation)
    }

    /// A later wish than any that waits: for nothing new.
    pub(crate) fn on_take_back(&mut self, by: Option<Ticket>) {
        let trigger = self.upgrade.as_ref().map(|upgrade| upgrade.receipt.trigger);
        // Two that want the former generation back want the same.
        let asked = if trigger == Some(Trigger::Rollback) { Asked::This } else { Asked::Back };
        let by = by.map(|ticket| Caller { ticket, wait: Wait::Retired, asked });
        if self.before() != Before::Present {
            let refused = by.into_iter().map(|caller| caller.ticket).collect();
            return self.answer_all(refused, Some(Reason::TooLate));
        }
        let earlier: Vec<Caller> = self.supersede().into_iter().flatten().collect();
        self.timers.disarm(Timer::Wish);
        if let Some(upgrade) = self.upgrade.as_mut() {
            upgrade.waiting.extend(earlier.into_iter().chain(by));
        }
        if asked == Asked::Back {
            self.fail_upgrade(Reason::TakenBack);
        }
    }

    fn blank_receipt(&mut self, trigger: Trigger, plan: &Plan, to: Option<Generation>) -> Receipt {
        self.receipt_last += 1;
        Receipt {
            serial: self.receipt_last,
            from: self.active,
            to,
            trigger,
            outcome: Outcome::Completed,
            reason: None,
            started: self.now,
            took: Duration::ZERO,
            phases: Vec::new(),
            listeners: plan.groups.iter().map(|group| ReceiptListener::new(*group)).collect(),
            forced_kills: 0,
            connections_cut: Some(0),
            steer_back: None,
            checks: 0,
            is_final: false,
        }
    }

    pub(crate) fn refuse(&mut self, wish: &Wish, reason: Reason) {
        let mut receipt = self.blank_receipt(wish.trigger, &wish.plan, None);
        receipt.outcome = Outcome::Refused;
        receipt.reason = Some(reason);
        receipt.is_final = true;
        let serial = receipt.serial;
        self.report(Report::Ended(receipt));
        for caller in &wish.waiting {
            self.reply(*caller, serial);
        }
    }

    pub(crate) fn reply(&mut self, caller: Caller, receipt: u32) {
        self.push(Command::Reply { to: caller.ticket, receipt, asked: caller.asked });
    }

    fn begin_upgrade(&mut self, wish: Wish) {
        let Wish { mut plan, trigger, waiting } = wish;
        // The same config: as many workers as were asked for since.
        let present = self.active.and_then(|active| self.generations.get(&active)).map(|record| &record.plan);
        if let Some(present) = present.filter(|present| present.config == plan.config) {
            plan.workers = present.workers;
            if let Some(scaling) = self.scaling.as_mut() {
                plan.workers = scaling.workers(present.workers);
                scaling.settle(plan.workers);
            }
        } else if let Some(scaling) = self.scaling.take() {
            self.answer_all(scaling.waiting, Some(Reason::Overtaken));
        }
        // It has proven itself, and whoever wants it back wants it now.
        if trigger == Trigger::Rollback {
            plan.canary.clear();
            plan.bake = Duration::ZERO;
        }
        self.generation_last += 1;
        let to = Generation(self.generation_last);
        let receipt = self.blank_receipt(trigger, &plan, Some(to));
        let groups = plan.groups.clone();
        self.open_groups(&plan);
        self.generations.insert(to, GenerationRecord::new(plan));
        self.upgrade_begun = self.now;
        self.upgrade = Some(Upgrade {
            from: self.active,
            to,
            step: UpgradeStep::Queued,
            phase_since: self.now,
            receipt,
            waiting,
            launched: 0,
            batches: Vec::new(),
            shares: 0,
            trial: None,
            steering_back: None,
        });
        // From where the kernel's counters count.
        for group in groups {
            self.observe(group);
        }
        self.report(Report::Launching(to, trigger));
        // A reload that is a command of the service manager's own is over when that command is, and its end needs no telling.
        if trigger == Trigger::Signal && self.active.is_some() {
            self.notify(Notice::Reloading);
        }
        if self.must_queue(to) {
            self.report(Report::Queued(to));
        }
    }

    /// The wish that came during an upgrade has its turn, or soon will.
    pub(crate) fn begin_wish(&mut self) {
        self.timers.disarm(Timer::Wish);
        let due = self.upgrade_begun.after(WISH_PAUSE);
        if self.wish.is_some() && self.now < due {
            return self.timers.arm(Timer::Wish, due);
        }
        if let Some(wish) = self.wish.take() {
            self.begin_upgrade(wish);
            self.advance_launch();
        }
    }

    /// The waiting upgrade will never begin, nor will there be another number of workers.
    pub(crate) fn drop_wishes(&mut self) {
        self.timers.disarm(Timer::Wish);
        let waiting = self.scaling.take().map(|scaling| scaling.waiting).unwrap_or_default();
        self.answer_all(waiting, Some(Reason::Stopped));
        if let Some(wish) = self.wish.take() {
            self.refuse(&wish, Reason::Stopped);
        }
    }
}
