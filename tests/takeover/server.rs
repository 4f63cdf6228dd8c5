//! Servers that no master has started.

use std::fs;
use std::io::{BufRead, BufReader};
use std::net::{SocketAddr, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use reuseportd_sys::bpf::EbpfGroup;
use reuseportd_sys::diag::{self, Family, Protocol, Query, states};
use reuseportd_sys::{pidfd, procfs, socket};
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::process::{kill, signal, wait};
use crate::support::world::{World, repository};

/// A started one; ends with the test, its children too.
#[derive(Debug)]
pub(super) struct Server {
    child: Child,
    address: SocketAddr,
}

impl Server {
    /// So many processes with one listener on the world's address, which share it, and others that they don't serve.
    pub(super) fn python(world: &World, processes: u32, more: &[SocketAddr]) -> Server {
        let mut command = python(processes);
        command.arg(world.address.to_string()).args(more.iter().map(SocketAddr::to_string));
        Server::start(world, command)
    }

    /// By a command that says a line when it serves.
    pub(super) fn start(world: &World, mut command: Command) -> Server {
        let mut child = command.stdout(Stdio::piped()).spawn().unwrap();
        let mut line = String::new();
        BufReader::new(child.stdout.take().unwrap()).read_line(&mut line).unwrap();
        assert_eq!(line, "serves\n");
        Server { child, address: world.address }
    }

    /// nginx in the foreground, with this listener and two workers.
    pub(super) fn nginx(world: &World, options: &str) -> Server {
        let address = world.address;
        let text = format!(
            "worker_processes 2; daemon off; error_log stderr; pid {pid};\n\
             events {{ worker_connections 4096; }}\n\
             http {{ access_log off; client_body_temp_path {temp}; proxy_temp_path {temp}; fastcgi_temp_path {temp}; \
             uwsgi_temp_path {temp}; scgi_temp_path {temp};\n\
             server {{ listen {address} {options} backlog=4096; location / {{ return 200 \"generation=0 pid=$pid\\n\"; }} }} }}\n",
            pid = world.path("nginx.pid").display(),
            temp = world.path("temp").display(),
        );
        let config = world.path("nginx.conf");
        fs::write(&config, text).unwrap();
        let child = Command::new("nginx").args(["-e", "stderr", "-c"]).arg(config).spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        let server = Server { child, address };
        while TcpStream::connect(address).is_err() || server.pids().len() < 3 {
            assert!(Instant::now() < deadline, "nginx does not serve");
        }
        server
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its processes, of whose group it is not the first: that is this test's.
    pub(super) fn pids(&self) -> Vec<u32> {
        let pid = self.pid().cast_signed();
        let all = procfs::descendants(pid, pid).unwrap();
        all.into_iter().map(i32::cast_unsigned).collect()
    }

    pub(super) fn signal(&self, what: Signal) {
        signal(self.pid(), what);
    }

    /// It does nothing any more, until it is killed.
    pub(super) fn freeze(&self) {
        let deadline = Instant::now() + PATIENCE;
        for pid in self.pids() {
            signal(pid, Signal::STOP);
            let is_frozen = || fs::read_to_string(format!("/proc/{pid}/stat")).unwrap().contains(") T ");
            while !is_frozen() {
                assert!(Instant::now() < deadline, "process {pid} goes on");
            }
        }
    }

    /// Waits for its end, and that of its children.
    pub(super) fn wait_end(mut self) {
        assert!(wait(&mut self.child, PATIENCE).is_some(), "the server goes on");
        assert_eq!(self.pids(), Vec::<u32>::new());
    }

    pub(super) fn lives(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }

    /// Its listener, from outside.
    pub(super) fn listener(&self) -> OwnedFd {
        let query = Query {
            protocol: Protocol::Tcp,
            family: Family::Both,
            port: Some(self.address.port()),
            states: states::LISTEN,
        };
        let listening = diag::dump(&query).unwrap();
        let is_one = |inode: u64| listening.iter().any(|socket| u64::from(socket.inode) == inode);
        let pid = self.pid().cast_signed();
        let held = procfs::socket_inodes(pid).unwrap();
        let (number, _) = held.into_iter().find(|(_, inode)| is_one(*inode)).expect("it listens");
        pidfd::getfd(pidfd::open(pid).unwrap().as_fd(), number).unwrap()
    }

    /// It serves, and its listener is as it made it: without SO_REUSEPORT, and without a program.
    pub(super) fn assert_untouched(&mut self) {
        assert!(self.lives(), "the server has ended");
        let listener = self.listener();
        assert!(!socket::is_reuseport(listener.as_fd()).unwrap(), "SO_REUSEPORT is left set");
        self.assert_no_program();
        assert!(TcpStream::connect_timeout(&self.address, Duration::from_secs(5)).is_ok());
    }

    pub(super) fn assert_no_program(&self) {
        assert!(EbpfGroup::detach(self.listener().as_fd()).is_err(), "a program is left in force");
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let all = if self.lives() { self.pids() } else { Vec::new() };
        // First: it would start the others again.
        let _ = self.child.kill();
        let _ = self.child.wait();
        kill(all);
    }
}

/// The Python server with so many processes; its addresses are still to come.
pub(super) fn python(processes: u32) -> Command {
    let mut command = Command::new("python3");
    command.arg(repository("tests/takeover/server.py")).arg(processes.to_string());
    command
}
