//! Workers that are killed: what they held in their hands is gone, what waited in their queues is not.

use std::time::Duration;

use reuseportd_bench::Spec;
use reuseportd_wire::status::{MasterState, Status, WorkerState};
use rustix::process::Signal;

use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::process::kill;
use crate::support::world::{Need, World, needs_of, world};
use crate::support::{PATIENCE, rounds};

/// Three quarters of what four workers can take, in bursts: about 20 wait in each queue. A worker answers in its accept
/// loop, so that it has one connection in its hands at most.
pub(crate) fn queues_of_twenty(world: &World) -> Spec {
    spec(world).rate(300.0).burst(100, Duration::from_millis(333))
}

pub(crate) fn one_at_a_time(world: &World, mode: &str, engine: &'static str) -> App {
    App::test_worker(world, &format!("--mode {mode} --accept-delay 5 --inline"))
        .engine(engine)
        .restart("breaker = { exits = 1000 }")
        .restart("stable_after = \"1ms\"")
}

/// The serving worker with the longest queue, and how long that is.
pub(crate) fn fullest(status: &Status) -> Option<(u32, u32)> {
    let workers = status.generations.iter().flat_map(|generation| &generation.workers);
    let serving = workers.filter(|worker| worker.state == WorkerState::Serving);
    let queue = |listeners: &[reuseportd_wire::status::WorkerListener]| {
        listeners.iter().filter_map(|listener| listener.accept_queue).sum::<u32>()
    };
    serving.filter_map(|worker| Some((worker.pid?, queue(&worker.listeners)))).max_by_key(|(_, queue)| *queue)
}

/// Kills the fullest worker again and again; gives how many connections waited in the queues of the killed.
pub(crate) fn kill_the_fullest(master: &Master, load: &Load, kills: u32) -> u32 {
    let mut waited = 0;
    for _ in 0..kills {
        let all_serve = |status: &Status| {
            let workers = status.generations.iter().flat_map(|generation| &generation.workers);
            workers.filter(|worker| worker.state == WorkerState::Serving).count() == 4
        };
        let status = master.wait_status("a long queue", |status| {
            all_serve(status) && fullest(status).is_some_and(|(_, queue)| queue >= 10)
        });
        let (pid, queue) = fullest(&status).expect("just seen");
        kill([pid]);
        waited += queue;
        load.answered(240); // at 600 a second: 400 ms
    }
    waited
}

fn kills_cost_what_the_killed_held(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let master = Master::start(world, &one_at_a_time(world, mode, engine));
        let load = Load::start(queues_of_twenty(world));
        let kills = rounds(6, 20);
        let waited = kill_the_fullest(&master, &load, kills);
        let report = load.end();
        assert!(waited >= 10 * kills, "queues were short: {waited}");
        assert!(
            report.lost() <= u64::from(kills),
            "{kills} kills, {waited} waited: {report}\n{}",
            master.log()
        );
        let status = master.wait_status("steady", |status| status.state == MasterState::Steady);
        let restarts: u32 = status.generations[0].workers.iter().map(|worker| worker.restarts).sum();
        assert_eq!(restarts, kills, "{status:#?}");
        master.stop();

        let control = Master::start(world, &one_at_a_time(world, "naive", "none"));
        let load = Load::start(queues_of_twenty(world));
        let waited = kill_the_fullest(&control, &load, 2);
        let report = load.end();
        assert!(report.lost() > 2, "the load shows nothing: {waited} waited, {report}");
        control.stop();
    });
}

#[test]
fn killed_workers_unmodified_ebpf() {
    kills_cost_what_the_killed_held("ebpf", "plain");
}

#[test]
fn killed_workers_sdk_ebpf() {
    kills_cost_what_the_killed_held("ebpf", "sdk");
}

#[test]
fn killed_workers_sdk_cbpf() {
    kills_cost_what_the_killed_held("cbpf", "sdk");
}

/// Nobody is there for a while: clients wait. Two kills; the connections lost, and how many of them were counted.
pub(crate) fn only_worker_killed(world: &World, mode: &str, engine: &'static str) -> (u64, u64) {
    let app = one_at_a_time(world, mode, engine).workers(1).restart("backoff = \"300ms\"");
    let master = Master::start(world, &app);
    let load = Load::start(spec(world).rate(100.0).burst(10, Duration::from_millis(300)));
    for _ in 0..2 {
        let waits = |status: &Status| fullest(status).is_some_and(|(_, queue)| queue >= 3);
        let status = master.wait_status("a queue", waits);
        kill([fullest(&status).expect("just seen").0]);
        load.answered(60);
    }
    let report = load.end();
    let counted = master.counted_losses();
    master.stop();
    eprintln!("{mode} {engine}, the only worker killed twice, {counted} counted: {report}");
    (report.lost(), counted)
}

#[test]
fn the_only_worker_is_killed_and_clients_wait() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (mode, engine) in [("sdk", "ebpf"), ("sdk", "cbpf"), ("plain", "ebpf")] {
            let (lost, _) = only_worker_killed(world, mode, engine);
            assert!(lost <= 2, "{mode} {engine}: {lost} lost");
        }
    });
}

#[test]
fn a_crash_loop_opens_the_breaker_and_is_said() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain")
            .workers(1)
            .restart("breaker = { exits = 3, window = \"1m\", cooldown = \"1m\" }")
            .restart("backoff = \"1ms\"");
        let master = Master::start(world, &app);
        for exits in 1..=3 {
            let status = master.wait_status("serving", |status| {
                fullest(status).is_some_and(|_| status.generations[0].workers[0].restarts == exits - 1)
            });
            kill([fullest(&status).expect("just seen").0]);
        }
        let status = master.wait_status("degraded", |status| status.state == MasterState::Degraded);
        assert!(status.state_reason.is_some(), "{status:#?}");
        let told = master.upstream.told().join("\n");
        assert!(told.contains("STATUS=") && told.contains("degraded"), "{told}");
        // A new program is the way out.
        master.upgrade();
        assert_eq!(master.status().state, MasterState::Steady);
        master.stop();
    });
}

#[test]
fn a_respawn_runs_the_pinned_program() {
    world(&[], |world| {
        let program = world.path("program");
        std::fs::copy(crate::support::world::example("test_worker"), &program).unwrap();
        let app = App::new(world, [program.to_str().unwrap(), "--mode", "plain"]).workers(1);
        let master = Master::start(world, &app);
        let before = master.status();
        // As a deployment would: another file under the same name, which can't even run.
        std::fs::remove_file(&program).unwrap();
        std::fs::write(&program, "not a program").unwrap();
        kill([before.generations[0].workers[0].pid.unwrap()]);
        let after = master.wait_status("serving again", |status| {
            fullest(status).is_some_and(|_| status.generations[0].workers[0].restarts == 1)
        });
        assert_eq!(after.generations[0].executable, before.generations[0].executable);
        assert!(after.generations[0].executable.pinned);
        master.stop();
    });
}

/// The data plane does not need the master.
fn master_killed(world: &World, mode: &str, engine: &'static str) -> u64 {
    let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
    let mut master = Master::start(world, &app);
    let load = Load::start(queues_of_twenty(world));
    let workers = master.serving();
    master.kill();
    load.answered(600);
    let report = load.end();
    let left: Vec<u32> =
        crate::support::process::processes_of(&world.app).iter().map(|one| one.pid).collect();
    assert_eq!(left.len(), workers.len(), "a worker went with the master: {workers:?} {left:?}");
    report.lost()
}

#[test]
fn workers_go_on_when_the_master_is_killed() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (mode, engine) in [("sdk", "ebpf"), ("sdk", "cbpf"), ("plain", "ebpf"), ("plain", "cbpf")] {
            assert_eq!(master_killed(world, mode, engine), 0, "{mode} {engine}");
        }
    });
}

#[test]
fn a_stopped_worker_outlives_no_drain_timeout() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain").workers(1).upgrade("drain_timeout = \"300ms\"");
        let master = Master::start(world, &app);
        let pid = master.serving()[0];
        crate::support::process::signal(pid, Signal::STOP);
        let receipt = master.upgrade();
        assert_eq!(receipt.forced_kills, 1, "{receipt:#?}");
        crate::support::process::wait_gone(pid, PATIENCE);
        master.stop();
    });
}
