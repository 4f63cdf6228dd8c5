//! Looking into the kernel: whose listeners are whose, what waits in them, what is open.

use std::cell::Cell;
use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};

use reuseportd_core::{Depth, Found, GroupId, GroupView, ListenerId, Member, Problem, WorkerId};
use reuseportd_sys::diag::{self, Family, Lister, Protocol, Query, Socket, states};
use reuseportd_sys::{pidfd, procfs, socket};
use reuseportd_wire::status as wire;

use super::launch::Launch;
use super::{Shell, place};
use crate::config::{Bind, Endpoint, Listen, clash};

/// How often a dump is asked for again after the kernel said that it changed underneath.
const DUMP_ATTEMPTS: usize = 5;

/// What lets the master get at the listeners of unmodified workers.
const REACH: &str = "give the master CAP_SYS_PTRACE and a seccomp filter that allows pidfd_getfd, or let the worker speak \
                     the handover protocol";

/// A listener that a process of a worker holds.
#[derive(Debug, Clone)]
pub(super) struct Held {
    pub(super) pid: i32,
    pub(super) number: i32,
    pub(super) socket: Socket,
}

/// Why one address is not served by a worker.
pub(super) enum Missing {
    NotYet(Problem, String),
    Never(Problem, String),
}

impl Missing {
    pub(super) fn text(self) -> String {
        match self {
            Missing::NotYet(_, text) | Missing::Never(_, text) => text,
        }
    }
}

pub(super) fn failed(error: io::Error) -> Missing {
    let errno = super::groups::errno(&error);
    Missing::NotYet(Problem::Failed(errno), format!("looking for its listeners failed: {error}"))
}

impl Shell {
    /// The listeners of an unmodified worker, children included, with a handle of each.
    pub(super) fn find(&mut self, worker: WorkerId) -> Found {
        let Some(pid) = self.processes.get(&worker).map(|process| process.pid) else {
            return Found::NotYet(Problem::Failed(nix::libc::ESRCH));
        };
        match self.find_all(worker, pid) {
            Ok(found) => {
                self.set_detail(worker, None);
                Found::All(found)
            }
            Err(missing) => {
                let (text, found) = match missing {
                    Missing::NotYet(problem, text) => (text, Found::NotYet(problem)),
                    Missing::Never(problem, text) => (text, Found::Never(problem)),
                };
                self.set_detail(worker, Some(text));
                found
            }
        }
    }

    pub(super) fn set_detail(&mut self, worker: WorkerId, detail: Option<String>) {
        if let Some(process) = self.processes.get_mut(&worker) {
            process.detail = detail;
        }
    }

    fn find_all(&mut self, worker: WorkerId, pid: i32) -> Result<Vec<(GroupId, ListenerId)>, Missing> {
        let pids = self.processes_of(pid).map_err(failed)?;
        let listening = self.listening().map_err(failed)?;
        let held = held_by(&pids, listening).map_err(|error| match self.launch_of(worker) {
            Some(launch) if error.kind() == io::ErrorKind::PermissionDenied => hidden(launch, &error),
            _ => failed(error),
        })?;
        let mut wanted = Vec::new();
        // What the master made needs no looking for.
        let own = self.launch_of(worker).into_iter().flat_map(Launch::listeners);
        for (id, listen) in own.filter(|(_, listen)| listen.bind == Bind::Worker) {
            let here: Vec<Held> = held.iter().filter(|held| serves(&held.socket, listen)).cloned().collect();
            if here.is_empty() {
                return Err(not_here(id, listen, &held));
            }
            for held in here {
                wanted.push((id, listen.address, held));
            }
        }
        let mut handles = Vec::new();
        for (id, address, held) in wanted {
            self.note_bound(id, held.socket.local)
                .map_err(|text| Missing::Never(Problem::WrongAddress(id), text))?;
            let handle = take_handle(id, address, &held)?;
            handles.push((id, held, handle));
        }
        let mut found = Vec::new();
        for (id, held, handle) in handles {
            let owner = Some((held.pid, held.number));
            found.push((id, self.listeners.add(id, worker, owner, handle).map_err(failed)?));
        }
        Ok(found)
    }

    /// The kernel's picture of a group.
    pub(super) fn observe(&self, id: GroupId) -> io::Result<GroupView> {
        let Some(group) = self.groups.of(id) else { return Ok(GroupView::default()) };
        let address = group.bound.unwrap_or(group.address);
        if group.protocol == wire::Protocol::Udp {
            return self.observe_datagrams(id, address);
        }
        let sockets = dump(Protocol::Tcp, Some(address.port()), states::LISTEN | states::SYN_RECV)?;
        let mut view = GroupView {
            migrated: self.groups.migrated(id, self.launches.keys().copied()),
            migrate_failures: procfs::netstat("TCPMigrateReqFailure"),
            migrates_by_hash: procfs::sysctl("net/ipv4/tcp_migrate_req")
                .is_some_and(|value| value.trim() == "1"),
            ..GroupView::default()
        };
        view.half_open = sockets
            .iter()
            .filter(|socket| socket.state == states::SYN_RECV)
            .map(|socket| socket.cookie)
            .collect();
        let listening =
            sockets.into_iter().filter(|s| s.state == states::LISTEN && s.local == address).collect();
        let known = self.listeners.by_cookie(id);
        for socket in diag::listen_order(listening) {
            let listener = known.get(&socket.cookie).copied();
            view.members.push(Member { cookie: socket.cookie, listener });
            if let Some(listener) = listener {
                let (queued, backlog) = (socket.recv_queue, socket.send_queue);
                let depth = Depth { queued, backlog, drops: socket.drops, quiet: None };
                view.depths.push((listener, depth));
            }
        }
        Ok(view)
    }

    /// The same of a group that takes datagrams. A socket that connects leaves it.
    fn observe_datagrams(&self, id: GroupId, address: SocketAddr) -> io::Result<GroupView> {
        let sockets = dump(Protocol::Udp, Some(address.port()), states::CLOSE)?;
        let is_in_group = |socket: &Socket| socket.local == address;
        let known = self.listeners.by_cookie(id);
        let mut view = GroupView::default();
        for socket in diag::listen_order(sockets.into_iter().filter(is_in_group).collect()) {
            let listener = known.get(&socket.cookie).copied();
            view.members.push(Member { cookie: socket.cookie, listener });
            if let Some(listener) = listener {
                let key = self.listeners.of(listener).and_then(|listener| listener.key);
                let quiet = self.groups.quiet(id, key);
                let depth = Depth { queued: socket.recv_queue, backlog: 0, drops: socket.drops, quiet };
                view.depths.push((listener, depth));
            }
        }
        Ok(view)
    }

    /// Open connections of each worker, through any of the configured ports.
    pub(super) fn count(&self, workers: &[WorkerId]) -> io::Result<Vec<(WorkerId, u32)>> {
        let mut open = BTreeSet::new();
        open.extend(self.shared.accepted()?);
        for (_, group) in self.groups.iter() {
            let sockets = dump(kernel_protocol(group.protocol), Some(group.address.port()), OPEN_STATES)?;
            // Inode 0: not accepted yet, or closed by its process already.
            open.extend(
                sockets.into_iter().map(|socket| u64::from(socket.inode)).filter(|inode| *inode != 0),
            );
        }
        let mut counted = Vec::new();
        for worker in workers {
            let Some(process) = self.processes.get(worker) else { continue };
            let mut inodes = BTreeSet::new();
            for pid in self.processes_of(process.pid)? {
                let held = procfs::socket_inodes(pid).unwrap_or_default();
                inodes.extend(held.into_iter().map(|(_, inode)| inode).filter(|inode| open.contains(inode)));
            }
            counted.push((*worker, u32::try_from(inodes.len()).unwrap_or(u32::MAX)));
        }
        Ok(counted)
    }

    /// Sockets in a group that are no worker's of ours.
    pub(super) fn strangers(&self, id: GroupId) -> io::Result<u32> {
        let Some(group) = self.groups.of(id) else { return Ok(0) };
        let address = group.bound.unwrap_or(group.address);
        let endpoint = Endpoint { address, ..group.endpoint() };
        let known = self.listeners.by_cookie(id);
        let (protocol, bound) = (kernel_protocol(group.protocol), bound_state(group.protocol));
        let mut strangers: BTreeSet<u64> = dump(protocol, Some(address.port()), bound)?
            .into_iter()
            .filter(|socket| clash(endpoint_of(socket, group.protocol), endpoint).is_some())
            .filter(|socket| !known.contains_key(&socket.cookie))
            .map(|socket| u64::from(socket.inode))
            .collect();
        if !strangers.is_empty() {
            for process in self.processes.values() {
                for pid in self.processes_of(process.pid)? {
                    for (_, inode) in procfs::socket_inodes(pid).unwrap_or_default() {
                        strangers.remove(&inode);
                    }
                }
            }
        }
        Ok(u32::try_from(strangers.len()).unwrap_or(u32::MAX))
    }
}

fn endpoint_of(socket: &Socket, protocol: wire::Protocol) -> Endpoint {
    Endpoint { protocol, address: socket.local, v6only: socket.v6only == Some(true) }
}

/// All the states there are: twelve, numbered from 1.
const ALL_STATES: u32 = 0x1ffe;

/// Those of connections.
pub(super) const OPEN_STATES: u32 =
    ALL_STATES & !(states::LISTEN | states::SYN_RECV | states::TIME_WAIT | states::CLOSE);

thread_local! {
    /// Kept open: in want of descriptors nobody could tell any more what waits where.
    static LISTER: Cell<Option<Lister>> = const { Cell::new(None) };
}

/// A dump, asked for again as long as the kernel says that it may be incomplete.
pub(super) fn dump(protocol: Protocol, port: Option<u16>, states: u32) -> io::Result<Vec<Socket>> {
    let query = Query { protocol, family: Family::Both, port, states };
    let mut attempts = 1;
    loop {
        let lister = LISTER.take().map_or_else(Lister::open, Ok)?;
        match lister.dump(&query) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted && attempts < DUMP_ATTEMPTS => {
                attempts += 1
            }
            Err(error) => return Err(error),
            Ok(sockets) => {
                LISTER.set(Some(lister));
                return Ok(sockets);
            }
        }
    }
}

/// Listening sockets held by these processes; each socket once.
pub(super) fn held_by(pids: &[i32], listening: &[Socket]) -> io::Result<Vec<Held>> {
    let by_inode: BTreeMap<u64, &Socket> =
        listening.iter().map(|socket| (u64::from(socket.inode), socket)).collect();
    let mut seen = BTreeSet::new();
    let mut held = Vec::new();
    let mut denied = None;
    for &pid in pids {
        let inodes = procfs::socket_inodes(pid).unwrap_or_else(|error| {
            // A child may have ended since it was listed, which is no error.
            let is_gone = |error: &io::Error| {
                matches!(error.raw_os_error(), Some(nix::libc::ENOENT | nix::libc::ESRCH))
            };
            denied = Some(error).filter(|error| !is_gone(error));
            Vec::new()
        });
        for (number, inode) in inodes {
            if let Some(socket) = by_inode.get(&inode)
                && seen.insert(inode)
            {
                held.push(Held { pid, number, socket: (*socket).clone() });
            }
        }
    }
    denied.filter(|_| held.is_empty()).map_or(Ok(held), Err)
}

pub(super) fn serves(socket: &Socket, listen: &Listen) -> bool {
    let is_kind = socket.state == bound_state(listen.protocol);
    is_kind && place::serves(socket.local, socket.v6only.unwrap_or(false), listen)
}

/// Sockets of ours: those that listen, or, where there is no listening, those that are bound and not connected.
pub(super) fn bound_state(protocol: wire::Protocol) -> u32 {
    match protocol {
        wire::Protocol::Tcp => states::LISTEN,
        wire::Protocol::Udp => states::CLOSE,
    }
}

pub(super) fn kernel_protocol(protocol: wire::Protocol) -> Protocol {
    match protocol {
        wire::Protocol::Tcp => Protocol::Tcp,
        wire::Protocol::Udp => Protocol::Udp,
    }
}

fn not_here(id: GroupId, listen: &Listen, held: &[Held]) -> Missing {
    let of_kind = |held: &&Held| held.socket.state == bound_state(listen.protocol);
    let places: Vec<SocketAddr> = held.iter().filter(of_kind).map(|held| held.socket.local).collect();
    if places.is_empty() {
        let text = match listen.protocol {
            wire::Protocol::Tcp => format!("it does not listen on {}", listen.address),
            wire::Protocol::Udp => format!("it has no UDP socket on {}", listen.address),
        };
        return Missing::NotYet(Problem::NotListening(id), text);
    }
    Missing::NotYet(Problem::WrongAddress(id), place::elsewhere(&places, listen))
}

/// The worker's descriptors can't be seen at all.
fn hidden(launch: &Launch, error: &io::Error) -> Missing {
    let text = format!("its listeners can't be seen ({error}): {REACH}");
    let group = launch.groups.first().copied().unwrap_or(GroupId(0));
    Missing::Never(Problem::NotPermitted(group), text)
}

/// A duplicate of a worker's listener, which has to be in a SO_REUSEPORT group.
pub(super) fn take_handle(id: GroupId, address: SocketAddr, held: &Held) -> Result<OwnedFd, Missing> {
    let denied = |error: io::Error| {
        let text = format!("its listener on {address} can't be reached ({error}): {REACH}");
        Missing::Never(Problem::NotPermitted(id), text)
    };
    let handle = pidfd::open(held.pid).and_then(|process| pidfd::getfd(process.as_fd(), held.number));
    let handle = handle.map_err(|error| match error.raw_os_error() {
        Some(nix::libc::EPERM) => denied(error),
        _ => Missing::NotYet(
            Problem::NotListening(id),
            format!("its listener on {address} went away: {error}"),
        ),
    })?;
    let inode = socket::inode(handle.as_fd()).unwrap_or(0);
    if inode != u64::from(held.socket.inode) {
        return Err(Missing::NotYet(
            Problem::NotListening(id),
            format!("its listener on {address} went away"),
        ));
    }
    if !socket::is_reuseport(handle.as_fd()).unwrap_or(false) {
        let text = format!(
            "its listener on {address} is not set SO_REUSEPORT, so a new generation could never bind beside it: set \
             SO_REUSEPORT before bind()"
        );
        return Err(Missing::Never(Problem::NoReuseport(id), text));
    }
    Ok(handle)
}
