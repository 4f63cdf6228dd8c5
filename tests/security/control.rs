//! Who may speak to the control socket.

use std::io::{Read, Write};
use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixStream;
use std::thread;

use rustix::process::Uid;

use super::{STRANGER, as_user};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::Master;
use crate::support::process::{Done, Running};
use crate::support::world::{Need, World, world};

/// One that `allow_users` names.
const FRIEND: u32 = 61_237;

/// Everything there is to ask.
const WISHES: [&str; 11] = [
    "status",
    "status --json",
    "status --receipts",
    "sockets",
    "upgrade --wait",
    "upgrade --force",
    "rollback --wait",
    "scale 3 --wait",
    "restart-worker 0 --wait",
    "reexec",
    "stop",
];

fn ask(world: &World, app: &App, uid: u32, words: &str) -> Done {
    let mut command = as_user(world, uid);
    command.args(words.split(' ')).arg("--config").arg(&app.path);
    Running::start(command).finish(PATIENCE)
}

/// What a request could have changed.
fn state(master: &Master) -> String {
    let status = master.status();
    let left = (status.generations.len(), status.last_upgrade, status.master.reexecs, status.master.pid);
    format!("{:?} {left:?}", master.serving())
}

#[test]
fn a_foreign_user_is_refused_whatever_it_asks() {
    world(&[Need::Root], |world| {
        for (allowed, mode) in [("", 0o600), ("allow_users = [61237]", 0o666)] {
            let mut app = App::test_worker(world, "--mode plain").workers(2);
            app.control = vec![allowed.into()];
            let master = Master::start(world, &app);
            assert_eq!(world.path("run/control.sock").metadata().unwrap().mode() & 0o777, mode);
            let before = state(&master);
            for wish in WISHES {
                let done = ask(world, &app, STRANGER, wish);
                // This one shows what the kernel shows to everybody, and says what it could not ask.
                if wish == "sockets" {
                    let words = done.stdout.split_whitespace().collect::<Vec<_>>().join(" ");
                    assert!(words.contains("only root, the master's"), "{done:#?}");
                } else {
                    done.refused(&["only root, the master's", "control.allow_users"]);
                }
                assert_eq!(state(&master), before, "{wish}");
            }
            if !allowed.is_empty() {
                assert_eq!(ask(world, &app, FRIEND, "status").code, 0);
                assert_eq!(ask(world, &app, FRIEND, "restart-worker 0 --wait").code, 0);
                assert_ne!(state(&master), before);
                let log = master.log();
                assert!(log.contains("turned away: not allowed") && log.contains("uid=61236"), "{log}");
            }
            master.stop();
        }
    });
}

/// As many connections of a user's as there may be clients, and more.
fn crowd(world: &World, uid: u32) -> Vec<UnixStream> {
    let path = world.path("run/control.sock");
    let connect = move || {
        let uid = Uid::from_raw(uid);
        rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
        (0..300).map(|_| UnixStream::connect(&path).unwrap()).collect()
    };
    thread::spawn(connect).join().unwrap()
}

#[test]
fn strangers_do_not_take_the_places_of_others() {
    world(&[Need::Root], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        app.control = vec!["allow_users = [61237]".into()];
        let master = Master::start(world, &app);
        let before = super::descriptors(master.pid());
        let friend = crowd(world, FRIEND).pop().unwrap();
        let strangers = crowd(world, STRANGER);
        for mut stranger in strangers {
            let mut said = String::new();
            stranger.read_to_string(&mut said).unwrap();
            assert!(said.contains("not allowed"), "{said}");
        }
        // The last of the friend's connections is one of those that have a place.
        (&friend).write_all(b"{\"command\":\"status\"}\n").unwrap();
        let mut said = String::new();
        (&friend).read_to_string(&mut said).unwrap();
        assert!(said.starts_with("{\"reply\":\"status\""), "{said}");
        master.upgrade();
        // Ten at most of so many are told of.
        let told = master.log().matches("client_turned_away").count();
        assert!((1..=20).contains(&told), "{told} times\n{}", master.log());
        assert!(super::descriptors(master.pid()) <= before + 300);
        master.stop();
    });
}
