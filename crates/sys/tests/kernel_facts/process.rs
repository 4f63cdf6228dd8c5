//! Processes: start, pin, watch, end; and signals to ourselves.

use std::ffi::{CStr, CString};
use std::fs::{self, File};
use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use reuseportd_sys::child::{Limit, SpawnError, SpawnSpec, Spawned, Step, spawn};
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::identity::Identity;
use reuseportd_sys::pidfd::{self, Exit};
use reuseportd_sys::procfs;
use reuseportd_sys::signals::{Signal, SignalPipe};
use rustix::event::{PollFd, PollFlags, poll};

use crate::world::*;

pub(crate) const SHELL: &str = "/bin/sh";

pub(crate) fn strings(strings: &[&str]) -> Vec<CString> {
    strings.iter().map(|&string| CString::new(string).unwrap()).collect()
}

/// Surroundings besides standard input, output and error.
#[derive(Default)]
pub(crate) struct Around<'a> {
    pub(crate) fds: Vec<(BorrowedFd<'a>, i32)>,
    pub(crate) umask: Option<u32>,
    pub(crate) directory: Option<&'a CStr>,
    pub(crate) limits: Vec<Limit>,
    pub(crate) no_new_privileges: bool,
    pub(crate) pid_variables: &'a [&'a str],
    pub(crate) identity: Identity,
    pub(crate) cgroup: Option<BorrowedFd<'a>>,
}

/// Starts a program with its output in a pipe.
pub(crate) fn start(
    executable: &PinnedExecutable,
    arguments: &[&str],
    around: &Around<'_>,
) -> Result<(Spawned, File), SpawnError> {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let null = File::open("/dev/null").unwrap();
    let (argv, envp) = (strings(arguments), strings(&["COLOUR=blue"]));
    let mut fds = vec![(null.as_fd(), 0), (writer.as_fd(), 1), (writer.as_fd(), 2)];
    fds.extend(&around.fds);
    let spec = SpawnSpec {
        pid_variables: around.pid_variables,
        executable,
        argv: &argv,
        envp: &envp,
        fds: &fds,
        umask: around.umask,
        identity: &around.identity,
        cpus: None,
        directory: around.directory,
        limits: &around.limits,
        cgroup: around.cgroup,
        no_new_privileges: around.no_new_privileges,
    };
    spawn(&spec).map(|spawned| (spawned, File::from(reader)))
}

pub(crate) fn shell(script: &str) -> (Spawned, File) {
    let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
    start(&sh, &["sh", "-c", script], &Around::default()).unwrap()
}

/// All output until the last writer ends, and how the worker ended.
pub(crate) fn finish((spawned, mut output): (Spawned, File)) -> (String, Exit) {
    let mut text = String::new();
    output.read_to_string(&mut text).unwrap();
    (text, wait_for_end(spawned.pidfd.as_fd()))
}

pub(crate) fn wait_for_end(pidfd: BorrowedFd<'_>) -> Exit {
    let mut polled = [PollFd::new(&pidfd, PollFlags::IN)];
    let limit = rustix::event::Timespec::try_from(DEADLINE).unwrap();
    assert_eq!(poll(&mut polled, Some(&limit)).unwrap(), 1, "the child did not end");
    pidfd::reap(pidfd).unwrap().unwrap()
}

/// A directory of this test's own, removed at the end.
pub(crate) struct Scratch(PathBuf);

impl Scratch {
    pub(crate) fn new(name: &str) -> Scratch {
        let path = std::env::temp_dir().join(format!("reuseportd-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&path);
        fs::create_dir(&path).unwrap();
        Scratch(path)
    }

    /// Puts a file under the name, as installers do: a new inode, renamed over the old one.
    pub(crate) fn install(&self, name: &str, content: &[u8]) -> PathBuf {
        let (new, path) = (self.0.join("new"), self.0.join(name));
        fs::write(&new, content).unwrap();
        fs::set_permissions(&new, fs::Permissions::from_mode(0o755)).unwrap();
        fs::rename(&new, &path).unwrap();
        path
    }
}

impl Drop for Scratch {
    fn drop(&mut self) {
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[test]
fn a_worker_gets_just_what_it_was_given() {
    with(&[], || {
        let script = "cat /proc/self/stat | cut -d' ' -f5; echo $$; echo $LISTEN_PID; echo $WATCHDOG_PID; echo $COLOUR; pwd; umask; ulimit -n; ls /proc/$$/fd; \
                  exec cat /proc/self/status";
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        let inherited = fs::File::open("/dev/null").unwrap();
        rustix::io::fcntl_setfd(&inherited, rustix::io::FdFlags::empty()).unwrap();
        let (channel, _other) = reuseportd_sys::socket::seqpacket_pair().unwrap();
        let around = Around {
            fds: vec![(channel.as_fd(), 3)],
            umask: Some(0o27),
            directory: Some(c"/tmp"),
            limits: vec![Limit { resource: libc::RLIMIT_NOFILE, soft: 123, hard: 456 }],
            no_new_privileges: true,
            pid_variables: &["LISTEN_PID", "WATCHDOG_PID"],
            identity: Identity::default(),
            cgroup: None,
        };
        let child = start(&sh, &["sh", "-c", script], &around).unwrap();
        let pid = child.0.pid.to_string();
        let (text, exit) = finish(child);
        assert_eq!(exit, Exit::Code(0), "{text}");
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines[..8], [&pid, &pid, &pid, &pid, "blue", "/tmp", "0027", "123"], "{text}");
        assert_eq!(lines[8..13], ["0", "1", "2", "3", "Name:\tcat"], "{text}");
        assert!(lines.contains(&"NoNewPrivs:\t1"), "{text}");
        assert!(!lines.contains(&inherited.as_raw_fd().to_string().as_str()), "{text}");
    });
}

#[test]
fn a_worker_starts_with_every_signal_at_its_default() {
    with(&[], || {
        // Not by way of a shell, which has ideas of its own.
        let cat = PinnedExecutable::open(Path::new("/bin/cat")).unwrap();
        let child = start(&cat, &["cat", "/proc/self/status"], &Around::default()).unwrap();
        let (text, _) = finish(child);
        for set in ["SigBlk", "SigIgn", "SigCgt"] {
            assert!(text.contains(&format!("\n{set}:\t0000000000000000\n")), "{text}");
        }
        assert!(text.contains("\nNoNewPrivs:\t0\n"), "{text}");
    });
}

#[test]
fn descriptors_reach_their_numbers_whatever_the_order() {
    with(&[], || {
        let files: Vec<File> = (0..6).map(|_| File::open("/dev/null").unwrap()).collect();
        let scratch = Scratch::new("numbers");
        let named: Vec<File> = (0..4).map(|n| File::create(scratch.0.join(n.to_string())).unwrap()).collect();
        drop(files);
        // Each goes to a number that another of them has now.
        let numbers: Vec<i32> = named.iter().map(AsRawFd::as_raw_fd).rev().collect();
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        let script = "for n in \"$@\"; do readlink /proc/$$/fd/$n; done";
        let words: Vec<String> = numbers.iter().map(ToString::to_string).collect();
        let arguments: Vec<&str> =
            ["sh", "-c", script, "sh"].into_iter().chain(words.iter().map(String::as_str)).collect();
        let fds = named.iter().map(AsFd::as_fd).zip(numbers.iter().copied()).collect();
        let child = start(&sh, &arguments, &Around { fds, ..Around::default() });
        let wanted: String =
            (0..4).map(|n| format!("{}\n", scratch.0.join(n.to_string()).display())).collect();
        assert_eq!(finish(child.unwrap()), (wanted, Exit::Code(0)));
    });
}

#[test]
fn each_failing_step_is_named_and_leaves_no_child() {
    with(&[], || {
        let scratch = Scratch::new("steps");
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        let no_program = PinnedExecutable::open(&scratch.install("garbage", b"not a program")).unwrap();
        let no_interpreter =
            PinnedExecutable::open(&scratch.install("script", b"#!/no/such/thing\n")).unwrap();
        let null = File::open("/dev/null").unwrap();
        let bad_limit = Limit { resource: libc::RLIMIT_NOFILE, soft: 10, hard: 5 };
        let errors = [
            start(&no_program, &["x"], &Around::default()),
            start(&no_interpreter, &["x"], &Around::default()),
            start(&sh, &["sh"], &Around { directory: Some(c"/no/such/directory"), ..Around::default() }),
            start(&sh, &["sh"], &Around { limits: vec![bad_limit], ..Around::default() }),
            start(&sh, &["sh"], &Around { fds: vec![(null.as_fd(), -1)], ..Around::default() }),
        ];
        let errors = errors.map(|result| result.unwrap_err());
        let wanted = [
            (Step::Exec, libc::ENOEXEC),
            (Step::Exec, libc::ENOENT),
            (Step::Directory, libc::ENOENT),
            (Step::Limits, libc::EINVAL),
            (Step::Descriptors, libc::EBADF),
        ];
        assert_eq!(errors.map(|error| (error.step, error.errno)), wanted);
        assert_eq!(
            errors[2].to_string(),
            "cannot enter the working directory: No such file or directory (os error 2)"
        );
        for (name, errno) in [("missing", libc::ENOENT), (".", libc::EACCES)] {
            assert_eq!(
                PinnedExecutable::open(&scratch.0.join(name)).unwrap_err().raw_os_error(),
                Some(errno),
                "{name}"
            );
        }
    });
}

#[test]
fn a_pinned_program_outlives_its_replacement() {
    with(&[], || {
        let scratch = Scratch::new("pinned");
        let path = scratch.install("worker", &fs::read("/bin/echo").unwrap());
        let pinned = PinnedExecutable::open(&path).unwrap();
        assert!(pinned.is_same_at_path() && !pinned.is_script());
        scratch.install("worker", &fs::read("/bin/false").unwrap());
        assert!(!pinned.is_same_at_path());
        let ran = |executable: &PinnedExecutable| {
            finish(start(executable, &["worker", "old"], &Around::default()).unwrap())
        };
        assert_eq!(ran(&pinned), ("old\n".to_owned(), Exit::Code(0)));
        assert_eq!(ran(&PinnedExecutable::open(&path).unwrap()), (String::new(), Exit::Code(1)));
        // Also when the number it is held under is wanted for something else.
        let null = File::open("/dev/null").unwrap();
        let around = Around { fds: vec![(null.as_fd(), pinned.fd().as_raw_fd())], ..Around::default() };
        assert_eq!(
            finish(start(&pinned, &["worker", "old"], &around).unwrap()),
            ("old\n".to_owned(), Exit::Code(0))
        );
        fs::remove_file(&path).unwrap();
        assert_eq!(ran(&pinned), ("old\n".to_owned(), Exit::Code(0)));
        let held = pinned.fd().try_clone_to_owned().unwrap();
        let carried = PinnedExecutable::from_fd(&path, held, pinned.identity(), false).unwrap();
        assert_eq!(ran(&carried), ("old\n".to_owned(), Exit::Code(0)));
    });
}

#[test]
fn a_script_runs_by_path_and_says_so() {
    with(&[], || {
        let scratch = Scratch::new("script");
        let path = scratch.install("worker", b"#!/bin/sh\necho one\n");
        let pinned = PinnedExecutable::open(&path).unwrap();
        assert!(pinned.is_script());
        assert_eq!(finish(start(&pinned, &["worker"], &Around::default()).unwrap()).0, "one\n");
        scratch.install("worker", b"#!/bin/sh\necho two\n");
        assert_eq!(finish(start(&pinned, &["worker"], &Around::default()).unwrap()).0, "two\n");
    });
}

#[test]
fn a17_an_end_is_seen_peeked_at_and_reaped_once() {
    with(&[], || {
        let (child, mut output) = shell("kill -KILL $$");
        output.read_to_string(&mut String::new()).unwrap();
        let mut polled = [PollFd::new(&child.pidfd, PollFlags::IN)];
        poll(&mut polled, None).unwrap();
        let killed = Exit::Signal { number: libc::SIGKILL, core: false };
        let late: OwnedFd = pidfd::open(child.pid).unwrap();
        for pidfd in [&child.pidfd, &late] {
            assert_eq!(
                pidfd::peek_exit(pidfd.as_fd()).unwrap(),
                Some(killed),
                "also of a zombie opened late"
            );
        }
        assert!(procfs::process(child.pid).unwrap().is_zombie);
        assert_eq!(pidfd::reap(late.as_fd()).unwrap(), Some(killed));
        assert_eq!(pidfd::reap(child.pidfd.as_fd()).unwrap_err().raw_os_error(), Some(libc::ECHILD));
        assert_eq!(
            pidfd::send_signal(child.pidfd.as_fd(), libc::SIGTERM).unwrap_err().raw_os_error(),
            Some(libc::ESRCH)
        );
    });
}

#[test]
fn a_workers_remains_are_found_and_go_with_its_group() {
    with(&[], || {
        let (child, mut output) = shell("sleep 600 & echo $!; exec sleep 600");
        assert_eq!(pidfd::peek_exit(child.pidfd.as_fd()).unwrap(), None);
        let mut byte = [0];
        let mut first = Vec::new();
        while output.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
            first.push(byte[0]);
        }
        let helper: i32 = String::from_utf8(first).unwrap().parse().unwrap();
        let mut wanted = vec![child.pid, helper];
        wanted.sort_unstable();
        let sorted = |mut pids: Vec<i32>| {
            pids.sort_unstable();
            pids
        };
        assert_eq!(sorted(procfs::group_members(child.pid).unwrap()), wanted);
        assert_eq!(sorted(procfs::descendants(child.pid, child.pid).unwrap()), wanted);
        assert_eq!(procfs::parent_of(helper).unwrap(), child.pid);
        assert!(procfs::start_time(helper).unwrap() >= procfs::start_time(child.pid).unwrap());
        let elsewhere = pidfd::open(helper).unwrap();
        pidfd::send_signal(child.pidfd.as_fd(), libc::SIGKILL).unwrap();
        wait_until("the leader's end", || pidfd::peek_exit(child.pidfd.as_fd()).unwrap().is_some());
        assert_eq!(
            procfs::group_members(child.pid).unwrap(),
            [helper],
            "the leader is a zombie, the helper lives"
        );
        pidfd::signal_group(child.pid, libc::SIGKILL).unwrap();
        let mut polled = [PollFd::new(&elsewhere, PollFlags::IN)];
        poll(&mut polled, None).unwrap();
        assert_eq!(procfs::group_members(child.pid).unwrap(), []);
        assert!(pidfd::reap(child.pidfd.as_fd()).unwrap().is_some());
        for harmful in [0, -1] {
            assert_eq!(
                pidfd::signal_group(harmful, libc::SIGKILL).unwrap_err().kind(),
                std::io::ErrorKind::InvalidInput
            );
        }
    });
}

#[test]
fn a_listener_is_taken_from_a_worker() {
    with(&[], || {
        let listener = listening(V4.parse().unwrap());
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        let around = Around { fds: vec![(listener.as_fd(), 7)], ..Around::default() };
        let (child, _output) = start(&sh, &["sh", "-c", "exec sleep 600"], &around).unwrap();
        let inode = reuseportd_sys::socket::inode(listener.as_fd()).unwrap();
        assert_eq!(procfs::socket_inodes(child.pid).unwrap(), [(7, inode)]);
        assert!(procfs::owns_socket(child.pid, 7, inode));
        let taken = pidfd::getfd(child.pidfd.as_fd(), 7).unwrap();
        let cookie = |fd: BorrowedFd<'_>| reuseportd_sys::socket::cookie(fd).unwrap();
        assert_eq!(cookie(taken.as_fd()), cookie(listener.as_fd()));
        assert_eq!(pidfd::getfd(child.pidfd.as_fd(), 8).unwrap_err().raw_os_error(), Some(libc::EBADF));
        pidfd::send_signal(child.pidfd.as_fd(), libc::SIGTERM).unwrap();
        assert_eq!(wait_for_end(child.pidfd.as_fd()), Exit::Signal { number: libc::SIGTERM, core: false });
    });
}

#[test]
fn signals_arrive_once_each_and_stops_come_last() {
    with(&[], || {
        let pipe = SignalPipe::new().unwrap();
        assert_eq!(pipe.read(), []);
        for signal in [Signal::Terminate, Signal::Hangup, Signal::Hangup, Signal::TerminalInput] {
            // SAFETY: sends a signal that this test catches to its own thread.
            assert_eq!(unsafe { libc::raise(signal as i32) }, 0);
        }
        let mut polled = [PollFd::from_borrowed_fd(pipe.fd(), PollFlags::IN)];
        assert_eq!(poll(&mut polled, None).unwrap(), 1);
        assert_eq!(pipe.read(), [Signal::TerminalInput, Signal::Hangup, Signal::Terminate]);
        assert_eq!(pipe.read(), []);
        // A flood fills the pipe; the signal that comes after it is not lost.
        for _ in 0..70_000 {
            // SAFETY: as above.
            unsafe { libc::raise(libc::SIGUSR1) };
        }
        // SAFETY: as above.
        unsafe { libc::raise(libc::SIGTERM) };
        assert_eq!(pipe.read(), [Signal::User1, Signal::Terminate]);
        // A worker started meanwhile has none of our handlers.
        let (text, _) = finish(shell("cat /proc/self/status"));
        assert!(text.contains("\nSigCgt:\t0000000000000000\n"), "{text}");
    });
}

#[test]
fn this_process_knows_its_rights() {
    with(&[], || {
        let status = fs::read_to_string("/proc/thread-self/status").unwrap();
        let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:\t")).unwrap();
        let effective = u64::from_str_radix(effective, 16).unwrap();
        let has = |bit: u32| effective >> bit & 1 == 1;
        use reuseportd_sys::capability;
        assert_eq!(capability::has_net_admin(), has(12));
        assert_eq!(capability::has_sys_ptrace(), has(19));
        assert_eq!(capability::has_bpf(), has(39) || has(21));
        assert_eq!(
            capability::kernel_release(),
            fs::read_to_string("/proc/sys/kernel/osrelease").unwrap().trim_end()
        );
        let limits = reuseportd_sys::limits::raise_nofile().unwrap();
        assert_eq!(limits.now, limits.hard);
    });
}
