//! A place of its own for each test: network namespace, directory, name.

use std::fs;
use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::panic::resume_unwind;
use std::path::{Path, PathBuf};
use std::process::{self, Command, Stdio};
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread;

use nix::sched::{CloneFlags, unshare};
use rustix::thread::CapabilitySet;
use tempfile::TempDir;

/// What a test can't do without.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Need {
    /// Uid 0: other users, a network namespace.
    Root,
    /// BPF programs may be loaded.
    Bpf,
    /// Packet filter rules may be set.
    Nft,
    /// A Python interpreter.
    Python,
    /// A program that succeeds with these arguments.
    Runs(&'static str, &'static [&'static str]),
}

/// Where one test happens.
#[derive(Debug)]
pub(crate) struct World {
    directory: TempDir,
    /// Unique among all tests on this machine.
    pub(crate) app: String,
    /// The service's address.
    pub(crate) address: SocketAddr,
}

/// What an engine can't do without.
pub(crate) fn needs_of(engine: &str) -> &'static [Need] {
    if engine == "ebpf" { &[Need::Bpf] } else { &[] }
}

/// Runs a test in a world of its own, or says on stderr why it is skipped.
pub(crate) fn world(needs: &[Need], body: impl FnOnce(&World) + Send) {
    if let Some(reason) = needs.iter().find_map(|need| need.missing()) {
        let name = thread::current().name().unwrap_or("test").to_owned();
        let require = std::env::var("REUSEPORTD_TEST_REQUIRE").is_ok_and(|what| what == "all");
        assert!(!require, "{name}: {reason}");
        // Not by eprintln!, which nobody sees of a test that passes.
        return std::io::stderr().write_all(format!("SKIPPED: {name}: {reason}\n").as_bytes()).unwrap();
    }
    // A thread can't leave its namespace again, and what it starts is born in it: so the thread ends with the test.
    let done = thread::scope(|scope| scope.spawn(|| body(&World::new())).join());
    done.unwrap_or_else(|panic| resume_unwind(panic));
}

impl Need {
    fn missing(self) -> Option<String> {
        let runs = |program: &str, arguments: &[&str]| {
            let mut probe = Command::new(program);
            let probe = probe.args(arguments).stdout(Stdio::null()).stderr(Stdio::null()).status();
            let fails = !probe.is_ok_and(|status| status.success());
            fails.then(|| format!("`{program} {}` does not run here", arguments.join(" ")))
        };
        match self {
            Need::Root => (!is_root()).then(|| "needs root".to_owned()),
            Need::Bpf => {
                let sets = rustix::thread::capabilities(None).unwrap();
                (!sets.effective.contains(CapabilitySet::BPF)).then(|| "needs CAP_BPF".to_owned())
            }
            Need::Nft => Need::Root.missing().or_else(|| runs("nft", &["--version"])),
            Need::Python => runs("python3", &["--version"]),
            Need::Runs(program, arguments) => runs(program, arguments),
        }
    }
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

impl World {
    fn new() -> World {
        static WORLDS: AtomicU32 = AtomicU32::new(0);
        let number = WORLDS.fetch_add(1, Ordering::Relaxed);
        let directory = tempfile::Builder::new().prefix("reuseportd-").tempdir().unwrap();
        // Workers and masters of other users come here too.
        fs::set_permissions(directory.path(), fs::Permissions::from_mode(0o755)).unwrap();
        let port = if is_root() { enter_namespace() } else { free_port() };
        let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
        World { directory, app: format!("test-{}-{number}", process::id()), address }
    }

    /// A path in the test's directory.
    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// The text of a file in the test's directory.
    pub(crate) fn read(&self, name: &str) -> String {
        fs::read_to_string(self.path(name)).unwrap_or_else(|error| panic!("{name}: {error}"))
    }
}

/// A built example of this package.
pub(crate) fn example(name: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_BIN_EXE_reuseportd")).with_file_name("examples").join(name);
    assert!(path.exists(), "{} is missing: cargo build --examples", path.display());
    path
}

/// A file of the repository.
pub(crate) fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join(path)
}

/// Sets a sysctl of the network namespace this thread is in.
pub(crate) fn sysctl(name: &str, value: &str) {
    let path = Path::new("/proc/sys").join(name.replace('.', "/"));
    fs::write(&path, value).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
}

/// Runs a tool of the system that must succeed.
pub(crate) fn tool(words: &str) {
    let mut words = words.split_whitespace();
    let output = Command::new(words.next().unwrap()).args(words.clone()).output().unwrap();
    assert!(output.status.success(), "{words:?}: {}", String::from_utf8_lossy(&output.stderr));
}

fn enter_namespace() -> u16 {
    unshare(CloneFlags::CLONE_NEWNET).expect("root may make a network namespace");
    tool("ip link set lo up");
    // Twenty source addresses with these ports each: none runs out to TIME_WAIT.
    sysctl("net.ipv4.ip_local_port_range", "10000 65000");
    sysctl("net.ipv4.tcp_max_syn_backlog", "4096");
    sysctl("net.unix.max_dgram_qlen", "512");
    8080
}

/// Without a namespace: a port that nobody has now.
fn free_port() -> u16 {
    TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap().local_addr().unwrap().port()
}
