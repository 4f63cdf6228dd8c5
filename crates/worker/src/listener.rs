//! Sockets before `serve`, and the listening ones after it: bind, accept, drain.

use std::io;
use std::net::{TcpListener, TcpStream, UdpSocket};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, Timespec, poll};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

use crate::{Error, Listen, Protocol, Watchdog};

/// How long to wait before accepting again when descriptors or memory have run out: no event tells
/// when there are some again.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(20);

/// Sockets with their names.
pub(crate) type Named<Of> = Vec<(String, Of)>;

/// A socket that has an address and does not listen yet. One of UDP never does: it can be given datagrams from now on,
/// which wait in it.
#[derive(Debug)]
pub struct Bound {
    name: String,
    socket: Socket,
}

impl Bound {
    /// A socket of the program's own making: bound with SO_REUSEPORT to the address that
    /// [`Worker::listen`](crate::Worker::listen) names for `name`, and not listening.
    /// Set SO_REUSEADDR for TCP only: with UDP it lets anybody share the port.
    #[must_use]
    pub fn new(name: &str, socket: impl Into<OwnedFd>) -> Self {
        Self { name: name.to_owned(), socket: socket.into().into() }
    }

    /// The listener's name.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    pub(crate) fn bind(
        listen: &Listen,
        set_options: &mut impl FnMut(&Listen, &Socket) -> io::Result<()>,
    ) -> Result<Self, Error> {
        let failed = |action| {
            move |source| Error::Socket { action, name: listen.name.clone(), address: listen.address, source }
        };
        let domain = Domain::for_address(listen.address);
        let kind = match listen.protocol {
            Protocol::Tcp => Type::STREAM,
            Protocol::Udp => Type::DGRAM,
        };
        let socket = Socket::new(domain, kind, None).map_err(failed("make the socket of"))?;
        set_defaults(&socket, listen).map_err(failed("set SO_REUSEPORT on"))?;
        set_options(listen, &socket).map_err(failed("set the program's options on"))?;
        socket.bind(&listen.address.into()).map_err(failed("bind"))?;
        Ok(Self { name: listen.name.clone(), socket })
    }

    fn is_datagram(&self) -> Result<bool, Error> {
        Ok(self.socket.r#type().map_err(Error::io("ask for the type of a socket"))? == Type::DGRAM)
    }

    /// Listens, if it is a socket that does.
    pub(crate) fn listen(&self, backlog: i32) -> Result<(), Error> {
        if self.is_datagram()? { Ok(()) } else { self.socket.listen(backlog).map_err(Error::io("listen")) }
    }

    /// Those that listen, and those that receive without.
    pub(crate) fn sort(bound: Vec<Self>) -> Result<(Named<TcpListener>, Named<UdpSocket>), Error> {
        let (mut listeners, mut datagrams) = (Vec::new(), Vec::new());
        for one in bound {
            if one.is_datagram()? {
                datagrams.push((one.name, one.socket.into()));
            } else {
                listeners.push((one.name, one.socket.into()));
            }
        }
        Ok((listeners, datagrams))
    }
}

impl AsFd for Bound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn set_defaults(socket: &Socket, listen: &Listen) -> io::Result<()> {
    // For the restart of a whole service: connections in TIME_WAIT must not keep the port. UDP has no such thing; there
    // it would let any user's socket take the port's datagrams.
    socket.set_reuse_address(listen.protocol == Protocol::Tcp)?;
    socket.set_reuse_port(true)?;
    if listen.address.is_ipv6() {
        // The default depends on a sysctl; the group does not. `set_options` may choose otherwise.
        socket.set_only_v6(false)?;
    }
    Ok(())
}

/// Accepts until the listener's queue is empty and says how many that were. The listener is made
/// non-blocking. A connection the client has given up meanwhile is passed over. When descriptors have run out
/// this waits until others are closed: in an async program call it where waiting is allowed.
///
/// # Errors
/// `accept` fails for a reason that lies in the listener itself.
pub fn drain(listener: &TcpListener, accepted: impl FnMut(TcpStream)) -> Result<u32, Error> {
    drain_alive(listener, &mut None, accepted)
}

pub(crate) fn drain_alive(
    listener: &TcpListener,
    watchdog: &mut Option<Watchdog>,
    mut accepted: impl FnMut(TcpStream),
) -> Result<u32, Error> {
    set_nonblocking(listener)?;
    let mut count = 0;
    loop {
        watchdog.as_mut().map(Watchdog::feed).transpose()?;
        match accept(listener)? {
            Accepted::Stream(stream) => {
                count += 1;
                accepted(stream);
            }
            Accepted::Exhausted => pause()?,
            Accepted::Empty | Accepted::Closed => return Ok(count),
        }
    }
}

/// A signal may end it early.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> rustix::io::Result<()> {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

pub(crate) enum Accepted {
    Stream(TcpStream),
    Empty,
    /// Descriptors or memory have run out; something may wait.
    Exhausted,
    /// It does not listen any more: somebody shut it down, its connections are elsewhere.
    Closed,
}

pub(crate) fn accept(listener: &TcpListener) -> Result<Accepted, Error> {
    loop {
        let source = match listener.accept() {
            Ok((stream, _)) => return Ok(Accepted::Stream(stream)),
            Err(source) => source,
        };
        match Errno::from_io_error(&source) {
            Some(Errno::AGAIN) => return Ok(Accepted::Empty),
            Some(Errno::INVAL) => return Ok(Accepted::Closed),
            Some(Errno::MFILE | Errno::NFILE | Errno::NOBUFS | Errno::NOMEM) => {
                return Ok(Accepted::Exhausted);
            }
            // What accept(2) reports of the one connection it took from the queue.
            Some(
                Errno::INTR
                | Errno::CONNABORTED
                | Errno::PERM
                | Errno::PROTO
                | Errno::NOPROTOOPT
                | Errno::NETDOWN
                | Errno::NETUNREACH
                | Errno::HOSTDOWN
                | Errno::HOSTUNREACH
                | Errno::NONET,
            ) => {}
            _ => return Err(Error::io("accept")(source)),
        }
    }
}

pub(crate) fn pause() -> Result<(), Error> {
    wait(&mut [], Some(EXHAUSTED_PAUSE)).map_err(Error::io("wait for descriptors or memory to become free"))
}

pub(crate) fn set_nonblocking(listener: &TcpListener) -> Result<(), Error> {
    listener.set_nonblocking(true).map_err(Error::io("make a listener non-blocking"))
}
