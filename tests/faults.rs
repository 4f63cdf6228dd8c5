//! The fault matrix: each fault happens under load, with either engine, and what clients lost is counted.
//!
//! Every fault is a test of its own. It writes its row to `target/fault-matrix.md`, and fails if `docs/fault-matrix.md`
//! says something else; numbers apart, which differ from run to run. With `REUSEPORTD_TEST_WRITE=1` it writes its row
//! into that file instead.

mod batches;
mod deployments;
mod descriptors;
mod files;
mod phases;
mod ports;
mod processes;
mod programs;
mod requests;
mod steering;
mod table;

use reuseportd_bench::{Report, Spec};
use rustix::process::Signal;

use crate::support::app::App;
use crate::support::load::Load;
use crate::support::master::Master;
use crate::support::world::{Need, World, needs_of, world};

/// What the table says of a fault. All of it is for readers.
pub(crate) struct Fault {
    /// What happens.
    pub(crate) name: &'static str,
    /// To whom, and in which phase.
    pub(crate) when: &'static str,
    /// What the master does about it, and what its operator sees.
    pub(crate) then: &'static str,
    /// Which connections are lost and why; empty if none is.
    pub(crate) lost: &'static str,
}

/// What came of a fault.
pub(crate) struct Outcome {
    pub(crate) report: Report,
    /// Connections that may be lost, for the reason that the table gives.
    pub(crate) excused: u64,
}

impl Outcome {
    /// No connection may be lost.
    pub(crate) fn lossless(report: Report) -> Outcome {
        Outcome { report, excused: 0 }
    }
}

/// Lets the fault happen with each engine in a world of its own, under a load in which closing listeners carelessly loses
/// connections, which is shown too; then the row is written.
pub(crate) fn under_load(
    fault: &Fault,
    needs: &[Need],
    engines: &[&'static str],
    load: impl Fn(&World) -> Spec + Sync,
    happen: impl Fn(&World, &'static str, &dyn Fn() -> Load) -> Outcome + Sync,
) {
    let done = std::sync::Mutex::new(Vec::new());
    for engine in engines {
        let needs: Vec<Need> = needs.iter().chain(needs_of(engine)).copied().collect();
        world(&needs, |world| {
            let outcome = happen(world, engine, &|| Load::start(load(world)));
            let Outcome { report, excused } = &outcome;
            assert!(report.lost() <= *excused, "{}, {engine}: {excused} excused: {report}", fault.name);
            assert!(
                !fault.lost.is_empty() || *excused == 0,
                "{}: the table must say what is lost",
                fault.name
            );
            done.lock().unwrap().push((*engine, outcome.report));
        });
    }
    let done = done.into_inner().unwrap();
    // Where something is missing, that has been said.
    if done.len() == engines.len() {
        world(&[], |world| careless_control(world, load(world)));
        table::record(fault, &done);
    }
}

/// The load shows losses: without steering, and workers that just close, one upgrade or another loses some.
fn careless_control(world: &World, spec: Spec) {
    const TRIES: u32 = 5;
    let app = App::test_worker(world, "--mode naive --accept-delay 5").engine("none");
    let master = Master::start(world, &app);
    let load = Load::start(spec);
    for generation in 2..2 + TRIES {
        master.signal(Signal::HUP);
        load.answered_by(generation);
    }
    let report = load.end();
    assert!(report.lost() > 0, "the load shows nothing: {report}");
    master.stop();
}
