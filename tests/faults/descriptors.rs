//! What there is too little of: processes, memory, descriptors.

use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use reuseportd_wire::status::{MasterState, Outcome as Upgraded, Receipt, Status};

use super::{Fault, Outcome, under_load};
use crate::crash::{one_at_a_time, queues_of_twenty};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::process::{Running, keepers_of, kill};
use crate::support::strace::{Refused, STRACE};
use crate::support::watch;
use crate::support::world::{Need, World};
use crate::unprivileged::{UID, installed};

/// An upgrade that comes to nothing, for a reason in these words: client, status and log say it, and the old workers
/// serve on.
pub(super) fn comes_to_nothing(master: &Master<'_>, outcome: Upgraded, words: &[&str]) -> Receipt {
    let before = master.serving();
    let (code, receipt) = master.failing_upgrade();
    assert_eq!((code, receipt.outcome), (1, outcome), "{receipt:#?}\n{}", master.log());
    let reason = receipt.reason.as_deref().unwrap_or_default();
    for word in words {
        assert!(reason.contains(word), "{word:?} is not in the reason: {reason}");
    }
    assert!(master.log().contains(reason), "not in the log: {reason}\n{}", master.log());
    assert_eq!(master.serving(), before, "the old workers were touched");
    receipt
}

/// The fault is over: an ordinary upgrade works, and nothing was lost.
pub(super) fn recovers(master: Master<'_>, load: Load) -> Outcome {
    let receipt = master.upgrade();
    load.answered_by(receipt.to.expect("a completed upgrade has a new generation"));
    let report = load.end();
    assert_eq!(report.strays, 0, "{report}\n{}", master.log());
    master.wait_status("a keeper, nothing said of it", |_| keepers_of(master.app()).len() == 1);
    master.stop();
    Outcome::lossless(report)
}

/// Handover workers that need 5 ms for each connection.
pub(super) fn slow_workers(world: &World, engine: &'static str) -> App {
    App::test_worker(world, "--mode sdk --accept-delay 5").engine(engine)
}

/// A soft limit of a running process that is lowered; raised again at the end.
pub(super) struct Lowered {
    pid: u32,
    what: &'static str,
    before: String,
}

impl Lowered {
    /// `what` is said as `prlimit` has it.
    pub(super) fn to(limit: u64, what: &'static str, pid: u32) -> Lowered {
        let before = prlimit(pid, &format!("--{what} --output SOFT --noheadings")).trim().to_owned();
        prlimit(pid, &format!("--{what}={limit}:"));
        Lowered { pid, what, before }
    }
}

impl Drop for Lowered {
    fn drop(&mut self) {
        prlimit(self.pid, &format!("--{}={}:", self.what, self.before));
    }
}

/// By the process's own user, who may do it everywhere.
fn prlimit(pid: u32, options: &str) -> String {
    let owner = fs::metadata(format!("/proc/{pid}")).unwrap().uid();
    let mut command = Command::new("prlimit");
    command.args(["--pid", &pid.to_string()]).args(options.split(' ')).uid(owner).gid(owner);
    let done = Running::start(command).finish(PATIENCE);
    assert_eq!(done.code, 0, "{done:?}");
    done.stdout
}

/// A master of an ordinary user, whom the kernel's limit on processes concerns; with what `ebpf` needs.
fn of_a_user(world: &World, engine: &'static str) -> (App, Command) {
    of_a_user_by(world, engine, &[])
}

/// The same, started by this command.
fn of_a_user_by(world: &World, engine: &'static str, by: &[&str]) -> (App, Command) {
    let (program, worker) = installed(world);
    let app = App::new(world, [&worker, "--mode", "sdk", "--accept-delay", "5", "--inline"]).engine(engine);
    let mut command = Command::new("setpriv");
    let user = UID.to_string();
    command.args(["--reuid", &user, "--regid", &user, "--clear-groups"]);
    if engine == "ebpf" {
        command.args(["--inh-caps=+bpf", "--ambient-caps=+bpf"]);
    }
    command.args(by).arg(program);
    (app, command)
}

const NO_PROCESS: &str = "cannot make a process: Resource temporarily unavailable";

#[test]
fn no_process_for_an_upgrade() {
    under_load(
        &Fault {
            name: "fork refused: EAGAIN (RLIMIT_NPROC)",
            when: "upgrade: the new workers",
            then: "rolled back, the reason names seat, step and error; the old workers are not touched",
            lost: "",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let (app, command) = of_a_user(world, engine);
            let mut master = Master::launch(world, &app, command);
            master.wait_ready();
            let load = load();
            let lowered = Lowered::to(1, "nproc", master.pid());
            comes_to_nothing(&master, Upgraded::RolledBack, &["seat 0", NO_PROCESS]);
            load.answered(300);
            drop(lowered);
            recovers(master, load)
        },
    );
}

#[test]
fn no_process_at_the_start() {
    under_load(
        &Fault {
            name: "fork refused: EAGAIN (RLIMIT_NPROC)",
            when: "start of the service",
            then: "the master ends with status 1 and the same reason; started again, it serves",
            lost: "",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let (app, limited) = of_a_user_by(world, engine, &["prlimit", "--nproc=1"]);
            let mut master = Master::launch(world, &app, limited);
            assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
            assert!(master.log().contains(NO_PROCESS), "{}", master.log());
            drop(master);
            let (_, command) = of_a_user(world, engine);
            let mut master = Master::launch(world, &app, command);
            master.wait_ready();
            recovers(master, load())
        },
    );
}

/// So many workers serve.
fn serve(workers: usize) -> impl FnMut(&Status) -> bool {
    move |status| watch::serving(status).count() == workers
}

/// A worker is killed, and no other can be started; then it can.
fn unfilled_seat<T>(
    master: Master<'_>,
    load: Load,
    words: &[&str],
    refuse: impl FnOnce(&Master<'_>) -> T,
    end: impl FnOnce(T),
) -> Outcome {
    let refused = refuse(&master);
    kill([master.serving()[0]]);
    let status = master.wait_status("a worker less", serve(3));
    load.answered(300);
    let log = master.log();
    for word in words {
        assert!(log.contains(word), "{word:?} is not in the log:\n{log}");
    }
    assert_eq!(status.state, MasterState::Steady, "{status:#?}");
    end(refused);
    master.wait_status("all serving", serve(4));
    let outcome = recovers(master, load);
    Outcome { excused: 1, ..outcome }
}

#[test]
fn no_process_for_a_respawn() {
    under_load(
        &Fault {
            name: "fork refused: EAGAIN (RLIMIT_NPROC)",
            when: "a worker was killed, its seat is to be filled",
            then: "siblings take its queue; tried again with backoff, each time with the reason in the log",
            lost: "the one connection in the killed worker's hands",
        },
        &[Need::Root],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let (app, command) = of_a_user(world, engine);
            let app = app.restart("breaker = { exits = 1000 }").restart("backoff_max = \"200ms\"");
            let mut master = Master::launch(world, &app, command);
            master.wait_ready();
            let refuse = |master: &Master<'_>| Lowered::to(1, "nproc", master.pid());
            unfilled_seat(master, load(), &[NO_PROCESS], refuse, drop)
        },
    );
}

const NO_MEMORY: &str = "cannot make a process: Cannot allocate memory";

#[test]
fn no_memory_for_an_upgrade() {
    under_load(
        &Fault {
            name: "fork refused: ENOMEM",
            when: "upgrade: the new workers",
            then: "rolled back, the reason names seat, step and error; the old workers are not touched",
            lost: "",
        },
        &[STRACE],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let master = Master::start(world, &slow_workers(world, engine));
            let load = load();
            let refused = Refused::calls(world, master.pid(), "clone", "ENOMEM", &[]);
            comes_to_nothing(&master, Upgraded::RolledBack, &["seat 0", NO_MEMORY]);
            assert!(refused.end() > 0, "nothing was refused");
            recovers(master, load)
        },
    );
}

#[test]
fn no_memory_for_a_respawn() {
    under_load(
        &Fault {
            name: "fork refused: ENOMEM",
            when: "a worker was killed, its seat is to be filled",
            then: "siblings take its queue; tried again with backoff, each time with the reason in the log",
            lost: "the one connection in the killed worker's hands",
        },
        &[STRACE],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let app = one_at_a_time(world, "sdk", engine).restart("backoff_max = \"200ms\"");
            let master = Master::start(world, &app);
            let refuse = |master: &Master<'_>| Refused::calls(world, master.pid(), "clone", "ENOMEM", &[]);
            unfilled_seat(master, load(), &[NO_MEMORY], refuse, |refused| assert!(refused.end() > 0))
        },
    );
}

/// Leaves a process so many descriptors besides those it has.
fn leave_descriptors(pid: u32, more: usize) -> Lowered {
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap();
    let open: Vec<u64> =
        open.map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap()).collect();
    let limit = (0..).filter(|number| !open.contains(number)).nth(more).unwrap();
    Lowered::to(limit, "nofile", pid)
}

const NO_DESCRIPTOR: &str = "Too many open files";

#[test]
fn no_descriptor_for_an_upgrade() {
    under_load(
        &Fault {
            name: "no descriptor left: EMFILE (RLIMIT_NOFILE lowered)",
            when: "upgrade: none for the config, or after 4, 8, 12, 16 more",
            then: "refused or rolled back, the reason names what could not be opened; the old workers are not touched",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let master = Master::start(world, &slow_workers(world, engine));
            let load = load();
            let before = master.serving();
            for more in [0, 4, 8, 12, 16] {
                let lowered = leave_descriptors(master.pid(), more);
                master.hup();
                drop(lowered);
                let receipt = master.status().last_upgrade.unwrap();
                let reason = receipt.reason.clone().unwrap_or_default();
                assert_ne!(receipt.outcome, Upgraded::Completed, "{receipt:#?}");
                assert!(reason.contains(NO_DESCRIPTOR), "{receipt:#?}");
                assert_eq!(master.serving(), before);
            }
            recovers(master, load)
        },
    );
}

#[test]
fn no_descriptor_for_the_sockets_of_workers() {
    under_load(
        &Fault {
            name: "no descriptor left: EMFILE (RLIMIT_NOFILE lowered)",
            when: "upgrade: the new workers hand over their sockets",
            then: "rolled back at once, the reason names the limit; the old workers are not touched",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            let before = master.serving();
            let says_so = world.path("says-so");
            nix::unistd::mkfifo(&says_so, Mode::from_bits_truncate(0o666)).unwrap();
            let mut says_so_to = fs::OpenOptions::new().read(true).write(true).open(&says_so).unwrap();
            let mut waiting = app.clone();
            let script = "read go <\"$0\"; exec \"$@\"";
            waiting.command = ["/bin/sh", "-c", script, says_so.to_str().unwrap()].map(String::from).into();
            waiting.command.extend(app.command.iter().cloned());
            waiting.write();
            let upgrade = master.begin("upgrade --wait --json");
            master.wait_status("launched", |status| {
                let new = status.generations.iter().find(|one| one.generation == 2);
                new.is_some_and(|new| new.workers.iter().all(|worker| worker.pid.is_some()))
            });
            let lowered = leave_descriptors(master.pid(), 0);
            says_so_to.write_all(&b"go\n".repeat(4)).unwrap();
            let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
            drop(lowered);
            assert_eq!((code, receipt.outcome), (1, Upgraded::RolledBack), "{receipt:#?}");
            let reason = receipt.reason.unwrap_or_default();
            assert!(reason.contains("limit on open files is reached"), "{reason}");
            assert_eq!(master.serving(), before);
            app.write();
            recovers(master, load)
        },
    );
}

#[test]
fn no_descriptor_while_old_workers_leave() {
    under_load(
        &Fault {
            name: "no descriptor left: EMFILE (RLIMIT_NOFILE lowered)",
            when: "upgrade: from before the switch until the old workers have left",
            then: "completed: looking at queues needs no further descriptor; the log says what else could not be done",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = App::test_worker(world, "--mode plain --accept-delay 5").engine(engine);
            let app = app.upgrade("bake = \"500ms\"");
            let master = Master::start(world, &app);
            let load = load();
            let upgrade = master.begin("upgrade --wait=drained --json");
            master.wait_status("baking", |status| status.state == MasterState::Baking);
            let lowered = Lowered::to(3, "nofile", master.pid());
            let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
            drop(lowered);
            assert!(master.log().contains(NO_DESCRIPTOR), "{}", master.log());
            assert_eq!((code, receipt.outcome), (0, Upgraded::Completed), "{receipt:#?}");
            recovers(master, load)
        },
    );
}

#[test]
fn no_descriptor_for_clients() {
    under_load(
        &Fault {
            name: "no descriptor left: EMFILE (RLIMIT_NOFILE lowered)",
            when: "control clients connect, five of them silent",
            then: "each who finds no room is told why, and what to raise; the master does not spin",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let app = slow_workers(world, engine);
            let master = Master::start(world, &app);
            let load = load();
            let lowered = leave_descriptors(master.pid(), 3);
            let silent: Vec<UnixStream> =
                (0..5).map(|_| UnixStream::connect(app.runtime_file("")).unwrap()).collect();
            let before = cpu_time(master.pid());
            for _ in 0..5 {
                master.cli("status").refused(&[NO_DESCRIPTOR, "LimitNOFILE="]);
                load.answered(100);
            }
            let used = cpu_time(master.pid()) - before;
            assert!(used < Duration::from_millis(300), "{used:?} of the processor's time");
            drop(lowered);
            master.status();
            drop(silent);
            recovers(master, load)
        },
    );
}

/// Time that a process has been on a processor.
fn cpu_time(pid: u32) -> Duration {
    let text = fs::read_to_string(format!("/proc/{pid}/schedstat")).unwrap();
    Duration::from_nanos(text.split(' ').next().unwrap().parse().unwrap())
}

#[test]
fn no_descriptor_in_the_whole_system() {
    under_load(
        &Fault {
            name: "no descriptor left in the system: ENFILE",
            when: "upgrade: none for the config, or for the workers' channels; then none for a client",
            then: "refused or rolled back for that reason; the client waits until it can be let in, or told",
            lost: "",
        },
        &[STRACE],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let master = Master::start(world, &slow_workers(world, engine));
            let load = load();
            const WORDS: &str = "Too many open files in system";
            let refused = Refused::calls(world, master.pid(), "openat", "ENFILE", &[]);
            master.hup();
            assert!(refused.end() > 0);
            let receipt = master.status().last_upgrade.unwrap();
            assert_eq!(receipt.outcome, Upgraded::Refused);
            assert!(receipt.reason.as_ref().is_some_and(|reason| reason.contains(WORDS)), "{receipt:#?}");
            let refused = Refused::calls(world, master.pid(), "socketpair", "ENFILE", &[]);
            comes_to_nothing(&master, Upgraded::RolledBack, &["seat 0", WORDS]);
            assert!(refused.end() > 0);
            let began = Instant::now();
            let refused = Refused::calls(world, master.pid(), "accept4", "ENFILE", &[]);
            let status = master.begin("status");
            load.answered(200);
            let refusals = refused.end();
            // Two in a tenth of a second, and not as many as fit into it.
            let most = 4 + began.elapsed().as_millis() / 50;
            assert!((1..=most).contains(&(refusals as u128)), "{refusals} refusals, {most} at the most");
            // Let in, or told why not by what became free just then.
            let done = status.finish(PATIENCE);
            if done.code != 0 {
                done.refused(&[WORDS]);
            }
            recovers(master, load)
        },
    );
}
