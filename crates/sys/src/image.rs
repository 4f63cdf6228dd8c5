//! The re-exec: this process becomes another program, and keeps its pid, its children and the descriptors it
//! carries over.

use std::ffi::CString;
use std::io;
use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};

use nix::sys::signal::{SigSet, SigmaskHow};
use rustix::io::{FdFlags, fcntl_getfd, fcntl_setfd};

use crate::executable::PinnedExecutable;

/// Becomes the program; returns only when that fails, and then everything is as it was.
///
/// All signals of the thread stay blocked over the exec, so that none meets the new image before its handlers are
/// there: signals that come meanwhile wait in the kernel. What has come already, and only this image knows of, is to
/// be put back by [`SignalPipe::hold`](crate::signals::SignalPipe::hold) before.
///
/// It goes by path, and only while that leads to the pinned file: through the descriptor the process would be called
/// by its number in `ps`.
///
/// # Errors
/// When the file at the path isn't the pinned one any more, or what the kernel says: `carried` are close-on-exec
/// again then, and the signal mask is back.
#[must_use]
pub fn replace(
    program: &PinnedExecutable,
    argv: &[CString],
    envp: &[CString],
    carried: &[BorrowedFd<'_>],
) -> io::Error {
    if !program.is_same_at_path() {
        let path = program.path();
        let message = format!("{}: the file has changed since it was opened: open it anew", path.display());
        return io::Error::other(message);
    }
    let Err(error) = try_replace(program, argv, envp, carried);
    error
}

fn try_replace(
    program: &PinnedExecutable,
    argv: &[CString],
    envp: &[CString],
    carried: &[BorrowedFd<'_>],
) -> io::Result<std::convert::Infallible> {
    let mask = SigSet::all().thread_swap_mask(SigmaskHow::SIG_SETMASK)?;
    let error = match set_close_on_exec(carried, false) {
        Ok(()) => nix::unistd::execve(program.c_path(), argv, envp).map_err(io::Error::from),
        Err(error) => Err(error),
    };
    // Neither can fail: the descriptors are open, the mask is the kernel's own.
    let _ = set_close_on_exec(carried, true);
    let _ = mask.thread_set_mask();
    error
}

fn set_close_on_exec(fds: &[BorrowedFd<'_>], is_set: bool) -> io::Result<()> {
    let flags = if is_set { FdFlags::CLOEXEC } else { FdFlags::empty() };
    Ok(fds.iter().try_for_each(|fd| fcntl_setfd(fd, flags))?)
}

/// Takes possession of a descriptor that came through exec (or from the parent that spawned us) under this number,
/// and makes it close-on-exec.
///
/// Each number can be taken once, and never one that this image opened itself: everything that the standard library
/// and this crate open is close-on-exec from its beginning, and so is what was taken; what is close-on-exec is
/// refused. So what is taken here has no other owner.
///
/// # Errors
/// EBADF when nothing is open under the number, `InvalidInput` for 0, 1 and 2, which belong to the whole process,
/// `AlreadyExists` for what has an owner in this image.
pub fn take_carried(number: i32) -> io::Result<OwnedFd> {
    if number <= libc::STDERR_FILENO {
        let message = format!("descriptor {number} is not one that can be carried");
        return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
    }
    // SAFETY: the number is not -1, which stands for none. It is borrowed for one question, which is answered by EBADF if
    // nothing is open there; nobody closes it meanwhile: this process has one thread.
    let flags = fcntl_getfd(unsafe { BorrowedFd::borrow_raw(number) })?;
    if flags.contains(FdFlags::CLOEXEC) {
        let message = format!("descriptor {number} was not carried here, or has been taken already");
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, message));
    }
    // SAFETY: it is open, as it has just answered, and no part of this image owns it: whatever an owner holds is
    // close-on-exec, but for 0, 1 and 2, which are refused above.
    let fd = unsafe { OwnedFd::from_raw_fd(number) };
    fcntl_setfd(&fd, FdFlags::CLOEXEC)?;
    Ok(fd)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsRawFd;

    #[test]
    fn nothing_with_an_owner_can_be_taken() {
        let own = std::fs::File::open("/dev/null").unwrap();
        assert_eq!(take_carried(own.as_raw_fd()).unwrap_err().kind(), io::ErrorKind::AlreadyExists);
        for number in [i32::MIN, -1, 0, 1, 2] {
            assert_eq!(take_carried(number).unwrap_err().kind(), io::ErrorKind::InvalidInput);
        }
        assert_eq!(take_carried(i32::MAX).unwrap_err().raw_os_error(), Some(libc::EBADF));
    }
}
