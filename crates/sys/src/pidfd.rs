//! Processes by descriptor: a pid can be reused, a pidfd can't.

use std::io;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{
    Pid, PidfdFlags, PidfdGetfdFlags, Signal, WaitId, WaitIdOptions, WaitIdStatus, kill_process_group,
    pidfd_getfd, pidfd_open, pidfd_send_signal, waitid,
};

use crate::check;

/// How a process ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Exit {
    /// It exited with this code.
    Code(i32),
    /// A signal ended it.
    Signal {
        /// The signal's number.
        number: i32,
        /// Whether it left a core dump.
        core: bool,
    },
}

pub(crate) fn pid_of(pid: i32) -> io::Result<Pid> {
    // 0 and negative numbers would mean "whole groups" to the kernel.
    if pid > 0 { Pid::from_raw(pid) } else { None }.ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Opens a process; the descriptor is close-on-exec and becomes readable when the process ends.
///
/// # Errors
/// ESRCH when there is no such process.
pub fn open(pid: i32) -> io::Result<OwnedFd> {
    Ok(pidfd_open(pid_of(pid)?, PidfdFlags::empty())?)
}

fn signal_of(number: i32) -> io::Result<Signal> {
    Signal::from_named_raw(number).ok_or_else(|| io::ErrorKind::InvalidInput.into())
}

/// Sends a signal, by number, to exactly this process.
///
/// # Errors
/// ESRCH when it has been reaped, EPERM without the right.
pub fn send_signal(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<()> {
    Ok(pidfd_send_signal(pidfd, signal_of(number)?)?)
}

/// Sends a signal, by number, to a process group. Safe against reuse only while its leader isn't reaped.
///
/// # Errors
/// ESRCH when the group is empty.
pub fn signal_group(pgid: i32, number: i32) -> io::Result<()> {
    Ok(kill_process_group(pid_of(pgid)?, signal_of(number)?)?)
}

/// How a child ended, if it has; it stays a zombie, so its pid and process group stay its own.
///
/// # Errors
/// ECHILD when it is no child of ours or has been reaped.
pub fn peek_exit(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    wait(pidfd, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT)
}

/// Collects a child that has ended, exactly once; `None` while it runs.
///
/// # Errors
/// ECHILD when it is no child of ours or has been reaped.
pub fn reap(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    wait(pidfd, WaitIdOptions::EXITED | WaitIdOptions::NOHANG)
}

fn wait(pidfd: BorrowedFd<'_>, options: WaitIdOptions) -> io::Result<Option<Exit>> {
    Ok(waitid(WaitId::PidFd(pidfd), options)?.and_then(|status| exit_of(&status)))
}

fn exit_of(status: &WaitIdStatus) -> Option<Exit> {
    let signal = || status.terminating_signal().map(|number| Exit::Signal { number, core: status.dumped() });
    status.exit_status().map(Exit::Code).or_else(signal)
}

/// Whether a process, a child or a stranger, has ended; never blocks.
///
/// # Errors
/// When the descriptor is no pidfd.
pub fn has_ended(pidfd: BorrowedFd<'_>) -> io::Result<bool> {
    let mut polled = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    poll(&mut polled, Some(&Timespec::default()))?;
    if polled[0].revents().contains(PollFlags::NVAL) {
        return Err(io::Error::from_raw_os_error(libc::EBADF));
    }
    Ok(polled[0].revents().contains(PollFlags::IN))
}

/// How a process that is no child of ours ended. `None` while it runs or waits for its parent to reap it, and where
/// the kernel can't tell: before Linux 6.15, or when it had been reaped before its pidfd was opened.
///
/// # Errors
/// When the descriptor is no pidfd.
pub fn exit_of_stranger(pidfd: BorrowedFd<'_>) -> io::Result<Option<Exit>> {
    // SAFETY: a pidfd_info is nothing but integers, of which all-zero is valid.
    let mut info: libc::pidfd_info = unsafe { std::mem::zeroed() };
    info.mask = libc::PIDFD_INFO_EXIT.into();
    // SAFETY: the kernel reads and writes one record, whose size is part of the request's number, and which lives across
    // the call. The number is of no other kind of file (0xFF is the type of pidfd's requests): what is no
    // pidfd answers ENOTTY.
    let asked = check(unsafe { libc::ioctl(pidfd.as_raw_fd(), libc::PIDFD_GET_INFO, &raw mut info) });
    match asked.map_err(|error| (error.raw_os_error(), error)) {
        Ok(_) if info.mask & u64::from(libc::PIDFD_INFO_EXIT) != 0 => Ok(exit_of_wait_status(info.exit_code)),
        Ok(_) => Ok(None),
        // The first two: a kernel that doesn't know the request. The third: reaped, and nothing was kept of it.
        Err((Some(libc::ENOTTY | libc::EINVAL | libc::ESRCH), _)) => Ok(None),
        Err((_, error)) => Err(error),
    }
}

fn exit_of_wait_status(status: i32) -> Option<Exit> {
    if libc::WIFEXITED(status) {
        Some(Exit::Code(libc::WEXITSTATUS(status)))
    } else {
        let signal = || Exit::Signal { number: libc::WTERMSIG(status), core: libc::WCOREDUMP(status) };
        libc::WIFSIGNALED(status).then(signal)
    }
}

/// Duplicates descriptor `number` of another process into this one, close-on-exec.
///
/// # Errors
/// EPERM for a process of another user, one that isn't dumpable or has more capabilities (CAP_SYS_PTRACE is the
/// remedy), EBADF when it has no such descriptor, ESRCH when it has ended, ENOSYS before Linux 5.6.
pub fn getfd(pidfd: BorrowedFd<'_>, number: i32) -> io::Result<OwnedFd> {
    Ok(pidfd_getfd(pidfd.as_fd(), number, PidfdGetfdFlags::empty())?)
}
