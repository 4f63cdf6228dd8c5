//! Where and when this process runs: what tells whether numbers that were written down still mean the same.

use std::io;

/// This run of the kernel; pids and start times of another one mean nothing.
///
/// # Errors
/// When /proc is not there.
pub fn boot_id() -> io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim_end().to_owned())
}

/// The network namespace, by inode: in another one the same address is another one's.
///
/// # Errors
/// When /proc is not there.
pub fn network() -> io::Result<u64> {
    inode("net")
}

/// The pid namespace, by inode: in another one the same pid is another process.
///
/// # Errors
/// When /proc is not there.
pub fn processes() -> io::Result<u64> {
    inode("pid")
}

/// Whether a process is in this network namespace and in this pid namespace.
///
/// # Errors
/// When there is no such process, or its namespaces can't be looked at (another user's, without CAP_SYS_PTRACE).
pub fn is_shared_with(pid: i32) -> io::Result<bool> {
    let of = |kind: &str| Ok::<_, io::Error>(rustix::fs::stat(format!("/proc/{pid}/ns/{kind}"))?.st_ino);
    Ok(of("net")? == network()? && of("pid")? == processes()?)
}

/// Whether a process is in this network namespace.
///
/// # Errors
/// The same.
pub fn is_network_shared_with(pid: i32) -> io::Result<bool> {
    Ok(rustix::fs::stat(format!("/proc/{pid}/ns/net"))?.st_ino == network()?)
}

fn inode(kind: &str) -> io::Result<u64> {
    // The thread's own view: a thread may be in another namespace than its process.
    Ok(rustix::fs::stat(format!("/proc/thread-self/ns/{kind}"))?.st_ino)
}
