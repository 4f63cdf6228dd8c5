//! Many seeds, on all processors: a seed that fails does not keep the others from running.

use crate::{Replay, engine, flows, oracle, phases, run, upkeep};
use reuseportd_core::Engine;
use std::cell::RefCell;
use std::collections::BTreeMap;
use std::hash::{BuildHasher, Hasher};
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::sync::{Mutex, Once, PoisonError};
use std::time::{Duration, Instant};

/// When to stop: what is not given is no limit.
#[derive(Clone, Copy, Default)]
pub(crate) struct Limits {
    /// Simulation steps, of all seeds together.
    pub(crate) steps: Option<u64>,
    pub(crate) time: Option<Duration>,
    pub(crate) failures: Option<usize>,
}

/// What all seeds came to.
#[derive(Default)]
pub(crate) struct Sum {
    pub(crate) steps: u64,
    pub(crate) seeds: u64,
    /// Seeds that failed.
    pub(crate) failed: Vec<u64>,
    /// With steering.
    pub(crate) tally: oracle::Tally,
    /// Without: connections are lost.
    pub(crate) control: oracle::Tally,
    pub(crate) upkeep: upkeep::Tally,
    pub(crate) phases: phases::Tally,
    pub(crate) datagrams: flows::Tally,
    pub(crate) outcomes: BTreeMap<&'static str, u32>,
}

impl Sum {
    fn add(&mut self, other: Sum) {
        self.steps += other.steps;
        self.seeds += other.seeds;
        self.failed.extend(other.failed);
        self.tally.add(&other.tally);
        self.control.add(&other.control);
        self.upkeep.add(&other.upkeep);
        self.phases.add(other.phases);
        self.datagrams.add(other.datagrams);
        for (name, count) in other.outcomes {
            *self.outcomes.entry(name).or_default() += count;
        }
    }

    pub(crate) fn must_be_complete(self) {
        let Sum { tally, control, upkeep, phases, datagrams, outcomes, .. } = self;
        assert!(
            tally.counted > 0 && tally.strays > 0 && tally.excused > 0,
            "something never happened: {tally:?}"
        );
        assert!(tally.inherited > 0 && control.inherited > 0, "no connection was inherited");
        assert!(outcomes.len() == 3, "something never happened: {outcomes:?}");
        assert!(upkeep.is_complete(), "something never happened: {upkeep:?}");
        assert!(phases.is_complete(), "something never happened: {phases:?}");
        assert!(datagrams.is_complete(), "something never happened: {datagrams:?}");
        assert!(control.excused > 0, "without steering nothing is lost: a loss could not be seen");
    }
}

thread_local! {
    /// What the check said that failed last in this thread, which lists it itself.
    static SAID: RefCell<Option<String>> = const { RefCell::new(None) };
}

fn listen_to_panics() {
    static ONCE: Once = Once::new();
    ONCE.call_once(|| {
        let shown = panic::take_hook();
        panic::set_hook(Box::new(move |what| {
            SAID.with_borrow_mut(|said| match said {
                Some(said) => *said = what.to_string(),
                None => shown(what),
            });
        }));
    });
}

/// Runs the first seed, the second and so on until there are no more, as many at a time as there are processors, and lists
/// those that fail.
pub(crate) fn sweep(seed: impl Fn(u64) -> Option<u64> + Sync, steps: u64, limits: Limits) -> Sum {
    listen_to_panics();
    #[expect(clippy::disallowed_methods, reason = "how long it took is for people")]
    let began = Instant::now();
    let (next, total) = (AtomicU64::new(0), Mutex::new(Sum::default()));
    let locked = || total.lock().unwrap_or_else(PoisonError::into_inner);
    let is_over = |sum: &Sum| {
        limits.steps.is_some_and(|steps| sum.steps >= steps)
            || limits.time.is_some_and(|time| began.elapsed() >= time)
            || limits.failures.is_some_and(|failures| sum.failed.len() >= failures)
    };
    let work = || {
        SAID.set(Some(String::new()));
        while !is_over(&locked())
            && let Some(seed) = seed(next.fetch_add(1, Relaxed))
        {
            let sum = one(seed, steps);
            locked().add(sum);
        }
    };
    std::thread::scope(|scope| {
        for _ in 0..std::thread::available_parallelism().map_or(1, usize::from) {
            scope.spawn(work);
        }
    });
    let sum = total.into_inner().unwrap_or_else(PoisonError::into_inner);
    let (took, first) = (began.elapsed().as_secs_f64(), seed(0).unwrap_or_default());
    let (steps, seeds, failures) = (sum.steps, sum.seeds, sum.failed.len());
    eprintln!("{steps} steps, {seeds} seeds from {first}, {took:.1} s, {failures} failures");
    sum
}

fn one(seed: u64, steps: u64) -> Sum {
    let mut replay = Replay { seed, step: 0 };
    let result = panic::catch_unwind(AssertUnwindSafe(|| run(&mut replay, steps, false)));
    let mut sum = Sum { steps: replay.step, seeds: 1, ..Sum::default() };
    let Ok(run) = result else {
        let said = SAID.take().unwrap_or_default().replace('\n', " ");
        SAID.set(Some(String::new()));
        eprintln!("FAILED: seed {seed}, step {}: {said:.400}\n    {replay}", replay.step);
        sum.failed.push(seed);
        return sum;
    };
    match engine(seed) {
        Engine::None => sum.control = run.tally,
        Engine::Ebpf | Engine::Cbpf => sum.tally = run.tally,
    }
    (sum.upkeep, sum.phases, sum.datagrams) = (run.upkeep, run.phases, run.datagrams);
    sum.outcomes = run.outcomes;
    sum
}

/// A seed to begin with that nobody has chosen.
pub(crate) fn drawn() -> u64 {
    std::hash::RandomState::new().build_hasher().finish() >> 24
}
