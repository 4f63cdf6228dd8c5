//! Who is killed in the other phases: a rolling batch, seats that are restored, a launch that is rolled back, a stop.

use reuseportd_wire::status::{MasterState, Outcome as Upgraded, Status, WorkerState};
use rustix::process::Signal;

use super::phases::{IN_HANDS, completed, open_clients, plain_app};
use super::{Fault, Outcome, under_load};
use crate::crash::queues_of_twenty;
use crate::support::app::{App, test_worker};
use crate::support::client;
use crate::support::load::Load;
use crate::support::master::Master;
use crate::support::process::{keepers_of, kill};
use crate::support::watch::seats;
use crate::support::world::World;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    OldWorker,
    Master,
    Keeper,
}

impl Victim {
    /// Killed, and what comes after it waited for.
    fn strike(self, master: &mut Master<'_>, load: &Load) {
        match self {
            Victim::OldWorker => kill([master.serving()[0]]),
            Victim::Keeper => kill_keeper(master),
            Victim::Master => {
                master.kill();
                load.answered(50);
                master.restart();
                master.wait_adopted();
            }
        }
    }
}

fn kill_keeper(master: &Master<'_>) {
    master.wait_status("a keeper", |_| keepers_of(master.app()).len() == 1);
    kill(keepers_of(master.app()));
}

/// Batch by batch; the last seat fails if `fail` says how.
fn rolling(world: &World, engine: &'static str, fail: &str) -> App {
    let mut app = plain_app(world, engine);
    app.command =
        test_worker(&format!("--mode sdk --accept-delay 5 --ready-delay 1000 --fail-seat 3 {fail}"));
    app.upgrade("batch = 1")
}

fn waits_for_batch(master: &Master<'_>, to: u32) {
    master.wait_status("two of four are new", |status| {
        assert_ne!(status.active_generation, Some(to), "too late: {status:#?}");
        seats(status, to).len() == 2
    });
}

fn rolled_back(master: &Master<'_>, to: u32) {
    let status = master.wait_status("as before", |status| {
        status.generations.len() == 1 && status.state == MasterState::Steady && master.serving().len() == 4
    });
    let receipt = status.last_upgrade.expect("every upgrade leaves one");
    assert_eq!((receipt.outcome, receipt.to), (Upgraded::RolledBack, Some(to)), "{receipt:#?}");
}

/// A rolling batch, seats that are restored, a launch that is rolled back, and a stop.
fn in_other_phases(fault: &Fault, victim: Victim) {
    under_load(fault, &[], &["ebpf", "cbpf"], queues_of_twenty, |world, engine, load| {
        let mut master = Master::start(world, &rolling(world, engine, ""));
        let load = load();
        let begin = |master: &Master<'_>| assert_eq!(master.cli("upgrade").code, 0, "{}", master.log());
        begin(&master);
        waits_for_batch(&master, 2);
        victim.strike(&mut master, &load);
        completed(&master, 2);

        rolling(world, engine, "--fail exit-before-ready").write();
        begin(&master);
        master.wait_status("restoring", |status| {
            let is_old =
                |worker: &&reuseportd_wire::status::WorkerStatus| worker.state == WorkerState::Starting;
            let old = status.generations.iter().filter(|one| one.generation == 2);
            status.state == MasterState::RollingBack && old.flat_map(|one| &one.workers).any(|w| is_old(&w))
        });
        victim.strike(&mut master, &load);
        rolled_back(&master, 3);

        let mut stuck = plain_app(world, engine);
        stuck.command = test_worker("--mode plain --fail never-ready");
        stuck.upgrade("ready_timeout = \"1s\"").write();
        begin(&master);
        master.wait_status("rolling back", |status| status.state == MasterState::RollingBack);
        victim.strike(&mut master, &load);
        rolled_back(&master, 4);

        plain_app(world, engine).write();
        let receipt = master.upgrade();
        load.answered_by(receipt.to.expect("of a completed upgrade"));
        let report = load.end();
        stopping(world, master, victim);
        let excused = if victim == Victim::OldWorker { 3 * IN_HANDS } else { 0 };
        Outcome { report, excused }
    });
}

/// Nobody is answered any more but who is being served.
fn stopping(world: &World, mut master: Master<'_>, victim: Victim) {
    let clients = open_clients(world);
    let active = |status: &Status| status.generations.iter().filter_map(|one| one.connections).sum::<u64>();
    master.wait_status("accepted", |status| active(status) == 8);
    let worker = master.serving()[0];
    master.signal(Signal::TERM);
    master.wait_status("stopping", |status| status.state == MasterState::Stopping);
    match victim {
        Victim::OldWorker => kill([worker]),
        Victim::Keeper => kill(keepers_of(&world.app)),
        Victim::Master => {
            master.kill();
            master.restart();
            let status = master.wait_adopted();
            assert_eq!(status.state, MasterState::Stopping, "{status:#?}");
        }
    }
    match victim {
        Victim::OldWorker => drop(clients),
        _ => clients.into_iter().for_each(|client| assert!(client::answer(client).contains("generation="))),
    }
    master.ended(0);
}

#[test]
fn a_worker_is_killed_in_the_other_phases() {
    in_other_phases(
        &Fault {
            name: "SIGKILL of a worker",
            when: "an old one while a batch is rolled, while replaced seats are restored, rolling back, stopping",
            then: "but for stopping the seat is filled again; what is under way goes on",
            lost: "what each killed worker had accepted and not answered",
        },
        Victim::OldWorker,
    );
}

#[test]
fn the_master_is_killed_in_the_other_phases() {
    in_other_phases(
        &Fault {
            name: "SIGKILL of the master",
            when: "while a batch is rolled, while replaced seats are restored, rolling back, stopping",
            then: "the next master goes on where the last one was",
            lost: "",
        },
        Victim::Master,
    );
}

#[test]
fn the_keeper_is_killed_in_the_other_phases() {
    in_other_phases(
        &Fault {
            name: "SIGKILL of the keeper",
            when: "while a batch is rolled, while replaced seats are restored, rolling back, stopping",
            then: "what is under way goes on, with a new keeper",
            lost: "",
        },
        Victim::Keeper,
    );
}
