//! The duty of PID 1, which the master is in a container: processes that lose their parents become its children, and
//! stay zombies until it reaps them.

use reuseportd_sys::reaper::{reap_child, zombies_of};

use super::Shell;

/// The first process of a PID namespace.
const FIRST: i32 = 1;

impl Shell {
    /// From now on orphans are reaped, if that is this process's duty; those that have ended before are at once.
    pub(super) fn begin_reaping(&mut self) {
        if std::process::id().cast_signed() != FIRST {
            return;
        }
        if let Err(error) = self.signals.watch_children() {
            tracing::error!(%error, "PID 1 can't watch the ends of orphans: they stay as zombies");
        }
        self.reap_orphans();
    }

    /// Reaps every child that has ended and is nobody's in here. A worker stays until the core has done with its
    /// process group, which its pid keeps the name of; so zombies are looked at and not simply waited for.
    pub(super) fn reap_orphans(&self) {
        let is_own = |pid: &i32| {
            self.processes.values().any(|process| process.pid == *pid) || self.preflight_pid() == Some(*pid)
        };
        match zombies_of(FIRST) {
            Ok(zombies) => {
                for pid in zombies.into_iter().filter(|pid| !is_own(pid)) {
                    match reap_child(pid) {
                        Ok(()) => tracing::debug!(pid, "an orphan has ended"),
                        Err(error) => tracing::warn!(pid, %error, "cannot reap an orphan"),
                    }
                }
            }
            Err(error) => tracing::error!(%error, "cannot look for orphans that have ended"),
        }
    }
}
