//! A server that no master has started: which processes it is, where it listens, and why it can't be taken over from.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use nix::libc;
use reuseportd_core::{Engine, GroupId};
use reuseportd_sys::diag::{Protocol, Socket, states};
use reuseportd_sys::{late, namespace, pidfd, procfs, socket};
use reuseportd_wire::{env, status as wire};
use rustix::process::geteuid;

use super::groups::Choice;
use super::launch::Launch;
use super::look::{Held, dump, held_by, serves};
use super::takeover::addresses;
use crate::config::{Config, Listen};

/// What lets the master get at the server's listeners.
const REACH: &str =
    "run the master as root, or give it CAP_SYS_PTRACE and a seccomp filter that allows pidfd_getfd";

/// Why no server can be taken over from by a service with this config.
pub(super) fn check_config(config: &Config) -> Result<(), String> {
    if let Some(listen) = config.listen.iter().find(|listen| listen.protocol == wire::Protocol::Udp) {
        return Err(format!(
            "cannot take over [[listen]] {:?}: what waits in a UDP socket can't be moved to another, and its flows are \
             known to the server alone; start the UDP service by itself",
            listen.name
        ));
    }
    if let Some(listen) = config.unix.first() {
        return Err(format!(
            "cannot take over [[listen]] {:?}: {} can be only one socket's, and the server's has no group to which \
             another could be added; take it out of the config, and let clients use a TCP address",
            listen.name,
            listen.path.display()
        ));
    }
    Ok(())
}

/// The server's processes.
#[derive(Debug)]
pub(super) struct Server {
    first: procfs::Process,
    name: String,
    /// All of them.
    pids: Vec<i32>,
}

/// One of its listeners.
#[derive(Debug)]
pub(super) struct Claim {
    pub(super) group: GroupId,
    /// A process that holds it, and under which number.
    pub(super) pid: i32,
    pub(super) number: i32,
    pub(super) local: SocketAddr,
    pub(super) backlog: i32,
    inode: u64,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "process {} ({})", self.first.pid, self.name)
    }
}

impl Server {
    /// Looks for the process and those below it.
    pub(super) fn find(pid: i32) -> Result<Server, String> {
        let none = || format!("there is no process {pid}: --pid names the first process of the server");
        let processes = procfs::processes().map_err(|error| format!("cannot list processes: {error}"))?;
        let first = processes.iter().find(|one| one.pid == pid && !one.is_zombie).ok_or_else(none)?;
        let pids = procfs::descendants_in(&processes, pid, pid);
        Ok(Server { first: *first, name: name_of(pid), pids })
    }

    pub(super) fn pid(&self) -> i32 {
        self.first.pid
    }

    pub(super) fn start_time(&self) -> u64 {
        self.first.start_time
    }

    pub(super) fn name(&self) -> &str {
        &self.name
    }

    /// Its listeners, each for the address of the config that it serves; or why it can't be taken over from. Changes
    /// nothing.
    pub(super) fn claims(&self, launch: &Launch, engine: &Choice) -> Result<Vec<Claim>, String> {
        if engine.engine != Engine::Ebpf {
            return Err(format!(
                "it can't be done without a loss by the engine in force ({}): what a helper socket is given before the \
                 server is steered to, only an ebpf program can move; give the master CAP_BPF, and set steering.engine to \
                 \"auto\"",
                engine.reason
            ));
        }
        if let Some(name) = launch.shared.keys().next() {
            return Err(format!(
                "the service manager has passed the socket of [[listen]] {name:?}, to which the server's can't be added: \
                 start this program without the socket unit"
            ));
        }
        self.check_processes()?;
        let listening = dump(Protocol::Tcp, None, states::LISTEN)
            .map_err(|error| format!("cannot list sockets: {error}"))?;
        let held = self.listeners(&listening)?;
        let claims = assign(&held, launch)?;
        for (claim, socket) in &claims {
            check_owner(socket, launch)?;
            let at = listening.iter().filter(|other| other.local == claim.local);
            if let Some(other) =
                at.into_iter().find(|other| !held.iter().any(|h| h.socket.cookie == other.cookie))
            {
                return Err(format!(
                    "{} listens on {} too, and would be steered with it: end it first",
                    holder(&self.pids, u64::from(other.inode)),
                    claim.local
                ));
            }
            if let Some(pid) = holder_beside(&self.pids, claim.inode) {
                return Err(format!(
                    "its listener on {} is held by process {pid} ({}) as well, which is not below it and would go on \
                     with it: name that by --pid, or end it first",
                    claim.local,
                    name_of(pid)
                ));
            }
            let interface = late::interface(claim.handle()?.as_fd()).unwrap_or(0);
            if interface != 0 {
                return Err(format!(
                    "its listener on {} is bound to a network interface (SO_BINDTODEVICE), which workers' listeners \
                     are not: let it listen on the interface's address",
                    claim.local
                ));
            }
        }
        Ok(claims.into_iter().map(|(claim, _)| claim).collect())
    }

    /// Whether they are another's: ours, another master's, or in another network.
    fn check_processes(&self) -> Result<(), String> {
        if self.pids.contains(&std::process::id().cast_signed()) {
            return Err(
                "it is above this master, which would end with it: name the server's own process".to_owned()
            );
        }
        match namespace::is_network_shared_with(self.first.pid) {
            Ok(true) => {}
            Ok(false) => {
                return Err(
                    "it is in another network namespace, where the same address is another one: start this program there \
                     (nsenter --net, or in its container)"
                        .to_owned(),
                );
            }
            Err(error) => return Err(format!("it can't be looked at ({error}): {REACH}")),
        }
        for pid in &self.pids {
            let variables = procfs::environment(*pid).unwrap_or_default();
            let app = variables.iter().find(|(name, _)| name == env::APP);
            if let Some((_, app)) = app {
                return Err(format!(
                    "process {pid} is a worker of the reuseportd master of app {:?}, which replaces its workers itself: \
                     `reuseportd upgrade`",
                    app.to_string_lossy()
                ));
            }
        }
        Ok(())
    }

    fn listeners(&self, listening: &[Socket]) -> Result<Vec<Held>, String> {
        let hidden = |error: &io::Error| error.kind() == io::ErrorKind::PermissionDenied;
        let denied = self
            .pids
            .iter()
            .find_map(|pid| procfs::socket_inodes(*pid).err().filter(hidden).map(|e| (*pid, e)));
        if let Some((pid, error)) = denied {
            return Err(format!("the descriptors of process {pid} can't be seen ({error}): {REACH}"));
        }
        held_by(&self.pids, listening).map_err(|error| format!("cannot look for its listeners: {error}"))
    }
}

impl Claim {
    fn of(group: GroupId, held: &Held) -> Claim {
        Claim {
            group,
            pid: held.pid,
            number: held.number,
            local: held.socket.local,
            backlog: i32::try_from(held.socket.send_queue).unwrap_or(i32::MAX),
            inode: u64::from(held.socket.inode),
        }
    }

    /// A duplicate of it.
    pub(super) fn handle(&self) -> Result<OwnedFd, String> {
        let Claim { pid, number, local, inode, .. } = self;
        let gone = || format!("its listener on {local} has just gone");
        let handle = pidfd::open(*pid).and_then(|process| pidfd::getfd(process.as_fd(), *number));
        let handle = handle.map_err(|error| match error.raw_os_error() {
            Some(libc::EPERM | libc::ENOSYS) => {
                format!("its listener on {local} can't be reached ({error}): {REACH}")
            }
            _ => gone(),
        })?;
        if socket::inode(handle.as_fd()).ok() == Some(*inode) { Ok(handle) } else { Err(gone()) }
    }
}

/// Each listener to the address it serves. Every address is to have one, and every listener an address.
fn assign<'a>(held: &'a [Held], launch: &Launch) -> Result<Vec<(Claim, &'a Socket)>, String> {
    let mut claims = Vec::new();
    let mut extra = Vec::new();
    for one in held {
        let is_exact = |(_, listen): &(GroupId, &Listen)| listen.address == one.socket.local;
        let serving = || launch.listeners().filter(|(_, listen)| serves(&one.socket, listen));
        match serving().find(is_exact).or_else(|| serving().next()) {
            Some((group, _)) => claims.push((Claim::of(group, one), &one.socket)),
            None => extra.push(one.socket.local),
        }
    }
    if let Some((_, listen)) =
        launch.listeners().find(|(group, _)| !claims.iter().any(|(c, _)| c.group == *group))
    {
        let places = if held.is_empty() {
            "nowhere".to_owned()
        } else {
            addresses(held.iter().map(|h| h.socket.local))
        };
        return Err(format!(
            "it does not listen on {} ([[listen]] {:?}), but on {places}: change the config, or --pid if the server is \
             another process",
            listen.address, listen.name
        ));
    }
    if !extra.is_empty() {
        return Err(format!(
            "it listens on {} as well, where nobody would when it has ended: add a [[listen]] for each of them",
            addresses(extra)
        ));
    }
    let mut places = BTreeMap::new();
    match claims.iter().find(|(claim, _)| *places.entry(claim.group).or_insert(claim.local) != claim.local) {
        Some((claim, _)) => Err(format!(
            "it serves one address of the config by listeners on several, {} among them: give each a [[listen]]",
            claim.local
        )),
        None => Ok(claims),
    }
}

/// Sockets of two users are in no group.
fn check_owner(socket: &Socket, launch: &Launch) -> Result<(), String> {
    let user = launch.config.app.identity.uid.unwrap_or(geteuid()).as_raw();
    if socket.uid == user {
        return Ok(());
    }
    Err(format!(
        "its listener on {} belongs to user {}, and those of the new workers would to user {user}: the kernel lets only one \
         user's sockets share an address; set app.user = {}, or start the master as that user",
        socket.local, socket.uid, socket.uid
    ))
}

/// A process besides these that holds a socket.
fn holder_beside(pids: &[i32], inode: u64) -> Option<i32> {
    let known: BTreeSet<i32> = pids.iter().copied().collect();
    let own = std::process::id().cast_signed();
    let others = procfs::processes().unwrap_or_default().into_iter().map(|process| process.pid);
    let holds =
        |pid: &i32| procfs::socket_inodes(*pid).unwrap_or_default().iter().any(|(_, held)| *held == inode);
    others.filter(|pid| *pid != own && !known.contains(pid)).find(holds)
}

fn holder(pids: &[i32], inode: u64) -> String {
    match holder_beside(pids, inode) {
        Some(pid) => format!("process {pid} ({})", name_of(pid)),
        None => "a process that can't be seen".to_owned(),
    }
}

/// The program's name as the kernel keeps it.
fn name_of(pid: i32) -> String {
    let name = std::fs::read_to_string(format!("/proc/{pid}/comm")).unwrap_or_else(|_| "?".to_owned());
    super::process::printable(name.trim_end())
}
