//! Facts about one socket, and descriptors and credentials over unix sockets.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, Shutdown, SocketFlags,
    SocketType, sockopt,
};

use crate::check;

/// How full a listener's accept queue is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Depth {
    /// Finished handshakes not yet accepted.
    pub queued: u32,
    /// The limit given to `listen()`.
    pub backlog: u32,
}

/// Who sent a datagram, or who is at the other end; `pid` is 0 when that process is outside our pid namespace.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Credentials {
    /// Process.
    pub pid: i32,
    /// User.
    pub uid: u32,
    /// Group.
    pub gid: u32,
}

/// One received datagram.
#[derive(Debug, Default)]
pub struct Received {
    /// Payload bytes written to the buffer; 0 with a seqpacket socket means that the other end has closed.
    pub bytes: usize,
    /// Descriptors, close-on-exec.
    pub fds: Vec<OwnedFd>,
    /// The sender, if the socket asks for it (see [`pass_credentials`]).
    pub credentials: Option<Credentials>,
}

/// Depth of a listener's accept queue (`TCP_INFO`).
///
/// # Errors
/// When the socket is not TCP.
pub fn depth(listener: BorrowedFd<'_>) -> io::Result<Depth> {
    let mut info = MaybeUninit::<libc::tcp_info>::zeroed();
    let mut len: libc::socklen_t = size_of::<libc::tcp_info>().try_into().map_err(io::Error::other)?;
    // SAFETY: `info` is valid for `len` bytes and all-zero is a valid tcp_info (it is plain integers).
    let info = unsafe {
        let at = info.as_mut_ptr().cast();
        check(libc::getsockopt(listener.as_raw_fd(), libc::IPPROTO_TCP, libc::TCP_INFO, at, &raw mut len))?;
        info.assume_init()
    };
    // On a listener the kernel shows the queue and its limit in these two fields.
    Ok(Depth { queued: info.tcpi_unacked, backlog: info.tcpi_sacked })
}

/// The socket's cookie: the key under which sock_diag shows it.
///
/// # Errors
/// When the descriptor is no socket.
pub fn cookie(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(sockopt::socket_cookie(fd)?)
}

/// The socket's inode: what `/proc/PID/fd` shows.
///
/// # Errors
/// When the descriptor can't be examined.
pub fn inode(fd: BorrowedFd<'_>) -> io::Result<u64> {
    Ok(rustix::fs::fstat(fd)?.st_ino)
}

/// Whether SO_REUSEPORT is set.
///
/// # Errors
/// When the descriptor is no socket.
pub fn is_reuseport(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(sockopt::socket_reuseport(fd)?)
}

/// Whether the socket listens.
///
/// # Errors
/// When the descriptor is no socket.
pub fn is_listening(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(sockopt::socket_acceptconn(fd)?)
}

/// Whether it is a socket for datagrams: of internet sockets, UDP.
///
/// # Errors
/// When the descriptor is no socket.
pub fn is_datagram(fd: BorrowedFd<'_>) -> io::Result<bool> {
    Ok(sockopt::socket_type(fd)? == SocketType::DGRAM)
}

/// Datagrams that one call throws away at most: more than the largest buffer that the kernel gives by default holds.
const DISCARD_MAX: u32 = 1 << 20;

/// Throws away all datagrams that wait in a socket, and says how many there were. Does not wait for more.
///
/// # Errors
/// When the descriptor is no socket.
pub fn discard(fd: BorrowedFd<'_>) -> io::Result<u32> {
    let flags = RecvFlags::DONTWAIT | RecvFlags::TRUNC;
    let mut discarded = 0;
    for _ in 0..DISCARD_MAX {
        match rustix::net::recv(fd, &mut [0_u8], flags) {
            Ok(_) => discarded += 1,
            Err(Errno::AGAIN) => break,
            Err(error @ (Errno::BADF | Errno::NOTSOCK | Errno::INVAL)) => return Err(error.into()),
            // What happened to something sent from there is told here once, before what waits.
            Err(_) => {}
        }
    }
    Ok(discarded)
}

/// The address an internet socket is bound to.
///
/// # Errors
/// When the descriptor is no internet socket.
pub fn local_addr(fd: BorrowedFd<'_>) -> io::Result<SocketAddr> {
    let address = rustix::net::getsockname(fd)?;
    Ok(SocketAddr::try_from(address)?)
}

/// Listens, or changes the limit of a socket that does: with SO_REUSEPORT this is what gives it a slot.
///
/// # Errors
/// When the socket isn't bound or of the wrong kind.
pub fn listen(fd: BorrowedFd<'_>, backlog: i32) -> io::Result<()> {
    Ok(rustix::net::listen(fd, backlog)?)
}

/// Ends a listener for everybody who holds it. Under a migrating program its queue and its half-open
/// handshakes move to another member of the group; otherwise they are reset.
///
/// # Errors
/// ENOTCONN when it doesn't listen any more.
pub fn shutdown_read(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(rustix::net::shutdown(fd, Shutdown::Read)?)
}

/// Sets an integer option at SOL_SOCKET that no safe crate offers.
pub(crate) fn set_option(fd: BorrowedFd<'_>, option: i32, value: i32) -> io::Result<()> {
    let size: libc::socklen_t = size_of::<i32>().try_into().map_err(io::Error::other)?;
    // SAFETY: the option value is an int that lives across the call. An option for which the kernel wants more, an address
    // among it, is refused by its size.
    let result = unsafe {
        libc::setsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, option, std::ptr::from_ref(&value).cast(), size)
    };
    check(result).map(drop)
}

/// A connected pair for a channel: datagrams in order, and the end of the other side is seen. Both ends are
/// close-on-exec; the first is non-blocking (ours), the second blocks (the worker's).
///
/// # Errors
/// When descriptors or memory run out.
pub fn seqpacket_pair() -> io::Result<(OwnedFd, OwnedFd)> {
    let (ours, theirs) =
        rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    rustix::io::ioctl_fionbio(&ours, true)?;
    Ok((ours, theirs))
}

/// Asks the kernel to attach the sender's credentials to each datagram.
///
/// # Errors
/// When the descriptor is no unix socket.
pub fn pass_credentials(fd: BorrowedFd<'_>) -> io::Result<()> {
    Ok(sockopt::set_socket_passcred(fd, true)?)
}

/// Has the kernel refuse descriptors that are sent to a unix socket, or to those accepted from it (EPERM for the sender).
/// To close one that came from a stranger can take as long as the stranger likes. Before Linux 6.16 there is no such
/// option, and nothing happens.
///
/// # Errors
/// When the descriptor is no unix socket.
pub fn refuse_descriptors(fd: BorrowedFd<'_>) -> io::Result<()> {
    const SO_PASSRIGHTS: i32 = 83;
    match set_option(fd, SO_PASSRIGHTS, 0) {
        Err(error) if error.raw_os_error() == Some(libc::ENOPROTOOPT) => Ok(()),
        result => result,
    }
}

/// Closes descriptors that came from elsewhere, without the wait that a TCP socket may have been given for its last
/// bytes to leave (SO_LINGER).
pub fn close_received(fds: Vec<OwnedFd>) {
    for fd in fds {
        // Not a socket, as a rule.
        let _ = sockopt::set_socket_linger(&fd, None);
    }
}

/// Descriptors one datagram may carry: a worker's listeners, at most one per configured address.
pub const FDS_MAX: usize = 64;

/// Sends one datagram with descriptors. Never blocks for good on a non-blocking socket and never raises SIGPIPE.
///
/// # Errors
/// `WouldBlock` when the queue is full, EPIPE when the other end has closed, `InvalidInput` above [`FDS_MAX`].
pub fn send_with_fds(socket: BorrowedFd<'_>, payload: &[u8], fds: &[BorrowedFd<'_>]) -> io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if fds.len() > FDS_MAX || !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        let message = format!("{} descriptors in one datagram, at most {FDS_MAX} are possible", fds.len());
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(payload)], &mut control, SendFlags::NOSIGNAL)?;
    if sent == payload.len() { Ok(()) } else { Err(io::ErrorKind::WriteZero.into()) }
}

/// Receives one datagram with its descriptors.
///
/// # Errors
/// `InvalidData` when payload or descriptors did not fit; what came with it is closed.
pub fn recv_with_fds(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Received> {
    let (received, flags) = receive(socket, buffer)?;
    let what = if flags & libc::MSG_CTRUNC != 0 || received.fds.len() > FDS_MAX {
        "descriptors than there is room for (too many, or the limit on open files is reached)"
    } else if flags & libc::MSG_TRUNC != 0 {
        "bytes than there is room for"
    } else {
        return Ok(received);
    };
    close_received(received.fds);
    Err(io::Error::new(io::ErrorKind::InvalidData, format!("a datagram with more {what}; it was dropped")))
}

/// Receives one datagram with its sender; descriptors that come along are closed at once. The socket must
/// have [`pass_credentials`] set.
///
/// # Errors
/// `InvalidData` when the datagram is longer than the buffer or carries no credentials.
pub fn recv_with_credentials(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(usize, Credentials)> {
    let (received, flags) = receive(socket, buffer)?;
    close_received(received.fds);
    if flags & libc::MSG_TRUNC != 0 {
        let what = format!("a datagram of more than {} bytes", buffer.len());
        return Err(io::Error::new(io::ErrorKind::InvalidData, what));
    }
    let credentials = received.credentials;
    let missing =
        || io::Error::new(io::ErrorKind::InvalidData, "a datagram without its sender's credentials");
    Ok((received.bytes, credentials.ok_or_else(missing)?))
}

/// The process at the other end of a connected unix socket, as it was when it connected.
///
/// # Errors
/// When the descriptor is no unix socket.
pub fn peer_credentials(fd: BorrowedFd<'_>) -> io::Result<Credentials> {
    let mut peer = libc::ucred { pid: 0, uid: 0, gid: 0 };
    let mut len: libc::socklen_t = size_of::<libc::ucred>().try_into().map_err(io::Error::other)?;
    let at = std::ptr::from_mut(&mut peer).cast();
    // SAFETY: `peer` is valid for `len` bytes and any bit pattern is a ucred.
    check(unsafe {
        libc::getsockopt(fd.as_raw_fd(), libc::SOL_SOCKET, libc::SO_PEERCRED, at, &raw mut len)
    })?;
    Ok(Credentials { pid: peer.pid, uid: peer.uid, gid: peer.gid })
}

/// The kernel's limit of descriptors in one message (SCM_MAX_FD).
const SCM_FDS_MAX: usize = 253;

/// Room for control messages: a sender and as many descriptors as can come, since the kernel closes the others itself.
/// Aligned as `cmsghdr` wants it.
#[repr(C, align(8))]
struct Control([u8; 64 + SCM_FDS_MAX.next_multiple_of(2) * size_of::<i32>()]);

/// `recvmsg` by hand: safe crates lose descriptors of a truncated message, or can't represent a sender with pid 0.
fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<(Received, libc::c_int)> {
    let mut control = Control([0; size_of::<Control>()]);
    let mut io_vec = libc::iovec { iov_base: buffer.as_mut_ptr().cast(), iov_len: buffer.len() };
    // SAFETY: all-zero is a valid msghdr (null pointers and zero lengths).
    let mut header: libc::msghdr = unsafe { std::mem::zeroed() };
    header.msg_iov = &raw mut io_vec;
    header.msg_iovlen = 1;
    header.msg_control = control.0.as_mut_ptr().cast();
    header.msg_controllen = size_of::<Control>();
    // SAFETY: the header names one buffer and one control area, both valid and exclusively ours for the call.
    let bytes = unsafe { libc::recvmsg(socket.as_raw_fd(), &raw mut header, libc::MSG_CMSG_CLOEXEC) };
    let bytes = usize::try_from(bytes).map_err(|_| io::Error::last_os_error())?;
    let mut received = Received { bytes, ..Received::default() };
    // SAFETY: recvmsg has succeeded, so it has set the length of what it wrote into the control area, which is aligned for
    // cmsghdr and untouched since; the CMSG macros stay within that length. `cmsg_len` is the kernel's: never less than the
    // header's own (so the subtraction can't wrap), and no more than what is there. Descriptors found there were given to
    // this process just now and to nobody else, each once.
    unsafe {
        let mut at = libc::CMSG_FIRSTHDR(&raw const header);
        while !at.is_null() {
            let data = libc::CMSG_DATA(at);
            let len = (*at).cmsg_len - libc::CMSG_LEN(0) as usize;
            match ((*at).cmsg_level, (*at).cmsg_type) {
                (libc::SOL_SOCKET, libc::SCM_RIGHTS) => {
                    let fds = data.cast::<i32>();
                    received.fds.extend(
                        (0..len / size_of::<i32>())
                            .map(|n| OwnedFd::from_raw_fd(fds.add(n).read_unaligned())),
                    );
                }
                (libc::SOL_SOCKET, libc::SCM_CREDENTIALS) if len >= size_of::<libc::ucred>() => {
                    let sender = data.cast::<libc::ucred>().read_unaligned();
                    received.credentials =
                        Some(Credentials { pid: sender.pid, uid: sender.uid, gid: sender.gid });
                }
                _ => {}
            }
            at = libc::CMSG_NXTHDR(&raw const header, at);
        }
    }
    Ok((received, header.msg_flags))
}
