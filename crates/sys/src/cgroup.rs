//! cgroup v2: where processes are in its tree, and one process put elsewhere.

use std::io;
use std::net::SocketAddr;
use std::os::fd::BorrowedFd;
use std::path::{Path, PathBuf};

use socket2::SockAddr;

use crate::child::{fork, wait};

/// The directory of the cgroup this process is in; `None` without cgroup v2, or where its place in the tree is not
/// mounted here.
///
/// # Errors
/// When /proc can't be read.
pub fn own() -> io::Result<Option<PathBuf>> {
    let read = std::fs::read_to_string;
    Ok(own_in(&read("/proc/self/cgroup")?, &read("/proc/self/mountinfo")?))
}

fn own_in(cgroups: &str, mounts: &str) -> Option<PathBuf> {
    let own = Path::new(cgroups.lines().find_map(|line| line.strip_prefix("0::"))?);
    mounts.lines().find_map(|line| {
        let (mount, kind) = line.split_once(" - ")?;
        let mut fields = mount.split(' ').skip(3);
        let (root, place) = (unescape(fields.next()?), unescape(fields.next()?));
        let below = own.strip_prefix(root).ok().filter(|_| kind.starts_with("cgroup2 "))?;
        // What is above the root of this namespace is shown as `..`.
        let is_here = !below.components().any(|part| part == std::path::Component::ParentDir);
        is_here.then(|| Path::new(&place).join(below))
    })
}

/// Blanks and backslashes in paths, which the kernel writes as octal numbers.
fn unescape(path: &str) -> String {
    path.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// Moves this process into the cgroup whose `cgroup.procs` this is, open for writing. Async-signal-safe.
pub(crate) fn enter(procs: BorrowedFd<'_>) -> rustix::io::Result<()> {
    rustix::io::write(procs, b"0").map(drop)
}

/// Whether a TCP socket that a process in this cgroup binds to the address has SO_REUSEPORT afterwards, although nobody
/// asked for it. A child tries it, which [`spawn`](crate::child::spawn)'s conditions are for too.
///
/// # Errors
/// When the child can't be made, can't enter, or can't bind.
pub fn binds_with_reuseport(procs: BorrowedFd<'_>, address: SocketAddr) -> io::Result<bool> {
    const OTHERS: libc::c_int = 2;
    let address = SockAddr::from(address);
    let family = libc::c_int::from(address.family());
    let run = || {
        let tried = enter(procs).map_err(io::Error::from).and_then(|()| try_bind(family, &address));
        // No message: that would need memory.
        tried.map_or_else(|error| OTHERS + error.raw_os_error().unwrap_or(libc::EIO), libc::c_int::from)
    };
    match wait(fork(run)?)? {
        set @ 0..OTHERS => Ok(set == 1),
        code => Err(io::Error::from_raw_os_error(code.saturating_sub(OTHERS))),
    }
}

/// Async-signal-safe; the socket is left to the end of the process.
fn try_bind(family: libc::c_int, address: &SockAddr) -> io::Result<bool> {
    let (mut set, mut length): (libc::c_int, libc::socklen_t) = (0, 4);
    // SAFETY: the address is socket2's, valid for its own length; the option value is an int, as `length` says (4), and
    // both live across the call that writes them. The socket is this function's, and closed with the process.
    unsafe {
        let socket = crate::check(libc::socket(family, libc::SOCK_STREAM | libc::SOCK_CLOEXEC, 0))?;
        crate::check(libc::bind(socket, address.as_ptr().cast(), address.len()))?;
        let value = (&raw mut set).cast();
        let (level, option) = (libc::SOL_SOCKET, libc::SO_REUSEPORT);
        crate::check(libc::getsockopt(socket, level, option, value, &raw mut length))?;
    }
    Ok(set != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    const UNIFIED: &str = "25 1 0:22 / /sys/fs/cgroup ro,nosuid shared:4 - cgroup2 cgroup2 rw,nsdelegate";

    fn own(cgroups: &str, mounts: &str) -> Option<String> {
        own_in(cgroups, mounts).map(|path| path.to_str().unwrap().to_owned())
    }

    #[test]
    fn the_own_cgroup_is_below_a_mount_that_shows_it() {
        let unit = "0::/system.slice/web.service";
        assert_eq!(own(unit, UNIFIED).unwrap(), "/sys/fs/cgroup/system.slice/web.service");
        let hybrid = "24 1 0:21 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu\n\
                      25 1 0:22 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw";
        assert_eq!(own("9:cpu:/other\n0::/\n", hybrid).unwrap(), "/sys/fs/cgroup/unified/");
        let part = UNIFIED.replace(" / ", " /system.slice ").replace("/sys/fs", "/a\\040b");
        assert_eq!(own(unit, &part).unwrap(), "/a b/cgroup/web.service");
        assert_eq!(own("0::/user.slice", &part), None);
        assert_eq!(own("0::/../web", UNIFIED), None);
        assert_eq!(own("9:cpu:/", UNIFIED), None);
        assert_eq!(own(unit, "24 1 0:21 / /sys/fs/cgroup/cpu rw - cgroup cgroup rw,cpu"), None);
    }
}
