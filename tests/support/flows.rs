//! The load of datagrams, and what is demanded of it.

use std::sync::MutexGuard;
use std::time::Instant;

use reuseportd_bench::Running;
use reuseportd_bench::flows::{Report, Spec, spawn};

use super::PATIENCE;
use super::load::alone;
use super::world::World;

/// Flows to a UDP service that run beside the test. Only one load at a time: two would measure each other.
#[derive(Debug)]
pub(crate) struct Flows {
    running: Running<Report>,
    /// `None` of those that are part of another load.
    _alone: Option<MutexGuard<'static, ()>>,
}

/// No load yet. Nobody gives up early: slow is not lost.
pub(crate) fn spec(world: &World) -> Spec {
    Spec::new(world.address).answer_timeout(PATIENCE)
}

impl Flows {
    /// Starts the load and waits until it is answered.
    pub(crate) fn start(spec: Spec) -> Flows {
        Flows::started_with(spec, Some(alone()))
    }

    /// Further flows of the same test, which can end before the others.
    pub(crate) fn beside(&self, spec: Spec) -> Flows {
        Flows::started_with(spec, None)
    }

    fn started_with(spec: Spec, alone: Option<MutexGuard<'static, ()>>) -> Flows {
        // They take turns: then each has begun, if none pauses.
        let first = u64::from(spec.flows.max(1));
        let flows = Flows { running: spawn(spec).unwrap(), _alone: alone };
        flows.answered(first);
        flows
    }

    /// The instant from which the report counts.
    pub(crate) fn started(&self) -> Instant {
        self.running.started()
    }

    /// Waits for so many more answers.
    pub(crate) fn answered(&self, answers: u64) {
        self.running.wait_answered(answers, PATIENCE).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Waits for an answer of this generation, to which all flows belong that begin from now on.
    pub(crate) fn answered_by(&self, generation: u32) {
        self.running.mark(generation);
        self.heard_from(generation);
    }

    /// Waits for an answer of this generation, beside others.
    pub(crate) fn heard_from(&self, generation: u32) {
        let waited = self.running.wait_generation(generation, 1, PATIENCE);
        waited.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Sends nothing more, and waits until every datagram is answered or given up.
    pub(crate) fn end(mut self) -> Report {
        self.running.stop();
        let report = self.running.join().unwrap();
        assert!(report.valid(), "{report}");
        report
    }

    /// The same, and nothing may have been lost.
    pub(crate) fn end_lossless(self) -> Report {
        let report = self.end();
        assert_eq!((report.lost(), report.duplicates, report.wrong, report.strays), (0, 0, 0, 0), "{report}");
        report
    }
}
