//! Rolling upgrades: batch by batch, and there are never fewer workers than there should be.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use reuseportd_wire::status::{MasterState, Outcome, Status, WorkerState, WorkerStatus};

use crate::crash::queues_of_twenty;
use crate::support::app::App;
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::Master;
use crate::support::process::{Running, kill};
use crate::support::watch::{always_served, seats, serving, watched};
use crate::support::world::{World, example, needs_of, tool, world};
use crate::support::{PATIENCE, client, rounds};
use crate::upgrade::control_loses;

const WORKERS: u32 = 8;

/// Eight workers that are together as fast as the four of the other loss tests.
const SLOW: &str = "--accept-delay 10";

fn rolling(world: &World, mode: &str, options: &str, batch: u32) -> App {
    let app = App::test_worker(world, &format!("--mode {mode} {options}")).workers(WORKERS);
    app.upgrade("stop_when = \"drained\"").upgrade(format!("batch = {batch}"))
}

/// Seats, of workers that serve, of the first and of the second generation.
fn of_both(status: &Status) -> [usize; 2] {
    [1, 2].map(|generation| seats(status, generation).len())
}

/// Waits until so many workers of the second generation serve, and the upgrade goes on.
fn wait_rolled(master: &Master, workers: usize) -> Status {
    master.wait_status("rolled so far", |status| {
        let [old, new] = of_both(status);
        assert!(old > 0, "too late: {status:#?}");
        new >= workers
    })
}

fn completed(master: &Master, waiting: Running) {
    let (code, receipt) = master.receipt(waiting.finish(PATIENCE));
    assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}\n{}", master.log());
}

fn lossless(load: Load) -> reuseportd_bench::Report {
    let report = load.end();
    assert_eq!(report.lost(), 0, "{report}");
    report
}

fn rolls_without_loss(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let master = Master::start(world, &rolling(world, mode, SLOW, 3).engine(engine));
        let load = Load::start(slow_accepts(world));
        let batches = [3, 1].repeat(rounds(1, 5) as usize);
        for (before, batch) in (1..).zip(&batches) {
            rolling(world, mode, SLOW, *batch).engine(engine).write();
            let (_, seen) = watched(&master, || master.upgrade());
            always_served(&seen, WORKERS as usize);
            let most = seen.iter().map(|status| serving(status).count()).max().unwrap();
            assert!(most <= (WORKERS + batch) as usize, "{most} at a time in batches of {batch}");
            // One batch after the other: so many new workers at the end of each, old ones in all the other seats.
            let is_mixed = |status: &&Status| {
                let [old, new] = [before, before + 1].map(|generation| seats(status, generation).len());
                old > 0 && new > 0
            };
            let new: BTreeSet<_> =
                seen.iter().filter(is_mixed).map(|status| seats(status, before + 1).len()).collect();
            let in_backoff = |worker: &&WorkerStatus| worker.state == WorkerState::Backoff;
            let generations = seen.iter().flat_map(|status| &status.generations);
            assert_eq!(
                generations.flat_map(|one| &one.workers).find(in_backoff),
                None,
                "no seat waits for a respawn"
            );
            assert!(!new.is_empty() && new.iter().all(|new| new % *batch as usize == 0), "{batch}: {new:?}");
        }
        load.answered(300);
        let report = lossless(load);
        let workers = (batches.len() + 1) * WORKERS as usize;
        assert_eq!(report.pids.len(), workers, "every worker has its part: {report}");
        master.stop();
    });
}

#[test]
fn without_loss_sdk_ebpf() {
    rolls_without_loss("ebpf", "sdk");
}

#[test]
fn without_loss_sdk_cbpf() {
    rolls_without_loss("cbpf", "sdk");
}

#[test]
fn without_loss_unmodified_ebpf() {
    rolls_without_loss("ebpf", "plain");
}

#[test]
fn without_loss_unmodified_cbpf() {
    rolls_without_loss("cbpf", "plain");
}

#[test]
fn without_loss_with_sockets_of_the_master_ebpf() {
    rolls_without_loss("ebpf", "activated");
}

#[test]
fn without_loss_with_sockets_of_the_master_cbpf() {
    rolls_without_loss("cbpf", "activated");
}

/// Four workers with half the delay take the same.
#[test]
fn the_same_load_shows_losses() {
    world(&[], |world| control_loses(world, slow_accepts(world), 5));
}

/// Which file a process executes, or which one is there.
fn identity(path: impl AsRef<Path>) -> (u64, u64) {
    let file = fs::metadata(path).unwrap();
    (file.dev(), file.ino())
}

/// Puts a program in another's place, as a deployment would.
fn deploy(world: &World, script: Option<&str>) {
    let [program, next, text] = ["program", "next", "script"].map(|name| world.path(name));
    let from = script.map_or(example("test_worker"), |script| {
        fs::write(&text, format!("#!/bin/sh\n{script}\n")).unwrap();
        text
    });
    // By another process: see `reexec`.
    tool(&format!("install -m 755 {} {}", from.display(), next.display()));
    fs::rename(next, program).unwrap();
}

/// Of a program that is replaced on disk in the meantime.
fn the_third_batch_fails(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        deploy(world, None);
        let mut app = rolling(world, mode, SLOW, 3).engine(engine);
        app.command[0] = world.path("program").to_str().unwrap().into();
        let master = Master::start(world, &app);
        let before = seats(&master.status(), 1);
        let pinned = identity(format!("/proc/{}/exe", before[0].1));
        let load = Load::start(slow_accepts(world));

        let next = example("test_worker");
        deploy(world, Some(&format!("[ $REUSEPORTD_SEAT -lt 6 ] || exit 7\nexec {} \"$@\"", next.display())));
        let ((code, receipt), seen) = watched(&master, || master.failing_upgrade());
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        let reason = receipt.reason.unwrap_or_default();
        let names_seat = ["seat 6", "seat 7"].iter().any(|seat| reason.contains(seat));
        assert!(names_seat && reason.contains("generation 2") && reason.contains("status 7"), "{reason}");
        always_served(&seen, WORKERS as usize);
        assert!(seen.iter().any(|status| of_both(status) == [2, 6]), "no two batches were replaced");

        let after = master.wait_status("as before", |status| status.generations.len() == 1);
        assert_eq!((after.active_generation, after.state), (Some(1), MasterState::Steady));
        let after = seats(&after, 1);
        assert_eq!(after.iter().map(|(seat, _)| *seat).collect::<Vec<_>>(), (0..WORKERS).collect::<Vec<_>>());
        assert_eq!(after[6..], before[6..], "workers that were never replaced");
        for (seat, pid) in after {
            assert_eq!(identity(format!("/proc/{pid}/exe")), pinned, "seat {seat} runs another program");
        }
        deploy(world, None);
        master.upgrade();
        load.answered_by(3);
        lossless(load);
        master.stop();
    });
}

#[test]
fn the_third_batch_fails_sdk_ebpf() {
    the_third_batch_fails("ebpf", "sdk");
}

#[test]
fn the_third_batch_fails_sdk_cbpf() {
    the_third_batch_fails("cbpf", "sdk");
}

#[test]
fn the_third_batch_fails_unmodified_ebpf() {
    the_third_batch_fails("ebpf", "plain");
}

#[test]
fn the_third_batch_fails_unmodified_cbpf() {
    the_third_batch_fails("cbpf", "plain");
}

#[test]
fn the_third_batch_fails_with_sockets_of_the_master_ebpf() {
    the_third_batch_fails("ebpf", "activated");
}

#[test]
fn the_third_batch_fails_with_sockets_of_the_master_cbpf() {
    the_third_batch_fails("cbpf", "activated");
}

/// A new worker of a batch that has long replaced its old one. What such a load loses otherwise: see `crash`.
fn a_new_worker_crashes(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = rolling(world, mode, "--inline --accept-delay 10 --ready-delay 100", 2).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(queues_of_twenty(world));
        let (done, seen) = watched(&master, || {
            let waiting = master.begin("upgrade --wait");
            let status = wait_rolled(&master, 4);
            kill([seats(&status, 2)[0].1]);
            waiting.finish(PATIENCE)
        });
        assert_eq!(done.code, 1, "{done:#?}");
        for word in ["seat 0", "generation 2", "SIGKILL"] {
            assert!(done.stderr.contains(word), "{word}: {done:#?}");
        }
        always_served(&seen, WORKERS as usize - 1);
        let after = master.wait_status("as before", |status| status.generations.len() == 1);
        assert_eq!((after.active_generation, of_both(&after)), (Some(1), [8, 0]));
        load.answered(300);
        let report = load.end();
        assert!(report.lost() <= 1, "what the killed one held: {report}\n{}", master.log());
        master.stop();
    });
}

#[test]
fn a_new_worker_crashes_sdk_ebpf() {
    a_new_worker_crashes("ebpf", "sdk");
}

#[test]
fn a_new_worker_crashes_sdk_cbpf() {
    a_new_worker_crashes("cbpf", "sdk");
}

#[test]
fn a_new_worker_crashes_unmodified_ebpf() {
    a_new_worker_crashes("ebpf", "plain");
}

#[test]
fn a_new_worker_crashes_with_sockets_of_the_master_cbpf() {
    a_new_worker_crashes("cbpf", "activated");
}

/// Another master, twice: by a re-exec, and because the first is killed.
fn the_master_changes(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = rolling(world, mode, &format!("{SLOW} --ready-delay 50"), 1).engine(engine);
        let mut master = Master::start(world, &app);
        let load = Load::start(slow_accepts(world));
        let (_, seen) = watched(&master, || {
            let waiting = master.begin("upgrade --wait=drained --json");
            for workers in [2, 5] {
                wait_rolled(&master, workers);
                let done = master.cli("reexec");
                assert_eq!(done.code, 0, "{done:#?}\n{}", master.log());
            }
            completed(&master, waiting);
        });
        always_served(&seen, WORKERS as usize);

        let waiting = master.begin("upgrade --wait");
        master.wait_status("rolled so far", |status| seats(status, 3).len() >= 3);
        master.kill();
        assert_eq!(waiting.finish(PATIENCE).code, 1, "the client's master is gone");
        master.restart();
        let adopted = master.wait_adopted();
        assert!(!seats(&adopted, 2).is_empty(), "too late: {adopted:#?}");
        master.wait_status("carried to its end", |status| {
            assert!(serving(status).count() >= WORKERS as usize, "{status:#?}\n{}", master.log());
            status.state == MasterState::Steady && status.active_generation == Some(3)
        });
        load.answered_by(3);
        lossless(load);
        master.stop();
    });
}

#[test]
fn the_master_changes_sdk_ebpf() {
    the_master_changes("ebpf", "sdk");
}

#[test]
fn the_master_changes_unmodified_cbpf() {
    the_master_changes("cbpf", "plain");
}

#[test]
fn the_master_changes_with_sockets_of_the_master_ebpf() {
    the_master_changes("ebpf", "activated");
}

#[test]
fn the_master_changes_with_sockets_of_the_master_cbpf() {
    the_master_changes("cbpf", "activated");
}

/// As many connections that ask for nothing yet that no worker is without.
fn open_clients(world: &World) -> Vec<std::net::TcpStream> {
    (0..160).map(|_| client::open(world)).collect()
}

/// Waits until a batch has been said to wait, since this mark; gives the next mark.
fn wait_queued(master: &Master, mark: usize) -> usize {
    let line = "STATUS=launching: generation 2 waits until an old generation has finished draining \
                (upgrade.max_draining)";
    let told = master.upstream.wait(mark, line, PATIENCE);
    told.unwrap_or_else(|| panic!("no batch waits: {:#?}\n{}", master.upstream.told(), master.log()))
}

/// A quarter of the workers is new and the next batch waits: time to see who gets what.
fn a_batch_waits_and_all_get_the_same(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = rolling(world, mode, "", 2).engine(engine);
        let app = app.upgrade("max_draining = 1").upgrade("drain_timeout = \"10m\"");
        let master = Master::start(world, &app);
        let clients = open_clients(world);
        let mut waiting = master.begin("upgrade --wait=drained");
        wait_queued(&master, 0);
        let status = master.status();
        assert_eq!(of_both(&status), [6, 2], "{status:#?}");
        let shares: Vec<f64> = status.generations.iter().map(|generation| generation.share).collect();
        assert_eq!(shares, [0.75, 0.25]);

        let load = Load::start(spec(world).rate(1000.0));
        load.answered(2000);
        let report = load.end_lossless();
        let all: BTreeSet<u32> = serving(&status).filter_map(|worker| worker.pid).collect();
        assert_eq!(report.pids.keys().copied().collect::<BTreeSet<_>>(), all, "{report}");
        let mean = report.answers / u64::from(WORKERS);
        let is_fair = |answers: &u64| (mean / 2..=mean * 2).contains(answers);
        assert!(report.pids.values().all(is_fair), "{:?}", report.pids);
        let still = master.status();
        assert_eq!(of_both(&still), [6, 2], "the batch does not wait: {still:#?}");
        assert!(waiting.is_running());

        for client in clients {
            assert!(client::answer(client).contains("generation=1"));
        }
        let done = waiting.finish(PATIENCE);
        assert_eq!(done.code, 0, "{done:#?}");
        assert!(done.stderr.contains("waits until"), "{done:#?}");
        assert_eq!(of_both(&master.status()), [0, 8]);
        master.stop();
    });
}

#[test]
fn a_batch_waits_and_all_get_the_same_sdk_ebpf() {
    a_batch_waits_and_all_get_the_same("ebpf", "sdk");
}

#[test]
fn a_batch_waits_and_all_get_the_same_unmodified_cbpf() {
    a_batch_waits_and_all_get_the_same("cbpf", "plain");
}

#[test]
fn force_ends_the_batch_that_drains_longest() {
    world(&[], |world| {
        let app = rolling(world, "plain", "", 1).workers(4);
        let app = app.upgrade("max_draining = 2").upgrade("drain_timeout = \"10m\"");
        let master = Master::start(world, &app);
        let clients = open_clients(world);
        let before = seats(&master.status(), 1);
        let waiting = master.begin("upgrade --wait --json");
        let mark = wait_queued(&master, 0);
        // The first batch has drained, by whatever means: the second is the oldest now.
        kill([before[0].1]);
        wait_queued(&master, mark);
        assert_eq!(master.cli("upgrade --force").code, 0);
        let (code, receipt) = master.receipt(waiting.finish(PATIENCE));
        assert_eq!((code, receipt.forced_kills), (0, 1), "{receipt:#?}");
        assert!(receipt.connections_cut.is_some_and(|cut| cut > 0), "{receipt:#?}");
        let status = master.wait_status("upgraded again", |status| {
            status.active_generation == Some(3) && status.state == MasterState::Steady
        });
        let left: Vec<_> =
            status.generations[0].workers.iter().map(|worker| (worker.seat, worker.pid.unwrap())).collect();
        assert_eq!(left, before[2..], "others than the oldest have been ended");
        drop(clients);
        master.stop();
    });
}

fn the_number_changes(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = rolling(world, mode, "--accept-delay 5", 3).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(slow_accepts(world));
        for (generation, workers) in (2..).zip([4, 8]) {
            app.clone().workers(workers).write();
            let (_, seen) = watched(&master, || master.upgrade());
            always_served(&seen, 4);
            assert_eq!(seats(&master.status(), generation).len(), workers as usize);
            load.answered_by(generation);
        }
        load.answered(100);
        lossless(load);
        master.stop();
    });
}

#[test]
fn the_number_changes_sdk_ebpf() {
    the_number_changes("ebpf", "sdk");
}

#[test]
fn the_number_changes_unmodified_cbpf() {
    the_number_changes("cbpf", "plain");
}

#[test]
fn the_number_changes_with_sockets_of_the_master_ebpf() {
    the_number_changes("ebpf", "activated");
}

#[test]
fn the_number_changes_with_sockets_of_the_master_cbpf() {
    the_number_changes("cbpf", "activated");
}
