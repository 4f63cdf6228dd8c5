//! Files and sockets as another user, with the capabilities of the shipped unit.

use std::os::fd::AsFd;
use std::path::Path;
use std::process::Command;

use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::identity::{Groups, Identity, as_user, or_as_user};
use reuseportd_sys::{pidfd, pipe, procfs, socket};
use rustix::process::{DumpableBehavior, Gid, Signal, Uid};
use rustix::process::{
    dumpable_behavior, parent_process_death_signal, set_dumpable_behavior, set_parent_process_death_signal,
};
use rustix::thread::{CapabilitySet, CapabilitySets, capabilities, set_capabilities};

use crate::process::{Around, SHELL, start, wait_for_end};
use crate::world::*;

/// No account: nobody else here.
const UID: u32 = 61_237;
const ALONE: &str = "REUSEPORTD_TEST_ALONE";

fn other() -> Option<Uid> {
    Some(Uid::from_raw(UID))
}

/// This thread can no longer do what files' modes and owners forbid.
fn give_up_file_capabilities() -> CapabilitySets {
    let given_up = CapabilitySet::CHOWN
        | CapabilitySet::FOWNER
        | CapabilitySet::DAC_OVERRIDE
        | CapabilitySet::DAC_READ_SEARCH;
    let had = capabilities(None).unwrap();
    let kept = CapabilitySets {
        effective: had.effective - given_up,
        permitted: had.permitted - given_up,
        inheritable: had.inheritable - given_up,
    };
    set_capabilities(None, kept).unwrap();
    kept
}

fn owner(fd: impl AsFd) -> u32 {
    rustix::fs::fstat(fd).unwrap().st_uid
}

/// Whether the process is dumpable is for all its threads: this needs a process without other tests.
#[test]
fn what_is_made_as_another_user_is_theirs_and_nothing_else_changes() {
    with(&[Need::Network], || {
        if std::env::var_os(ALONE).is_none() {
            let name = "users::what_is_made_as_another_user_is_theirs_and_nothing_else_changes";
            let mut alone = Command::new(std::env::current_exe().unwrap());
            let output = alone.args(["--exact", name, "--nocapture"]).env(ALONE, "1").output().unwrap();
            return assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        // Laid down, but not given up: coming back must not take it up.
        let mut sets = capabilities(None).unwrap();
        sets.effective -= CapabilitySet::FSETID;
        set_capabilities(None, sets).unwrap();
        set_parent_process_death_signal(Some(Signal::TERM)).unwrap();
        set_dumpable_behavior(DumpableBehavior::Dumpable).unwrap();
        let made = as_user(other(), || {
            assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::NotDumpable, "nothing to restore");
            (bound(V4.parse().unwrap()), pipe::log_pipe().unwrap())
        });
        assert_eq!([owner(&made.0), owner(&made.1.0), owner(&made.1.1)], [UID; 3]);
        assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::Dumpable);
        assert_eq!(parent_process_death_signal().unwrap(), Some(Signal::TERM));
        assert_eq!(capabilities(None).unwrap(), sets);
        for own in [None, Some(Uid::ROOT)] {
            as_user(own, || assert_eq!(dumpable_behavior().unwrap(), DumpableBehavior::Dumpable));
        }
        let panics = std::panic::catch_unwind(|| as_user(other(), || panic!("on purpose")));
        assert!(panics.is_err());
        assert_eq!(owner(bound(V4.parse().unwrap())), 0);
        // The kernel takes both for one user's.
        let theirs = socket::local_addr(made.0.as_fd()).unwrap();
        as_user(other(), || drop(bound(theirs)));
        let ours = std::panic::catch_unwind(|| bound(theirs));
        assert!(ours.is_err(), "a group belongs to one user");
    });
}

#[test]
fn what_only_another_user_may_look_at_is_seen_by_who_may_become_that_user() {
    with(&[Need::Network], || {
        give_up_file_capabilities();
        let listener = listening(V4.parse().unwrap());
        let (_reader, writer) = as_user(other(), pipe::log_pipe).unwrap();
        let sh = PinnedExecutable::open(Path::new(SHELL)).unwrap();
        let gid = Gid::from_raw(UID);
        let identity = Identity {
            uid: other(),
            groups: Some(Groups { gid, supplementary: vec![gid] }),
            ..Identity::default()
        };
        let fds = vec![(listener.as_fd(), 7), (writer.as_fd(), 8)];
        let around = Around { fds, identity, ..Around::default() };
        let (child, _output) = start(&sh, &["sh", "-c", "exec sleep 600"], &around).unwrap();
        let denied = |result: std::io::Result<()>| {
            assert_eq!(result.unwrap_err().kind(), std::io::ErrorKind::PermissionDenied);
        };
        denied(std::fs::read_dir(format!("/proc/{}/fd", child.pid)).map(drop));
        denied(std::fs::File::open(format!("/proc/{}/environ", child.pid)).map(drop));
        let inode = socket::inode(listener.as_fd()).unwrap();
        assert_eq!(procfs::socket_inodes(child.pid).unwrap(), [(7, inode)]);
        assert!(procfs::owns_socket(child.pid, 7, inode));
        // The shell adds its own to what `sleep` gets.
        let variables = procfs::environment(child.pid).unwrap();
        assert!(variables.contains(&("COLOUR".into(), "blue".into())), "{variables:?}");
        let end = pidfd::getfd(child.pidfd.as_fd(), 8).unwrap();
        rustix::io::write(&writer, b"read me").unwrap();
        let reader = pipe::reopen_reader(end.as_fd()).unwrap();
        let mut read = [0; 16];
        assert_eq!(rustix::io::read(&reader, &mut read), Ok(7));
        pidfd::send_signal(child.pidfd.as_fd(), libc::SIGKILL).unwrap();
        wait_for_end(child.pidfd.as_fd());
    });
}

#[test]
fn the_other_user_is_the_second_attempt() {
    with(&[Need::Network], || {
        give_up_file_capabilities();
        let who = || owner(bound(V4.parse().unwrap()));
        let only = |uid: u32| move || if who() == uid { Ok(uid) } else { Err(who()) };
        assert_eq!(or_as_user(other(), only(0)), Ok(0));
        assert_eq!(or_as_user(other(), only(UID)), Ok(UID));
        assert_eq!(or_as_user(other(), only(1)), Err(0), "of the first attempt");
        assert_eq!(or_as_user(None, only(1)), Err(0));
    });
}
