//! What the picture is made of: the master's status, the kernel's list, and who holds what.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::path::PathBuf;

use reuseportd_sys::diag::{self, Family, Query, states};
use reuseportd_sys::{procfs, unix};
use reuseportd_wire::status::{Engine, Protocol, Status, WorkerState};

use crate::cli::Master;
use crate::{client, config};

/// How often a dump is asked for again after the kernel said that it changed underneath.
const DUMP_ATTEMPTS: usize = 5;

/// Everything that was looked at.
#[derive(Debug, Default)]
pub(super) struct Facts {
    pub(super) listeners: Vec<Listener>,
    /// Those with a path.
    pub(super) unix: Vec<UnixListener>,
    /// What the master says; none when there is none to be asked.
    pub(super) running: Option<Running>,
    /// Why there is none.
    pub(super) no_master: Option<String>,
    /// Listening sockets of the listeners' ports, and UDP sockets that are not connected, each group in its order.
    pub(super) sockets: Vec<(Protocol, diag::Socket)>,
    /// Processes by the inode of the socket they hold.
    pub(super) owners: BTreeMap<u64, Vec<Owner>>,
    /// Processes whose descriptors this user may not see.
    pub(super) unreadable: u32,
}

/// A configured address.
#[derive(Debug)]
pub(super) struct Listener {
    pub(super) name: String,
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
    pub(super) engine: Option<Engine>,
}

/// A configured path.
#[derive(Debug)]
pub(super) struct UnixListener {
    pub(super) name: String,
    pub(super) path: PathBuf,
    /// Inodes of the sockets that listen and were bound with it.
    pub(super) listening: Vec<u64>,
    /// Connections that nobody has accepted yet.
    pub(super) waiting: usize,
}

/// A master and its workers.
#[derive(Debug)]
pub(super) struct Running {
    pub(super) app: String,
    pub(super) master: i32,
    /// Holds what the master holds.
    pub(super) keeper: Option<i32>,
    pub(super) workers: Vec<Worker>,
}

/// A worker with all its processes.
#[derive(Debug)]
pub(super) struct Worker {
    pub(super) generation: u32,
    pub(super) seat: u32,
    /// Whether new connections are steered to it.
    pub(super) is_steered_to: bool,
    pub(super) pids: Vec<i32>,
}

/// A process that holds a socket.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub(super) struct Owner {
    pub(super) pid: i32,
    /// Its command line.
    pub(super) command: String,
}

/// Looks, and touches nothing.
///
/// # Errors
/// The exit code and what to say: an invalid config, no master at `--socket`, or no list of sockets.
pub(super) fn gather(master: &Master) -> Result<Facts, (u8, String)> {
    let mut facts = match master {
        Master::AtSocket(socket) => of_status(&client::status_at(socket)?),
        Master::OfConfig(path) => {
            let socket = config::control_socket(path).map_err(|errors| (2, errors.to_string()))?;
            match client::status_at(&socket) {
                Ok(status) => of_status(&status),
                Err((_, why)) => Facts { no_master: Some(why), ..of_config(path)? },
            }
        }
    };
    let no_list = |error: io::Error| (1, format!("the kernel's list of sockets (sock_diag): {error}"));
    let mut ports: Vec<(Protocol, u16)> = Vec::new();
    for listener in &facts.listeners {
        let place = (listener.protocol, listener.address.port());
        if !ports.contains(&place) {
            ports.push(place);
        }
    }
    for (protocol, port) in ports {
        let found = bound(protocol, port).map_err(no_list)?;
        facts.sockets.extend(found.into_iter().map(|socket| (protocol, socket)));
    }
    let unix_sockets = if facts.unix.is_empty() { Vec::new() } else { unix::sockets().map_err(no_list)? };
    for one in &mut facts.unix {
        let here = || unix_sockets.iter().filter(|socket| socket.path == one.path);
        let waiting = here().filter(|socket| socket.inode == 0).count();
        one.listening = here().filter(|socket| socket.listens).map(|socket| socket.inode).collect();
        one.waiting = waiting;
    }
    let no_processes = |error| (1, format!("the list of processes (/proc): {error}"));
    find_owners(&mut facts).map_err(no_processes)?;
    Ok(facts)
}

fn of_config(path: &std::path::Path) -> Result<Facts, (u8, String)> {
    let config = config::load(path).map_err(|errors| (2, errors.to_string()))?;
    let listener = |one: config::Listen| {
        let config::Listen { name, protocol, address, .. } = one;
        Listener { name, protocol, address, engine: None }
    };
    let unix = config.unix.into_iter().map(|one| at_path(&one.name, one.path));
    let unix = unix.collect();
    Ok(Facts { listeners: config.listen.into_iter().map(listener).collect(), unix, ..Facts::default() })
}

fn at_path(name: &str, path: PathBuf) -> UnixListener {
    UnixListener { name: name.to_owned(), path, listening: Vec::new(), waiting: 0 }
}

fn of_status(status: &Status) -> Facts {
    let unix = status
        .listeners
        .iter()
        .filter_map(|one| Some(at_path(&one.name, PathBuf::from(one.address.strip_prefix("unix:")?))));
    let listeners = status.listeners.iter().filter_map(|one| {
        Some(Listener {
            name: one.name.clone(),
            protocol: one.protocol,
            address: one.address.parse().ok()?,
            engine: Some(one.engine),
        })
    });
    let workers = status.generations.iter().flat_map(|generation| {
        generation.workers.iter().filter_map(|worker| {
            let pid = i32::try_from(worker.pid?).ok()?;
            Some(Worker {
                generation: generation.generation,
                seat: worker.seat,
                is_steered_to: generation.share > 0.0 && worker.state == WorkerState::Serving,
                // Gone meanwhile: then it owns nothing.
                pids: procfs::descendants(pid, pid).unwrap_or_default(),
            })
        })
    });
    Facts {
        listeners: listeners.collect(),
        unix: unix.collect(),
        running: Some(Running {
            app: status.app.clone(),
            master: status.master.pid.cast_signed(),
            keeper: status.master.keeper.map(u32::cast_signed),
            workers: workers.collect(),
        }),
        ..Facts::default()
    }
}

/// What waits for connections, or for datagrams from anybody.
fn bound(protocol: Protocol, port: u16) -> io::Result<Vec<diag::Socket>> {
    let (protocol, states) = match protocol {
        Protocol::Tcp => (diag::Protocol::Tcp, states::LISTEN),
        Protocol::Udp => (diag::Protocol::Udp, states::CLOSE),
    };
    let query = Query { protocol, family: Family::Both, port: Some(port), states };
    let mut attempts = DUMP_ATTEMPTS;
    loop {
        attempts -= 1;
        match diag::dump(&query) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && attempts > 0 => {}
            sockets => return sockets.map(diag::listen_order),
        }
    }
}

fn find_owners(facts: &mut Facts) -> io::Result<()> {
    let unix = facts.unix.iter().flat_map(|one| &one.listening).copied();
    let wanted: Vec<u64> =
        facts.sockets.iter().map(|(_, socket)| u64::from(socket.inode)).chain(unix).collect();
    for process in procfs::processes()?.iter().filter(|process| !process.is_zombie) {
        let held = match procfs::socket_inodes(process.pid) {
            Ok(held) => held,
            Err(error) => {
                facts.unreadable += u32::from(error.kind() == io::ErrorKind::PermissionDenied);
                continue;
            }
        };
        let mut inodes: Vec<u64> =
            held.into_iter().map(|(_, inode)| inode).filter(|inode| wanted.contains(inode)).collect();
        inodes.sort_unstable();
        inodes.dedup();
        for inode in inodes {
            let owner = Owner { pid: process.pid, command: command(process.pid) };
            facts.owners.entry(inode).or_default().push(owner);
        }
    }
    Ok(())
}

/// The command line, or the process's own name where there is none; empty when it has ended.
fn command(pid: i32) -> String {
    let read = |name: &str| std::fs::read(format!("/proc/{pid}/{name}")).unwrap_or_default();
    let line = read("cmdline");
    let line = if line.is_empty() { read("comm") } else { line };
    String::from_utf8_lossy(&line).replace('\0', " ").trim_end().to_owned()
}
