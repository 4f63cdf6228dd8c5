//! The keeper, with the real program behind the master's own code for it. Where a test drops a [`Keeper`] the keeper
//! sees what it sees when its master is killed.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use reuseportd_sys::{memfd, pidfd, procfs, socket};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use self::program::{FetchError, Inheritance, Keeper, fetch};
use crate::support::PATIENCE;
use crate::support::master::REUSEPORTD;
use crate::support::process::Running;
use crate::support::world::{World, world};

#[allow(dead_code, unused_imports, reason = "the keeper's own part runs in the program under test")]
#[path = "../src/keeper/mod.rs"]
pub(crate) mod program;

mod logs;
mod plays;
mod strangers;

/// What is not waited for by name is over long before, even on a loaded machine.
const LONG: Duration = Duration::from_secs(10);

fn socket_in(world: &World) -> PathBuf {
    world.path("control.sock.keeper")
}

fn start(socket: &Path) -> Keeper {
    Keeper::start_from(Path::new(REUSEPORTD), socket, "test").unwrap()
}

/// A descriptor that is known by its text.
fn thing(text: &str) -> OwnedFd {
    memfd::sealed("thing", text.as_bytes()).unwrap()
}

fn text_of(fd: &OwnedFd) -> String {
    String::from_utf8(memfd::read(fd.as_fd()).unwrap()).unwrap()
}

/// Has the keeper hold these too.
fn hold(keeper: &mut Keeper, new: &[(&str, BorrowedFd<'_>)]) {
    let new: Vec<_> = new.iter().map(|(name, fd)| ((*name).to_owned(), *fd)).collect();
    let names = keeper.held().iter().cloned().chain(new.iter().map(|(name, _)| name.clone())).collect();
    keeper.update(&names, &new).unwrap();
}

/// Returns when the keeper has done all it was told.
fn settle(keeper: &mut Keeper) {
    let sentinel = thing("sentinel");
    hold(keeper, &[("sentinel", sentinel.as_fd())]);
    keeper.release("sentinel").unwrap();
}

fn inherit(socket: &Path) -> Inheritance {
    fetch(socket).unwrap().expect("a keeper is there")
}

fn names(inherited: &Inheritance) -> Vec<&str> {
    inherited.fds.keys().map(String::as_str).collect()
}

/// A process that does nothing, until the end of the test.
struct Sleeper(Child);

impl Sleeper {
    fn start() -> Sleeper {
        Sleeper(Command::new("sleep").arg("1000").spawn().unwrap())
    }

    fn pidfd(&self) -> OwnedFd {
        pidfd_of(self.0.id().cast_signed())
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

fn pidfd_of(pid: i32) -> OwnedFd {
    pidfd::open(pid).unwrap()
}

fn is_readable(fd: impl AsFd, patience: Duration) -> bool {
    poll(&mut [PollFd::new(&fd, PollFlags::IN)], Some(&Timespec::try_from(patience).unwrap())).unwrap() > 0
}

/// Waits for the end of a keeper nobody speaks to any more.
fn wait_end(process: &OwnedFd) {
    assert!(is_readable(process, PATIENCE), "the keeper goes on");
    assert_eq!(pidfd::reap(process.as_fd()).unwrap(), Some(pidfd::Exit::Code(0)));
}

/// A connection as the next master makes it.
fn knock(socket: &Path) -> OwnedFd {
    let connection = seqpacket();
    rustix::net::connect(&connection, &SocketAddrUnix::new(socket).unwrap()).unwrap();
    connection
}

fn seqpacket() -> OwnedFd {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None).unwrap()
}

fn say(to: impl AsFd, words: &str, fds: &[BorrowedFd<'_>]) {
    socket::send_with_fds(to.as_fd(), words.as_bytes(), fds).unwrap();
}

/// The next thing said; empty when the other end is closed.
fn hear(from: impl AsFd) -> String {
    assert!(is_readable(from.as_fd(), PATIENCE), "nothing is said");
    let mut buffer = [0; 10_000];
    let received = socket::recv_with_fds(from.as_fd(), &mut buffer).unwrap();
    String::from_utf8(buffer[..received.bytes].to_vec()).unwrap()
}

#[test]
fn what_it_holds_outlives_its_master() {
    world(&[], |world| {
        let socket = socket_in(world);
        assert!(fetch(&socket).unwrap().is_none(), "there was none yet");
        let mut keeper = start(&socket);
        let worker = Sleeper::start();
        let (a, b) = (thing("a"), thing("b"));
        hold(&mut keeper, &[("thing/a", a.as_fd()), ("pidfd/1", worker.pidfd().as_fd()), ("b", b.as_fd())]);
        keeper.save(thing("first").as_fd()).unwrap();
        keeper.save(thing("second").as_fd()).unwrap();
        // Not dropped before there is a snapshot that does without it.
        keeper.update(&["thing/a", "pidfd/1"].map(str::to_owned).into(), &[]).unwrap();
        drop(keeper);

        let mut inherited = inherit(&socket);
        assert_eq!(inherited.state, b"second");
        assert_eq!(names(&inherited), ["b", "pidfd/1", "thing/a"]);
        assert_eq!(text_of(&inherited.fds["thing/a"]), "a");
        pidfd::send_signal(inherited.fds["pidfd/1"].as_fd(), 0).expect_err("0 is no signal here");
        assert!(!is_readable(&inherited.fds["pidfd/1"], Duration::ZERO), "the worker lives");

        // It serves this master as the one before, and the next.
        let keeper = &mut inherited.keeper;
        assert!(keeper.is_alive());
        keeper.update(&["thing/a", "pidfd/1"].map(str::to_owned).into(), &[]).unwrap();
        keeper.save(thing("third").as_fd()).unwrap();
        assert_eq!(keeper.held().len(), 2);
        drop(inherited);
        let inherited = inherit(&socket);
        assert_eq!(
            (inherited.state.as_slice(), names(&inherited)),
            (&b"third"[..], vec!["pidfd/1", "thing/a"])
        );
        let process = pidfd_of(inherited.keeper.pid());
        inherited.keeper.dismiss();
        assert!(is_readable(&process, Duration::ZERO), "dismissed is gone");
        assert!(fetch(&socket).unwrap().is_none(), "a socket alone is no keeper");
    });
}

#[test]
fn released_is_closed() {
    world(&[], |world| {
        let mut keeper = start(&socket_in(world));
        let listener = TcpListener::bind(world.address).unwrap();
        hold(&mut keeper, &[("listener/1", listener.as_fd())]);
        settle(&mut keeper);
        drop(listener);
        TcpStream::connect(world.address).expect("the keeper holds the listener");
        keeper.release("listener/1").unwrap();
        let refused = TcpStream::connect(world.address).unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "it was not closed yet");
        keeper.release("listener/1").expect("what is not held is released at once");

        // The end closes just as well.
        let listener = TcpListener::bind(world.address).unwrap();
        hold(&mut keeper, &[("listener/2", listener.as_fd())]);
        drop(listener);
        keeper.end();
        assert_eq!(TcpStream::connect(world.address).unwrap_err().kind(), ErrorKind::ConnectionRefused);
    });
}

#[test]
fn a_thousand_descriptors_are_held() {
    world(&[], |world| {
        let socket = socket_in(world);
        let mut keeper = start(&socket);
        let worker = Sleeper::start();
        let things: Vec<_> = (0..1000).map(|n| (format!("thing/{n}"), thing(&n.to_string()))).collect();
        let all: Vec<_> = things.iter().map(|(name, fd)| (name.as_str(), fd.as_fd())).collect();
        hold(&mut keeper, &[("pidfd/1", worker.pidfd().as_fd())]);
        hold(&mut keeper, &all);
        settle(&mut keeper);
        let status = fs::read_to_string(format!("/proc/{}/status", keeper.pid())).unwrap();
        let anonymous = status.lines().find_map(|line| line.strip_prefix("RssAnon:")).unwrap();
        let anonymous: u32 = anonymous.trim().trim_end_matches(" kB").parse().unwrap();
        assert!(anonymous < 1024, "{anonymous} KiB for 1000 descriptors");
        drop(keeper);
        let inherited = inherit(&socket);
        assert_eq!(inherited.fds.len(), 1001);
        assert!(things.iter().all(|(name, fd)| text_of(&inherited.fds[name]) == text_of(fd)));
        inherited.keeper.dismiss();
    });
}

#[test]
fn it_ends_with_the_last_worker_and_not_before() {
    world(&[], |world| {
        let socket = socket_in(world);
        let mut keeper = start(&socket);
        let process = pidfd_of(keeper.pid());
        let workers = [Sleeper::start(), Sleeper::start()];
        hold(
            &mut keeper,
            &[("pidfd/1", workers[0].pidfd().as_fd()), ("pidfd/2", workers[1].pidfd().as_fd())],
        );
        let [first, second] = workers;
        drop(first);
        drop(keeper);
        let inherited = inherit(&socket);
        assert!(is_readable(&inherited.fds["pidfd/1"], Duration::ZERO), "the next master sees who has ended");
        drop(second);
        settle(&mut { inherited.keeper });
        wait_end(&process);
    });
}

#[test]
fn without_anything_to_keep_it_ends_with_its_master() {
    world(&[], |world| {
        let mut keeper = start(&socket_in(world));
        let process = pidfd_of(keeper.pid());
        hold(&mut keeper, &[("thing", thing("no process").as_fd())]);
        settle(&mut keeper);
        assert!(!is_readable(&process, Duration::ZERO));
        drop(keeper);
        wait_end(&process);
    });
}

#[test]
fn no_signal_ends_it_that_is_meant_for_others() {
    world(&[], |world| {
        let mut keeper = start(&socket_in(world));
        settle(&mut keeper);
        let process = pidfd_of(keeper.pid());
        use rustix::process::Signal as S;
        for signal in
            [S::TERM, S::INT, S::HUP, S::QUIT, S::USR1, S::USR2, S::TSTP, S::TTIN, S::PIPE, S::ALARM]
        {
            pidfd::send_signal(process.as_fd(), signal.as_raw()).unwrap();
        }
        settle(&mut keeper);
        assert!(keeper.is_alive());
        let own = procfs::process(keeper.pid()).unwrap();
        assert_eq!(own.group, own.pid, "a group of its own: what is sent to the master's does not reach it");
        let command = fs::read(format!("/proc/{}/cmdline", keeper.pid())).unwrap();
        assert_eq!(command, b"reuseportd\0keeper\0--app\0test\0");
        keeper.dismiss();
        assert!(is_readable(&process, Duration::ZERO));
    });
}

#[test]
fn a_second_master_waits_for_the_end_of_the_first() {
    world(&[], |world| {
        let socket = socket_in(world);
        let mut keeper = start(&socket);
        let worker = Sleeper::start();
        hold(&mut keeper, &[("pidfd/1", worker.pidfd().as_fd())]);
        let began = Instant::now();
        let refused = fetch(&socket).unwrap_err();
        assert!(matches!(refused, FetchError::Busy(_)), "{refused}");
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
        assert!(keeper.is_alive());

        let (silent, next, leaving) = (knock(&socket), knock(&socket), knock(&socket));
        say(&leaving, "fetch", &[]);
        assert_eq!(hear(&leaving), "busy");
        say(&next, "fetch with words of a later version", &[]);
        assert_eq!(hear(&next), "busy");
        drop(leaving);
        drop(keeper);
        assert_eq!(hear(&next), "state 1");
        assert_eq!(hear(&next), "held pidfd/1");
        assert_eq!(hear(&next), "end");
        // Who does not wait for an answer is answered too.
        say(&silent, "what is this?", &[]);
        assert_eq!(hear(&silent), "unknown what");
        say(&next, "leave", &[]);
        assert_eq!(hear(&next), "", "it has ended");
    });
}

#[test]
fn what_it_does_not_understand_changes_nothing() {
    world(&[], |world| {
        let mut keeper = start(&socket_in(world));
        let a = thing("a");
        hold(&mut keeper, &[("a", a.as_fd())]);
        say(keeper.fd(), "juggle a b c", &[]);
        assert_eq!(hear(keeper.fd()), "unknown juggle");
        say(keeper.fd(), "juggle", &[a.as_fd()]);
        assert!(is_readable(keeper.fd(), PATIENCE));
        assert!(keeper.is_alive(), "it is only of another version");
        for (words, fds, answer) in [
            ("hold b c", vec![a.as_fd()], "failed hold 2 names for 1 descriptors"),
            ("hold b\n", vec![a.as_fd()], "failed hold 1 names for 1 descriptors"),
            ("hold", vec![a.as_fd()], "failed hold 0 names for 1 descriptors"),
            ("state", vec![], "failed state without a descriptor"),
            ("release", vec![], "unknown release"),
        ] {
            say(keeper.fd(), words, &fds);
            assert_eq!(hear(keeper.fd()), answer);
        }
        say(keeper.fd(), &"x".repeat(9000), &[]);
        assert!(hear(keeper.fd()).starts_with("failed ? a datagram with more bytes"));
        settle(&mut keeper);
        say(keeper.fd(), "hold b", &[]);
        assert!(is_readable(keeper.fd(), PATIENCE));
        assert!(!keeper.is_alive(), "it can't do what it was told: it is to be replaced");
        keeper.end();
    });
}

#[test]
fn the_last_words_of_a_master_are_heard_whatever_it_left_unread() {
    world(&[], |world| {
        let socket = socket_in(world);
        let mut keeper = start(&socket);
        let worker = Sleeper::start();
        let process = pidfd_of(keeper.pid());
        hold(&mut keeper, &[("pidfd/1", worker.pidfd().as_fd())]);
        settle(&mut keeper);
        say(keeper.fd(), "juggle", &[]);
        assert!(is_readable(keeper.fd(), PATIENCE));
        // What is said now waits until it goes on, and by then its master has left.
        pidfd::send_signal(process.as_fd(), nix::libc::SIGSTOP).unwrap();
        hold(&mut keeper, &[("last", thing("word").as_fd())]);
        keeper.save(thing("state").as_fd()).unwrap();
        drop(keeper);
        pidfd::send_signal(process.as_fd(), nix::libc::SIGCONT).unwrap();
        let inherited = inherit(&socket);
        assert_eq!((names(&inherited), inherited.state.as_slice()), (vec!["last", "pidfd/1"], &b"state"[..]));
        inherited.keeper.dismiss();
    });
}

#[test]
fn names_are_refused_before_anything_is_sent() {
    world(&[], |world| {
        let mut keeper = start(&socket_in(world));
        let a = thing("a");
        let mut update = |name: &str, fds: &[(String, BorrowedFd<'_>)]| {
            let names = BTreeSet::from([name.to_owned(), "fine".to_owned()]);
            keeper.update(&names, fds).map_err(|error| error.kind())
        };
        for odd in ["", "a b", "a\n", "\0", "ä", &"x".repeat(121)] {
            let fds = [("fine".to_owned(), a.as_fd()), (odd.to_owned(), a.as_fd())];
            assert_eq!(update(odd, &fds), Err(ErrorKind::InvalidInput), "{odd:?}");
        }
        let fds = [("fine".to_owned(), a.as_fd())];
        assert_eq!(update("missing", &fds), Err(ErrorKind::InvalidInput));
        assert!(keeper.held().is_empty());
        keeper.dismiss();
    });
}

#[test]
fn nobody_waits_for_one_that_is_stopped() {
    world(&[], |world| {
        let socket = socket_in(world);
        let worker = Sleeper::start();
        let stopped = || {
            let mut keeper = start(&socket);
            hold(&mut keeper, &[("a", thing("a").as_fd()), ("pidfd/1", worker.pidfd().as_fd())]);
            settle(&mut keeper);
            let process = pidfd_of(keeper.pid());
            pidfd::send_signal(process.as_fd(), nix::libc::SIGSTOP).unwrap();
            (keeper, process)
        };
        let (mut keeper, process) = stopped();
        let began = Instant::now();
        assert_eq!(keeper.release("a").unwrap_err().kind(), ErrorKind::TimedOut);
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
        // Messages fit until its buffer is full; then they don't, and that is not waited for either.
        let began = Instant::now();
        let snapshot = thing("state");
        let full = (0..100_000).find_map(|_| keeper.save(snapshot.as_fd()).err());
        assert_eq!(full.expect("it has no end of room").kind(), ErrorKind::TimedOut);
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
        let began = Instant::now();
        keeper.dismiss();
        assert!(is_readable(&process, Duration::ZERO) && began.elapsed() < LONG, "{:?}", began.elapsed());

        let (keeper, process) = stopped();
        drop(keeper);
        let began = Instant::now();
        let refused = fetch(&socket).unwrap_err();
        assert!(matches!(refused, FetchError::Silent { is_ended: true, .. }), "{refused}");
        assert!(is_readable(&process, Duration::ZERO), "it holds nothing any more");
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
        assert!(fetch(&socket).unwrap().is_none());
    });
}

#[test]
fn it_is_carried_over_an_exec_of_its_master() {
    world(&[], |world| {
        let mut keeper = start(&socket_in(world));
        hold(&mut keeper, &[("a", thing("a").as_fd())]);
        let (fds, saved) = keeper.parts();
        let fds = fds.map(|fd| fd.try_clone_to_owned().unwrap());
        let saved = serde_json::from_str(&serde_json::to_string(&saved).unwrap()).unwrap();
        drop(keeper);
        let mut keeper = Keeper::join(fds, saved);
        assert_eq!(keeper.held().iter().collect::<Vec<_>>(), ["a"]);
        keeper.release("a").unwrap();
        let process = pidfd_of(keeper.pid());
        keeper.dismiss();
        assert!(is_readable(&process, Duration::ZERO));
    });
}

#[test]
fn it_starts_from_a_program_that_was_removed() {
    world(&[], |world| {
        let copy = world.path("reuseportd");
        fs::copy(REUSEPORTD, &copy).unwrap();
        let first = Keeper::start_from(&copy, &socket_in(world), "test").unwrap();
        fs::remove_file(&copy).unwrap();
        let running = format!("/proc/{}/exe", first.pid());
        let mut second = Keeper::start_from(Path::new(&running), &world.path("second.sock"), "test").unwrap();
        settle(&mut second);
        second.dismiss();
        first.dismiss();
        let began = Instant::now();
        let another = Keeper::start_from(Path::new("/bin/true"), &socket_in(world), "test").unwrap_err();
        assert!(another.to_string().ends_with("the keeper has ended"), "{another}");
        assert!(began.elapsed() < LONG, "{:?}", began.elapsed());
        let missing = Keeper::start_from(&copy, &socket_in(world), "test").unwrap_err();
        assert!(missing.to_string().starts_with("cannot start a keeper at "), "{missing}");
    });
}

#[test]
fn nobody_starts_one_by_hand() {
    for arguments in [&["keeper"][..], &["keeper", "--app", "web"]] {
        let mut command = Command::new(REUSEPORTD);
        command.args(arguments);
        let done = Running::start(command).finish(PATIENCE);
        assert_eq!(done.code, 2);
        assert!(done.stderr.contains("can't be started by hand"), "{}", done.stderr);
    }
    let mut command = Command::new(REUSEPORTD);
    command.arg("--help");
    assert!(!Running::start(command).finish(PATIENCE).stdout.contains("keeper"));
}
