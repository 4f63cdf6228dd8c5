//! What may be relied on here, for each kind of worker.

use reuseportd_core::Engine;
use serde::Serialize;

use super::facts::Facts;
use super::trials::{Orphan, Trial};

/// Connections lost, by what happens.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Guarantee {
    /// Kind of worker.
    pub(super) workers: &'static str,
    /// An upgrade, a failed one too.
    pub(super) upgrade: &'static str,
    /// A worker is SIGKILLed and others are alive.
    pub(super) worker_killed: &'static str,
    /// The last worker is SIGKILLed.
    pub(super) last_worker_killed: &'static str,
}

/// The word in config, status and here.
pub(super) fn word(engine: Engine) -> &'static str {
    match engine {
        Engine::Ebpf => "ebpf",
        Engine::Cbpf => "cbpf",
        Engine::None => "none",
    }
}

const HANDOVER: &str = "handover";
const UNMODIFIED: &str = "unmodified";
const MASTER: &str = "bind = \"master\"";
const WHAT_IT_HELD: &str = "0 beyond what it held";
const WAIT: &str = "0, clients wait";

/// Empty when the configured engine can't be had.
pub(super) fn guarantees(facts: &Facts) -> Vec<Guarantee> {
    let Ok((engine, _)) = &facts.engine else { return Vec::new() };
    let works = match engine {
        Engine::Ebpf => !matches!(facts.trials.steering, Trial::Failed(_)),
        Engine::Cbpf => !matches!(facts.trials.slot, Trial::Failed(_)),
        Engine::None => false,
    };
    let upgrade = if works { "0" } else { "none: nothing steers" };
    let reachable = !matches!(facts.rights.getfd, Trial::Failed(_));
    let (worker_killed, last_worker_killed) = match engine {
        Engine::Ebpf if !matches!(facts.trials.migration, Trial::Failed(_)) => (WHAT_IT_HELD, WAIT),
        Engine::Cbpf if facts.trials.orphan == Orphan::Moved => {
            (WHAT_IT_HELD, "clients wait; its queue is lost, and counted")
        }
        Engine::Ebpf | Engine::Cbpf | Engine::None => {
            ("its queue, counted", "clients wait; its queue is lost, and counted")
        }
    };
    let handover = match engine {
        Engine::Ebpf | Engine::Cbpf => (WHAT_IT_HELD, WAIT),
        Engine::None => ("its queue", "all until a respawn"),
    };
    let mut all = vec![Guarantee {
        workers: HANDOVER,
        upgrade,
        worker_killed: handover.0,
        last_worker_killed: handover.1,
    }];
    // Its sockets outlive every worker, and their slots are of the master's own making.
    let lasting =
        Guarantee { workers: MASTER, worker_killed: WHAT_IT_HELD, last_worker_killed: WAIT, ..all[0] };
    all.push(match (reachable, engine) {
        (false, _) => {
            let cannot = "can't be run here";
            Guarantee {
                workers: UNMODIFIED,
                upgrade: cannot,
                worker_killed: cannot,
                last_worker_killed: cannot,
            }
        }
        (true, Engine::None) => Guarantee { workers: UNMODIFIED, ..all[0] },
        (true, Engine::Ebpf | Engine::Cbpf) => {
            Guarantee { workers: UNMODIFIED, upgrade, worker_killed, last_worker_killed }
        }
    });
    all.push(lasting);
    all
}
