//! Files and directories that are full, read-only, gone, or replaced.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use nix::sched::{CloneFlags, unshare};
use reuseportd_wire::status::Outcome as Upgraded;

use super::descriptors::{recovers, slow_workers};
use super::{Fault, Outcome, under_load};
use crate::crash::{kill_the_fullest, one_at_a_time, queues_of_twenty};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::process::{keepers_of, kill};
use crate::support::strace::{Refused, STRACE};
use crate::support::world::{Need, World, tool};

/// A mount that only this test's thread and its children see.
struct Mounted(PathBuf);

impl Mounted {
    /// A file system of its own for the runtime directory, which is soon full.
    fn small(world: &World) -> Mounted {
        unshare(CloneFlags::CLONE_NEWNS).unwrap();
        tool("mount --make-rprivate /");
        let path = world.path("small");
        fs::create_dir(&path).unwrap();
        tool(&format!("mount -t tmpfs -o size=256k,nr_inodes=64,mode=711 tmpfs {}", path.display()));
        Mounted(path)
    }

    /// The app with its runtime directory here.
    fn holds(&self, app: App) -> App {
        app.socket(self.0.join("run/control.sock"))
    }

    /// What is here can only be read from now on.
    fn read_only(&self) -> Mounted {
        let path = self.0.display();
        tool(&format!("mount --bind {path} {path}"));
        tool(&format!("mount -o remount,bind,ro {path}"));
        Mounted(self.0.clone())
    }

    /// Neither a byte nor a name more.
    fn fill(&self) -> Filled {
        let mut files = Vec::new();
        let blocks = self.0.join("blocks");
        assert_eq!(fs::write(&blocks, vec![0; 1 << 20]).unwrap_err().raw_os_error(), Some(nix::libc::ENOSPC));
        files.push(blocks);
        let names = (0..).map(|number| self.0.join(format!("name-{number}")));
        files.extend(names.take_while(|name| fs::File::create(name).is_ok()));
        Filled(files)
    }
}

impl Drop for Mounted {
    fn drop(&mut self) {
        tool(&format!("umount --lazy {}", self.0.display()));
    }
}

/// What fills a directory, until it is dropped.
struct Filled(Vec<PathBuf>);

impl Drop for Filled {
    fn drop(&mut self) {
        for file in &self.0 {
            fs::remove_file(file).unwrap();
        }
    }
}

/// Processes that the journal names.
fn journalled(path: &Path) -> Vec<u32> {
    let text = fs::read_to_string(path).unwrap();
    let journal: serde_json::Value = serde_json::from_str(&text).unwrap();
    let workers = journal["workers"].as_array().unwrap();
    let mut pids: Vec<u32> =
        workers.iter().map(|worker| u32::try_from(worker["pid"].as_u64().unwrap()).unwrap()).collect();
    pids.sort_unstable();
    pids
}

/// An upgrade that goes on though the journal can't be written, for which the log gives this reason. Once that is over,
/// the journal is right.
fn goes_on<T>(
    world: &World,
    app: &App,
    load: &dyn Fn() -> Load,
    why: &str,
    refuse: impl FnOnce(&Master<'_>) -> T,
    end: impl FnOnce(T),
) -> Outcome {
    let master = Master::start(world, app);
    let load = load();
    let refused = refuse(&master);
    let receipt = master.upgrade();
    assert_eq!(receipt.outcome, Upgraded::Completed);
    said(&master, why);
    load.answered(200);
    end(refused);
    journal_becomes_right(app, &master);
    recovers(master, load)
}

/// The log says once why the state is not saved.
fn said(master: &Master<'_>, why: &str) {
    let log = master.log();
    let told: Vec<&str> = log.lines().filter(|line| line.contains("event=\"not_saved\"")).collect();
    assert!(told.len() == 1 && told[0].contains(why), "{why:?}: {told:#?}\n{log}");
}

fn journal_becomes_right(app: &App, master: &Master<'_>) {
    let deadline = Instant::now() + PATIENCE;
    let mut serving = master.serving();
    serving.sort_unstable();
    while journalled(&app.runtime_file(".journal")) != serving {
        assert!(Instant::now() < deadline, "{serving:?} is not in the journal:\n{}", master.log());
        master.status();
    }
}

const FULL: &str = "No space left on device";

#[test]
fn a_full_runtime_directory_in_an_upgrade() {
    under_load(
        &Fault {
            name: "runtime directory full: ENOSPC",
            when: "upgrade",
            then: "completed; the log says that the journal is old, which is tried again every second",
            lost: "",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let run = Mounted::small(world);
            let app = run.holds(slow_workers(world, engine));
            goes_on(world, &app, load, FULL, |_| run.fill(), drop)
        },
    );
}

#[test]
fn a_full_runtime_directory_and_a_worker_dies() {
    under_load(
        &Fault {
            name: "runtime directory full: ENOSPC",
            when: "a worker is killed",
            then: "the seat is filled again at once; the log says that the journal is old",
            lost: "the one connection in each worker's hands",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            const KILLS: u32 = 2;
            let run = Mounted::small(world);
            let app = run.holds(one_at_a_time(world, "sdk", engine));
            let master = Master::start(world, &app);
            let load = load();
            let filled = run.fill();
            kill_the_fullest(&master, &load, KILLS);
            said(&master, FULL);
            drop(filled);
            journal_becomes_right(&app, &master);
            Outcome { excused: KILLS.into(), ..recovers(master, load) }
        },
    );
}

#[test]
fn a_full_runtime_directory_and_the_master_dies() {
    under_load(
        &Fault {
            name: "runtime directory full: ENOSPC",
            when: "the master is killed, the next one starts",
            then: "it takes over from the keeper, which needs no room on any disk",
            lost: "",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let run = Mounted::small(world);
            let mut master = Master::start(world, &run.holds(slow_workers(world, engine)));
            let load = load();
            let filled = run.fill();
            master.kill();
            load.answered(200);
            master.restart();
            master.wait_adopted();
            drop(filled);
            recovers(master, load)
        },
    );
}

const READ_ONLY: &str = "Read-only file system";

#[test]
fn a_read_only_runtime_directory_in_an_upgrade() {
    under_load(
        &Fault {
            name: "runtime directory read-only: EROFS",
            when: "upgrade",
            then: "completed; the log says that the journal is old, which is tried again every second",
            lost: "",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let run = Mounted::small(world);
            let app = run.holds(slow_workers(world, engine));
            goes_on(world, &app, load, READ_ONLY, |_| run.read_only(), drop)
        },
    );
}

#[test]
fn a_read_only_runtime_directory_and_the_keeper_dies() {
    under_load(
        &Fault {
            name: "runtime directory read-only: EROFS",
            when: "the keeper is killed, then an upgrade",
            then: "completed; the log says that there is no keeper, and why; one is tried for again and again",
            lost: "",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let run = Mounted::small(world);
            let master = Master::start(world, &run.holds(slow_workers(world, engine)));
            let load = load();
            let read_only = run.read_only();
            kill(keepers_of(&world.app));
            master.upgrade();
            let log = master.log();
            let mut told = log.lines().filter(|line| line.contains("event=\"no_keeper\""));
            assert!(told.any(|line| line.contains(READ_ONLY)), "{log}");
            drop(read_only);
            recovers(master, load)
        },
    );
}

#[test]
fn the_journal_cannot_be_written() {
    under_load(
        &Fault {
            name: "writing the journal fails: EIO",
            when: "upgrade",
            then: "completed; the log says that the journal is old, which is tried again every second",
            lost: "",
        },
        &[STRACE],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine);
            let path = app.runtime_file(".journal.new");
            let path = path.to_str().unwrap();
            let refuse =
                |master: &Master<'_>| Refused::calls(world, master.pid(), "write", "EIO", &["-P", path]);
            goes_on(world, &app, load, "Input/output error", refuse, |refused| assert!(refused.end() > 0))
        },
    );
}
