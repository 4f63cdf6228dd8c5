//! The master's program is replaced in place: a child of the new one reads the state first, then this process becomes
//! the new one, with the same pid, children and descriptors.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use reuseportd_core::Event;
use reuseportd_sys::child::{self, SpawnSpec, Spawned};
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::identity::Identity;
use reuseportd_sys::{image, memfd, pidfd};
use reuseportd_wire::env;
use rustix::pipe::{PipeFlags, pipe_with};

use super::Shell;
use super::process::printable;
use super::snapshot::Lines;

/// The number under which a child finds the state it is to try.
const STATE_NUMBER: i32 = 3;
/// Of what the new program says about its failure, in bytes.
const COMPLAINT_BYTES_MAX: u64 = 2000;

/// The new program trying to read the state.
#[derive(Debug)]
pub(super) struct Preflight {
    child: Spawned,
    /// What it complains about.
    complaint: OwnedFd,
    /// The very file that is executed next.
    program: PinnedExecutable,
}

impl Preflight {
    pub(super) fn pidfd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.child.pidfd.as_fd()
    }
}

/// Where the program of this process is to be found, by the name it was started with: after an update of the package
/// another file is there.
pub(super) fn own_program() -> PathBuf {
    let name = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    let in_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|directory| directory.join(&name)).find(|path| path.is_file())
    };
    let found = if name.components().count() > 1 { std::path::absolute(&name).ok() } else { in_path() };
    found.or_else(|| std::env::current_exe().ok()).unwrap_or(name)
}

/// What a child does that is to try the state: exit code 0 means that it is understood.
pub(crate) fn preflight() -> ExitCode {
    let text = image::take_carried(STATE_NUMBER).and_then(|state| memfd::read(state.as_fd()));
    let understood = text.map_err(|error| error.to_string()).and_then(|text| {
        let lines = Lines::of(&text).map_err(|error| error.to_string())?;
        lines.try_all().map_err(|error| error.to_string())
    });
    match understood {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("{error}");
            ExitCode::FAILURE
        }
    }
}

impl Shell {
    /// Starts the new program as a child; how it ends is the answer.
    pub(super) fn begin_preflight(&mut self) {
        match self.spawn_preflight() {
            Ok(preflight) => self.preflight = Some(preflight),
            Err(error) => self.refuse_reexec(format!("{}: {error}", self.program.display())),
        }
    }

    fn spawn_preflight(&self) -> io::Result<Preflight> {
        let program = PinnedExecutable::open(&self.program)?;
        let (text, _) = self.state_for_exec().map_err(io::Error::other)?;
        let state = memfd::sealed("reuseportd-state", &text)?;
        let (complaint, theirs) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let argv = [c_string(self.program.as_os_str())?, c"preflight".into()];
        let child = child::spawn(&SpawnSpec {
            executable: &program,
            argv: &argv,
            envp: &[],
            pid_variables: &[],
            fds: &[
                (null.as_fd(), 0),
                (null.as_fd(), 1),
                (theirs.as_fd(), 2),
                (state.as_fd(), STATE_NUMBER),
            ],
            umask: None,
            identity: &Identity::default(),
            cpus: None,
            directory: None,
            limits: &[],
            no_new_privileges: false,
        })
        .map_err(io::Error::other)?;
        Ok(Preflight { child, complaint, program })
    }

    /// Whoever reaps orphans leaves it alone.
    pub(super) fn preflight_pid(&self) -> Option<i32> {
        self.preflight.as_ref().map(|preflight| preflight.child.pid)
    }

    pub(super) fn end_preflight(&mut self) {
        if let Some(preflight) = &self.preflight {
            let _ = pidfd::send_signal(preflight.pidfd(), nix::libc::SIGKILL);
        }
    }

    /// The child has ended.
    pub(super) fn preflight_ended(&mut self) {
        let Some(preflight) = self.preflight.take() else { return };
        match pidfd::reap(preflight.pidfd()) {
            Ok(Some(pidfd::Exit::Code(0))) => {
                self.proven = Some(preflight.program);
                self.inbox.push_back(Event::Preflighted { readable: true });
            }
            Ok(None) => self.preflight = Some(preflight),
            how => {
                let mut text = Vec::new();
                let _ = File::from(preflight.complaint).take(COMPLAINT_BYTES_MAX).read_to_end(&mut text);
                let text = printable(String::from_utf8_lossy(&text).trim_end());
                let why = match how {
                    Ok(Some(pidfd::Exit::Signal { number, .. })) => {
                        format!("it was ended by signal {number} while it read the state")
                    }
                    Err(error) => format!("it can't be asked how it ended: {error}"),
                    _ => format!("it does not read the state: {text}"),
                };
                self.refuse_reexec(format!("{}: {why}", self.program.display()));
            }
        }
    }

    fn refuse_reexec(&mut self, reason: String) {
        self.reexec_error = Some(reason);
        self.inbox.push_back(Event::Preflighted { readable: false });
    }

    /// Why there was no re-exec.
    pub(super) fn reexec_refusal(&self) -> String {
        self.reexec_error.clone().unwrap_or_else(|| "the service is stopping".to_owned())
    }

    /// Becomes the new program. Returns only if that fails.
    pub(super) fn reexec(&mut self) {
        let Some(program) = self.proven.take() else { return };
        tracing::info!(event = "reexec", program = %self.program.display(), "executing {}", self.program.display());
        let error = match self.try_reexec(&program) {
            Ok(never) => match never {},
            Err(error) => error,
        };
        self.reexec_error = Some(format!("{}: {error}", self.program.display()));
        self.inbox.push_back(Event::Reexecuted { done: false });
    }

    fn try_reexec(&self, program: &PinnedExecutable) -> io::Result<std::convert::Infallible> {
        let (text, carried) = self.state_for_exec().map_err(io::Error::other)?;
        let state = memfd::sealed("reuseportd-state", &text)?;
        let resume = OsString::from(format!("{}={}", env::RESUME, state.as_raw_fd()));
        let argv = std::env::args_os().map(|argument| c_string(&argument)).collect::<io::Result<Vec<_>>>()?;
        let others = std::env::vars_os().filter(|(name, _)| name != env::RESUME).map(|(mut entry, value)| {
            entry.push("=");
            entry.push(value);
            entry
        });
        let envp = others.chain([resume]).map(|entry| c_string(&entry)).collect::<io::Result<Vec<_>>>()?;
        let carried: Vec<_> = carried.iter().map(AsFd::as_fd).chain([state.as_fd()]).collect();
        // A signal that comes from here on waits for the handlers of the next image.
        self.signals.hold()?;
        let error = image::replace(program, &argv, &envp, &carried);
        self.signals.release()?;
        Err(error)
    }
}

fn c_string(text: impl AsRef<Path>) -> io::Result<CString> {
    Ok(CString::new(text.as_ref().as_os_str().as_bytes().to_vec())?)
}
