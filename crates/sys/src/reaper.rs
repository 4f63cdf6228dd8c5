//! The duty of PID 1: whoever loses its parent becomes its child, and it has to be reaped.

use std::io;

use rustix::process::{WaitId, WaitIdOptions, waitid};

use crate::{pidfd, procfs};

/// The children of a process that have ended and wait to be reaped.
///
/// # Errors
/// When /proc is not there.
pub fn zombies_of(parent: i32) -> io::Result<Vec<i32>> {
    let zombies = procfs::processes()?.into_iter().filter(|one| one.is_zombie && one.parent == parent);
    Ok(zombies.map(|one| one.pid).collect())
}

/// Reaps one child, if it has ended; one that runs is left alone.
///
/// # Errors
/// ECHILD when it is no child of ours or has been reaped.
pub fn reap_child(pid: i32) -> io::Result<()> {
    waitid(WaitId::Pid(pidfd::pid_of(pid)?), WaitIdOptions::EXITED | WaitIdOptions::NOHANG)?;
    Ok(())
}
