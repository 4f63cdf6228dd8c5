//! Unix sockets: one for all workers, made once, and there as long as the service is.

use std::fs;
use std::io::{Read, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt, chown, symlink};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use reuseportd_wire::status::{Engine, GenerationState, Outcome, Status};

use crate::orphans::{kill_with_keeper, replaced};
use crate::support::app::App;
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::processes_of;
use crate::support::unix_load::{Fates, UnixLoad, ask, generation_in};
use crate::support::world::{Need, World, repository, tool, world};
use crate::support::{PATIENCE, rounds};

/// Puts something at a path.
type Maker = fn(&Path);

/// Not root, and nobody else here.
const UID: u32 = 61_236;

fn socket(world: &World) -> PathBuf {
    world.path("web.sock")
}

/// The example behind a path alone. Answers take a while, so that some are always under way.
fn served(world: &World, line: &str) -> App {
    let script = repository("examples/activated.py");
    let mut app = App::new(world, ["python3", script.to_str().unwrap()]).workers(2);
    app = app.app("environment = { ANSWER_AFTER = \"0.02\" }");
    app.listen.clear();
    app.unix("web", &socket(world), line)
}

fn load(world: &World) -> UnixLoad {
    UnixLoad::start(socket(world), "hello\n", 8)
}

/// The socket's file, by what makes it this very one.
fn file(path: &Path) -> (u64, u64) {
    let metadata = fs::symlink_metadata(path).unwrap();
    assert!(metadata.file_type().is_socket());
    (metadata.dev(), metadata.ino())
}

fn is_gone(path: &Path) -> bool {
    fs::symlink_metadata(path).is_err()
}

/// A master that must not start, and what it says.
fn refused(world: &World, app: &App) -> String {
    let mut master = Master::launch(world, app, Command::new(REUSEPORTD));
    assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
    let log = master.log();
    master.ended(1);
    log
}

/// A client that has been accepted and has asked for nothing yet.
fn open(master: &Master, path: &Path) -> UnixStream {
    let mut client = UnixStream::connect(path).unwrap();
    client.set_read_timeout(Some(PATIENCE)).unwrap();
    client.write_all(b"half a line").unwrap();
    let counts = |status: &Status| status.generations.iter().any(|one| one.connections == Some(1));
    master.wait_status("counted", counts);
    client
}

fn finish(mut client: UnixStream) -> String {
    let mut answer = String::new();
    client.write_all(b", and the rest\n").unwrap();
    client.read_to_string(&mut answer).unwrap();
    answer
}

#[test]
fn upgrades_lose_nothing_and_a_restart_does() {
    world(&[Need::Python], |world| {
        let mut master = Master::start(world, &served(world, ""));
        let first = file(&socket(world));
        let clients = load(world);
        for generation in 2..=rounds(5, 20) + 1 {
            master.upgrade();
            clients.answered_by(generation);
        }
        let (done, reexecs) = (master.cli("reexec"), master.status().master.reexecs);
        assert_eq!((done.code, reexecs), (0, 1), "{done:#?}");
        master.upgrade();
        let fates = clients.end_lossless();
        assert_eq!(fates.answers.len(), rounds(5, 20) as usize + 2, "{fates:?}");
        assert_eq!(file(&socket(world)), first, "it is the same socket");
        // The naive way: the old one ends, and the new one begins.
        let clients = load(world);
        let answers = |fates: &Fates| fates.answers.get(&1).copied().unwrap_or(0);
        master.signal(rustix::process::Signal::TERM);
        assert_eq!(master.wait_end(PATIENCE), Some(0));
        master.restart();
        clients.wait("served again", |fates| answers(fates) > 20);
        assert!(!clients.end().lost.is_empty(), "the load shows nothing");
        master.stop();
        assert!(is_gone(&socket(world)));
    });
}

#[test]
fn what_is_in_the_way_stays_and_what_is_stale_goes() {
    world(&[Need::Python], |world| {
        let (path, app) = (socket(world), served(world, ""));
        let kinds: [(&str, Maker); 4] = [
            ("a file", |path| fs::write(path, "mine").unwrap()),
            ("a directory", |path| fs::create_dir(path).unwrap()),
            ("a symbolic link", |path| symlink("/dev/null", path).unwrap()),
            ("a named pipe", |path| tool(&format!("mkfifo {}", path.display()))),
        ];
        for (kind, make) in kinds {
            make(&path);
            let before = fs::symlink_metadata(&path).unwrap();
            let said = refused(world, &app);
            assert!(said.contains(&format!("there is {kind}, which is no socket")), "{said}");
            let check =
                Command::new(REUSEPORTD).arg("check").arg("--config").arg(&app.path).output().unwrap();
            let check = String::from_utf8_lossy(&check.stderr).into_owned();
            assert!(check.contains(&format!("there is {kind}")), "{check}");
            let after = fs::symlink_metadata(&path).unwrap();
            assert_eq!((after.ino(), after.mode()), (before.ino(), before.mode()), "{kind}");
            if before.is_dir() { fs::remove_dir(&path) } else { fs::remove_file(&path) }.unwrap();
        }
        let live = UnixListener::bind(&path).unwrap();
        let said = refused(world, &app);
        assert!(said.contains("a server listens there: stop it, or choose another path"), "{said}");
        let its_file = file(&path);
        assert!(live.accept().is_ok(), "it was asked by a connection");
        drop(live);
        assert_eq!(file(&path), its_file, "what a server that has ended leaves");
        let master = Master::start(world, &app);
        assert!(ask(&path, "x\n").unwrap().contains("said=x"));
        master.stop();
        assert!(is_gone(&path));
        fs::remove_dir_all(world.path("run")).ok();
        let mut elsewhere = app;
        elsewhere.control.clear();
        let elsewhere = elsewhere.unix("web", &world.path("none/web.sock"), "");
        let said = refused(world, &elsewhere);
        assert!(said.contains("none does not exist: create it"), "{said}");
    });
}

#[test]
fn the_file_is_the_workers_and_only_its_own_is_removed() {
    world(&[Need::Python, Need::Root], |world| {
        // In a directory that is not theirs, and in one that is.
        for directory in ["closed", "theirs"] {
            let path = world.path(directory).join("web.sock");
            fs::create_dir(world.path(directory)).unwrap();
            let owner = (directory == "theirs").then_some(UID);
            chown(world.path(directory), owner, owner).unwrap();
            let mut app = served(world, "").app(format!("user = {UID}")).app(format!("group = {}", UID + 1));
            app.control.retain(|line| !line.starts_with("[[listen]]"));
            let with = |mode: &str| app.clone().unix("web", &path, mode);
            let mut master = Master::start(world, &with("mode = \"0620\""));
            let seen = || {
                let metadata = fs::symlink_metadata(&path).unwrap();
                (metadata.mode() & 0o7777, metadata.uid(), metadata.gid())
            };
            assert_eq!(seen(), (0o620, UID, UID + 1));
            // What changes in an upgrade is changed at the same file.
            let before = file(&path);
            with("mode = \"0666\"\nbacklog = 7").write();
            master.upgrade();
            assert_eq!((seen(), file(&path)), ((0o666, UID, UID + 1), before));
            // Another's socket came to its place.
            fs::remove_file(&path).unwrap();
            let other = UnixListener::bind(&path).unwrap();
            let others = file(&path);
            master.signal(rustix::process::Signal::TERM);
            assert_eq!(master.wait_end(PATIENCE), Some(0));
            assert_eq!(file(&path), others);
            drop(other);
            master.ended(0);
        }
    });
}

#[test]
fn workers_find_them_in_the_order_of_the_config() {
    world(&[Need::Python], |world| {
        let mut app = App::new(world, served(world, "").command).workers(1).bind_master();
        app = app.unix("web", &socket(world), "").unix("more", &world.path("more.sock"), "");
        app.control
            .push("[[listen]]\nname = \"last\"\naddress = \"127.0.0.1:8099\"\nbind = \"master\"".into());
        let master = Master::start(world, &app);
        let pid = master.serving()[0];
        let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
        let has = |variable: String| {
            assert!(environment.split('\0').any(|one| one == variable), "{variable}: {environment:?}");
        };
        let (web, more) = (socket(world), world.path("more.sock"));
        has("LISTEN_FDS=4".into());
        has("LISTEN_FDNAMES=default:web:more:last".into());
        let (web, more) = (web.display(), more.display());
        has(format!("SERVER_STARTER_PORT={}=3;{web}=4;{more}=5;127.0.0.1:8099=6", world.address));
        let tcp = format!("default=tcp:{}", world.address);
        has(format!("REUSEPORTD_LISTEN={tcp};web=unix:{web};more=unix:{more};last=tcp:127.0.0.1:8099"));
        has("REUSEPORTD_CHANNEL=7".into());
        for path in [socket(world), world.path("more.sock")] {
            assert!(ask(&path, "x\n").unwrap().contains("said=x"));
        }
        let status = master.status();
        let web = status.listeners.iter().find(|one| one.name == "web").unwrap();
        assert_eq!(
            (web.address.as_str(), web.engine),
            (format!("unix:{}", socket(world).display()).as_str(), Engine::None)
        );
        assert!(web.engine_reason.contains("one socket for all workers"), "{web:?}");
        master.stop();
    });
}

#[test]
fn open_connections_are_counted_and_waited_for() {
    world(&[Need::Python], |world| {
        let app = served(world, "").upgrade("stop_when = \"idle\"").upgrade("idle_timeout = \"30s\"");
        let app = app.upgrade("drain_timeout = \"30s\"").upgrade("settle_timeout = \"1s\"");
        let master = Master::start(world, &app);
        let client = open(&master, &socket(world));
        let upgrade = master.begin("upgrade --wait --json");
        master.wait_status("switched", |status| status.active_generation == Some(2));
        let switched = Instant::now();
        master.wait_status("still waited for", |status| {
            let old = status.generations.iter().find(|one| one.generation == 1).unwrap();
            assert_eq!((old.connections, old.state), (Some(1), GenerationState::Retiring));
            // Without this connection it would have gone within a tenth of a second.
            switched.elapsed() > Duration::from_secs(1)
        });
        assert!(finish(client).contains("generation=1 "));
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome, receipt.connections_cut), (0, Outcome::Completed, Some(0)));
        // And one that goes on for longer than it may is cut, and counted.
        let mut short = app;
        short.upgrade =
            ["drain_timeout", "settle_timeout", "idle_timeout"].map(|key| format!("{key} = \"1s\"")).into();
        short.write();
        master.upgrade();
        let client = open(&master, &socket(world));
        let receipt = master.upgrade();
        assert_eq!((receipt.connections_cut, receipt.forced_kills > 0), (Some(1), true), "{receipt:#?}");
        drop(client);
        master.stop();
    });
}

#[test]
fn seats_come_and_go_and_are_replaced_in_batches() {
    world(&[Need::Python], |world| {
        let master = Master::start(world, &served(world, "").upgrade("batch = 1"));
        let clients = load(world);
        master.upgrade();
        for words in ["scale 4 --wait", "restart-worker 0 --wait", "scale 1 --wait"] {
            let done = master.cli(words);
            assert_eq!(done.code, 0, "{words}: {done:#?}");
            clients.fresh_answers();
        }
        let sockets = master.cli("sockets").stdout;
        assert!(sockets.contains(&format!("unix:{}: web", socket(world).display())), "{sockets}");
        let check = master.cli("check");
        assert_eq!(check.code, 0, "its own socket is no obstacle: {check:#?}");
        let status = master.cli("status").stdout;
        assert!(status.contains(&format!("unix:{}", socket(world).display())), "{status}");
        clients.end_lossless();
        master.stop();
    });
}

#[test]
fn a_killed_master_loses_nothing() {
    world(&[Need::Python], |world| {
        let mut master = Master::start(world, &served(world, ""));
        let (first, clients) = (file(&socket(world)), load(world));
        master.kill();
        clients.fresh_answers();
        master.restart();
        master.wait_adopted();
        master.upgrade();
        clients.answered_by(2);
        clients.end_lossless();
        assert_eq!(file(&socket(world)), first);
        master.stop();
        assert!(is_gone(&socket(world)));
    });
}

#[test]
fn killed_with_its_keeper_it_loses_nothing_either() {
    world(&[Need::Python, Need::Root], |world| {
        let mut master = Master::start(world, &served(world, ""));
        let (first, clients) = (file(&socket(world)), load(world));
        let orphans: Vec<u32> = processes_of(&world.app).iter().map(|process| process.pid).collect();
        kill_with_keeper(world, &mut master);
        clients.fresh_answers();
        let workers: Vec<u32> =
            orphans.into_iter().filter(|pid| Path::new(&format!("/proc/{pid}")).exists()).collect();
        assert_eq!(workers.len(), 2);
        replaced(&mut master, &workers);
        clients.answered_by(2);
        master.upgrade();
        clients.answered_by(3);
        clients.end_lossless();
        assert_eq!(file(&socket(world)), first, "taken from the workers, and never bound again");
        master.stop();
        assert!(is_gone(&socket(world)));
    });
}

#[test]
fn addresses_come_and_go_with_upgrades() {
    world(&[Need::Python], |world| {
        let more = world.path("more.sock");
        let app = served(world, "");
        let master = Master::start(world, &app);
        app.clone().unix("more", &more, "").write();
        master.upgrade();
        assert_eq!(generation_in(&ask(&more, "x\n").unwrap()), Some(2));
        // One that is taken is refused, and nothing changes.
        let taken = world.path("taken.sock");
        let server = UnixListener::bind(&taken).unwrap();
        app.clone().unix("fresh", &world.path("fresh.sock"), "").unix("more", &taken, "").write();
        let done = master.cli("upgrade --wait");
        done.refused(&["a server listens there"]);
        drop(server);
        assert!(is_gone(&world.path("fresh.sock")), "none is made if one can't be");
        assert_eq!(generation_in(&ask(&more, "x\n").unwrap()), Some(2));
        // A connection that came through it goes on when it is gone.
        let client = open(&master, &more);
        app.write();
        let removed = master.begin("upgrade --wait");
        master.wait_status("done", |status| status.active_generation == Some(3));
        assert_eq!(removed.finish(PATIENCE).code, 0);
        assert!(is_gone(&more));
        assert!(finish(client).contains("generation=2 "));
        let done = master.cli("rollback --wait");
        assert_eq!(done.code, 0, "{done:#?}");
        assert_eq!(generation_in(&ask(&more, "x\n").unwrap()), Some(4), "with what the one before had");
        master.stop();
        assert!(is_gone(&more) && is_gone(&socket(world)));
    });
}

#[test]
fn a_failed_upgrade_leaves_the_socket_as_it_was() {
    world(&[Need::Python], |world| {
        let app = served(world, "mode = \"0600\"");
        let master = Master::start(world, &app);
        let (first, clients) = (file(&socket(world)), load(world));
        let mut failing = served(world, "mode = \"0666\"").unix("more", &world.path("more.sock"), "");
        failing.command = vec!["false".into()];
        failing.write();
        let (code, receipt) = master.failing_upgrade();
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        clients.fresh_answers();
        let fates = clients.end_lossless();
        assert_eq!(fates.answers.keys().copied().collect::<Vec<_>>(), [1]);
        assert_eq!(file(&socket(world)), first);
        let mode = fs::symlink_metadata(socket(world)).unwrap().permissions().mode();
        assert_eq!(mode & 0o777, 0o600);
        assert!(is_gone(&world.path("more.sock")));
        master.stop();
    });
}
