//! Proving a worker that says nothing: it accepts an empty connection made to its own listener, past all others.
//! Programs like gunicorn listen long before the application behind them has been loaded.

use std::io;
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

use reuseportd_core::{ListenerId, Verdict, WorkerId};
use reuseportd_sys::diag::{Protocol, Socket as Listed, states};
use reuseportd_sys::{procfs, socket};
use reuseportd_wire::status as wire;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use socket2::{Domain, Socket, Type};

use super::Shell;
use super::exchange::{is_asked, request};
use super::look::dump;

/// A handshake within one machine is over before `connect()` returns; so long it is waited for at most.
const HANDSHAKE: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// A connection made to prove a listener.
#[derive(Debug)]
pub(super) struct Proof {
    listener: ListenerId,
    /// Held until the worker has accepted it; an answer comes over it.
    connection: Socket,
    source: SocketAddr,
    port: u16,
    /// Others may accept from this listener too.
    is_shared: bool,
    /// The worker has accepted it; what it does with it since then is no matter.
    is_passed: bool,
}

/// What became of one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Fate {
    Waits,
    /// TCP_DEFER_ACCEPT: for a second or so the kernel waits for data before anybody can accept it.
    Deferred,
    /// Under this inode, which is 0 where there is none to tell.
    Accepted(u64),
}

impl Proof {
    fn fate(&self, listed: &[Listed]) -> Fate {
        let ours =
            listed.iter().find(|socket| socket.remote == self.source && socket.local.port() == self.port);
        match ours {
            // Without an inode it has not been accepted, or was, and has been closed.
            Some(socket) if socket.inode == 0 && IN_QUEUE & socket.state != 0 => Fate::Waits,
            Some(socket) if socket.state == states::SYN_RECV => Fate::Deferred,
            Some(socket) => Fate::Accepted(socket.inode.into()),
            None => Fate::Accepted(0),
        }
    }
}

impl Shell {
    /// Connects to the worker if that has not been done, and says how far its proof is.
    pub(super) fn prove(&mut self, worker: WorkerId) -> Verdict {
        if self.exchanges.contains_key(&worker) {
            return Verdict::Waiting;
        }
        let proofs = self.proofs.remove(&worker).map_or_else(|| self.connect_to_all(worker), Ok);
        let proofs = proofs.and_then(|mut proofs| {
            proofs.iter_mut().try_for_each(|proof| self.follow(worker, proof)).map(|()| proofs)
        });
        let proofs = match proofs {
            Ok(proofs) if proofs.iter().all(|proof| proof.is_passed) => proofs,
            Ok(proofs) => {
                self.proofs.insert(worker, proofs);
                return Verdict::Waiting;
            }
            Err(error) => {
                tracing::warn!(pid = self.pid(worker), %error, "cannot connect to a worker to prove it");
                return Verdict::Waiting;
            }
        };
        let asked = self.launch_of(worker).map(|launch| &launch.config).filter(|config| is_asked(config));
        let request = asked.map(|config| request(&config.readiness.path, &config.listen));
        match request.zip(proofs.into_iter().next()) {
            Some((request, proof)) => self.ask(worker, proof.connection, &request),
            None => Verdict::Passed,
        }
    }

    /// Looks what became of it. Where another process was faster it is made anew at once: looks are far apart, and under
    /// load the older worker of a seat wins as often as not.
    fn follow(&self, worker: WorkerId, proof: &mut Proof) -> io::Result<()> {
        if proof.is_passed {
            return Ok(());
        }
        match self.is_accepted(worker, proof) {
            None => {}
            Some(true) => proof.is_passed = true,
            Some(false) => *proof = self.connect_to(proof.listener, proof.is_shared)?,
        }
        Ok(())
    }

    /// Whether the worker accepted it (`true`), or another process; `None` as long as it waits.
    fn is_accepted(&self, worker: WorkerId, proof: &Proof) -> Option<bool> {
        match proof.fate(&dump(Protocol::Tcp, Some(proof.port), HAS_PEER).ok()?) {
            Fate::Waits => None,
            // A program that sets this has begun to serve, unless it was an older worker of the seat that set it.
            Fate::Deferred if proof.is_shared => None,
            Fate::Deferred => Some(true),
            Fate::Accepted(_) if !proof.is_shared => Some(true),
            Fate::Accepted(inode) => {
                let pid = self.pid(worker);
                let holds = |pid: i32| {
                    procfs::socket_inodes(pid)
                        .is_ok_and(|held| held.iter().any(|(_, of)| *of == inode && inode != 0))
                };
                Some(self.processes_of(pid).is_ok_and(|pids| pids.into_iter().any(holds)))
            }
        }
    }

    /// Its own listeners, and its seat's, which an older worker may accept from as well.
    fn connect_to_all(&self, worker: WorkerId) -> io::Result<Vec<Proof>> {
        let own = self.listeners.of_worker(worker).map(|listener| (listener, false));
        let seat = self.processes.get(&worker).map(|process| process.seat);
        let of_seat = self.launch_of(worker).zip(seat).into_iter().flat_map(|(launch, seat)| {
            launch.seat_listeners().filter_map(move |(group, _)| self.listeners.of_seat(group, seat))
        });
        let mut all: Vec<(ListenerId, bool)> = own.chain(of_seat.map(|listener| (listener, true))).collect();
        // To a UDP socket there is nothing to connect, and nothing that would show who read it: that it is there has to do.
        all.retain(|(id, _)| !self.takes_datagrams(*id));
        // Requests go to the first listener of the config: others may speak another protocol.
        let launch = self.launch_of(worker).filter(|launch| is_asked(&launch.config));
        if let Some((first, _)) = launch
            .and_then(|launch| launch.listeners().find(|(_, listen)| listen.protocol == wire::Protocol::Tcp))
        {
            all.retain(|(id, _)| self.listeners.of(*id).is_some_and(|listener| listener.group == first));
            all.truncate(1);
        }
        all.into_iter().map(|(id, shared)| self.connect_to(id, shared)).collect()
    }

    fn connect_to(&self, id: ListenerId, is_shared: bool) -> io::Result<Proof> {
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
        self.groups.past_all(listener.group, handle, listener.key, source, || {
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
        Ok(Proof { listener: id, connection, source, port: target.port(), is_shared, is_passed: false })
    }
}

/// States of a connection that nobody has closed at its worker's end.
const IN_QUEUE: u32 = states::ESTABLISHED | states::CLOSE_WAIT;
/// States of a connection, on its way or made.
const HAS_PEER: u32 = IN_QUEUE | states::SYN_RECV | states::FIN_WAIT1 | states::FIN_WAIT2;
