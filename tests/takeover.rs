//! Servers that were started without this program are taken over from without a loss, or left as they were.

mod refused;
mod server;

use std::fs;
use std::io::{Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::process::Command;
use std::time::{Duration, Instant};

use nix::sys::stat::Mode;
use reuseportd_bench::{Report, Spec};
use reuseportd_wire::status::{GenerationState, MasterState, Outcome, Trigger};
use rustix::process::Signal;

use self::server::{Server, python};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::gate::Gate;
use crate::support::load::{Load, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::{keepers_of, kill, processes_of};
use crate::support::world::{Need, World, world};

/// Of the Python server: 1,600 connections a second.
const PROCESSES: u32 = 8;
const NGINX: Need = Need::Runs("nginx", &["-v"]);

/// Two thirds of what that can take, half of it in bursts.
fn busy(world: &World) -> Spec {
    spec(world).rate(500.0).burst(100, Duration::from_millis(200))
}

/// The service that takes over.
fn app(world: &World, options: &str) -> App {
    App::test_worker(world, &format!("--mode plain {options}")).readiness("listen")
}

fn take_over<'a>(world: &'a World, app: &App, pid: u32) -> Master<'a> {
    let mut command = Command::new(REUSEPORTD);
    command.args(["takeover", "--pid", &pid.to_string()]);
    Master::launch(world, app, command)
}

/// One that takes over, and comes to this state.
fn takes_over<'a>(world: &'a World, app: &App, pid: u32, state: MasterState) -> Master<'a> {
    let master = take_over(world, app, pid);
    let deadline = Instant::now() + PATIENCE;
    while master.cli("status").code != 0 {
        assert!(Instant::now() < deadline, "it does not answer:\n{}", master.log());
    }
    master.wait_status("there", |status| status.state == state);
    master
}

/// Nothing is lost by the takeover.
fn taken_over(world: &World, app: &App, server: Server, load: Spec) -> Report {
    let load = Load::start(load);
    load.heard_from(0);
    let mut master = take_over(world, app, server.pid());
    master.wait_ready();
    load.answered_by(1);
    server.wait_end();
    let status = master.wait_status("steady", |status| status.generations.len() == 1);
    let receipt = status.last_upgrade.expect("a receipt");
    assert_eq!((receipt.from, receipt.to, receipt.trigger), (Some(0), Some(1), Trigger::Takeover));
    assert_eq!((receipt.outcome, receipt.forced_kills), (Outcome::Completed, 0), "{receipt:#?}");
    assert_eq!(status.state, MasterState::Steady);
    // It is a service like any other now.
    master.upgrade();
    load.answered_by(2);
    let report = load.end_lossless();
    master.stop();
    report
}

#[test]
fn a_python_server_is_taken_over_from() {
    world(&[Need::Bpf, Need::Python], |world| {
        let server = Server::python(world, PROCESSES, &[]);
        taken_over(world, &app(world, "--accept-delay 2"), server, busy(world));
        // The naive way: end one, start the other.
        let server = Server::python(world, PROCESSES, &[]);
        let load = Load::start(busy(world));
        load.heard_from(0);
        server.signal(Signal::TERM);
        server.wait_end();
        let master = Master::start(world, &app(world, ""));
        load.answered_by(1);
        let report = load.end();
        assert!(report.lost() > 0, "the load shows nothing, the control loses nothing either: {report}");
        master.stop();
    });
}

fn nginx_is_taken_over_from(options: &str) {
    world(&[Need::Root, Need::Bpf, NGINX], |world| {
        let server = Server::nginx(world, options);
        let app = app(world, "").app("stop_signal = \"SIGQUIT\"");
        let load = spec(world).rate(500.0).burst(100, Duration::from_millis(200)).slow(20);
        taken_over(world, &app, server, load);
    });
}

#[test]
fn nginx_with_one_listener_is_taken_over_from() {
    nginx_is_taken_over_from("");
}

#[test]
fn nginx_with_a_listener_for_each_worker_is_taken_over_from() {
    nginx_is_taken_over_from("reuseport");
}

/// The takeover comes to nothing, and nobody notices.
fn comes_to_nothing(
    world: &World,
    app: &App,
    reason: &str,
    state: Option<MasterState>,
    act: impl FnOnce(&Master, &Load),
) {
    let mut server = Server::python(world, PROCESSES, &[]);
    let load = Load::start(busy(world));
    let mut master = match state {
        Some(state) => takes_over(world, app, server.pid(), state),
        None => take_over(world, app, server.pid()),
    };
    act(&master, &load);
    assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
    let (log, told) = (master.log(), master.upstream.told());
    assert!(log.contains(reason) && log.contains("event=\"let_go\""), "{reason}: {log}");
    assert!(!told.iter().any(|line| line == "READY=1"), "{told:?}");
    master.ended(1);
    server.assert_untouched();
    load.answered(300);
    server.assert_untouched();
    let report = load.end();
    assert_eq!(report.lost(), 0, "{report}");
}

#[test]
fn a_first_generation_that_fails_leaves_the_server_as_it_was() {
    world(&[Need::Bpf, Need::Python], |world| {
        for (options, reason) in [
            ("--fail exit-before-ready", "before its generation served"),
            ("--fail never-ready", "was not ready in time"),
            ("--fail no-reuseport", "before its generation served"),
        ] {
            let app = app(world, options).upgrade("ready_timeout = \"500ms\"");
            comes_to_nothing(world, &app, reason, None, |_, _| {});
        }
    });
}

#[test]
fn the_server_gets_everything_back_when_a_check_fails() {
    world(&[Need::Bpf, Need::Python], |world| {
        let gate = Gate::new(world);
        let bake = app(world, "--accept-delay 2").upgrade("bake = \"10m\"");
        comes_to_nothing(
            world,
            &gate.guards(bake, "10m"),
            "upgrade.check",
            Some(MasterState::Baking),
            |master, load| {
                let status = master.status();
                let old = &status.generations[0];
                assert_eq!((old.generation, old.state), (0, GenerationState::Standby), "{status:#?}");
                assert_eq!(old.workers.len(), 1);
                load.answered_by(1);
                load.answered(500);
                gate.answer(1, 1);
            },
        );
        let canary = app(world, "--accept-delay 2").upgrade("canary = [{ share = \"30%\", hold = \"10m\" }]");
        comes_to_nothing(world, &canary, "taken back", Some(MasterState::Canary), |master, load| {
            load.heard_from(1);
            master.cli("rollback");
        });
    });
}

#[test]
fn a_master_that_is_stopped_before_it_serves_leaves_the_server_as_it_was() {
    world(&[Need::Bpf, Need::Python], |world| {
        let launching = app(world, "--fail never-ready").upgrade("ready_timeout = \"10m\"");
        let baking = app(world, "").upgrade("bake = \"10m\"");
        // At SIGQUIT workers are killed, with what they have accepted.
        for (app, state, signal) in [
            (&launching, MasterState::Launching, Signal::TERM),
            (&launching, MasterState::Launching, Signal::QUIT),
            (&baking, MasterState::Baking, Signal::TERM),
        ] {
            comes_to_nothing(world, app, "the master is stopping", Some(state), |master, _| {
                master.signal(signal);
            });
        }
    });
}

/// Clients that wait at a server that ends wait for the first generation.
#[test]
fn a_server_that_ends_by_itself_is_replaced_all_the_same() {
    world(&[Need::Bpf, Need::Python], |world| {
        let gate = world.path("gate");
        nix::unistd::mkfifo(&gate, Mode::from_bits_truncate(0o600)).unwrap();
        let script = format!("read go <{} && exec {}", gate.display(), test_worker("--mode plain").join(" "));
        let app = App::new(world, ["/bin/sh", "-c", &script]).readiness("listen").workers(1);
        let mut server = Server::python(world, 1, &[]);
        let mut master = takes_over(world, &app, server.pid(), MasterState::Launching);
        server.freeze();
        let clients: Vec<TcpStream> = (0..100).map(|_| TcpStream::connect(world.address).unwrap()).collect();
        kill(server.pids());
        assert!(!server.lives());
        master.wait_status("alone", |status| status.state == MasterState::Starting);
        fs::write(&gate, "go\n").unwrap();
        master.wait_ready();
        for mut client in clients {
            client.write_all(b"GET / HTTP/1.0\r\n\r\n").unwrap();
            let mut answer = String::new();
            client.read_to_string(&mut answer).unwrap();
            assert!(answer.contains("generation=1"), "{answer}");
        }
        let receipt = master.status().last_upgrade.unwrap();
        assert_eq!((receipt.from, receipt.outcome), (Some(0), Outcome::Completed), "{receipt:#?}");
        master.stop();
    });
}

/// The next master goes on where the killed one was, with the server as the generation before the first.
#[test]
fn a_killed_master_is_followed_by_one_that_goes_on() {
    world(&[Need::Bpf, Need::Python], |world| {
        for status in [0, 1] {
            let gate = Gate::new(world);
            let app = gate.guards(app(world, "--accept-delay 2").upgrade("bake = \"500ms\""), "10m");
            let mut server = Server::python(world, PROCESSES, &[]);
            let load = Load::start(busy(world));
            let mut master = takes_over(world, &app, server.pid(), MasterState::Baking);
            gate.begun(&master, 1);
            master.signal(Signal::USR2);
            master.wait_status("reexec", |status| status.master.reexecs == 1);
            master.kill();
            load.answered(200);
            master.restart();
            master.wait_adopted();
            gate.begun(&master, 2);
            let told = master.upstream.told();
            assert!(!told.iter().any(|line| line == "READY=1"), "{told:?}");
            gate.answer(2, status);
            if status == 0 {
                master.wait_ready();
                load.answered_by(1);
                server.wait_end();
                load.end_lossless();
                master.stop();
            } else {
                master.ended(1);
                server.assert_untouched();
                load.answered(300);
                assert_eq!(load.end().lost(), 0);
            }
            fs::remove_file(world.path("answers")).unwrap();
        }
    });
}

/// With its keeper gone as well all that serve are orphans, the server among them, and are replaced.
#[test]
fn when_master_and_keeper_are_killed_the_next_one_ends_the_takeover() {
    world(&[Need::Bpf, Need::Python], |world| {
        let server = Server::python(world, PROCESSES, &[]);
        let load = Load::start(busy(world));
        let bake = app(world, "--accept-delay 2").upgrade("bake = \"10m\"");
        let mut master = takes_over(world, &bake, server.pid(), MasterState::Baking);
        master.signal(Signal::STOP);
        kill(keepers_of(&world.app));
        master.kill();
        load.answered(200);
        app(world, "--accept-delay 2").write();
        master.restart();
        load.heard_from(2);
        server.wait_end();
        master.wait_status("steady", |status| status.generations.len() == 1);
        load.answered_by(2);
        load.end_lossless();
        master.stop();
    });
}

/// It is none of those that the master has left behind.
#[test]
fn the_server_outlives_what_is_left_behind() {
    world(&[Need::Bpf, Need::Python], |world| {
        let mut server = Server::python(world, PROCESSES, &[]);
        let bake = app(world, "").upgrade("bake = \"10m\"");
        let mut master = takes_over(world, &bake, server.pid(), MasterState::Baking);
        master.signal(Signal::STOP);
        kill(keepers_of(&world.app));
        master.kill();
        assert_eq!(master.cli("stop --left-behind").code, 0);
        assert_eq!(processes_of(&world.app), []);
        assert!(server.lives());
        let load = Load::start(busy(world));
        load.answered(300);
        let report = load.end_lossless();
        assert_eq!(report.generations.keys().copied().collect::<Vec<_>>(), [0], "{report}");
    });
}

/// Like nginx with `listen [::]:80 ipv6only=off`.
#[test]
fn a_dual_stack_server_is_taken_over_from() {
    world(&[Need::Root, Need::Bpf, Need::Python], |world| {
        let address = SocketAddr::from((Ipv6Addr::UNSPECIFIED, world.address.port()));
        let mut command = python(PROCESSES);
        command.arg(address.to_string());
        let server = Server::start(world, command);
        let mut app = app(world, "--accept-delay 2");
        app.listen[0].1 = address;
        taken_over(world, &app, server, busy(world));
    });
}
