//! Workers and masters that are killed, sockets that are closed, and the end of the service.

use std::io::ErrorKind;
use std::net::UdpSocket;
use std::time::{Duration, Instant};

use reuseportd_bench::flows::Report;
use reuseportd_wire::status::{MasterState, Status, WorkerState};
use rustix::process::Signal;

use super::{FLOW_TIMEOUT, Program, app, counted_losses, moved, stayed, upgrade, wait_alone, with_flows};
use crate::canary::pids_of;
use crate::orphans::{kill_with_keeper, replaced};
use crate::reexec::reexec;
use crate::support::PATIENCE;
use crate::support::app::App;
use crate::support::flows::{Flows, overflowed, spec};
use crate::support::master::Master;
use crate::support::process::{kill, processes_of, signal};
use crate::support::world::{Need, World, needs_of, world};
use crate::udp_workers::wait_halted;

/// Short, because some of it is never answered.
const GIVEN_UP: Duration = Duration::from_secs(2);
/// What so many small datagrams take in a socket is more than this.
const TWENTY: u32 = 20 * 500;

/// What waits for this worker, in bytes.
fn waiting(status: &Status, pid: u32) -> u32 {
    let workers = status.generations.iter().flat_map(|generation| &generation.workers);
    let listeners = workers.filter(|worker| worker.pid == Some(pid)).flat_map(|worker| &worker.listeners);
    listeners.map(|listener| listener.receive_queue.expect("it takes datagrams")).sum()
}

/// All seats are filled, one of them for the second time.
fn wait_respawned(master: &Master, workers: usize) {
    master.wait_status("respawned", |status| {
        let all = &status.generations[0].workers;
        let serving = all.iter().filter(|worker| worker.state == WorkerState::Serving).count();
        serving == workers && all.iter().map(|worker| worker.restarts).sum::<u32>() == 1
    });
}

/// Kills a worker with a full socket: what is missing is what is told.
fn killed_with_a_full_socket(world: &World, app: &App) -> Report {
    let master = Master::start(world, app);
    let victim = master.serving()[1];
    // Nothing in its hands: it has never received anything.
    signal(victim, Signal::STOP);
    wait_halted(victim);
    let flows = Flows::start(spec(world).flows(60).rate(600.0).answer_timeout(GIVEN_UP));
    let waits = |status: &Status| waiting(status, victim) >= TWENTY;
    master.wait_status("a full socket", waits);
    assert_eq!(counted_losses(&master), 0);
    kill([victim]);
    wait_respawned(&master, 4);
    flows.answered(600);
    let report = flows.end();
    let counted = counted_losses(&master);
    let told = counted + overflowed();
    assert_eq!((report.lost(), report.duplicates, report.wrong), (told, 0, 0), "{report}\n{}", master.log());
    assert!(counted >= 10, "nothing waited: {report}");
    assert!(report.flows.iter().all(|flow| flow.answers > 0), "{report}");
    master.stop();
    report
}

fn what_is_missing_is_told(engine: &'static str) {
    for program in [Program::UdpEcho, Program::Python, Program::Difficult("--mode plain")] {
        world(&[needs_of(engine), &[Need::Root, Need::Python]].concat(), |world| {
            killed_with_a_full_socket(world, &app(world, program, engine));
        });
    }
}

#[test]
fn what_is_missing_is_told_ebpf() {
    what_is_missing_is_told("ebpf");
}

#[test]
fn what_is_missing_is_told_cbpf() {
    what_is_missing_is_told("cbpf");
}

#[test]
fn flows_of_others_stay() {
    for program in [Program::UdpEcho, Program::Difficult("--mode plain")] {
        world(&[Need::Root, Need::Bpf], |world| {
            // What is answered at all: those of the killed worker never were by it.
            let report = killed_with_a_full_socket(world, &with_flows(app(world, program, "ebpf")));
            assert_eq!(moved(&report, FLOW_TIMEOUT), Vec::<String>::new(), "{report}");
        });
    }
}

/// The socket of a seat outlives its worker: the next one reads what waits.
#[test]
fn a_socket_of_the_master_loses_nothing() {
    world(&[Need::Root, Need::Bpf], |world| {
        for engine in ["ebpf", "cbpf"] {
            let app = app(world, Program::Difficult("--mode activated"), engine);
            let master = Master::start(world, &app);
            let victim = master.serving()[1];
            signal(victim, Signal::STOP);
            wait_halted(victim);
            let flows = Flows::start(spec(world).flows(60).rate(600.0));
            master.wait_status("a full socket", |status| waiting(status, victim) >= TWENTY);
            kill([victim]);
            wait_respawned(&master, 4);
            flows.answered(600);
            flows.end_lossless();
            assert_eq!(counted_losses(&master), 0);
            master.stop();
        }
    });
}

/// A worker that closes its socket serves nobody.
#[test]
fn who_closes_its_socket_is_replaced() {
    for engine in ["ebpf", "cbpf"] {
        world(&[Need::Root, Need::Bpf], |world| {
            let app =
                app(world, Program::Difficult("--mode plain"), engine).upgrade("drain_timeout = \"2s\"");
            let master = Master::start(world, &app);
            let flows = Flows::start(spec(world).flows(60).rate(600.0).answer_timeout(GIVEN_UP));
            let client = UdpSocket::bind((world.address.ip(), 0)).unwrap();
            client.send_to(b"close", world.address).unwrap();
            let began = Instant::now();
            wait_respawned(&master, 4);
            assert!(began.elapsed() < Duration::from_secs(5), "it took {:?}", began.elapsed());
            flows.answered(600);
            let report = flows.end();
            assert_eq!(
                report.lost(),
                counted_losses(&master) + overflowed(),
                "{engine}: {report}\n{}",
                master.log()
            );
            assert!(report.lost() > 0, "nobody closed anything: {report}");
            master.stop();
        });
    }
}

/// The journal names all four; then the keeper is told, before anybody is answered.
fn is_kept(world: &World, pids: &[u32]) -> bool {
    let journal: serde_json::Value = serde_json::from_str(&world.read("run/control.sock.journal")).unwrap();
    let workers = journal["workers"].as_array().unwrap();
    pids.len() == 4 && pids.iter().all(|pid| workers.iter().any(|worker| worker["pid"] == *pid))
}

/// Flows of two generations go on while the third one is launched, and this happens meanwhile.
fn flows_stay_while(happens: impl Fn(&mut Master<'_>, &Flows) + Sync) {
    world(&[Need::Root, Need::Bpf], |world| {
        for mode in ["sdk", "plain"] {
            let options: &'static str =
                if mode == "sdk" { "--mode sdk --ready-delay 500" } else { "--mode plain --ready-delay 500" };
            let mut master =
                Master::start(world, &with_flows(app(world, Program::Difficult(options), "ebpf")));
            let flows = Flows::start(spec(world).flows(50).rate(1500.0).new_flows(20.0).new_life(PATIENCE));
            upgrade(&master);
            flows.answered_by(2);
            flows.answered(500);
            let _client = master.begin("upgrade --wait");
            // What has just been asked for is forgotten with its master.
            master.wait_status("launching", |status| {
                status.state == MasterState::Launching && is_kept(world, &pids_of(status, 3))
            });
            master.status();
            happens(&mut master, &flows);
            master.wait_status("upgraded", |status| {
                status.active_generation == Some(3) && status.state == MasterState::Steady
            });
            flows.answered_by(3);
            // Longer than flows are remembered that are idle.
            flows.answered(3500);
            let report = stayed(flows);
            assert_eq!(report.moves, 0, "{report}");
            assert_eq!(report.generations.len(), 3, "{report}");
            wait_alone(&master, 3);
            master.stop();
        }
    });
}

#[test]
fn flows_stay_when_the_master_is_killed() {
    flows_stay_while(|master, flows| {
        master.kill();
        flows.answered(500);
        master.restart();
        master.wait_adopted();
    });
}

#[test]
fn flows_stay_when_the_master_is_replaced() {
    flows_stay_while(|master, flows| {
        reexec(master);
        flows.answered(500);
        reexec(master);
    });
}

/// Nobody has the table of flows any more: they begin anew, and none is lost.
#[test]
fn orphans_serve_on() {
    world(&[Need::Root, Need::Bpf], |world| {
        for (program, engine, has_flows) in [
            (Program::UdpEcho, "ebpf", true),
            (Program::Difficult("--mode plain"), "ebpf", false),
            (Program::Difficult("--mode plain"), "cbpf", false),
            (Program::Difficult("--mode sdk"), "cbpf", false),
        ] {
            let app = app(world, program, engine);
            let mut master = Master::start(world, &if has_flows { with_flows(app) } else { app });
            let flows = Flows::start(spec(world).flows(60).rate(1000.0).new_flows(20.0));
            let orphans: Vec<u32> = processes_of(&world.app).iter().map(|process| process.pid).collect();
            kill_with_keeper(world, &mut master);
            flows.answered(500);
            let receipt = replaced(&mut master, &orphans);
            flows.answered_by(receipt.to.unwrap());
            master.hup();
            flows.answered_by(receipt.to.unwrap() + 1);
            flows.end_lossless();
            master.stop();
        }
    });
}

/// New datagrams are refused, those of known flows too; what waits is answered.
#[test]
fn a_stop_answers_what_waits() {
    const WAITING: usize = 100;
    world(&[Need::Root, Need::Bpf], |world| {
        for (options, has_flows) in [
            ("--mode sdk --receive-delay 10", true),
            ("--mode plain --receive-delay 10", true),
            ("--mode plain --receive-delay 10", false),
        ] {
            let app = app(world, Program::Difficult(options), "ebpf");
            let master = Master::start(world, &if has_flows { with_flows(app) } else { app });
            let [known, unknown] = [0, 1].map(|_| {
                let client = UdpSocket::bind((world.address.ip(), 0)).unwrap();
                client.connect(world.address).unwrap();
                client.set_read_timeout(Some(Duration::from_secs(2))).unwrap();
                client
            });
            for _ in 0..WAITING {
                known.send(b"waiting").unwrap();
            }
            master.signal(Signal::TERM);
            master.wait_status("stopping", |status| status.state == MasterState::Stopping);
            unknown.send(b"too late").unwrap();
            let refused = unknown.recv(&mut [0; 64]).unwrap_err();
            assert_eq!(refused.kind(), ErrorKind::ConnectionRefused, "{refused}");
            assert!(!processes_of(&world.app).is_empty(), "nobody was there");
            known.send(b"too late").unwrap();
            let mut answers = 0;
            let mut refusals = 0;
            while answers < WAITING {
                match known.recv(&mut [0; 64]) {
                    Ok(_) => answers += 1,
                    Err(error) if error.kind() == ErrorKind::ConnectionRefused => refusals += 1,
                    Err(error) => panic!("{options}: after {answers} answers: {error}"),
                }
            }
            assert_eq!(refusals, 1, "{options}");
            master.ended(0);
        }
    });
}
