//! The way back from a state to a master that goes on: after a re-exec in the same process, or in the next one after
//! the last was killed. Both read the same state with the same descriptors; only what may have happened meanwhile
//! differs.

use std::collections::{BTreeMap, VecDeque};
use std::io;
use std::os::fd::{AsFd, OwnedFd};

use reuseportd_core::{Event, Verdict};
use reuseportd_sys::signals::SignalPipe;
use reuseportd_sys::{image, memfd};
use rustix::thread::CapabilitySet;

use super::activation::Passed;
use super::carried::Carried;
use super::control::Clients;
use super::keeping::{Saving, is_first_process};
use super::runtime::Runtime;
use super::seldom::Seldom;
use super::snapshot::{Belongings, Lines, Snapshot, SnapshotError};
use super::start::NoStart;
use super::turn::Turn;
use super::upstream::Upstream;
use super::{Shell, clock, log, reexec};
use crate::keeper::{self, FetchError, Inheritance, Keeper};

/// Goes on where the image before this one was.
pub(super) fn resume(number: &str, signals: SignalPipe) -> Result<Shell, String> {
    let failed = |what: &dyn std::fmt::Display| {
        format!("cannot go on after the re-exec: {what}; start the service again: it takes the workers over")
    };
    let number: i32 = number.parse().map_err(|error| failed(&error))?;
    let state = image::take_carried(number).map_err(|error| failed(&error))?;
    let text = memfd::read(state.as_fd()).map_err(|error| failed(&error))?;
    let lines = Lines::of(&text).map_err(|error| failed(&error))?;
    let taken = lines.head.fds.iter().map(|(name, number)| Ok((name.clone(), image::take_carried(*number)?)));
    let mut fds = taken.collect::<io::Result<BTreeMap<_, _>>>().map_err(|error| failed(&error))?;
    let snapshot = lines.state(&mut fds).map_err(|error| failed(&error))?;
    let Belongings { clients, mut runtime, keeper, dropped } =
        lines.belongings(&mut fds).map_err(|error| failed(&error))?;
    runtime.own();
    let mut shell = snapshot.revive(signals, runtime, clients, keeper);
    shell.dropped = CapabilitySet::from_bits_retain(dropped);
    shell.reexecs += 1;
    shell.inbox.push_front(Event::Reexecuted { done: true });
    Ok(shell)
}

/// What came of looking for a master's inheritance.
pub(super) enum Adoption {
    Done(Box<Shell>),
    /// There is none, or none that can be used.
    Nothing(SignalPipe, Runtime),
}

/// Takes over what a master that was killed has left with its keeper.
pub(super) fn adopt(
    signals: SignalPipe,
    runtime: Runtime,
    passed: &mut Vec<Passed>,
) -> Result<Adoption, NoStart> {
    let Inheritance { state, mut fds, keeper } = match keeper::fetch(&runtime.keeper_path()) {
        Ok(Some(inheritance)) => inheritance,
        Ok(None) => return Ok(Adoption::Nothing(signals, runtime)),
        Err(error @ (FetchError::Busy(_) | FetchError::Elsewhere(_))) => {
            return Err(error.to_string().into());
        }
        Err(error) => {
            eprintln!("{error}");
            return Ok(Adoption::Nothing(signals, runtime));
        }
    };
    match read(&state, &mut fds) {
        Ok(snapshot) => {
            let mut shell = take_over(snapshot, signals, runtime, keeper).map_err(|error| {
                format!("cannot take over from the master that has ended: {error}; its workers serve on")
            })?;
            // The service manager has given this process the same sockets that the keeper had, or more.
            shell.shared.receive(std::mem::take(passed));
            Ok(Adoption::Done(Box::new(shell)))
        }
        // It lives, and so do its workers.
        Err(error @ SnapshotError::Elsewhere(_)) => Err(elsewhere(&error).into()),
        Err(error) => {
            eprintln!(
                "the state of the master that has ended can't be used: {error}; its workers are looked for without it"
            );
            keeper.end();
            Ok(Adoption::Nothing(signals, runtime))
        }
    }
}

/// Workers live that can't be reached from here.
pub(super) fn elsewhere(error: &SnapshotError) -> String {
    format!(
        "the workers that serve can't be taken over from here: {error}; start it there, or end them with `reuseportd stop \
         --left-behind`"
    )
}

fn read(state: &[u8], fds: &mut BTreeMap<String, OwnedFd>) -> Result<Snapshot, SnapshotError> {
    let lines = Lines::of(state)?;
    lines.head.place.check()?;
    lines.state(fds)
}

fn take_over(
    snapshot: Snapshot,
    signals: SignalPipe,
    runtime: Runtime,
    keeper: Keeper,
) -> Result<Shell, String> {
    let control = &snapshot.config.control;
    let listener = runtime.control_socket(control).map_err(|error| error.to_string())?;
    let clients = Clients::new(listener, &control.allow_users);
    let saved = snapshot.saved;
    let mut shell = snapshot.revive(signals, runtime, clients, Some(Carried::new(keeper)));
    shell.adopted = true;
    shell.started = clock::now();
    shell.runtime.own();
    for process in shell.processes.values_mut() {
        process.is_child = false;
    }
    shell.groups.find_record();
    shell.forget_checks();
    shell.end_unknown(saved);
    let lost = shell.listeners.without_handle();
    shell.inbox.push_front(Event::Adopted { lost });
    Ok(shell)
}

/// The keeper of a master that has none yet.
pub(super) fn needs_keeper() -> Option<Event> {
    (!is_first_process()).then_some(Event::KeeperMissing)
}

impl Snapshot {
    /// A master in this state.
    fn revive(
        self,
        signals: SignalPipe,
        runtime: Runtime,
        clients: Clients,
        keeper: Option<Carried<Keeper>>,
    ) -> Shell {
        let log_level = log::start(self.log.format, self.log.level(&self.config));
        let upstream = Upstream::from_env();
        // Requests on their way were this process's; they are made again.
        let exchanging = self.exchanging.into_iter();
        let mut inbox: VecDeque<Event> =
            exchanging.map(|worker| Event::Proved { worker, verdict: Verdict::Waiting }).collect();
        inbox.push_back(Event::Supervised { every: upstream.beat() });
        inbox.extend(needs_keeper());
        let taking = self.taking.into_iter().map(|(worker, name, listener)| ((worker, name), listener));
        Shell {
            core: self.core,
            turn: Turn::default(),
            inbox,
            started: self.started,
            config_path: self.config_path,
            config: self.config,
            prepared: self.prepared,
            launches: self.launches,
            config_last: self.config_last,
            checks: self.checks,
            check_words: self.check_words,
            processes: self.processes,
            listeners: self.listeners,
            groups: self.groups,
            shared: self.shared,
            views: BTreeMap::new(),
            taking: taking.collect(),
            proofs: BTreeMap::new(),
            exchanges: BTreeMap::new(),
            receipts: self.receipts,
            failing: self.failing,
            spawn_error: self.spawn_error,
            state_reason: self.state_reason,
            clients,
            notify: self.notify,
            notify_rejected: self.notify_rejected,
            rejections: Seldom::default(),
            upstream,
            signals,
            limits: self.limits,
            log: self.log,
            log_level,
            runtime,
            exit: None,
            reexecs: self.reexecs,
            adopted: self.adopted,
            program: reexec::own_program(),
            preflight: None,
            proven: None,
            is_reexec_due: false,
            reexec_error: None,
            keeper,
            dropped: CapabilitySet::empty(),
            saving: Saving::default(),
            journalled: None,
        }
    }
}
