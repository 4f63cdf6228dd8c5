//! A machine of its own, as far as a service sees it: a real systemd as PID 1, in a container that ends with the test.

use std::fs;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use nix::sched::{CloneFlags, setns};

use super::PATIENCE;
use super::master::REUSEPORTD;
use super::process::{Done, Running, wait};
use super::world::{Need, World, example, repository, sysctl, world};

const SCRIPT: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/machine/systemd-box");

/// The program under test, inside.
pub(crate) const PROGRAM: &str = "/usr/bin/reuseportd";
/// The difficult worker, inside.
pub(crate) const WORKER: &str = "/srv/web/worker";

/// Which systemd.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Systemd {
    /// Debian 12's.
    V252,
    /// Debian 13's.
    V257,
}

/// A booted machine with the program and the shipped unit installed.
#[derive(Debug)]
pub(crate) struct Machine {
    script: Child,
    /// Of its PID 1, as seen from here.
    pid: String,
}

/// Runs a test on a machine whose network this thread is in, or says on stderr why it is skipped. Only with `bpf` may
/// anybody on it load BPF programs.
pub(crate) fn machine(systemd: Systemd, bpf: bool, body: impl FnOnce(&World, &Machine) + Send) {
    let (suite, check) = match systemd {
        Systemd::V252 => ("bookworm", &["check", "bookworm"]),
        Systemd::V257 => ("trixie", &["check", "trixie"]),
    };
    world(&[Need::Runs(SCRIPT, check)], |world| {
        let machine = Machine::boot(suite, bpf);
        machine.install();
        machine.enter_network();
        body(world, &machine);
    });
}

impl Machine {
    fn boot(suite: &str, bpf: bool) -> Machine {
        let mut command = Command::new(SCRIPT);
        command.args(["boot", suite]).args(bpf.then_some("--bpf"));
        // It ends with its stdin, so also when this process is killed.
        let mut script = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().unwrap();
        let mut pid = String::new();
        BufReader::new(script.stdout.take().unwrap()).read_line(&mut pid).unwrap();
        assert!(!pid.is_empty(), "no machine of {suite}");
        Machine { script, pid: pid.trim().to_owned() }
    }

    fn install(&self) {
        for (from, to) in [(Path::new(REUSEPORTD), PROGRAM), (&example("test_worker"), WORKER)] {
            let to = self.path(to);
            fs::create_dir_all(to.parent().unwrap()).unwrap();
            fs::copy(from, &to).unwrap();
            fs::set_permissions(&to, fs::Permissions::from_mode(0o755)).unwrap();
        }
        let unit = fs::read_to_string(repository("deploy/reuseportd@.service")).unwrap();
        self.write("/etc/systemd/system/reuseportd@.service", &unit);
    }

    /// From now on this thread, and what it starts, is in the machine's network.
    fn enter_network(&self) {
        let network = fs::File::open(format!("/proc/{}/ns/net", self.pid)).unwrap();
        setns(network, CloneFlags::CLONE_NEWNET).unwrap();
        sysctl("net.ipv4.ip_local_port_range", "10000 65000");
    }

    /// Where a file of the machine is from here.
    pub(crate) fn path(&self, inside: &str) -> PathBuf {
        PathBuf::from(format!("/proc/{}/root{inside}", self.pid))
    }

    /// Writes a file of the machine.
    pub(crate) fn write(&self, inside: &str, text: &str) {
        let path = self.path(inside);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, text).unwrap();
    }

    /// A shell command on the machine, as root, that goes on beside the test.
    pub(crate) fn begin(&self, line: &str) -> Running {
        let mut command = Command::new(SCRIPT);
        command.args(["exec", &self.pid, "sh", "-c", line]);
        Running::start(command)
    }

    /// A shell command.
    pub(crate) fn run(&self, line: &str) -> Done {
        self.begin(line).finish(PATIENCE)
    }

    /// A shell command that must succeed: what it prints.
    pub(crate) fn tell(&self, line: &str) -> String {
        let done = self.run(line);
        assert_eq!(done.code, 0, "{line}: {done:#?}");
        done.stdout.trim_end().to_owned()
    }
}

impl Drop for Machine {
    fn drop(&mut self) {
        drop(self.script.stdin.take());
        let ended = wait(&mut self.script, PATIENCE);
        if !std::thread::panicking() {
            assert!(ended.is_some_and(|status| status.success()), "the machine does not end as it should");
        }
    }
}
