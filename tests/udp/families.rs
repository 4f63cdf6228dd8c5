//! IPv6, and IPv4 on sockets that take both.

use reuseportd_bench::flows::Spec;

use super::{Program, app, stayed, upgrade, with_flows};
use crate::support::flows::{Flows, spec};
use crate::support::master::Master;
use crate::support::world::{Need, World, world};

fn on(world: &World, target: &str) -> Spec {
    let mut spec = spec(world).flows(40).rate(1000.0).new_flows(20.0);
    spec.target = target.parse().unwrap();
    spec
}

fn upgrades(world: &World, address: &str, targets: &[&str], program: Program, engine: &'static str) {
    let mut app = app(world, program, engine);
    app.listen[0].1 = address.parse().unwrap();
    let has_flows = engine == "ebpf";
    let master = Master::start(world, &if has_flows { with_flows(app) } else { app });
    let mut all = vec![Flows::start(on(world, targets[0]))];
    all.extend(targets[1..].iter().map(|target| all[0].beside(on(world, target))).collect::<Vec<_>>());
    for generation in 2..=3 {
        upgrade(&master);
        for flows in &all {
            flows.answered_by(generation);
        }
    }
    // The last one holds the others up, and is the first to end.
    for flows in all.into_iter().rev() {
        flows.answered(2500);
        let report = if has_flows { stayed(flows) } else { flows.end_lossless() };
        assert_eq!(report.generations.len(), 3, "{report}");
        assert!(!has_flows || report.flows[..40].iter().all(|flow| flow.generations() == [1]), "{report}");
    }
    master.stop();
}

#[test]
fn flows_stay_over_ipv6() {
    world(&[Need::Root, Need::Bpf], |world| {
        upgrades(world, "[::1]:8080", &["[::1]:8080"], Program::UdpEcho, "ebpf");
        upgrades(world, "[::1]:8080", &["[::1]:8080"], Program::Difficult("--mode plain"), "cbpf");
    });
}

#[test]
fn flows_of_both_families_stay() {
    world(&[Need::Root, Need::Bpf], |world| {
        let targets = ["127.0.0.1:8080", "[::1]:8080"];
        for program in [Program::UdpEcho, Program::Difficult("--mode plain")] {
            upgrades(world, "[::]:8080", &targets, program, "ebpf");
        }
        upgrades(world, "[::]:8080", &targets, Program::UdpEcho, "cbpf");
        upgrades(world, "0.0.0.0:8080", &targets, Program::Difficult("--mode plain --dual-stack"), "ebpf");
    });
}
