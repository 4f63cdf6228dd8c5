//! From facts to what they mean: whose socket each is, whether new connections reach it, and what it takes away.

use std::net::{IpAddr, SocketAddr};

use reuseportd_sys::diag;
use reuseportd_wire::status::{Engine, Protocol};
use serde::Serialize;

use super::facts::{Facts, Listener, Owner, Running, UnixListener, Worker};

/// All ports. Field names are for scripts; what is not known is null.
#[derive(Debug, Serialize)]
pub(super) struct Picture {
    pub(super) app: Option<String>,
    pub(super) master: Option<i32>,
    /// Why the master could not be asked.
    pub(super) no_master: Option<String>,
    pub(super) ports: Vec<Port>,
    pub(super) unix: Vec<Path>,
    /// Processes whose descriptors this user may not see.
    pub(super) unreadable_processes: u32,
}

/// The path of a unix socket, with whatever listens there.
#[derive(Debug, Serialize)]
pub(super) struct Path {
    pub(super) name: String,
    pub(super) path: std::path::PathBuf,
    /// Connections that nobody has accepted yet.
    pub(super) accept_queue: usize,
    pub(super) sockets: Vec<AtPath>,
    pub(super) warnings: Vec<String>,
}

/// A socket that listens and was bound with that path.
#[derive(Debug, Serialize)]
pub(super) struct AtPath {
    pub(super) relation: Relation,
    /// How many of our workers hold it.
    pub(super) workers: usize,
    /// Null when some processes can't be looked into and none of the others holds it.
    pub(super) owners: Option<Vec<Owner>>,
    pub(super) inode: u64,
}

/// One port, with whatever listens on it.
#[derive(Debug, Serialize)]
pub(super) struct Port {
    pub(super) protocol: Protocol,
    pub(super) port: u16,
    pub(super) listeners: Vec<Configured>,
    pub(super) sockets: Vec<Seen>,
    /// Sockets that are no worker's of ours; null when that can't be told of all.
    pub(super) strangers: Option<usize>,
    pub(super) warnings: Vec<String>,
}

/// A configured address.
#[derive(Debug, Serialize)]
pub(super) struct Configured {
    pub(super) name: String,
    pub(super) address: SocketAddr,
    pub(super) engine: Option<Engine>,
}

/// Whose a socket is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Relation {
    Worker,
    /// Only the master holds it: what a worker left, until it is released.
    Master,
    Stranger,
    Unknown,
}

/// One listening socket.
#[derive(Debug, Serialize)]
pub(super) struct Seen {
    pub(super) address: SocketAddr,
    /// Name of the listener in whose group it is; null for another address.
    pub(super) listener: Option<String>,
    pub(super) relation: Relation,
    /// How many of our workers hold it.
    pub(super) workers: usize,
    /// Null too of a socket that all workers share.
    pub(super) generation: Option<u32>,
    pub(super) seat: Option<u32>,
    /// Null when some processes can't be looked into and none of the others holds it.
    pub(super) owners: Option<Vec<Owner>>,
    /// Whether new connections are steered to it.
    pub(super) steered: Option<bool>,
    /// Null of UDP.
    pub(super) accept_queue: Option<u32>,
    /// Null of UDP.
    pub(super) backlog: Option<u32>,
    /// UDP: bytes of the kernel's memory that wait to be received.
    pub(super) receive_queue: Option<u32>,
    pub(super) drops: Option<u32>,
    pub(super) uid: u32,
    pub(super) inode: u32,
    pub(super) cookie: u64,
    /// Names of listeners from which it takes connections, its address being more specific.
    pub(super) takes_from: Vec<String>,
}

/// Judges the facts.
pub(super) fn of(facts: &Facts) -> Picture {
    let mut ports: Vec<Port> = Vec::new();
    for listener in &facts.listeners {
        let (protocol, port) = (listener.protocol, listener.address.port());
        if !ports.iter().any(|known| (known.protocol, known.port) == (protocol, port)) {
            ports.push(port_of(protocol, port, facts));
        }
    }
    Picture {
        app: facts.running.as_ref().map(|running| running.app.clone()),
        master: facts.running.as_ref().map(|running| running.master),
        no_master: facts.no_master.clone(),
        ports,
        unix: facts.unix.iter().map(|listener| path_of(listener, facts)).collect(),
        unreadable_processes: facts.unreadable,
    }
}

fn path_of(listener: &UnixListener, facts: &Facts) -> Path {
    let sockets: Vec<AtPath> = listener
        .listening
        .iter()
        .map(|inode| {
            let (owners, relation, workers) = holders(*inode, facts);
            AtPath { relation, workers: workers.len(), owners, inode: *inode }
        })
        .collect();
    let (name, path) = (listener.name.clone(), listener.path.clone());
    let shown = path.display();
    let mut warnings = Vec::new();
    if sockets.is_empty() {
        warnings.push(format!("nobody listens on unix:{shown} ({name})"));
    }
    let strangers = sockets.iter().filter(|socket| socket.relation == Relation::Stranger).count();
    if strangers > 0 {
        warnings.push(format!(
            "strangers bound to unix:{shown} ({name}): {strangers}; whose the file is now gets the connections"
        ));
    }
    Path { name, path, accept_queue: listener.waiting, sockets, warnings }
}

/// Who holds a socket: processes, whose they are, and the workers among them.
fn holders(inode: u64, facts: &Facts) -> (Option<Vec<Owner>>, Relation, Vec<&Worker>) {
    let owners = facts.owners.get(&inode).map_or(&[][..], Vec::as_slice);
    let (relation, workers) = relation(owners, facts);
    let owners = (!owners.is_empty() || facts.unreadable == 0).then(|| master_last(owners, facts));
    (owners, relation, workers)
}

fn port_of(protocol: Protocol, port: u16, facts: &Facts) -> Port {
    let is_here = |listener: &&Listener| (listener.protocol, listener.address.port()) == (protocol, port);
    let listeners: Vec<&Listener> = facts.listeners.iter().filter(is_here).collect();
    let here = facts.sockets.iter().filter(|(of, socket)| (*of, socket.local.port()) == (protocol, port));
    let sockets: Vec<Seen> = here.map(|(_, socket)| seen(protocol, socket, &listeners, facts)).collect();
    let count = |relation| sockets.iter().filter(|one| one.relation == relation).count();
    Port {
        protocol,
        port,
        strangers: (count(Relation::Unknown) == 0).then(|| count(Relation::Stranger)),
        warnings: warnings(&listeners, &sockets),
        listeners: listeners
            .iter()
            .map(|one| Configured { name: one.name.clone(), address: one.address, engine: one.engine })
            .collect(),
        sockets,
    }
}

fn seen(protocol: Protocol, socket: &diag::Socket, listeners: &[&Listener], facts: &Facts) -> Seen {
    let (owners, relation, workers) = holders(u64::from(socket.inode), facts);
    let is_ours = matches!(relation, Relation::Worker | Relation::Master);
    let listener = listeners.iter().find(|listener| is_in_group(socket, listener, is_ours));
    let steers = listener.is_some_and(|l| matches!(l.engine, Some(Engine::Ebpf | Engine::Cbpf)));
    // Of a seat's socket in an upgrade the older worker is named; of one that all share nobody.
    let worker = workers.first().copied().filter(|_| steers || workers.len() == 1);
    let is_tcp = protocol == Protocol::Tcp;
    Seen {
        address: socket.local,
        listener: listener.map(|listener| listener.name.clone()),
        relation,
        workers: workers.len(),
        generation: worker.map(|worker| worker.generation),
        seat: worker.map(|worker| worker.seat),
        owners,
        steered: match relation {
            Relation::Worker if steers => worker.map(|worker| worker.is_steered_to),
            // Under `cbpf` a stranger may have come into a slot the program names.
            Relation::Stranger if listener.is_some_and(|l| l.engine == Some(Engine::Ebpf)) => Some(false),
            _ => None,
        },
        accept_queue: is_tcp.then_some(socket.recv_queue),
        backlog: is_tcp.then_some(socket.send_queue),
        receive_queue: (!is_tcp).then_some(socket.recv_queue),
        drops: socket.drops,
        uid: socket.uid,
        inode: socket.inode,
        cookie: socket.cookie,
        takes_from: listeners
            .iter()
            .filter(|_| listener.is_none())
            .filter(|listener| is_more_specific(socket.local.ip(), listener.address.ip()))
            .filter(|listener| socket.local.ip().to_canonical().is_ipv6() || takes_ipv4(listener, facts))
            .map(|listener| listener.name.clone())
            .collect(),
    }
}

/// Master and keeper hold many a listener besides its worker; who accepts comes first.
fn master_last(owners: &[Owner], facts: &Facts) -> Vec<Owner> {
    let mut owners = owners.to_vec();
    let is_held = |running: &Running, pid| running.master == pid || running.keeper == Some(pid);
    owners.sort_by_key(|owner| facts.running.as_ref().is_some_and(|running| is_held(running, owner.pid)));
    owners
}

fn relation<'a>(owners: &[Owner], facts: &'a Facts) -> (Relation, Vec<&'a Worker>) {
    let Some(running) = &facts.running else { return (Relation::Unknown, Vec::new()) };
    let holds = |pid: i32| owners.iter().any(|owner| owner.pid == pid);
    let own = running.workers.iter().filter(|worker| worker.pids.iter().any(|pid| holds(*pid)));
    let workers: Vec<&Worker> = own.collect();
    let relation = match () {
        () if !workers.is_empty() => Relation::Worker,
        () if holds(running.master) || running.keeper.is_some_and(holds) => Relation::Master,
        () if owners.is_empty() && facts.unreadable > 0 => Relation::Unknown,
        () => Relation::Stranger,
    };
    (relation, workers)
}

/// The same address; or a dual-stack `[::]` with which a worker of ours serves `0.0.0.0`.
fn is_in_group(socket: &diag::Socket, listener: &Listener, is_ours: bool) -> bool {
    let (local, wanted) = (socket.local.ip(), listener.address.ip());
    let is_dual = local.is_ipv6() && local.is_unspecified() && socket.v6only == Some(false);
    local == wanted || is_ours && is_dual && wanted.is_ipv4() && wanted.is_unspecified()
}

/// Whether the kernel prefers a socket on `ip` for some of what is sent to `than`.
fn is_more_specific(ip: IpAddr, than: IpAddr) -> bool {
    let ip = ip.to_canonical();
    than.is_unspecified()
        && match (ip.is_ipv4(), than.is_ipv4()) {
            (true, false) => true,
            (false, true) => false,
            (true, true) | (false, false) => !ip.is_unspecified(),
        }
}

/// Whether there is IPv4 to be taken from it: not from an IPv6 listener that leaves IPv4 alone.
fn takes_ipv4(listener: &Listener, facts: &Facts) -> bool {
    let is_own = |(protocol, socket): &&(Protocol, diag::Socket)| {
        (*protocol, socket.local) == (listener.protocol, listener.address)
    };
    let mut own = facts.sockets.iter().filter(is_own);
    listener.address.is_ipv4() || !own.any(|(_, socket)| socket.v6only == Some(true))
}

fn warnings(listeners: &[&Listener], sockets: &[Seen]) -> Vec<String> {
    let mut warnings = Vec::new();
    for listener in listeners {
        let name = &listener.name;
        if !sockets.iter().any(|socket| socket.listener.as_ref() == Some(name)) {
            warnings.push(format!("nobody listens on {} ({name})", listener.address));
        }
        let strangers = sockets.iter().filter(|one| one.relation == Relation::Stranger);
        let strangers = strangers.filter(|one| one.listener.as_ref() == Some(name)).count();
        let effect = match listener.engine {
            _ if strangers == 0 => continue,
            Some(Engine::Ebpf) => "never chosen while the master steers",
            Some(Engine::Cbpf) => "they spoil the slot numbers: connections can reach them",
            Some(Engine::None) | None => "they get a share of the connections",
        };
        warnings
            .push(format!("strangers in the group of {} ({name}): {strangers}; {effect}", listener.address));
    }
    for socket in sockets.iter().filter(|socket| !socket.takes_from.is_empty()) {
        let which = match socket.address.ip() {
            ip if ip.is_unspecified() => "over IPv4".to_owned(),
            ip => format!("to {ip}"),
        };
        let from = socket.takes_from.join(", ");
        warnings.push(format!(
            "{} takes every connection {which} away from {from}: the more specific address wins, under any engine",
            socket.address
        ));
    }
    warnings
}
