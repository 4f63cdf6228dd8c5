//! Flows, and generations that get a share, are taken back, or roll; and workers that come and go.

use std::collections::BTreeSet;

use reuseportd_bench::flows::{FlowReport, Report, run};
use reuseportd_wire::status::{MasterState, Outcome};

use super::{Program, app, stayed, wait_alone, with_flows};
use crate::canary::{in_force, steps};
use crate::support::PATIENCE;
use crate::support::flows::{Flows, spec};
use crate::support::gate::Gate;
use crate::support::master::Master;
use crate::support::watch::seats;
use crate::support::world::{Need, World, needs_of, world};

/// New flows of two datagrams each: how many of them each of the generations 1 and 2 gets.
fn new_flows(world: &World, flows: u32) -> [usize; 2] {
    const AT_ONCE: u32 = 250;
    let some = || {
        let report = run(spec(world).flows(AT_ONCE).rate(5_000.0).limit(u64::from(2 * AT_ONCE))).unwrap();
        assert!(report.valid() && report.lost() == 0, "{report}");
        report
    };
    let reports: Vec<Report> = (0..flows.div_ceil(AT_ONCE)).map(|_| some()).collect();
    let all = || reports.iter().flat_map(|report| &report.flows);
    [1, 2].map(|generation| all().filter(|flow| flow.generations() == [generation]).count())
}

fn load(world: &World) -> Flows {
    Flows::start(spec(world).flows(60).rate(1500.0))
}

/// The bounds are five standard deviations from the share.
fn a_tenth(engine: &'static str, program: Program, has_flows: bool) {
    world(needs_of(engine), |world| {
        let gate = Gate::new(world);
        let app = app(world, program, engine);
        let app = if has_flows { with_flows(app) } else { app };
        let app = app.upgrade(steps(&["{ share = \"10%\", hold = \"1s\" }"]));
        let master = Master::start(world, &gate.guards(app, "10m"));
        let flows = load(world);
        let upgrade = master.begin("upgrade --wait --json");
        in_force(&master, 2, 0.1);
        let [old, new] = new_flows(world, 6000);
        let share = new as f64 / 6000.0;
        eprintln!("{program:?} {engine}: {:.2} %", 100.0 * share);
        assert_eq!(old + new, 6000, "each belongs to one of them");
        assert!((0.08..=0.12).contains(&share), "{share}");
        in_force(&master, 2, 0.1);
        gate.answer(1, 0);
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}");
        assert_eq!(new_flows(world, 500), [0, 500]);
        flows.answered(500);
        if has_flows {
            let report = stayed(flows);
            assert!(report.generations.keys().eq([&1]), "they began before: {report}");
        } else {
            let report = flows.end_lossless();
            // A flow changes sides once, at its step.
            let is_once = |generations: Vec<u32>| generations == [1, 2] || generations == [2];
            assert!(report.flows.iter().all(|flow| is_once(flow.generations())), "{report}");
        }
        wait_alone(&master, 2);
        master.stop();
    });
}

#[test]
fn a_tenth_of_new_flows() {
    a_tenth("ebpf", Program::UdpEcho, true);
}

#[test]
fn a_tenth_without_affinity_ebpf() {
    a_tenth("ebpf", Program::Difficult("--mode plain"), false);
}

#[test]
fn a_tenth_without_affinity_cbpf() {
    a_tenth("cbpf", Program::UdpEcho, false);
}

/// What the new generation was given in its bake it keeps; what begins after that is for the old one again.
#[test]
fn a_bake_that_fails() {
    world(&[Need::Root, Need::Bpf], |world| {
        for program in [Program::UdpEcho, Program::Difficult("--mode plain")] {
            let gate = Gate::new(world);
            let app = with_flows(app(world, program, "ebpf")).upgrade("bake = \"10m\"");
            let master = Master::start(world, &gate.guards(app, "10m"));
            let first = load(world);
            let upgrade = master.begin("upgrade --wait --json");
            master.wait_status("baking", |status| status.state == MasterState::Baking);
            let baked = first.beside(spec(world).flows(60).rate(1500.0));
            baked.answered_by(2);
            gate.answer(1, 7);
            let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
            assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{receipt:#?}");
            assert_eq!(new_flows(world, 500), [500, 0]);
            // Longer than flows are remembered that are idle.
            first.answered(4000);
            let (first, baked) = (stayed(first), stayed(baked));
            assert!(first.generations.keys().eq([&1]), "{first}");
            assert!(baked.generations.keys().eq([&2]), "{baked}");
            wait_alone(&master, 1);
            master.stop();
            std::fs::remove_file(world.path("answers")).unwrap();
        }
    });
}

#[test]
fn a_batch_after_the_other() {
    world(&[Need::Root, Need::Bpf], |world| {
        for program in [Program::UdpEcho, Program::Difficult("--mode plain")] {
            let app = with_flows(app(world, program, "ebpf")).upgrade("batch = 1");
            let master = Master::start(world, &app.upgrade("max_draining = 10"));
            let flows = Flows::start(spec(world).flows(60).rate(2000.0).new_flows(50.0));
            let (code, receipt) = master.receipt(master.cli("upgrade --wait --json"));
            assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}\n{}", master.log());
            flows.answered_by(2);
            flows.answered(5000);
            let report = stayed(flows);
            assert!(report.flows[..60].iter().all(|flow| flow.generations() == [1]), "{report}");
            wait_alone(&master, 2);
            master.stop();
        }
    });
}

fn scale(master: &Master, workers: u32) {
    let done = master.cli(&format!("scale {workers} --wait"));
    assert_eq!((done.code, done.stdout), (0, format!("scaled to {workers}\n")), "{}", master.log());
}

/// Who answered a flow, in this order.
fn pids(flow: &FlowReport) -> Vec<u32> {
    flow.spans.iter().map(|span| span.who.pid).collect()
}

/// The flows of removed workers end by themselves.
#[test]
fn fewer_workers() {
    world(&[Need::Root, Need::Bpf], |world| {
        for program in [Program::UdpEcho, Program::Difficult("--mode plain")] {
            let master = Master::start(world, &with_flows(app(world, program, "ebpf")));
            let flows = Flows::start(spec(world).flows(60).rate(1500.0).new_flows(20.0));
            scale(&master, 1);
            let left = seats(&master.status(), 1);
            flows.answered(4000);
            let report = stayed(flows);
            // Who began since then is the last one's.
            let late = report.flows.iter().filter(|flow| flow.begun_us > report.elapsed_us / 2);
            assert!(left.len() == 1 && late.into_iter().all(|flow| pids(flow) == [left[0].1]), "{report}");
            let all = BTreeSet::from_iter(report.flows.iter().flat_map(pids));
            assert_eq!(all.len(), 4, "{report}");
            let idle = master.wait_status("one", |status| status.generations[0].workers.len() == 1);
            assert_eq!(idle.listeners[0].leftovers_lost, 0);
            master.stop();
        }
    });
}

/// Or begin anew: when another worker takes the seat, or shortly before the drain ends.
#[test]
fn fewer_workers_and_more() {
    world(&[Need::Root, Need::Bpf], |world| {
        for program in [Program::UdpEcho, Program::Difficult("--mode plain")] {
            let app = with_flows(app(world, program, "ebpf")).upgrade("drain_timeout = \"3s\"");
            let master = Master::start(world, &app);
            let flows = Flows::start(spec(world).flows(60).rate(1500.0).new_flows(20.0));
            let before = master.serving();
            scale(&master, 1);
            flows.answered(500);
            scale(&master, 3);
            let present: Vec<u32> = seats(&master.status(), 1).into_iter().map(|(_, pid)| pid).collect();
            assert!(present.len() == 3 && present[0] == before[0], "{before:?} {present:?}");
            flows.answered(4500);
            let report = flows.end_lossless();
            for flow in &report.flows {
                let removed: Vec<bool> = pids(flow).iter().map(|pid| before[1..].contains(pid)).collect();
                assert!(matches!(removed[..], [_] | [true, false]), "moved needlessly: {flow:?}");
            }
            assert!(report.moves > 0, "{report}");
            let status = master.wait_status("three", |status| status.generations[0].workers.len() == 3);
            assert_eq!(status.listeners[0].leftovers_lost, 0);
            master.stop();
        }
    });
}

#[test]
fn a_single_worker_is_replaced() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (program, engine, has_flows) in [
            (Program::UdpEcho, "ebpf", true),
            (Program::Difficult("--mode plain"), "ebpf", false),
            (Program::Difficult("--mode plain"), "cbpf", false),
        ] {
            let app = app(world, program, engine);
            let master = Master::start(world, &if has_flows { with_flows(app) } else { app });
            let flows = load(world);
            let before = seats(&master.status(), 1);
            let done = master.cli("restart-worker 1 --wait");
            assert_eq!(done.code, 0, "{done:#?}");
            flows.answered(1000);
            let after = seats(&master.status(), 1);
            assert!(before[1] != after[1] && before[2..] == after[2..], "{before:?} {after:?}");
            flows.end_lossless();
            master.stop();
        }
    });
}
