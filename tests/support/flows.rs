//! The load of datagrams, and what is demanded of it.

use std::fs;
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
    /// What [`overflowed`] said at the beginning.
    overflowed: u64,
    /// `None` of those that are part of another load.
    _alone: Option<MutexGuard<'static, ()>>,
}

/// Datagrams that UDP sockets of this network namespace had no room for. On a machine that stands still for a moment the
/// load has much to catch up with, and whoever is to answer it may be held up: that loses nobody's datagrams but its own.
pub(crate) fn overflowed() -> u64 {
    let of = |path: &str| fs::read_to_string(path).unwrap_or_default();
    let four = of("/proc/thread-self/net/snmp");
    let mut lines = four.lines().filter(|line| line.starts_with("Udp: ")).map(str::split_whitespace);
    let named = lines.next().zip(lines.next()).map(|(names, numbers)| names.zip(numbers));
    let four = named.and_then(|mut named| named.find(|(name, _)| *name == "RcvbufErrors"));
    let six = of("/proc/thread-self/net/snmp6");
    let six = six.lines().filter_map(|line| line.split_once(char::is_whitespace));
    let six = six.filter(|(name, _)| *name == "Udp6RcvbufErrors").map(|(_, number)| number);
    four.map(|(_, number)| number).into_iter().chain(six).map(|n| n.trim().parse::<u64>().unwrap()).sum()
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

    /// So few that they measure no other load, and none hurts them.
    pub(crate) fn light(spec: Spec) -> Flows {
        Flows::started_with(spec, None)
    }

    /// Further flows of the same test, which can end before the others.
    pub(crate) fn beside(&self, spec: Spec) -> Flows {
        Flows::started_with(spec, None)
    }

    fn started_with(spec: Spec, alone: Option<MutexGuard<'static, ()>>) -> Flows {
        // They take turns: then each has begun, if none pauses.
        let first = u64::from(spec.flows.max(1));
        let flows = Flows { running: spawn(spec).unwrap(), overflowed: overflowed(), _alone: alone };
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

    /// The same, and nothing may have been lost, unless there was no room for it.
    pub(crate) fn end_lossless(self) -> Report {
        let before = self.overflowed;
        let report = self.end();
        let no_room = overflowed() - before;
        assert!(report.lost() <= no_room, "there was no room for {no_room}: {report}");
        assert_eq!((report.duplicates, report.wrong, report.strays), (0, 0, 0), "{report}");
        report
    }
}
