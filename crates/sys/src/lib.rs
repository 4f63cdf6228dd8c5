//! The one door to the kernel.
//!
//! Every `unsafe` block of reuseportd lives in this crate. One function is one kernel action plus the
//! mapping of its error; nothing here retries, logs, sleeps, or knows what a generation or an upgrade is.
//!
//! | module | what it opens |
//! |---|---|
//! | [`bpf`] | the `ebpf` engine: maps, the `sk_reuseport` program, steering |
//! | [`cbpf`] | the `cbpf` engine: classic programs that name a slot |
//! | [`diag`] | the kernel's list of sockets (sock_diag) |
//! | [`late`] | SO_REUSEPORT for a socket that listens without it |
//! | [`socket`] | facts about one socket, descriptors and credentials over unix sockets |
//! | [`child`], [`executable`], [`pidfd`] | starting a worker, pinning its binary, watching its end |
//! | [`pipe`] | the pipe it logs into |
//! | [`identity`] | the user, groups and capabilities a worker gets |
//! | [`image`], [`memfd`] | becoming another program in place, and what it is told |
//! | [`namespace`] | in which network, pid namespace and boot we are |
//! | [`procfs`] | who owns a socket, who descends from whom, counters and sysctls |
//! | [`reaper`] | the children that PID 1 is given |
//! | [`signals`] | signals as a readable descriptor |
//! | [`cgroup`] | where processes are in the tree of cgroup v2 |
//! | [`unix`] | the kernel's list of unix sockets |
//! | [`capability`], [`limits`] | what this process may do |
#![allow(
    unsafe_code,
    reason = "this crate exists to hold the project's unsafe code; each block says why it is sound"
)]

pub mod bpf;
pub mod capability;
pub mod cbpf;
pub mod cgroup;
pub mod child;
pub mod diag;
pub mod executable;
pub mod identity;
pub mod image;
pub mod late;
pub mod limits;
pub mod memfd;
pub mod namespace;
pub mod pidfd;
pub mod pipe;
pub mod procfs;
pub mod reaper;
pub mod signals;
pub mod socket;
pub mod unix;

use std::io;

/// Maps a libc-style result (-1 and errno) to `io::Result`.
fn check(result: libc::c_int) -> io::Result<libc::c_int> {
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}
