//! The master's program is replaced in place: a child of the new one reads the state first, then this process becomes
//! the new one, with the same pid, children and descriptors.

use std::ffi::{CString, OsString};
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use reuseportd_core::{Event, MasterState};
use reuseportd_sys::child::{self, SpawnSpec, Spawned};
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::identity::Identity;
use reuseportd_sys::{capability, image, memfd, pidfd};
use reuseportd_wire::env;
use rustix::fs::{Access, access};
use rustix::pipe::{PipeFlags, pipe_with};
use sha2::{Digest, Sha256};

use super::Shell;
use super::process::printable;
use super::snapshot::Lines;

/// The number under which a child finds the state it is to try.
const STATE_NUMBER: i32 = 3;
/// Of what the new program says, in bytes.
const WORDS_BYTES_MAX: u64 = 2000;

/// The new program trying to read the state.
#[derive(Debug)]
pub(super) struct Preflight {
    child: Child,
    /// What it says when it has understood.
    answer: OwnedFd,
    wanted: String,
    /// What it complains about.
    complaint: OwnedFd,
    /// It was ended because it took too long.
    is_late: bool,
    /// The very file that is executed next.
    program: PinnedExecutable,
}

/// Its process. No master that ends leaves it behind.
#[derive(Debug)]
struct Child(Spawned);

impl Child {
    /// With all of its group, which it may have left itself.
    fn end(&self) {
        let _ = pidfd::signal_group(self.0.pid, nix::libc::SIGKILL);
        let _ = pidfd::send_signal(self.0.pidfd.as_fd(), nix::libc::SIGKILL);
    }
}

impl Drop for Child {
    fn drop(&mut self) {
        if matches!(pidfd::has_ended(self.0.pidfd.as_fd()), Ok(false)) {
            self.end();
        }
    }
}

impl Preflight {
    pub(super) fn pidfd(&self) -> BorrowedFd<'_> {
        self.child.0.pidfd.as_fd()
    }

    /// Why the state is not to be entrusted to it; `None` while it reads.
    fn outcome(&self) -> Option<Result<(), String>> {
        let how = match pidfd::peek_exit(self.pidfd()) {
            Ok(how) => how?,
            Err(error) => return Some(Err(format!("it can't be asked how it ended: {error}"))),
        };
        // What it has started goes with it. Until it is reaped, its group is nobody else's.
        self.child.end();
        let _ = pidfd::reap(self.pidfd());
        let complaint = match words(&self.complaint) {
            text if text.is_empty() => text,
            text => format!(": {text}"),
        };
        Some(match how {
            _ if self.is_late => Err("it did not read the state in time".to_owned()),
            pidfd::Exit::Code(0) if words(&self.answer) == self.wanted => Ok(()),
            pidfd::Exit::Code(0) => Err(format!(
                "it says nothing about the state: it is another program, or a version that can't re-exec{complaint}"
            )),
            pidfd::Exit::Code(code) => Err(format!("it does not read the state (status {code}){complaint}")),
            pidfd::Exit::Signal { number, .. } => {
                Err(format!("it was ended by signal {number} while it read the state{complaint}"))
            }
        })
    }
}

/// All that waits in the pipe, as one line.
fn words(pipe: &OwnedFd) -> String {
    let mut text = Vec::new();
    // It never blocks; where it would, the text ends.
    let _ = pipe.try_clone().map(|pipe| File::from(pipe).take(WORDS_BYTES_MAX).read_to_end(&mut text));
    let text = String::from_utf8_lossy(&text);
    let lines: Vec<String> = text.lines().map(printable).filter(|line| !line.is_empty()).collect();
    lines.join(" | ")
}

/// Where the program of this process is to be found, by the name it was started with: after an update of the package
/// another file is there.
pub(super) fn own_program() -> PathBuf {
    let name = PathBuf::from(std::env::args_os().next().unwrap_or_default());
    let is_program = |path: &PathBuf| path.is_file() && access(path, Access::EXEC_OK).is_ok();
    let in_path = || {
        let path = std::env::var_os("PATH")?;
        std::env::split_paths(&path).map(|directory| directory.join(&name)).find(is_program)
    };
    let found = if name.as_os_str().as_bytes().contains(&b'/') { Some(name.clone()) } else { in_path() };
    let found = found.and_then(|path| std::path::absolute(path).ok());
    found.or_else(|| std::env::current_exe().ok()).unwrap_or(name)
}

/// What a child says that has understood this state. Every version says it in the same way: exit code 0 alone is what
/// any program may end with.
fn understood(text: &[u8]) -> String {
    format!("understood {:x}", Sha256::digest(text))
}

/// What a child does that is to try the state.
pub(crate) fn preflight() -> ExitCode {
    // Reading takes none. Where a filter forbids to give them up it is done with them.
    let _ = capability::keep_none();
    let text = image::take_carried(STATE_NUMBER).and_then(|state| memfd::read(state.as_fd()));
    let answer = text.map_err(|error| error.to_string()).and_then(|text| {
        let lines = Lines::of(&text).map_err(|error| error.to_string())?;
        lines.try_all().map_err(|error| error.to_string())?;
        writeln!(io::stdout(), "{}", understood(&text)).map_err(|error| error.to_string())
    });
    match answer {
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
        let (answer, stdout) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let (complaint, stderr) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let null = File::options().read(true).write(true).open("/dev/null")?;
        let argv = [c_string(self.program.as_os_str())?, c"preflight".into()];
        let child = child::spawn(&SpawnSpec {
            executable: &program,
            argv: &argv,
            envp: &[],
            pid_variables: &[],
            fds: &[
                (null.as_fd(), 0),
                (stdout.as_fd(), 1),
                (stderr.as_fd(), 2),
                (state.as_fd(), STATE_NUMBER),
            ],
            umask: None,
            identity: &Identity::default(),
            cpus: None,
            directory: None,
            limits: &[],
            cgroup: None,
            no_new_privileges: true,
        })
        .map_err(io::Error::other)?;
        Ok(Preflight {
            child: Child(child),
            answer,
            wanted: understood(&text),
            complaint,
            is_late: false,
            program,
        })
    }

    /// Whoever reaps orphans leaves it alone.
    pub(super) fn preflight_pid(&self) -> Option<i32> {
        self.preflight.as_ref().map(|preflight| preflight.child.0.pid)
    }

    /// It has had its time; its end is the answer.
    pub(super) fn end_preflight(&mut self) {
        if let Some(preflight) = &mut self.preflight {
            preflight.is_late = true;
            preflight.child.end();
        }
    }

    /// The child has ended.
    pub(super) fn preflight_ended(&mut self) {
        let Some(outcome) = self.preflight.as_ref().and_then(Preflight::outcome) else { return };
        let Some(preflight) = self.preflight.take() else { return };
        match outcome {
            Ok(()) => {
                self.proven = Some(preflight.program);
                self.inbox.push_back(Event::Preflighted { readable: true });
            }
            Err(why) => self.refuse_reexec(format!("{}: {why}", self.program.display())),
        }
    }

    fn refuse_reexec(&mut self, reason: String) {
        self.reexec_error = Some(reason);
        self.inbox.push_back(Event::Preflighted { readable: false });
    }

    /// Why there was no re-exec.
    pub(super) fn reexec_refusal(&self) -> String {
        let is_stopping = self.core.status().state == MasterState::Stopping;
        let error = self.reexec_error.clone().filter(|_| !is_stopping);
        error.unwrap_or_else(|| "the service is stopping".to_owned())
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
