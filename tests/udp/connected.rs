//! Workers that have a connected socket for each client: the client keeps it, whatever is steered.

use reuseportd_bench::flows::FlowReport;
use reuseportd_wire::status::{MasterState, Outcome};

use super::{FLOW_TIMEOUT, Program, app, draining, moved, upgrade, wait_alone};
use crate::support::PATIENCE;
use crate::support::flows::{Flows, spec};
use crate::support::master::Master;
use crate::support::world::{Need, world};

const CLIENTS: u32 = 30;

#[test]
fn they_stay_over_upgrades() {
    world(&[Need::Root, Need::Bpf], |world| {
        for options in ["--mode plain --connect 1500", "--mode sdk --connect 1500"] {
            let app = app(world, Program::Difficult(options), "ebpf").workers(2);
            let app = app.upgrade("stop_when = \"drained\"").upgrade("max_draining = 6");
            let master = Master::start(world, &app);
            let flows =
                Flows::start(spec(world).flows(CLIENTS).rate(900.0).new_flows(10.0).new_life(PATIENCE));
            flows.answered(300);
            for generation in 2..=6 {
                upgrade(&master);
                flows.answered_by(generation);
                flows.answered(300);
            }
            assert_eq!(draining(&master.status()), [1, 2, 3, 4, 5]);
            let report = flows.end_lossless();
            // One that begins at the switch may send again before it has a socket of its own.
            let is_first = |flow: &FlowReport| flow.spans.len() == 2 && flow.spans[0].answers == 1;
            let settled = |flow: &FlowReport| flow.spans.len() == 1 || is_first(flow);
            assert!(report.flows.iter().all(settled), "{:?} {report}", moved(&report, FLOW_TIMEOUT));
            let lasting = &report.flows[..CLIENTS as usize];
            assert!(lasting.iter().all(|flow| flow.generations() == [1]), "{report}");
            wait_alone(&master, 6);
            master.stop();
        }
    });
}

/// They are open connections, which `stop_when = "idle"` waits for.
#[test]
fn they_are_waited_for() {
    world(&[Need::Root, Need::Bpf], |world| {
        let app = app(world, Program::Difficult("--mode plain --connect 500"), "ebpf").workers(2);
        let app = app.upgrade("stop_when = \"idle\"").upgrade("idle_timeout = \"50s\"");
        let master = Master::start(world, &app);
        let flows = Flows::start(spec(world).flows(CLIENTS).rate(900.0));
        flows.answered(300);
        let begun = master.begin("upgrade --wait --json");
        let old = |status: &reuseportd_wire::status::Status| status.generations[0].connections;
        master.wait_status("idling", |status| {
            status.active_generation == Some(2) && old(status) == Some(u64::from(CLIENTS))
        });
        flows.answered(1800);
        assert_eq!(master.status().state, MasterState::Retiring);
        let report = flows.end_lossless();
        assert!(report.generations.keys().eq([&1]), "{report}");
        let (code, receipt) = master.receipt(begun.finish(PATIENCE));
        assert_eq!((code, receipt.outcome, receipt.forced_kills), (0, Outcome::Completed, 0), "{receipt:#?}");
        wait_alone(&master, 2);
        master.stop();
    });
}
