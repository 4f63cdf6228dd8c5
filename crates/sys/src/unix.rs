//! The kernel's list of unix sockets, by `/proc/net/unix`.

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt;
use std::path::PathBuf;
use std::{fs, io};

/// What listens (`__SO_ACCEPTCON`).
const ACCEPTS: u32 = 0x0001_0000;
/// The state of one that is connected, and has been accepted (`SS_CONNECTED`).
const CONNECTED: u32 = 3;

/// One unix socket with a path.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct UnixSocket {
    /// As `/proc/PID/fd` shows it; 0 for a connection that nobody has accepted yet.
    pub inode: u64,
    /// The text it was bound with; of a connection, the listener's. The file may be another one's by now.
    pub path: PathBuf,
    /// Whether it listens.
    pub listens: bool,
    /// Whether it is one end of a connection.
    pub is_connected: bool,
}

/// All unix sockets of this network namespace that have a path.
///
/// # Errors
/// When /proc is not there.
pub fn sockets() -> io::Result<Vec<UnixSocket>> {
    // The thread's own view, see `netstat`.
    let table = fs::read("/proc/thread-self/net/unix")?;
    Ok(table.split(|byte| *byte == b'\n').filter_map(parse).collect())
}

/// `Num RefCount Protocol Flags Type St Inode Path`.
fn parse(line: &[u8]) -> Option<UnixSocket> {
    // Numbers and words up to the path, which may hold anything.
    let at = line.iter().position(|byte| *byte == b'/')?;
    let head = std::str::from_utf8(line.get(..at)?).ok()?;
    let path = PathBuf::from(OsString::from_vec(line.get(at..)?.to_vec()));
    let mut fields = head.split_ascii_whitespace().skip(3);
    let flags = u32::from_str_radix(fields.next()?, 16).ok()?;
    let state = u32::from_str_radix(fields.nth(1)?, 16).ok()?;
    let inode = fields.next()?.parse().ok()?;
    // An address that is no path begins with '@', and may have a slash.
    let is_path = fields.next().is_none();
    is_path.then_some(UnixSocket {
        inode,
        path,
        listens: flags & ACCEPTS != 0,
        is_connected: state == CONNECTED,
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::fd::AsFd;
    use std::os::unix::net::{UnixListener, UnixStream};

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel")]
    fn a_listener_and_its_connections_are_told_apart() {
        let path = std::env::temp_dir().join(format!("reuseportd sys unix {}", std::process::id()));
        let listener = UnixListener::bind(&path).unwrap();
        let _waits = UnixStream::connect(&path).unwrap();
        let of_path = || sockets().unwrap().into_iter().filter(|one| one.path == path).collect::<Vec<_>>();
        let seen = |inode: u64| of_path().into_iter().find(|one| one.inode == inode).unwrap();
        let own = crate::socket::inode(listener.as_fd()).unwrap();
        assert!(seen(own).listens && !seen(own).is_connected);
        assert!(!seen(0).is_connected, "nobody has accepted it");
        let (accepted, _) = listener.accept().unwrap();
        let accepted = seen(crate::socket::inode(accepted.as_fd()).unwrap());
        assert!(accepted.is_connected && !accepted.listens);
        fs::remove_file(&path).unwrap();
    }

    #[test]
    fn other_addresses_are_passed_over() {
        let line = |path: &str| format!("0000000000000000: 00000002 00000000 00010000 0001 01 7 {path}");
        assert_eq!(parse(line("/run/a b").as_bytes()).map(|one| one.path), Some("/run/a b".into()));
        for other in ["@/tmp/.X11-unix/X0", "@abstract", ""] {
            assert_eq!(parse(line(other).as_bytes()), None, "{other}");
        }
    }
}
