//! The part of the judge that watches what the service manager is told, the end, and the pauses before respawns.

use crate::kernel::Kernel;
use crate::life::Life;
use crate::protocol::{Protocol, Respawns};
use reuseportd_core::{Generation, GroupId, Notice, Seat};
use std::time::Duration;

impl Protocol {
    /// Another master goes on with this memory: clients are gone, and the service manager has heard nothing of it.
    pub(crate) fn adopted(&mut self, former: &Protocol) {
        // Who was killed stays so, whether anybody remembers it or not.
        for (id, life) in &mut self.lives {
            life.killed |= former.lives.get(id).is_some_and(|before| before.killed);
        }
        self.callers.forget();
        self.phases.adopted();
        self.notices.clear();
    }

    pub(crate) fn served(&mut self, generation: Generation) {
        self.served.insert(generation);
    }

    /// What serves was found without a master.
    pub(crate) fn serves_found(&self) -> bool {
        self.active.is_some_and(|active| self.phases.is_found(active))
    }

    /// It serves again.
    pub(crate) fn back_to(&mut self, standby: Option<Generation>) {
        self.active = standby.or(self.active);
    }

    /// What the program in force means there, nobody can say.
    pub(crate) fn is_unclear(&self, group: GroupId) -> bool {
        self.steer_failed(group) || self.loose.contains(&group)
    }

    /// Seats that come anew begin anew.
    pub(crate) fn forget_respawns(&mut self, generation: Generation, is_it: impl Fn(Seat) -> bool) {
        self.respawns.retain(|(of, seat), _| *of != generation || !is_it(*seat));
    }

    /// Sockets of seats from this one on are let go of.
    pub(crate) fn abandon(&mut self, kernel: &Kernel, first: u16) {
        let of_seat = kernel.sockets.iter().filter(|(_, s)| s.seat.is_some_and(|seat| seat.0 >= first));
        self.abandoned.extend(of_seat.map(|(id, _)| *id));
    }

    /// Sockets of seats that the generation that serves does not have.
    pub(crate) fn abandon_others(&mut self, kernel: &Kernel) {
        let Some(plan) = self.active.map(|active| &self.plans[&active]) else { return };
        let has = |group, seat: Seat| plan.seat_groups.contains(&group) && seat.0 < plan.workers;
        let others = kernel.sockets.iter().filter(|(_, s)| s.seat.is_some_and(|seat| !has(s.group, seat)));
        self.abandoned.extend(others.map(|(id, _)| *id));
    }

    pub(crate) fn notice(&mut self, notice: Notice) {
        if matches!(notice, Notice::Extend(_) | Notice::Alive) {
            return;
        }
        let last = self.notices.last().copied();
        let legal = match notice {
            Notice::Ready => last != Some(Notice::Stopping),
            Notice::Reloading => last == Some(Notice::Ready),
            Notice::Stopping => last != Some(Notice::Stopping),
            Notice::Extend(_) | Notice::Alive => true,
        };
        assert!(legal, "{notice:?} after {:?}", self.notices);
        self.notices.push(notice);
    }

    pub(crate) fn exits(&mut self, code: u8) {
        let left: Vec<_> =
            self.lives.iter().filter(|(_, l)| l.answered != Some(false) && !l.reaped).collect();
        assert!(left.is_empty(), "the master ended before {left:?}");
        // A stop may come while a failed first generation is still being cleared away.
        let may = code == u8::from(self.first_failed) || (code == 0 && self.stop.is_some());
        assert!(may, "exit code {code}");
        self.exit = Some(code);
    }

    /// At once the first time, then at least the configured pause, which doubles and only a stable run ends.
    pub(crate) fn respawning(&mut self, generation: Generation, seat: Seat, pause: Duration, now: u64) {
        let plan = &self.plans[&generation];
        let last = self.lives.values().rfind(|life| life.generation == generation && life.seat == seat);
        let ran = last.map_or(Duration::ZERO, |life| Duration::from_nanos(now - life.spawned));
        let respawns = self.respawns.entry((generation, seat)).or_default();
        // That of a worker whose end was not followed by a pause, too: the breaker was open, or the next was there already.
        let was_stable = |life: &Life| {
            let of_seat =
                life.generation == generation && life.seat == seat && life.spawned >= respawns.after;
            let ran = life.exited.map(|exited| Duration::from_nanos(exited - life.spawned));
            of_seat && ran.is_some_and(|ran| ran >= plan.stable_after)
        };
        let is_over = ran >= plan.stable_after || self.lives.values().any(was_stable);
        let before = if is_over { None } else { respawns.pause };
        let least = match before {
            None => Duration::ZERO,
            Some(Duration::ZERO) => plan.backoff,
            Some(before) => (before * 2).min(plan.backoff_max),
        };
        assert!(pause >= least, "{seat:?} of {generation:?} pauses {pause:?}, not {least:?}");
        let is_forgiven = ran >= plan.stable_after && !pause.is_zero();
        assert!(
            !is_forgiven,
            "{seat:?} of {generation:?} pauses {pause:?} after a worker that ran for {ran:?}"
        );
        *respawns =
            Respawns { pause: Some(pause), after: now + u64::try_from(pause.as_nanos()).unwrap_or(u64::MAX) };
    }
}
