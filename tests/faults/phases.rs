//! Who is killed in each phase of an upgrade.

use std::net::TcpStream;

use reuseportd_wire::status::{GenerationState, MasterState, Outcome as Upgraded, Status};

use super::descriptors::recovers;
use super::{Fault, Outcome, under_load};
use crate::adoption::launched_is_kept;
use crate::canary::{pids_of, steps};
use crate::crash::queues_of_twenty;
use crate::orphans::{kill_with_keeper, replaced};
use crate::support::PATIENCE;
use crate::support::app::{App, test_worker};
use crate::support::client;
use crate::support::gate::Gate;
use crate::support::load::{Load, slow_accepts};
use crate::support::master::Master;
use crate::support::process::{keepers_of, kill, processes_of, wait_gone};
use crate::support::watch::seats;
use crate::support::world::World;

/// Where an upgrade is held.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
enum Point {
    Launching,
    Canary,
    Baking,
    Retiring,
    Draining,
}

const POINTS: [Point; 5] = [Point::Launching, Point::Canary, Point::Baking, Point::Retiring, Point::Draining];

/// A worker that accepts has one connection in its hands, and one that is being answered.
pub(super) const IN_HANDS: u64 = 2;

pub(super) fn plain_app(world: &World, engine: &'static str) -> App {
    let app = App::test_worker(world, "--mode sdk --accept-delay 5").engine(engine);
    let app = app.restart("breaker = { exits = 1000 }").restart("stable_after = \"1ms\"");
    app.upgrade("stop_when = \"idle\"").upgrade("idle_timeout = \"2s\"")
}

/// An upgrade of it goes through every phase, and can be held in each.
fn phased(world: &World, gate: &Gate, engine: &'static str) -> App {
    let mut app = plain_app(world, engine);
    app.command = test_worker("--mode sdk --accept-delay 5 --ready-delay 2000");
    let app = app.upgrade(steps(&["{ share = \"30%\", hold = \"1s\" }"])).upgrade("bake = \"1s\"");
    gate.guards(app, "10m")
}

/// An upgrade on its way.
struct Upgrade<'a> {
    world: &'a World,
    gate: &'a Gate,
    /// They keep the old generation from idling, and from ending: so many that no worker has them all.
    clients: Vec<TcpStream>,
    to: u32,
    checks: usize,
}

impl<'a> Upgrade<'a> {
    fn begin(world: &'a World, gate: &'a Gate, master: &Master<'_>) -> Upgrade<'a> {
        let from = master.status().active_generation.expect("it serves");
        let (clients, checks) = (open_clients(world), gate.runs().len());
        let done = master.cli("upgrade");
        assert_eq!(done.code, 0, "{done:?}");
        Upgrade { world, gate, clients, to: from + 1, checks }
    }

    /// From the point before, or from the beginning.
    fn reach(&mut self, master: &Master<'_>, point: Point) -> Status {
        if [Point::Baking, Point::Retiring].contains(&point) {
            self.gate.answer(1, 0);
        }
        if [Point::Canary, Point::Baking].contains(&point) {
            self.checked_again(master);
        }
        let is_there = |status: &Status| match point {
            Point::Launching => {
                status.state == MasterState::Launching && launched_is_kept(self.world, status, self.to)
            }
            Point::Canary => status.state == MasterState::Canary,
            Point::Baking => status.state == MasterState::Baking,
            Point::Retiring => status.state == MasterState::Retiring,
            Point::Draining => {
                status.generations.iter().any(|one| one.state == GenerationState::Draining)
                    && status.state == MasterState::Steady
            }
        };
        master.wait_status(&format!("{point:?}"), is_there)
    }

    /// Waits until the check that holds it runs.
    fn checked_again(&mut self, master: &Master<'_>) {
        self.checks += 1;
        self.gate.begun(master, self.checks);
    }

    fn reach_from_beginning(&mut self, master: &Master<'_>, point: Point) -> Status {
        POINTS
            .into_iter()
            .filter(|before| *before <= point)
            .map(|one| self.reach(master, one))
            .last()
            .unwrap()
    }

    /// It goes to its end.
    fn end(self, master: &Master<'_>) {
        let (from, to) = (self.to - 1, self.to);
        self.clients.into_iter().for_each(|client| answered_by(from, client));
        completed(master, to);
    }
}

pub(super) fn open_clients(world: &World) -> Vec<TcpStream> {
    (0..8).map(|_| client::open(world)).collect()
}

fn answered_by(generation: u32, client: TcpStream) {
    let answer = client::answer(client);
    assert!(answer.contains(&format!("generation={generation} ")), "{answer:?}");
}

/// Nothing is left of the generations before this one.
pub(super) fn completed(master: &Master<'_>, to: u32) {
    let status = master.wait_status("drained", |status| {
        status.generations.len() == 1 && status.state == MasterState::Steady
    });
    let receipt = status.last_upgrade.expect("every upgrade leaves one");
    assert_eq!((receipt.outcome, receipt.to), (Upgraded::Completed, Some(to)), "{receipt:#?}");
}

/// An ordinary upgrade after all of it.
fn ends(master: Master<'_>, app: &App, gate: &Gate, load: Load) -> Outcome {
    // A config without a gate is for the upgrade after this one too.
    app.write();
    gate.answer(9, 0);
    recovers(master, load)
}

#[test]
fn the_master_is_killed_in_every_phase() {
    under_load(
        &Fault {
            name: "SIGKILL of the master",
            when: "upgrade: launching, canary, baking, retiring, draining",
            then: "workers serve on; the next master has everything from the keeper and goes on with the same upgrade",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let gate = Gate::new(world);
            let mut master = Master::start(world, &phased(world, &gate, engine));
            let load = load();
            let mut upgrade = Upgrade::begin(world, &gate, &master);
            for point in POINTS {
                let before = upgrade.reach(&master, point);
                master.kill();
                load.answered(100);
                master.restart();
                let after = master.wait_adopted();
                assert_eq!(pids_of(&after, upgrade.to), pids_of(&before, upgrade.to), "{point:?}");
                if [Point::Canary, Point::Baking].contains(&point) {
                    upgrade.checked_again(&master);
                }
            }
            upgrade.end(&master);
            ends(master, &plain_app(world, engine), &gate, load)
        },
    );
}

#[test]
fn the_keeper_is_killed_in_every_phase() {
    under_load(
        &Fault {
            name: "SIGKILL of the keeper",
            when: "upgrade: launching, canary, baking, retiring, draining",
            then: "the upgrade goes on; the log says so, and a new keeper is started and given everything",
            lost: "",
        },
        &[],
        &["ebpf", "cbpf"],
        slow_accepts,
        |world, engine, load| {
            let gate = Gate::new(world);
            let master = Master::start(world, &phased(world, &gate, engine));
            let load = load();
            let mut upgrade = Upgrade::begin(world, &gate, &master);
            for (count, point) in (1..).zip(POINTS) {
                upgrade.reach(&master, point);
                master.wait_status("a keeper", |_| keepers_of(&world.app).len() == 1);
                kill(keepers_of(&world.app));
                let said = || master.log().matches("event=\"keeper_ended\"").count() >= count;
                master.wait_status("its end is said", |_| said());
            }
            master.wait_status("a keeper", |_| keepers_of(&world.app).len() == 1);
            upgrade.end(&master);
            ends(master, &plain_app(world, engine), &gate, load)
        },
    );
}

/// Both are killed at these points of an upgrade each.
fn nobody_knows(fault: &Fault, points: &[Point]) {
    under_load(fault, &[], &["ebpf", "cbpf"], slow_accepts, |world, engine, load| {
        let gate = Gate::new(world);
        let (app, phased) = (plain_app(world, engine), phased(world, &gate, engine));
        let mut master = Master::start(world, &app);
        let load = load();
        for point in points {
            phased.write();
            let mut upgrade = Upgrade::begin(world, &gate, &master);
            upgrade.reach_from_beginning(&master, *point);
            let check = gate.runs().last().map(|run| run.number("PID"));
            let mut orphans: Vec<u32> = processes_of(&world.app).iter().map(|process| process.pid).collect();
            orphans.retain(|pid| Some(*pid) != check);
            kill_with_keeper(world, &mut master);
            upgrade.clients.into_iter().for_each(|client| answered_by(upgrade.to - 1, client));
            load.answered(100);
            app.write();
            replaced(&mut master, &orphans);
            if [Point::Canary, Point::Baking].contains(point) {
                gate.answer(1, 0);
            }
            check.into_iter().for_each(|pid| wait_gone(pid, PATIENCE));
        }
        recovers(master, load)
    });
}

const KEEPER_GONE_TOO: &str = "workers serve on; the next master finds them as orphans, ends what was never steered to, and \
    upgrades away from them by the config as it is then; the upgrade that was under way is forgotten, and a check \
    of it is left alone until it ends by itself";

#[test]
fn master_and_keeper_are_killed_before_the_switch() {
    nobody_knows(
        &Fault {
            name: "SIGKILL of master and keeper at the same time",
            when: "upgrade: launching, canary",
            then: KEEPER_GONE_TOO,
            lost: "",
        },
        &[Point::Launching, Point::Canary],
    );
}

#[test]
fn master_and_keeper_are_killed_after_the_switch() {
    nobody_knows(
        &Fault {
            name: "SIGKILL of master and keeper at the same time",
            when: "upgrade: baking, retiring, draining",
            then: KEEPER_GONE_TOO,
            lost: "",
        },
        &[Point::Baking, Point::Retiring, Point::Draining],
    );
}

#[test]
fn a_new_worker_is_killed_while_the_old_ones_leave() {
    under_load(
        &Fault {
            name: "SIGKILL of a worker",
            when: "upgrade: a new one while retiring, draining",
            then: "the seat is filled again; the upgrade goes on and completes",
            lost: "what each killed worker had accepted and not answered",
        },
        &[],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let gate = Gate::new(world);
            let master = Master::start(world, &phased(world, &gate, engine));
            let load = load();
            let mut upgrade = Upgrade::begin(world, &gate, &master);
            for point in POINTS {
                let status = upgrade.reach(&master, point);
                if point >= Point::Retiring {
                    kill_and_see_it_filled(&master, pids_of(&status, 2)[0]);
                }
            }
            upgrade.end(&master);
            let outcome = ends(master, &plain_app(world, engine), &gate, load);
            Outcome { excused: 2 * IN_HANDS, ..outcome }
        },
    );
}

fn kill_and_see_it_filled(master: &Master<'_>, pid: u32) {
    let find = |status: &Status| {
        let workers =
            status.generations.iter().flat_map(|one| one.workers.iter().map(|w| (one.generation, w)));
        workers.map(|(of, worker)| (of, worker.seat, worker.pid, worker.restarts)).collect::<Vec<_>>()
    };
    let status = master.status();
    let (of, seat, _, restarts) =
        *find(&status).iter().find(|(_, _, one, _)| *one == Some(pid)).expect("it is on a seat");
    kill([pid]);
    master.wait_status("filled again", |status| {
        let is_filled = |w: &&(u32, u32, Option<u32>, u32)| {
            (w.0, w.1) == (of, seat) && w.3 == restarts + 1 && w.2 != Some(pid)
        };
        find(status)
            .iter()
            .find(is_filled)
            .is_some_and(|(_, _, new, _)| seats(status, of).iter().any(|(_, serves)| Some(*serves) == *new))
    });
}

#[test]
fn an_old_worker_is_killed_in_every_phase() {
    under_load(
        &Fault {
            name: "SIGKILL of a worker",
            when: "upgrade: an old one while launching, canary, baking, retiring, draining",
            then: "until the old ones leave the seat is filled again; the upgrade goes on and completes",
            lost: "what each killed worker had accepted and not answered",
        },
        &[],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let gate = Gate::new(world);
            let master = Master::start(world, &phased(world, &gate, engine));
            let load = load();
            let mut upgrade = Upgrade::begin(world, &gate, &master);
            for point in POINTS {
                let status = upgrade.reach(&master, point);
                let old = pids_of(&status, 1)[0];
                if point < Point::Retiring {
                    kill_and_see_it_filled(&master, old);
                } else {
                    kill([old]);
                    master.wait_status("seen", |status| !pids_of(status, 1).contains(&old));
                }
            }
            // Those of the killed are gone with them.
            drop(upgrade.clients);
            completed(&master, 2);
            let outcome = ends(master, &plain_app(world, engine), &gate, load);
            Outcome { excused: POINTS.len() as u64 * IN_HANDS, ..outcome }
        },
    );
}
