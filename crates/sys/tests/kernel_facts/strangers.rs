//! Processes that are no children of ours, or no longer anybody's; and the pipes they log into.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;

use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::pidfd::{self, Exit};
use reuseportd_sys::{capability, namespace, pipe, procfs, reaper};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::process::{Around, SHELL, shell, start, wait_for_end};
use crate::world::*;

fn wait_readable(fd: impl AsFd) {
    let mut polled = [PollFd::new(&fd, PollFlags::IN)];
    assert_eq!(poll(&mut polled, Some(&Timespec::try_from(DEADLINE).unwrap())).unwrap(), 1, "nothing came");
}

fn read_line(file: &mut File) -> String {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while file.read(&mut byte).unwrap() == 1 && byte[0] != b'\n' {
        line.push(byte[0]);
    }
    String::from_utf8(line).unwrap()
}

fn ordinary_pipe() -> (OwnedFd, File) {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    (reader, writer.into())
}

/// The kernel tells how somebody else's child ended.
fn tells_exits() -> bool {
    let release = capability::kernel_release();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|number| number.parse().ok());
    (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0)) >= (6, 15)
}

fn told(exit: Exit) -> Option<Exit> {
    tells_exits().then_some(exit)
}

#[test]
fn the_end_of_a_stranger_is_seen_and_told_once_its_parent_has_reaped_it() {
    with(&[], || {
        let (reader, mut writer) = ordinary_pipe();
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        for (end, exit) in [
            ("exit 7", Exit::Code(7)),
            ("kill -KILL $$", Exit::Signal { number: libc::SIGKILL, core: false }),
        ] {
            let script =
                format!("sh -c 'read _ <&4; {end}' & echo $!; wait $! 2>&-; echo reaped; read _ <&4");
            let around = Around { fds: vec![(reader.as_fd(), 4)], ..Around::default() };
            let (parent, mut output) = start(&sh, &["sh", "-c", &script], &around).unwrap();
            let stranger = pidfd::open(read_line(&mut output).parse().unwrap()).unwrap();
            assert!(!pidfd::has_ended(stranger.as_fd()).unwrap());
            assert_eq!(pidfd::exit_of_stranger(stranger.as_fd()).unwrap(), None);
            writer.write_all(b"\n").unwrap();
            assert_eq!(read_line(&mut output), "reaped");
            assert!(pidfd::has_ended(stranger.as_fd()).unwrap());
            assert_eq!(pidfd::peek_exit(stranger.as_fd()).unwrap_err().raw_os_error(), Some(libc::ECHILD));
            assert_eq!(pidfd::exit_of_stranger(stranger.as_fd()).unwrap(), told(exit));
            writer.write_all(b"\n").unwrap();
            assert_eq!(wait_for_end(parent.pidfd.as_fd()), Exit::Code(0));
        }
        let no_pidfd = File::open("/dev/null").unwrap();
        assert_eq!(pidfd::exit_of_stranger(no_pidfd.as_fd()).unwrap(), None);
    });
}

#[test]
fn of_a_process_that_nobody_has_reaped_the_end_is_known_and_not_the_reason() {
    with(&[], || {
        let (child, _output) = shell("exit 3");
        wait_readable(&child.pidfd);
        assert!(pidfd::has_ended(child.pidfd.as_fd()).unwrap());
        assert_eq!(pidfd::exit_of_stranger(child.pidfd.as_fd()).unwrap(), None);

        let own = rustix::process::getpid().as_raw_nonzero().get();
        assert!(reaper::zombies_of(own).unwrap().contains(&child.pid));
        assert!(!reaper::zombies_of(child.pid).unwrap().contains(&child.pid));
        reaper::reap_child(child.pid).unwrap();
        assert!(!reaper::zombies_of(own).unwrap().contains(&child.pid));
        assert_eq!(reaper::reap_child(child.pid).unwrap_err().raw_os_error(), Some(libc::ECHILD));
        assert_eq!(pidfd::exit_of_stranger(child.pidfd.as_fd()).unwrap(), told(Exit::Code(3)));

        let (running, _output) = shell("exec sleep 600");
        reaper::reap_child(running.pid).unwrap();
        assert!(!pidfd::has_ended(running.pidfd.as_fd()).unwrap(), "who runs is left alone");
        pidfd::send_signal(running.pidfd.as_fd(), libc::SIGKILL).unwrap();
        wait_for_end(running.pidfd.as_fd());
        for harmful in [0, -1] {
            assert_eq!(
                reaper::reap_child(harmful).unwrap_err().kind(),
                std::io::ErrorKind::InvalidInput,
                "it would be any child"
            );
        }
    });
}

#[test]
fn the_environment_of_another_process_is_what_it_was_given() {
    with(&[], || {
        let (reader, mut writer) = ordinary_pipe();
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        let around = Around { fds: vec![(reader.as_fd(), 0)], ..Around::default() };
        let (child, _output) = start(&sh, &["sh", "-c", "COLOUR=red; read _"], &around).unwrap();
        let environment = || procfs::environment(child.pid);
        wait_until("its environment", || !environment().unwrap().is_empty());
        assert_eq!(environment().unwrap(), [("COLOUR".into(), "blue".into())]);
        writer.write_all(b"\n").unwrap();
        wait_readable(&child.pidfd);
        assert!(!environment().is_ok_and(|all| !all.is_empty()), "it has ended");
        pidfd::reap(child.pidfd.as_fd()).unwrap();
        assert_eq!(environment().unwrap_err().kind(), std::io::ErrorKind::NotFound);
    });
}

#[test]
fn an_enormous_environment_is_refused() {
    with(&[], || {
        let words = (0..12).map(|n| (format!("V{n}"), "x".repeat(100_000)));
        let mut command = std::process::Command::new("cat");
        let mut child = command.envs(words).stdin(std::process::Stdio::piped()).spawn().unwrap();
        let pid = i32::try_from(child.id()).unwrap();
        let is_refused =
            || procfs::environment(pid).is_err_and(|e| e.kind() == std::io::ErrorKind::FileTooLarge);
        wait_until("an environment of more than 1 MiB", is_refused);
        drop(child.stdin.take());
        child.wait().unwrap();
    });
}

#[test]
fn this_process_knows_where_it_runs() {
    with(&[Need::Network], || {
        assert_eq!(namespace::boot_id().unwrap().len(), 36);
        let inode = |path: &str| rustix::fs::stat(path).unwrap().st_ino;
        assert_eq!(namespace::processes().unwrap(), inode("/proc/self/ns/pid"));
        assert_eq!(namespace::network().unwrap(), inode("/proc/thread-self/ns/net"));
        assert_ne!(namespace::network().unwrap(), inode("/proc/self/ns/net"), "the test has its own");
    });
}

/// Writes until the pipe is full; what was written, and what the kernel said then.
fn fill(writer: &OwnedFd) -> (usize, rustix::io::Errno) {
    rustix::io::ioctl_fionbio(writer, true).unwrap();
    let mut written = 0;
    loop {
        match rustix::io::write(writer, &[b'x'; 4096]) {
            Ok(count) => written += count,
            Err(error) => return (written, error),
        }
    }
}

#[test]
fn a_log_pipe_without_a_reader_takes_what_fits() {
    with(&[], || {
        let (reader, writer) = pipe::log_pipe().unwrap();
        for end in [&reader, &writer] {
            assert!(rustix::io::fcntl_getfd(end).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
        }
        let waits = |end| !rustix::fs::fcntl_getfl(end).unwrap().contains(rustix::fs::OFlags::NONBLOCK);
        assert_eq!((waits(&reader), waits(&writer)), (false, true));
        drop(reader);
        assert_eq!(fill(&writer), (65536, rustix::io::Errno::AGAIN));
        let (reader, ordinary) = ordinary_pipe();
        drop(reader);
        assert_eq!(fill(&ordinary.into()), (0, rustix::io::Errno::PIPE), "what it is good for");
    });
}

#[test]
fn the_output_of_a_worker_whose_reader_went_is_read_by_the_next() {
    with(&[], || {
        let (reader, writer) = pipe::log_pipe().unwrap();
        let (words, mut speak) = ordinary_pipe();
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        let around = Around { fds: vec![(words.as_fd(), 0), (writer.as_fd(), 1)], ..Around::default() };
        let script = "read _; echo alone; read _; echo last words";
        let (child, _errors) = start(&sh, &["sh", "-c", script], &around).unwrap();
        drop((reader, writer));
        speak.write_all(b"\n").unwrap();
        let end = pidfd::getfd(child.pidfd.as_fd(), 1).unwrap();
        let reader = pipe::reopen_reader(end.as_fd()).unwrap();
        drop(end);
        let mut reader = File::from(reader);
        wait_readable(&reader);
        assert_eq!(read_line(&mut reader), "alone");
        assert_eq!(reader.read(&mut [0]).unwrap_err().kind(), std::io::ErrorKind::WouldBlock, "it lives");
        speak.write_all(b"\n").unwrap();
        assert_eq!(wait_for_end(child.pidfd.as_fd()), Exit::Code(0), "writing did not end it");
        let mut rest = String::new();
        reader.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "last words\n", "and then the end, not WouldBlock");
    });
}
