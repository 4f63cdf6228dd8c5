//! Processes that a killed master left behind and nobody kept anything of: found by the journal, and by the socket
//! their notifications go to.

use std::cmp::Reverse;
use std::collections::BTreeSet;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::rc::Rc;

use reuseportd_core::{Event, Generation, GroupId, ListenerId, Plan, Seat, Time, WorkerId};
use reuseportd_sys::procfs::{self, Process as Listed};
use reuseportd_sys::{namespace, pidfd, pipe};
use reuseportd_wire::env;
use rustix::time::{ClockId, clock_gettime};

use super::carried::{Carried, Pidfd};
use super::journal::{self, Entry, JournalError, Slots};
use super::launch::{Launch, UNKNOWN_CONFIG};
use super::output::Output;
use super::process::{LastLines, Process};
use super::start::NoStart;
use super::{Shell, clock, look, reload, restore};
use crate::config::{Listen, Output as OutputMode};

impl Shell {
    /// Makes living workers of a former master the first generation. `false` if there are none.
    pub(super) fn find_orphans(&mut self) -> Result<bool, NoStart> {
        let (mut entries, slots) = self.journalled_and_alive()?;
        let known: BTreeSet<i32> = entries.iter().map(|entry| entry.pid).collect();
        entries.extend(self.ours_besides(&known));
        let is_any = !entries.is_empty();
        if is_any {
            self.take_orphans(entries, &slots)?;
        }
        Ok(is_any)
    }

    /// Whether there are any.
    pub(super) fn has_orphans(&self) -> Result<bool, NoStart> {
        Ok(!self.journalled_and_alive()?.0.is_empty() || !self.ours_besides(&BTreeSet::new()).is_empty())
    }

    /// Those that the journal names.
    fn journalled_and_alive(&self) -> Result<(Vec<Entry>, Vec<Slots>), NoStart> {
        let journal = match journal::read(&self.runtime.journal_path()) {
            Ok(Some(journal)) => journal,
            Ok(None) => return Ok((Vec::new(), Vec::new())),
            Err(error @ JournalError::Newer { .. }) => return Err(error.to_string().into()),
            Err(JournalError::Useless(why)) => {
                tracing::warn!(
                    event = "journal_unused",
                    why,
                    "the journal of a former master is not used: {why}"
                );
                return Ok((Vec::new(), Vec::new()));
            }
        };
        let living: Vec<Entry> = journal.workers.into_iter().filter(Entry::lives).collect();
        match journal.place.check() {
            Err(error) if !living.is_empty() => Err(restore::elsewhere(&error).into()),
            Ok(()) | Err(_) => Ok((living, journal.slots)),
        }
    }

    fn take_orphans(&mut self, mut entries: Vec<Entry>, slots: &[Slots]) -> Result<(), NoStart> {
        // A socket that two of a seat share is the later one's, which goes on longer.
        entries.sort_by_key(|entry| (entry.seat, Reverse(entry.generation)));
        let generation = Generation(entries.iter().map(|entry| entry.generation).max().unwrap_or(1));
        let launch =
            Launch::prepare(Rc::clone(&self.config), &self.runtime, &mut self.groups, &mut self.shared);
        let mut launch = launch.map_err(|error| error.to_string())?;
        launch.config_number = UNKNOWN_CONFIG;
        let plan = reload::plan(&launch, self.groups.choice.engine);
        let (mut workers, mut seen) = (Vec::new(), BTreeSet::new());
        for (number, entry) in (0..).zip(&entries) {
            let worker = WorkerId(u32::from(number) + 1);
            match orphan(entry, generation, Seat(number), launch.config.app.output) {
                Ok(process) => {
                    self.processes.insert(worker, process);
                    workers.push((worker, self.listeners_of_orphan(&launch, worker, entry.pid, &mut seen)));
                }
                Err(error) => tracing::info!(pid = entry.pid, %error, "an orphan has just ended"),
            }
        }
        for group in &launch.groups {
            if let Some(listener) = self.listeners.member(*group) {
                self.groups.replace_program(*group, listener);
            }
        }
        let count = workers.len();
        tracing::warn!(
            event = "orphans",
            count,
            "{count} workers have neither master nor keeper: they serve until new ones do"
        );
        self.adopted = true;
        let seats = u16::try_from(count).unwrap_or(u16::MAX);
        let plan = Plan { workers: seats, configured: seats, ..plan };
        let cookies_of = |(id, listen): (GroupId, &Listen)| {
            let is_its = |slots: &&Slots| slots.endpoint() == listen.endpoint();
            Some((id, slots.iter().find(is_its)?.cookies.clone()))
        };
        let slots = launch.listeners().filter_map(cookies_of).collect();
        self.prepared.push_front(launch);
        self.inbox.push_back(Event::Orphans { generation, plan, workers, slots });
        Ok(())
    }

    /// Its listeners, with handles as far as they can be had. A socket that several hold counts once.
    fn listeners_of_orphan(
        &mut self,
        launch: &Launch,
        worker: WorkerId,
        pid: i32,
        seen: &mut BTreeSet<u32>,
    ) -> Vec<(GroupId, ListenerId)> {
        let held = self.processes_of(pid).and_then(|pids| look::held_by(&pids, self.listening()?));
        let mut listeners = Vec::new();
        for held in held.unwrap_or_default() {
            let Some((group, listen)) =
                launch.listeners().find(|(_, listen)| look::serves(&held.socket, listen))
            else {
                continue;
            };
            if !seen.insert(held.socket.inode) {
                continue;
            }
            let taken = look::take_handle(group, listen.address, &held).and_then(|handle| {
                let owner = Some((held.pid, held.number));
                self.groups.note_bound(group, held.socket.local);
                self.listeners.add(group, worker, owner, handle).map_err(look::failed)
            });
            match taken {
                Ok(listener) => listeners.push((group, listener)),
                Err(missing) => {
                    let why = missing.text();
                    tracing::warn!(
                        event = "orphan_unreachable",
                        pid,
                        why,
                        "what waits at an orphan when it ends may be lost: {why}"
                    );
                }
            }
        }
        listeners
    }

    /// Processes that were started after a state was saved are in no table, and were never steered to.
    pub(super) fn end_unknown(&self, saved: Time) {
        let known = self.processes.values().map(|process| process.pid).collect();
        for entry in self.ours_besides(&known).into_iter().filter(|entry| entry.start_time >= ticks(saved)) {
            tracing::warn!(
                event = "unknown_worker",
                pid = entry.pid,
                "a worker that was just starting is ended"
            );
            if let Err(error) = pidfd::signal_group(entry.pid, nix::libc::SIGKILL) {
                tracing::warn!(pid = entry.pid, %error, "cannot end it");
            }
        }
    }

    fn ours_besides(&self, known: &BTreeSet<i32>) -> Vec<Entry> {
        reporting_to(&self.runtime.notify_path(), known)
    }
}

/// Leaders of process groups that report to this notify socket and belong to none of these workers.
pub(super) fn reporting_to(socket: &Path, known: &BTreeSet<i32>) -> Vec<Entry> {
    let all = procfs::processes().unwrap_or_default();
    let of_known: BTreeSet<i32> =
        known.iter().flat_map(|pid| procfs::descendants_in(&all, *pid, *pid)).collect();
    let is_ours = |process: &&Listed| {
        process.pid == process.group && !process.is_zombie && !of_known.contains(&process.pid)
    };
    let entry = |process: &Listed| {
        let variables = procfs::environment(process.pid).ok()?;
        let value = |name: &str| variables.iter().find(|(of, _)| of == name).map(|(_, value)| value);
        let number = |name| value(name)?.to_str();
        (value(env::NOTIFY_SOCKET)?.as_os_str() == socket.as_os_str()).then_some(())?;
        // In a container the same path is another one's.
        namespace::is_shared_with(process.pid).ok()?.then_some(())?;
        Some(Entry {
            pid: process.pid,
            start_time: process.start_time,
            generation: number(env::GENERATION)?.parse().ok()?,
            seat: number(env::SEAT)?.parse().ok()?,
        })
    };
    all.iter().filter(is_ours).filter_map(entry).collect()
}

/// The process, if it is still that one; with a new reader of its output.
fn orphan(entry: &Entry, generation: Generation, seat: Seat, output: OutputMode) -> io::Result<Process> {
    let process = pidfd::open(entry.pid)?;
    if !entry.lives() {
        return Err(io::ErrorKind::NotFound.into());
    }
    let reader = match output {
        // What a foreign server prints has its reader.
        OutputMode::Tag if !entry.is_foreign() => output_of(&process).ok(),
        OutputMode::Tag | OutputMode::Inherit => None,
    };
    let output = reader.map(|reader| Output::of_worker(reader, generation.0, seat.0, entry.pid));
    Ok(Process {
        generation,
        seat,
        pid: entry.pid,
        start_time: entry.start_time,
        pidfd: Carried::new(Pidfd::from(process)),
        is_child: false,
        shares_group: procfs::process(entry.pid).is_ok_and(|process| process.group != process.pid),
        is_ended: false,
        started: clock::now(),
        channel: None,
        output,
        status: None,
        detail: None,
        last_lines: LastLines::default(),
    })
}

/// Its own end of the pipe is open for reading too, so that the pipe is still there.
fn output_of(process: &OwnedFd) -> io::Result<OwnedFd> {
    let end = pidfd::getfd(process.as_fd(), 1)?;
    let is_pipe = rustix::fs::FileType::from_raw_mode(rustix::fs::fstat(&end)?.st_mode).is_fifo();
    if is_pipe { pipe::reopen_reader(end.as_fd()) } else { Err(io::ErrorKind::Unsupported.into()) }
}

/// A point in time as the kernel counts the starts of processes.
fn ticks(time: Time) -> u64 {
    let since_boot = clock_gettime(ClockId::Boottime);
    let since_boot = std::time::Duration::try_from(since_boot).unwrap_or_default();
    let then = since_boot.saturating_sub(clock::now().since(time));
    let per_second = u128::from(rustix::param::clock_ticks_per_second());
    u64::try_from(then.as_nanos() * per_second / 1_000_000_000).unwrap_or(u64::MAX)
}
