//! The runtime directory and what is in it: only what is ours is used, and what was put there is neither followed nor
//! written to.

use std::fs;
use std::os::unix::fs::{MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::Command;

use super::{STRANGER, memory_kib};
use crate::orphans::{kill_with_keeper, replaced};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::world::{Need, World, tool, world};

const SECRET: &str = "nobody may write here";

fn app(world: &World) -> App {
    App::test_worker(world, "--mode plain").workers(1)
}

/// A master that must not start, for a reason with these words.
fn refused(world: &World, app: &App, words: &[&str]) {
    let mut master = Master::launch(world, app, Command::new(REUSEPORTD));
    assert_eq!(master.wait_end(PATIENCE), Some(1), "{words:?}\n{}", master.log());
    let log = master.log();
    for word in words {
        assert!(log.contains(word), "{word:?} is not in\n{log}");
    }
    assert_eq!(crate::support::process::processes_of(&world.app), [], "a worker was started");
}

fn run(world: &World) -> PathBuf {
    let run = world.path("run");
    let _ = fs::remove_file(&run);
    let _ = fs::remove_dir_all(&run);
    fs::create_dir(&run).unwrap();
    fs::set_permissions(&run, fs::Permissions::from_mode(0o711)).unwrap();
    run
}

#[test]
fn a_directory_that_others_rule_is_refused() {
    world(&[Need::Root], |world| {
        let app = app(world);
        for mode in [0o777, 0o775, 0o722] {
            let own = run(world);
            fs::set_permissions(&own, fs::Permissions::from_mode(mode)).unwrap();
            refused(world, &app, &["others may write to it", "remove it", own.to_str().unwrap()]);
        }
        chown(run(world), Some(STRANGER), None).unwrap();
        refused(world, &app, &["it belongs to another user"]);
        let (own, elsewhere) = (run(world), world.path("elsewhere"));
        fs::rename(&own, &elsewhere).unwrap();
        symlink(&elsewhere, &own).unwrap();
        refused(world, &app, &["it is a symbolic link"]);
        assert_eq!(fs::read_dir(&elsewhere).unwrap().count(), 0);
        fs::remove_dir(run(world)).unwrap();
        fs::write(&own, "").unwrap();
        refused(world, &app, &["it is no directory"]);
    });
}

/// What can be put in a file's place: by this user, or by another one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Planted {
    Link,
    Pipe,
    File,
    Socket,
}

fn plant(world: &World, path: &Path, what: Planted, uid: u32) {
    let secret = world.path("secret");
    fs::write(&secret, SECRET).unwrap();
    match what {
        Planted::Link => symlink(&secret, path).unwrap(),
        Planted::Pipe => tool(&format!("mkfifo {}", path.display())),
        Planted::File => fs::write(path, SECRET).unwrap(),
        Planted::Socket => drop(UnixListener::bind(path).unwrap()),
    }
    std::os::unix::fs::lchown(path, Some(uid), None).unwrap();
}

/// With something planted there the master either does not start, and says what and where it is, or makes its own.
fn with_planted(world: &World, suffix: &str, what: Planted, uid: u32, is_refused: bool) {
    let run = run(world);
    let path = run.join(format!("control.sock{suffix}"));
    plant(world, &path, what, uid);
    let name = path.to_str().unwrap();
    if is_refused {
        refused(world, &app(world), &[name]);
    } else {
        let master = Master::start(world, &app(world));
        let now = fs::symlink_metadata(&path).ok();
        let is_replaced = now.is_none_or(|now| now.uid() == 0 && !now.is_symlink());
        // Where a keeper is made; without one the master goes on.
        let is_told = suffix == ".keep" && master.log().contains(&format!("cannot start a keeper at {name}"));
        assert!(is_replaced || is_told, "{name} {what:?}");
    }
    assert_eq!(world.read("secret"), SECRET, "{suffix} {what:?}");
}

#[test]
fn what_was_planted_is_neither_followed_nor_waited_for() {
    use Planted::{File, Link, Pipe, Socket};
    world(&[Need::Root], |world| {
        for uid in [0, STRANGER] {
            for (suffix, refused) in [
                ("", &[Link, Pipe, File][..]),
                (".notify", &[Link, Pipe, File]),
                (".lock", &[Link, Pipe, Socket]),
                (".keeper", &[]),
                (".keep", &[]),
                (".journal", &[]),
                (".journal.new", &[]),
            ] {
                let kinds = if uid == 0 { &[Link, Pipe, File, Socket][..] } else { &[Link, File] };
                for what in kinds.iter().copied() {
                    let is_foreign_lock = suffix == ".lock" && uid != 0;
                    with_planted(world, suffix, what, uid, is_foreign_lock || refused.contains(&what));
                }
            }
        }
    });
}

/// A next master that has only the journal to go by gets one that somebody has changed.
fn with_journal(world: &World, change: impl FnOnce(&Path), said: &str) {
    let mut master = Master::start(world, &app(world));
    let orphans = master.serving();
    kill_with_keeper(world, &mut master);
    change(&world.path("run/control.sock.journal"));
    // Its workers are known by their environment, too.
    replaced(&mut master, &orphans);
    assert!(master.log().contains(said), "{said:?} is not in\n{}", master.log());
    assert!(memory_kib(master.pid()) < 32 * 1024, "{} KiB", memory_kib(master.pid()));
    master.stop();
}

#[test]
fn a_journal_with_a_second_name_is_not_believed() {
    world(&[], |world| {
        let link = |journal: &Path| fs::hard_link(journal, world.path("other")).unwrap();
        with_journal(world, link, "it is a hard link to another file");
    });
}

#[test]
fn a_journal_of_a_gigabyte_is_not_read() {
    world(&[], |world| {
        let grow = |journal: &Path| {
            fs::File::options().write(true).open(journal).unwrap().set_len(1 << 30).unwrap();
        };
        with_journal(world, grow, "it is larger than 16 MiB");
    });
}

#[test]
fn a_foreign_link_to_a_cgroup_is_not_followed() {
    world(&[Need::Root, Need::Bpf], |world| {
        let theirs = world.path("theirs");
        fs::create_dir_all(theirs.join("below")).unwrap();
        let link = run(world).join("control.sock.cgroup");
        symlink(&theirs, &link).unwrap();
        std::os::unix::fs::lchown(&link, Some(STRANGER), None).unwrap();
        let app = app(world).listen("force_reuseport = true");
        refused(world, &app, &["control.sock.cgroup"]);
        assert!(theirs.join("below").exists(), "it was removed");
    });
}
