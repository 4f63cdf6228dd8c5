//! The pipe a worker logs into, which must not end the worker when its reader has gone.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Uid;

use crate::identity;

/// A pipe for a worker's output: reader (non-blocking) and writer (blocking), both close-on-exec.
///
/// The writer is open for reading as well, so that the pipe never lacks a reader: writing into it raises no SIGPIPE
/// when the reader has gone, but waits once the pipe is full, until a reader is made with [`reopen_reader`]. The
/// reader sees the end when the last such writer is closed. Without /proc it is an ordinary writer.
///
/// # Errors
/// When descriptors run out.
pub fn log_pipe() -> io::Result<(OwnedFd, OwnedFd)> {
    let (reader, plain) = pipe_with(PipeFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(&reader, true)?;
    let writer = reopen(plain.as_fd(), OFlags::RDWR).unwrap_or(plain);
    Ok((reader, writer))
}

/// A new reader (non-blocking, close-on-exec) of the pipe that this descriptor, whichever end, belongs to. The
/// descriptor should be closed soon: while it is open for writing, the reader sees no end.
///
/// # Errors
/// When /proc is not there; EACCES when the pipe belongs to another user (CAP_SETUID is the remedy); ENXIO when it is a
/// socket.
pub fn reopen_reader(end: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let owner = Uid::from_raw(rustix::fs::fstat(end)?.st_uid);
    identity::or_as_user(Some(owner), || reopen(end, OFlags::RDONLY | OFlags::NONBLOCK))
}

fn reopen(end: BorrowedFd<'_>, flags: OFlags) -> io::Result<OwnedFd> {
    let path = format!("/proc/thread-self/fd/{}", end.as_raw_fd());
    Ok(rustix::fs::open(path, flags | OFlags::CLOEXEC | OFlags::NOCTTY, Mode::empty())?)
}
