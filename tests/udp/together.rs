//! A TCP and a UDP port of one app switch together.

use std::time::{Duration, Instant};

use reuseportd_bench::{flows, spawn};

use super::upgrade;
use crate::strays::{strays, switched};
use crate::support::app::App;
use crate::support::flows::{Flows, overflowed, spec};
use crate::support::master::Master;
use crate::support::world::{Need, World, needs_of, world};
use crate::support::{PATIENCE, load, rounds};

const UPGRADES: u32 = 4;
/// How long an answer is waited for: what there was no room for has none.
const GIVEN_UP: Duration = Duration::from_secs(5);

fn both(world: &World, options: &str, engine: &'static str) -> App {
    let mut app = App::test_worker(world, options).engine(engine);
    app.listen = vec![("tcp".into(), world.address), ("udp".into(), world.address)];
    app.listen_lines.push((Some("udp"), "protocol = \"udp\""));
    app
}

/// Generations that answered what was sent after they had been switched away from.
fn late(report: &flows::Report, started: Instant, switches: &[(u32, Instant)]) -> Vec<String> {
    let late = switches.iter().filter_map(|(generation, switched)| {
        let last = report.generations.get(generation).map_or(0, |of| of.last_sent_us);
        let late = (started + Duration::from_micros(last)).saturating_duration_since(*switched);
        (!late.is_zero()).then(|| format!("UDP: generation {generation} {late:?} after the switch"))
    });
    late.collect()
}

/// Upgrades until so much has been answered on both; what went astray, and what was lost.
fn upgrades_under(world: &World, app: &App, upgrades: u32, attempts: u32) -> (Vec<String>, u64) {
    let master = Master::start(world, app);
    let udp = Flows::start(spec(world).flows(50).rate(3000.0).new_flows(50.0).answer_timeout(GIVEN_UP));
    let burst = Duration::from_millis(300);
    let mut tcp = spawn(load::spec(world).rate(500.0).burst(75, burst).slow(10)).unwrap();
    let mut switches = Vec::new();
    for generation in 1..=upgrades {
        let receipt = upgrade(&master);
        assert_eq!(receipt.to, Some(generation + 1));
        switches.push((generation, switched(&receipt)));
        tcp.mark(generation + 1);
        udp.answered_by(generation + 1);
        tcp.wait_generation(generation + 1, 1, PATIENCE).unwrap();
        udp.answered(u64::from(attempts / upgrades));
    }
    let (tcp_started, udp_started) = (tcp.started(), udp.started());
    tcp.stop();
    let (tcp, udp) = (tcp.join().unwrap(), udp.end());
    let lost = tcp.lost() + udp.lost().saturating_sub(overflowed());
    assert!(tcp.valid() && tcp.answers + udp.answers >= u64::from(attempts), "{tcp}\n{udp}");
    assert_eq!((tcp.strays, udp.strays), (0, 0), "{tcp}\n{udp}");
    eprintln!("{tcp}\n{udp}");
    let mut found = strays(&tcp, tcp_started, &switches);
    found.extend(late(&udp, udp_started, &switches));
    master.stop();
    (found, lost)
}

fn none_strays(engine: &'static str, options: &str) {
    world(&[needs_of(engine), &[Need::Root]].concat(), |world| {
        let app = both(world, options, engine);
        let found = upgrades_under(world, &app, UPGRADES, rounds(20_000, 100_000));
        assert_eq!(found, (vec![], 0));
        // Without steering the old generation is chosen for as long as it is there.
        let control = both(world, "--mode plain", "none").upgrade("stop_when = \"idle\"");
        let (found, _) = upgrades_under(world, &control, 1, 1000);
        assert!(
            found.iter().any(|one| one.starts_with("UDP")),
            "this would not have shown strays: {found:?}"
        );
    });
}

#[test]
fn none_strays_sdk_ebpf() {
    none_strays("ebpf", "--mode sdk");
}

#[test]
fn none_strays_sdk_cbpf() {
    none_strays("cbpf", "--mode sdk");
}

#[test]
fn none_strays_unmodified_ebpf() {
    none_strays("ebpf", "--mode plain");
}

#[test]
fn none_strays_unmodified_cbpf() {
    none_strays("cbpf", "--mode plain");
}
