//! Sockets the master makes for seats, and how their workers find them: the LISTEN_FDS protocol.

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
use crate::config::{Bind, Listen};

/// The number of the first passed socket, by the protocol.
pub(super) const FIRST_NUMBER: i32 = 3;

impl Launch {
    /// The listeners whose sockets the master makes, in the order they are passed.
    pub(super) fn seat_listeners(&self) -> impl Iterator<Item = (GroupId, &Listen)> {
        self.listeners().filter(|(_, listen)| listen.bind == Bind::Master)
    }

    /// What tells a worker about them; its LISTEN_PID only the worker's own process can fill in.
    pub(super) fn seat_variables(&self, generation: Generation) -> Vec<(&'static str, String)> {
        let names: Vec<&str> = self.seat_listeners().map(|(_, listen)| listen.name.as_str()).collect();
        if names.is_empty() {
            return Vec::new();
        }
        let numbered = self.seat_listeners().zip(FIRST_NUMBER..);
        let ports: Vec<String> =
            numbered.map(|((_, listen), number)| format!("{}={number}", listen.address)).collect();
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

    /// The sockets of a seat, under the numbers a worker finds them at.
    pub(super) fn seat_fds(&self, launch: &Launch, seat: Seat) -> Vec<(BorrowedFd<'_>, i32)> {
        let sockets = launch.seat_listeners().filter_map(|(group, _)| {
            let listener = self.listeners.of_seat(group, seat)?;
            self.listeners.handle(listener)
        });
        sockets.zip(FIRST_NUMBER..).collect()
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
