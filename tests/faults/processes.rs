//! Processes that are killed, stopped, frozen or starved.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use reuseportd_wire::status::{MasterState, Status};
use rustix::process::Signal;

use super::descriptors::{recovers, slow_workers};
use super::{Fault, Outcome, under_load};
use crate::crash::{kill_the_fullest, one_at_a_time, queues_of_twenty};
use crate::support::app::{App, test_worker};
use crate::support::load::slow_accepts;
use crate::support::master::Master;
use crate::support::process::{keepers_of, kill, processes_of, signal, wait_gone};
use crate::support::watch;
use crate::support::world::{Need, World};
use crate::watchdog::restarts;

#[test]
fn a_worker_is_killed() {
    const KILLS: u32 = 2;
    under_load(
        &Fault {
            name: "SIGKILL of a worker",
            when: "handover worker with a long queue, siblings serve",
            then: "the seat is filled again at once; siblings take its queue",
            lost: "the one connection in each worker's hands",
        },
        &[],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let master = Master::start(world, &one_at_a_time(world, "sdk", engine));
            let load = load();
            kill_the_fullest(&master, &load, KILLS);
            let report = load.end();
            master.stop();
            Outcome { report, excused: KILLS.into() }
        },
    );
}

#[test]
fn a_leader_of_a_process_group_is_killed() {
    under_load(
        &Fault {
            name: "SIGKILL of a worker with children",
            when: "plain worker behind a shell, its leader; siblings serve",
            then: "what is left of its process group is ended, the seat is filled again, and no process is left over",
            lost: "what its children had accepted; under cbpf also what waited in their queues, which is counted",
        },
        &[],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let mut app = one_at_a_time(world, "plain", engine);
            let script = "sleep 1000 & \"$0\" \"$@\" & wait".to_owned();
            app.command.splice(0..0, ["/bin/sh".to_owned(), "-c".to_owned(), script]);
            let master = Master::start(world, &app);
            let load = load();
            kill([master.serving()[0]]);
            let is_filled = |status: &Status| restarts(status) == 1 && watch::serving(status).count() == 4;
            master.wait_status("filled again", is_filled);
            master.wait_status("three processes each", |_| processes_of(&world.app).len() == 12);
            load.answered(300);
            let counted = master.counted_losses();
            assert!(engine == "cbpf" || counted == 0, "{counted}");
            Outcome { excused: counted + 1, ..recovers(master, load) }
        },
    );
}

#[test]
fn a_worker_is_stopped() {
    under_load(
        &Fault {
            name: "SIGSTOP of a worker, SIGCONT later",
            when: "siblings serve; no watchdog",
            then: "it keeps its part of the new connections, which wait; status shows its queue grow",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let master = Master::start(world, &slow_workers(world, engine));
            let (load, before) = (load(), master.serving());
            signal(before[0], Signal::STOP);
            master.wait_status("a long queue", |status| queue_of(status, before[0]) >= 100);
            assert_eq!((master.serving(), restarts(&master.status())), (before.clone(), 0));
            signal(before[0], Signal::CONT);
            master.wait_status("a short queue", |status| queue_of(status, before[0]) < 100);
            recovers(master, load)
        },
    );
}

fn queue_of(status: &Status, pid: u32) -> u32 {
    let workers = status.generations.iter().flat_map(|one| &one.workers).filter(|one| one.pid == Some(pid));
    workers.flat_map(|worker| &worker.listeners).filter_map(|listener| listener.accept_queue).sum()
}

#[test]
fn a_worker_is_stopped_and_watched() {
    under_load(
        &Fault {
            name: "SIGSTOP of a worker",
            when: "siblings serve; with a watchdog",
            then: "after watchdog.timeout it is killed and its seat filled again; siblings take its queue",
            lost: "the one connection in its hands",
        },
        &[],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let master = Master::start(world, &one_at_a_time(world, "sdk", engine).watchdog("3s"));
            let (load, before) = (load(), master.serving());
            signal(before[0], Signal::STOP);
            master.wait_status("replaced", |status| restarts(status) == 1);
            wait_gone(before[0], crate::support::PATIENCE);
            assert!(master.log().contains(&format!("pid {}) gave no sign of life", before[0])));
            load.answered(300);
            Outcome { excused: 1, ..recovers(master, load) }
        },
    );
}

#[test]
fn the_master_is_stopped() {
    under_load(
        &Fault {
            name: "SIGSTOP of the master, SIGCONT later",
            when: "for a second, in which a SIGHUP comes and a worker is killed",
            then: "workers serve on; when it goes on the seat is filled again, and the upgrade is made",
            lost: "the one connection in the killed worker's hands",
        },
        &[],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let mut master = Master::start(world, &one_at_a_time(world, "sdk", engine));
            let load = load();
            let worker = master.serving()[0];
            master.signal(Signal::STOP);
            master.signal(Signal::HUP);
            kill([worker]);
            load.answered(200);
            assert_eq!(master.wait_end(Duration::from_secs(1)), None);
            assert!(processes_of(&world.app).iter().all(|one| one.generation == 1));
            master.signal(Signal::CONT);
            load.heard_from(2);
            master.wait_status("upgraded", |status| {
                status.state == MasterState::Steady && status.generations.len() == 1
            });
            Outcome { excused: 1, ..recovers(master, load) }
        },
    );
}

/// A control group, gone when it is dropped.
struct Cgroup(PathBuf);

/// Cgroup v2 can be had.
const CGROUPS: Need = Need::Runs("sh", &["-c", "test $(id -u) = 0 && grep -q ' cgroup2 ' /proc/mounts"]);

impl Cgroup {
    fn new(world: &World, controller: Option<&str>) -> Cgroup {
        let mounts = fs::read_to_string("/proc/mounts").unwrap();
        let old = controller.map(|name| Path::new("/sys/fs/cgroup").join(name)).filter(|path| path.is_dir());
        let place = old.unwrap_or_else(|| {
            let line = mounts.lines().find(|line| line.split(' ').nth(2) == Some("cgroup2"));
            let place = PathBuf::from(line.and_then(|line| line.split(' ').nth(1)).expect("cgroup v2"));
            if let Some(name) = controller {
                fs::write(place.join("cgroup.subtree_control"), format!("+{name}")).unwrap();
            }
            place
        });
        let path = place.join(format!("reuseportd-faults-{}", world.app));
        fs::create_dir(&path).unwrap();
        Cgroup(path)
    }

    fn takes(&self, pids: impl IntoIterator<Item = u32>) {
        for pid in pids {
            fs::write(self.0.join("cgroup.procs"), pid.to_string()).unwrap();
        }
    }

    fn freeze(&self, is_frozen: bool) {
        fs::write(self.0.join("cgroup.freeze"), u8::from(is_frozen).to_string()).unwrap();
        let said = format!("frozen {}", u8::from(is_frozen));
        let deadline = std::time::Instant::now() + crate::support::PATIENCE;
        while !fs::read_to_string(self.0.join("cgroup.events")).unwrap().contains(&said) {
            assert!(std::time::Instant::now() < deadline, "never {said}");
        }
    }
}

impl Drop for Cgroup {
    fn drop(&mut self) {
        let _ = fs::write(self.0.join("cgroup.freeze"), "0");
        let root = self.0.parent().unwrap().join("cgroup.procs");
        for pid in fs::read_to_string(self.0.join("cgroup.procs")).unwrap_or_default().lines() {
            let _ = fs::write(&root, pid);
        }
        let _ = fs::remove_dir(&self.0);
    }
}

#[test]
fn a_worker_is_frozen() {
    under_load(
        &Fault {
            name: "a worker's cgroup frozen, thawed later",
            when: "siblings serve; then an upgrade",
            then: "as if stopped: its connections wait; an upgrade waits for it in retiring, and completes when it is thawed",
            lost: "",
        },
        &[CGROUPS],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let cgroup = Cgroup::new(world, None);
            let app = App::test_worker(world, "--mode plain --accept-delay 5").engine(engine);
            let master = Master::start(world, &app);
            let (load, frozen) = (load(), master.serving()[0]);
            cgroup.takes([frozen]);
            cgroup.freeze(true);
            master.wait_status("a queue", |status| queue_of(status, frozen) >= 50);
            assert_eq!(master.cli("upgrade").code, 0);
            master.wait_status("retiring", |status| status.state == MasterState::Retiring);
            load.answered_by(2);
            load.answered(100);
            assert_eq!(master.status().state, MasterState::Retiring, "nobody waits for the frozen one");
            cgroup.freeze(false);
            master.wait_status("steady", |status| status.state == MasterState::Steady);
            let outcome = recovers(master, load);
            drop(cgroup);
            outcome
        },
    );
}

#[test]
fn all_is_frozen() {
    under_load(
        &Fault {
            name: "the whole service frozen (cgroup)",
            when: "master, keeper and workers, for a second in an upgrade; with a watchdog",
            then: "thawed, all go on: no worker is held to be silent, the keeper stays, the upgrade completes",
            lost: "",
        },
        &[CGROUPS],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let cgroup = Cgroup::new(world, None);
            let mut app = slow_workers(world, engine).watchdog("3s");
            let mut master = Master::start(world, &app);
            let load = load();
            app.command = test_worker("--mode sdk --accept-delay 5 --ready-delay 1000");
            app.write();
            assert_eq!(master.cli("upgrade").code, 0);
            master.wait_status("launching", |status| {
                status.state == MasterState::Launching && processes_of(&world.app).len() == 8
            });
            let keepers = keepers_of(&world.app);
            cgroup.takes(processes_of(&world.app).iter().map(|one| one.pid));
            cgroup.takes(keepers.iter().copied().chain([master.pid()]));
            cgroup.freeze(true);
            assert_eq!(master.wait_end(Duration::from_secs(1)), None);
            cgroup.freeze(false);
            load.heard_from(2);
            let status = master.wait_status("steady", |status| {
                status.state == MasterState::Steady && status.generations.len() == 1
            });
            assert_eq!((restarts(&status), keepers_of(&world.app)), (0, keepers), "{}", master.log());
            let outcome = recovers(master, load);
            drop(cgroup);
            outcome
        },
    );
}

#[test]
fn a_worker_is_out_of_memory() {
    under_load(
        &Fault {
            name: "out of memory: the kernel kills a worker",
            when: "its memory cgroup is full; siblings serve",
            then: "as after SIGKILL: the seat is filled again, siblings take its queue; the log names the signal",
            lost: "what it had accepted and not answered",
        },
        &[CGROUPS],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let cgroup = Cgroup::new(world, Some("memory"));
            let limit = ["memory.limit_in_bytes", "memory.max"].map(|name| cgroup.0.join(name));
            let limit = limit.iter().find(|path| path.exists()).expect("a limit");
            let app = slow_workers(world, engine).restart("breaker = { exits = 1000 }");
            let master = Master::start(world, &app);
            let (load, worker) = (load(), master.serving()[0]);
            fs::write(limit, "65536").unwrap();
            cgroup.takes([worker]);
            let is_filled = |status: &Status| restarts(status) == 1 && watch::serving(status).count() == 4;
            master.wait_status("filled again", is_filled);
            let log = master.log();
            let told = log.lines().any(|line| line.contains(&worker.to_string()) && line.contains("SIGKILL"));
            assert!(told, "{log}");
            load.answered(300);
            let outcome = recovers(master, load);
            drop(cgroup);
            Outcome { excused: 2, ..outcome }
        },
    );
}
