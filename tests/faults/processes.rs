//! Processes that are killed, stopped, frozen or starved.

use super::{Fault, Outcome, under_load};
use crate::crash::{kill_the_fullest, one_at_a_time, queues_of_twenty};
use crate::support::master::Master;

#[test]
fn a_worker_is_killed() {
    const KILLS: u32 = 2;
    under_load(
        &Fault {
            name: "SIGKILL of a worker",
            when: "handover worker with a long queue, siblings serve",
            then: "the seat is filled again at once; siblings take its queue",
            lost: "the one connection in each worker's hands",
        },
        &[],
        &["ebpf", "cbpf"],
        queues_of_twenty,
        |world, engine, load| {
            let master = Master::start(world, &one_at_a_time(world, "sdk", engine));
            let load = load();
            kill_the_fullest(&master, &load, KILLS);
            let report = load.end();
            master.stop();
            Outcome { report, excused: KILLS.into() }
        },
    );
}
