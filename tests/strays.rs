//! Several addresses in one app switch together: after that no connection reaches the old generation on any of them.

use std::net::SocketAddr;
use std::time::{Duration, Instant, SystemTime};

use reuseportd_bench::{Report, Spec};
use reuseportd_wire::status::{Outcome, Phase, Receipt};

use crate::support::app::{App, test_worker};
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::world::{Need, World, needs_of, world};
use crate::support::{PATIENCE, rounds};

fn named(name: &str, address: &str) -> (String, SocketAddr) {
    (name.to_owned(), address.parse().unwrap())
}

/// A load on this address: bursts, and slow clients that hold old workers up.
fn on(world: &World, address: SocketAddr) -> Spec {
    let mut spec = spec(world).rate(500.0).burst(75, Duration::from_millis(300)).slow(10);
    spec.target = address;
    spec
}

/// The instant at which the last group was switched, and half a dozen milliseconds for the rounding of a receipt's
/// times.
pub(crate) fn switched(receipt: &Receipt) -> Instant {
    let started: jiff::Timestamp = receipt.started_at.parse().unwrap();
    let phases = receipt.phases.iter().filter(|time| matches!(time.phase, Phase::Launching | Phase::Switch));
    let took = Duration::from_millis(phases.map(|time| time.ms).sum::<u64>() + 6);
    let ago = SystemTime::now().duration_since(SystemTime::from(started) + took).unwrap();
    Instant::now() - ago
}

/// Generations that answered a connection begun after they had been switched away from.
pub(crate) fn strays(report: &Report, started: Instant, switches: &[(u32, Instant)]) -> Vec<String> {
    let mut found = Vec::new();
    for (generation, switched) in switches {
        let last_begun = report.generations.get(generation).map_or(0, |of| of.last_begun_us);
        let late = (started + Duration::from_micros(last_begun)).saturating_duration_since(*switched);
        if !late.is_zero() {
            found.push(format!("{}: generation {generation} {late:?} after the switch", report.target));
        }
    }
    found
}

/// Upgrades until so many connections have been answered on two ports, one of them IPv6; the strays.
fn upgrades_on_two_ports(world: &World, app: &App, upgrades: u32, connections: u32) -> (Vec<String>, u64) {
    let master = Master::start(world, app);
    let first = Load::start(on(world, app.listen[0].1));
    let second = first.beside(on(world, app.listen[1].1));
    let mut switches = Vec::new();
    for generation in 1..=upgrades {
        let receipt = master.upgrade();
        assert_eq!(receipt.to, Some(generation + 1));
        switches.push((generation, switched(&receipt)));
        for load in [&first, &second] {
            load.answered_by(generation + 1);
            load.answered(u64::from(connections / upgrades / 2));
        }
    }
    let mut found = Vec::new();
    let mut lost = 0;
    for load in [first, second] {
        let started = load.started();
        let report = load.end();
        assert!(report.answers >= u64::from(connections / 2), "{report}");
        assert_eq!(report.strays, 0, "{report}");
        found.extend(strays(&report, started, &switches));
        lost += report.lost();
    }
    master.stop();
    (found, lost)
}

fn two_ports(world: &World, mode: &str, engine: &'static str) -> App {
    let mut app = App::test_worker(world, &format!("--mode {mode}")).engine(engine);
    app.listen = vec![named("four", "127.0.0.1:8080"), named("six", "[::1]:8081")];
    app
}

fn none_in_many(mode: &str, engine: &'static str) {
    world(&[needs_of(engine), &[Need::Root]].concat(), |world| {
        let app = two_ports(world, mode, engine);
        let (found, lost) = upgrades_on_two_ports(world, &app, 4, rounds(10_000, 100_000));
        assert_eq!((found, lost), (vec![], 0));
        // Without steering the old generation is chosen for as long as it is there.
        let control = two_ports(world, "plain", "none").upgrade("stop_when = \"idle\"");
        let (found, _) = upgrades_on_two_ports(world, &control, 1, 200);
        assert!(!found.is_empty(), "this would not have shown strays");
    });
}

#[test]
fn none_in_many_sdk_ebpf() {
    none_in_many("sdk", "ebpf");
}

#[test]
fn none_in_many_sdk_cbpf() {
    none_in_many("sdk", "cbpf");
}

#[test]
fn none_in_many_unmodified_ebpf() {
    none_in_many("plain", "ebpf");
}

#[test]
fn none_in_many_unmodified_cbpf() {
    none_in_many("plain", "cbpf");
}

/// Upgrades under a load on both families of one port.
fn both_families_of_one_port(world: &World, app: &App) {
    let master = Master::start(world, app);
    let four = Load::start(on(world, "127.0.0.1:8080".parse().unwrap()));
    let six = four.beside(on(world, "[::1]:8080".parse().unwrap()));
    for generation in 2..=3 {
        master.hup();
        four.answered_by(generation);
        six.answered_by(generation);
    }
    for load in [four, six] {
        load.answered(100);
        let report = load.end();
        // Old socket-activated workers share their sockets with the new until they have stopped.
        let is_shared = app.command.iter().any(|word| word == "activated");
        assert!(report.lost() == 0 && (is_shared || report.strays == 0), "{report}");
    }
    master.stop();
}

#[test]
fn v6only_beside_the_ipv4_wildcard() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (mode, engine) in [("plain", "ebpf"), ("plain", "cbpf"), ("sdk", "ebpf"), ("activated", "cbpf")] {
            let mut app =
                App::test_worker(world, &format!("--mode {mode} --v6only")).workers(2).engine(engine);
            app.listen = vec![named("four", "0.0.0.0:8080"), named("six", "[::]:8080")];
            app.listen_lines.push((Some("six"), "v6only = true"));
            both_families_of_one_port(world, &app);
        }
    });
}

#[test]
fn a_worker_that_takes_more_than_v6only_is_not_taken() {
    world(&[Need::Root], |world| {
        let mut app = App::test_worker(world, "--mode plain --v6only").workers(2);
        app.listen = vec![named("four", "0.0.0.0:8080"), named("six", "[::]:8080")];
        app.listen_lines.push((Some("six"), "v6only = true"));
        let master = Master::start(world, &app);
        app.command = test_worker("--mode plain");
        app.write();
        let (code, receipt) = master.failing_upgrade();
        let reason = receipt.reason.unwrap_or_default();
        assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{reason}");
        assert!(reason.contains("IPV6_V6ONLY"), "{reason}");
        master.stop();
    });
}

/// What is bound to another address is in another group of the kernel's, which would take connections from the first.
#[test]
fn a_group_stays_where_it_is() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (mode, engine) in [("plain", "ebpf"), ("sdk", "cbpf")] {
            let mut app = App::test_worker(world, &format!("--mode {mode}")).workers(2).engine(engine);
            app.listen = vec![named("any", "0.0.0.0:8080")];
            let master = Master::start(world, &app);
            let load = Load::start(on(world, world.address));
            app.command = test_worker(&format!("--mode {mode} --dual-stack"));
            app.write();
            let (code, receipt) = master.failing_upgrade();
            let reason = receipt.reason.unwrap_or_default();
            assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{reason}");
            assert!(reason.contains("[::]:8080 while 0.0.0.0:8080 is served"), "{reason}");
            load.answered(100);
            load.end_lossless();
            // Sockets of the master go where those of the workers are.
            master.stop();
            app.write();
            let master = Master::start(world, &app);
            let load = Load::start(on(world, "[::1]:8080".parse().unwrap()));
            let mut passed = app.clone().bind_master();
            passed.command = test_worker("--mode activated");
            passed.write();
            master.hup();
            load.answered_by(2);
            load.end_lossless();
            master.stop();
        }
    });
}

#[test]
fn a_dual_stack_listener_serves_both_families() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (mode, engine) in [("plain", "ebpf"), ("plain", "cbpf"), ("sdk", "ebpf"), ("sdk", "cbpf")] {
            let options = format!("--mode {mode} --dual-stack");
            let mut app = App::test_worker(world, &options).workers(2).engine(engine);
            app.listen = vec![named("any", "0.0.0.0:8080")];
            both_families_of_one_port(world, &app);
        }
        // The master's own takes both, if it is asked for that.
        let mut app = App::test_worker(world, "--mode activated").workers(2);
        app.listen = vec![named("any", "[::]:8080")];
        both_families_of_one_port(world, &app);
    });
}

#[test]
fn what_overlaps_is_refused_and_nothing_changes() {
    world(&[Need::Root], |world| {
        for mode in ["plain", "activated"] {
            let mut app = App::test_worker(world, &format!("--mode {mode}")).workers(2);
            app.listen = vec![named("four", "127.0.0.1:8080"), named("six", "[::]:8081")];
            let master = Master::start(world, &app);
            let load = Load::start(on(world, world.address));
            let workers = master.serving();
            let changes: [(usize, &str, Option<&'static str>, &[&str]); 4] = [
                (0, "0.0.0.0:8080", None, &["0.0.0.0:8080", "127.0.0.1:8080", "wildcard"]),
                (0, "[::]:8080", None, &["[::]:8080", "127.0.0.1:8080", "IPv4"]),
                (1, "0.0.0.0:8081", None, &["0.0.0.0:8081", "[::]:8081", "IPv4"]),
                (1, "[::]:8081", Some("v6only = true"), &["[::]:8081", "v6only"]),
            ];
            for (at, address, line, words) in changes {
                let mut changed = app.clone();
                changed.listen[at].1 = address.parse().unwrap();
                changed.listen_lines.extend(line.map(|line| (Some("six"), line)));
                changed.write();
                let (code, receipt) = master.failing_upgrade();
                let reason = receipt.reason.unwrap_or_default();
                assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{address}: {reason}");
                for word in words {
                    assert!(reason.contains(word), "{word}: {reason}");
                }
                assert_eq!(master.serving(), workers, "{address}");
            }
            let shown: Vec<String> = master.status().listeners.into_iter().map(|one| one.address).collect();
            assert_eq!(shown, ["127.0.0.1:8080", "[::]:8081"]);
            load.answered(100);
            load.end_lossless();
            app.write();
            assert_eq!(master.upgrade().to, Some(2));
            assert!(std::net::TcpStream::connect_timeout(&app.listen[1].1, PATIENCE).is_ok());
            master.stop();
        }
    });
}
