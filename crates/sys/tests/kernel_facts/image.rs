//! The re-exec: what the next image finds. The images are this very test program, started with a part to play.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::os::unix::ffi::OsStringExt;
use std::os::unix::process::CommandExt;
use std::process::Command;

use nix::sys::signal::SigSet;
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::signals::{self, Signal, SignalPipe};
use reuseportd_sys::{image, memfd};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::{FdFlags, fcntl_getfd};

use crate::process::{Scratch, strings};
use crate::world::*;

/// Part and number of the carried descriptor.
const PART: &str = "REUSEPORTD_TEST_IMAGE";
const PARTS_TEST: &str = "image::a_part_is_played";
const SNAPSHOT: &[u8] = b"what the first image knew";

fn send(signal: Signal) {
    // SAFETY: sends a signal to this process, which catches it.
    assert_eq!(unsafe { libc::kill(libc::getpid(), signal as i32) }, 0);
}

fn wait_for_signals(pipe: &SignalPipe) -> Vec<Signal> {
    let mut polled = [PollFd::from_borrowed_fd(pipe.fd(), PollFlags::IN)];
    assert_eq!(poll(&mut polled, Some(&Timespec::try_from(DEADLINE).unwrap())).unwrap(), 1, "no signal");
    pipe.read()
}

fn is_close_on_exec(fd: BorrowedFd<'_>) -> bool {
    fcntl_getfd(fd).unwrap().contains(FdFlags::CLOEXEC)
}

/// Plays a part if this process was started for that.
#[test]
fn a_part_is_played() {
    match std::env::var(PART).as_deref() {
        Ok("first") => first_image(),
        Ok("failing") => failing_image(),
        Ok(number) => second_image(number.parse().unwrap()),
        Err(_) => {}
    }
}

/// A process in which no thread but the test's own takes signals.
fn play(part: &str) -> String {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", PARTS_TEST, "--nocapture"]).env(PART, part);
    let block = || Ok(SigSet::all().thread_set_mask()?);
    // SAFETY: one async-signal-safe system call.
    let output = unsafe { command.pre_exec(block) }.output().unwrap();
    let (told, errors) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{told}{errors}");
    told.into_owned()
}

fn environment(part: &str) -> Vec<CString> {
    let others = std::env::vars_os().filter(|(name, _)| name != PART);
    let line = |(name, value): (std::ffi::OsString, std::ffi::OsString)| {
        CString::new([name.into_vec(), value.into_vec()].join(&b'=')).unwrap()
    };
    others.chain([(PART.into(), part.into())]).map(line).collect()
}

fn own_program() -> PinnedExecutable {
    PinnedExecutable::open(&std::env::current_exe().unwrap()).unwrap()
}

fn first_image() {
    let mut pipe = SignalPipe::new().unwrap();
    pipe.watch_children().unwrap();
    signals::reset_inherited().unwrap();
    let carried = memfd::sealed("snapshot", SNAPSHOT).unwrap();
    let left = memfd::sealed("left", b"").unwrap();
    assert!(left.as_raw_fd() > carried.as_raw_fd());
    // One has come and was not read, one comes while all are held.
    send(Signal::Hangup);
    send(Signal::Child);
    pipe.hold().unwrap();
    send(Signal::User2);
    println!("\nfirst {}", std::process::id());
    let argv = strings(&["again", "--exact", PARTS_TEST, "--nocapture"]);
    let envp = environment(&carried.as_raw_fd().to_string());
    panic!("{}", image::replace(&own_program(), &argv, &envp, &[carried.as_fd()]));
}

fn second_image(number: i32) {
    let taken = image::take_carried(number).unwrap();
    assert_eq!(memfd::read(taken.as_fd()).unwrap(), SNAPSHOT);
    assert!(is_close_on_exec(taken.as_fd()));
    let again = image::take_carried(number).unwrap_err();
    assert_eq!(again.kind(), std::io::ErrorKind::AlreadyExists, "{again}");
    let names = std::fs::read_dir("/proc/self/fd").unwrap();
    let targets: Vec<_> = names.filter_map(|name| std::fs::read_link(name.unwrap().path()).ok()).collect();
    let has = |name: &str| targets.iter().any(|target| target.to_string_lossy().contains(name));
    assert!(has("memfd:snapshot") && !has("memfd:left"), "{targets:?}");

    let mut pipe = SignalPipe::new().unwrap();
    pipe.watch_children().unwrap();
    assert_eq!(pipe.read(), [], "held until the handlers are there");
    signals::reset_inherited().unwrap();
    assert_eq!(wait_for_signals(&pipe), [Signal::Child, Signal::Hangup, Signal::User2]);
    println!("\nsecond {}", std::process::id());
}

#[test]
fn a_reexec_keeps_pid_descriptors_and_signals() {
    with(&[], || {
        let told = play("first");
        let pid = |image| told.lines().find_map(|line: &str| line.strip_prefix(image)).map(str::trim);
        assert!(pid("second ").is_some() && pid("first ") == pid("second "), "{told}");
    });
}

fn failing_image() {
    let pipe = SignalPipe::new().unwrap();
    signals::reset_inherited().unwrap();
    let scratch = Scratch::new("image");
    let path = scratch.install("program", b"not a program");
    let pinned = PinnedExecutable::open(&path).unwrap();
    let carried = memfd::sealed("snapshot", SNAPSHOT).unwrap();
    let argv = strings(&["program"]);
    let replace = || image::replace(&pinned, &argv, &[], &[carried.as_fd()]);
    let before = SigSet::thread_get_mask().unwrap();

    assert_eq!(replace().raw_os_error(), Some(libc::ENOEXEC));
    assert!(is_close_on_exec(carried.as_fd()));
    assert_eq!(SigSet::thread_get_mask().unwrap(), before);

    // What was held is back once it is clear that there is no next image.
    send(Signal::Hangup);
    pipe.hold().unwrap();
    assert_eq!(pipe.read(), []);
    scratch.install("program", b"#!/bin/sh\necho another one\n");
    let error = replace();
    assert!(error.to_string().contains("has changed since it was opened"), "{error}");
    assert!(is_close_on_exec(carried.as_fd()));
    pipe.release().unwrap();
    assert_eq!(wait_for_signals(&pipe), [Signal::Hangup]);
    println!("\nstill here");
}

#[test]
fn a_failed_exec_leaves_everything_as_it_was() {
    with(&[], || assert!(play("failing").contains("\nstill here\n")));
}

#[test]
fn a_descriptor_of_nobody_is_taken_once() {
    with(&[], || {
        let file = std::fs::File::open("/dev/null").unwrap();
        // SAFETY: the copy has no owner, as if it had come through exec.
        let number = unsafe { libc::dup(file.as_raw_fd()) };
        let taken = image::take_carried(number).unwrap();
        assert_eq!(taken.as_raw_fd(), number);
        assert!(is_close_on_exec(taken.as_fd()));
        assert_eq!(image::take_carried(number).unwrap_err().kind(), std::io::ErrorKind::AlreadyExists);
        drop(taken);
        assert_eq!(image::take_carried(number).unwrap_err().raw_os_error(), Some(libc::EBADF));
    });
}
