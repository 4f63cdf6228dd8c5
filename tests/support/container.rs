//! The master as the first process of a PID namespace: one made by hand, or that of a container engine.

use std::fs;
use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::OnceLock;
use std::thread;
use std::time::Instant;

use nix::sched::{CloneFlags, unshare};

use super::PATIENCE;
use super::app::App;
use super::master::{Master, REUSEPORTD};
use super::process::{Done, Running, processes_of};
use super::world::{Need, World, example};

const BOX: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/machine/container-box");

/// A container engine that runs here.
const ENGINE: Need = Need::Runs(BOX, &["check"]);

/// Its image, in which the tests' programs run.
const IMAGE: &str = "debian:bookworm-slim";

/// What makes a process the first one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Around {
    /// Namespaces of its own, and nothing else.
    Namespaces,
    /// The container engine with its defaults: few capabilities, a seccomp profile.
    Engine,
    /// The container engine with what the `ebpf` engine needs.
    EngineWithBpf,
}

impl Around {
    /// What this can't do without.
    pub(crate) fn needs(self) -> &'static [Need] {
        match self {
            Around::Namespaces => &[Need::Root, Need::Bpf],
            Around::Engine => &[Need::Root, ENGINE],
            Around::EngineWithBpf => &[Need::Root, Need::Bpf, ENGINE],
        }
    }

    /// Starts a master as PID 1, and waits until its first generation serves. Paths, network and control socket are
    /// the world's: all the harness can do with a master it can do with this one.
    pub(crate) fn start<'a>(self, world: &'a World, app: &App) -> FirstProcess<'a> {
        let options: &[&str] = match self {
            Around::Namespaces => {
                return FirstProcess::new(Master::launch_by(world, app, by_hand(), in_new_namespace));
            }
            Around::Engine => &[],
            Around::EngineWithBpf => &["--cap-add=BPF", "--security-opt=seccomp=unconfined"],
        };
        FirstProcess::new(Master::launch(world, app, run(world, options, &[REUSEPORTD])))
    }
}

/// A shell that sees the processes of its own namespace in /proc, and becomes the master.
fn by_hand() -> Command {
    let mut command = Command::new("unshare");
    let script = "mount -t proc proc /proc && exec \"$@\"";
    command.args(["--mount", "--propagation=private", "sh", "-c", script, "-", REUSEPORTD]);
    command
}

/// A thread that has left its PID namespace can start no threads: so one that does nothing else.
fn in_new_namespace(mut command: Command) -> Child {
    let start = move || {
        unshare(CloneFlags::CLONE_NEWPID).expect("root may make a PID namespace");
        command.spawn().unwrap()
    };
    thread::spawn(start).join().unwrap()
}

/// `podman run` in the world's network, with what the tests need of the file system in its place.
pub(crate) fn run(world: &World, options: &[&str], command: &[&str]) -> Command {
    let programs = Path::new(REUSEPORTD).parent().unwrap().display();
    let mut run = podman(&["run", "--rm", "--sdnotify=ignore", "--env=NOTIFY_SOCKET"]);
    run.args([&network(), "--volume", &format!("{programs}:{programs}:ro")]);
    run.args(["--volume", &format!("{0}:{0}", world.path("").display())]);
    run.args(options).arg(IMAGE).args(command);
    run
}

/// The network namespace of this thread, which is the world's.
fn network() -> String {
    format!("--network=ns:/proc/{}/task/{}/ns/net", std::process::id(), rustix::thread::gettid())
}

/// The engine, set up at its first use; it ends with this program.
fn podman(arguments: &[&str]) -> Command {
    static BOXES: OnceLock<(Child, String)> = OnceLock::new();
    let (_, pid) = BOXES.get_or_init(|| {
        let mut command = Command::new(BOX);
        command.arg("up").args([Path::new(REUSEPORTD), &example("test_worker")]);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut pid = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut pid).unwrap();
        assert!(!pid.is_empty(), "{BOX} does not come up");
        (child, pid.trim().to_owned())
    });
    let mut command = Command::new(BOX);
    command.args(["exec", pid, "podman"]).args(arguments);
    command
}

/// Runs podman, which must succeed: what it prints.
pub(crate) fn podman_done(arguments: &[&str]) -> String {
    let done = Running::start(podman(arguments)).finish(PATIENCE);
    assert_eq!(done.code, 0, "{arguments:?}: {done:#?}");
    done.stdout.trim().to_owned()
}

/// A master that is PID 1 where it is.
#[derive(Debug)]
pub(crate) struct FirstProcess<'a> {
    pub(crate) master: Master<'a>,
    /// Its pid out here.
    pub(crate) pid: u32,
}

impl FirstProcess<'_> {
    fn new(mut master: Master<'_>) -> FirstProcess<'_> {
        master.wait_ready();
        assert_eq!(master.status().master.pid, 1);
        let workers = processes_of(master.app());
        // The workers' parent, wherever they were started.
        let parents = workers.iter().filter_map(|worker| Some(Relative::read(worker.pid)?.parent));
        let pid = parents.filter(|pid| inner_pid(*pid) == Some(1)).min().expect("the parent of a worker");
        FirstProcess { master, pid }
    }

    /// Its children, zombies included.
    pub(crate) fn children(&self) -> Vec<Relative> {
        let pids = fs::read_dir("/proc").unwrap();
        let pids = pids.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
        pids.filter_map(Relative::read).filter(|one| one.parent == self.pid).collect()
    }

    /// Looks at its children until they are as wanted; each look is preceded by a round trip, which paces it.
    pub(crate) fn wait_children(&self, what: &str, wanted: impl Fn(&[Relative]) -> bool) -> Vec<Relative> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            self.master.status();
            let children = self.children();
            if wanted(&children) {
                return children;
            }
            assert!(Instant::now() < deadline, "never {what}: {children:#?}\n{}", self.master.log());
        }
    }

    /// Processor time it has used, in clock ticks (100 a second).
    pub(crate) fn ticks(&self) -> u64 {
        let stat = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap();
        let fields = stat.rsplit_once(") ").unwrap().1.split(' ').skip(11).take(2);
        fields.map(|field| field.parse::<u64>().unwrap()).sum()
    }
}

/// A process as its parent sees it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Relative {
    pub(crate) pid: u32,
    parent: u32,
    /// Of its program.
    pub(crate) name: String,
    pub(crate) is_zombie: bool,
}

impl Relative {
    /// `None` when it is gone.
    fn read(pid: u32) -> Option<Relative> {
        let stat = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
        let (head, tail) = stat.rsplit_once(") ")?;
        let mut fields = tail.split(' ');
        let is_zombie = fields.next()? == "Z";
        let parent = fields.next()?.parse().ok()?;
        Some(Relative { pid, parent, name: head.split_once('(')?.1.to_owned(), is_zombie })
    }
}

/// Its pid in the innermost namespace.
fn inner_pid(pid: u32) -> Option<u32> {
    let status = fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    status.lines().find_map(|line| line.strip_prefix("NSpid:"))?.split_whitespace().last()?.parse().ok()
}

/// A container in the background, gone with this.
#[derive(Debug)]
pub(crate) struct Container {
    name: String,
}

impl Container {
    /// Starts one by `podman run`'s options, image and arguments.
    pub(crate) fn start(world: &World, arguments: &[&str]) -> Container {
        let container = Container { name: world.app.clone() };
        podman_done(&[&["run", "--detach", "--name", &container.name, &network()], arguments].concat());
        container
    }

    /// A command in it.
    pub(crate) fn exec(&self, command: &str) -> Done {
        let words: Vec<&str> = command.split_whitespace().collect();
        Running::start(podman(&[&["exec", &self.name], &words[..]].concat())).finish(PATIENCE)
    }

    pub(crate) fn signal(&self, signal: &str) {
        podman_done(&["kill", "--signal", signal, &self.name]);
    }

    /// What it has written.
    pub(crate) fn log(&self) -> String {
        let done = Running::start(podman(&["logs", &self.name])).finish(PATIENCE);
        done.stdout + &done.stderr
    }

    /// `podman stop`: its exit code.
    pub(crate) fn stop(&self) -> String {
        podman_done(&["stop", "--time", "30", &self.name]);
        podman_done(&["wait", &self.name])
    }
}

impl Drop for Container {
    fn drop(&mut self) {
        if thread::panicking() {
            eprintln!("--- log of the container:\n{}", self.log());
        }
        Running::start(podman(&["rm", "--force", "--time", "0", &self.name])).finish(PATIENCE);
    }
}
