//! The two notify sockets: the service manager's, which the master speaks to, and its own, which it listens to.

use std::os::unix::net::UnixDatagram;

use reuseportd_wire::status::Outcome;
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::master::Master;
use crate::support::world::world;

/// Microseconds of CLOCK_MONOTONIC.
fn monotonic_us() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000 + now.tv_nsec.cast_unsigned() / 1000
}

#[test]
fn the_service_manager_hears_everything() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(2));
        let before = monotonic_us();
        let mark = master.upstream.mark();
        master.hup();
        let told = master.upstream.told().split_off(mark);
        let reloading = told.iter().find(|datagram| datagram.lines().any(|line| line == "RELOADING=1"));
        let reloading = reloading.expect("seen by hup()");
        let since = reloading.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
        let since: u64 = since.unwrap_or_else(|| panic!("not in one datagram: {told:#?}")).parse().unwrap();
        assert!(
            (before..=monotonic_us()).contains(&since),
            "{since} is not the time of the reload, after {before}"
        );
        assert!(told.iter().any(|datagram| datagram.contains("EXTEND_TIMEOUT_USEC=")), "{told:#?}");
        for word in ["generation 2", "retiring"] {
            assert!(
                told.iter().any(|one| one.contains("STATUS=") && one.contains(word)),
                "{word:?} in {told:#?}"
            );
        }
        let mark = master.upstream.mark();
        master.signal(Signal::TERM);
        assert!(
            master.upstream.wait(mark, "STOPPING=1", PATIENCE).is_some(),
            "{:#?}",
            master.upstream.told()
        );
        master.ended(0);
    });
}

#[test]
fn a_reload_that_fails_is_over_too() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        let master = Master::start(world, &app);
        let mark = master.upstream.mark();
        app.command = test_worker("--mode plain --fail exit-before-ready --code 7");
        app.write();
        master.hup();
        app.write_invalid();
        master.hup();
        let told = master.upstream.told().split_off(mark).join("\n");
        assert!(told.contains("status 7") && told.contains("nonsense"), "{told}");
        assert_eq!(master.status().active_generation, Some(1));
        app.command = test_worker("--mode plain");
        app.write();
        master.hup();
        assert_ne!(master.status().active_generation, Some(1));
        master.stop();
    });
}

/// Where a worker of the newest generation sends its notifications.
fn notify_socket(pid: u32) -> String {
    let environment = std::fs::read(format!("/proc/{pid}/environ")).unwrap();
    let text = String::from_utf8(environment).unwrap();
    text.split('\0').find_map(|variable| variable.strip_prefix("NOTIFY_SOCKET=")).unwrap().to_owned()
}

#[test]
fn a_strangers_ready_does_not_count() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        let master = Master::start(world, &app);
        app.command = test_worker("--mode plain --no-notify");
        app.upgrade("ready_timeout = \"3s\"").write();
        let upgrade = master.begin("upgrade --wait --json");
        let status = master.wait_status("started", |status| {
            status.generations.get(1).is_some_and(|generation| generation.workers[0].pid.is_some())
        });
        let socket = notify_socket(status.generations[1].workers[0].pid.unwrap());
        let stranger = UnixDatagram::unbound().unwrap();
        for words in ["READY=1", "STATUS=all is well", "", "\0\0", "READY=1\nMAINPID=1"] {
            stranger.send_to(words.as_bytes(), &socket).unwrap();
        }
        // Nor does that of a sibling: the active generation's worker stands for one that is ready.
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
        master.stop();
    });
}

#[test]
fn a_child_of_the_worker_may_say_ready() {
    world(&[], |world| {
        let script = "\"$0\" \"$@\" & wait";
        let mut command = vec!["/bin/sh".to_owned(), "-c".to_owned(), script.to_owned()];
        command.extend(test_worker("--mode plain"));
        let master = Master::start(world, &App::new(world, command).workers(1));
        master.stop();
    });
}

#[test]
fn a_flood_of_notifications_is_survived() {
    world(&[], |world| {
        let master = Master::start(world, &App::test_worker(world, "--mode plain").workers(1));
        let socket = notify_socket(master.serving()[0]);
        let stranger = UnixDatagram::unbound().unwrap();
        stranger.set_nonblocking(true).unwrap();
        for _ in 0..20_000 {
            // A full socket drops; that is its business.
            let _ = stranger.send_to(b"READY=1\nSTATUS=flood\n", &socket);
        }
        master.upgrade();
        assert_eq!(master.status().generations[0].workers[0].status, None);
        master.stop();
    });
}
