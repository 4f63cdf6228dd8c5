//! `stop --left-behind`: ends what a master that is gone has left, keeper and workers.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use reuseportd_sys::pidfd;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::journal::{self, Entry, JournalError};
use super::orphans::reporting_to;
use super::runtime::Runtime;
use crate::keeper::{self, FetchError};

/// For processes that were sent SIGKILL.
const PATIENCE: Duration = Duration::from_secs(5);

/// Ends it all and removes the runtime files; how many workers there were.
///
/// # Errors
/// In words: a master runs, or something can't be ended.
pub(crate) fn end(socket: &Path) -> Result<usize, String> {
    let mut runtime = Runtime::open(socket.to_owned()).map_err(|error| error.to_string())?;
    let written = match journal::read(&runtime.journal_path()) {
        Ok(journal) => journal.map(|journal| journal.workers).unwrap_or_default(),
        Err(error @ JournalError::Newer { .. }) => return Err(error.to_string()),
        Err(JournalError::Useless(_)) => Vec::new(),
    };
    let mut entries: Vec<Entry> =
        written.into_iter().filter(|entry| entry.lives() && !entry.is_foreign()).collect();
    let known: BTreeSet<i32> = entries.iter().map(|entry| entry.pid).collect();
    entries.extend(reporting_to(&runtime.notify_path(), &known));
    // First of all: it holds what the workers leave.
    match keeper::fetch(&runtime.keeper_path()) {
        Ok(inheritance) => inheritance.into_iter().for_each(|inheritance| inheritance.keeper.end()),
        Err(error @ (FetchError::Busy(_) | FetchError::Elsewhere(_))) => return Err(error.to_string()),
        Err(error) => eprintln!("{error}"),
    }
    let deadline = Instant::now() + PATIENCE;
    let processes: Vec<(i32, OwnedFd)> =
        entries.iter().filter_map(|entry| Some((entry.pid, pidfd::open(entry.pid).ok()?))).collect();
    for (pid, process) in &processes {
        // Its group, and itself should it have left that.
        let _ = pidfd::signal_group(*pid, nix::libc::SIGKILL);
        let _ = pidfd::send_signal(process.as_fd(), nix::libc::SIGKILL);
    }
    for (pid, process) in &processes {
        let left = Timespec::try_from(deadline.saturating_duration_since(Instant::now())).ok();
        if !matches!(poll(&mut [PollFd::new(process, PollFlags::IN)], left.as_ref()), Ok(1..)) {
            return Err(format!("process {pid} does not end, though it was killed"));
        }
    }
    runtime.own();
    Ok(processes.len())
}
