//! The master's program is replaced in place: nobody outside notices, whatever is under way.

mod around;
mod moment;
mod phases;
mod refused;

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use jiff::{SignedDuration, Timestamp};
use reuseportd_bench::Spec;
use reuseportd_wire::status::{MasterState, Status};
use rustix::process::Signal;

use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Done, Running};
use crate::support::world::{World, needs_of, tool, world};
use crate::support::{PATIENCE, rounds};
use crate::upgrade::control_loses;

/// A re-exec that must succeed: it leaves no trace but its number.
pub(crate) fn reexec(master: &Master) {
    let before = master.status();
    let done = master.cli("reexec");
    assert_eq!((done.code, done.stdout.as_str()), (0, "re-executed\n"), "{done:#?}\n{}", master.log());
    let after = master.status();
    assert_eq!(after.master.reexecs, before.master.reexecs + 1);
    assert_eq!(after.master.pid, master.pid());
    // Worked out anew from two clocks each time.
    let [started, still] = [&before, &after].map(|one| one.master.started_at.parse::<Timestamp>().unwrap());
    assert!(started.duration_since(still).abs() < SignedDuration::from_secs(1), "{started} {still}");
}

/// Every worker there is.
fn workers(status: &Status) -> Vec<Option<u32>> {
    status.generations.iter().flat_map(|one| &one.workers).map(|worker| worker.pid).collect()
}

/// A program that can be exchanged: at first it is the one under test.
struct Program {
    path: PathBuf,
    next: PathBuf,
}

impl Program {
    fn new(world: &World) -> Program {
        let directory = world.path("bin");
        fs::create_dir(&directory).unwrap();
        let program = Program { path: directory.join("reuseportd"), next: world.path("next") };
        program.link_to(Path::new(REUSEPORTD));
        program
    }

    /// Puts a link in its place.
    fn link_to(&self, target: &Path) {
        std::os::unix::fs::symlink(target, &self.next).unwrap();
        fs::rename(&self.next, &self.path).unwrap();
    }

    /// Puts a copy in its place. By another process: what this one has open for writing, a child that is just being
    /// forked by another thread may have open too, and then nobody can execute it.
    fn become_copy(&self, of: &Path, mode: &str) {
        tool(&format!("install -m {mode} {} {}", of.display(), self.next.display()));
        fs::rename(&self.next, &self.path).unwrap();
    }

    /// Puts a shell script in its place.
    fn become_script(&self, text: &str) {
        let script = self.next.with_extension("sh");
        fs::write(&script, format!("#!/bin/sh\n{text}\n")).unwrap();
        self.become_copy(&script, "755");
    }

    /// Starts a master by this program's path.
    fn start<'a>(&self, world: &'a World, app: &App) -> Master<'a> {
        let mut master = Master::launch(world, app, Command::new(&self.path));
        master.wait_ready();
        master
    }
}

/// Which file a process executes.
fn executes(pid: u32) -> (u64, u64) {
    identity(&PathBuf::from(format!("/proc/{pid}/exe")))
}

fn identity(path: &Path) -> (u64, u64) {
    let file = fs::metadata(path).unwrap();
    (file.dev(), file.ino())
}

/// 1,500 connections a second, a third of them in bursts, and slow clients.
fn busy(world: &World) -> Spec {
    spec(world).rate(1000.0).burst(150, Duration::from_millis(300)).slow(20)
}

/// Re-execs while nothing else happens, and in the middle of upgrades.
fn reexecs_lose_nothing(engine: &'static str, mode: &str) {
    world(needs_of(engine), |world| {
        let app = App::test_worker(world, &format!("--mode {mode}")).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(busy(world));
        let count = rounds(3, 20);
        for round in 1..=count {
            if round % 2 == 0 {
                master.signal(Signal::HUP);
                reexec(&master);
            } else {
                let before = master.serving();
                reexec(&master);
                assert_eq!(master.serving(), before, "{}", master.log());
                master.hup();
            }
            let upgraded = |status: &Status| {
                status.active_generation == Some(round + 1) && status.state == MasterState::Steady
            };
            master.wait_status("upgraded", upgraded);
            load.answered_by(round + 1);
        }
        let report = load.end_lossless();
        assert_eq!(report.generations.len(), count as usize + 1, "{report}");
        assert_eq!(master.status().master.reexecs, count);
        master.stop();
    });
}

#[test]
fn under_load_sdk_ebpf() {
    reexecs_lose_nothing("ebpf", "sdk");
}

#[test]
fn under_load_sdk_cbpf() {
    reexecs_lose_nothing("cbpf", "sdk");
}

#[test]
fn under_load_unmodified_ebpf() {
    reexecs_lose_nothing("ebpf", "plain");
}

#[test]
fn under_load_unmodified_cbpf() {
    reexecs_lose_nothing("cbpf", "plain");
}

#[test]
fn under_load_with_sockets_of_the_master_ebpf() {
    reexecs_lose_nothing("ebpf", "activated");
}

#[test]
fn under_load_with_sockets_of_the_master_cbpf() {
    reexecs_lose_nothing("cbpf", "activated");
}

#[test]
fn the_same_load_shows_losses() {
    world(&[], |world| control_loses(world, busy(world), 0));
}

/// Re-executes again and again while a client waits: a deadline that began anew with each image would never come.
fn reexec_until_answered(master: &Master, mut waiting: Running) -> Done {
    let (begun, mut count) = (Instant::now(), 0);
    while waiting.is_running() {
        assert!(begun.elapsed() < PATIENCE, "after {count} re-execs:\n{}", master.log());
        let done = master.cli("reexec");
        assert_eq!(done.code, 0, "{done:#?}\n{}", master.log());
        count += 1;
    }
    assert!(count > 0, "the answer came before the first re-exec");
    waiting.finish(PATIENCE)
}
