//! Starting a worker: fork, a fixed list of steps, exec.
//!
//! [`spawn`] forks, so it may only be called from a process with exactly one thread (the master is one by
//! design): another thread could hold the allocator's lock at the fork. Between fork and exec the child runs
//! async-signal-safe calls only, on data prepared before. The order of the steps is that of [`Step`]; a failure
//! comes back over a close-on-exec pipe as the step and its errno.

use std::ffi::{CStr, CString};
use std::io;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::thread::CpuSet;

use crate::executable::PinnedExecutable;
use crate::identity::Identity;
use crate::{cgroup, check, pidfd};

/// What to start and in which surroundings.
#[derive(Debug)]
pub struct SpawnSpec<'a> {
    /// The program.
    pub executable: &'a PinnedExecutable,
    /// Arguments, the program's own name first.
    pub argv: &'a [CString],
    /// The whole environment, as `NAME=value`.
    pub envp: &'a [CString],
    /// Further variables of these names with the child's own pid, which nobody knows before: `LISTEN_PID`.
    pub pid_variables: &'a [&'a str],
    /// Descriptors the child gets, each under its number; all others are closed. Give 0, 1 and 2 too.
    pub fds: &'a [(BorrowedFd<'a>, RawFd)],
    /// File mode creation mask.
    pub umask: Option<u32>,
    /// User, groups and capabilities.
    pub identity: &'a Identity,
    /// The processors it may run on; those of this process if `None`.
    pub cpus: Option<CpuSet>,
    /// Working directory, entered as the user it becomes.
    pub directory: Option<&'a CStr>,
    /// Resource limits.
    pub limits: &'a [Limit],
    /// `cgroup.procs` of the cgroup it is put into, open for writing; that of this process if `None`.
    pub cgroup: Option<BorrowedFd<'a>>,
    /// Whether the child and its descendants may never gain privileges by exec.
    pub no_new_privileges: bool,
}

/// One resource limit; `u64::MAX` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limit {
    /// `RLIMIT_NOFILE` and its like.
    pub resource: u32,
    /// In force.
    pub soft: u64,
    /// Upper bound of the soft limit.
    pub hard: u64,
}

/// A child that has become the wanted program.
#[derive(Debug)]
pub struct Spawned {
    /// Its pid, which is its process group too.
    pub pid: i32,
    /// Readable when it ends.
    pub pidfd: OwnedFd,
}

/// Where a start failed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Step {
    /// Preparing the pipe for the result.
    Prepare,
    /// Making the process: EAGAIN is a limit on processes.
    Fork,
    /// Its own session, and process group. From one session into the groups of another there is no way.
    Session,
    /// Entering its cgroup.
    Cgroup,
    /// Giving descriptors their numbers.
    Descriptors,
    /// Setting resource limits.
    Limits,
    /// Choosing processors.
    Processors,
    /// Dropping capabilities from the bounding set.
    Bounds,
    /// Taking on its groups.
    Groups,
    /// Becoming its user.
    User,
    /// Setting the capabilities it has.
    Capabilities,
    /// Entering the working directory.
    Directory,
    /// Giving up new privileges.
    NoNewPrivileges,
    /// Executing the program.
    Exec,
    /// Opening the child by descriptor.
    Pidfd,
}

/// What may need privilege comes before what gives it up.
const CHILD_STEPS: [Step; 12] = [
    Step::Session,
    Step::Cgroup,
    Step::Descriptors,
    Step::Limits,
    Step::Processors,
    Step::Bounds,
    Step::Groups,
    Step::User,
    Step::Capabilities,
    Step::Directory,
    Step::NoNewPrivileges,
    Step::Exec,
];

impl Step {
    fn words(self) -> &'static str {
        match self {
            Step::Prepare => "prepare a start",
            Step::Fork => "make a process",
            Step::Session => "make a session",
            Step::Cgroup => "enter its cgroup",
            Step::Descriptors => "hand over descriptors",
            Step::Limits => "set resource limits",
            Step::Processors => "choose its processors",
            Step::Bounds => "drop capabilities",
            Step::Groups => "take on its groups",
            Step::User => "become its user",
            Step::Capabilities => "set its capabilities",
            Step::Directory => "enter the working directory",
            Step::NoNewPrivileges => "give up new privileges",
            Step::Exec => "execute the program",
            Step::Pidfd => "watch the process",
        }
    }
}

/// Why a start failed; nothing is left behind.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("cannot {}: {}", step.words(), io::Error::from_raw_os_error(*errno))]
pub struct SpawnError {
    /// The step that failed.
    pub step: Step,
    /// What the kernel said.
    pub errno: i32,
}

fn failed(step: Step) -> impl FnOnce(io::Error) -> SpawnError {
    move |error| SpawnError { step, errno: error.raw_os_error().unwrap_or(libc::EINVAL) }
}

/// Everything the child reads, in memory before the fork.
struct Prepared<'a> {
    spec: &'a SpawnSpec<'a>,
    argv: Vec<*const libc::c_char>,
    envp: Vec<*const libc::c_char>,
    /// The variables with the child's pid, with room for its digits; `envp` points into them.
    pid_entries: Vec<Vec<u8>>,
    /// Source (replaced in the child by a duplicate out of the way) and number.
    fds: Vec<(RawFd, RawFd)>,
    /// First number above all wanted ones.
    above: RawFd,
    /// The pinned file to execute, unless it goes by path.
    held: Option<RawFd>,
    /// Where failures are reported.
    result: RawFd,
}

/// Starts a worker and waits until it has become the program (or has failed to), which takes about a millisecond.
///
/// The file at the executable's path is executed while it is the pinned one, else the held descriptor; a script
/// always goes by path.
///
/// # Errors
/// With the step that failed; the child has been reaped by then.
pub fn spawn(spec: &SpawnSpec<'_>) -> Result<Spawned, SpawnError> {
    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC).map_err(|e| failed(Step::Prepare)(e.into()))?;
    let mut pid_entries: Vec<Vec<u8>> = spec.pid_variables.iter().map(|name| pid_entry(name)).collect();
    let mut prepared = Prepared {
        spec,
        argv: pointers(spec.argv, &mut []),
        envp: pointers(spec.envp, &mut pid_entries),
        pid_entries,
        fds: spec.fds.iter().map(|(fd, number)| (fd.as_raw_fd(), *number)).collect(),
        above: spec.fds.iter().map(|(_, number)| number + 1).max().unwrap_or(0).max(3),
        held: (!spec.executable.is_script() && !spec.executable.is_same_at_path())
            .then(|| spec.executable.fd().as_raw_fd()),
        result: writer.as_raw_fd(),
    };
    // SAFETY: `fork` runs it in the child alone, once. All it points to (arguments, environment, the held file) is owned or
    // borrowed by `prepared` and `spec`, which both outlive the child's use of its copy of them.
    let pid = fork(|| unsafe { run_child(&mut prepared) }).map_err(failed(Step::Fork))?;
    drop(writer);
    if let Some(error) = read_result(reader) {
        let _ = wait(pid);
        return Err(error);
    }
    // The pid can't have been reused: nobody but us can reap the child.
    let pidfd = pidfd::open(pid).map_err(|error| {
        // SAFETY: two numbers. The child is ours and not reaped, so that its pid is nobody else's.
        unsafe { libc::kill(pid, libc::SIGKILL) };
        let _ = wait(pid);
        failed(Step::Pidfd)(error)
    })?;
    Ok(Spawned { pid, pidfd })
}

/// Digits of the largest pid.
const PID_DIGITS_MAX: usize = 10;

/// A variable with room for a pid and the byte that ends it.
fn pid_entry(name: &str) -> Vec<u8> {
    let mut entry = format!("{name}=").into_bytes();
    entry.resize(entry.len() + PID_DIGITS_MAX + 1, 0);
    entry
}

fn pointers(strings: &[CString], further: &mut [Vec<u8>]) -> Vec<*const libc::c_char> {
    let further = further.iter_mut().map(|entry| entry.as_mut_ptr().cast_const().cast());
    strings.iter().map(|string| string.as_ptr()).chain(further).chain([std::ptr::null()]).collect()
}

/// Writes a pid behind the `=` of its variable: no allocation, for the room is there.
fn write_pid(entry: &mut [u8], pid: u32) {
    let start = entry.iter().position(|byte| *byte == b'=').map_or(0, |at| at + 1);
    let digits = pid.checked_ilog10().unwrap_or(0) + 1;
    for (place, byte) in (0..digits).rev().zip(entry.iter_mut().skip(start)) {
        // One digit: it fits.
        *byte = b'0' + (pid / 10_u32.pow(place) % 10) as u8;
    }
}

/// Forks with all signals blocked: a handler that ran in the child would write to the master's signal pipe. What the
/// child does may be async-signal-safe calls only; its result becomes the exit code.
pub(crate) fn fork(run: impl FnOnce() -> libc::c_int) -> io::Result<i32> {
    // SAFETY: a sigset_t is an array of integers, of which all-zero is one. (Filled in below, before it is used.)
    let (mut all, mut before) = unsafe { std::mem::zeroed::<(libc::sigset_t, libc::sigset_t)>() };
    // SAFETY: the sets are local and live across the calls. The process has one thread (see the module's description), so
    // no lock is held by a thread that the child lacks, and its memory is consistent. `run` neither allocates nor unwinds,
    // as this function's callers promise, and the child never returns from here: nothing is dropped twice.
    unsafe {
        libc::sigfillset(&raw mut all);
        check(libc::sigprocmask(libc::SIG_SETMASK, &raw const all, &raw mut before))?;
        let pid = libc::fork();
        if pid == 0 {
            libc::_exit(run());
        }
        let result = check(pid);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const before, std::ptr::null_mut());
        result
    }
}

/// The child's life before exec; returns when that fails, with the exit code. Async-signal-safe calls only, no
/// allocation, no unwinding.
///
/// # Safety
/// Only in a just forked child.
unsafe fn run_child(prepared: &mut Prepared<'_>) -> libc::c_int {
    // SAFETY: this is a just forked child, as the caller says, which `perform` asks for. errno is this thread's own, at
    // an address that is always valid, and `report` lives across write(2).
    unsafe {
        for step in CHILD_STEPS {
            if perform(step, prepared) < 0 {
                let errno = (*libc::__errno_location()).to_ne_bytes();
                let report = [step as u8, errno[0], errno[1], errno[2], errno[3]];
                libc::write(prepared.result, report.as_ptr().cast(), report.len());
                break;
            }
        }
    }
    127
}

/// One step; negative with errno set when it failed.
///
/// # Safety
/// Only in a just forked child.
unsafe fn perform(step: Step, prepared: &mut Prepared<'_>) -> libc::c_int {
    let spec = prepared.spec;
    // SAFETY: in a just forked child, as the caller says. setpgid and prctl take numbers; `directory` is a C string of the
    // spec's, which lives as long as `prepared`.
    unsafe {
        match step {
            Step::Session => libc::setsid(),
            Step::Cgroup => spec.cgroup.map_or(0, |procs| with_errno(cgroup::enter(procs))),
            Step::Descriptors => place_descriptors(prepared),
            Step::Limits => spec.limits.iter().fold(0, |result, limit| result.min(set_limit(limit))),
            Step::Processors => match &spec.cpus {
                Some(cpus) => with_errno(rustix::thread::sched_setaffinity(None, cpus)),
                None => 0,
            },
            Step::Bounds | Step::Groups | Step::User | Step::Capabilities => {
                with_errno(spec.identity.assume(step))
            }
            Step::Directory => spec.directory.map_or(0, |directory| libc::chdir(directory.as_ptr())),
            Step::NoNewPrivileges if spec.no_new_privileges => {
                libc::prctl(libc::PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
            }
            Step::Exec => exec(prepared),
            _ => 0,
        }
    }
}

/// The C library's way of telling a result.
fn with_errno(result: rustix::io::Result<()>) -> libc::c_int {
    let Err(errno) = result else { return 0 };
    // SAFETY: the C library's address of this thread's own errno is always valid, and nobody else writes there.
    unsafe { *libc::__errno_location() = errno.raw_os_error() };
    -1
}

/// # Safety
/// Only in a just forked child.
unsafe fn set_limit(limit: &Limit) -> libc::c_int {
    let value = libc::rlimit { rlim_cur: limit.soft, rlim_max: limit.hard };
    // SAFETY: the value lives across the call.
    unsafe { libc::setrlimit(limit.resource, &raw const value) }
}

/// Moves all sources out of the way of the wanted numbers first, so that no order of the list can overwrite one.
///
/// # Safety
/// Only in a just forked child.
unsafe fn place_descriptors(prepared: &mut Prepared<'_>) -> libc::c_int {
    // SAFETY: all calls take numbers. The child's table is a copy of the master's, so that nobody's descriptor is closed or
    // replaced under an owner: the child owns none (it runs no destructors), and executes or ends.
    unsafe {
        let sources = prepared.fds.iter_mut().map(|(source, _)| source).chain(&mut prepared.held);
        for fd in std::iter::once(&mut prepared.result).chain(sources) {
            let moved = libc::fcntl(*fd, libc::F_DUPFD_CLOEXEC, prepared.above);
            if moved < 0 {
                return -1;
            }
            *fd = moved;
        }
        // Everything of the master is close-on-exec already; this covers what it inherited itself. Kernels before
        // 5.11 don't know the call, which is no reason not to start.
        libc::syscall(libc::SYS_close_range, 3_u32, u32::MAX, libc::CLOSE_RANGE_CLOEXEC);
        for (source, number) in &prepared.fds {
            if libc::dup2(*source, *number) < 0 {
                return -1;
            }
        }
    }
    0
}

/// # Safety
/// Only in a just forked child.
unsafe fn exec(prepared: &mut Prepared<'_>) -> libc::c_int {
    for entry in &mut prepared.pid_entries {
        write_pid(entry, std::process::id());
    }
    let (argv, envp) = (prepared.argv.as_ptr(), prepared.envp.as_ptr());
    // SAFETY: both arrays end with a null pointer and point to C strings: of the spec, or `pid_entries`, which end with a
    // zero byte that `write_pid` leaves alone (it writes at most the digits there is room for). `default` is larger than
    // any architecture's sigaction, and all-zero is SIG_DFL without flags; the signal sets are local and initialised
    // before they are used. Dispositions go back to the default before signals are let in, so no handler of the master
    // runs here.
    unsafe {
        if let Some(mask) = prepared.spec.umask {
            libc::umask(mask);
        }
        // Straight to the kernel: the C library would refuse its own two signals, which can be inherited ignored.
        // All zero is the default action, whatever the layout; SIGKILL and SIGSTOP refuse, rightly.
        let default = [0_u64; 8];
        for signal in 1..=64 {
            libc::syscall(libc::SYS_rt_sigaction, signal, default.as_ptr(), std::ptr::null::<u64>(), 8);
        }
        let mut none: libc::sigset_t = std::mem::zeroed();
        libc::sigemptyset(&raw mut none);
        libc::sigprocmask(libc::SIG_SETMASK, &raw const none, std::ptr::null_mut());
        match prepared.held {
            None => libc::execve(prepared.spec.executable.c_path().as_ptr(), argv, envp),
            Some(file) => {
                libc::syscall(libc::SYS_execveat, file, c"".as_ptr(), argv, envp, libc::AT_EMPTY_PATH);
                -1
            }
        }
    }
}

/// What the child reported; nothing when its end of the pipe closed at exec.
fn read_result(reader: OwnedFd) -> Option<SpawnError> {
    let mut report = [0; 5];
    let length = loop {
        match rustix::io::read(&reader, &mut report) {
            Err(rustix::io::Errno::INTR) => {}
            result => break result.unwrap_or(0),
        }
    };
    let step = CHILD_STEPS.into_iter().find(|step| *step as u8 == report[0])?;
    let errno = i32::from_ne_bytes([report[1], report[2], report[3], report[4]]);
    (length == report.len()).then_some(SpawnError { step, errno })
}

/// Waits for the end of a child of ours, which is about to come: its exit code, -1 if a signal ended it.
pub(crate) fn wait(pid: i32) -> io::Result<i32> {
    let mut status = 0;
    loop {
        // SAFETY: the kernel writes one int into `status`, which lives across the call.
        match check(unsafe { libc::waitpid(pid, &raw mut status, 0) }) {
            Ok(_) if libc::WIFEXITED(status) => return Ok(libc::WEXITSTATUS(status)),
            Ok(_) => return Ok(-1),
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pid_is_written_without_leading_zeros() {
        for (pid, text) in
            [(1, "A=1\0\0\0\0\0\0\0\0\0\0"), (4_194_304, "A=4194304\0\0\0\0"), (120, "A=120\0\0\0\0\0\0\0\0")]
        {
            let mut entry = pid_entry("A");
            write_pid(&mut entry, pid);
            assert_eq!(entry, text.as_bytes());
        }
    }
}
