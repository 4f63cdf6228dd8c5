//! Sockets and credentials passed between processes.

use std::io::{ErrorKind, Write};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::time::{Duration, Instant};

use reuseportd_sys::socket::{
    self, FDS_MAX, recv_with_credentials, recv_with_fds, send_with_fds, seqpacket_pair,
};
use rustix::event::{PollFd, PollFlags, poll};

use crate::world::*;

fn open_descriptors() -> usize {
    std::fs::read_dir("/proc/thread-self/fd").unwrap().count()
}

#[test]
fn a24_a_socket_bound_here_is_made_to_listen_there() {
    with(&[], || {
        let worker_side = bound(V4.parse().unwrap());
        let address = worker_side.local_addr().unwrap();
        let mut polled = [PollFd::new(&worker_side, PollFlags::IN)];
        poll(&mut polled, None).unwrap();
        assert!(polled[0].revents().contains(PollFlags::HUP));
        assert_eq!(worker_side.accept().unwrap_err().raw_os_error(), Some(libc::EINVAL));

        let (master, worker) = seqpacket_pair().unwrap();
        send_with_fds(worker.as_fd(), b"ready", &[worker_side.as_fd()]).unwrap();
        let mut buffer = [0; 64];
        let received = recv_with_fds(master.as_fd(), &mut buffer).unwrap();
        assert_eq!(&buffer[..received.bytes], b"ready");
        let handle = &received.fds[0];
        assert!(rustix::io::fcntl_getfd(handle).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        assert_eq!(socket::cookie(handle.as_fd()).unwrap(), socket::cookie(worker_side.as_fd()).unwrap());
        assert!(
            socket::is_reuseport(handle.as_fd()).unwrap() && !socket::is_listening(handle.as_fd()).unwrap()
        );
        socket::listen(handle.as_fd(), 16).unwrap();
        assert!(socket::is_listening(worker_side.as_fd()).unwrap());
        assert_eq!(socket::local_addr(handle.as_fd()).unwrap(), address);

        let client = connect(address);
        wait_until("the connection", || queued(&worker_side) == 1);
        let (mut connection, _) = worker_side.accept().unwrap();
        connection.write_all(b"!").unwrap();
        assert_eq!(fates(vec![client]), (1, 0));
    });
}

#[test]
fn a_channel_keeps_datagrams_apart_and_tells_its_end() {
    with(&[], || {
        let (master, worker) = seqpacket_pair().unwrap();
        let mut buffer = [0; 8];
        let empty = recv_with_fds(master.as_fd(), &mut buffer).unwrap_err();
        assert_eq!(empty.kind(), ErrorKind::WouldBlock, "the master's end never blocks");
        send_with_fds(worker.as_fd(), b"one", &[]).unwrap();
        send_with_fds(worker.as_fd(), b"two", &[]).unwrap();
        assert_eq!(recv_with_fds(master.as_fd(), &mut buffer).unwrap().bytes, 3);
        assert_eq!(&buffer[..3], b"one");
        assert_eq!(recv_with_fds(master.as_fd(), &mut buffer).unwrap().bytes, 3);
        send_with_fds(worker.as_fd(), b"too long for that", &[]).unwrap();
        assert_eq!(recv_with_fds(master.as_fd(), &mut buffer).unwrap_err().kind(), ErrorKind::InvalidData);
        drop(worker);
        assert_eq!(recv_with_fds(master.as_fd(), &mut buffer).unwrap().bytes, 0);
        assert_eq!(
            send_with_fds(master.as_fd(), b"hello?", &[]).unwrap_err().raw_os_error(),
            Some(libc::EPIPE)
        );
    });
}

#[test]
fn peers_are_known_by_their_credentials() {
    with(&[], || {
        let (left, _right) = seqpacket_pair().unwrap();
        let peer = socket::peer_credentials(left.as_fd()).unwrap();
        assert_eq!(peer.pid.cast_unsigned(), std::process::id());
        assert_eq!(peer.uid, rustix::process::getuid().as_raw());
    });
}

#[test]
fn no_descriptor_is_ever_leaked_by_a_sender() {
    with(&[], || {
        let (ours, theirs) = seqpacket_pair().unwrap();
        socket::pass_credentials(ours.as_fd()).unwrap();
        let some: Vec<OwnedFd> = (0..FDS_MAX).map(|_| theirs.try_clone().unwrap()).collect();
        let some: Vec<_> = some.iter().map(AsFd::as_fd).collect();
        let mut buffer = [0; 64];
        let before = open_descriptors();
        for _ in 0..20 {
            send_with_fds(theirs.as_fd(), b"READY=1", &some).unwrap();
            let (bytes, sender) = recv_with_credentials(ours.as_fd(), &mut buffer).unwrap();
            assert_eq!((&buffer[..bytes], sender.pid.cast_unsigned()), (&b"READY=1"[..], std::process::id()));
        }
        assert_eq!(open_descriptors(), before);
        send_with_fds(theirs.as_fd(), b"all", &some).unwrap();
        assert_eq!(recv_with_fds(ours.as_fd(), &mut buffer).unwrap().fds.len(), FDS_MAX);
        assert_eq!(open_descriptors(), before);
        // More than the receiver has room for: an error, and what did arrive is closed.
        send_raw(theirs.as_raw_fd(), &vec![theirs.as_raw_fd(); 200]);
        assert_eq!(recv_with_fds(ours.as_fd(), &mut buffer).unwrap_err().kind(), ErrorKind::InvalidData);
        assert_eq!(open_descriptors(), before);
        let too_many = vec![theirs.as_fd(); FDS_MAX + 1];
        assert_eq!(
            send_with_fds(theirs.as_fd(), b"", &too_many).unwrap_err().kind(),
            ErrorKind::InvalidInput
        );
    });
}

/// A connection that takes so many seconds to be closed: its peer reads nothing, and there is something to be sent.
fn lingering(seconds: u64) -> (OwnedFd, TcpStream) {
    let listener = TcpListener::bind(("127.0.0.1", 0)).unwrap();
    let mut full = TcpStream::connect(listener.local_addr().unwrap()).unwrap();
    let (peer, _) = listener.accept().unwrap();
    full.set_nonblocking(true).unwrap();
    while full.write(&[0; 65_536]).is_ok() {}
    rustix::net::sockopt::set_socket_linger(&full, Some(Duration::from_secs(seconds))).unwrap();
    (full.into(), peer)
}

#[test]
fn a_socket_that_lingers_is_closed_at_once() {
    with(&[], || {
        let closing = |full: OwnedFd, close: fn(OwnedFd)| {
            let begun = Instant::now();
            close(full);
            begun.elapsed()
        };
        let (full, _peer) = lingering(1);
        assert!(closing(full, drop) >= Duration::from_millis(900), "the kernel waits");
        let (ours, theirs) = seqpacket_pair().unwrap();
        socket::pass_credentials(ours.as_fd()).unwrap();
        let (full, _peer) = lingering(20);
        send_with_fds(theirs.as_fd(), b"READY=1", &[full.as_fd()]).unwrap();
        drop(full);
        let waited = closing(ours, |ours| drop(recv_with_credentials(ours.as_fd(), &mut [0; 64])));
        assert!(waited < Duration::from_secs(10), "{waited:?}");
    });
}

#[test]
fn descriptors_are_refused_where_the_kernel_can() {
    with(&[], || {
        let (ours, theirs) = seqpacket_pair().unwrap();
        socket::refuse_descriptors(ours.as_fd()).unwrap();
        match send_with_fds(theirs.as_fd(), b"take this", &[ours.as_fd()]) {
            Ok(()) => assert!(!kernel_is_at_least(6, 16), "it was sent"),
            Err(error) => assert_eq!(error.kind(), ErrorKind::PermissionDenied),
        }
        send_with_fds(theirs.as_fd(), b"words alone", &[]).unwrap();
    });
}

fn kernel_is_at_least(major: u32, minor: u32) -> bool {
    let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
    let mut numbers = release.split('.').map_while(|number| number.parse::<u32>().ok());
    (numbers.next(), numbers.next()) >= (Some(major), Some(minor))
}

/// Sends more descriptors than our own function would.
fn send_raw(socket: i32, fds: &[i32]) {
    let mut control = vec![0_u64; 256];
    let mut byte = *b"x";
    // SAFETY: one buffer, one control area large enough for the message written into it.
    unsafe {
        let mut io_vec = libc::iovec { iov_base: byte.as_mut_ptr().cast(), iov_len: 1 };
        let mut header: libc::msghdr = std::mem::zeroed();
        header.msg_iov = &raw mut io_vec;
        header.msg_iovlen = 1;
        header.msg_control = control.as_mut_ptr().cast();
        let size = u32::try_from(size_of_val(fds)).unwrap();
        header.msg_controllen = libc::CMSG_SPACE(size) as usize;
        let at = libc::CMSG_FIRSTHDR(&raw const header);
        (*at).cmsg_level = libc::SOL_SOCKET;
        (*at).cmsg_type = libc::SCM_RIGHTS;
        (*at).cmsg_len = libc::CMSG_LEN(size) as usize;
        std::ptr::copy_nonoverlapping(fds.as_ptr(), libc::CMSG_DATA(at).cast(), fds.len());
        assert_eq!(libc::sendmsg(socket, &raw const header, 0), 1);
    }
}
