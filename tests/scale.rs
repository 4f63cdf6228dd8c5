//! More workers and fewer, while the service runs: nobody notices.

use std::fs;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Duration;

use reuseportd_bench::Spec;
use reuseportd_wire::status::{MasterState, Scaled, Status, WorkerState};
use rustix::process::Signal;

use crate::crash::fullest;
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::process::kill;
use crate::support::watch::{always_served, seats, watched};
use crate::support::world::{World, needs_of, world};
use crate::support::{PATIENCE, client};

/// Workers the config says.
const CONFIGURED: u32 = 2;

fn two(world: &World, options: &str) -> App {
    App::test_worker(world, options).workers(CONFIGURED).upgrade("stop_when = \"drained\"")
}

const SLOW: &str = "--accept-delay 3";

/// What a single such worker can just take, in bursts: 250 wait at a time.
fn nearly_too_much(world: &World) -> Spec {
    spec(world).rate(10.0).burst(250, Duration::from_secs(1)).slow(10)
}

/// Waits for the next burst, which fills all queues.
fn wait_full(master: &Master) {
    master.wait_status("a long queue", |status| fullest(status).is_some_and(|(_, queue)| queue >= 10));
}

fn scale(master: &Master, workers: u32) {
    let done = master.cli(&format!("scale {workers} --wait"));
    assert_eq!((done.code, done.stdout), (0, format!("scaled to {workers}\n")), "{}", master.log());
}

/// Demands that so many serve, that the status says which number is not the config's, and gives who they are.
fn demand(status: &Status, workers: u32) -> Vec<(u32, u32)> {
    let scaled = Scaled { workers, configured: CONFIGURED };
    assert_eq!(status.scaled, (workers != CONFIGURED).then_some(scaled), "{status:#?}");
    let serving = seats(status, status.active_generation.unwrap());
    assert!(serving.iter().map(|(seat, _)| *seat).eq(0..workers), "not {workers} serve: {status:#?}");
    serving
}

/// Waits for that, and for the end of whatever is under way.
fn wait_scaled(master: &Master, workers: u32) -> Vec<(u32, u32)> {
    let are_there = |status: &Status| {
        status.active_generation.is_some_and(|active| seats(status, active).len() == workers as usize)
            && status.state == MasterState::Steady
    };
    demand(&master.wait_status(&format!("{workers} workers"), are_there), workers)
}

fn scales_without_loss(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = two(world, &format!("--mode {mode} {SLOW}")).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(nearly_too_much(world));
        let mut before = demand(&master.status(), CONFIGURED);
        let mut ever = before.len();
        for workers in [16, 1, 4] {
            wait_full(&master);
            let ((), seen) = watched(&master, || scale(&master, workers));
            let present = demand(&master.status(), workers);
            let kept = before.len().min(present.len());
            assert_eq!(present[..kept], before[..kept], "the highest seats come and go");
            always_served(&seen, kept);
            ever += present.len() - kept;
            before = present;
            load.answered(300);
        }
        let report = load.end();
        assert_eq!(report.lost(), 0, "{report}\n{}", master.log());
        assert_eq!(report.pids.len(), ever, "every worker has its part: {report}");
        assert_eq!(report.generations.len(), 1, "{report}");
        master.stop();
    });
}

#[test]
fn without_loss_sdk_ebpf() {
    scales_without_loss("ebpf", "sdk");
}

#[test]
fn without_loss_sdk_cbpf() {
    scales_without_loss("cbpf", "sdk");
}

#[test]
fn without_loss_unmodified_ebpf() {
    scales_without_loss("ebpf", "plain");
}

#[test]
fn without_loss_unmodified_cbpf() {
    scales_without_loss("cbpf", "plain");
}

#[test]
fn without_loss_with_sockets_of_the_master_ebpf() {
    scales_without_loss("ebpf", "activated");
}

#[test]
fn without_loss_with_sockets_of_the_master_cbpf() {
    scales_without_loss("cbpf", "activated");
}

#[test]
fn the_same_load_shows_losses() {
    world(&[], |world| {
        let app = two(world, &format!("--mode naive {SLOW}")).engine("none");
        let app = app.upgrade("drain_timeout = \"1s\"").upgrade("settle_timeout = \"100ms\"");
        let master = Master::start(world, &app);
        let load = Load::start(nearly_too_much(world));
        for workers in [4, 1] {
            wait_full(&master);
            scale(&master, workers);
        }
        load.answered(50);
        let report = load.end();
        assert!(
            report.lost() > 0,
            "the load shows nothing, the naive control loses nothing either: {report}"
        );
        master.stop();
    });
}

/// What the worker on this seat is told of the number of workers.
fn told_number(serving: &[(u32, u32)], seat: usize) -> String {
    let environment = fs::read_to_string(format!("/proc/{}/environ", serving[seat].1)).unwrap();
    let number = environment.split('\0').find_map(|one| one.strip_prefix("REUSEPORTD_WORKERS="));
    number.expect("every worker is told").to_owned()
}

fn overview(master: &Master) -> String {
    let done = master.cli("status");
    assert_eq!(done.code, 0, "{done:#?}");
    done.stdout
}

/// Kills the worker of a seat, and waits until there are as many as before.
fn kill_and_wait(master: &Master, workers: u32, seat: usize) -> Vec<(u32, u32)> {
    let (_, killed) = demand(&master.status(), workers)[seat];
    kill([killed]);
    let is_other = |status: &Status| {
        let serving = seats(status, status.active_generation.unwrap());
        serving.len() == workers as usize && serving.iter().all(|(_, pid)| *pid != killed)
    };
    demand(&master.wait_status("filled again", is_other), workers)
}

#[test]
fn the_number_lasts_until_the_config_changes() {
    world(&[], |world| {
        let app = two(world, "--mode sdk").restart("breaker = { exits = 1000 }");
        let mut master = Master::start(world, &app);
        assert!(!overview(&master).contains("scaled"), "{}", overview(&master));
        scale(&master, 3);
        let serving = demand(&master.status(), 3);
        assert_eq!([0, 2].map(|seat| told_number(&serving, seat)), ["2", "3"], "who came when");
        assert!(overview(&master).contains("scaled to 3 (config: 2)"), "{}", overview(&master));

        assert_eq!(told_number(&kill_and_wait(&master, 3, 0), 0), "3");
        assert_eq!(master.cli("reexec").code, 0);
        kill_and_wait(&master, 3, 2);
        master.kill();
        master.restart();
        demand(&master.wait_adopted(), 3);
        kill_and_wait(&master, 3, 1);

        master.upgrade();
        let serving = demand(&master.status(), 3);
        assert_eq!([0, 1, 2].map(|seat| told_number(&serving, seat)), ["3"; 3]);

        // Any key will do; and one that fails changes nothing.
        let mut failing = app.clone();
        failing.command = test_worker("--mode sdk --fail exit-before-ready");
        failing.write();
        assert_eq!(master.failing_upgrade().0, 1);
        assert_eq!(demand(&master.status(), 3), serving);
        assert!(overview(&master).contains("scaled to 3 (config: 2)"), "{}", overview(&master));
        app.restart("backoff = \"1s\"").write();
        master.upgrade();
        let serving = demand(&master.status(), CONFIGURED);
        assert_eq!(told_number(&serving, 1), "2");
        assert!(!overview(&master).contains("scaled"), "{}", overview(&master));
        master.stop();
    });
}

#[test]
fn one_more_and_one_fewer_by_signal() {
    world(&[], |world| {
        let master = Master::start(world, &two(world, "--mode plain"));
        let first = demand(&master.status(), 2)[0];
        for (signal, workers) in [(Signal::TTOU, 1), (Signal::TTIN, 2), (Signal::TTIN, 3), (Signal::TTOU, 2)]
        {
            master.signal(signal);
            assert_eq!(wait_scaled(&master, workers)[0], first);
        }
        master.signal(Signal::TTOU);
        wait_scaled(&master, 1);
        master.signal(Signal::TTOU);
        // The answer to a question asked later comes no sooner than the next turn.
        for _ in 0..2 {
            assert_eq!(demand(&master.status(), 1), [first], "the last one was told to go");
        }
        // One of none would be but one.
        master.signal(Signal::TTIN);
        assert_eq!(wait_scaled(&master, 2)[0], first);
        master.stop();
    });
}

#[test]
fn during_an_upgrade_it_waits_for_the_end() {
    world(&[], |world| {
        let app = two(world, "--mode plain");
        let master = Master::start(world, &app);
        // Of another config: the number was asked for later, and so it lasts.
        let mut next = app.clone();
        next.command = test_worker("--mode plain --ready-delay 1000");
        next.write();
        let upgrading = master.begin("upgrade --wait");
        master.wait_status("launching", |status| status.state == MasterState::Launching);
        let scaling = master.begin("scale 5 --wait");
        let status = master.wait_status("switched", |status| {
            let workers = status.generations.iter().map(|generation| generation.workers.len()).max();
            let is_over = status.active_generation == Some(2) && status.state == MasterState::Steady;
            assert!(is_over || workers <= Some(2), "before the end of the upgrade: {status:#?}");
            is_over
        });
        assert_eq!(status.last_upgrade.unwrap().to, Some(2));
        assert_eq!(upgrading.finish(PATIENCE).code, 0);
        let done = scaling.finish(PATIENCE);
        assert_eq!((done.code, done.stdout.as_str()), (0, "scaled to 5\n"), "{}", done.stderr);
        demand(&master.status(), 5);
        master.stop();
    });
}

#[test]
fn workers_that_fail_are_told_of() {
    world(&[], |world| {
        let app = two(world, "--mode plain --fail exit-before-ready --code 7 --fail-seat 3")
            .restart("breaker = { exits = 1000 }");
        let master = Master::start(world, &app);
        let before = demand(&master.status(), 2);
        master.cli("scale 4 --wait").refused(&["seat 3", "status 7"]);
        // The others are there, and those of before are as they were.
        let status = master.wait_status("three", |status| seats(status, 1).len() == 3);
        assert_eq!(seats(&status, 1)[..2], before);
        assert_eq!(status.scaled, Some(Scaled { workers: 4, configured: 2 }));
        scale(&master, 2);
        assert_eq!(demand(&master.status(), 2), before);
        master.stop();
    });
}

#[test]
fn a_later_number_takes_the_place_of_an_earlier() {
    world(&[], |world| {
        let app = two(world, "--mode plain --fail never-ready --fail-seat 3");
        let master = Master::start(world, &app);
        let waiting = master.begin("scale 4 --wait");
        let is_starting = |status: &Status| {
            let workers = status.generations.iter().flat_map(|one| &one.workers);
            workers.filter(|worker| worker.seat == 3 && worker.state == WorkerState::Starting).count() == 1
        };
        master.wait_status("starting", is_starting);
        scale(&master, 3);
        waiting.finish(PATIENCE).refused(&["another number of workers"]);
        demand(&master.status(), 3);
        master.stop();
    });
}

#[test]
fn what_is_no_number_of_workers_is_wrong_usage() {
    world(&[], |world| {
        let master = Master::start(world, &two(world, "--mode plain"));
        let before = demand(&master.status(), 2);
        for number in ["0", "1025", "-1", "many", "", "4 5"] {
            let done = master.cli(&format!("scale {number} --wait"));
            assert_eq!(done.code, 2, "{number:?}: {done:#?}");
        }
        assert_eq!(demand(&master.status(), 2), before);
        master.stop();
    });
}

/// The rest of a client's request, and the answer; `None` for one that was cut.
fn answer(mut client: TcpStream) -> Option<String> {
    let mut answer = String::new();
    client.write_all(b", and the rest\n").ok()?;
    client.read_to_string(&mut answer).ok().filter(|length| *length > 0).map(|_| answer)
}

fn open_clients(world: &World) -> Vec<TcpStream> {
    (0..60).map(|_| client::open(world)).collect()
}

fn gone_workers_finish(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = two(world, &format!("--mode {mode}")).engine(engine);
        let patient = app.clone().upgrade("drain_timeout = \"10m\"");
        let master = Master::start(world, &patient);
        scale(&master, 4);
        let clients = open_clients(world);
        scale(&master, 1);
        // They may go on, and nobody new comes to them.
        let status = master.status();
        let drain = |status: &Status| {
            let workers = status.generations[0].workers.iter();
            workers.filter(|worker| worker.state == WorkerState::Draining).count()
        };
        assert_eq!(drain(&status), 3, "{status:#?}");
        assert!(status.generations[0].deadline_ms > Some(0), "{status:#?}");
        for _ in 0..30 {
            assert!(answer(client::open(world)).unwrap().contains("seat=0"));
        }
        let answers: Vec<String> = clients.into_iter().filter_map(answer).collect();
        assert_eq!(answers.len(), 60, "connections have been cut");
        assert!(answers.iter().any(|answer| answer.contains("seat=3")), "seat 3 had none");
        master.wait_status("gone", |status| status.generations[0].workers.len() == 1);
        assert!(!master.log().contains("event=\"killed\""), "{}", master.log());

        // No longer than they may.
        app.upgrade("drain_timeout = \"1s\"").write();
        master.upgrade();
        scale(&master, 4);
        let clients = open_clients(world);
        scale(&master, 1);
        master.wait_status("gone", |status| status.generations[0].workers.len() == 1);
        assert_eq!(master.log().matches("event=\"killed\"").count(), 3, "{}", master.log());
        let answers: Vec<String> = clients.into_iter().filter_map(answer).collect();
        assert!((1..60).contains(&answers.len()), "{answers:?}");
        assert!(answers.iter().all(|answer| answer.contains("seat=0")), "{answers:?}");
        master.stop();
    });
}

#[test]
fn gone_workers_finish_sdk_cbpf() {
    gone_workers_finish("cbpf", "sdk");
}

#[test]
fn gone_workers_finish_unmodified_ebpf() {
    gone_workers_finish("ebpf", "plain");
}
