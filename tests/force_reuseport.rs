//! `force_reuseport`: programs that never heard of SO_REUSEPORT are upgraded without loss.

use std::fs;
use std::net::TcpStream;
use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use reuseportd_bench::{Protocol, Spec};
use reuseportd_wire::status::Outcome;

use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::load::{Load, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{Done, Running, keepers_of, kill, wait};
use crate::support::world::{Need, World, repository, world};

const NEEDS: [Need; 2] = [Need::Root, Need::Bpf];
const RUSTC: Need = Need::Runs("rustc", &["--version"]);
const FORCE: (Option<&str>, &str) = (None, "force_reuseport = true");

/// A service of two workers that run this command, for which SO_REUSEPORT is set.
fn forced(world: &World, command: &[&str]) -> App {
    let mut app = App::new(world, command.iter().copied()).workers(2).readiness("listen");
    app.listen_lines.push(FORCE);
    app
}

/// `examples/plain.rs` as a static binary.
fn static_binary(world: &World) -> String {
    let path = world.path("plain");
    let mut rustc = Command::new("rustc");
    rustc.args(["--edition", "2024", "-C", "target-feature=+crt-static", "-o"]).arg(&path);
    let built = Running::start({
        rustc.arg(repository("examples/plain.rs"));
        rustc
    })
    .finish(4 * PATIENCE);
    assert_eq!(built.code, 0, "{built:#?}");
    assert!(is_static(&fs::read(&path).unwrap()));
    path.to_str().unwrap().to_owned()
}

/// Whether an ELF file names no interpreter, so that nothing could be preloaded into it.
fn is_static(elf: &[u8]) -> bool {
    const INTERPRETER: [u8; 4] = 3_u32.to_ne_bytes();
    let number = |at: usize| usize::from(u16::from_ne_bytes([elf[at], elf[at + 1]]));
    // The first 64 KiB: program headers follow the file's.
    let (table, size, entries) = (number(32), number(54), number(56));
    (0..entries).all(|entry| elf[table + entry * size..][..4] != INTERPRETER)
}

/// Five upgrades under load, and the naive control under the same load, which must lose.
fn upgrades_lose_nothing(world: &World, app: &App, load: &Spec) {
    for engine in ["ebpf", "cbpf"] {
        let app = app.clone().engine(engine);
        let master = Master::start(world, &app);
        let running = Load::start(load.clone());
        for _ in 0..5 {
            master.upgrade();
            running.answered(30);
        }
        running.end_lossless();
        master.stop();
    }
    control_loses(world, app, load.clone());
}

/// The same program without a master: only one can have the address, so it is stopped and started again.
fn control_loses(world: &World, app: &App, load: Spec) {
    let start = || {
        let port = world.address.port().to_string();
        let address = world.address.to_string();
        let words: Vec<String> = app
            .command
            .iter()
            .map(|word| word.replace("{port.default}", &port).replace("{address.default}", &address))
            .collect();
        let mut command = Command::new(&words[0]);
        command.args(&words[1..]).stdout(Stdio::null()).stderr(Stdio::null());
        let child = command.spawn().unwrap();
        let deadline = Instant::now() + PATIENCE;
        while TcpStream::connect(world.address).is_err() {
            assert!(Instant::now() < deadline, "{words:?} does not listen");
            thread::yield_now();
        }
        child
    };
    let end = |mut child: Child| {
        child.kill().unwrap();
        wait(&mut child, PATIENCE).unwrap();
    };
    let first = start();
    let running = Load::start(load);
    end(first);
    let second = start();
    running.answered(30);
    let report = running.end();
    end(second);
    assert!(report.lost() > 0, "the load shows nothing, the naive control loses nothing either: {report}");
}

#[test]
fn redis() {
    world(&[Need::Root, Need::Bpf, Need::Runs("redis-server", &["--version"])], |world| {
        // Without its title, which takes the place of the environment the harness knows it by; without a dump.
        let words = "redis-server --port {port.default} --bind 127.0.0.1 --protected-mode no --set-proc-title no --save";
        let words: Vec<&str> = words.split(' ').chain([""]).collect();
        let app = forced(world, &words);
        let mut load = spec(world).rate(300.0).burst(100, Duration::from_millis(500)).slow(10);
        load.protocol = Protocol::Line { asked: "PING".into(), answer: "+PONG".into() };
        upgrades_lose_nothing(world, &app, &load);
    });
}

#[test]
fn a_static_binary() {
    world(&[Need::Root, Need::Bpf, RUSTC], |world| {
        let app = forced(world, &[&static_binary(world), "{address.default}"]);
        let app = app.app("user = 61234\ngroup = 61234");
        let load = spec(world).rate(300.0).burst(100, Duration::from_millis(500)).slow(10);
        upgrades_lose_nothing(world, &app, &load);
    });
}

#[test]
fn pythons_http_server() {
    world(&[Need::Root, Need::Bpf, Need::Python], |world| {
        let directory = world.path("empty");
        fs::create_dir(&directory).unwrap();
        let directory = directory.to_str().unwrap();
        let words =
            ["python3", "-m", "http.server", "--bind", "127.0.0.1", "-d", directory, "{port.default}"];
        let app = forced(world, &words);
        // Its accept queue holds five.
        let load = spec(world).rate(100.0).slow(5);
        upgrades_lose_nothing(world, &app, &load);
    });
}

/// What it listens on besides is its own, and not shared.
#[test]
fn only_the_configured_addresses_are_shared() {
    world(&[Need::Root, Need::Bpf, RUSTC], |world| {
        let mut second = world.address;
        second.set_port(second.port() + 1);
        let program = static_binary(world);
        let mut app = forced(world, &[&program, "{address.default}", &second.to_string()]).workers(1);
        let master = Master::start(world, &app);
        let (code, receipt) = master.failing_upgrade();
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        let reason = receipt.reason.unwrap();
        assert!(reason.contains(&format!("cannot bind {second}: Address already in use")), "{reason}");
        master.stop();

        // Configured, and not to be forced: the program has to do it.
        app.listen.push(("second".into(), second));
        app.listen_lines = vec![(Some("default"), FORCE.1)];
        let master = Master::launch(world, &app, Command::new(REUSEPORTD));
        let log = world.path("master.log");
        master.ended(1);
        let log = fs::read_to_string(log).unwrap();
        assert!(log.contains(&format!("its listener on {second} is not set SO_REUSEPORT")), "{log}");

        app.listen_lines = vec![FORCE];
        let master = Master::start(world, &app);
        master.upgrade();
        // A respawn is started as its generation was.
        let before = master.serving();
        kill(before.clone());
        master.wait_status("respawned", |_| {
            let now = master.serving();
            now.len() == 1 && now != before
        });
        master.upgrade();
        master.stop();
    });
}

/// `[::]` serves a configured `0.0.0.0`.
#[test]
fn a_dual_stack_listener_is_covered() {
    world(&[Need::Root, Need::Bpf, RUSTC], |world| {
        let mut app = forced(world, &[&static_binary(world), "[::]:{port.default}"]);
        app.listen[0].1.set_ip(std::net::Ipv4Addr::UNSPECIFIED.into());
        let master = Master::start(world, &app);
        master.upgrade();
        master.stop();
    });
}

/// Where the master says its cgroup is, with its workers in it.
fn cgroup(world: &World, master: &Master<'_>) -> PathBuf {
    let path = fs::read_link(world.path("run/control.sock.cgroup")).unwrap();
    assert!(path.join("cgroup.procs").exists(), "{}", path.display());
    let name = path.file_name().unwrap().to_str().unwrap();
    for pid in master.serving() {
        let is_in = fs::read_to_string(format!("/proc/{pid}/cgroup")).unwrap();
        assert!(is_in.lines().any(|line| line.starts_with("0::") && line.contains(name)), "{is_in}");
    }
    let own = fs::read_to_string(format!("/proc/{}/cgroup", master.pid())).unwrap();
    assert!(!own.contains(name), "{own}");
    path
}

#[test]
fn the_cgroup_goes_with_the_service() {
    world(&[Need::Root, Need::Bpf, RUSTC], |world| {
        let app = forced(world, &[&static_binary(world), "{address.default}"]);
        let mut master = Master::start(world, &app);
        let path = cgroup(world, &master);
        master.kill();
        master.restart();
        master.wait_adopted();
        assert_eq!(cgroup(world, &master), path);
        master.upgrade();
        assert_eq!(cgroup(world, &master), path);
        master.stop();
        assert!(!path.exists(), "after a stop");

        // No keeper either: the workers are found by the journal.
        let mut master = Master::start(world, &app);
        assert_eq!(cgroup(world, &master), path);
        master.kill();
        kill(keepers_of(master.app()));
        let running = Load::start(spec(world).rate(100.0));
        master.restart();
        master.wait_adopted();
        master.wait_status("upgraded", |status| status.active_generation == Some(2));
        running.end_lossless();
        assert_eq!(cgroup(world, &master), path);
        master.stop();
        assert!(!path.exists(), "after a stop");

        let mut master = Master::start(world, &app);
        assert_eq!(cgroup(world, &master), path);
        master.kill();
        let done = master.cli("stop --left-behind");
        assert_eq!(done.code, 0, "{done:#?}");
        assert!(!path.exists(), "after stop --left-behind");
    });
}

/// Sets of addresses that nobody has any more go at the next upgrade.
#[test]
fn other_addresses_have_another_cgroup() {
    world(&[Need::Root, Need::Bpf, RUSTC], |world| {
        let mut app = forced(world, &[&static_binary(world), "{address.default}"]);
        let master = Master::start(world, &app);
        let path = cgroup(world, &master);
        let below = || {
            let entries = fs::read_dir(&path).unwrap().map(Result::unwrap);
            entries.filter(|entry| entry.path().is_dir()).map(|entry| entry.file_name()).collect::<Vec<_>>()
        };
        let first = below();
        assert_eq!(first.len(), 1);
        app.listen[0].1.set_port(world.address.port() + 1);
        app.write();
        master.upgrade();
        assert!(below().iter().any(|name| !first.contains(name)));
        master.upgrade();
        assert!(below().len() == 1 && below() != first, "{:?}", below());
        master.stop();
        assert!(!path.exists());
    });
}

/// A subcommand by a shell that does this before, in mounts of its own.
fn after(world: &World, before: &str, words: &str) -> Done {
    let config = world.path("app.toml");
    let script = format!("{before} {REUSEPORTD} {words} --config {}", config.display());
    let mut command = Command::new("unshare");
    command.args(["--mount", "sh", "-c", &script]);
    Running::start(command).finish(PATIENCE)
}

#[test]
fn where_it_can_not_work_the_reason_is_told() {
    const EACH: &str = "for place in $(grep ' cgroup2 ' /proc/self/mounts | cut -d' ' -f2); do";
    world(&NEEDS, |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        app.listen_lines.push(FORCE);
        app.write();
        assert_eq!(after(world, "", "check").code, 0);
        for (before, says) in [
            (
                format!("{EACH} umount -l $place; done; exec"),
                "cannot find this process in cgroup v2: it is not mounted here; mount it: mkdir",
            ),
            (
                format!("{EACH} mount -o remount,bind,ro $place; done; exec"),
                "Read-only file system (os error 30); let it be written to: ProtectControlGroups=no",
            ),
            (
                "exec setpriv --bounding-set=-net_admin,-sys_admin --inh-caps=-net_admin,-sys_admin"
                    .to_owned(),
                "Operation not permitted (os error 1) (it takes CAP_BPF and CAP_NET_ADMIN",
            ),
        ] {
            for words in ["check", "", "doctor"] {
                let done = after(world, &before, words);
                let told = done.stdout.clone() + &done.stderr;
                let told = told.split_whitespace().collect::<Vec<_>>().join(" ");
                assert!(done.code == 1 && told.contains(says), "{before} {words}: {done:#?}");
            }
        }
    });
}

/// An upgrade that asks for what the running master can't have changes nothing.
#[test]
fn an_upgrade_that_can_not_have_it_is_refused() {
    world(&NEEDS, |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        let mut command = Command::new("setpriv");
        command.args([
            "--bounding-set=-net_admin,-sys_admin",
            "--inh-caps=-net_admin,-sys_admin",
            REUSEPORTD,
        ]);
        let mut master = Master::launch(world, &app, command);
        master.wait_ready();
        app.listen_lines.push(FORCE);
        app.write();
        let (code, receipt) = master.failing_upgrade();
        assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{receipt:#?}");
        assert!(receipt.reason.unwrap().contains("listen.force_reuseport: cannot load the program"));
        assert_eq!(master.status().active_generation, Some(1));
        master.stop();
    });
}
