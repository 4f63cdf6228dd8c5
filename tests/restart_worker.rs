//! One worker is replaced by another: nobody notices, the other workers neither.

use std::fs;
use std::time::Duration;

use reuseportd_bench::Spec;
use reuseportd_wire::status::{MasterState, Status, WorkerState, WorkerStatus};

use crate::crash::queues_of_twenty;
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::Master;
use crate::support::process::kill;
use crate::support::watch::{always_served, seats, serving, watched};
use crate::support::world::{World, needs_of, world};

/// For a single worker with 2 ms per connection.
fn modest(world: &World) -> Spec {
    spec(world).rate(30.0).burst(60, Duration::from_millis(300)).slow(10)
}

fn restart(master: &Master, seat: u32) {
    let done = master.cli(&format!("restart-worker {seat} --wait"));
    let words = format!("worker of seat {seat} restarted\n");
    assert_eq!((done.code, done.stdout), (0, words), "{}\n{}", done.stderr, master.log());
}

/// Demands that the worker of this seat is another one, and nobody else is.
fn demand_other(master: &Master, before: &[(u32, u32)], seat: u32) {
    let after = seats(&master.status(), 1);
    let changed: Vec<u32> = before.iter().zip(&after).filter(|(a, b)| a != b).map(|(a, _)| a.0).collect();
    assert_eq!((changed, after.len()), (vec![seat], before.len()), "{before:?} {after:?}");
}

/// Seats one after the other.
fn restart_each(world: &World, app: &App, load: Spec, order: &[u32]) {
    let master = Master::start(world, app);
    let load = Load::start(load);
    let workers = app.workers as usize;
    for seat in order {
        let before = seats(&master.status(), 1);
        let ((), seen) = watched(&master, || restart(&master, *seat));
        demand_other(&master, &before, *seat);
        always_served(&seen, workers);
        let most = seen.iter().map(|status| serving(status).count()).max();
        assert!(most <= Some(workers + 1), "{most:?} at a time");
        load.answered(100);
    }
    let report = load.end();
    assert_eq!(report.lost(), 0, "{report}\n{}", master.log());
    assert_eq!((report.pids.len(), report.generations.len()), (workers + order.len(), 1), "{report}");
    let status = master.status();
    assert_eq!(status.generations[0].workers.len(), workers, "{status:#?}");
    assert_eq!(status.last_upgrade, None, "it is no upgrade");
    master.stop();
}

fn restarts_lose_nothing(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let slow = |delay: u32| {
            let app = App::test_worker(world, &format!("--mode {mode} --accept-delay {delay}"));
            app.engine(engine).upgrade("stop_when = \"drained\"")
        };
        restart_each(world, &slow(5), slow_accepts(world), &[0, 3, 1]);
        // The only one there is.
        restart_each(world, &slow(2).workers(1), modest(world), &[0, 0]);
    });
}

#[test]
fn without_loss_sdk_ebpf() {
    restarts_lose_nothing("ebpf", "sdk");
}

#[test]
fn without_loss_sdk_cbpf() {
    restarts_lose_nothing("cbpf", "sdk");
}

#[test]
fn without_loss_unmodified_ebpf() {
    restarts_lose_nothing("ebpf", "plain");
}

#[test]
fn without_loss_unmodified_cbpf() {
    restarts_lose_nothing("cbpf", "plain");
}

#[test]
fn without_loss_with_sockets_of_the_master_ebpf() {
    restarts_lose_nothing("ebpf", "activated");
}

#[test]
fn without_loss_with_sockets_of_the_master_cbpf() {
    restarts_lose_nothing("cbpf", "activated");
}

#[test]
fn the_same_loads_show_losses() {
    world(&[], |world| {
        for (workers, delay, load) in [(4, 5, slow_accepts(world)), (1, 2, modest(world))] {
            let app = App::test_worker(world, &format!("--mode naive --accept-delay {delay}"));
            let app = app.workers(workers).engine("none").upgrade("stop_when = \"drained\"");
            let app = app.upgrade("drain_timeout = \"1s\"").upgrade("settle_timeout = \"100ms\"");
            let master = Master::start(world, &app);
            let load = Load::start(load);
            for seat in [0, workers - 1, 0] {
                restart(&master, seat);
                load.answered(100);
            }
            let report = load.end();
            assert!(
                report.lost() > 0,
                "the load shows nothing, the naive control loses nothing either: {report}"
            );
            master.stop();
        }
    });
}

#[test]
fn what_cannot_be_is_refused() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain --ready-delay 500").workers(2);
        let master = Master::start(world, &app);
        let before = seats(&master.status(), 1);
        for words in ["restart-worker 2", "restart-worker 2 --wait"] {
            master.cli(words).refused(&["no seat 2", "0 to 1"]);
        }
        for words in ["restart-worker 1024", "restart-worker -1", "restart-worker first", "restart-worker"] {
            assert_eq!(master.cli(words).code, 2, "{words}");
        }
        assert_eq!(seats(&master.status(), 1), before);
        let upgrading = master.begin("upgrade --wait");
        master.wait_status("launching", |status| status.state == MasterState::Launching);
        master.cli("restart-worker 0 --wait").refused(&["an upgrade is under way"]);
        assert_eq!(seats(&master.status(), 1), before);
        assert_eq!(upgrading.finish(PATIENCE).code, 0);
        master.stop();
    });
}

/// Workers that fail like this from the moment on that [`fail`] is called.
fn failing(world: &World, options: &str) -> App {
    let file = world.path("fail");
    App::test_worker(world, &format!("{options} --fail-if {}", file.display()))
        .restart("breaker = { exits = 1000 }")
}

fn fail(world: &World, fails: bool) {
    if fails {
        fs::write(world.path("fail"), "").unwrap()
    } else {
        fs::remove_file(world.path("fail")).unwrap()
    }
}

fn the_next_one_fails(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let ways = [("exit-before-ready --code 7", "status 7"), ("never-ready", "ready_timeout")];
        // The latter takes its time.
        for (how, word) in &ways[..if mode == "plain" { 2 } else { 1 }] {
            let app = failing(world, &format!("--mode {mode} --accept-delay 5 --fail {how}")).engine(engine);
            // Long enough for those that are well.
            let master = Master::start(world, &app.upgrade("ready_timeout = \"3s\""));
            let load = Load::start(slow_accepts(world));
            let before = seats(&master.status(), 1);
            fail(world, true);
            let (done, seen) = watched(&master, || master.cli("restart-worker 2 --wait"));
            done.refused(&["seat 2", word]);
            always_served(&seen, 4);
            let is_over = |status: &Status| status.generations[0].workers.len() == 4;
            let after = master.wait_status("without the next one", is_over);
            assert_eq!(seats(&after, 1), before, "the old one serves on");
            fail(world, false);
            restart(&master, 2);
            demand_other(&master, &before, 2);
            load.answered(100);
            let report = load.end();
            assert_eq!(report.lost(), 0, "{how}: {report}\n{}", master.log());
            master.stop();
        }
    });
}

#[test]
fn the_next_one_fails_sdk_cbpf() {
    the_next_one_fails("cbpf", "sdk");
}

#[test]
fn the_next_one_fails_unmodified_ebpf() {
    the_next_one_fails("ebpf", "plain");
}

#[test]
fn the_next_one_fails_with_sockets_of_the_master_cbpf() {
    the_next_one_fails("cbpf", "activated");
}

#[test]
fn a_seat_in_backoff_is_filled_at_once() {
    world(&[], |world| {
        let app = failing(world, "--mode plain --fail exit-before-ready").restart("backoff = \"10m\"");
        let master = Master::start(world, &app.restart("backoff_max = \"10m\""));
        let before = seats(&master.status(), 1);
        fail(world, true);
        kill([before[1].1]);
        let in_backoff = |worker: &WorkerStatus| worker.seat == 1 && worker.state == WorkerState::Backoff;
        master.wait_status("in backoff for long", |status| {
            status.generations[0].workers.iter().any(in_backoff) && master.log().contains("again in 600s")
        });
        fail(world, false);
        restart(&master, 1);
        demand_other(&master, &before, 1);
        master.stop();
    });
}

/// Waits until the next worker of seat 0 has been started.
fn wait_next(master: &Master) {
    master.wait_status("a next worker", |status| {
        status.generations[0].workers.iter().filter(|worker| worker.seat == 0).count() == 2
    });
}

/// The old worker, or the master, is killed before the next worker is ready. What such a load loses otherwise: see
/// `crash`.
fn somebody_is_killed(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let options = format!("--mode {mode} --inline --accept-delay 5 --ready-delay 700");
        let mut master = Master::start(world, &App::test_worker(world, &options).engine(engine));
        let load = Load::start(queues_of_twenty(world));
        let before = seats(&master.status(), 1);
        let waiting = master.begin("restart-worker 0 --wait");
        wait_next(&master);
        kill([before[0].1]);
        let done = waiting.finish(PATIENCE);
        assert_eq!(done.code, 0, "{done:#?}\n{}", master.log());
        demand_other(&master, &before, 0);
        assert_eq!(master.status().generations[0].workers.len(), 4, "one of them is enough");
        load.answered(100);

        let before = seats(&master.status(), 1);
        let waiting = master.begin("restart-worker 0 --wait");
        wait_next(&master);
        master.kill();
        waiting.finish(PATIENCE).refused(&["the master ended"]);
        master.restart();
        master.wait_adopted();
        master.wait_status("carried to its end", |status| {
            assert!(serving(status).count() >= 4, "{status:#?}\n{}", master.log());
            status.generations[0].workers.len() == 4 && seats(status, 1)[0] != before[0]
        });
        demand_other(&master, &before, 0);
        load.answered(100);
        let report = load.end();
        assert!(report.lost() <= 1, "what the killed one held: {report}\n{}", master.log());
        master.stop();
    });
}

#[test]
fn somebody_is_killed_sdk_cbpf() {
    somebody_is_killed("cbpf", "sdk");
}

#[test]
fn somebody_is_killed_unmodified_ebpf() {
    somebody_is_killed("ebpf", "plain");
}

#[test]
fn somebody_is_killed_with_sockets_of_the_master_cbpf() {
    somebody_is_killed("cbpf", "activated");
}
