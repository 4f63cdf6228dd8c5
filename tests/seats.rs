//! Sockets the master makes: workers find them as the protocol says, and no worker's end loses what waits in them.

use std::fs;
use std::net::SocketAddr;
use std::os::unix::fs::chown;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use reuseportd_bench::Spec;
use reuseportd_wire::status::{Engine, Outcome};

use crate::crash::{kill_the_fullest, one_at_a_time, only_worker_killed, queues_of_twenty};
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, slow_accepts, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::world::{Need, World, example, needs_of, tool, world};
use crate::support::{PATIENCE, rounds};
use crate::upgrade::control_loses;

/// Not root, and nobody else here.
const UID: u32 = 61_236;

const SLOW: &str = "--mode activated --accept-delay 4";

fn named(name: &str, address: &str) -> (String, SocketAddr) {
    (name.to_owned(), address.parse().unwrap())
}

/// Local addresses of all listening sockets of this thread's network namespace, one for each socket, sorted; the
/// addresses as the kernel writes them, with the socket's inode behind a blank.
fn listening() -> Vec<String> {
    let table = |name: &str| fs::read_to_string(format!("/proc/thread-self/net/{name}")).unwrap();
    let mut found = Vec::new();
    for line in table("tcp").lines().chain(table("tcp6").lines()) {
        let fields: Vec<&str> = line.split_whitespace().collect();
        if fields[3] == "0A" {
            found.push(format!("{} {}", fields[1], fields[9]));
        }
    }
    found.sort();
    found
}

/// Ends the load; nothing may have been lost. Old workers share their sockets with the new until they have stopped, so
/// that there are no strays to speak of.
fn end_lossless(load: Load) {
    let report = load.end();
    assert_eq!(report.lost(), 0, "{report}");
}

/// Says that it is ready and does nothing more.
const IDLE: &str = "
import os, signal, socket
s = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
s.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])
s.close()
signal.pause()
";

#[test]
fn the_protocol_is_kept_to_the_letter() {
    world(&[Need::Python, Need::Root], |world| {
        let mut app = App::new(world, ["python3", "-c", IDLE]).workers(2).bind_master();
        app.listen =
            vec![named("web", "127.0.0.1:8080"), named("a-6", "[::1]:8082"), named("m", "0.0.0.0:81")];
        let addresses = ["0100007F:1F90", "00000000000000000000000001000000:1F92", "00000000:0051"];
        let master = Master::start(world, &app);
        let mut inodes = Vec::new();
        for pid in master.serving() {
            let environment = fs::read_to_string(format!("/proc/{pid}/environ")).unwrap();
            let variable = |name: &str| {
                let mut values =
                    environment.split('\0').filter_map(|one| one.strip_prefix(name)?.strip_prefix('='));
                let value = values.next().map(str::to_owned);
                assert_eq!(values.next(), None, "{name} is there twice: {environment:?}");
                value.unwrap_or_else(|| panic!("no {name} in {environment:?}"))
            };
            assert_eq!(variable("LISTEN_PID"), pid.to_string());
            assert_eq!(variable("LISTEN_FDS"), "3");
            assert_eq!(variable("LISTEN_FDNAMES"), "web:a-6:m");
            let ports = "127.0.0.1:8080=3;[::1]:8082=4;0.0.0.0:81=5";
            assert_eq!(
                (variable("SERVER_STARTER_PORT").as_str(), variable("SERVER_STARTER_GENERATION").as_str()),
                (ports, "1")
            );
            assert_eq!(variable("REUSEPORTD_CHANNEL"), "6", "behind the sockets");
            let mut numbers: Vec<u32> = fs::read_dir(format!("/proc/{pid}/fd"))
                .unwrap()
                .map(|entry| entry.unwrap().file_name().to_str().unwrap().parse().unwrap())
                .collect();
            numbers.sort_unstable();
            assert_eq!(numbers, [0, 1, 2, 3, 4, 5, 6], "no other descriptor");
            for (number, address) in (3..).zip(addresses) {
                let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).unwrap();
                let inode =
                    link.to_str().unwrap().trim_start_matches("socket:[").trim_end_matches(']').to_owned();
                let wanted = format!("{address} {inode}");
                assert!(listening().contains(&wanted), "{number}: {wanted} is none of {:?}", listening());
                inodes.push(inode);
            }
        }
        inodes.sort();
        inodes.dedup();
        assert_eq!(
            (inodes.len(), listening().len()),
            (6, 6),
            "each seat has sockets of its own, and no one else"
        );
        master.stop();
        assert_eq!(listening(), [""; 0]);
    });
}

/// Workers that answer one connection after the other, and may be killed as often as one likes.
fn one_after_the_other(world: &World) -> App {
    let app = App::test_worker(world, &format!("{SLOW} --inline"));
    app.restart("breaker = { exits = 1000 }").restart("stable_after = \"1ms\"")
}

/// Bursts for those, replaced and killed under way.
fn upgrades_and_kills(world: &World, master: Master<'_>) {
    let load = Load::start(queues_of_twenty(world));
    let (upgrades, kills) = (rounds(5, 10), 5);
    for generation in 2..=upgrades + 1 {
        master.hup();
        load.answered_by(generation);
    }
    let waited = kill_the_fullest(&master, &load, kills);
    let report = load.end();
    assert!(waited >= 10 * kills, "queues were short: {waited}");
    let told = format!("{waited} waited: {report}\n{}", master.log());
    assert!(report.lost() <= u64::from(kills), "{kills} kills, {told}");
    assert_eq!(report.generations.len(), upgrades as usize + 1, "{told}");
    assert_eq!(master.counted_losses(), 0, "{told}");
    master.stop();
}

/// The same load, and workers whose queues die with them.
fn control_loses_queues(world: &World) {
    let control = Master::start(world, &one_at_a_time(world, "naive", "none"));
    let load = Load::start(queues_of_twenty(world));
    let waited = kill_the_fullest(&control, &load, 2);
    let report = load.end();
    assert!(report.lost() > 2, "the load shows nothing: {waited} waited, {report}");
    control.stop();
}

fn as_root(engine: &'static str) {
    world(needs_of(engine), |world| {
        upgrades_and_kills(world, Master::start(world, &one_after_the_other(world).engine(engine)));
        control_loses_queues(world);
    });
}

#[test]
fn upgrades_and_kills_ebpf() {
    as_root("ebpf");
}

#[test]
fn upgrades_and_kills_cbpf() {
    as_root("cbpf");
}

#[test]
fn upgrades_and_kills_without_any_capability() {
    world(&[Need::Root], |world| {
        // Copied by a process of its own, so that no descriptor of this one keeps it from being executed.
        let copy = |from: PathBuf, name: &str| {
            let to = world.path(name);
            tool(&format!("install -m 755 {} {}", from.display(), to.display()));
            to
        };
        chown(world.path(""), Some(UID), Some(UID)).unwrap();
        let program = copy(REUSEPORTD.into(), "reuseportd");
        let mut app = one_after_the_other(world);
        app.command[0] = copy(example("test_worker"), "worker").to_str().unwrap().to_owned();
        let master = Master::start_as(world, &app, program, UID);
        let status = fs::read_to_string(format!("/proc/{}/status", master.pid())).unwrap();
        assert!(status.contains("CapEff:\t0000000000000000"), "{status}");
        assert_eq!(master.status().listeners[0].engine, Engine::Cbpf);
        upgrades_and_kills(world, master);
    });
}

/// Slow clients besides, which workers hold while they are told to stop; beside it the naive control.
fn slow_clients_too(engine: &'static str) {
    world(needs_of(engine), |world| {
        let master = Master::start(world, &App::test_worker(world, SLOW).engine(engine));
        let load = Load::start(slow_accepts(world));
        for generation in 2..=rounds(5, 10) + 1 {
            master.hup();
            load.answered_by(generation);
        }
        end_lossless(load);
        master.stop();
        control_loses(world, slow_accepts(world), 4);
    });
}

#[test]
fn upgrades_with_slow_clients_ebpf() {
    slow_clients_too("ebpf");
}

#[test]
fn upgrades_with_slow_clients_cbpf() {
    slow_clients_too("cbpf");
}

#[test]
fn the_last_worker_is_killed_and_clients_wait() {
    world(&[Need::Bpf], |world| {
        for engine in ["ebpf", "cbpf"] {
            let (lost, counted) = only_worker_killed(world, "activated", engine);
            assert!(lost <= 2 && counted == 0, "{engine}: {lost} lost, {counted} counted");
        }
    });
}

/// One worker takes 250 a second, and in the end there is but one.
fn modest(world: &World) -> Spec {
    spec(world).rate(50.0).burst(30, Duration::from_millis(300)).slow(10)
}

fn seats_come_and_go(engine: &'static str) {
    world(&[needs_of(engine), &[Need::Root]].concat(), |world| {
        let mut app = App::test_worker(world, SLOW).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(modest(world));
        for (generation, workers) in (2..).zip([2, 5, 1]) {
            app.workers = workers;
            app.write();
            master.hup();
            load.answered_by(generation);
            let sockets = listening();
            assert_eq!(sockets.len(), workers as usize, "a socket for each seat: {sockets:?}");
        }
        load.answered(50);
        end_lossless(load);
        master.stop();
    });
}

#[test]
fn seats_come_and_go_ebpf() {
    seats_come_and_go("ebpf");
}

#[test]
fn seats_come_and_go_cbpf() {
    seats_come_and_go("cbpf");
}

fn failures_leave_nothing_behind(engine: &'static str) {
    world(&[needs_of(engine), &[Need::Root]].concat(), |world| {
        let app = App::test_worker(world, SLOW).workers(3).engine(engine);
        let master = Master::start(world, &app);
        let load = Load::start(modest(world));
        let (before, workers) = (listening(), master.serving());
        for (options, address, names) in [
            ("--fail exit-before-ready --code 7", "127.0.0.1:8081", "status 7"),
            ("--fail exit-after-listen --code 9", "[::1]:8081", "status 9"),
            ("--fail never-ready", "127.0.0.1:8081", "ready_timeout"),
            // Documentation's own, which no machine has.
            ("", "192.0.2.1:8081", "192.0.2.1:8081: Cannot assign requested address"),
        ] {
            let mut failing = app.clone().workers(6);
            failing.command = test_worker(&format!("{SLOW} {options}"));
            if names == "ready_timeout" {
                failing = failing.upgrade("ready_timeout = \"500ms\"");
            }
            failing.listen.push(named("second", address));
            failing.write();
            let (code, receipt) = master.failing_upgrade();
            let reason = receipt.reason.unwrap_or_default();
            assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{options}: {reason}");
            assert!(reason.contains("seat") && reason.contains(names), "{options}: {reason}");
            master.wait_status(&format!("without the sockets of {options:?}: {before:?}"), |status| {
                status.generations.len() == 1 && listening() == before
            });
            assert_eq!(master.serving(), workers, "the old generation has been touched");
        }
        app.write();
        master.upgrade();
        load.answered(50);
        end_lossless(load);
        assert_eq!(listening(), before, "the sockets outlive their workers");
        master.stop();
    });
}

#[test]
fn failures_leave_nothing_behind_ebpf() {
    failures_leave_nothing_behind("ebpf");
}

#[test]
fn failures_leave_nothing_behind_cbpf() {
    failures_leave_nothing_behind("cbpf");
}

/// From workers that bind to sockets of the master, and back.
fn the_maker_changes(engine: &'static str, mode: &str) {
    world(&[needs_of(engine), &[Need::Root]].concat(), |world| {
        let by_worker = App::test_worker(world, &format!("--mode {mode} --accept-delay 4")).engine(engine);
        let by_master = App::test_worker(world, SLOW).engine(engine);
        let master = Master::start(world, &by_worker);
        let load = Load::start(slow_accepts(world));
        for (generation, app) in (2..).zip([&by_master, &by_worker, &by_master, &by_worker]) {
            app.write();
            master.hup();
            load.answered_by(generation);
            assert_eq!(listening().len(), 4, "{:?}", listening());
        }
        load.answered(100);
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn the_maker_changes_unmodified_ebpf() {
    the_maker_changes("ebpf", "plain");
}

#[test]
fn the_maker_changes_unmodified_cbpf() {
    the_maker_changes("cbpf", "plain");
}

#[test]
fn the_maker_changes_sdk_ebpf() {
    the_maker_changes("ebpf", "sdk");
}

#[test]
fn the_maker_changes_sdk_cbpf() {
    the_maker_changes("cbpf", "sdk");
}

/// One listener is the worker's own, the other the master's.
#[test]
fn both_makers_in_one_app() {
    world(&[Need::Bpf, Need::Root], |world| {
        for engine in ["ebpf", "cbpf"] {
            let mut app = App::test_worker(world, SLOW).workers(2).engine(engine);
            app.listen.push(named("passed", "127.0.0.1:8081"));
            app.listen_lines = vec![(Some("passed"), "bind = \"master\"")];
            let master = Master::start(world, &app);
            let load = Load::start(modest(world));
            let mut other = modest(world);
            other.target = app.listen[1].1;
            let other = load.beside(other);
            for generation in 2..=3 {
                master.hup();
                load.answered_by(generation);
                other.answered_by(generation);
            }
            load.end_lossless();
            end_lossless(other);
            master.stop();
        }
    });
}

#[test]
fn a_silent_worker_is_ready_when_it_accepts() {
    world(&[Need::Bpf], |world| {
        let silent = |options: &str| {
            let app = App::test_worker(world, &format!("{SLOW} --no-notify {options}"));
            app.engine("ebpf").readiness("listen")
        };
        let master = Master::start(world, &silent(""));
        let load = Load::start(slow_accepts(world));
        for _ in 0..2 {
            master.upgrade();
            load.answered(50);
        }
        // It has the sockets, which listen, but never accepts.
        silent("--fail never-ready").upgrade("ready_timeout = \"1s\"").write();
        let (code, receipt) = master.failing_upgrade();
        let reason = receipt.reason.unwrap_or_default();
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{reason}");
        assert!(reason.contains("accepts no connection"), "{reason}");
        load.answered(50);
        end_lossless(load);
        master.stop();
    });
}

/// The old worker of the seat accepts from all of them as well, and takes every other connection made to prove the new.
#[test]
fn each_listener_is_proven_for_itself() {
    world(&[Need::Bpf, Need::Root], |world| {
        let mut app = App::test_worker(world, "--mode activated --no-notify").workers(1);
        app.listen.extend(
            (1..12).map(|number| named(&format!("n{number}"), &format!("127.0.0.1:{}", 8080 + number))),
        );
        let master = Master::start(world, &app.engine("ebpf").readiness("listen"));
        for _ in 0..2 {
            master.upgrade();
        }
        master.stop();
    });
}

#[test]
fn listening_shows_nothing_with_cbpf() {
    world(&[], |world| {
        let notifying = App::test_worker(world, SLOW).engine("cbpf");
        let silent = notifying.clone().readiness("listen");
        let words = ["readiness.method = \"listen\"", "bind = \"master\"", "ebpf", "CAP_BPF"];
        let mut master = Master::launch(world, &silent, Command::new(REUSEPORTD));
        assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
        for word in words {
            assert!(master.log().replace("\\\"", "\"").contains(word), "{word}: {}", master.log());
        }
        drop(master);

        let master = Master::start(world, &notifying);
        silent.write();
        let (code, receipt) = master.failing_upgrade();
        let reason = receipt.reason.unwrap_or_default();
        assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{reason}");
        for word in words {
            assert!(reason.contains(word), "{word}: {reason}");
        }
        assert_eq!(master.status().active_generation, Some(1));
        master.stop();
    });
}
