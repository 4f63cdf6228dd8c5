//! The engine, and what the self-tests of both engines say.

use reuseportd_core::Engine;

use crate::config::EngineChoice;
use crate::doctor::facts::Facts;
use crate::doctor::finding::{Finding, Level};
use crate::doctor::trials::{ALLOW_BPF, Obstacle, Trial};
use crate::doctor::verdict;

pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let trials = &facts.trials;
    let mut findings = vec![
        trial(facts, Engine::Ebpf, "ebpf.steering", &trials.steering, STEERING),
        trial(facts, Engine::Ebpf, "ebpf.migration", &trials.migration, MIGRATION),
        wake_up(&trials.wake_up),
        trial(facts, Engine::Cbpf, "cbpf.slot", &trials.slot, SLOT),
        trial(facts, Engine::Cbpf, "cbpf.order", &trials.order, ORDER),
    ];
    findings.push(engine(facts));
    findings
}

/// What a self-test shows when it passes, and what is lost when it doesn't.
type Meaning = (&'static str, &'static str);
const STEERING: Meaning = (
    "tried: only the admitted listener is chosen, and one write changes which",
    "the ebpf engine: connections would reach workers that are not ready, or retired",
);
const MIGRATION: Meaning = (
    "tried: the queue of a closing listener goes where the program says",
    "the ebpf engine's second half: what waits in the queue of a killed worker is reset",
);
const SLOT: Meaning = (
    "tried: a classic program chooses the slot it names",
    "the cbpf engine: connections would reach workers that are not ready, or retired",
);
const ORDER: Meaning = (
    "tried: the kernel lists a group in the order of listen()",
    "the cbpf engine for unmodified workers: their slots can't be told",
);

fn trial(facts: &Facts, of: Engine, check: &'static str, trial: &Trial, meaning: Meaning) -> Finding {
    let is_in_force = matches!(&facts.engine, Ok((engine, _)) if *engine == of);
    let other = match of {
        Engine::Ebpf => "cbpf",
        Engine::Cbpf | Engine::None => "ebpf",
    };
    match trial {
        Trial::Passed => Finding::ok(check, meaning.0),
        Trial::Failed(why) => {
            let level = if is_in_force { Level::Problem } else { Level::Note };
            let remedy = format!("update the kernel; until then: steering.engine = {other:?} in the config");
            Finding::bad(level, check, format!("tried and failed: {why}"), meaning.1, remedy)
        }
        Trial::Untested(obstacle) => {
            untested(if is_in_force { Level::Warning } else { Level::Note }, check, obstacle)
        }
    }
}

fn untested(level: Level, check: &'static str, obstacle: &Obstacle) -> Finding {
    Finding::bad(level, check, format!("not tested: {}", obstacle.why), "certainty", obstacle.remedy)
}

/// Queues move under `ebpf` and under `tcp_migrate_req`, and so does this fault.
fn wake_up(trial: &Trial) -> Finding {
    const CHECK: &str = "kernel.wake_up";
    match trial {
        Trial::Passed => {
            Finding::ok(CHECK, "tried: who waits at the listener a connection moves to is woken")
        }
        Trial::Failed(why) => Finding::bad(
            Level::Warning,
            CHECK,
            format!("tried and failed: {why} (CVE-2026-46015)"),
            "time: a connection moved from a killed worker stays unseen until the next one arrives",
            "install a kernel with upstream commit 3864c6ba1e04 (in stable kernels since the end of May 2026)",
        ),
        Trial::Untested(obstacle) => untested(Level::Note, CHECK, obstacle),
    }
}

fn engine(facts: &Facts) -> Finding {
    const CHECK: &str = "engine";
    let (engine, reason) = match &facts.engine {
        Ok((engine, reason)) => (*engine, reason),
        Err(why) => {
            let remedy = "steering.engine = \"auto\" in the config, or give reuseportd CAP_BPF";
            return Finding::bad(
                Level::Problem,
                CHECK,
                why.clone(),
                "the service: the master will not start",
                remedy,
            );
        }
    };
    let found = format!("{}: {reason}", verdict::word(engine));
    match (engine, facts.needs.engine) {
        (Engine::None, _) => Finding::bad(
            Level::Problem,
            CHECK,
            found,
            "connections, in every upgrade: nothing steers",
            "steering.engine = \"auto\" in the config",
        ),
        (Engine::Cbpf, EngineChoice::Auto) if facts.rights.bpf => Finding::bad(
            Level::Warning,
            CHECK,
            found,
            "the ebpf engine, although CAP_BPF is there",
            ALLOW_BPF,
        ),
        // That CAP_BPF is missing is a finding of its own.
        (Engine::Ebpf | Engine::Cbpf, _) => Finding::ok(CHECK, found),
    }
}
