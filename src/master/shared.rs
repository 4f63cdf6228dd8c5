//! Sockets that all workers share, of every generation: those with a path, which the master makes, and those that the
//! service manager passed to it. They stay open over an upgrade, so that there is nothing to steer, and nothing to lose.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;

use reuseportd_sys::identity::Identity;
use reuseportd_sys::{pidfd, procfs, socket, unix};
use reuseportd_wire::status::{self as wire, Protocol};
use rustix::net::{SocketAddrAny, SocketAddrUnix};
use rustix::process::Uid;
use serde::{Deserialize, Serialize};

use super::Shell;
use super::activation::Passed;
use super::carried::{Carried, if_held};
use super::launch::{Launch, LaunchError};
use super::look::{dump, kernel_protocol};
use super::orphans::reporting_to;
use super::place::serves;
use crate::config::{Bind, Config, Listen, UnixListen, saved};
use crate::unix_file::{self, Cause, FileId};

/// The number of a shared socket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub(super) struct SharedId(u32);

/// Where it is bound.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Place {
    Ip { protocol: Protocol, address: SocketAddr, v6only: bool },
    Unix(#[serde(with = "saved::path")] PathBuf),
}

/// One socket.
#[derive(Debug, Serialize, Deserialize)]
struct Socket {
    place: Place,
    inode: u64,
    /// As the service manager calls it; `None` for what the master made.
    passed_as: Option<String>,
    /// What the master made, until it has removed it.
    file: Option<FileId>,
    /// `None` once nobody is to come to it any more, while some still have connections that came that way.
    #[serde(with = "if_held")]
    handle: Option<Carried<OwnedFd>>,
}

/// All of them, those included that the service manager passed and no config wants.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Shared {
    by_id: BTreeMap<SharedId, Socket>,
    last: u32,
}

/// Why a passed socket can't be what a `[[listen]]` asks for.
#[derive(Debug, thiserror::Error)]
#[error(
    "listen {name:?}: the service manager has passed a socket on {address}, beside which workers can't bind: set \
     bind = \"master\", or take ListenStream= out of the socket unit"
)]
pub(super) struct PassedToWorkers {
    name: String,
    address: SocketAddr,
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Place::Ip { address, protocol: Protocol::Tcp, .. } => write!(f, "{address}"),
            Place::Ip { address, protocol: Protocol::Udp, .. } => write!(f, "{address} (UDP)"),
            Place::Unix(path) => write!(f, "unix:{}", path.display()),
        }
    }
}

impl Place {
    /// Of a socket, if workers can serve it.
    fn of(fd: BorrowedFd<'_>) -> io::Result<Place> {
        let is_datagram = socket::is_datagram(fd)?;
        if !is_datagram && !socket::is_listening(fd)? {
            return Err(io::Error::other("it does not listen"));
        }
        let address = rustix::net::getsockname(fd)?;
        if let Ok(address) = SocketAddr::try_from(address.clone()) {
            let v6only = address.is_ipv6() && rustix::net::sockopt::ipv6_v6only(fd)?;
            let protocol = if is_datagram { Protocol::Udp } else { Protocol::Tcp };
            return Ok(Place::Ip { protocol, address, v6only });
        }
        let path = unix_path(address).filter(|_| !is_datagram);
        path.map(Place::Unix).ok_or_else(|| io::Error::other("it has neither an IP address nor a path"))
    }

    /// Whether it takes what arrives at a configured address.
    fn serves(&self, listen: &Listen) -> bool {
        match self {
            Place::Ip { protocol, address, v6only } => {
                *protocol == listen.protocol && serves(*address, *v6only, listen)
            }
            Place::Unix(_) => false,
        }
    }

    fn is_ip(&self, wanted: Protocol) -> bool {
        matches!(self, Place::Ip { protocol, .. } if *protocol == wanted)
    }
}

fn unix_path(address: SocketAddrAny) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStrExt;
    let address = SocketAddrUnix::try_from(address).ok()?;
    Some(PathBuf::from(std::ffi::OsStr::from_bytes(address.path_bytes()?)))
}

impl Shared {
    /// Takes in what the service manager passed. What is held already, by a former master, is the same socket.
    pub(super) fn receive(&mut self, passed: Vec<Passed>) {
        for Passed { name, socket } in passed {
            let place = Place::of(socket.as_fd());
            let known = socket::inode(socket.as_fd()).map(|inode| (inode, self.by_inode(inode)));
            match (place, known) {
                (_, Ok((_, Some(_)))) => {}
                (Ok(place), Ok((inode, None))) => {
                    let handle = Some(Carried::new(socket));
                    self.insert(Socket { place, inode, passed_as: Some(name), file: None, handle });
                }
                (Err(error), _) | (_, Err(error)) => tracing::warn!(
                    event = "socket_unused",
                    name,
                    %error,
                    "the service manager passed a socket ({name}) that workers can't serve: {error}; it is closed"
                ),
            }
        }
    }

    fn insert(&mut self, socket: Socket) -> SharedId {
        self.last += 1;
        self.by_id.insert(SharedId(self.last), socket);
        SharedId(self.last)
    }

    fn by_inode(&self, inode: u64) -> Option<SharedId> {
        self.by_id.iter().find(|(_, socket)| socket.inode == inode).map(|(id, _)| *id)
    }

    /// Those the service manager passed for `[[listen]]` of this config, by their names.
    pub(super) fn passed_for(&self, config: &Config) -> Result<BTreeMap<String, SharedId>, PassedToWorkers> {
        let mut found = BTreeMap::new();
        for listen in &config.listen {
            let called = |socket: &Socket| {
                socket.passed_as.as_ref() == Some(&listen.name) && socket.place.is_ip(listen.protocol)
            };
            let at_address = self.passed(|socket| socket.place.serves(listen));
            let (name, address) = (listen.name.clone(), listen.address);
            match (at_address.or_else(|| self.passed(called)), listen.bind) {
                (Some(id), Bind::Master) => drop(found.insert(name, id)),
                (Some(_), Bind::Worker) if at_address.is_some() => {
                    return Err(PassedToWorkers { name, address });
                }
                (Some(_), Bind::Worker) | (None, _) => {}
            }
        }
        for listen in &config.unix {
            let at_path = self.passed(|socket| socket.place == Place::Unix(listen.path.clone()));
            let called = |socket: &Socket| {
                socket.passed_as.as_ref() == Some(&listen.name) && matches!(socket.place, Place::Unix(_))
            };
            if let Some(id) = at_path.or_else(|| self.passed(called)) {
                found.insert(listen.name.clone(), id);
            }
        }
        Ok(found)
    }

    fn passed(&self, is_it: impl Fn(&Socket) -> bool) -> Option<SharedId> {
        let mut all = self.by_id.iter().filter(|(_, socket)| socket.passed_as.is_some());
        all.find(|(_, socket)| is_it(socket)).map(|(id, _)| *id)
    }

    /// Adds the sockets with a path: those there are, or new ones. If one can't be had none is made.
    pub(super) fn open(
        &mut self,
        config: &Config,
        notify: &std::path::Path,
        mut own: BTreeMap<String, SharedId>,
    ) -> Result<BTreeMap<String, SharedId>, LaunchError> {
        let identity = &config.app.identity;
        let mut made = BTreeSet::new();
        for listen in &config.unix {
            if own.contains_key(&listen.name) {
                continue;
            }
            let id = match self.in_place(listen) {
                Some(id) => Ok(id),
                None => make(listen, identity, notify).map(|socket| {
                    let id = self.insert(socket);
                    made.insert(id);
                    id
                }),
            };
            match id {
                Ok(id) => drop(own.insert(listen.name.clone(), id)),
                Err(error) => {
                    self.by_id.retain(|id, socket| !made.contains(id) || socket.leave(identity.uid));
                    return Err(error.into());
                }
            }
        }
        Ok(own)
    }

    /// What the master made, if its file is still there.
    fn in_place(&self, listen: &UnixListen) -> Option<SharedId> {
        let place = Place::Unix(listen.path.clone());
        let is_it = |socket: &&Socket| {
            let has_file = socket.file.is_some() && socket.file == FileId::at(&listen.path);
            socket.place == place && socket.handle.is_some() && has_file
        };
        self.by_id.iter().find(|(_, socket)| is_it(socket)).map(|(id, _)| *id)
    }

    /// Nobody is to come to any but these any more; what nobody has connections of is forgotten.
    pub(super) fn keep(&mut self, served: &BTreeSet<SharedId>, used: &BTreeSet<SharedId>, uid: Option<Uid>) {
        self.by_id.retain(|id, socket| {
            let stays = socket.passed_as.is_some() || served.contains(id);
            stays || socket.leave(uid) || used.contains(id)
        });
    }

    /// The service ends: from now on nobody finds what the master made. Who has connected is served, as long as workers
    /// are.
    pub(super) fn close_doors(&mut self, uid: Option<Uid>) {
        self.by_id.values_mut().for_each(|socket| socket.unlink(uid));
    }

    /// The last that is heard of them: who waits in a socket of the master's is told, and counted.
    pub(super) fn end(&mut self, uid: Option<Uid>) {
        self.close_doors(uid);
        for socket in self.by_id.values().filter(|socket| socket.passed_as.is_none()) {
            let left = socket.handle.as_ref().map_or(0, |handle| left_in(handle.as_fd()));
            if left > 0 {
                let address = socket.place.to_string();
                tracing::warn!(
                    event = "left_waiting",
                    address,
                    left,
                    "{left} connections waited at {address} when the service ended"
                );
            }
        }
    }

    pub(super) fn place(&self, id: SharedId) -> Option<&Place> {
        self.by_id.get(&id).map(|socket| &socket.place)
    }

    pub(super) fn handle(&self, id: SharedId) -> Option<BorrowedFd<'_>> {
        self.by_id.get(&id)?.handle.as_ref().map(|handle| handle.as_fd())
    }

    fn is_passed(&self, id: SharedId) -> bool {
        self.by_id.get(&id).is_some_and(|socket| socket.passed_as.is_some())
    }

    /// Gives the files the mode and group, and the queues the limit, of the config in force.
    pub(super) fn settle(&self, config: &Config, own: &BTreeMap<String, SharedId>) {
        for listen in &config.unix {
            let socket = own.get(&listen.name).and_then(|id| self.by_id.get(id));
            let Some(socket) = socket.filter(|socket| socket.passed_as.is_none()) else { continue };
            let done =
                socket.file.map_or(Ok(()), |file| unix_file::settle(listen, &config.app.identity, file));
            if let Err(error) = done {
                tracing::error!(%error, "{error}");
            }
            let backlog = i32::try_from(listen.backlog).unwrap_or(i32::MAX);
            if let Some(Err(error)) =
                socket.handle.as_ref().map(|handle| socket::listen(handle.as_fd(), backlog))
            {
                tracing::error!(listener = listen.name, %error, "cannot change its backlog");
            }
        }
    }

    /// Says which sockets came for nothing.
    pub(super) fn warn_of_unused(&self, own: &BTreeMap<String, SharedId>) {
        let used: BTreeSet<&SharedId> = own.values().collect();
        let passed = |socket: &Socket| Some((socket.place.to_string(), socket.passed_as.clone()?));
        let unused = self.by_id.iter().filter(|(id, _)| !used.contains(id));
        for (address, name) in unused.filter_map(|(_, socket)| passed(socket)) {
            tracing::warn!(
                event = "socket_unused",
                address,
                name,
                "the service manager passed a socket on {address} ({name}), and no [[listen]] with bind = \"master\" has \
                 this address or name: nobody accepts what arrives there; add one, or take it out of the socket unit"
            );
        }
    }

    /// Inodes of accepted connections that came through any of them.
    pub(super) fn accepted(&self) -> io::Result<BTreeSet<u64>> {
        let mut inodes = BTreeSet::new();
        let places: Vec<&Place> = self.by_id.values().map(|socket| &socket.place).collect();
        if places.iter().any(|place| matches!(place, Place::Unix(_))) {
            let of_path = |one: &unix::UnixSocket| places.contains(&&Place::Unix(one.path.clone()));
            let connected = unix::sockets()?.into_iter().filter(|one| one.is_connected && of_path(one));
            inodes.extend(connected.map(|one| one.inode));
        }
        for place in places {
            if let Place::Ip { protocol, address, .. } = place {
                let open = dump(kernel_protocol(*protocol), Some(address.port()), super::look::OPEN_STATES)?;
                inodes.extend(open.into_iter().map(|one| u64::from(one.inode)));
            }
        }
        inodes.remove(&0);
        Ok(inodes)
    }
}

impl Socket {
    /// Nobody finds it any more.
    fn unlink(&mut self, uid: Option<Uid>) {
        if let (Some(file), Place::Unix(path)) = (self.file.take(), &self.place) {
            unix_file::remove(path, file, uid);
        }
    }

    /// The master lets go of it; `false`, for a list to be rid of it.
    fn leave(&mut self, uid: Option<Uid>) -> bool {
        self.unlink(uid);
        self.handle = None;
        false
    }
}

/// Connections that nobody has accepted, which are closed by this. Of a socket that no worker has any more.
fn left_in(listener: BorrowedFd<'_>) -> usize {
    if socket::is_datagram(listener).unwrap_or(true) || rustix::io::ioctl_fionbio(listener, true).is_err() {
        return 0;
    }
    std::iter::from_fn(|| rustix::net::accept(listener).ok()).count()
}

fn make(
    listen: &UnixListen,
    identity: &Identity,
    notify: &std::path::Path,
) -> Result<Socket, unix_file::UnixError> {
    let of = |handle: OwnedFd, file| {
        let inode = socket::inode(handle.as_fd()).unwrap_or(0);
        let (place, handle) = (Place::Unix(listen.path.clone()), Some(Carried::new(handle)));
        Socket { place, inode, passed_as: None, file: Some(file), handle }
    };
    if let Some((handle, file)) = of_orphans(listen, notify)? {
        return Ok(of(handle, file));
    }
    let (handle, file) = unix_file::make(listen, identity)?;
    Ok(of(handle, file))
}

/// The socket of a master that was killed with its keeper: its workers still have it.
fn of_orphans(
    listen: &UnixListen,
    notify: &std::path::Path,
) -> Result<Option<(OwnedFd, FileId)>, unix_file::UnixError> {
    // Of two with this path nobody can tell which one's the file is.
    let (Some(file), &[inode]) = (FileId::at(&listen.path), unix_file::listening(&listen.path).as_slice())
    else {
        return Ok(None);
    };
    let orphans = reporting_to(notify, &BTreeSet::new());
    let holds = |pid: i32| {
        let held = procfs::socket_inodes(pid).unwrap_or_default();
        held.into_iter().find(|(_, of)| *of == inode).map(|(number, _)| (pid, number))
    };
    let processes = |pid: i32| procfs::descendants(pid, pid).unwrap_or_default();
    let mut holders = orphans.iter().flat_map(|orphan| processes(orphan.pid)).filter_map(holds).peekable();
    if holders.peek().is_none() {
        return Ok(None);
    }
    let taken = holders.find_map(|(pid, number)| {
        let handle = pidfd::open(pid).and_then(|process| pidfd::getfd(process.as_fd(), number)).ok()?;
        (socket::inode(handle.as_fd()).ok()? == inode).then_some(handle)
    });
    let unreachable =
        || io::Error::other("workers of a former master hold it, and it can't be taken from them");
    match taken {
        Some(handle) => Ok(Some((handle, file))),
        None => Err(Cause::Unknown(unreachable()).of(listen)),
    }
}

impl Shell {
    fn file_user(&self) -> Option<Uid> {
        self.config.app.identity.uid
    }

    /// Lets go of the shared sockets that no generation is to accept from any more.
    pub(super) fn keep_shared(&mut self) {
        let present = self.core.status().generations;
        let of = |launch: &Launch| launch.shared.values().copied().collect::<Vec<_>>();
        let mut served: BTreeSet<SharedId> = self.prepared.iter().flat_map(of).collect();
        let mut used = served.clone();
        for view in present {
            let own = self.launches.get(&view.generation).map(of).unwrap_or_default();
            used.extend(own.iter().copied());
            if view.state != reuseportd_core::GenerationState::Draining {
                served.extend(own);
            }
        }
        self.shared.keep(&served, &used, self.file_user());
    }

    pub(super) fn close_doors(&mut self) {
        self.shared.close_doors(self.file_user());
    }

    pub(super) fn end_shared(&mut self) {
        self.shared.end(self.file_user());
    }

    /// Those of the present generations, as they are listed with all listeners.
    pub(super) fn shared_status(&self) -> Vec<wire::ListenerStatus> {
        let present = self.core.status().generations.into_iter().rev();
        let mut seen = BTreeSet::new();
        let launches = present.filter_map(|view| self.launches.get(&view.generation));
        let all = launches.flat_map(|launch| &launch.shared);
        let new = all.filter(|(_, id)| seen.insert(**id));
        new.filter_map(|(name, id)| {
            let place = self.shared.place(*id)?;
            let (address, protocol) = match place {
                Place::Ip { address, protocol, .. } => (address.to_string(), *protocol),
                Place::Unix(_) => (place.to_string(), Protocol::Tcp),
            };
            let engine_reason = match (self.shared.is_passed(*id), place) {
                (true, _) => "one socket for all workers, from the service manager",
                (false, _) => "one socket for all workers: a unix socket has no groups",
            };
            Some(wire::ListenerStatus {
                name: name.clone(),
                address,
                protocol,
                bind: wire::Bind::Master,
                engine: wire::Engine::None,
                engine_reason: engine_reason.to_owned(),
                strangers: None,
                leftovers_taken: 0,
                leftovers_lost: 0,
                flows_begun: None,
                flows_forgotten: None,
            })
        })
        .collect()
    }
}
