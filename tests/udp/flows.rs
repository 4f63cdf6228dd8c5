//! `affinity = "flow"`: a flow stays with the generation it began with.

use std::net::UdpSocket;
use std::time::{Duration, Instant};

use reuseportd_bench::flows::{Report, Spec};
use reuseportd_wire::status::{MasterState, WorkerState};

use super::{FLOW_TIMEOUT, Program, app, draining, moved, stayed, upgrade, wait_alone, with_flows};
use crate::canary::{in_force, steps};
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::flows::{Flows, spec};
use crate::support::gate::Gate;
use crate::support::master::Master;
use crate::support::rounds;
use crate::support::world::{Need, World, world};

const UPGRADES: u32 = 5;
/// How long an answer is waited for: what there was no room for has none.
const GIVEN_UP: Duration = Duration::from_secs(5);
/// Silences that end before a flow is forgotten, and some that don't.
const SHORT: Duration = Duration::from_secs(1);
const LONG: Duration = Duration::from_secs(4);

/// Datagrams a second, of all flows together.
fn rate() -> f64 {
    f64::from(rounds(10_000, 20_000))
}

/// Flows that never pause: some for as long as the load, and some that come and go.
fn steady(world: &World) -> Spec {
    let spec = spec(world).flows(250).rate(rate() - 2000.0).answer_timeout(GIVEN_UP);
    spec.new_flows(20.0).new_life(Duration::from_secs(6))
}

/// Flows that speak for a moment and are silent for so long.
fn pausing(world: &World, pause: Duration) -> Spec {
    let spec = spec(world).flows(65).rate(1000.0).answer_timeout(GIVEN_UP);
    spec.pausing(65, Duration::from_millis(400), pause)
}

/// The load sent what it was to send.
fn offered(report: &Report, rate: f64) {
    let last = report.flows.iter().flat_map(|flow| flow.spans.last()).map(|span| span.last_us).max();
    let seconds = last.unwrap_or_default() as f64 / 1e6;
    assert!(report.sent as f64 >= 0.9 * rate * seconds, "less than {rate} a second: {report}");
}

fn service(world: &World) -> App {
    with_flows(app(world, Program::UdpEcho, "ebpf")).workers(2).upgrade("max_draining = 6")
}

/// Upgrades while old generations drain, until all of these are there.
fn five_upgrades(master: &Master, flows: &Flows) {
    for generation in 2..=UPGRADES + 1 {
        let receipt = upgrade(master);
        assert_eq!((receipt.to, receipt.forced_kills), (Some(generation), 0), "{receipt:#?}");
        flows.answered_by(generation);
        // Some more flows begin.
        flows.answered(5000);
        let status = master.status();
        assert_eq!(status.state, MasterState::Steady, "{status:#?}");
        assert_eq!(draining(&status), (1..generation).collect::<Vec<_>>(), "{status:#?}");
    }
}

#[test]
fn each_is_answered_by_one_generation_until_it_is_idle() {
    world(&[Need::Root, Need::Bpf], |world| {
        let master = Master::start(world, &service(world));
        let all = Flows::start(steady(world));
        let short = all.beside(pausing(world, SHORT));
        let long = all.beside(pausing(world, LONG));
        five_upgrades(&master, &all);
        // At 1000 a second: each of these is silent once more, and speaks again.
        long.answered(6000);

        let long = stayed(long);
        for flow in &long.flows {
            let last = flow.spans.last().unwrap();
            assert_eq!(last.who.generation, UPGRADES + 1, "silent for {LONG:?}, and yet: {flow:?}");
        }
        assert!(long.moves > 0, "{long}");
        let short = stayed(short);
        assert!(short.moves < long.moves, "{short}");
        let status = master.status();
        assert!(draining(&status).contains(&1), "{status:#?}");
        let workers = &status.generations[0].workers;
        assert!(workers.iter().all(|worker| worker.state == WorkerState::Draining), "{status:#?}");

        let all = stayed(all);
        offered(&all, rate() - 2000.0);
        assert_eq!(all.generations.len(), UPGRADES as usize + 1, "{all}");
        eprintln!("{all}{short}{long}");
        // All are idle now.
        let status = wait_alone(&master, UPGRADES + 1);
        assert_eq!(status.last_upgrade.unwrap().forced_kills, 0);
        master.stop();
        control_loses(world);
    });
}

/// Shortly before the drain ends what still comes begins anew, and the workers leave in peace.
#[test]
fn the_last_ones_begin_anew_before_the_drain_ends() {
    world(&[Need::Root, Need::Bpf], |world| {
        for program in [Program::UdpEcho, Program::Difficult("--mode plain"), Program::Python] {
            let app = with_flows(app(world, program, "ebpf")).workers(2).upgrade("drain_timeout = \"3s\"");
            let master = Master::start(world, &app);
            let flows = Flows::start(spec(world).flows(100).rate(2000.0));
            let began = Instant::now();
            let receipt = master.upgrade();
            let took = began.elapsed();
            assert_eq!((receipt.forced_kills, receipt.connections_cut), (0, Some(0)), "{receipt:#?}");
            assert!(took >= Duration::from_secs(1), "they had {took:?}: {receipt:#?}");
            flows.answered_by(2);
            flows.answered(1000);
            let report = flows.end_lossless();
            // Not one after the other, and not twice.
            assert_eq!(report.moves, 100, "{report}");
            assert!(report.flows.iter().all(|flow| flow.generations() == [1, 2]), "{report}");
            master.stop();
        }
    });
}

/// The generation that answers on this socket.
fn ask(client: &UdpSocket) -> u32 {
    client.send(b"who").unwrap();
    let mut answer = [0; 64];
    let length = client.recv(&mut answer).unwrap();
    let answer = String::from_utf8_lossy(&answer[..length]);
    answer.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_else(|| panic!("{answer:?}"))
}

/// Flows that were silent when their generation left are nobody's, whoever has its place now.
#[test]
fn what_a_generation_leaves_is_not_the_next_ones() {
    const CLIENTS: usize = 200;
    world(&[Need::Root, Need::Bpf], |world| {
        let gate = Gate::new(world);
        let app = app(world, Program::UdpEcho, "ebpf").listen("affinity = \"flow\"");
        let app = app.listen("flow_timeout = \"10m\"").upgrade("drain_timeout = \"1s\"");
        let master = Master::start(world, &app);
        let client = |_| {
            let client = UdpSocket::bind((world.address.ip(), 0)).unwrap();
            client.connect(world.address).unwrap();
            client.set_read_timeout(Some(PATIENCE)).unwrap();
            client
        };
        let clients: Vec<UdpSocket> = (0..CLIENTS).map(client).collect();
        assert!(clients.iter().all(|client| ask(client) == 1));
        master.upgrade();
        gate.guards(app.upgrade(steps(&["{ share = \"10%\", hold = \"1s\" }"])), "10m").write();
        let begun = master.begin("upgrade --wait");
        in_force(&master, 3, 0.1);
        let generations: Vec<u32> = clients.iter().map(ask).collect();
        let share = generations.iter().filter(|generation| **generation == 3).count();
        // Ten standard deviations more than a tenth.
        assert!(share < 60 && !generations.contains(&1), "{generations:?}");
        gate.answer(1, 0);
        assert_eq!(begun.finish(PATIENCE).code, 0);
        master.stop();
    });
}

/// Nobody is steered, and workers end when they are told to: flows move, and what waits for their workers is lost.
fn control_loses(world: &World) {
    let naive = Program::Difficult("--mode naive");
    let master =
        Master::start(world, &app(world, naive, "none").workers(2).upgrade("stop_when = \"drained\""));
    let flows = Flows::start(steady(world));
    for _ in 0..UPGRADES {
        master.hup();
        flows.answered(1000);
    }
    let report = flows.end();
    assert!(!moved(&report, FLOW_TIMEOUT).is_empty(), "the load shows nothing, no flow moved: {report}");
    assert!(report.lost() > 0, "the load shows nothing, the control loses nothing either: {report}");
    eprintln!("control: {report}");
    master.stop();
}
