//! Without affinity: what is sent after the switch goes to the new generation, and what was sent before is answered by the
//! old one.

use std::process::Command;
use std::time::Duration;

use reuseportd_wire::status::Outcome;

use super::bursts::Bursts;
use super::{Program, app, upgrade};
use crate::support::app::{App, test_worker};
use crate::support::flows::{Flows, spec};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::world::{Need, World, needs_of, world};
use crate::support::{PATIENCE, rounds};

/// Two milliseconds for each datagram: a burst waits for a tenth of a second.
const SLOW: &str = "--receive-delay 2";
const SDK: &str = "--mode sdk --receive-delay 2";
/// What waits when it is told to stop, it drops.
const UNMODIFIED: &str = "--mode plain --receive-delay 2";
const PASSED: &str = "--mode activated --receive-delay 2";

/// Upgrades under bursts, and the naive control under the same, which must lose.
fn upgrades_lose_nothing(world: &World, app: &App) {
    let master = Master::start(world, app);
    let bursts = Bursts::start(world, PATIENCE);
    let upgrades = rounds(5, 20);
    for generation in 2..=upgrades + 1 {
        let receipt = master.upgrade();
        assert_eq!((receipt.to, receipt.forced_kills), (Some(generation), 0), "{receipt:#?}");
        bursts.answered_by(generation);
    }
    let sum = bursts.end_lossless();
    assert_eq!(sum.generations.len(), upgrades as usize + 1, "{sum:?}");
    eprintln!("{:?} {}: {sum:?}", app.command, app.engine);
    master.stop();
}

/// Steering off, and workers that drop what waits when they are told to stop: the load must show it.
fn control_loses(world: &World) {
    let naive = app(world, Program::Difficult("--mode naive --receive-delay 2"), "none");
    let master = Master::start(world, &naive.upgrade("stop_when = \"drained\""));
    let bursts = Bursts::start(world, Duration::from_secs(1));
    for _ in 0..2 {
        master.hup();
        bursts.answered(100);
    }
    let sum = bursts.end();
    assert!(sum.lost > 0, "the load shows nothing, the naive control loses nothing either: {sum:?}");
    master.stop();
}

fn lossless(engine: &'static str, options: &'static str) {
    world(needs_of(engine), |world| {
        upgrades_lose_nothing(world, &app(world, Program::Difficult(options), engine));
        control_loses(world);
    });
}

#[test]
fn upgrades_sdk_ebpf() {
    lossless("ebpf", SDK);
}

#[test]
fn upgrades_sdk_cbpf() {
    lossless("cbpf", SDK);
}

#[test]
fn upgrades_unmodified_ebpf() {
    lossless("ebpf", UNMODIFIED);
}

#[test]
fn upgrades_unmodified_cbpf() {
    lossless("cbpf", UNMODIFIED);
}

/// One worker after the other has the socket.
#[test]
fn upgrades_with_sockets_of_the_master() {
    world(&[Need::Root, Need::Bpf], |world| {
        for engine in ["ebpf", "cbpf"] {
            let master = Master::start(world, &app(world, Program::Difficult(PASSED), engine));
            let bursts = Bursts::start(world, PATIENCE);
            for generation in 2..=6 {
                assert_eq!(master.upgrade().to, Some(generation));
                // The old ones receive from the same socket until they are gone.
                bursts.answered_by(generation);
            }
            bursts.end_lossless();
            master.stop();
        }
    });
}

/// The examples, fast and at a steady rate.
#[test]
fn the_examples_ebpf_and_cbpf() {
    world(&[Need::Root, Need::Bpf, Need::Python], |world| {
        for (program, engine) in [
            (Program::UdpEcho, "ebpf"),
            (Program::UdpEcho, "cbpf"),
            (Program::Python, "ebpf"),
            (Program::Python, "cbpf"),
        ] {
            let master = Master::start(world, &app(world, program, engine));
            let flows = Flows::start(spec(world).flows(50).rate(3000.0).new_flows(50.0));
            for generation in 2..=4 {
                let receipt = upgrade(&master);
                assert_eq!(receipt.to, Some(generation));
                flows.answered_by(generation);
                flows.answered(500);
            }
            let report = flows.end_lossless();
            // Each flow goes with every switch, and never back.
            for flow in &report.flows {
                let generations = flow.generations();
                assert!(generations.is_sorted(), "{flow:?}");
            }
            master.stop();
        }
    });
}

/// New workers that don't come so far: the old ones serve on, untouched.
#[test]
fn failed_upgrades() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (engine, mode) in [("ebpf", "sdk"), ("cbpf", "sdk"), ("ebpf", "plain"), ("cbpf", "plain")] {
            let mut app = App::test_worker(world, &format!("--mode {mode} {SLOW}"))
                .engine(engine)
                .listen("protocol = \"udp\"")
                .upgrade("ready_timeout = \"2s\"");
            let master = Master::start(world, &app);
            let bursts = Bursts::start(world, PATIENCE);
            let workers = master.serving();
            for fault in
                ["exit-before-ready", "exit-after-listen", "wrong-address", "no-reuseport", "never-ready"]
            {
                if (mode, fault) == ("sdk", "exit-after-listen") {
                    continue; // It does not listen, it serves: then it has been switched to.
                }
                // Seat 0 comes as far as it gets: its socket is bound, and leaves again.
                app.command = test_worker(&format!("--mode {mode} {SLOW} --fail {fault} --fail-seat 1"));
                app.write();
                let (code, receipt) = master.failing_upgrade();
                assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{fault}: {receipt:#?}");
                assert_eq!(master.serving(), workers, "{fault}");
                bursts.answered(100);
            }
            let sum = bursts.end_lossless();
            assert!(sum.generations.keys().eq([&1]), "{sum:?}");
            master.stop();
        }
    });
}

/// It has never heard of SO_REUSEPORT, and reads all that waits before it ends.
const SETS_NOTHING: &str = "
import os, select, signal, socket, sys
stopped = []
signal.signal(signal.SIGTERM, lambda *_: stopped.append(1))
who = ' '.join(os.environ['REUSEPORTD_' + name] for name in ('GENERATION', 'SEAT')) + ' %d ' % os.getpid()
listener = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
listener.bind(('127.0.0.1', int(sys.argv[1])))
notify = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
notify.sendto(b'READY=1', os.environ['NOTIFY_SOCKET'])
listener.settimeout(0.1)
while True:
    try:
        datagram, peer = listener.recvfrom(65535)
    except TimeoutError:
        if stopped:
            break
        continue
    select.select([], [], [], 0.002)
    listener.sendto(who.encode() + datagram, peer)
";

#[test]
fn a_program_that_sets_nothing() {
    world(&[Need::Root, Need::Bpf, Need::Python], |world| {
        for engine in ["ebpf", "cbpf"] {
            let app = App::new(world, ["python3", "-c", SETS_NOTHING, "{port.default}"]).workers(2);
            let mut app = app.engine(engine).listen("protocol = \"udp\"").listen("force_reuseport = true");
            upgrades_lose_nothing(world, &app);
            // Two of them on one port: that takes the option.
            app.listen_lines.pop();
            app.write();
            let master = Master::launch(world, &app, Command::new(REUSEPORTD));
            master.ended(1);
        }
    });
}
