//! What is remembered of flows.

use super::{FLOW_TIMEOUT, Program, app, moved, upgrade, wait_alone};
use crate::support::flows::{Flows, spec};
use crate::support::master::Master;
use crate::support::world::{Need, world};

const FLOWS: u32 = 300;

#[test]
fn too_small_it_forgets_and_nothing_is_lost() {
    world(&[Need::Root, Need::Bpf], |world| {
        let mut app = app(world, Program::UdpEcho, "ebpf").listen("affinity = \"flow\"");
        app = app.listen("flow_timeout = \"2s\"");
        let small = app.clone().listen("flow_table = 50");
        let master = Master::start(world, &small);
        let flows = Flows::start(spec(world).flows(FLOWS).rate(3000.0));
        let forgotten =
            |listener: &reuseportd_wire::status::ListenerStatus| listener.flows_forgotten.unwrap();
        let status = master
            .wait_status("forgotten", |status| forgotten(&status.listeners[0]) >= u64::from(FLOWS - 50));
        assert!(status.listeners[0].flows_begun >= Some(u64::from(FLOWS)), "{status:#?}");
        assert!(master.cli("status").stdout.contains("raise flow_table"), "{}", master.cli("status").stdout);
        upgrade(&master);
        flows.answered_by(2);
        let report = flows.end_lossless();
        assert!(!moved(&report, FLOW_TIMEOUT).is_empty(), "all were remembered: {report}");
        master.stop();
    });
}

/// The next generations want a bigger one, and other times.
#[test]
fn its_size_and_time_change_in_an_upgrade() {
    world(&[Need::Root, Need::Bpf], |world| {
        let app = app(world, Program::UdpEcho, "ebpf").listen("affinity = \"flow\"");
        let master =
            Master::start(world, &app.clone().listen("flow_table = 50").listen("flow_timeout = \"1h\""));
        let flows = Flows::start(spec(world).flows(FLOWS).rate(3000.0).new_flows(50.0));
        let big = app.clone().listen("flow_table = 5000");
        big.clone().listen("flow_timeout = \"1h\"").write();
        upgrade(&master);
        // All begin anew, as told.
        flows.answered_by(2);
        flows.answered(2 * u64::from(FLOWS));
        let forgotten = || master.status().listeners[0].flows_forgotten.unwrap();
        let before = forgotten();
        big.clone().listen("flow_timeout = \"1s\"").write();
        upgrade(&master);
        flows.answered_by(3);
        flows.answered(3000);
        let report = flows.end_lossless();
        // Those of generation 2 were remembered.
        let last = |flow: &reuseportd_bench::flows::FlowReport| flow.generations().last().copied();
        assert!(report.flows[..FLOWS as usize].iter().all(|flow| last(flow) == Some(2)), "{report}");
        assert_eq!(forgotten(), before);
        // An hour would be too long for this: generation 2 goes by the time that is in force.
        wait_alone(&master, 3);
        // No affinity any more.
        super::app(world, Program::UdpEcho, "ebpf").write();
        let flows = Flows::start(spec(world).flows(60).rate(2000.0));
        upgrade(&master);
        flows.answered_by(4);
        flows.answered(500);
        master.upgrade();
        flows.answered_by(5);
        let report = flows.end_lossless();
        assert!(report.flows.iter().all(|flow| last(flow) != Some(3)), "{report}");
        master.stop();
    });
}
