//! Masters and others that are killed: processes of their own, which play what they are told.

use std::collections::BTreeSet;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::process::CommandExt;
use std::path::Path;
use std::process::{Child, Command, Stdio};

use rustix::net::SocketAddrUnix;
use rustix::process::{Resource, Rlimit, Uid};

use super::program::{FetchError, fetch};
use super::{hear, inherit, is_readable, pidfd_of, say, seqpacket, settle, socket_in, start, text_of, thing};
use crate::support::PATIENCE;
use crate::support::world::world;

/// How a process of its own is told what to play, and where.
const PLAY: &str = "REUSEPORTD_TEST_KEEPER_PLAY";
const PLAY_AT: &str = "REUSEPORTD_TEST_KEEPER_SOCKET";
/// Descriptors the played master holds at a time.
const WINDOW: usize = 150;
/// Of which so many are others with each snapshot.
const STEP: usize = 100;

/// Starts this very test program again, for [`a_play`] only, with the command line of a keeper.
fn play(what: &str, socket: &Path) -> Child {
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.arg0("reuseportd").args(["keeper", "keeper::plays::a_play", "--exact", "--nocapture"]);
    command.env(PLAY, what).env(PLAY_AT, socket).stdout(Stdio::piped()).spawn().unwrap()
}

/// No test unless one of the others starts it.
#[test]
fn a_play() {
    let (Ok(what), Ok(socket)) = (std::env::var(PLAY), std::env::var(PLAY_AT)) else { return };
    match what.as_str() {
        "a busy master" => play_busy_master(&socket),
        "a greedy master" => play_greedy_master(&socket),
        "a hasty master" => play_hasty_master(&socket),
        nonsense => play_impostor(&socket, nonsense),
    }
}

fn play_impostor(path: &str, nonsense: &str) {
    let listener = seqpacket();
    rustix::net::bind(&listener, &SocketAddrUnix::new(path).unwrap()).unwrap();
    rustix::net::listen(&listener, 1).unwrap();
    println!("listening");
    let connection = rustix::net::accept(&listener).unwrap();
    assert_eq!(hear(&connection), "fetch");
    say(&connection, nonsense, &[]);
    hear(&connection);
}

fn play_greedy_master(path: &str) {
    let few = Rlimit { current: Some(300), maximum: Some(300) };
    rustix::process::setrlimit(Resource::Nofile, few).unwrap();
    let mut keeper = start(Path::new(path));
    // As many as it has room for.
    let (one, mut all) = (thing("one"), Vec::new());
    for name in (0..200).map(|n| format!("n/{n}")) {
        all.push((name, one.as_fd()));
    }
    let names = |all: &[(String, BorrowedFd<'_>)]| all.iter().map(|(name, _)| name.clone()).collect();
    keeper.update(&names(&all), &all).unwrap();
    settle(&mut keeper);
    assert!(keeper.is_alive());
    all.extend((200..500).map(|n| (format!("n/{n}"), one.as_fd())));
    let updated = keeper.update(&names(&all), &all);
    assert!(
        updated.is_err() || is_readable(keeper.fd(), PATIENCE) && !keeper.is_alive(),
        "it takes more than it can hold"
    );
    keeper.end();
}

fn play_hasty_master(path: &str) {
    let mut keeper = start(Path::new(path));
    let few = Rlimit { current: Some(64), ..rustix::process::getrlimit(Resource::Nofile) };
    rustix::process::setrlimit(Resource::Nofile, few).unwrap();
    // For root there is no limit of what is under way.
    let nobody = Uid::from_raw(65534);
    let _ = rustix::thread::set_thread_res_uid(nobody, nobody, nobody);
    let one = thing("one");
    let all: Vec<_> = (0..1000).map(|n| (format!("n/{n}"), one.as_fd())).collect();
    keeper.update(&all.iter().map(|(name, _)| name.clone()).collect(), &all).unwrap();
    settle(&mut keeper);
    assert!(keeper.is_alive());
}

fn play_busy_master(path: &str) {
    let mut keeper = start(Path::new(path));
    // It lives as long as the test that plays, whatever becomes of this process.
    let parent = pidfd_of(std::os::unix::process::parent_id().cast_signed());
    for first in (0..).step_by(STEP) {
        let window: Vec<_> = (first..first + WINDOW).map(|n| format!("thing/{n}")).collect();
        let fresh = window.iter().filter(|name| !keeper.held().contains(*name));
        let fresh: Vec<_> = fresh.map(|name| (name.clone(), thing(name))).collect();
        let mut fresh: Vec<_> = fresh.iter().map(|(name, fd)| (name.clone(), fd.as_fd())).collect();
        let mut all: BTreeSet<String> = window.into_iter().collect();
        all.insert("pidfd/test".to_owned());
        if first == 0 {
            fresh.push(("pidfd/test".to_owned(), parent.as_fd()));
        }
        keeper.update(&all, &fresh).unwrap();
        keeper.save(thing(&first.to_string()).as_fd()).unwrap();
        println!("from {first}");
    }
}

#[test]
fn a_master_killed_in_the_middle_leaves_all_that_its_snapshot_names() {
    world(&[], |world| {
        for round in 0..12 {
            let socket = world.path(&format!("{round}.sock"));
            let mut master = play("a busy master", &socket);
            let mut lines = BufReader::new(master.stdout.take().unwrap()).lines();
            // It runs ahead of what is read here: where it is killed is chance.
            let turns = lines.by_ref().filter(|line| line.as_ref().unwrap().starts_with("from "));
            assert_eq!(turns.take(1 + round * 5).count(), 1 + round * 5);
            master.kill().unwrap();
            let inherited = inherit(&socket);
            let first: usize = String::from_utf8(inherited.state.clone()).unwrap().parse().unwrap();
            for n in first..first + WINDOW {
                let name = format!("thing/{n}");
                assert_eq!(inherited.fds.get(&name).map(text_of), Some(name), "the snapshot is from {first}");
            }
            // What the one before named, or the one after would have, may be there as well.
            assert!(inherited.fds.len() <= 1 + WINDOW + STEP, "{} from {first}", inherited.fds.len());
            inherited.keeper.dismiss();
            master.wait().unwrap();
        }
    });
}

#[test]
fn more_than_may_be_under_way_arrives_all_the_same() {
    world(&[], |world| {
        let mut master = play("a hasty master", &socket_in(world));
        let output = std::io::read_to_string(master.stdout.take().unwrap()).unwrap();
        assert!(master.wait().unwrap().success(), "{output}");
    });
}

#[test]
fn more_than_it_has_room_for_is_refused_and_told() {
    world(&[], |world| {
        let mut master = play("a greedy master", &socket_in(world));
        let output = std::io::read_to_string(master.stdout.take().unwrap()).unwrap();
        assert!(master.wait().unwrap().success(), "{output}");
    });
}

#[test]
fn one_that_talks_nonsense_is_ended() {
    world(&[], |world| {
        for (number, nonsense) in
            ["state 2", "held a", "end", "unknown fetch", "busy!"].into_iter().enumerate()
        {
            let path = world.path(&format!("{number}.sock"));
            let mut impostor = play(nonsense, &path);
            let mut lines = BufReader::new(impostor.stdout.take().unwrap()).lines();
            assert!(lines.any(|line| line.unwrap().ends_with("listening")));
            let refused = fetch(&path).unwrap_err();
            assert!(
                matches!(&refused, FetchError::NotUnderstood { what, is_ended: true, .. } if what.contains(nonsense)),
                "{refused}"
            );
            let _ = impostor.wait();
        }
    });
}
