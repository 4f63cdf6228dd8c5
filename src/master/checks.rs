//! Running `upgrade.check` against a generation on trial. Whether, when and for how long is the core's decision.

use std::ffi::CString;
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use reuseportd_core::{CheckFailure, Event, Exit, Generation};
use reuseportd_sys::child::{self, SpawnSpec};
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::{identity, pidfd};
use reuseportd_wire::{env, status as wire};
use serde::{Deserialize, Serialize};

use super::carried::{Carried, Pidfd};
use super::launch::{Launch, LaunchError};
use super::output::Output;
use super::process::LastLines;
use super::{Shell, words};
use crate::config;

/// A check that runs, until it is reaped.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Check {
    pid: i32,
    pidfd: Carried<Pidfd>,
    output: Output,
    last_lines: LastLines,
    /// Nobody wants its answer any more.
    is_unwanted: bool,
}

impl Check {
    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.pidfd.as_fd()
    }

    pub(super) fn output(&self) -> BorrowedFd<'_> {
        self.output.fd()
    }

    /// With all it has started.
    fn kill(&self) {
        // One that has just ended needs no signal.
        let _ = pidfd::signal_group(self.pid, nix::libc::SIGKILL);
    }
}

impl Launch {
    /// The program of the check, if there is one.
    pub(super) fn find_check(&self) -> Result<Option<PinnedExecutable>, LaunchError> {
        let uid = self.config.app.identity.uid;
        let failed = |error: &dyn std::fmt::Display| LaunchError::Check(error.to_string());
        let path = identity::or_as_user(uid, || config::find_check(&self.config, &self.variables))
            .map_err(|error| failed(&error))?;
        let Some(path) = path else { return Ok(None) };
        let opened = identity::or_as_user(uid, || PinnedExecutable::open(&path));
        opened.map(Some).map_err(|error| failed(&format!("cannot open {}: {error}", path.display())))
    }
}

impl Shell {
    /// Starts a check; `Checked` follows when it has ended, or now if it can't be started.
    pub(super) fn start_check(&mut self, run: u32, generation: Generation) {
        match self.try_start_check(generation) {
            Ok(check) => {
                tracing::debug!(event = "check", generation = generation.0, pid = check.pid, "check started");
                self.checks.insert(run, check);
            }
            Err(error) => {
                self.check_words = Some(error.to_string());
                let errno = super::groups::errno(&error);
                self.inbox.push_back(Event::Checked { run, failure: Some(CheckFailure::NotStarted(errno)) });
            }
        }
    }

    fn try_start_check(&mut self, generation: Generation) -> io::Result<Check> {
        let launch = self.launches.get(&generation).ok_or(io::ErrorKind::NotFound)?;
        let program = launch.find_check().map_err(io::Error::other)?.ok_or(io::ErrorKind::NotFound)?;
        let argv = launch.config.expand_check(generation.0).into_iter().map(CString::new);
        let argv = argv.collect::<Result<Vec<_>, _>>()?;
        let envp = launch.environment(self.check_variables(launch, generation))?;
        let app = &launch.config.app;
        let null = File::open("/dev/null")?;
        let (reader, writer): (OwnedFd, OwnedFd) = identity::as_user(app.identity.uid, Output::pipe)?;
        let directory = launch.directory()?;
        let spawned = child::spawn(&SpawnSpec {
            executable: &program,
            argv: &argv,
            envp: &envp,
            pid_variables: &[],
            fds: &[(null.as_fd(), 0), (writer.as_fd(), 1), (writer.as_fd(), 2)],
            umask: app.umask,
            identity: &app.identity,
            cpus: None,
            directory: directory.as_deref(),
            limits: &launch.limits(self.limits),
            cgroup: None,
            no_new_privileges: app.no_new_privileges,
        })
        .map_err(|error| {
            let words = format!("{}: {error}", program.path().display());
            self.check_words = Some(words);
            io::Error::from_raw_os_error(error.errno)
        })?;
        let tag = format!("[g{} check {}] ", generation.0, spawned.pid);
        Ok(Check {
            pid: spawned.pid,
            pidfd: Carried::new(Pidfd::from(spawned.pidfd)),
            output: Output::new(reader, tag),
            last_lines: LastLines::default(),
            is_unwanted: false,
        })
    }

    fn check_variables(&self, launch: &Launch, generation: Generation) -> Vec<(&'static str, String)> {
        let view = self.core.status();
        let phase = match view.state {
            reuseportd_core::MasterState::Canary => wire::Phase::Canary,
            _ => wire::Phase::Baking,
        };
        let of_processes = self.processes.values().filter(|process| process.generation == generation);
        let pids: Vec<String> = of_processes.map(|process| process.pid.to_string()).collect();
        let share =
            view.generations.iter().find(|one| one.generation == generation).map_or(0, |one| one.share);
        let mut own = launch.own_variables(generation);
        own.extend([
            (env::PIDS, pids.join(" ")),
            (env::PHASE, phase.to_string()),
            (env::SHARE, (f64::from(share) / 1000.0).to_string()),
            (env::RECEIPT, self.receipt_so_far()),
        ]);
        own
    }

    /// What is known of the upgrade under way; how it ends is not.
    fn receipt_so_far(&self) -> String {
        let Some(receipt) = self.core.receipt_so_far() else { return String::new() };
        let mut value = serde_json::to_value(self.receipt(&receipt, None)).unwrap_or_default();
        if let Some(outcome) = value.get_mut("outcome") {
            *outcome = serde_json::Value::Null;
        }
        value.to_string()
    }

    /// Nobody needs its answer any more.
    pub(super) fn end_check(&mut self, run: u32) {
        if let Some(check) = self.checks.get_mut(&run) {
            check.is_unwanted = true;
            check.kill();
        }
    }

    /// Those of a master that was killed are no children: how they end can't be known. They are run again.
    pub(super) fn forget_checks(&mut self) {
        for check in std::mem::take(&mut self.checks).into_values() {
            check.kill();
        }
    }

    pub(super) fn read_check(&mut self, run: u32) {
        if let Some(check) = self.checks.get_mut(&run) {
            check.output.pass_on(&mut check.last_lines);
        }
    }

    /// A check may have ended.
    pub(super) fn check_ended(&mut self, run: u32) {
        let Some(check) = self.checks.get_mut(&run) else { return };
        check.output.pass_on_rest(&mut check.last_lines);
        let how = match pidfd::peek_exit(check.fd()) {
            Ok(None) => return,
            Ok(Some(pidfd::Exit::Code(code))) => Exit::Code(code),
            Ok(Some(pidfd::Exit::Signal { number, .. })) => Exit::Signal(number),
            Err(_) => Exit::Unknown,
        };
        // What it has started goes with it. Until it is reaped, its group is nobody else's.
        check.kill();
        if let Err(error) = pidfd::reap(check.fd()) {
            tracing::error!(pid = check.pid, %error, "cannot reap a check");
        }
        let Some(check) = self.checks.remove(&run).filter(|check| !check.is_unwanted) else { return };
        let how_text = words::exit(how);
        tracing::info!(event = "checked", pid = check.pid, how = how_text, "check {how_text}");
        self.check_words = check.last_lines.join();
        let failure = if how == Exit::Code(0) { None } else { Some(CheckFailure::Ended(how)) };
        self.inbox.push_back(Event::Checked { run, failure });
    }

    /// What the last check said, or the one that runs.
    pub(super) fn check_evidence(&self) -> String {
        let running = self.checks.values().rev().find_map(|check| check.last_lines.join());
        match running.or_else(|| self.check_words.clone()) {
            Some(said) => format!("; its last output: {said}"),
            None => String::new(),
        }
    }
}
