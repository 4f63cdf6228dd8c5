//! The master is killed: its workers serve on, and the next master, started by hand, goes on with them.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::process::Command;
use std::time::{Duration, Instant};

use reuseportd_bench::{Report, Spec};
use reuseportd_wire::status::{MasterState, Outcome, Status, WorkerState};
use rustix::process::Signal;

use crate::crash::{one_at_a_time, queues_of_twenty};
use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Done, Running, keepers_of, kill, processes_of, signal, wait_gone};
use crate::support::world::{Need, World, needs_of, world};
use crate::support::{PATIENCE, rounds};

/// 1,200 connections a second, most of them in bursts, and slow clients: for workers that need 2 ms per connection, so
/// that queues are hardly ever empty.
pub(crate) fn many(world: &World) -> Spec {
    spec(world).rate(700.0).burst(150, Duration::from_millis(300)).slow(20)
}

/// A service under that load. Old workers keep their listeners until connections have ended: an upgrade takes its time.
pub(crate) fn busy(world: &World, mode: &str, engine: &'static str) -> App {
    let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 2")).engine(engine);
    app.upgrade("stop_when = \"idle\"").upgrade("idle_timeout = \"1s\"")
}

/// What the load says when nothing may have been lost. Socket-activated workers share their sockets with the next
/// generation's: theirs are no strays.
pub(crate) fn end_lossless(load: Load, mode: &str, master: &Master) -> Report {
    let report = load.end();
    assert_eq!(report.lost(), 0, "{report}\n{}", master.log());
    assert!(report.strays == 0 || mode == "activated", "{report}\n{}", master.log());
    report
}

/// The same load must lose when the workers go with their master and the next one begins anew.
pub(crate) fn control_loses(world: &World, spec: Spec) {
    let app = busy(world, "naive", "none");
    let mut master = Master::start(world, &app);
    let load = Load::start(spec);
    master.kill();
    kill(processes_of(&world.app).iter().map(|process| process.pid));
    master.restart();
    load.answered(100);
    let report = load.end();
    assert!(report.lost() > 0, "the load shows nothing, the control loses nothing either: {report}");
    master.stop();
}

/// The master is killed and the next one adopts; the workers are the same.
fn followed(master: &mut Master, load: &Load) {
    let workers = master.serving();
    master.kill();
    load.answered(300);
    master.restart();
    master.wait_adopted();
    assert_eq!(master.serving(), workers, "{}", master.log());
}

/// Whether a generation's four workers are there, and in the journal.
pub(crate) fn launched_is_kept(world: &World, status: &Status, generation: u32) -> bool {
    let launched = status.generations.iter().filter(|one| one.generation == generation);
    let pids: Vec<u32> = launched.flat_map(|one| &one.workers).filter_map(|worker| worker.pid).collect();
    let journal: serde_json::Value = serde_json::from_str(&world.read("run/control.sock.journal")).unwrap();
    let kept = |pid: &u32| journal["workers"].as_array().unwrap().iter().any(|worker| worker["pid"] == *pid);
    pids.len() == 4 && pids.iter().all(kept)
}

/// The master is killed when an upgrade to this generation has come so far, and the journal knows it; what the client that
/// waits is told.
fn killed_while(world: &World, master: &mut Master, generation: u32, state: MasterState) -> Done {
    let client = master.begin("upgrade --wait=drained");
    let is_kept = |status: &Status| launched_is_kept(world, status, generation);
    master.wait_status("so far", |status| status.state == state && is_kept(status));
    // The keeper is told right after the journal was written, before anybody is answered.
    master.status();
    master.kill();
    client.finish(PATIENCE)
}

/// Killed by turns with upgrades, then in the middle of them: while launching, and while retiring.
fn killed_again_and_again(mode: &str, engine: &'static str) {
    world(needs_of(engine), |world| {
        let mut app = busy(world, mode, engine);
        let mut master = Master::start(world, &app);
        let load = Load::start(many(world));
        let mut generation = 1;
        for _ in 0..rounds(2, 5) {
            followed(&mut master, &load);
            master.hup();
            generation += 1;
            load.answered_by(generation);
        }
        app.command.extend(["--ready-delay", "500"].map(str::to_owned));
        app.write();
        for state in [MasterState::Launching, MasterState::Retiring] {
            generation += 1;
            let told = killed_while(world, &mut master, generation, state);
            assert_eq!(told.code, 1, "{told:#?}");
            assert!(
                told.stderr.contains("the master ended before what it had taken on was done"),
                "{told:#?}"
            );
            load.answered(300);
            let launched = || {
                let mut all = processes_of(&world.app);
                all.retain(|process| process.generation == generation);
                all
            };
            let before = launched();
            master.restart();
            master.wait_adopted();
            assert_eq!((before.len(), launched()), (4, before), "{}", master.log());
            let goes_on = |status: &Status| {
                status.state == MasterState::Steady && status.active_generation == Some(generation)
            };
            let status = master.wait_status("at the end of the upgrade", goes_on);
            let receipt = status.last_upgrade.expect("every upgrade leaves a receipt");
            assert_eq!((receipt.outcome, receipt.to), (Outcome::Completed, Some(generation)));
            load.answered_by(generation);
        }
        followed(&mut master, &load);
        end_lossless(load, mode, &master);
        master.stop();
        control_loses(world, many(world));
    });
}

#[test]
fn killed_again_and_again_sdk_ebpf() {
    killed_again_and_again("sdk", "ebpf");
}

#[test]
fn killed_again_and_again_unmodified_cbpf() {
    killed_again_and_again("plain", "cbpf");
}

#[test]
fn killed_again_and_again_activated_ebpf() {
    killed_again_and_again("activated", "ebpf");
}

#[test]
fn killed_again_and_again_the_other_kinds() {
    if rounds(0, 1) == 1 {
        killed_again_and_again("sdk", "cbpf");
        killed_again_and_again("plain", "ebpf");
        killed_again_and_again("activated", "cbpf");
    }
}

/// Killed under load, followed, and upgraded then: the connections lost.
pub(crate) fn lost_with_the_master(world: &World, mode: &str, engine: &'static str) -> u64 {
    let app = App::test_worker(world, &format!("--mode {mode} --accept-delay 5")).engine(engine);
    let mut master = Master::start(world, &app);
    let load = Load::start(queues_of_twenty(world));
    followed(&mut master, &load);
    master.hup();
    load.answered_by(2);
    let report = load.end();
    master.stop();
    report.lost()
}

/// The one keeper of a world, which holds as many descriptors as the former one did.
fn keeper(master: &Master<'_>, former: Option<(u32, usize)>) -> (u32, usize) {
    let deadline = Instant::now() + PATIENCE;
    loop {
        let keepers = keepers_of(master.app());
        let count = |pid| std::fs::read_dir(format!("/proc/{pid}/fd")).map_or(0, Iterator::count);
        if let [pid] = keepers[..] {
            // What is being saved just now would be one more, or fewer.
            let held = count(pid);
            let is_usual = (0..3).all(|_| master.cli("status").code == 0 && count(pid) == held);
            if is_usual && former.is_none_or(|(other, before)| pid != other && held == before) {
                return (pid, held);
            }
        }
        assert!(Instant::now() < deadline, "no new keeper with all of it: {keepers:?}, {former:?}");
    }
}

#[test]
fn a_killed_keeper_is_replaced_and_refilled() {
    world(&[Need::Bpf], |world| {
        let mut master = Master::start(world, &App::test_worker(world, "--mode sdk"));
        let first = keeper(&master, None);
        kill([first.0]);
        let second = keeper(&master, Some(first));
        assert!(master.log().contains("event=\"keeper_ended\""), "{}", master.log());
        let workers = master.serving();
        master.kill();
        master.restart();
        let status = master.wait_adopted();
        assert_eq!((status.state, master.serving()), (MasterState::Steady, workers), "{}", master.log());
        master.upgrade();
        wait_gone(second.0, PATIENCE);
        master.stop();
    });
}

#[test]
fn a_keeper_that_hangs_holds_nobody_up() {
    world(&[Need::Bpf], |world| {
        let app = App::test_worker(world, "--mode sdk");
        let master = Master::start(world, &app);
        let (stopped, _) = keeper(&master, None);
        signal(stopped, Signal::STOP);
        let upgrade = master.begin("upgrade --wait=drained");
        let (mut asked, mut longest) = (Instant::now(), Duration::ZERO);
        master.wait_status("upgraded", |status| {
            longest = longest.max(asked.elapsed());
            asked = Instant::now();
            status.state == MasterState::Steady && status.active_generation == Some(2)
        });
        let done = upgrade.finish(PATIENCE);
        assert_eq!(done.code, 0, "{done:#?}");
        // 200 ms of patience with it, a new one started, and all of a busy machine besides.
        assert!(longest < Duration::from_secs(10), "no answer for {longest:?}\n{}", master.log());
        wait_gone(stopped, PATIENCE);
        assert_ne!(keeper(&master, None).0, stopped);
        master.stop();
    });
}

#[test]
fn a_keeper_killed_again_and_again_is_not_replaced_for_ever() {
    world(&[Need::Bpf], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode sdk"));
        let load = Load::start(spec(world).rate(500.0));
        // At once, and then after 100 ms, 200 ms and so on: in three seconds six.
        let (begun, time) = (Instant::now(), Duration::from_secs(rounds(3, 20).into()));
        let mut killed = 0;
        while begun.elapsed() < time || killed < 4 {
            assert!(begun.elapsed() < PATIENCE, "{killed} keepers were killed\n{}", master.log());
            let keepers = keepers_of(&world.app);
            killed += keepers.len();
            kill(keepers);
            load.answered(5);
        }
        assert!(killed <= rounds(8, 12) as usize, "{killed} keepers were killed\n{}", master.log());
        let receipt = master.upgrade();
        assert_eq!(receipt.to, Some(2));
        load.answered_by(2);
        load.end_lossless();
        master.stop();
    });
}

/// With nobody there to fill its seat, a worker's queue waits for the next master, or is moved by the kernel.
fn a_worker_dies_meanwhile(engine: &'static str) {
    world(needs_of(engine), |world| {
        let mut master = Master::start(world, &one_at_a_time(world, "sdk", engine));
        let load = Load::start(queues_of_twenty(world));
        let workers = master.serving();
        let queue = |status: &Status| crate::crash::fullest(status).filter(|(_, queue)| *queue >= 10);
        let status = master.wait_status("a long queue", |status| queue(status).is_some());
        let (dead, _) = queue(&status).expect("just seen");
        master.kill();
        kill([dead]);
        load.answered(200);
        master.restart();
        master.wait_adopted();
        let all_serve = |status: &Status| {
            let workers = status.generations.iter().flat_map(|generation| &generation.workers);
            workers.filter(|worker| worker.state == WorkerState::Serving).count() == 4
        };
        master.wait_status("filled again", |status| status.state == MasterState::Steady && all_serve(status));
        let (before, after) = (workers, master.serving());
        for pid in before {
            assert_eq!(after.contains(&pid), pid != dead, "{}", master.log());
        }
        load.answered(300);
        let report = load.end();
        // What it had accepted.
        assert!(report.lost() <= 1, "{report}\n{}", master.log());
        assert_eq!(master.counted_losses(), 0);
        master.stop();
    });
}

#[test]
fn a_worker_dies_while_there_is_no_master_ebpf() {
    a_worker_dies_meanwhile("ebpf");
}

#[test]
fn a_worker_dies_while_there_is_no_master_cbpf() {
    a_worker_dies_meanwhile("cbpf");
}

/// The program with the arguments of this master's config.
fn another(app: &App) -> Running {
    let mut command = Command::new(REUSEPORTD);
    command.args(["--log-format", "text", "--config"]).arg(&app.path);
    Running::start(command)
}

#[test]
fn there_is_one_master_at_a_time() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk");
        let mut master = Master::start(world, &app);
        let (workers, kept) = (master.serving(), keeper(&master, None));
        let refused = another(&app).finish(PATIENCE);
        assert_eq!(refused.code, 1, "{refused:#?}");
        assert!(refused.stderr.contains("another master runs this app"), "{refused:#?}");
        assert_eq!((master.serving(), keeper(&master, None).0), (workers.clone(), kept.0));
        // Two at the same instant, after a crash.
        for _ in 0..rounds(3, 30) {
            master.kill();
            master.restart();
            let mut second = another(&app);
            let status = wait_any(&master);
            assert!(status.master.adopted, "{status:#?}");
            assert_eq!(master.serving(), workers);
            if status.master.pid == master.pid() {
                let refused = second.finish(PATIENCE);
                assert_eq!(refused.code, 1, "{refused:#?}");
                assert!(refused.stderr.contains("another master runs this app"), "{refused:#?}");
            } else {
                assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
                assert!(second.is_running());
                kill([status.master.pid]);
                second.finish(PATIENCE);
                master.restart();
                master.wait_adopted();
            }
        }
        master.stop();
    });
}

/// The status of whichever master there is, once there is one.
fn wait_any(master: &Master) -> Status {
    let deadline = Instant::now() + PATIENCE;
    while master.cli("status").code != 0 {
        assert!(Instant::now() < deadline, "no master answers:\n{}", master.log());
    }
    master.status()
}

#[test]
fn an_invalid_config_keeps_nobody_from_adopting() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk");
        let mut master = Master::start(world, &app);
        let workers = master.serving();
        master.kill();
        app.write_invalid();
        master.restart();
        master.wait_adopted();
        assert_eq!(master.serving(), workers);
        let refused = master.cli("upgrade --wait");
        assert_eq!(refused.code, 2, "{refused:#?}");
        assert!(refused.stderr.contains("unknown key `nonsense`"), "{refused:#?}");
        let receipt = master.status().last_upgrade.expect("every wish leaves a receipt");
        assert_eq!(receipt.outcome, Outcome::Refused, "{receipt:#?}");
        assert_eq!(master.serving(), workers);

        // Without the file nobody knows where to look.
        master.kill();
        std::fs::remove_file(&app.path).unwrap();
        master.restart();
        assert_eq!(master.wait_end(PATIENCE), Some(2), "{}", master.log());
        assert_eq!(processes_of(&world.app).len(), workers.len());
        app.write();
        master.restart();
        master.wait_adopted();
        assert_eq!(master.serving(), workers);
        master.upgrade();
        master.stop();
    });
}

#[test]
fn stop_left_behind_ends_what_a_killed_master_has_left() {
    world(&[], |world| {
        let mut master = Master::start(world, &App::test_worker(world, "--mode sdk"));
        let refused = master.cli("stop --left-behind");
        assert_eq!(refused.code, 1, "{refused:#?}");
        assert!(refused.stderr.contains("another master runs this app"), "{refused:#?}");
        assert_eq!(master.serving().len(), 4);
        master.kill();
        assert_eq!((master.cli("status").code, keepers_of(&world.app).len()), (3, 1));

        let done = master.cli("stop --left-behind");
        assert_eq!((done.code, done.stdout.as_str()), (0, "4 workers were left behind\n"), "{done:#?}");
        nothing_is_left(world);
        let done = master.cli("stop --left-behind");
        assert_eq!((done.code, done.stdout.as_str()), (0, "0 workers were left behind\n"), "{done:#?}");
        nothing_is_left(world);
    });
}

/// No process, and no file: the directory may stay.
pub(crate) fn nothing_is_left(world: &World) {
    assert_eq!((processes_of(&world.app), keepers_of(&world.app)), (vec![], vec![]));
    let left = std::fs::read_dir(world.path("run")).map_or_else(|_| vec![], Iterator::collect);
    assert!(left.is_empty(), "{left:?}");
}

#[test]
fn the_keeper_goes_with_the_last_worker() {
    world(&[], |world| {
        let mut master = Master::start(world, &App::test_worker(world, "--mode plain"));
        let (kept, _) = keeper(&master, None);
        master.kill();
        kill(processes_of(&world.app).iter().map(|process| process.pid));
        wait_gone(kept, PATIENCE);
        // The next one has nothing to take over, and begins.
        let mark = master.upstream.mark();
        master.restart();
        assert!(master.upstream.wait(mark, "READY=1", PATIENCE).is_some(), "{}", master.log());
        let status = master.status();
        assert_eq!((status.master.adopted, status.active_generation), (false, Some(1)));
        master.stop();
    });
}

/// The state that was kept may be of the time before the first switch: what was in force then must not be gone back to.
#[test]
fn killed_at_the_first_switch() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (mode, engine) in [("plain", "ebpf"), ("activated", "ebpf"), ("sdk", "cbpf")] {
            let mut master =
                Master::start(world, &App::test_worker(world, &format!("--mode {mode}")).engine(engine));
            master.kill();
            let load = Load::start(spec(world).rate(1500.0));
            let workers = processes_of(&world.app);
            for _ in 0..rounds(3, 30) {
                master.restart();
                master.wait_adopted();
                load.answered(50);
                master.kill();
            }
            assert_eq!(processes_of(&world.app), workers);
            master.restart();
            master.wait_adopted();
            load.answered(50);
            end_lossless(load, mode, &master);
            master.stop();
        }
    });
}

#[test]
fn an_open_connection_outlives_the_master_and_the_upgrade_after_it() {
    world(&[], |world| {
        for mode in ["sdk", "plain"] {
            let mut master = Master::start(world, &App::test_worker(world, &format!("--mode {mode}")));
            let mut client = TcpStream::connect(world.address).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client.write_all(b"half a line").unwrap();
            master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
            master.kill();
            master.restart();
            let status = master.wait_adopted();
            assert_eq!(status.generations[0].connections, Some(1), "{status:#?}");
            let upgrade = master.begin("upgrade --wait=drained");
            master.wait_status("switched", |status| status.active_generation == Some(2));
            client.write_all(b", and the rest\n").unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("generation=1"), "{mode}: {answer}");
            assert_eq!(upgrade.finish(PATIENCE).code, 0);
            master.stop();
        }
    });
}
