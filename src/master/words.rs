//! The core's facts in words: for receipts, the log, systemd's STATUS and progress lines.

use reuseportd_core as core;
use reuseportd_core::{CheckFailure, Exit, Problem, Reason, WorkerId};
use reuseportd_wire::status as wire;

use super::{Shell, clock};

/// Why a wish can't be carried out now.
fn refusal(reason: Reason) -> String {
    match reason {
        Reason::TooLate => {
                "too late to take it back: the old workers have begun to leave; ask again to bring them back by an \
                 upgrade".to_owned()
            }
        Reason::Busy => "an upgrade is under way, which replaces all workers: wait for its end".to_owned(),
        Reason::NoSuchSeat(seat, seats) => {
                format!("there is no seat {}: the seats are 0 to {}", seat.0, seats.saturating_sub(1))
            }
        Reason::Overtaken => "something later took its place: another number of workers, or another config".to_owned(),
        _ => String::new(),
    }
}

/// A generation is taken back.
pub(super) fn failed(generation: u32) -> String {
    format!("generation {generation} failed, the old one serves on")
}

/// The end of an upgrade, but for the old workers' open connections.
pub(super) fn draining(generation: Option<u32>) -> String {
    format!("generation {} serves, the old one finishes its connections", generation.unwrap_or(0))
}

/// How a process ended.
pub(super) fn exit(how: Exit) -> String {
    match how {
        Exit::Code(code) => format!("exited with status {code}"),
        Exit::Signal(number) => match nix::sys::signal::Signal::try_from(number) {
            Ok(signal) => format!("was killed by {signal}"),
            Err(_) => format!("was killed by signal {number}"),
        },
        Exit::Unknown => "ended, how is not known".to_owned(),
    }
}

/// The kernel's words for an error number.
pub(super) fn errno(number: i32) -> String {
    std::io::Error::from_raw_os_error(number).to_string()
}

impl Shell {
    /// Why an upgrade failed, said so that the operator knows what to do.
    pub(super) fn reason(&self, reason: Reason) -> String {
        match reason {
            Reason::SpawnFailed(seat, _, number) => {
                let detail = self.spawn_error.clone().unwrap_or_else(|| errno(number));
                format!("worker of seat {} could not be started: {detail}", seat.0)
            }
            Reason::Exited(_, worker, how) => {
                format!(
                    "{} {} before its generation served{}",
                    self.who(worker),
                    exit(how),
                    self.evidence(worker)
                )
            }
            Reason::NotReady(_, worker, problem) => {
                let wanted = match problem {
                    None => ": it did not send READY=1, nor `ready` on its channel".to_owned(),
                    Some(_) if self.has_detail(worker) => String::new(),
                    Some(problem) => format!(": {}", self.problem(problem)),
                };
                let text = format!("{} was not ready in time (upgrade.ready_timeout)", self.who(worker));
                format!("{text}{wanted}{}", self.evidence(worker))
            }
            Reason::WrongListeners(_, worker, problem) => {
                let text = format!("{} has the wrong listeners", self.who(worker));
                let detail = if self.has_detail(worker) {
                    String::new()
                } else {
                    format!(": {}", self.problem(problem))
                };
                format!("{text}{detail}{}", self.evidence(worker))
            }
            Reason::BindFailed(seat, group, number) => {
                let address =
                    self.groups.of(group).map_or_else(String::new, |group| group.address.to_string());
                format!("the socket of seat {} could not be bound to {address}: {}", seat.0, errno(number))
            }
            Reason::ListenFailed(_, worker, number) => {
                format!("listen() failed on a socket of {}: {}", self.who(worker), errno(number))
            }
            Reason::SteerFailed(group, number) => {
                let name = self.groups.name(group);
                format!(
                    "the kernel refused to steer listener {name:?}: {}; nothing was switched",
                    errno(number)
                )
            }
            Reason::Stuck(_, worker) => {
                format!("{} gave no sign of life (watchdog.timeout)", self.who(worker))
            }
            Reason::Crashed(..) | Reason::CheckFailed(_) | Reason::QueueGrows(_) | Reason::TakenBack => {
                self.verdict(reason)
            }
            Reason::TooLate | Reason::Busy | Reason::NoSuchSeat(..) | Reason::Overtaken => refusal(reason),
            Reason::Stopped => "the master is stopping".to_owned(),
        }
    }

    /// Why a generation on trial is taken back.
    fn verdict(&self, reason: Reason) -> String {
        match reason {
            Reason::Crashed(_, worker, how) => {
                format!("{} {} while it was on trial{}", self.who(worker), exit(how), self.evidence(worker))
            }
            Reason::CheckFailed(failure) => {
                let how = match failure {
                    CheckFailure::Ended(how) => exit(how),
                    CheckFailure::NotStarted(_) => "could not be started".to_owned(),
                    CheckFailure::Late => "took too long".to_owned(),
                };
                format!("the check (upgrade.check) {how}{}", self.check_evidence())
            }
            Reason::QueueGrows(group) => {
                let name = self.groups.name(group);
                format!(
                    "connections to listener {name:?} wait longer for the new workers than for the old ones: their accept \
                     queues grew beyond those of the old ones for a second"
                )
            }
            Reason::TakenBack => "it was taken back (`reuseportd rollback`)".to_owned(),
            _ => String::new(),
        }
    }

    fn who(&self, worker: WorkerId) -> String {
        match self.processes.get(&worker) {
            Some(process) => format!(
                "worker of seat {} (generation {}, pid {})",
                process.seat.0, process.generation.0, process.pid
            ),
            None => "a worker".to_owned(),
        }
    }

    fn has_detail(&self, worker: WorkerId) -> bool {
        self.processes.get(&worker).is_some_and(|process| process.detail.is_some())
    }

    /// What is known about a worker's trouble: what was found out about it, and its last words.
    fn evidence(&self, worker: WorkerId) -> String {
        let Some(process) = self.processes.get(&worker) else { return String::new() };
        let mut text = String::new();
        if let Some(detail) = &process.detail {
            text.push_str(": ");
            text.push_str(detail);
        }
        if let Some(lines) = process.last_lines.join() {
            text.push_str("; its last output: ");
            text.push_str(&lines);
        }
        text
    }

    fn problem(&self, problem: Problem) -> String {
        let address =
            |group| self.groups.of(group).map_or_else(String::new, |group| group.address.to_string());
        match problem {
            Problem::NotListening(group) => format!("it does not listen on {}", address(group)),
            Problem::WrongAddress(group) => format!("it listens elsewhere than on {}", address(group)),
            Problem::NoReuseport(group) => format!("its listener on {} lacks SO_REUSEPORT", address(group)),
            Problem::NotHealthy => "it does not answer the readiness request with 2xx".to_owned(),
            Problem::NotAccepting => "it listens, but accepts no connection".to_owned(),
            Problem::NotPermitted(group) => format!("its listener on {} can't be reached", address(group)),
            Problem::Failed(number) => format!("they could not be looked for: {}", errno(number)),
        }
    }

    /// A receipt as it is shown and sent.
    pub(super) fn receipt(&self, receipt: &core::Receipt, reason: Option<String>) -> wire::Receipt {
        let listeners = receipt.listeners.iter().map(|listener| wire::ReceiptListener {
            name: self.groups.name(listener.group).to_owned(),
            queued_at_switch: listener.queued_at_switch,
            half_open_at_switch: listener.half_open_at_switch,
            half_open_abandoned: Some(listener.half_open_abandoned),
            migrated: listener.migrated.map(narrow),
            migrate_failures: listener.migrate_failures.map(narrow),
            listen_drops: listener.listen_drops,
            leftovers_taken: Some(listener.leftovers_taken),
            leftovers_lost: Some(listener.leftovers_lost),
        });
        wire::Receipt {
            from: receipt.from.map(|generation| generation.0),
            to: receipt.to.map(|generation| generation.0),
            trigger: trigger(receipt.trigger),
            outcome: match receipt.outcome {
                core::Outcome::Completed => wire::Outcome::Completed,
                core::Outcome::RolledBack => wire::Outcome::RolledBack,
                core::Outcome::Refused => wire::Outcome::Refused,
            },
            reason,
            started_at: clock::wall(receipt.started),
            duration_ms: millis(receipt.took),
            phases: receipt
                .phases
                .iter()
                .map(|time| wire::PhaseTime { phase: phase(time.phase), ms: millis(time.took) })
                .collect(),
            listeners: listeners.collect(),
            forced_kills: receipt.forced_kills,
            connections_cut: receipt.connections_cut,
            superseded_by: None,
            steer_back_us: receipt.steer_back.map(|took| u64::try_from(took.as_micros()).unwrap_or(u64::MAX)),
            checks_passed: receipt.checks,
        }
    }
}

fn narrow(count: u64) -> u32 {
    u32::try_from(count).unwrap_or(u32::MAX)
}

fn millis(time: std::time::Duration) -> u64 {
    u64::try_from(time.as_millis()).unwrap_or(u64::MAX)
}

/// Who asked, in the words of the receipt.
pub(super) fn trigger(trigger: core::Trigger) -> wire::Trigger {
    match trigger {
        core::Trigger::Start => wire::Trigger::Start,
        core::Trigger::Signal => wire::Trigger::Signal,
        core::Trigger::Command => wire::Trigger::Command,
        core::Trigger::Rollback => wire::Trigger::Rollback,
        core::Trigger::Orphans => wire::Trigger::Orphans,
        core::Trigger::Takeover => wire::Trigger::Takeover,
    }
}

/// A phase, in the words of the receipt.
pub(super) fn phase(phase: core::Phase) -> wire::Phase {
    match phase {
        core::Phase::Launching => wire::Phase::Launching,
        core::Phase::Canary => wire::Phase::Canary,
        core::Phase::Steering => wire::Phase::Switch,
        core::Phase::Baking => wire::Phase::Baking,
        core::Phase::Retiring => wire::Phase::Retiring,
        core::Phase::RollingBack => wire::Phase::RollingBack,
        core::Phase::Draining => wire::Phase::Draining,
    }
}
