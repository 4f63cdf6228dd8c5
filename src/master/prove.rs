//! Proving a worker that says nothing: it accepts an empty connection made to its own listener, past all others.
//! Programs like gunicorn listen long before the application behind them has been loaded.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reuseportd_core::{ListenerId, WorkerId};
use reuseportd_sys::diag::{Socket as Listed, states};
use reuseportd_sys::socket;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};

use super::Shell;
use super::look::dump;

/// A handshake within one machine is over before `connect()` returns; so long it is waited for at most.
const HANDSHAKE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A connection made to prove a listener.
#[derive(Debug)]
pub(super) struct Proof {
    /// Held until the worker has accepted it.
    _connection: Socket,
    source: SocketAddr,
    port: u16,
}

impl Proof {
    /// Whether the worker has taken it. With TCP_DEFER_ACCEPT there is nothing to take before data comes: such a
    /// listener can't be proven by an empty connection, and passes.
    fn is_accepted(&self, listed: &[Listed]) -> bool {
        let ours =
            listed.iter().find(|socket| socket.remote == self.source && socket.local.port() == self.port);
        ours.is_none_or(|socket| socket.inode != 0 || socket.state == states::SYN_RECV)
    }
}

impl Shell {
    /// Connects to each listener of the worker if that has not been done, and says whether all were accepted from.
    pub(super) fn prove(&mut self, worker: WorkerId) -> bool {
        if !self.proofs.contains_key(&worker) {
            match self.connect_to_all(worker) {
                Ok(proofs) => drop(self.proofs.insert(worker, proofs)),
                Err(error) => {
                    tracing::warn!(pid = self.pid(worker), %error, "cannot connect to a worker to prove it");
                    return false;
                }
            }
        }
        let accepted = self.proofs.get(&worker).is_some_and(|proofs| {
            proofs.iter().all(|proof| dump(Some(proof.port), HAS_PEER).is_ok_and(|l| proof.is_accepted(&l)))
        });
        if accepted {
            self.proofs.remove(&worker);
        }
        accepted
    }

    fn connect_to_all(&self, worker: WorkerId) -> io::Result<Vec<Proof>> {
        self.listeners.of_worker(worker).map(|listener| self.connect_to(listener)).collect()
    }

    fn connect_to(&self, id: ListenerId) -> io::Result<Proof> {
        let listener = self.listeners.of(id).ok_or(io::ErrorKind::NotFound)?;
        let handle = self.listeners.handle(id).ok_or(io::ErrorKind::NotFound)?;
        let mut target = socket::local_addr(handle)?;
        if target.ip().is_unspecified() {
            target.set_ip(match target.ip() {
                IpAddr::V4(_) => Ipv4Addr::LOCALHOST.into(),
                IpAddr::V6(_) => Ipv6Addr::LOCALHOST.into(),
            });
        }
        let connection =
            Socket::new(Domain::for_address(target), Type::STREAM.nonblocking().cloexec(), None)?;
        connection.bind(&SocketAddr::new(target.ip(), 0).into())?;
        let source = connection.local_addr()?.as_socket().ok_or(io::ErrorKind::AddrNotAvailable)?;
        self.groups.past_all(listener.group, handle, source, || {
            match connection.connect(&target.into()) {
                Err(error) if error.raw_os_error() != Some(nix::libc::EINPROGRESS) => return Err(error),
                Ok(()) | Err(_) => {}
            }
            let mut fds = [PollFd::new(&connection, PollFlags::OUT)];
            match poll(&mut fds, Some(&HANDSHAKE))? {
                0 => Err(io::ErrorKind::TimedOut.into()),
                _ => connection.take_error()?.map_or(Ok(()), Err),
            }
        })?;
        Ok(Proof { _connection: connection, source, port: target.port() })
    }
}

/// States of a connection, on its way or made.
const HAS_PEER: u32 =
    states::SYN_RECV | states::ESTABLISHED | states::CLOSE_WAIT | states::FIN_WAIT1 | states::FIN_WAIT2;
