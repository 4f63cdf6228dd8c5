//! When a worker counts as ready, and what happens to wishes that come meanwhile.

use std::time::{Duration, Instant};

use reuseportd_wire::status::{MasterState, Outcome};

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::world::{Need, repository, world};

#[test]
fn a_silent_program_is_ready_when_it_accepts() {
    world(&[Need::Python], |world| {
        let program = repository("examples/echo.py");
        let command = ["python3", program.to_str().unwrap(), "{port.default}"];
        let app = App::new(world, command).readiness("listen").workers(2);
        let master = Master::start(world, &app);
        let load = Load::start(spec(world).echo().rate(100.0).slow(5));
        for _ in 0..2 {
            master.upgrade();
            load.answered(20);
        }
        load.end_lossless();
        master.stop();
    });
}

/// Says what it has to say and closes, without waiting for a word.
const CURT: &str = "
import socket, sys
s = socket.socket()
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.bind(('127.0.0.1', int(sys.argv[1])))
s.listen(1024)
while True:
    c = s.accept()[0]
    c.sendall(b'no\\n')
    c.close()
";

#[test]
fn a_silent_program_that_closes_at_once_has_accepted() {
    world(&[Need::Python, Need::Bpf], |world| {
        let app =
            App::new(world, ["python3", "-c", CURT, "{port.default}"]).engine("ebpf").readiness("listen");
        let master = Master::start(world, &app.workers(2));
        master.upgrade();
        master.stop();
    });
}

#[test]
fn a_worker_without_the_sdk_speaks_the_channel() {
    world(&[Need::Python], |world| {
        let program = repository("examples/raw_worker.py");
        let app = App::new(world, ["python3", program.to_str().unwrap()]).workers(2);
        let master = Master::start(world, &app);
        let load = Load::start(spec(world).echo().rate(100.0).slow(5));
        for _ in 0..2 {
            master.upgrade();
            load.answered(20);
        }
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn the_examples_run() {
    world(&[], |world| {
        for (name, is_echo) in [("echo", true), ("http_tokio", false)] {
            let program = crate::support::world::example(name);
            let master = Master::start(world, &App::new(world, [program.to_str().unwrap()]).workers(2));
            let load = spec(world).rate(100.0).slow(5);
            let load = Load::start(if is_echo {
                load.echo()
            } else {
                load.keep_alive(5, Duration::from_millis(20))
            });
            master.upgrade();
            load.answered(50);
            load.end_lossless();
            master.stop();
        }
    });
}

#[test]
fn listening_is_not_ready() {
    world(&[Need::Bpf], |world| {
        // It listens, and says READY=1 only 700 ms later.
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        let master = Master::start(world, &app);
        app.command = test_worker("--mode plain --ready-delay 700");
        app.write();
        let load = Load::start(spec(world).rate(200.0));
        let begun = Instant::now();
        assert_eq!(master.cli("upgrade --wait").code, 0);
        load.answered_by(2);
        let begun = begun.duration_since(load.started());
        let report = load.end_lossless();
        let first = Duration::from_micros(report.generations[&2].first_us);
        assert!(first >= begun + Duration::from_millis(700), "asked at {begun:?}, first answer at {first:?}");
        master.stop();
    });
}

#[test]
fn several_listeners_and_both_families() {
    world(&[Need::Root], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(2);
        app.listen = vec![
            ("first".into(), world.address),
            ("second".into(), "127.0.0.1:8081".parse().unwrap()),
            ("sixth".into(), "[::1]:8082".parse().unwrap()),
        ];
        for mode in ["plain", "sdk"] {
            app.command = test_worker(&format!("--mode {mode}"));
            let master = Master::start(world, &app);
            for (_, address) in &app.listen {
                let mut other = spec(world).rate(100.0);
                other.target = *address;
                let load = Load::start(other);
                master.upgrade();
                load.answered(20);
                load.end_lossless();
            }
            let status = master.status();
            assert_eq!(status.listeners.len(), 3, "{status:#?}");
            assert!(
                status.generations[0].workers.iter().all(|worker| worker.listeners.len() == 3),
                "{status:#?}"
            );
            master.stop();
        }
    });
}

/// Echoes on a dual-stack socket, whatever it is asked for.
const DUAL_STACK: &str = "
import socket, sys
s = socket.socket(socket.AF_INET6)
s.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
s.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
s.bind(('::', int(sys.argv[1])))
s.listen(1024)
while True:
    c = s.accept()[0]
    c.sendall(c.recv(4096).upper())
    c.close()
";

#[test]
fn a_dual_stack_listener_serves_an_ipv4_address() {
    world(&[Need::Python, Need::Root], |world| {
        for engine in ["ebpf", "cbpf"] {
            let mut app =
                App::new(world, ["python3", "-c", DUAL_STACK, "{port.default}"]).engine(engine).workers(2);
            app.listen[0].1.set_ip(std::net::Ipv4Addr::UNSPECIFIED.into());
            let master = Master::start(world, &app.readiness("listen"));
            let load = Load::start(spec(world).echo().rate(100.0));
            master.upgrade();
            load.answered(20);
            load.end_lossless();
            master.stop();
        }
    });
}

#[test]
fn a_worker_with_several_listeners_on_one_address() {
    world(&[Need::Bpf], |world| {
        for engine in ["ebpf", "cbpf"] {
            let app = App::test_worker(world, "--mode plain --threads 3 --accept-delay 5")
                .workers(2)
                .engine(engine);
            let master = Master::start(world, &app);
            let load = Load::start(spec(world).rate(200.0).burst(60, Duration::from_millis(300)));
            master.upgrade();
            load.answered(100);
            load.end_lossless();
            master.stop();
        }
    });
}

#[test]
fn wishes_during_an_upgrade_are_remembered_once() {
    world(&[], |world| {
        let mut app = App::test_worker(world, "--mode plain").workers(1);
        let master = Master::start(world, &app);
        // All wishes come before it is ready.
        app.command = test_worker("--mode plain --ready-delay 2500");
        app.write();
        let first = master.begin("upgrade --wait --json");
        master.wait_status("launching", |status| status.state == MasterState::Launching);
        let others = [(); 3].map(|()| master.begin("upgrade --wait --json"));
        let (code, receipt) = master.receipt(first.finish(PATIENCE));
        assert_eq!((code, receipt.to), (0, Some(2)));
        for other in others {
            let (code, receipt) = master.receipt(other.finish(PATIENCE));
            assert_eq!((code, receipt.to, receipt.outcome), (0, Some(3), Outcome::Completed), "{receipt:#?}");
        }
        assert_eq!(master.status().active_generation, Some(3));
        master.stop();
    });
}

#[test]
fn an_upgrade_waits_for_a_place_among_the_draining() {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk").workers(1).upgrade("max_draining = 1");
        let master = Master::start(world, &app);
        let mut held = TcpStream::connect(world.address).unwrap();
        held.set_read_timeout(Some(PATIENCE)).unwrap();
        held.write_all(b"half").unwrap();
        master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
        assert_eq!(master.cli("upgrade --wait").code, 0, "open connections do not hold up the operator");
        let mut second = master.begin("upgrade --wait --json");
        master.wait_status("launching", |status| status.state == MasterState::Launching);
        let status = master.status();
        assert!(second.is_running() && status.generations.len() == 3, "{status:#?}");
        assert_eq!(status.generations[2].workers.iter().filter(|worker| worker.pid.is_some()).count(), 0);
        held.write_all(b" a line\n").unwrap();
        let mut answer = String::new();
        held.read_to_string(&mut answer).unwrap();
        assert!(answer.contains("generation=1"), "{answer}");
        let (code, receipt) = master.receipt(second.finish(PATIENCE));
        assert_eq!((code, receipt.to), (0, Some(3)));
        master.stop();
    });
}

#[test]
fn a_forced_upgrade_ends_the_oldest_of_the_draining() {
    use std::io::{Read, Write};
    use std::net::TcpStream;
    world(&[], |world| {
        let app = App::test_worker(world, "--mode sdk").workers(1).upgrade("max_draining = 1");
        let master = Master::start(world, &app);
        let mut held = TcpStream::connect(world.address).unwrap();
        held.write_all(b"half").unwrap();
        master.wait_status("accepted", |status| status.generations[0].connections == Some(1));
        assert_eq!(master.cli("upgrade --wait").code, 0);
        let first = master.status().last_upgrade.unwrap();
        assert_eq!((first.forced_kills, first.to), (0, Some(2)));
        let (code, receipt) = master.receipt(master.cli("upgrade --wait --force --json"));
        assert_eq!((code, receipt.to), (0, Some(3)));
        held.set_read_timeout(Some(PATIENCE)).unwrap();
        let cut = held.read(&mut [0; 16]);
        assert!(matches!(cut, Ok(0) | Err(_)), "still served: {cut:?}");
        master.stop();
    });
}
