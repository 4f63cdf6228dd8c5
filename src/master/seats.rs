//! Sockets the master makes for seats, and how workers find what is passed to them: the LISTEN_FDS protocol.

use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use reuseportd_core::{Generation, GroupId, ListenerId, Seat};
use reuseportd_sys::{identity, socket};
use reuseportd_wire::env;
use reuseportd_wire::status::Protocol;
use socket2::{Domain, Socket, Type};

use super::Shell;
use super::groups::errno;
use super::launch::Launch;
use super::shared::SharedId;
use crate::config::{Bind, Entry, Listen};

/// The number of the first passed socket, by the protocol.
pub(super) const FIRST_NUMBER: i32 = 3;

/// Whose socket is passed.
#[derive(Debug, Clone, Copy)]
pub(super) enum Source {
    /// Its seat's.
    Seat(GroupId),
    /// That of all workers.
    Shared(SharedId),
}

impl Launch {
    /// The listeners with a socket for each seat.
    pub(super) fn seat_listeners(&self) -> impl Iterator<Item = (GroupId, &Listen)> {
        self.listeners().filter(|(_, listen)| listen.bind == Bind::Master)
    }

    /// The listeners whose sockets are passed to a worker, in that order, which is the config's.
    pub(super) fn passed(&self) -> impl Iterator<Item = (Entry<'_>, Source)> {
        self.config.listeners().in_order().filter_map(|entry| {
            let shared = self.shared.get(entry.name()).map(|id| Source::Shared(*id));
            let of_seat = || self.seat_listeners().find(|(_, listen)| listen.name == entry.name());
            Some((entry, shared.or_else(|| of_seat().map(|(group, _)| Source::Seat(group)))?))
        })
    }

    /// What tells a worker about them; its LISTEN_PID only the worker's own process can fill in.
    pub(super) fn passed_variables(&self, generation: Generation) -> Vec<(&'static str, String)> {
        let names: Vec<&str> = self.passed().map(|(entry, _)| entry.name()).collect();
        if names.is_empty() {
            return Vec::new();
        }
        let place = |entry| match entry {
            Entry::Ip(listen) => listen.address.to_string(),
            Entry::Unix(listen) => listen.path.display().to_string(),
        };
        let numbered = self.passed().zip(FIRST_NUMBER..);
        let ports: Vec<String> =
            numbered.map(|((entry, _), number)| format!("{}={number}", place(entry))).collect();
        vec![
            (env::LISTEN_FDS, names.len().to_string()),
            (env::LISTEN_FDNAMES, names.join(":")),
            (env::SERVER_STARTER_PORT, ports.join(";")),
            (env::SERVER_STARTER_GENERATION, generation.0.to_string()),
        ]
    }
}

impl Shell {
    /// Makes the socket of a seat, listening.
    pub(super) fn bind_seat(
        &mut self,
        group: GroupId,
        generation: Generation,
        seat: Seat,
    ) -> Result<ListenerId, i32> {
        let launch = self.launches.get(&generation).ok_or(nix::libc::ENOENT)?;
        let listen = launch.listeners().find(|(of, _)| *of == group).map(|(_, listen)| listen);
        let listen = listen.ok_or(nix::libc::ENOENT)?;
        let uid = launch.config.app.identity.uid;
        // Beside those of workers, wherever those are: a worker's [::] may serve a configured 0.0.0.0.
        let used = self.groups.of(group).filter(|_| self.listeners.is_used(group));
        let address = used.and_then(|group| group.bound).unwrap_or(listen.address);
        let made = make(listen, address, uid).and_then(|socket| self.listeners.add_seat(group, seat, socket));
        if made.is_ok() {
            self.groups.note_bound(group, address);
        }
        made.map_err(|error| {
            tracing::error!(listener = listen.name, seat = seat.0, %error, "cannot make the socket of a seat");
            errno(&error)
        })
    }

    /// The sockets passed to the worker of a seat, under the numbers it finds them at.
    pub(super) fn passed_fds(&self, launch: &Launch, seat: Seat) -> io::Result<Vec<(BorrowedFd<'_>, i32)>> {
        let handle = |source| match source {
            Source::Seat(group) => self.listeners.handle(self.listeners.of_seat(group, seat)?),
            Source::Shared(id) => self.shared.handle(id),
        };
        // With one missing, all behind it would be taken for their neighbours.
        let missing = |entry: Entry<'_>| io::Error::other(format!("no socket for {}", entry.address()));
        let sockets = launch.passed().zip(FIRST_NUMBER..);
        sockets
            .map(|((entry, source), number)| Ok((handle(source).ok_or_else(|| missing(entry))?, number)))
            .collect()
    }
}

/// A group of sockets belongs to one uid: the socket is made as the workers' user, so that programs that bind for
/// themselves can be in the same group.
fn make(listen: &Listen, address: SocketAddr, uid: Option<rustix::fs::Uid>) -> io::Result<OwnedFd> {
    let kind = match listen.protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    let new = || Socket::new(Domain::for_address(address), kind.cloexec(), None);
    let socket = identity::as_user(uid, new)?;
    // For the restart of a whole service; a UDP port it would open to strangers.
    socket.set_reuse_address(listen.protocol == Protocol::Tcp)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
        socket.set_only_v6(listen.v6only)?;
    }
    socket.bind(&address.into())?;
    if listen.protocol == Protocol::Tcp {
        socket::listen(socket.as_fd(), i32::try_from(listen.backlog).unwrap_or(i32::MAX))?;
    }
    Ok(socket.into())
}
