//! The end of the service: nothing is left behind, and what was begun is finished where that was asked for.

use std::io::Read;
use std::process::Command;
use std::time::Duration;

use reuseportd_wire::status::MasterState;
use rustix::process::Signal;

use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::client::{answer, open};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::Running;
use crate::support::world::world;

#[test]
fn every_stop_signal_leaves_nothing_behind() {
    world(&[], |world| {
        for signal in [Signal::TERM, Signal::INT, Signal::QUIT] {
            for mode in ["sdk", "plain"] {
                let master = Master::start(world, &App::test_worker(world, &format!("--mode {mode}")));
                master.signal(signal);
                master.ended(0);
            }
        }
    });
}

#[test]
fn a_graceful_stop_finishes_open_connections() {
    world(&[], |world| {
        for mode in ["sdk", "plain"] {
            let app = App::test_worker(world, &format!("--mode {mode}")).upgrade("stop_when = \"drained\"");
            let master = Master::start(world, &app);
            let client = open(world);
            master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
            master.signal(Signal::TERM);
            master.wait_status("stopping", |status| status.state == MasterState::Stopping);
            assert!(answer(client).contains("generation=1"), "{mode}");
            master.ended(0);
        }
    });
}

#[test]
fn a_second_signal_means_at_once() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk").upgrade("drain_timeout = \"1h\"");
        for (first, second) in
            [(Signal::TERM, Signal::TERM), (Signal::TERM, Signal::INT), (Signal::INT, Signal::QUIT)]
        {
            let mut master = Master::start(world, &app);
            let _client = open(world);
            master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
            master.signal(first);
            master.wait_status("stopping", |status| status.state == MasterState::Stopping);
            assert_eq!(
                master.wait_end(Duration::from_millis(300)),
                None,
                "an open connection is not waited for"
            );
            master.signal(second);
            master.ended(0);
        }
    });
}

#[test]
fn an_open_connection_is_cut_at_the_drain_timeout() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk").upgrade("drain_timeout = \"200ms\"");
        let master = Master::start(world, &app);
        let mut client = open(world);
        master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
        master.signal(Signal::TERM);
        master.ended(0);
        assert!(client.read_to_string(&mut String::new()).map_or(true, |length| length == 0));
    });
}

#[test]
fn stop_during_an_upgrade_takes_both_generations() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        let master = Master::start(world, &app);
        app.command = crate::support::app::test_worker("--mode plain --fail never-ready");
        app.write();
        let upgrade = master.begin("upgrade --wait");
        master.wait_status("launching", |status| status.state == MasterState::Launching);
        let stop = master.begin("stop --wait");
        let done = upgrade.finish(PATIENCE);
        assert_eq!(done.code, 1, "{done:#?}");
        assert_eq!(stop.finish(PATIENCE).code, 0);
        master.ended(0);
    });
}

#[test]
fn a_first_generation_that_fails_ends_the_master_with_the_reason() {
    world(&[], |world| {
        let failures = [
            (
                "--mode plain --fail exit-before-ready --code 7 --print no-such-database",
                ["status 7", "no-such-database"],
            ),
            (
                "--mode sdk --fail exit-before-ready --code 8 --print no-such-table",
                ["status 8", "no-such-table"],
            ),
            ("--mode plain --fail wrong-address", ["seat", "listen"]),
            ("--mode plain --fail never-ready", ["seat", "not ready"]),
        ];
        for (options, names) in failures {
            let mut app = App::test_worker(world, options);
            if names.contains(&"not ready") {
                app = app.upgrade("ready_timeout = \"1s\"");
            }
            let master = Master::launch(world, &app, Command::new(REUSEPORTD));
            let log = world.path("master.log");
            master.ended(1);
            let log = std::fs::read_to_string(log).unwrap();
            for name in names {
                assert!(log.contains(name), "{options}: {name:?} is not told: {log}");
            }
        }
    });
}

#[test]
fn a_second_master_for_the_same_app_is_refused() {
    world(&[], |world| {
        let app = App::test_worker(world, "--mode plain");
        let master = Master::start(world, &app);
        let mut command = Command::new(REUSEPORTD);
        command.arg("--config").arg(&app.path).env_remove("NOTIFY_SOCKET");
        let second = Running::start(command).finish(PATIENCE);
        assert_eq!(second.code, 1, "{second:#?}");
        let told = second.stdout + &second.stderr;
        assert!(told.contains(&master.pid().to_string()) || told.contains("another master"), "{told}");
        assert_eq!(master.serving().len(), 4, "the first master goes on");
        master.stop();
    });
}
