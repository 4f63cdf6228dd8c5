//! The core's facts as log events, STATUS text and progress: one event per fact, under a stable name.

use reuseportd_core::{Generation, Phase, Reason, Report, WorkerId};
use reuseportd_wire::status as wire;

use super::{Shell, words};

impl Shell {
    pub(super) fn log_report(&mut self, report: &Report) {
        match report {
            Report::Launching(..)
            | Report::Queued(_)
            | Report::Superseded(_)
            | Report::Failing(..)
            | Report::Shared(..)
            | Report::Rolled(..)
            | Report::SteeredBack(..)
            | Report::Switched(_)
            | Report::Drained(_) => self.log_upgrade(report),
            Report::Entered(generation, phase) => self.entered(*generation, *phase),
            Report::Ended(receipt) => self.ended(receipt),
            Report::WorkerReady(worker) => self.worker_ready(*worker),
            Report::WorkerExited { .. }
            | Report::Respawning(..)
            | Report::Replaced(..)
            | Report::Killed(..) => self.log_worker(report),
            Report::Scaled(..) | Report::SeatReplaced(..) => self.log_seats(report),
            Report::BreakerOpened(pause) => {
                let reason = format!("too many worker exits: no respawns for {pause:?} (restart.breaker)");
                tracing::error!(event = "breaker_opened", ?pause, "{reason}");
                self.upstream.status(&format!("degraded: {reason}"));
                self.state_reason = Some(reason);
            }
            Report::BreakerClosed => {
                self.state_reason = None;
                tracing::info!(event = "breaker_closed", "respawning again");
                self.upstream.status("respawning again");
            }
            Report::LeftoversTaken(..)
            | Report::LeftoversLost(..)
            | Report::DatagramsLost(..)
            | Report::SlotsUnsure(_)
            | Report::SteerFailed(..)
            | Report::ListenerLost(_) => self.log_listener(report),
            Report::Reexecuted => {
                let version = env!("CARGO_PKG_VERSION");
                tracing::info!(event = "reexecuted", version, "the master goes on as version {version}");
                self.upstream.status(&format!("goes on as version {version}"));
            }
            Report::ReexecRefused => {
                let reason = self.reexec_refusal();
                tracing::error!(event = "reexec_refused", reason, "no re-exec: {reason}");
                self.upstream.status(&format!("no re-exec: {reason}"));
            }
            Report::Adopted(workers) => {
                tracing::warn!(
                    event = "adopted",
                    workers,
                    "took over {workers} workers of a master that has ended"
                );
                self.upstream.status(&format!("took over {workers} workers of a master that has ended"));
            }
            Report::Bug(what) => {
                tracing::error!(event = "bug", what, "this should not have happened; please report it");
            }
        }
    }

    fn log_upgrade(&mut self, report: &Report) {
        match report {
            // It serves since long ago, and was told of.
            Report::Launching(Generation(0), _) => {}
            Report::Launching(Generation(generation), trigger) => {
                let trigger = words::trigger(*trigger);
                tracing::info!(event = "launching", generation, %trigger, "launching generation {generation}");
            }
            Report::Queued(Generation(generation)) => {
                let text = "waits until an old generation has finished draining (upgrade.max_draining)";
                tracing::info!(event = "queued", generation, "generation {generation} {text}");
                self.say_state(wire::Phase::Launching, &format!("generation {generation} {text}"), None);
            }
            Report::Superseded(trigger) => {
                let trigger = words::trigger(*trigger);
                tracing::info!(event = "superseded", %trigger, "a waiting upgrade is replaced by a later one");
            }
            Report::Failing(Generation(generation), _) => {
                let reason = self.failing.clone().unwrap_or_default();
                let text = format!("generation {generation} is taken back: {reason}");
                tracing::error!(event = "failing", generation, reason, "{text}");
            }
            Report::Shared(Generation(generation), share) => {
                let percent = f64::from(*share) / 10.0;
                let text = format!("generation {generation} gets {percent} % of the new connections");
                tracing::info!(event = "canary", generation, share, "{text}");
                self.say_state(wire::Phase::Canary, &text, None);
            }
            Report::Rolled(Generation(generation), ready, of) => {
                let text = format!("{ready} of {of} workers are of generation {generation}");
                tracing::info!(event = "batch", generation, ready, of, "{text}");
                self.say_state(wire::Phase::Retiring, &text, Some((u32::from(*ready), u32::from(*of))));
            }
            Report::SteeredBack(Generation(generation), took) => {
                self.say_state(wire::Phase::RollingBack, &words::failed(*generation), None);
                let us = u64::try_from(took.as_micros()).unwrap_or(u64::MAX);
                tracing::info!(
                    event = "steered_back",
                    generation,
                    us,
                    "no new connection goes to generation {generation} any more, {us} µs after its failure"
                );
            }
            Report::Switched(Generation(generation)) => {
                tracing::info!(
                    event = "switched",
                    generation,
                    "new connections go to generation {generation}"
                );
            }
            Report::Drained(Generation(generation)) => {
                tracing::info!(event = "drained", generation, "generation {generation} is gone");
            }
            _ => {}
        }
    }

    fn log_seats(&mut self, report: &Report) {
        match report {
            Report::Scaled(Generation(generation), workers) => {
                let text = format!("{workers} workers from now on, until the config changes");
                tracing::info!(event = "scaled", generation, workers, "{text}");
                self.upstream.status(&text);
            }
            Report::SeatReplaced(Generation(generation), seat) => {
                tracing::info!(
                    event = "seat_replaced",
                    generation,
                    seat = seat.0,
                    "another worker serves on seat {}",
                    seat.0
                );
            }
            _ => {}
        }
    }

    fn log_worker(&self, report: &Report) {
        match report {
            Report::WorkerExited { worker, how, asked } => {
                let ((generation, seat), pid, how) =
                    (self.place(*worker), self.pid(*worker), words::exit(*how));
                if *asked {
                    tracing::info!(
                        event = "worker_exited",
                        generation,
                        seat,
                        pid,
                        how,
                        asked,
                        "worker {pid} {how}"
                    );
                } else {
                    tracing::warn!(
                        event = "worker_exited",
                        generation,
                        seat,
                        pid,
                        how,
                        asked,
                        "worker {pid} {how}, unasked"
                    );
                }
            }
            Report::Respawning(generation, seat, pause) => {
                let (generation, seat) = (generation.0, seat.0);
                tracing::info!(
                    event = "respawning",
                    generation,
                    seat,
                    ?pause,
                    "seat {seat} is filled again in {pause:?}"
                );
            }
            // Nobody is there to be replaced; that nobody could be started has been said.
            Report::Replaced(_, Reason::SpawnFailed(..)) => {}
            Report::Replaced(worker, reason) => {
                let ((generation, seat), pid, reason) =
                    (self.place(*worker), self.pid(*worker), self.reason(*reason));
                tracing::warn!(
                    event = "replaced",
                    generation,
                    seat,
                    pid,
                    reason,
                    "worker {pid} is replaced: {reason}"
                );
            }
            Report::Killed(worker, open) => {
                let ((generation, seat), pid) = (self.place(*worker), self.pid(*worker));
                tracing::warn!(
                    event = "killed",
                    generation,
                    seat,
                    pid,
                    ?open,
                    "worker {pid} killed at its deadline (upgrade.drain_timeout)"
                );
            }
            _ => {}
        }
    }

    fn log_listener(&self, report: &Report) {
        match report {
            Report::LeftoversTaken(listener, count) => {
                tracing::info!(
                    event = "leftovers_taken",
                    listener = listener.0,
                    count,
                    "{count} waiting connections taken by a sibling"
                );
            }
            Report::LeftoversLost(listener, count) => {
                tracing::warn!(
                    event = "leftovers_lost",
                    listener = listener.0,
                    count,
                    "{count} waiting connections of an ended worker had no one to go to (net.ipv4.tcp_migrate_req=1 would move them)"
                );
            }
            Report::DatagramsLost(group, count) => {
                let name = self.groups.name(*group);
                tracing::warn!(
                    event = "datagrams_lost",
                    listener = name,
                    count,
                    "{count} datagrams waited for an ended worker of listener {name:?}: nobody can take them over"
                );
            }
            Report::SlotsUnsure(group) => {
                let name = self.groups.name(*group);
                tracing::warn!(
                    event = "slots_unsure",
                    listener = name,
                    "several sockets left the group of listener {name:?} unasked: which slot is whose is a guess until its present sockets have left"
                );
            }
            Report::SteerFailed(group, errno) => {
                let (name, error) = (self.groups.name(*group), words::errno(*errno));
                tracing::error!(
                    event = "steer_failed",
                    listener = name,
                    error,
                    "the kernel refused to steer listener {name:?}: {error}"
                );
            }
            Report::ListenerLost(listener) => {
                tracing::warn!(
                    event = "listener_lost",
                    listener = listener.0,
                    "a worker closed its listener without being asked"
                );
            }
            _ => {}
        }
    }

    /// STATUS for the service manager, progress for clients that wait.
    fn say_state(&mut self, phase: wire::Phase, text: &str, ready: Option<(u32, u32)>) {
        self.upstream.status(&format!("{phase}: {text}"));
        self.clients.progress(phase, text, ready);
    }

    fn entered(&mut self, generation: Generation, phase: Phase) {
        let n = generation.0;
        tracing::info!(event = "phase", generation = n, phase = %words::phase(phase), "generation {n}: {}", words::phase(phase));
        let view = self.core.status();
        // A batch is not all of it.
        let is_part = view.generations.iter().any(|view| {
            view.generation == generation && view.state == reuseportd_core::GenerationState::Canary
        });
        let text = match phase {
            Phase::Launching => format!("generation {n} starts"),
            Phase::Canary => return,
            Phase::Baking => format!("generation {n} serves, the old one stands by"),
            Phase::Steering if is_part => format!("generation {n} gets its part of the new connections"),
            Phase::Steering => format!("new connections go to generation {n}"),
            // The first generation has nobody to take over from.
            Phase::Retiring if view.generations.len() < 2 => return,
            Phase::Retiring if is_part => {
                format!("a batch of generation {n} serves, as many old workers leave")
            }
            Phase::Retiring => format!("generation {n} serves, the listeners of the old one leave"),
            Phase::RollingBack => words::failed(n),
            Phase::Draining => words::draining(Some(n)),
        };
        self.say_state(words::phase(phase), &text, None);
    }

    fn worker_ready(&mut self, worker: WorkerId) {
        let ((n, seat), pid) = (self.place(worker), self.pid(worker));
        tracing::info!(event = "worker_ready", generation = n, seat, pid, "worker {pid} is ready");
        let view = self.core.status();
        let Some(generation) = view.generations.iter().find(|view| view.generation.0 == n) else { return };
        if view.active == Some(generation.generation) {
            return;
        }
        let is_ready = |worker: &&reuseportd_core::WorkerView| {
            use reuseportd_core::WorkerState::{Joining, Ready, Serving};
            worker.state.is_some_and(|state| matches!(state, Ready | Joining { unproven: false } | Serving))
        };
        let ready = u32::try_from(generation.workers.iter().filter(is_ready).count()).unwrap_or(u32::MAX);
        let of = u32::try_from(generation.workers.len()).unwrap_or(u32::MAX);
        let text = format!("generation {n}: {ready} of {of} workers ready");
        self.say_state(wire::Phase::Launching, &text, Some((ready, of)));
    }

    fn ended(&mut self, receipt: &reuseportd_core::Receipt) {
        let Some((_, shown)) = self.receipts.iter().find(|(serial, _)| *serial == Some(receipt.serial))
        else {
            let generation = receipt.to.map_or(0, |generation| generation.0);
            self.upstream.status(&format!("generation {generation} serves"));
            return;
        };
        let (outcome, reason) = (shown.outcome, shown.reason.clone());
        let (from, to, ms) = (shown.from, shown.to, shown.duration_ms);
        let json = serde_json::to_string(shown).unwrap_or_default();
        let wish = match (receipt.trigger, receipt.from) {
            (reuseportd_core::Trigger::Takeover, _) => "takeover",
            (_, Some(_)) => "upgrade",
            (_, None) => "start",
        };
        let ended = format!("{wish} {}", outcome.as_str().replace('_', " "));
        match &reason {
            // The outcome is known since the listeners left; this is the end of the old workers.
            _ if receipt.is_final && receipt.phases.iter().any(|time| time.phase == Phase::Draining) => {
                tracing::info!(event = "receipt_final", from, to, receipt = json, "the receipt is final");
            }
            Some(reason) => {
                tracing::error!(event = "upgrade_ended", %outcome, from, to, reason, receipt = json, "{ended}: {reason}");
            }
            None => {
                tracing::info!(event = "upgrade_ended", %outcome, from, to, ms, receipt = json, "{ended}");
                // For those that wait for that end.
                let text = words::draining(to);
                self.clients.progress(wire::Phase::Draining, &text, None);
            }
        }
        let text = match (reason, to) {
            (Some(reason), _) => format!("{ended}: {reason}"),
            (None, Some(to)) => format!("generation {to} serves"),
            (None, None) => "serving".to_owned(),
        };
        self.upstream.status(&text);
    }
}
