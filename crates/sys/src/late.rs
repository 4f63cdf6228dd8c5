//! SO_REUSEPORT for a socket that listens without it: how it becomes a group of one, to which others can be added.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Gid, Uid};
use rustix::net::{AddressFamily, SocketAddrAny, SocketFlags, SocketType, sockopt};

use crate::{check, socket};

/// Sets SO_REUSEPORT, or takes it back. Of a socket that listens this alone changes nothing but what can be bound
/// beside it, and it is in no group before one of those listens.
///
/// # Errors
/// When the descriptor is no internet socket.
pub fn set_reuseport(fd: BorrowedFd<'_>, is_set: bool) -> io::Result<()> {
    Ok(sockopt::set_socket_reuseport(fd, is_set)?)
}

/// The network interface the socket is bound to, by number; 0: none.
///
/// # Errors
/// When the descriptor is no socket.
pub fn interface(fd: BorrowedFd<'_>) -> io::Result<i32> {
    let mut number = 0_i32;
    let mut len: libc::socklen_t = size_of::<i32>().try_into().map_err(io::Error::other)?;
    let at = std::ptr::from_mut(&mut number).cast();
    // SAFETY: `number` is valid for `len` bytes and any bit pattern is an i32.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_BINDTOIFINDEX, at, &raw mut len)
    })?;
    Ok(number)
}

/// A socket of the same user, bound to the same address and not listening. From then on every socket of that user
/// with SO_REUSEPORT can be bound there, whatever connections of the listener there are from before it had it.
///
/// # Errors
/// `AddrInUse` when the listener is not set SO_REUSEPORT, or it has connections from before that, was not set
/// SO_REUSEADDR either, and this process lacks CAP_NET_ADMIN. `PermissionDenied` without CAP_CHOWN for another user's,
/// or without CAP_NET_BIND_SERVICE for a low port.
pub fn bind_beside(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let beside = like(listener)?;
    sockopt::set_socket_reuseport(&beside, true)?;
    bind_as(listener, beside)
}

/// Takes that back: what is bound there from now on must be allowed by each connection of the listener again. Without
/// CAP_NET_ADMIN nothing changes.
///
/// # Errors
/// When it can't be done.
pub fn bind_beside_no_more(listener: BorrowedFd<'_>) -> io::Result<()> {
    let beside = like(listener)?;
    set_repair(beside.as_fd(), true)?;
    bind_as(listener, beside).map(drop)
}

/// A socket of the same kind and user.
fn like(listener: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let family = sockopt::socket_domain(listener)?;
    let beside = rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    let (theirs, ours) = (rustix::fs::fstat(listener)?, rustix::fs::fstat(&beside)?);
    if theirs.st_uid != ours.st_uid {
        rustix::fs::fchown(&beside, Some(Uid::from_raw(theirs.st_uid)), None::<Gid>)?;
    }
    sockopt::set_socket_reuseaddr(&beside, true)?;
    if family == AddressFamily::INET6 {
        sockopt::set_ipv6_v6only(&beside, sockopt::ipv6_v6only(listener)?)?;
    }
    Ok(beside)
}

fn bind_as(listener: BorrowedFd<'_>, beside: OwnedFd) -> io::Result<OwnedFd> {
    let address: SocketAddrAny = rustix::net::getsockname(listener)?;
    match rustix::net::bind(&beside, &address) {
        // Connections without SO_REUSEADDR are in the way: past them, where that is allowed.
        Err(rustix::io::Errno::ADDRINUSE) if socket::is_reuseport(listener)? => {
            if set_repair(beside.as_fd(), true).is_err() {
                return Err(rustix::io::Errno::ADDRINUSE.into());
            }
            let bound = rustix::net::bind(&beside, &address);
            set_repair(beside.as_fd(), false)?;
            bound?;
        }
        bound => bound?,
    }
    Ok(beside)
}

/// A socket under repair is bound past all others.
fn set_repair(fd: BorrowedFd<'_>, is_on: bool) -> io::Result<()> {
    let value = i32::from(is_on);
    let size: libc::socklen_t = size_of::<i32>().try_into().map_err(io::Error::other)?;
    // SAFETY: the option value is an int that lives across the call.
    let result = unsafe {
        let at = std::ptr::from_ref(&value).cast();
        libc::setsockopt(fd.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_REPAIR, at, size)
    };
    check(result).map(drop)
}

/// Returns when each packet that was being handled has been: none is on its way any more to a socket that can't be
/// chosen since before the call.
///
/// # Errors
/// Where the kernel does not offer it.
pub fn packets_under_way_done() -> io::Result<()> {
    // SAFETY: plain numbers. The kernel waits for all its readers (an RCU grace period), which handling a packet is.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, libc::MEMBARRIER_CMD_GLOBAL, 0, 0) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
