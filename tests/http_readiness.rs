//! Requests that prove a worker: they reach this very worker, and nobody else reaches it before it has passed.

use std::collections::BTreeMap;
use std::process::Command;

use reuseportd_wire::status::{Outcome, WorkerState};

use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::load::{Load, slow_accepts};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::kill;
use crate::support::world::{Need, World, world};

/// Where the workers listen, and no client comes from.
const OWN: &str = "127.0.0.77";

/// A load on that address.
fn begin_load(world: &World) -> Load {
    let mut spec = slow_accepts(world);
    spec.target.set_ip(OWN.parse().unwrap());
    Load::start(spec)
}

/// The difficult worker in this mode, asked for its health every 20 ms.
fn asked(world: &World, mode: &str) -> App {
    let mut app = App::test_worker(world, &options(mode, ""));
    app.listen[0].1.set_ip(OWN.parse().unwrap());
    let app = app.engine("ebpf").readiness("http");
    app.probe("interval = \"20ms\"").probe("path = \"/healthz?deep\"")
}

/// The worker's command line: what all have in common, and something besides.
fn options(mode: &str, others: &str) -> String {
    format!("--mode {mode} --accept-delay 4 {others}")
}

/// The same command with a log and other answers.
fn changed(world: &World, mode: &str, others: &str) -> Vec<String> {
    let log = world.path("connections.log");
    test_worker(&options(mode, &format!("--log {} {others}", log.display())))
}

/// A line of the workers' log.
#[derive(Debug)]
struct Line {
    generation: u32,
    pid: u32,
    peer: String,
    what: String,
}

const PROBE: &str = "GET /healthz?deep HTTP/1.1";

fn lines(world: &World) -> Vec<Line> {
    let parse = |line: &str| {
        let mut words = line.splitn(5, ' ');
        let mut word = |name: &str| words.next().unwrap().trim_start_matches(name).to_owned();
        let (generation, _, pid) = (word("generation="), word("seat="), word("pid="));
        let (peer, what) = (word("peer="), word(""));
        Line { generation: generation.parse().unwrap(), pid: pid.parse().unwrap(), peer, what }
    };
    world.read("connections.log").lines().map(parse).collect()
}

/// How often each process of a generation was asked for its health.
fn probes(world: &World, generation: u32) -> BTreeMap<u32, u32> {
    let mut counted = BTreeMap::new();
    for line in lines(world).iter().filter(|line| line.generation == generation && line.what == PROBE) {
        *counted.entry(line.pid).or_default() += 1;
    }
    counted
}

/// Clients whose connections a generation accepted. The master comes from the address it asks.
fn clients(world: &World, generation: u32) -> Vec<String> {
    let lines = lines(world).into_iter().filter(|line| line.generation == generation);
    let accepted = lines.filter(|line| line.what == "accepted").map(|line| line.peer);
    accepted.filter(|peer| !peer.starts_with(OWN)).collect()
}

fn no_client_meets_an_unhealthy_worker(mode: &str) {
    world(&[Need::Bpf], |world| {
        let mut app = asked(world, mode);
        let master = Master::start(world, &app);
        let load = begin_load(world);
        let workers = master.serving();
        app.command = changed(world, mode, "--health 503");
        // Time enough to ask each of them more than once.
        app.clone().upgrade("ready_timeout = \"3s\"").write();
        for generation in 2..=3 {
            let (code, receipt) = master.failing_upgrade();
            let reason = receipt.reason.unwrap_or_default();
            assert_eq!((code, receipt.outcome), (1, Outcome::RolledBack), "{reason}");
            assert!(reason.contains("seat") && reason.contains("HTTP/1.0 503"), "{reason}");
            let probes = probes(world, generation);
            assert!(probes.len() == 4 && probes.values().all(|asked| *asked > 1), "{probes:?}");
            assert_eq!(clients(world, generation), [""; 0], "clients met generation {generation}");
        }
        assert_eq!(master.serving(), workers, "the old generation has been touched");
        load.answered(100);
        let report = load.end_lossless();
        assert_eq!(report.generations.keys().collect::<Vec<_>>(), [&1], "{report}");

        // The log shows clients where there are any: the same workers, not asked.
        let load = begin_load(world);
        app.readiness = "notify";
        app.write();
        assert_eq!(master.upgrade().to, Some(4));
        load.answered(100);
        load.end_lossless();
        assert!(clients(world, 4).len() >= 100, "{:?}", clients(world, 4));
        master.stop();
    });
}

#[test]
fn no_client_meets_an_unhealthy_worker_sdk() {
    no_client_meets_an_unhealthy_worker("sdk");
}

#[test]
fn no_client_meets_an_unhealthy_worker_unmodified() {
    no_client_meets_an_unhealthy_worker("plain");
}

/// The answers that make a worker ready, with how many passes; every worker has to give them all, and is asked no more.
const ANSWERS: [(&str, u32, u32); 4] = [
    ("200", 2, 2),
    ("503,200", 1, 2),
    ("200,503,200,200", 2, 4),
    ("503,200,200,404,204,301,200,201,200", 3, 9),
];

fn every_worker_passes_for_itself(mode: &str) {
    world(&[Need::Bpf], |world| {
        let app = asked(world, mode);
        let master = Master::start(world, &app);
        let load = begin_load(world);
        for (generation, (answers, passes, times)) in (2..).zip(ANSWERS) {
            let mut next = app.clone().probe(format!("passes = {passes}"));
            next.command = changed(world, mode, &format!("--health {answers}"));
            next.write();
            assert_eq!(master.upgrade().to, Some(generation));
            load.answered_by(generation);
            let expected: BTreeMap<u32, u32> = master.serving().into_iter().map(|pid| (pid, times)).collect();
            assert_eq!((probes(world, generation), expected.len()), (expected, 4), "{answers}");
        }
        // Who takes the seat of a killed worker has to pass as well.
        let killed = master.serving()[0];
        kill([killed]);
        let status = master.wait_status("all serving again", |status| {
            let workers = &status.generations[0].workers;
            workers.iter().filter(|worker| worker.state == WorkerState::Serving).count() == 4
                && workers.iter().all(|worker| worker.pid != Some(killed))
        });
        let (_, _, times) = ANSWERS[3];
        let pid = status.generations[0].workers[0].pid.unwrap();
        assert_eq!(probes(world, 5).get(&pid), Some(&times), "{status:#?}");
        let report = load.end();
        // What the killed worker had in its hands: answered by threads, each with a connection.
        assert!(report.lost() <= 20, "{report}");
        master.stop();
    });
}

#[test]
fn every_sdk_worker_passes_for_itself() {
    every_worker_passes_for_itself("sdk");
}

#[test]
fn every_unmodified_worker_passes_for_itself() {
    every_worker_passes_for_itself("plain");
}

#[test]
fn every_socket_activated_worker_passes_for_itself() {
    every_worker_passes_for_itself("activated");
}

#[test]
fn with_cbpf_it_is_refused() {
    world(&[], |world| {
        for mode in ["plain", "activated"] {
            let app = asked(world, mode).engine("cbpf");
            let words = ["readiness.method = \"http\"", "ebpf", "CAP_BPF", "notify"];
            let mut master = Master::launch(world, &app, Command::new(REUSEPORTD));
            assert_eq!(master.wait_end(PATIENCE), Some(1), "{}", master.log());
            for word in words {
                assert!(master.log().replace("\\\"", "\"").contains(word), "{word}: {}", master.log());
            }
            drop(master);

            let mut notifying = app.clone().readiness("notify");
            notifying.probe.clear();
            let master = Master::start(world, &notifying);
            app.write();
            let (code, receipt) = master.failing_upgrade();
            let reason = receipt.reason.unwrap_or_default();
            assert_eq!((code, receipt.outcome), (1, Outcome::Refused), "{reason}");
            for word in words {
                assert!(reason.contains(word), "{word}: {reason}");
            }
            assert_eq!(master.status().active_generation, Some(1));
            master.stop();
        }
    });
}
