//! What `/proc` tells: owners of sockets, the tree of processes, counters, sysctls.

use std::collections::BTreeSet;
use std::ffi::{OsStr, OsString};
use std::fs;
use std::io::{self, Read};
use std::os::unix::ffi::OsStrExt;

use rustix::process::Uid;

use crate::identity;

/// One process, from `/proc/PID/stat`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Process {
    /// Process.
    pub pid: i32,
    /// Its parent.
    pub parent: i32,
    /// Its process group.
    pub group: i32,
    /// Whether it has ended and waits to be reaped.
    pub is_zombie: bool,
    /// When it started, in clock ticks since boot: with the pid this names one process for good.
    pub start_time: u64,
}

/// Sockets a process holds: descriptor number and inode.
///
/// # Errors
/// EACCES for a process of another user or one that isn't dumpable (CAP_SYS_PTRACE is the remedy), ENOENT when it
/// has been reaped.
pub fn socket_inodes(pid: i32) -> io::Result<Vec<(i32, u64)>> {
    let directory = format!("/proc/{pid}/fd");
    as_owner(&directory, || socket_inodes_in(&directory))
}

/// Does it, and if that fails does it as the one user who may: the process's.
fn as_owner<T>(path: &str, attempt: impl Fn() -> io::Result<T>) -> io::Result<T> {
    attempt().or_else(|error| match rustix::fs::stat(path) {
        Ok(stat) => identity::as_user(Some(Uid::from_raw(stat.st_uid)), attempt),
        Err(_) => Err(error),
    })
}

fn socket_inodes_in(directory: &str) -> io::Result<Vec<(i32, u64)>> {
    let mut sockets = Vec::new();
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let target = match fs::read_link(entry.path()) {
            Ok(target) => target,
            // CAP_DAC_READ_SEARCH alone lists the descriptors of others, and tells nothing of them.
            Err(error) if error.kind() == io::ErrorKind::PermissionDenied => return Err(error),
            // A descriptor can be closed between the two steps.
            Err(_) => continue,
        };
        let number = entry.file_name().to_str().and_then(|name| name.parse().ok());
        let inode = target.to_str().and_then(socket_inode);
        sockets.extend(number.zip(inode));
    }
    sockets.sort_unstable();
    Ok(sockets)
}

/// The inode in what a link of `/proc/PID/fd` says, if it is a socket's.
#[must_use]
pub fn socket_inode(link: &str) -> Option<u64> {
    link.strip_prefix("socket:[")?.strip_suffix(']')?.parse().ok()
}

/// Whether descriptor `fd` of a process is this very socket.
#[must_use]
pub fn owns_socket(pid: i32, fd: i32, inode: u64) -> bool {
    let directory = format!("/proc/{pid}/fd");
    as_owner(&directory, || fs::read_link(format!("{directory}/{fd}")))
        .is_ok_and(|target| target.to_str().and_then(socket_inode) == Some(inode))
}

/// One process, or an error when it has been reaped.
///
/// # Errors
/// ENOENT when there is no such process.
pub fn process(pid: i32) -> io::Result<Process> {
    let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
    parse_stat(&stat)
        .ok_or_else(|| io::Error::new(io::ErrorKind::InvalidData, format!("/proc/{pid}/stat is malformed")))
}

/// One process from the text of its `/proc/PID/stat`; `None` if it is none.
#[must_use]
pub fn parse_stat(stat: &str) -> Option<Process> {
    let pid = stat.split_once(' ')?.0.parse().ok()?;
    // The program's name is in parentheses and may itself contain any of these characters.
    let mut fields = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace();
    let state = fields.next()?;
    let parent = fields.next()?.parse().ok()?;
    let group = fields.next()?.parse().ok()?;
    let start_time = fields.nth(16)?.parse().ok()?;
    Some(Process { pid, parent, group, is_zombie: matches!(state, "Z" | "X"), start_time })
}

/// All processes we can see; those that end meanwhile are left out.
///
/// # Errors
/// When /proc is not there.
pub fn processes() -> io::Result<Vec<Process>> {
    let pids = fs::read_dir("/proc")?.filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok());
    Ok(pids.filter_map(|pid| process(pid).ok()).collect())
}

/// The worker's living processes: itself, its process group, and everything that descends from either.
///
/// # Errors
/// When /proc is not there.
pub fn descendants(pid: i32, group: i32) -> io::Result<Vec<i32>> {
    Ok(descendants_in(&processes()?, pid, group))
}

/// The same from a list of all processes, for whoever asks about many at once.
#[must_use]
pub fn descendants_in(processes: &[Process], pid: i32, group: i32) -> Vec<i32> {
    let mut family: BTreeSet<i32> = BTreeSet::new();
    loop {
        let before = family.len();
        family.extend(
            processes
                .iter()
                .filter(|one| one.pid == pid || one.group == group || family.contains(&one.parent))
                .map(|one| one.pid)
                .collect::<Vec<_>>(),
        );
        if family.len() == before {
            break;
        }
    }
    processes.iter().filter(|one| !one.is_zombie && family.contains(&one.pid)).map(|one| one.pid).collect()
}

/// The living members of a process group.
///
/// # Errors
/// When /proc is not there.
pub fn group_members(group: i32) -> io::Result<Vec<i32>> {
    Ok(processes()?.iter().filter(|one| one.group == group && !one.is_zombie).map(|one| one.pid).collect())
}

/// The parent of a process.
///
/// # Errors
/// ENOENT when there is no such process.
pub fn parent_of(pid: i32) -> io::Result<i32> {
    process(pid).map(|one| one.parent)
}

/// When a process started, in clock ticks since boot.
///
/// # Errors
/// ENOENT when there is no such process.
pub fn start_time(pid: i32) -> io::Result<u64> {
    process(pid).map(|one| one.start_time)
}

/// Bytes of an environment that are read at most.
const ENVIRONMENT_BYTES_MAX: u64 = 1024 * 1024;

/// The environment a process was started with (not what it made of it since). For a moment after its start it is
/// empty.
///
/// # Errors
/// EACCES for a process of another user or one that isn't dumpable (CAP_SYS_PTRACE is the remedy), `FileTooLarge`
/// above 1 MiB. For one that has ended ENOENT, or, until it is reaped, ESRCH, EACCES or an empty one, as the kernel
/// likes.
pub fn environment(pid: i32) -> io::Result<Vec<(OsString, OsString)>> {
    let mut block = Vec::new();
    let path = format!("/proc/{pid}/environ");
    let file = as_owner(&path, || fs::File::open(&path))?;
    let bytes = file.take(ENVIRONMENT_BYTES_MAX + 1).read_to_end(&mut block)? as u64;
    if bytes > ENVIRONMENT_BYTES_MAX {
        let message = format!("/proc/{pid}/environ has more than {ENVIRONMENT_BYTES_MAX} bytes");
        return Err(io::Error::new(io::ErrorKind::FileTooLarge, message));
    }
    Ok(variables_in(&block))
}

/// An environment from the text of `/proc/PID/environ`; what has no `=` is left out.
#[must_use]
pub fn variables_in(block: &[u8]) -> Vec<(OsString, OsString)> {
    let owned = |bytes: &[u8]| OsStr::from_bytes(bytes).to_owned();
    let split = |entry: &[u8]| {
        let at = entry.iter().position(|byte| *byte == b'=')?;
        Some((owned(&entry[..at]), owned(&entry[at + 1..])))
    };
    block.split(|byte| *byte == 0).filter_map(split).collect()
}

/// A counter of this network namespace, such as `TCPMigrateReqSuccess`; `None` where the kernel doesn't have it.
#[must_use]
pub fn netstat(name: &str) -> Option<u64> {
    // The thread's own view: a thread may be in another network namespace than its process.
    netstat_in(&fs::read_to_string("/proc/thread-self/net/netstat").ok()?, name)
}

/// The same from the text of `/proc/net/netstat`.
#[must_use]
pub fn netstat_in(table: &str, name: &str) -> Option<u64> {
    let lines: Vec<&str> = table.lines().collect();
    // Lines come in pairs: names, then values, with the same first word.
    lines.chunks_exact(2).find_map(|pair| {
        let at = pair[0].split_ascii_whitespace().position(|word| word == name)?;
        pair[1].split_ascii_whitespace().nth(at)?.parse().ok()
    })
}

/// A sysctl by its dotted or slashed name, such as `net.ipv4.tcp_migrate_req`; `None` where the kernel doesn't have it.
#[must_use]
pub fn sysctl(name: &str) -> Option<String> {
    let path = format!("/proc/sys/{}", name.replace('.', "/"));
    fs::read_to_string(path).ok().map(|value| value.trim_end().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_with_parentheses_and_spaces_does_not_shift_the_fields() {
        let stat = "42 (a) b (c) Z 7 8 9 0 -1 4 1 2 3 4 5 6 7 8 20 0 1 0 12345 1 2 3";
        let wanted = Process { pid: 42, parent: 7, group: 8, is_zombie: true, start_time: 12345 };
        assert_eq!(parse_stat(stat), Some(wanted));
        assert_eq!(parse_stat("42 (cut"), None);
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel")]
    fn our_own_process_is_as_the_system_says() {
        let pid = i32::try_from(std::process::id()).unwrap();
        assert_eq!(parent_of(pid).unwrap(), i32::try_from(std::os::unix::process::parent_id()).unwrap());
        assert!(descendants(pid, -1).unwrap().contains(&pid));
        assert!(process(-5).is_err());
    }

    #[test]
    fn a_family_is_tree_and_group_without_zombies() {
        let one = |pid, parent, group, is_zombie| Process { pid, parent, group, is_zombie, start_time: 0 };
        let all = [
            one(9, 8, 2, false), // grandchild in a group of its own
            one(1, 0, 1, false), // stranger
            one(5, 1, 5, true),  // the leader itself, ended
            one(6, 1, 5, false), // orphan, still in the group
            one(8, 6, 8, false), // child of the orphan
        ];
        assert_eq!(descendants_in(&all, 5, 5), [9, 6, 8]);
    }

    #[test]
    fn counters_are_found_by_name() {
        let table = "TcpExt: A B\nTcpExt: 1 2\nIpExt: C\nIpExt: 3\n";
        assert_eq!(netstat_in(table, "B"), Some(2));
        assert_eq!(netstat_in(table, "C"), Some(3));
        assert_eq!(netstat_in(table, "D"), None);
    }

    #[test]
    fn an_environment_is_names_and_values() {
        let pair = |name: &str, value: &str| (OsString::from(name), OsString::from(value));
        let wanted = [pair("A", "1=2"), pair("B", "")];
        assert_eq!(variables_in(b"A=1=2\0no variable\0B=\0"), wanted);
        assert_eq!(variables_in(b""), []);
    }

    #[test]
    #[cfg_attr(miri, ignore = "asks the kernel")]
    fn sockets_are_told_from_other_descriptors() {
        assert_eq!(socket_inode("socket:[123]"), Some(123));
        assert_eq!(socket_inode("pipe:[123]"), None);
        let socket = std::net::UdpSocket::bind("127.0.0.1:0").unwrap();
        let inode = crate::socket::inode(std::os::fd::AsFd::as_fd(&socket)).unwrap();
        let pid = i32::try_from(std::process::id()).unwrap();
        let number = std::os::fd::AsRawFd::as_raw_fd(&socket);
        assert!(socket_inodes(pid).unwrap().contains(&(number, inode)));
        assert!(owns_socket(pid, number, inode) && !owns_socket(pid, number, inode + 1));
    }
}
