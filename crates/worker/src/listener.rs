//! Sockets before and after `serve`: bind, accept, drain.

use std::io;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use socket2::{Domain, Socket, Type};

use crate::{Error, Listen, Order, Orders, Protocol, Serving, Watchdog};

/// How long to wait before accepting again when descriptors or memory have run out: no event tells
/// when there are some again.
const EXHAUSTED_PAUSE: Duration = Duration::from_millis(20);

/// A socket that has an address and does not listen yet.
#[derive(Debug)]
pub struct Bound {
    name: String,
    socket: Socket,
}

impl Bound {
    /// A socket of the program's own making: bound with SO_REUSEPORT to the address that
    /// [`Worker::listen`](crate::Worker::listen) names for `name`, and not listening.
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
        if listen.protocol != Protocol::Tcp {
            return Err(Error::Protocol { name: listen.name.clone() });
        }
        let failed = |action| {
            move |source| Error::Socket { action, name: listen.name.clone(), address: listen.address, source }
        };
        let domain = Domain::for_address(listen.address);
        let socket = Socket::new(domain, Type::STREAM, None).map_err(failed("make the socket of"))?;
        set_defaults(&socket, listen.address).map_err(failed("set SO_REUSEPORT on"))?;
        set_options(listen, &socket).map_err(failed("set the program's options on"))?;
        socket.bind(&listen.address.into()).map_err(failed("bind"))?;
        Ok(Self { name: listen.name.clone(), socket })
    }

    pub(crate) fn listen(&self, backlog: i32) -> Result<(), Error> {
        self.socket.listen(backlog).map_err(Error::io("listen"))
    }

    pub(crate) fn into_listener(self) -> (String, TcpListener) {
        (self.name, self.socket.into())
    }
}

impl AsFd for Bound {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }
}

fn set_defaults(socket: &Socket, address: SocketAddr) -> io::Result<()> {
    // For the restart of a whole service: connections in TIME_WAIT must not keep the port.
    socket.set_reuse_address(true)?;
    socket.set_reuse_port(true)?;
    if address.is_ipv6() {
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

fn drain_alive(
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

impl Serving {
    /// Accepts connections and carries out the master's orders, until told to stop: then the queues are
    /// drained, the listeners closed, the master told, and this returns. What remains is to finish the
    /// open connections and exit.
    ///
    /// `serve` is called for each connection with the listener's name, from this thread: hand the
    /// connection to another, or serve it here and let the others wait.
    ///
    /// # Errors
    /// The channel or a listener fails.
    pub fn accept_each(self, mut serve: impl FnMut(&str, TcpStream)) -> Result<(), Error> {
        let Self { mut listeners, mut orders } = self;
        let mut watchdog = Watchdog::from_env()?;
        for (_, listener) in &listeners {
            set_nonblocking(listener)?;
        }
        let mut is_master_gone = false;
        while !is_master_gone || !listeners.is_empty() {
            let timeout = watchdog.as_mut().map(Watchdog::feed).transpose()?;
            for index in ready_listeners(&listeners, &orders, timeout)? {
                let (name, listener) = &listeners[index];
                match accept(listener)? {
                    Accepted::Stream(stream) => serve(name, stream),
                    Accepted::Empty => {}
                    Accepted::Exhausted => pause()?,
                    Accepted::Closed => drop(listeners.remove(index)),
                }
            }
            match orders.try_next_order() {
                None => {}
                Some(Order::MasterGone) => is_master_gone = true,
                Some(Order::Take { name, listener }) => {
                    let count = drain_alive(&listener, &mut watchdog, |stream| serve(&name, stream))?;
                    drop(listener);
                    orders.taken(&name, count)?;
                }
                Some(Order::Stop) => {
                    for (name, listener) in listeners {
                        drain_alive(&listener, &mut watchdog, |stream| serve(&name, stream))?;
                    }
                    return orders.drained();
                }
            }
        }
        Ok(())
    }
}

/// Waits for a connection or an order, `timeout` at the most, and says which listeners have a connection: the last
/// first, so that one of them can be removed.
fn ready_listeners(
    listeners: &[(String, TcpListener)],
    orders: &Orders,
    timeout: Option<Duration>,
) -> Result<Vec<usize>, Error> {
    let mut fds: Vec<_> =
        listeners.iter().map(|(_, listener)| PollFd::new(listener, PollFlags::IN)).collect();
    fds.push(PollFd::new(orders, PollFlags::IN));
    wait(&mut fds, timeout).map_err(Error::io("wait for connections"))?;
    Ok((0..listeners.len()).rev().filter(|&index| !fds[index].revents().is_empty()).collect())
}

/// A signal may end it early.
pub(crate) fn wait(fds: &mut [PollFd<'_>], timeout: Option<Duration>) -> rustix::io::Result<()> {
    let timeout = timeout.and_then(|timeout| Timespec::try_from(timeout).ok());
    match poll(fds, timeout.as_ref()) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(error) => Err(error),
    }
}

enum Accepted {
    Stream(TcpStream),
    Empty,
    /// Descriptors or memory have run out; something may wait.
    Exhausted,
    /// It does not listen any more: somebody shut it down, its connections are elsewhere.
    Closed,
}

fn accept(listener: &TcpListener) -> Result<Accepted, Error> {
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

fn pause() -> Result<(), Error> {
    wait(&mut [], Some(EXHAUSTED_PAUSE)).map_err(Error::io("wait for descriptors to become free"))
}

fn set_nonblocking(listener: &TcpListener) -> Result<(), Error> {
    listener.set_nonblocking(true).map_err(Error::io("make a listener non-blocking"))
}
