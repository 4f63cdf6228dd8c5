//! Who workers are: user, groups, capabilities, processors; and that other users' workers lose nothing either.

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::unix::fs::{PermissionsExt, chown};
use std::os::unix::net::UnixDatagram;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;

use nix::sched::{CloneFlags, unshare};
use reuseportd_wire::status::Outcome;
use rustix::process::Uid;
use rustix::thread::CapabilitySet;

use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::Running;
use crate::support::rounds;
use crate::support::world::{Need, World, example, tool, world};

/// No accounts: nobody else here.
pub(crate) const UID: u32 = 61_234;
pub(crate) const OTHER: u32 = 61_235;

/// A copy of a program, for everybody to execute. Made by a process of its own: no descriptor of this one, that a child
/// could hold for a moment, keeps it from being executed.
pub(crate) fn copy(world: &World, from: &Path, name: &str) -> PathBuf {
    let to = world.path(name);
    tool(&format!("install -m 755 {} {}", from.display(), to.display()));
    to
}

/// The difficult worker where everybody may execute it.
pub(crate) fn app(world: &World, options: &str) -> App {
    let worker = copy(world, &example("test_worker"), "worker");
    let command = std::iter::once(worker.to_str().unwrap().to_owned());
    App::new(world, command.chain(options.split_whitespace().map(str::to_owned)))
}

/// A program run by another user, without any capability.
fn as_other(program: &Path) -> Command {
    let mut command = Command::new(program);
    command.uid(UID).gid(UID);
    command
}

/// Workers of another user.
pub(crate) fn as_user(app: App) -> App {
    app.app(format!("user = {UID}")).app(format!("group = {UID}"))
}

/// This thread, and what it starts, finds these accounts on the machine.
fn with_accounts(world: &World) {
    unshare(CloneFlags::CLONE_NEWNS).unwrap();
    tool("mount --make-rprivate /");
    let root = "root:x:0:0:root:/root:/bin/bash\n";
    let passwd =
        format!("{root}alice:x:61001:61001::/home/alice:/bin/sh\nweb:x:61002:61002::/:/usr/sbin/nologin\n");
    let group = "root:x:0:\nalice:x:61001:\nweb:x:61002:\nlogs:x:61003:bob,alice\nkeys:x:61004:alice\n";
    for (name, text) in [("passwd", passwd.as_str()), ("group", group)] {
        fs::write(world.path(name), text).unwrap();
        tool(&format!("mount --bind {} /etc/{name}", world.path(name).display()));
    }
}

fn status(pid: u32, names: &[&str]) -> Vec<String> {
    fields(&fs::read_to_string(format!("/proc/{pid}/status")).unwrap(), names)
}

/// Fields of a process's status, blanks evened out.
pub(crate) fn fields(text: &str, names: &[&str]) -> Vec<String> {
    let field = |name: &&str| {
        let line = text.lines().find_map(|line| line.strip_prefix(*name)?.strip_prefix(':'));
        line.unwrap_or_else(|| panic!("{name} in {text}")).split_whitespace().collect::<Vec<_>>().join(" ")
    };
    names.iter().map(field).collect()
}

fn own_status(names: &[&str]) -> Vec<String> {
    status(std::process::id(), names)
}

fn variable(pid: u32, name: &str) -> Option<String> {
    let environment = fs::read(format!("/proc/{pid}/environ")).unwrap();
    let text = String::from_utf8(environment).unwrap();
    text.split('\0').find_map(|one| one.strip_prefix(name)?.strip_prefix('=')).map(str::to_owned)
}

const WHO: [&str; 3] = ["Uid", "Gid", "Groups"];
pub(crate) const CAPABILITIES: [&str; 5] = ["CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"];
pub(crate) const NONE: &str = "0000000000000000";
const NET_BIND_SERVICE: &str = "0000000000000400";

/// A worker with these lines in `[app]`, looked at while it serves.
fn serving(world: &World, lines: &[&str], look: impl FnOnce(u32)) {
    let app = lines.iter().fold(app(world, "--mode plain").workers(1), |app, line| app.app(*line));
    let master = Master::start(world, &app);
    look(master.serving()[0]);
    master.stop();
}

#[test]
fn a_worker_is_exactly_whom_the_config_says() {
    world(&[Need::Root], |world| {
        with_accounts(world);
        let four = |id: &str| [id; 4].join(" ");
        for (lines, uid, gid, groups) in [
            (&["user = \"alice\""][..], "61001", "61001", "61001 61003 61004"),
            (&["user = 61001"], "61001", "61001", "61001 61003 61004"),
            (&["user = \"alice\"", "group = \"web\""], "61001", "61002", "61002 61003 61004"),
            (&["user = 61234", "group = 61235"], "61234", "61235", "61235"),
            (&["user = \"root\""], "0", "0", "0"),
        ] {
            serving(world, lines, |pid| {
                assert_eq!(status(pid, &WHO), [four(uid), four(gid), groups.to_owned()], "{lines:?}");
                assert_eq!(status(pid, &CAPABILITIES), [NONE; 5], "{lines:?}");
                assert_eq!(status(pid, &["NoNewPrivs"]), ["1"]);
            });
        }
        // A group alone: the rest stays as it is.
        serving(world, &["group = \"logs\""], |pid| {
            assert_eq!(status(pid, &WHO), [four("0"), four("61003"), "61003".to_owned()]);
            assert_eq!(status(pid, &CAPABILITIES), own_status(&CAPABILITIES));
        });
    });
}

#[test]
fn capabilities_are_all_there_are_for_a_user() {
    world(&[Need::Root], |world| {
        let bind = "capabilities = [\"CAP_NET_BIND_SERVICE\"]";
        for user in ["61234", "0"] {
            let lines = [format!("user = {user}"), "group = 61234".to_owned(), bind.to_owned()];
            serving(world, &lines.each_ref().map(String::as_str), |pid| {
                assert_eq!(status(pid, &CAPABILITIES), [NET_BIND_SERVICE; 5], "uid {user}");
            });
        }
        serving(world, &[bind, "no_new_privileges = false"], |pid| {
            let [_, permitted, effective, bounds, _] = own_status(&CAPABILITIES).try_into().unwrap();
            let ambient = NET_BIND_SERVICE.to_owned();
            assert_eq!(status(pid, &CAPABILITIES), [ambient.clone(), permitted, effective, bounds, ambient]);
            assert_eq!(status(pid, &WHO), own_status(&WHO));
        });
    });
}

#[test]
fn a_worker_finds_its_users_login() {
    world(&[Need::Root], |world| {
        with_accounts(world);
        for (lines, user, home, shell) in [
            (&["user = \"alice\""][..], Some("alice"), Some("/home/alice"), Some("/bin/sh")),
            (
                &["user = \"alice\"", "environment = { HOME = \"/srv\" }"],
                Some("alice"),
                Some("/srv"),
                Some("/bin/sh"),
            ),
            // Not the master's, which the user has nothing to do with.
            (&["user = \"web\""], Some("web"), None, None),
            (&["user = 61234", "group = 61234"], None, None, None),
        ] {
            let app = lines.iter().fold(app(world, "--mode plain").workers(1), |app, line| app.app(*line));
            let mut command = Command::new(REUSEPORTD);
            command.env("HOME", "/root").env("USER", "root").env("LOGNAME", "root").env("SHELL", "/bin/zsh");
            let mut master = Master::launch(world, &app, command);
            master.wait_ready();
            let pid = master.serving()[0];
            let found = ["USER", "LOGNAME", "HOME", "SHELL"].map(|name| variable(pid, name));
            let wanted = [user, user, home, shell].map(|value| value.map(str::to_owned));
            assert_eq!(found, wanted, "{lines:?}");
            master.stop();
        }
    });
}

#[test]
fn seats_are_spread_over_the_processors() {
    world(&[], |world| {
        let allowed = rustix::thread::sched_getaffinity(None).unwrap();
        let allowed: Vec<usize> = (0..1024).filter(|cpu| allowed.is_set(*cpu)).collect();
        let workers = u32::try_from(allowed.len()).unwrap() + 1;
        let app = app(world, "--mode plain").workers(workers);
        let list = |master: &Master<'_>| {
            let mut found: Vec<(u32, String)> = Vec::new();
            for pid in master.serving() {
                let seat = variable(pid, "REUSEPORTD_SEAT").unwrap().parse().unwrap();
                found.push((seat, status(pid, &["Cpus_allowed_list"]).remove(0)));
            }
            found.sort();
            found
        };
        let master = Master::start(world, &app);
        let all = own_status(&["Cpus_allowed_list"]).remove(0);
        assert!(list(&master).iter().all(|(_, cpus)| *cpus == all));
        app.app("cpu_affinity = \"seat\"").write();
        master.upgrade();
        let cpus = allowed.iter().cycle().map(usize::to_string);
        assert_eq!(list(&master), (0..workers).zip(cpus).collect::<Vec<_>>());
        master.stop();
    });
}

fn another_users_workers_lose_nothing(mode: &str) {
    world(&[Need::Root, Need::Bpf], |world| {
        let app = as_user(app(world, &format!("--mode {mode} --accept-delay 5"))).engine("ebpf");
        let master = Master::start(world, &app);
        assert_eq!(status(master.serving()[0], &["Uid"]), [[UID.to_string().as_str(); 4].join(" ")]);
        let load = Load::start(slow_accepts(world));
        for generation in 2..=rounds(5, 20) + 1 {
            master.hup();
            load.answered_by(generation);
        }
        load.end_lossless();
        master.stop();
        crate::upgrade::control_loses(world, slow_accepts(world), 5);
    });
}

#[test]
fn another_users_unmodified_workers_lose_nothing() {
    another_users_workers_lose_nothing("plain");
}

#[test]
fn another_users_sdk_workers_lose_nothing() {
    another_users_workers_lose_nothing("sdk");
}

#[test]
fn a_low_port_needs_no_root() {
    world(&[Need::Root], |world| {
        let low = SocketAddr::from((Ipv4Addr::LOCALHOST, 80));
        let mut app = as_user(app(world, "--mode plain")).workers(1);
        app.listen = vec![("default".into(), low)];
        let mut master = Master::launch(world, &app, Command::new(REUSEPORTD));
        assert_eq!(master.wait_end(PATIENCE), Some(1), "without the capability: {}", master.log());
        assert!(master.log().contains("Permission denied"), "{}", master.log());
        let done = master.cli("check");
        assert!(done.code == 0 && done.stderr.contains("app.capabilities"), "{done:#?}");

        let app = app.app("capabilities = [\"CAP_NET_BIND_SERVICE\"]");
        let master = Master::start(world, &app);
        let done = master.cli("check");
        assert_eq!((done.code, done.stderr.as_str()), (0, ""), "{done:#?}");
        for _ in 0..2 {
            let mut client = TcpStream::connect(low).unwrap();
            client.write_all(b"hello\n").unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            let pid = master.serving()[0];
            assert!(answer.contains(&pid.to_string()), "{answer:?} of {pid}");
            assert_ne!(status(pid, &["Uid"])[0].split(' ').next(), Some("0"));
            master.upgrade();
        }
        master.stop();
    });
}

#[test]
fn another_user_in_an_upgrade_is_refused() {
    world(&[Need::Root], |world| {
        let plain = app(world, "--mode plain").workers(2);
        let app = as_user(plain.clone());
        let master = Master::start(world, &app);
        let (before, told) = (master.serving(), master.status().generations);
        let other = plain.clone().app(format!("user = {OTHER}")).app(format!("group = {UID}"));
        for (changed, uid) in [(other, OTHER), (plain, 0)] {
            changed.write();
            let (code, receipt) = master.failing_upgrade();
            assert_eq!((code, receipt.outcome, receipt.to), (1, Outcome::Refused, None), "{receipt:#?}");
            let reason = receipt.reason.unwrap();
            let change = format!("app.user can't change in an upgrade (uid {UID} to {uid})");
            assert!(reason.contains(&change) && reason.contains("one uid"), "{reason}");
        }
        assert_eq!(master.serving(), before);
        assert_eq!(master.status().generations.len(), told.len());
        // The rest of an identity may change.
        app.app("capabilities = [\"CAP_KILL\"]").write();
        assert_eq!(master.upgrade().from, Some(1));
        master.stop();
    });
}

#[test]
fn another_user_cannot_make_a_worker_ready() {
    world(&[Need::Root], |world| {
        let ready = as_user(app(world, "--mode plain")).workers(1);
        let master = Master::start(world, &ready);
        as_user(app(world, "--mode plain --no-notify")).workers(1).upgrade("ready_timeout = \"3s\"").write();
        let upgrade = master.begin("upgrade --wait --json");
        let started = master.wait_status("started", |status| {
            status.generations.get(1).is_some_and(|generation| generation.workers[0].pid.is_some())
        });
        let socket = variable(started.generations[1].workers[0].pid.unwrap(), "NOTIFY_SOCKET").unwrap();
        // The same user is no more of a worker than another one.
        for uid in [OTHER, UID] {
            let send = || {
                let uid = Uid::from_raw(uid);
                rustix::thread::set_thread_res_uid(uid, uid, uid).unwrap();
                UnixDatagram::unbound().unwrap().send_to(b"READY=1", &socket).unwrap();
            };
            thread::scope(|scope| scope.spawn(send).join()).unwrap();
        }
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        for uid in [OTHER, UID] {
            let log = master.log();
            let ignored =
                |line: &str| line.contains("no worker's process") && line.contains(&format!("uid={uid}"));
            assert!(log.lines().any(ignored), "uid {uid} in {log}");
        }
        master.stop();
    });
}

#[test]
fn without_privilege_another_user_is_refused() {
    world(&[Need::Root], |world| {
        let program = copy(world, REUSEPORTD.as_ref(), "reuseportd");
        chown(world.path(""), Some(UID), Some(UID)).unwrap();
        let plain = app(world, "--mode plain").workers(1);
        let changed = as_user(plain.clone());
        let capable = plain.clone().app("capabilities = [\"CAP_NET_BIND_SERVICE\"]");
        let refused = |text: &str, app: &App| {
            let words = if app.app.len() == 2 {
                ["app.user", "CAP_SETUID", "run it as root"]
            } else {
                ["app.capabilities", "CAP_NET_BIND_SERVICE", "run it as root"]
            };
            assert!(words.iter().all(|word| text.contains(word)), "{text}");
        };
        for app in [&changed, &capable] {
            let mut master = Master::launch(world, app, as_other(&program));
            assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
            refused(&master.log(), app);
            let mut check = as_other(&program);
            check.args(["check", "--config"]).arg(&app.path);
            let done = Running::start(check).finish(PATIENCE);
            assert_eq!(done.code, 1, "{done:#?}");
            refused(&done.stderr, app);
        }
        let mut master = Master::launch(world, &plain, as_other(&program));
        master.wait_ready();
        for app in [&changed, &capable] {
            app.write();
            let (code, receipt) = master.failing_upgrade();
            assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{receipt:#?}");
            refused(&receipt.reason.unwrap(), app);
        }
        master.stop();
    });
}

#[test]
fn a_master_that_cannot_see_another_users_listeners_says_so() {
    world(&[Need::Root], |world| {
        // What this thread starts will not have it.
        rustix::thread::remove_capability_from_bounding_set(CapabilitySet::SYS_PTRACE).unwrap();
        let plain = as_user(app(world, "--mode plain"));
        let mut master = Master::launch(world, &plain, Command::new(REUSEPORTD));
        assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
        assert!(master.log().contains("give the master CAP_SYS_PTRACE"), "{}", master.log());
        // Over a channel nothing has to be looked for.
        let master = Master::start(world, &as_user(app(world, "--mode sdk")));
        master.upgrade();
        master.stop();
    });
}

#[test]
fn what_the_user_cannot_reach_is_refused() {
    world(&[Need::Root], |world| {
        let app = as_user(app(world, "--mode plain")).workers(1);
        let master = Master::start(world, &app);
        let before = master.serving();
        let secret = world.path("secret");
        fs::create_dir(&secret).unwrap();
        copy(world, &example("test_worker"), "secret/worker");
        fs::set_permissions(&secret, fs::Permissions::from_mode(0o700)).unwrap();
        let mut hidden = app.clone();
        hidden.command[0] = secret.join("worker").to_str().unwrap().to_owned();
        let directory = app.clone().app(format!("working_directory = {secret:?}"));
        for (changed, words) in [
            (hidden, ["app.command", "secret/worker", "Permission denied"]),
            (directory, ["app.working_directory", "secret", "Permission denied"]),
        ] {
            changed.write();
            let (code, receipt) = master.failing_upgrade();
            let reason = receipt.reason.unwrap();
            assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{reason}");
            assert!(words.iter().all(|word| reason.contains(word)), "{reason}");
            let done = master.cli("check");
            assert!(done.code == 1 && words.iter().all(|word| done.stderr.contains(word)), "{done:#?}");
        }
        assert_eq!(master.serving(), before);
        app.write();
        master.stop();

        fs::create_dir(world.path("run")).unwrap();
        fs::set_permissions(world.path("run"), fs::Permissions::from_mode(0o700)).unwrap();
        let mut master = Master::launch(world, &app, Command::new(REUSEPORTD));
        assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
        assert!(master.log().contains("notify socket"), "{}", master.log());
    });
}
