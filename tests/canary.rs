//! Canaries: a new generation gets its share of the new connections, no more and no less, and loses none of them.

mod aborts;
mod queues;

use std::net::SocketAddr;

use reuseportd_bench::Report;
use reuseportd_wire::status::{GenerationState, GenerationStatus, MasterState, Phase, Status};

use crate::support::app::App;
use crate::support::gate::Gate;
use crate::support::load::{Load, spec};
use crate::support::master::Master;
use crate::support::process::Running;
use crate::support::world::{Need, World, needs_of, world};
use crate::support::{PATIENCE, rounds};
use crate::upgrade::control_loses;

/// A step, and what may be measured in it. Of so many connections each is a draw of its own: the bounds are five standard
/// deviations away from the share, or more, so that chance does not break the test once in a million runs.
struct Step {
    share: &'static str,
    connections: u32,
    /// The same in the long run: six seconds at the rate of all of these loads, or more.
    long: u32,
    least: f64,
    most: f64,
}

const RATE: f64 = 2000.0;
/// Of 6000 the deviation is 0.087 %.
const HALF: Step = Step { share: "0.5%", connections: 6000, long: 12_000, least: 0.000_1, most: 0.01 };
/// Of 10,000 it is 0.099 %.
const ONE: Step = Step { share: "1%", connections: 10_000, long: 12_000, least: 0.005, most: 0.015 };
/// Of 6000 it is 0.39 %.
const TEN: Step = Step { share: "10%", connections: 6000, long: 12_000, least: 0.08, most: 0.12 };

impl Step {
    fn line(&self) -> String {
        format!("{{ share = {:?}, hold = \"1s\" }}", self.share)
    }

    fn share(&self) -> f64 {
        self.share.trim_end_matches('%').parse::<f64>().unwrap() / 100.0
    }

    /// Connections that are all begun in this step, to these addresses: how many of them the generation gets.
    fn measure(&self, what: &str, world: &World, master: &Master, load: &Load, addresses: &[SocketAddr]) {
        in_force(master, 2, self.share());
        let count = u64::from(rounds(self.connections, self.long));
        let measured: Vec<Load> = addresses
            .iter()
            .map(|address| {
                let mut spec = spec(world).rate(RATE / addresses.len() as f64).limit(count);
                spec.target = *address;
                load.beside(spec)
            })
            .collect();
        let reports: Vec<Report> = measured.into_iter().map(Load::join).collect();
        in_force(master, 2, self.share());
        for report in reports {
            let answers = |generation| report.generations.get(&generation).map_or(0, |of| of.answers);
            let (old, new) = (answers(1), answers(2));
            let share = new as f64 / count as f64;
            eprintln!(
                "{what}, {} of {}: {new} of {count}, {:.2} %",
                self.share,
                report.target,
                100.0 * share
            );
            assert_eq!((report.lost(), old + new), (0, count), "{report}");
            assert!((self.least..=self.most).contains(&share), "{}: {share} {report}", self.share);
        }
    }
}

/// Waits for the canary to have this share, which status tells of both generations.
pub(crate) fn in_force(master: &Master, to: u32, share: f64) -> Status {
    let of = |status: &Status, generation| {
        status.generations.iter().find(|one| one.generation == generation).cloned()
    };
    let close = |one: &GenerationStatus, share: f64| (one.share - share).abs() < 1e-9;
    let status = master.wait_status("a canary of this share", |status| {
        of(status, to).is_some_and(|one| one.state == GenerationState::Canary && close(&one, share))
    });
    assert_eq!((status.state, status.active_generation), (MasterState::Canary, Some(to - 1)), "{status:#?}");
    let old = of(&status, to - 1).expect("both serve");
    assert!(old.state == GenerationState::Active && close(&old, 1.0 - share), "{status:#?}");
    status
}

/// The pids of a generation, by seat.
pub(crate) fn pids_of(status: &Status, generation: u32) -> Vec<u32> {
    let of = status.generations.iter().filter(|one| one.generation == generation);
    of.flat_map(|one| &one.workers).filter_map(|worker| worker.pid).collect()
}

/// The line of the config.
pub(crate) fn steps(steps: &[&str]) -> String {
    format!("canary = [{}]", steps.join(", "))
}

/// An upgrade by these steps under load.
fn shares(engine: &'static str, mode: &str, canary: &[Step]) {
    world(needs_of(engine), |world| {
        let gate = Gate::new(world);
        let lines: Vec<String> = canary.iter().map(Step::line).collect();
        let line = steps(&lines.iter().map(String::as_str).collect::<Vec<_>>());
        let app = App::test_worker(world, &format!("--mode {mode}")).engine(engine).upgrade(line);
        let master = Master::start(world, &gate.guards(app, "10m"));
        let load = Load::start(spec(world).rate(100.0).slow(20));
        let upgrade = master.begin("upgrade --wait=drained --json");
        for step in canary {
            step.measure(&format!("{mode} {engine}"), world, &master, &load, &[world.address]);
            gate.answer(1, 0);
        }
        completed(&master, upgrade);
        load.answered_by(2);
        load.end_lossless();
        master.stop();
    });
}

fn completed(master: &Master, upgrade: Running) {
    let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
    assert_eq!((code, receipt.to, receipt.reason.as_deref()), (0, Some(2), None), "{receipt:#?}");
    assert_eq!(receipt.steer_back_us, None, "{receipt:#?}");
    let phases: Vec<Phase> = receipt.phases.iter().map(|time| time.phase).collect();
    let canary = [Phase::Launching, Phase::Canary, Phase::Switch, Phase::Retiring, Phase::Draining];
    assert_eq!(phases, canary, "{receipt:#?}");
}

#[test]
fn every_share_sdk_ebpf() {
    shares("ebpf", "sdk", &[HALF, ONE, TEN]);
}

#[test]
fn every_share_unmodified_cbpf() {
    shares("cbpf", "plain", &[HALF, ONE, TEN]);
}

#[test]
fn a_tenth_sdk_cbpf() {
    shares("cbpf", "sdk", &[TEN]);
}

#[test]
fn a_tenth_unmodified_ebpf() {
    shares("ebpf", "plain", &[TEN]);
}

fn the_same_share_on_each_listener(engine: &'static str) {
    world(needs_of(engine), |world| {
        let gate = Gate::new(world);
        let second = SocketAddr::new(world.address.ip(), world.address.port() + 1);
        let mut app = App::test_worker(world, "--mode plain").engine(engine).upgrade(steps(&[&TEN.line()]));
        app.listen.push(("second".into(), second));
        let master = Master::start(world, &gate.guards(app, "10m"));
        let load = Load::start(spec(world).rate(100.0));
        let upgrade = master.begin("upgrade --wait=drained --json");
        TEN.measure(engine, world, &master, &load, &[world.address, second]);
        gate.answer(1, 0);
        completed(&master, upgrade);
        load.end_lossless();
        master.stop();
    });
}

#[test]
fn the_same_share_on_each_listener_ebpf() {
    the_same_share_on_each_listener("ebpf");
}

#[test]
fn the_same_share_on_each_listener_cbpf() {
    the_same_share_on_each_listener("cbpf");
}

/// What these loads show: the naive way to end a worker loses under them.
#[test]
fn the_load_of_a_canary_shows_losses() {
    world(&[], |world| control_loses(world, spec(world).rate(RATE / 4.0).slow(20), 5));
}

#[test]
fn two_steps_a_bake_and_their_checks() {
    world(&[Need::Root], |world| {
        let gate = Gate::new(world);
        let app = App::test_worker(world, "--mode sdk")
            .app("user = 61234\ngroup = 61234\nenvironment = { COLOUR = \"dark blue\" }")
            .upgrade(steps(&["{ share = \"5%\", hold = \"1s\" }", "{ share = \"50%\", hold = \"1s\" }"]))
            .upgrade("bake = \"1s\"");
        let master = Master::start(world, &gate.guards(app, "10m"));
        let load = Load::start(spec(world).rate(200.0).slow(10));
        let upgrade = master.begin("upgrade --wait=drained --json");
        for (run, phase, share) in [(1, "canary", "0.05"), (2, "canary", "0.5"), (3, "baking", "1")] {
            if phase == "canary" {
                in_force(&master, 2, share.parse().unwrap());
            }
            let ran = gate.begun(&master, run);
            let status = master.status();
            let new = status.generations.iter().find(|one| one.generation == 2).unwrap();
            let pids: Vec<String> =
                new.workers.iter().map(|worker| worker.pid.unwrap().to_string()).collect();
            let mut told: Vec<&str> = ran.variable("REUSEPORTD_PIDS").split(' ').collect();
            told.sort_unstable_by_key(|pid| pids.iter().position(|one| one == pid));
            assert_eq!(told, pids);
            let listen = format!("default=tcp:{}", world.address);
            for (name, value) in [
                ("REUSEPORTD_APP", world.app.as_str()),
                ("REUSEPORTD_GENERATION", "2"),
                ("REUSEPORTD_PHASE", phase),
                ("REUSEPORTD_SHARE", share),
                ("REUSEPORTD_LISTEN", &listen),
                ("COLOUR", "dark blue"),
                ("UID", "61234"),
            ] {
                assert_eq!(ran.variable(name), value, "{name} of {ran:#?}");
            }
            let receipt = ran.receipt();
            assert_eq!((receipt.from, receipt.to, receipt.reason.clone()), (Some(1), Some(2), None));
            assert_eq!(receipt.checks_passed, u32::try_from(run).unwrap() - 1, "{receipt:#?}");
            assert_eq!(receipt.phases[0].phase, Phase::Launching, "{receipt:#?}");
            gate.answer(1, 0);
        }
        let (code, receipt) = master.receipt(upgrade.finish(PATIENCE));
        let phases: Vec<Phase> = receipt.phases.iter().map(|time| time.phase).collect();
        let all =
            [Phase::Launching, Phase::Canary, Phase::Switch, Phase::Baking, Phase::Retiring, Phase::Draining];
        assert_eq!((code, &phases[..], receipt.checks_passed), (0, &all[..], 3), "{receipt:#?}");
        for (index, least) in [(1, 2000), (3, 1000)] {
            assert!(receipt.phases[index].ms >= least, "shorter than the hold: {receipt:#?}");
        }
        load.end_lossless();
        master.stop();
    });
}

/// Checks come at the beginning of a phase, and when the interval has passed since the last one.
#[test]
fn checks_come_at_the_beginning_and_every_interval() {
    world(&[], |world| {
        let gate = Gate::new(world);
        let app = App::test_worker(world, "--mode plain")
            .upgrade(steps(&["{ share = \"5%\", hold = \"100ms\" }"]))
            .upgrade("bake = \"10m\"");
        let mut app = gate.guards(app, "10m");
        let master = Master::start(world, &app);
        let upgrade = master.begin("upgrade --wait");
        gate.answer(2, 0);
        assert_eq!(gate.begun(&master, 1).variable("REUSEPORTD_PHASE"), "canary");
        assert_eq!(gate.begun(&master, 2).variable("REUSEPORTD_PHASE"), "baking");
        assert_eq!(master.cli("rollback --wait").code, 0);
        assert_eq!(upgrade.finish(PATIENCE).code, 1);

        app.upgrade.pop();
        app.upgrade("check_interval = \"300ms\"").write();
        let upgrade = master.begin("upgrade --wait");
        gate.answer(4, 0);
        let last = gate.begun(&master, 7);
        assert_eq!(master.cli("rollback --wait").code, 0);
        assert_eq!(upgrade.finish(PATIENCE).code, 1);
        // Nobody wants to know any more what the last one finds.
        crate::support::process::wait_gone(last.number("PID"), PATIENCE);
        let began: Vec<u64> = gate.runs()[2..].iter().map(|run| run.number("AT")).collect();
        // The first of the bake does not wait for the interval to pass.
        for pair in began[1..].windows(2) {
            assert!(pair[1] - pair[0] >= 300_000_000, "too early: {began:?}");
        }
        master.stop();
    });
}
