//! What takes a generation on trial back, each under load: the client is told why, and the old workers serve on.

use std::fs;
use std::time::Duration;

use reuseportd_wire::status::{MasterState, Outcome, Phase, Receipt};
use rustix::process::Signal;

use super::{pids_of, steps};
use crate::crash::{kill_the_fullest, one_at_a_time, queues_of_twenty};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::gate::{self, Gate};
use crate::support::load::Load;
use crate::support::master::Master;
use crate::support::process::signal;
use crate::support::rounds;
use crate::support::world::{World, needs_of, world};

/// The bound of the contract, from the failure to the kernel's confirmation.
const STEER_BACK_US: u64 = 1000;
/// "So long as nobody ends it."
const HOLD: Duration = Duration::from_secs(600);

/// What one abort is done to.
struct Trial<'a> {
    gate: &'a Gate,
    /// The check's program, which waits for the gate.
    check: std::path::PathBuf,
    /// The new generation's workers.
    pids: Vec<u32>,
}

/// One way to fail.
struct Abort {
    sort: &'static str,
    phase: MasterState,
    /// How long the phase goes well first.
    after: Duration,
    cause: fn(&Trial<'_>),
    names: &'static [&'static str],
    /// Connections in the hands of workers that are killed.
    in_hands: u64,
}

const LAST_WORDS: &str = "cannot-open-the-database";
const CRASH: Abort = Abort {
    sort: "crash",
    phase: MasterState::Canary,
    after: Duration::ZERO,
    cause: |trial| signal(trial.pids[1], Signal::KILL),
    names: &["seat 1", "generation", "was killed by SIGKILL", "on trial", LAST_WORDS],
    in_hands: 1,
};

const ABORTS: &[Abort] = &[
    CRASH,
    Abort {
        sort: "crash two seconds into the bake",
        phase: MasterState::Baking,
        after: Duration::from_secs(2),
        ..CRASH
    },
    Abort {
        sort: "silence in the bake",
        phase: MasterState::Baking,
        cause: |trial| signal(trial.pids[1], Signal::STOP),
        names: &["seat 1", "gave no sign of life (watchdog.timeout)"],
        ..CRASH
    },
    Abort {
        sort: "failing check",
        cause: |trial| trial.gate.answer(1, 7),
        names: &["the check (upgrade.check) exited with status 7", gate::LAST_WORDS],
        in_hands: 0,
        ..CRASH
    },
    Abort {
        sort: "failing check in the bake",
        phase: MasterState::Baking,
        cause: |trial| trial.gate.answer(1, 8),
        names: &["the check (upgrade.check) exited with status 8", gate::LAST_WORDS],
        in_hands: 0,
        ..CRASH
    },
    Abort {
        sort: "check that is gone",
        cause: |trial| {
            fs::remove_file(&trial.check).unwrap();
            trial.gate.answer(1, 0);
        },
        names: &["the check (upgrade.check) could not be started", "check-program", "No such file"],
        in_hands: 0,
        ..CRASH
    },
];

/// The app with this trial ahead.
fn on_trial(app: &App, phase: MasterState) -> App {
    match phase {
        MasterState::Canary => app.clone().upgrade(steps(&["{ share = \"50%\", hold = \"10m\" }"])),
        _ => app.clone().upgrade("bake = \"10m\""),
    }
}

fn suffer(world: &World, master: &Master, load: &Load, gate: &Gate, app: &App, abort: &Abort) -> Receipt {
    let check = world.path("check-program");
    fs::copy(gate.script(), &check).unwrap();
    on_trial(app, abort.phase).upgrade(format!("check = [{check:?}]")).write();
    let (before, runs) = (master.serving(), gate.runs().len());
    let upgrade = master.begin("upgrade --wait --json");
    let status = master.wait_status("on trial for so long", |status| {
        let held = status.hold_ms.map(|left| HOLD.saturating_sub(Duration::from_millis(left)));
        status.state == abort.phase && held.is_some_and(|held| held >= abort.after)
    });
    gate.begun(master, runs + 1);
    let to = status.generations.last().unwrap().generation;
    load.heard_from(to);
    (abort.cause)(&Trial { gate, check, pids: pids_of(&status, to) });
    let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
    let told = format!("{}: {receipt:#?}", abort.sort);
    assert_eq!((code, receipt.outcome, receipt.to), (1, Outcome::RolledBack, Some(to)), "{told}");
    let reason = receipt.reason.as_deref().unwrap_or_default();
    for name in abort.names {
        assert!(reason.contains(name), "{name:?} is not in the reason of {told}");
    }
    let phase = if abort.phase == MasterState::Canary { Phase::Canary } else { Phase::Baking };
    assert!(receipt.phases.iter().any(|time| time.phase == phase), "{told}");
    assert!(receipt.steer_back_us.is_some(), "{told}");
    let after = master.status();
    assert_eq!((after.active_generation, after.state), (receipt.from, MasterState::Steady), "{told}");
    assert_eq!(master.serving(), before, "the old generation has been touched: {told}");
    receipt
}

/// All of them, one after the other.
fn aborts(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let gate = Gate::new(world);
        let mut app = one_at_a_time(world, mode, engine).watchdog("3s").upgrade("check_interval = \"1s\"");
        app.command = test_worker(&format!("--mode {mode} --accept-delay 5 --inline --print {LAST_WORDS}"));
        let master = Master::start(world, &app);
        let load = Load::start(queues_of_twenty(world));
        let mut in_hands = 0;
        for abort in ABORTS {
            suffer(world, &master, &load, &gate, &app, abort);
            in_hands += abort.in_hands;
            load.answered(100);
        }
        let report = load.end();
        let counted = master.counted_losses();
        eprintln!("{mode} {engine}: {} lost, {in_hands} in hands, {counted} counted", report.lost());
        assert!(counted == 0 || (engine, mode) == ("cbpf", "plain"), "{counted} counted\n{}", master.log());
        assert!(report.lost() <= in_hands + counted, "{report}\n{}", master.log());
        master.stop();
    });
}

#[test]
fn aborts_sdk_ebpf() {
    aborts("ebpf", "sdk");
}

#[test]
fn aborts_sdk_cbpf() {
    aborts("cbpf", "sdk");
}

#[test]
fn aborts_unmodified_ebpf() {
    aborts("ebpf", "plain");
}

#[test]
fn aborts_unmodified_cbpf() {
    aborts("cbpf", "plain");
}

/// What the same load shows when a worker is killed and nobody takes its queue.
#[test]
fn the_load_shows_a_killed_workers_queue() {
    world(&[], |world| {
        let master = Master::start(world, &one_at_a_time(world, "naive", "none"));
        let load = Load::start(queues_of_twenty(world));
        kill_the_fullest(&master, &load, 2);
        let report = load.end();
        assert!(report.lost() > 2, "{report}");
        master.stop();
    });
}

/// The program's own clock, from the news of the crash to the kernel's confirmation. The scheduler may hold the program up
/// in between, which says nothing about it: so the best of a few is what counts, and all are shown.
fn steered_back_in_a_millisecond(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let gate = Gate::new(world);
        let app = one_at_a_time(world, mode, engine);
        let master = Master::start(world, &app);
        let load = Load::start(queues_of_twenty(world));
        let crash = Abort { phase: MasterState::Baking, names: &["SIGKILL"], ..CRASH };
        let took: Vec<u64> = (0..rounds(3, 10))
            .map(|_| {
                load.answered(50);
                suffer(world, &master, &load, &gate, &app, &crash).steer_back_us.expect("just checked")
            })
            .collect();
        eprintln!("{mode} {engine}: steered back after {took:?} us");
        assert!(took.iter().any(|us| *us <= STEER_BACK_US), "{took:?}\n{}", master.log());
        load.end();
        master.stop();
    });
}

#[test]
fn steered_back_in_a_millisecond_ebpf() {
    steered_back_in_a_millisecond("ebpf", "sdk");
}

#[test]
fn steered_back_in_a_millisecond_cbpf() {
    steered_back_in_a_millisecond("cbpf", "plain");
}

/// It has 30 seconds.
#[test]
fn a_check_that_does_not_end_fails() {
    world(&[], |world| {
        let gate = Gate::new(world);
        let app = gate.guards(App::test_worker(world, "--mode sdk"), "1s");
        let master = Master::start(world, &on_trial(&app, MasterState::Canary));
        let done = master.begin("upgrade --wait --json");
        let run = gate.begun(&master, 1);
        let (code, receipt) = master.receipt(done.finish(2 * PATIENCE));
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        let reason = receipt.reason.clone().unwrap();
        assert!(reason.contains("took too long") && reason.contains(gate::LAST_WORDS), "{reason}");
        assert!(receipt.duration_ms >= 30_000, "{receipt:#?}");
        crate::support::process::wait_gone(run.number("PID"), PATIENCE);
        master.stop();
    });
}
