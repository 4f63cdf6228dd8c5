//! Listeners of our own on loopback, on a port the kernel chooses.

use std::io;
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use reuseportd_sys::socket;
use rustix::buffer::spare_capacity;
use rustix::event::{PollFd, PollFlags, Timespec, epoll, poll};
use socket2::{Domain, Socket, Type};

use super::Trouble;

/// For what happens within microseconds on loopback; only a kernel that fails a trial lets it pass.
pub(super) const PATIENCE: Duration = Duration::from_secs(2);
/// Connections made to see where they go: enough that a hash over several listeners would show.
pub(super) const CONNECTIONS: usize = 12;

const BACKLOG: i32 = 16;

/// A socket with SO_REUSEPORT, bound but not listening; port 0 is the kernel's choice.
pub(super) fn bound(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    socket.set_reuse_port(true)?;
    socket.set_nonblocking(true)?;
    socket.bind(&address.into())?;
    Ok(socket.into())
}

/// A group whose members are bound, `listen()` still to be called.
pub(super) fn bound_group(ip: IpAddr, members: usize) -> io::Result<Vec<TcpListener>> {
    let first = bound(SocketAddr::new(ip, 0))?;
    let address = first.local_addr()?;
    std::iter::once(Ok(first)).chain((1..members).map(|_| bound(address))).collect()
}

pub(super) fn listen(listener: &TcpListener) -> io::Result<()> {
    socket::listen(listener.as_fd(), BACKLOG)
}

/// A group on IPv4 loopback that listens in the order of the list.
pub(super) fn group(members: usize) -> io::Result<Vec<TcpListener>> {
    let listeners = bound_group(Ipv4Addr::LOCALHOST.into(), members)?;
    listeners.iter().try_for_each(listen)?;
    Ok(listeners)
}

pub(super) fn connect(listeners: &[TcpListener]) -> Result<TcpStream, Trouble> {
    let address = match listeners.first() {
        Some(listener) => listener.local_addr()?,
        None => return Err(Trouble::Failed("no listener to connect to".to_owned())),
    };
    Ok(TcpStream::connect_timeout(&address, PATIENCE)?)
}

/// Whether loopback can be connected at all.
pub(super) fn is_usable() -> Result<(), Trouble> {
    connect(&group(1)?).map(drop)
}

/// The first of these that has something to be read; none when the time is up.
pub(super) fn readable<Fd: AsFd>(fds: &[Fd]) -> io::Result<Option<usize>> {
    let end = Instant::now() + PATIENCE;
    loop {
        let left =
            Timespec::try_from(end.saturating_duration_since(Instant::now())).map_err(io::Error::other)?;
        let mut waiting: Vec<PollFd<'_>> = fds.iter().map(|fd| PollFd::new(fd, PollFlags::IN)).collect();
        match poll(&mut waiting, Some(&left)) {
            Ok(_) => return Ok(waiting.iter().position(|fd| !fd.revents().is_empty())),
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Waits for what happens from now on. Asked again, poll(2) would look into the queues; epoll looks only where it was
/// woken, as a worker does that has been waiting for long.
pub(super) struct Waiter(OwnedFd);

impl Waiter {
    /// Begins to wait at all of these.
    pub(super) fn at<Fd: AsFd>(fds: &[Fd]) -> io::Result<Waiter> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        for (index, fd) in (0..).zip(fds) {
            epoll::add(&epoll, fd, epoll::EventData::new_u64(index), epoll::EventFlags::IN)?;
        }
        Ok(Waiter(epoll))
    }

    /// Which one woke the waiter; none when the time is up.
    pub(super) fn woken(&self) -> io::Result<Option<u64>> {
        let limit = Timespec::try_from(PATIENCE).map_err(io::Error::other)?;
        let mut events: Vec<epoll::Event> = Vec::with_capacity(1);
        loop {
            match epoll::wait(&self.0, spare_capacity(&mut events), Some(&limit)) {
                Ok(_) => return Ok(events.first().map(|event| event.data.u64())),
                Err(rustix::io::Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
    }
}

/// Connects some times; all must come to listener `wanted`.
pub(super) fn expect_all_at(wanted: usize, listeners: &[TcpListener]) -> Result<(), Trouble> {
    for made in 0..CONNECTIONS {
        let _client = connect(listeners)?;
        match readable(listeners)? {
            Some(at) if at == wanted => drop(listeners[at].accept()?),
            Some(at) => {
                let text = format!(
                    "connection {} of {CONNECTIONS} came to listener {at} instead of {wanted}",
                    made + 1
                );
                return Err(Trouble::Failed(text));
            }
            None => return Err(Trouble::Failed("a connection came to no listener".to_owned())),
        }
    }
    Ok(())
}
