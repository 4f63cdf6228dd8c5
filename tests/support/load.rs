//! The loads, and what is demanded of them.

use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use reuseportd_bench::{Report, Running, Spec};

use super::PATIENCE;
use super::world::World;

/// A load that runs beside the test. Only one of them at a time: two would measure each other.
#[derive(Debug)]
pub(crate) struct Load {
    running: Option<Running>,
    /// `None` of one that is part of another.
    _alone: Option<MutexGuard<'static, ()>>,
}

static ALONE: Mutex<()> = Mutex::new(());

/// Waits until no other load runs, and keeps others from starting.
pub(crate) fn alone() -> MutexGuard<'static, ()> {
    ALONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// For workers that need 5 ms per connection (800 a second with four of them): three quarters of what they can take,
/// most of it in bursts, so that queues are hardly ever empty. Slow clients besides.
pub(crate) fn slow_accepts(world: &World) -> Spec {
    spec(world).rate(100.0).burst(150, Duration::from_millis(300)).slow(20)
}

/// No load yet. Nobody gives up early: slow is not lost.
pub(crate) fn spec(world: &World) -> Spec {
    Spec::new(world.address).timeouts(PATIENCE, PATIENCE)
}

impl Load {
    /// Starts the load and waits until it is answered.
    pub(crate) fn start(spec: Spec) -> Load {
        Load::started_with(spec, Some(alone()))
    }

    /// One that is too light to be measured by others, or to be hurt by them.
    pub(crate) fn light(spec: Spec) -> Load {
        Load::started_with(spec, None)
    }

    /// A further load of the same test, on another address.
    pub(crate) fn beside(&self, spec: Spec) -> Load {
        Load::started_with(spec, None)
    }

    fn started_with(spec: Spec, alone: Option<MutexGuard<'static, ()>>) -> Load {
        let load = Load { running: Some(reuseportd_bench::spawn(spec).unwrap()), _alone: alone };
        load.answered(50);
        load
    }

    fn running(&self) -> &Running {
        self.running.as_ref().expect("ended by `end` only")
    }

    /// The instant from which the report counts.
    pub(crate) fn started(&self) -> Instant {
        self.running().started()
    }

    /// Waits for so many more answers.
    pub(crate) fn answered(&self, answers: u64) {
        self.running().wait_answered(answers, PATIENCE).unwrap_or_else(|error| panic!("{error}"));
    }

    /// Waits for an answer of this generation, which alone should answer from now on.
    pub(crate) fn answered_by(&self, generation: u32) {
        self.running().mark(generation);
        self.heard_from(generation);
    }

    /// Waits for an answer of this generation, beside others.
    pub(crate) fn heard_from(&self, generation: u32) {
        let waited = self.running().wait_generation(generation, 1, PATIENCE);
        waited.unwrap_or_else(|error| panic!("{error}"));
    }

    /// Lets every connection come to its fate.
    pub(crate) fn end(self) -> Report {
        self.running().stop();
        self.join()
    }

    /// The same for a load that ends by itself.
    pub(crate) fn join(mut self) -> Report {
        let report = self.running.take().expect("ended once").join().unwrap();
        assert!(report.valid(), "{report}");
        report
    }

    /// The same, and nothing may have been lost.
    pub(crate) fn end_lossless(self) -> Report {
        let report = self.end();
        assert_eq!(report.lost(), 0, "{report}");
        assert_eq!(report.strays, 0, "{report}");
        report
    }
}
