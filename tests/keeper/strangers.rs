//! What other users can do to a keeper, and in its place.

use std::fs;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::thread;

use rustix::net::SocketAddrUnix;
use rustix::process::Uid;

use super::program::{FetchError, fetch};
use super::{Sleeper, hold, inherit, seqpacket, settle, socket_in, start};
use crate::support::world::{Need, world};

/// A user that owns nothing.
const NOBODY: u32 = 65534;

#[test]
fn strangers_get_nothing_and_give_nothing() {
    world(&[Need::Root], |world| {
        let socket = socket_in(world);
        let mut keeper = start(&socket);
        let worker = Sleeper::start();
        hold(&mut keeper, &[("pidfd/1", worker.pidfd().as_fd())]);
        settle(&mut keeper);
        drop(keeper);
        assert_eq!(fs::metadata(&socket).unwrap().mode() & 0o777, 0o600);
        let as_nobody = |socket: PathBuf| {
            // The identity is the thread's, and ends with it.
            let stranger = thread::spawn(move || {
                let nobody = Uid::from_raw(NOBODY);
                rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
                fetch(&socket).unwrap_err()
            });
            stranger.join().unwrap()
        };
        let refused = as_nobody(socket.clone());
        assert!(matches!(refused, FetchError::Socket { .. }), "{refused}");
        fs::set_permissions(&socket, fs::Permissions::from_mode(0o666)).unwrap();
        let refused = as_nobody(socket.clone());
        assert!(matches!(refused, FetchError::CutOff(_)), "{refused}");

        let foreign = |path: &Path, why: &str| {
            let refused = fetch(path).unwrap_err();
            assert!(matches!(&refused, FetchError::Foreign { what, .. } if what.contains(why)), "{refused}");
        };
        chown(&socket, Some(NOBODY), None).unwrap();
        foreign(&socket, "belongs to user 65534");
        chown(&socket, Some(0), None).unwrap();
        inherit(&socket).keeper.dismiss();

        // Whoever calls listen() is shown to those who connect.
        let (path, listener) = (world.path("other.sock"), seqpacket());
        rustix::net::bind(&listener, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&listener, 1).unwrap();
        foreign(&path, "which is no keeper");
        let theirs = listener.try_clone().unwrap();
        let stranger = thread::spawn(move || {
            let nobody = Uid::from_raw(NOBODY);
            rustix::thread::set_thread_res_uid(nobody, nobody, nobody).unwrap();
            rustix::net::listen(&theirs, 1).unwrap();
        });
        stranger.join().unwrap();
        foreign(&path, "of user 65534 listens there");
        foreign(Path::new("/etc/passwd"), "no socket");
    });
}
