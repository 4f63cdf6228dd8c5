//! A load for slow workers: bursts of datagrams, the next one when all of the last are answered. So something waits nearly
//! always, and never more than there is room for.

use std::collections::BTreeMap;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use reuseportd_bench::flows::{Report, Spec, run};

use crate::support::PATIENCE;
use crate::support::flows::spec;
use crate::support::load::alone;
use crate::support::world::World;

/// Each burst is of flows of its own.
const FLOWS: u32 = 30;
/// A socket has room for some 270 of them, by default.
pub(crate) const DATAGRAMS: u64 = 150;

/// One burst.
pub(crate) fn burst(world: &World) -> Spec {
    spec(world).flows(FLOWS).rate(1e6).limit(DATAGRAMS)
}

/// What has come of it so far.
#[derive(Debug, Clone, Default)]
pub(crate) struct Sum {
    pub(crate) sent: u64,
    pub(crate) answers: u64,
    pub(crate) lost: u64,
    /// Answers by generations older than the burst may reach.
    pub(crate) strays: u64,
    /// Answers twice, and to nothing that was asked.
    wrong: u64,
    pub(crate) generations: BTreeMap<u32, u64>,
    floor: u32,
    stopping: bool,
}

impl Sum {
    fn add(&mut self, report: &Report, floor: u32) {
        assert!(report.valid(), "{report}");
        self.sent += report.sent;
        self.answers += report.answers;
        self.lost += report.lost();
        self.wrong += report.wrong + report.duplicates;
        for (generation, of) in &report.generations {
            self.strays += if *generation < floor { of.answers } else { 0 };
            *self.generations.entry(*generation).or_default() += of.answers;
        }
    }
}

/// Bursts that go on beside the test.
#[derive(Debug)]
pub(crate) struct Bursts {
    shared: Arc<(Mutex<Sum>, Condvar)>,
    thread: Option<JoinHandle<()>>,
    _alone: MutexGuard<'static, ()>,
}

impl Bursts {
    /// Starts them and waits until some are answered. Each waits so long for its answers, at the most.
    pub(crate) fn start(world: &World, patience: Duration) -> Bursts {
        let alone = alone();
        let shared = Arc::<(Mutex<Sum>, Condvar)>::default();
        let spec = burst(world).answer_timeout(patience);
        let thread = thread::spawn({
            let shared = Arc::clone(&shared);
            move || {
                loop {
                    let Sum { floor, stopping, .. } = *lock(&shared.0);
                    if stopping {
                        return;
                    }
                    let report = run(spec.clone()).unwrap();
                    lock(&shared.0).add(&report, floor);
                    shared.1.notify_all();
                }
            }
        });
        let bursts = Bursts { shared, thread: Some(thread), _alone: alone };
        bursts.answered(2 * DATAGRAMS);
        bursts
    }

    fn wait(&self, what: &str, reached: impl Fn(&Sum) -> bool) {
        let waiting = |sum: &mut Sum| !reached(sum);
        let (sum, _) = self.shared.1.wait_timeout_while(lock(&self.shared.0), PATIENCE, waiting).unwrap();
        assert!(reached(&sum), "{what}: {sum:?}");
    }

    /// Waits for so many more answers.
    pub(crate) fn answered(&self, answers: u64) {
        let goal = lock(&self.shared.0).answers + answers;
        self.wait("more answers", |sum| sum.answers >= goal);
    }

    /// Waits for answers of this generation, to which all belongs that is sent in bursts that begin from now on.
    pub(crate) fn answered_by(&self, generation: u32) {
        lock(&self.shared.0).floor = generation;
        self.wait("answers of the generation", |sum| sum.generations.contains_key(&generation));
        self.answered(DATAGRAMS);
    }

    /// The last burst is answered.
    pub(crate) fn end(mut self) -> Sum {
        self.stop();
        lock(&self.shared.0).clone()
    }

    fn stop(&mut self) {
        lock(&self.shared.0).stopping = true;
        if let Some(thread) = self.thread.take() {
            let ended = thread.join();
            assert!(ended.is_ok() || thread::panicking(), "the load failed");
        }
    }

    /// The same, and nothing may have been lost, or have gone astray.
    pub(crate) fn end_lossless(self) -> Sum {
        let sum = self.end();
        assert_eq!((sum.lost, sum.strays, sum.wrong), (0, 0, 0), "{sum:?}");
        sum
    }
}

impl Drop for Bursts {
    fn drop(&mut self) {
        self.stop();
    }
}

fn lock(sum: &Mutex<Sum>) -> MutexGuard<'_, Sum> {
    sum.lock().unwrap_or_else(PoisonError::into_inner)
}
