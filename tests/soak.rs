//! Upgrades without end: what the master has, its keeper and the kernel, is as much after a thousand as after fifty.
//!
//! `tests/machine/soak` runs it long. `REUSEPORTD_TEST_SOAK` is the number of upgrades,
//! `REUSEPORTD_TEST_SOAK_PROGRAM` an optimised build; with `REUSEPORTD_TEST_WRITE=1`
//! the figures are written into `docs/soak.md`.

mod sample;
mod table;

use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use reuseportd_wire::status::{MasterState, Outcome, Status, WorkerState};

use self::sample::{Bpf, Sample, cgroup_of, nothing_is_left};
use self::table::Table;
use crate::reexec::reexec;
use crate::support::app::{App, test_worker};
use crate::support::flows::{self, Flows};
use crate::support::load::{self, Load};
use crate::support::master::{Master, REUSEPORTD};
use crate::support::process::kill;
use crate::support::rounds;
use crate::support::unix_load::UnixLoad;
use crate::support::world::{Need, World, world};

const WORKERS: u32 = 2;
/// Between two samples.
const STRETCHES: u32 = 5;

/// The workers of a stretch of upgrades, one kind after the other. There are as many stretches between two samples, so
/// that each sample finds the last kind.
const KINDS: [Kind; STRETCHES as usize] = [
    Kind { options: "--mode plain", fails: "--mode plain --fail exit-after-listen", lines: &[] },
    Kind {
        options: "--mode activated",
        fails: "--mode activated --fail exit-before-ready",
        lines: &[(Some("tcp"), "bind = \"master\"")],
    },
    Kind {
        options: "--mode plain --fail no-reuseport",
        fails: "--mode plain --fail exit-before-ready",
        lines: &[(None, "force_reuseport = true")],
    },
    Kind { options: "--mode plain --threads 2", fails: "--mode plain --fail exit-after-listen", lines: &[] },
    Kind { options: "--mode sdk", fails: "--mode sdk --fail exit-before-ready", lines: &[] },
];

/// The program that is to hold out: that of the tests, or another build of it.
fn program() -> PathBuf {
    std::env::var_os("REUSEPORTD_TEST_SOAK_PROGRAM").map_or(REUSEPORTD.into(), PathBuf::from)
}

struct Kind {
    options: &'static str,
    /// Those of workers that never get ready.
    fails: &'static str,
    lines: &'static [(Option<&'static str>, &'static str)],
}

/// The service and what was done to it.
struct Soak<'a> {
    world: &'a World,
    app: App,
    master: Master<'a>,
    /// Upgrades and rollbacks that were completed.
    upgrades: u32,
    /// Connections and datagrams, and how many of them were lost.
    made: u64,
    lost: u64,
}

impl<'a> Soak<'a> {
    fn start(world: &'a World, engine: &'static str) -> Soak<'a> {
        let mut app = App::test_worker(world, KINDS[KINDS.len() - 1].options).workers(WORKERS).engine(engine);
        app.listen = vec![("tcp".into(), world.address), ("udp".into(), world.address)];
        app.listen_lines.push((Some("udp"), "protocol = \"udp\""));
        if engine == "ebpf" {
            app.listen_lines.push((Some("udp"), "affinity = \"flow\"\nflow_timeout = \"200ms\""));
        }
        let app = app.unix("unix", &world.path("web.sock"), "").upgrade("max_draining = 10");
        // As many deaths as one likes.
        let app = app.restart("breaker = { exits = 1000 }").restart("stable_after = \"1ms\"");
        let mut master = Master::launch(world, &app, Command::new(program()));
        master.wait_ready();
        Soak { world, master, app, upgrades: 0, made: 0, lost: 0 }
    }

    /// So many upgrades under a light steady load, one that fails and a rollback among them, and when the load is over a
    /// worker is killed: what it holds dies with it.
    fn stretch(&mut self, kind: &Kind, upgrades: u32, with_reexec: bool) {
        let tcp = Load::light(load::spec(self.world).rate(100.0).slow(4));
        let lived = Duration::from_millis(300);
        let udp = Flows::light(flows::spec(self.world).rate(200.0).new_flows(50.0).new_life(lived));
        let mut app = self.app.clone();
        app.listen_lines.extend_from_slice(kind.lines);
        let run = |mut app: App, options: &str| {
            app.command = test_worker(&format!("{options} --accept-delay 5"));
            app.write();
        };
        run(app.clone(), kind.options);
        self.complete("upgrade");
        let unix = kind
            .options
            .contains("activated")
            .then(|| UnixLoad::start(self.world.path("web.sock"), "hello\n", 1));
        run(app.clone(), kind.fails);
        assert_eq!(self.master.failing_upgrade().0, 1);
        run(app, kind.options);
        if with_reexec {
            reexec(&self.master);
        }
        for one in 1..upgrades {
            self.complete(if one == 2 { "rollback" } else { "upgrade" });
        }
        let unix = unix.map(UnixLoad::end).unwrap_or_default();
        let (udp, tcp, full) = (udp.end(), tcp.end(), flows::overflowed());
        assert_eq!(full, 0, "no room for datagrams: the load is too heavy for this machine");
        self.made += tcp.issued + udp.sent + unix.answers.values().sum::<u64>();
        let lost = tcp.lost() + udp.lost() + unix.lost.len() as u64;
        assert_eq!(lost, 0, "{tcp}\n{udp}\n{:?}", unix.lost);
        self.lost += lost;
        kill(self.master.serving().first().copied());
        self.alone();
    }

    /// An upgrade or a rollback, which has to be completed.
    fn complete(&mut self, what: &str) {
        let (code, receipt) = self.master.receipt(self.master.cli(&format!("{what} --wait --json")));
        assert_eq!((code, receipt.outcome), (0, Outcome::Completed), "{receipt:#?}\n{}", self.master.log());
        self.upgrades += 1;
    }

    /// Waits until there is nothing but one generation with all its workers.
    fn alone(&self) -> Status {
        let serving = |status: &Status| {
            let workers = || status.generations.iter().flat_map(|one| &one.workers);
            workers().count() == WORKERS as usize
                && workers().all(|worker| worker.state == WorkerState::Serving)
        };
        self.master.wait_status("alone", |status| status.state == MasterState::Steady && serving(status))
    }
}

/// Samples are taken when everything is over, so often that there are several even of a short run.
fn soak(engine: &'static str) {
    world(&[Need::Root, Need::Bpf], |world| {
        let asked = std::env::var("REUSEPORTD_TEST_SOAK").ok().map(|upgrades| upgrades.parse().unwrap());
        let upgrades: u32 = asked.unwrap_or_else(|| rounds(80, 1000));
        let between = if upgrades < 200 { 20 } else { 50 };
        let bpf = Bpf::before();
        let mut soak = Soak::start(world, engine);
        let mut table = Table::new(engine, upgrades);
        while soak.upgrades < upgrades {
            for kind in &KINDS {
                // A new image of the master has new memory, in which nothing would add up.
                let with_reexec = soak.upgrades + between.max(upgrades / 5) >= upgrades;
                soak.stretch(kind, between / STRETCHES, with_reexec);
            }
            let status = soak.alone();
            let sample = Sample::settled(&soak.master, &bpf, table.first());
            table.add(soak.upgrades, status.master.reexecs, soak.made, soak.lost, sample);
        }
        let cgroup = cgroup_of(&soak.master);
        soak.master.stop();
        nothing_is_left(cgroup.as_deref());
        table.finish();
    });
}

#[test]
fn nothing_grows_ebpf() {
    soak("ebpf");
}

#[test]
fn nothing_grows_cbpf() {
    soak("cbpf");
}
