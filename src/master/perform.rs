//! Carrying out what the core decided, one arm per command. Nothing is decided here: a failure goes back as an event.

use std::io;
use std::os::fd::AsFd;
use std::rc::Rc;

use reuseportd_core::{
    Command, Event, Generation, GroupId, ListenerId, Notice, Phase, Report, Signal, WorkerId,
};
use reuseportd_sys::diag::Socket;
use reuseportd_sys::{pidfd, socket};
use reuseportd_wire::control::Reply;
use reuseportd_wire::status::Protocol;

use super::Shell;
use super::groups::errno;
use super::launch::Launch;
use super::process::Process;
use super::takeover::signal_family;

/// Receipts kept for clients that ask later.
const RECEIPTS_MAX: usize = 50;

impl Shell {
    /// Does it, and queues the answer.
    pub(super) fn perform(&mut self, command: Command) {
        let answer = self.carry_out(command);
        self.inbox.extend(answer);
    }

    /// Does it; the answer, if it has one that is known at once.
    fn carry_out(&mut self, command: Command) -> Option<Event> {
        match command {
            Command::Spawn { worker, generation, seat } => {
                return Some(match self.spawn(worker, generation, seat) {
                    Ok(()) => Event::Spawned { worker },
                    Err(errno) => Event::SpawnFailed { worker, errno },
                });
            }
            Command::Bind { group, worker, generation, seat } => {
                let result = self.bind_seat(group, generation, seat);
                return Some(Event::Bound { group, worker, result });
            }
            Command::CheckRemains { worker } => {
                return Some(Event::Remains { worker, left: self.has_remains(worker) });
            }
            Command::Find { worker } => return Some(Event::Found { worker, found: self.find(worker) }),
            Command::Prove { worker } => {
                return Some(Event::Proved { worker, verdict: self.prove(worker) });
            }
            Command::Listen { listener } => {
                return Some(Event::Listening { listener, result: self.listen(listener) });
            }
            Command::Admit { listener, key } => {
                return Some(Event::Admitted { listener, result: self.admit(listener, key) });
            }
            Command::Steer { group, ranges } => {
                return Some(Event::Steered { group, result: self.groups.steer(group, &ranges) });
            }
            Command::Attach { group, shares } => {
                let member = self.listeners.member(group).ok_or(nix::libc::ENOENT);
                let result = member.and_then(|member| self.groups.attach(group, &shares, member));
                return Some(Event::Steered { group, result });
            }
            Command::Anchor { listener } => {
                let result = self.listeners.anchor(listener).map_err(|error| errno(&error));
                return Some(Event::Anchored { listener, result });
            }
            Command::Owns { listener, worker } => {
                return Some(Event::Owned { listener, owned: self.is_owned(listener, worker) });
            }
            Command::Discard { listener, group, generation } => {
                return Some(Event::Discarded { group, generation, count: self.discard(listener) });
            }
            Command::LetGo { listeners } => self.let_go(&listeners),
            Command::Evict { group, key } => self.evict(group, key),
            Command::KeepKeys { group, kept } => self.groups.keep_keys(group, &kept.into_iter().collect()),
            Command::Signal { worker, signal } => self.signal(worker, signal),
            Command::Reap { worker } => self.reap(worker),
            Command::Tell { worker, order } => self.tell(worker, order),
            Command::Release { listener, shutdown } => self.release(listener, shutdown),
            Command::Observe { group } => self.look_at(group),
            Command::Count { workers } => self.count_connections(&workers),
            Command::Notify(notice) => self.notify_upstream(notice),
            Command::Preflight => self.begin_preflight(),
            Command::EndPreflight => self.end_preflight(),
            Command::Reexec => self.is_reexec_due = true,
            Command::Save => self.saving.is_asked_for = true,
            Command::StartKeeper => self.start_keeper(),
            Command::ReplyReexec { to, done } => self.answer_reexec(to, done),
            Command::Check { run, generation } => self.start_check(run, generation),
            Command::EndCheck { run } => self.end_check(run),
            Command::Reply { to, receipt, asked } => self.answer(to, receipt, asked),
            Command::ReplyDone { to, failure } => self.answer_done(to, failure),
            // The connection is closed by the end of this process, so that its client sees that end.
            Command::ReplyStopped { to } => self.clients.reply(to.0, &Reply::Done, false),
            Command::Report(report) => self.tell_people(report),
            Command::Exit { code } => self.exit = Some(code),
        }
        None
    }

    fn notify_upstream(&mut self, notice: Notice) {
        if notice == Notice::Stopping {
            self.close_doors();
        }
        self.upstream.notice(notice);
    }

    fn evict(&mut self, group: GroupId, key: u32) {
        self.groups.evict(group, key);
        self.listeners.note_key(group, key, None);
    }

    fn release(&mut self, listener: ListenerId, shutdown: bool) {
        self.release_kept(listener);
        let worker = self.listeners.of(listener).and_then(|listener| listener.worker);
        let lives = worker.is_some_and(|worker| self.processes.contains_key(&worker));
        // A UDP socket can't be shut down.
        let shutdown = shutdown && !self.takes_datagrams(listener);
        self.listeners.release(listener, shutdown, lives);
    }

    /// Throws away what waits in a UDP socket, and counts it.
    fn discard(&self, listener: ListenerId) -> u32 {
        let discarded = self.listeners.handle(listener).map_or(Ok(0), socket::discard);
        discarded.unwrap_or_else(|error| {
            tracing::warn!(listener = listener.0, %error, "cannot count what waits in a UDP socket");
            0
        })
    }

    pub(super) fn takes_datagrams(&self, listener: ListenerId) -> bool {
        let group = self.listeners.of(listener).and_then(|listener| self.groups.of(listener.group));
        group.is_some_and(|group| group.protocol == Protocol::Udp)
    }

    fn signal(&mut self, worker: WorkerId, signal: Signal) {
        let Some(process) = self.processes.get(&worker) else { return };
        let stop = self.launches.get(&process.generation).map(|launch| launch.config.app.stop_signal as i32);
        let sent = match signal {
            Signal::TerminateGroup | Signal::KillGroup if process.shares_group => {
                return signal_family(process, signal);
            }
            Signal::Stop => pidfd::send_signal(process.pidfd.as_fd(), stop.unwrap_or(nix::libc::SIGTERM)),
            Signal::TerminateGroup => pidfd::signal_group(process.pid, nix::libc::SIGTERM),
            Signal::KillGroup => pidfd::signal_group(process.pid, nix::libc::SIGKILL),
        };
        // A process that has just ended can't be signalled: its end is on its way.
        if let Err(error) = sent.or_else(|error| if is_gone(&error) { Ok(()) } else { Err(error) }) {
            tracing::error!(pid = process.pid, ?signal, %error, "cannot signal a worker");
        }
    }

    fn reap(&mut self, worker: WorkerId) {
        if let Some(process) = self.processes.remove(&worker)
            && process.is_child
            && let Err(error) = pidfd::reap(process.pidfd.as_fd())
        {
            tracing::error!(pid = process.pid, %error, "cannot reap a worker");
        }
        self.listeners.forget_worker(worker);
        self.taking.retain(|(taker, _), _| *taker != worker);
        self.proofs.remove(&worker);
        self.exchanges.remove(&worker);
    }

    fn has_remains(&self, worker: WorkerId) -> bool {
        let process = self.processes.get(&worker).filter(|process| !process.shares_group);
        process.is_some_and(|process| self.has_members(process.pid).unwrap_or(false))
    }

    /// The end of a worker's first process. What it printed last is read before the core hears of it.
    pub(super) fn worker_ended(&mut self, worker: WorkerId) {
        let Some(process) = self.processes.get_mut(&worker) else { return };
        match process.peek_exit() {
            Ok(None) => {}
            Ok(Some(how)) => {
                process.is_ended = true;
                let Process { output, last_lines, .. } = process;
                if output.as_mut().is_some_and(|output| !output.pass_on_rest(last_lines)) {
                    process.output = None;
                }
                self.read_channel(worker);
                let remains = self.has_remains(worker);
                self.inbox.push_back(Event::Exited { worker, how, remains });
            }
            Err(error) => tracing::error!(pid = process.pid, %error, "cannot ask how a worker ended"),
        }
    }

    /// Passes on what a worker printed.
    pub(super) fn read_output(&mut self, worker: WorkerId) {
        let Some(process) = self.processes.get_mut(&worker) else { return };
        if let Some(output) = &mut process.output
            && !output.pass_on(&mut process.last_lines)
        {
            process.output = None;
        }
    }

    fn listen(&self, id: ListenerId) -> Result<(), i32> {
        let listener = self.listeners.of(id).ok_or(nix::libc::ENOENT)?;
        let launch = listener.worker.and_then(|worker| self.launch_of(worker)).ok_or(nix::libc::ENOENT)?;
        let configured = launch.listeners().find(|(group, _)| *group == listener.group);
        let backlog =
            configured.and_then(|(_, listen)| i32::try_from(listen.backlog).ok()).unwrap_or(i32::MAX);
        let handle = self.listeners.handle(id).ok_or(nix::libc::ENOENT)?;
        socket::listen(handle, backlog).map_err(|error| errno(&error))
    }

    fn admit(&mut self, id: ListenerId, key: u32) -> Result<(), i32> {
        let group = self.listeners.of(id).map(|listener| listener.group).ok_or(nix::libc::ENOENT)?;
        let handle = self.listeners.handle(id).ok_or(nix::libc::ENOENT)?;
        let worker = self.listeners.of(id).and_then(|listener| listener.worker);
        let generation = worker.and_then(|worker| self.processes.get(&worker)).map(|p| p.generation);
        self.groups.admit(group, key, handle, generation)?;
        self.listeners.note_key(group, key, Some(id));
        Ok(())
    }

    fn is_owned(&self, id: ListenerId, worker: WorkerId) -> bool {
        let Some(pid) = self.processes.get(&worker).map(|process| process.pid) else { return false };
        self.still_listens(id) && self.listeners.is_owned(id, || self.processes_of(pid))
    }

    /// A socket that was shut down is still there, but in no group. Unknown counts as yes.
    fn still_listens(&self, id: ListenerId) -> bool {
        let Some(listener) = self.listeners.of(id) else { return false };
        let takes_datagrams =
            self.groups.of(listener.group).is_some_and(|group| group.protocol == Protocol::Udp);
        let is_it = |socket: &Socket| socket.cookie == listener.cookie;
        // One that takes datagrams may be connected for a while, and be in no group meanwhile.
        takes_datagrams || self.listening().map_or(true, |listening| listening.iter().any(is_it))
    }

    fn look_at(&mut self, group: GroupId) {
        match self.observe(group) {
            Ok(view) => {
                self.views.insert(group, view.clone());
                self.inbox.push_back(Event::Observed { group, view });
            }
            Err(error) => {
                tracing::error!(listener = self.groups.name(group), %error, "cannot look at a group; using the last look");
                let view = self.views.get(&group).cloned().unwrap_or_default();
                self.inbox.push_back(Event::Observed { group, view });
            }
        }
    }

    fn count_connections(&mut self, workers: &[WorkerId]) {
        match self.count(workers) {
            Ok(connections) => self.inbox.push_back(Event::Counted { connections }),
            Err(error) => tracing::error!(%error, "cannot count open connections"),
        }
    }

    // ---- facts for people -------------------------------------------------------------------------------------

    fn tell_people(&mut self, report: Report) {
        match &report {
            Report::Launching(generation, _) => self.bring_up(*generation),
            Report::Switched(generation) => {
                self.remember_flows(*generation);
                if let Some(launch) = self.launches.get(generation) {
                    self.shared.settle(&launch.config, &launch.shared);
                }
            }
            Report::SteeredBack(..) => {
                self.core.status().active.into_iter().for_each(|active| self.remember_flows(active));
            }
            Report::Failing(_, reason) => self.failing = Some(self.reason(*reason)),
            Report::Drained(generation) => {
                self.groups.fold_counters(*generation);
                self.close_groups();
            }
            // Of two that wait the earlier one is dropped.
            Report::Superseded(_) => {
                self.prepared.pop_front();
                self.close_groups();
            }
            Report::Ended(receipt) => {
                self.keep_receipt(receipt);
                self.keep_shared();
            }
            Report::LeftoversTaken(listener, count) => self.note_leftovers(*listener, *count, 0),
            Report::LeftoversLost(listener, count) => self.note_leftovers(*listener, 0, *count),
            Report::DatagramsLost(group, count) => self.groups.note_leftovers(*group, 0, *count),
            Report::WorkerReady(_)
            | Report::Queued(_)
            | Report::Shared(..)
            | Report::Rolled(..)
            | Report::Scaled(..)
            | Report::SeatReplaced(..)
            | Report::Entered(..)
            | Report::WorkerExited { .. }
            | Report::Respawning(..)
            | Report::Replaced(..)
            | Report::BreakerOpened(_)
            | Report::BreakerClosed
            | Report::SlotsUnsure(_)
            | Report::SteerFailed(..)
            | Report::ListenerLost(_)
            | Report::Killed(..)
            | Report::Reexecuted
            | Report::ReexecRefused
            | Report::Adopted(_)
            | Report::Bug(_) => {}
        }
        self.log_report(&report);
    }

    /// The generation has its number now: what was prepared for it is kept under that.
    fn bring_up(&mut self, generation: Generation) {
        self.failing = None;
        self.groups.fold_counters(generation);
        if let Some(launch) = self.prepared.pop_front() {
            self.config = Rc::clone(&launch.config);
            let level = self.log.level(&self.config);
            let filter = tracing_subscriber::filter::LevelFilter::from_level(level);
            if let Err(error) = self.log_level.reload(filter) {
                tracing::warn!(%error, "cannot change the log level");
            }
            for (group, listen) in launch.listeners() {
                self.groups.rename(group, listen);
            }
            self.launches.insert(generation, launch);
        }
    }

    fn remember_flows(&self, generation: Generation) {
        for (group, listen) in self.launches.get(&generation).into_iter().flat_map(Launch::listeners) {
            self.groups.remember_flows(group, listen.flows.map(|flows| flows.timeout));
        }
    }

    fn note_leftovers(&mut self, listener: ListenerId, taken: u32, lost: u32) {
        if let Some(group) = self.listeners.of(listener).map(|listener| listener.group) {
            self.groups.note_leftovers(group, taken, lost);
        }
    }

    /// Groups that no generation listens in are let go of.
    fn close_groups(&mut self) {
        // What may be brought back keeps its program, but no address.
        self.launches.retain(|generation, _| self.core.remembers(*generation));
        let present = self.core.status().generations;
        let present = present.iter().filter_map(|view| self.launches.get(&view.generation));
        let used = present.chain(&self.prepared).flat_map(|launch| launch.groups.iter().copied()).collect();
        self.groups.keep(&used);
        self.views.retain(|group, _| used.contains(group));
        self.keep_shared();
    }

    fn keep_receipt(&mut self, receipt: &reuseportd_core::Receipt) {
        let known = self.receipts.iter().position(|(serial, _)| *serial == Some(receipt.serial));
        let reason = match known.and_then(|at| self.receipts.get(at)) {
            Some((_, earlier)) => earlier.reason.clone(),
            None => receipt.reason.map(|reason| self.failing.take().unwrap_or_else(|| self.reason(reason))),
        };
        let mut shown = self.receipt(receipt, reason);
        match known.and_then(|at| self.receipts.get_mut(at)) {
            Some((_, earlier)) => {
                // Worked out anew from two clocks, it would be another time of day.
                shown.started_at = std::mem::take(&mut earlier.started_at);
                *earlier = shown;
            }
            // So many came while it drained that it was kept no longer: who waits for it gets it, and it is not the last.
            None if receipt.phases.iter().any(|time| time.phase == Phase::Draining) => {
                self.receipts.pop_front();
                self.receipts.push_front((Some(receipt.serial), shown));
            }
            // The first start is no upgrade, unless it fails.
            None if receipt.from.is_none() && shown.reason.is_none() => {}
            None => self.keep(Some(receipt.serial), shown),
        }
    }

    /// Keeps a receipt as the last one; without a number nobody asks for it later.
    pub(super) fn keep(&mut self, serial: Option<u32>, receipt: reuseportd_wire::status::Receipt) {
        self.receipts.push_back((serial, receipt));
        if self.receipts.len() > RECEIPTS_MAX {
            self.receipts.pop_front();
        }
    }
}

fn is_gone(error: &io::Error) -> bool {
    error.raw_os_error() == Some(nix::libc::ESRCH)
}

impl Shell {
    /// The worker's pid for people; 0 once it is reaped.
    pub(super) fn pid(&self, worker: WorkerId) -> i32 {
        self.processes.get(&worker).map_or(0, |process| process.pid)
    }

    /// Its generation and seat for people.
    pub(super) fn place(&self, worker: WorkerId) -> (u32, u16) {
        self.processes.get(&worker).map_or((0, 0), |process| (process.generation.0, process.seat.0))
    }
}
