//! Processes: running them with a deadline, finding those of an app.

use std::fs;
use std::io::{Read, Seek};
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// What a program left behind.
#[derive(Debug)]
pub(crate) struct Done {
    /// Its exit code; -1 if a signal ended it.
    pub(crate) code: i32,
    pub(crate) stdout: String,
    pub(crate) stderr: String,
}

impl Done {
    /// Demands that it failed, and said why in these words.
    pub(crate) fn refused(&self, words: &[&str]) {
        assert_eq!(self.code, 1, "{self:#?}");
        for word in words {
            assert!(self.stderr.contains(word), "{word}: {self:#?}");
        }
    }
}

/// A program that runs beside the test.
#[derive(Debug)]
pub(crate) struct Running {
    child: Child,
    output: [fs::File; 2],
    what: String,
}

impl Running {
    pub(crate) fn start(mut command: Command) -> Running {
        let what = format!("{command:?}");
        let output = [tempfile::tempfile().unwrap(), tempfile::tempfile().unwrap()];
        let [stdout, stderr] = output.each_ref().map(|file| file.try_clone().unwrap());
        let child = command.stdout(stdout).stderr(stderr).spawn().unwrap();
        Running { child, output, what }
    }

    /// Waits for its end.
    pub(crate) fn finish(mut self, patience: Duration) -> Done {
        let status = wait(&mut self.child, patience);
        let [stdout, stderr] = self.output.each_mut().map(|file| {
            let mut text = String::new();
            file.rewind().unwrap();
            file.read_to_string(&mut text).unwrap();
            text
        });
        let Some(status) = status else {
            self.child.kill().unwrap();
            self.child.wait().unwrap();
            panic!("{} did not end in {patience:?}\n{stdout}\n{stderr}", self.what);
        };
        Done { code: status.code().unwrap_or(-1), stdout, stderr }
    }

    /// Whether it still runs.
    pub(crate) fn is_running(&mut self) -> bool {
        self.child.try_wait().unwrap().is_none()
    }
}

/// Waits for a child's end; `None` when the time has passed.
pub(crate) fn wait(child: &mut Child, patience: Duration) -> Option<ExitStatus> {
    if let Some(status) = child.try_wait().unwrap() {
        return Some(status);
    }
    let pidfd = pidfd(child.id()).expect("a child that is not reaped has a pid");
    has_ended(&pidfd, patience).then(|| child.wait().unwrap())
}

/// A living process of an app.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Process {
    pub(crate) pid: u32,
    pub(crate) generation: u32,
}

/// Every living process that was started for this app, the children of its workers included, whoever their parent is.
pub(crate) fn processes_of(app: &str) -> Vec<Process> {
    let mine = format!("REUSEPORTD_APP={app}");
    pids()
        .filter_map(|pid: u32| {
            // Gone meanwhile, a zombie, or somebody else's: none of them is ours.
            let environment = fs::read(format!("/proc/{pid}/environ")).ok()?;
            let variables = environment.split(|byte| *byte == 0).map(String::from_utf8_lossy);
            let variables: Vec<_> = variables.collect();
            variables.iter().any(|variable| *variable == mine).then_some(())?;
            let generation =
                variables.iter().find_map(|variable| variable.strip_prefix("REUSEPORTD_GENERATION="))?;
            Some(Process { pid, generation: generation.parse().ok()? })
        })
        .collect()
}

/// The keepers of an app.
pub(crate) fn keepers_of(app: &str) -> Vec<u32> {
    let command = format!("reuseportd\0keeper\0--app\0{app}\0");
    let is_one =
        |pid: &u32| fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|is| is == command.as_bytes());
    pids().filter(is_one).collect()
}

/// What an app's keeper holds of its master's state: what the next master would know. As text, empty if there is none.
pub(crate) fn state_of(app: &str) -> String {
    let fds = |pid: u32| fs::read_dir(format!("/proc/{pid}/fd")).into_iter().flatten();
    let paths = keepers_of(app).into_iter().flat_map(fds).filter_map(|entry| Some(entry.ok()?.path()));
    let is_state = |path: &PathBuf| {
        fs::read_link(path).is_ok_and(|name| name.to_string_lossy().contains("/memfd:reuseportd-state"))
    };
    // One that has just been replaced is no more.
    paths.filter(is_state).filter_map(|path| fs::read_to_string(path).ok()).next().unwrap_or_default()
}

fn pids() -> impl Iterator<Item = u32> {
    fs::read_dir("/proc").unwrap().filter_map(|entry| entry.ok()?.file_name().to_str()?.parse().ok())
}

/// Sends a signal; a process that is gone already is as good as hit.
pub(crate) fn signal(pid: u32, signal: Signal) {
    if let Some(pidfd) = pidfd(pid) {
        let _ = pidfd_send_signal(pidfd, signal);
    }
}

/// Ends processes by SIGKILL and waits until they are gone.
pub(crate) fn kill(pids: impl IntoIterator<Item = u32>) {
    for pid in pids {
        if let Some(pidfd) = pidfd(pid) {
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
            assert!(has_ended(&pidfd, super::PATIENCE), "process {pid} survives SIGKILL");
        }
    }
}

/// Waits until a process has ended.
pub(crate) fn wait_gone(pid: u32, patience: Duration) {
    if let Some(pidfd) = pidfd(pid) {
        assert!(has_ended(&pidfd, patience), "process {pid} still runs after {patience:?}");
    }
}

/// A descriptor that becomes readable when the process ends; `None` if there is no such process.
fn pidfd(pid: u32) -> Option<OwnedFd> {
    pidfd_open(Pid::from_raw(pid.cast_signed())?, PidfdFlags::empty()).ok()
}

fn has_ended(pidfd: &OwnedFd, patience: Duration) -> bool {
    let deadline = Instant::now() + patience;
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec::try_from(left).unwrap();
        match poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&timeout)) {
            Ok(count) => return count > 0,
            Err(rustix::io::Errno::INTR) => {}
            Err(error) => panic!("poll: {error}"),
        }
    }
}
