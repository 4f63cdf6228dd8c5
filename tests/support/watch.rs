//! The status, looked at again and again while something else happens.

use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;

use reuseportd_wire::status::{Status, WorkerState, WorkerStatus};

use super::master::Master;

/// Does something, and looks at the status all the while: what it gave, and what was seen in between.
pub(crate) fn watched<T>(master: &Master, something: impl FnOnce() -> T) -> (T, Vec<Status>) {
    let over = AtomicBool::new(false);
    thread::scope(|scope| {
        let watcher = scope.spawn(|| {
            let looks = std::iter::repeat_with(|| (over.load(Ordering::SeqCst), master.status()));
            let mut seen = Vec::new();
            for (is_last, status) in looks {
                seen.push(status);
                if is_last {
                    break;
                }
            }
            seen
        });
        let end = End(&over);
        let done = something();
        drop(end);
        (done, watcher.join().unwrap())
    })
}

/// However it ends, so does the watching.
struct End<'a>(&'a AtomicBool);

impl Drop for End<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::SeqCst);
    }
}

/// Every worker that serves, of whatever generation.
pub(crate) fn serving(status: &Status) -> impl Iterator<Item = &WorkerStatus> {
    let workers = status.generations.iter().flat_map(|generation| &generation.workers);
    workers.filter(|worker| worker.state == WorkerState::Serving)
}

/// Demands that so many workers served all the while.
pub(crate) fn always_served(seen: &[Status], workers: usize) {
    let fewest = seen.iter().min_by_key(|status| serving(status).count());
    let fewest = fewest.expect("the watcher looks once at least");
    assert!(serving(fewest).count() >= workers, "fewer than {workers} serve: {fewest:#?}");
}

/// Seat and pid of each worker of a generation that serves, by seat.
pub(crate) fn seats(status: &Status, generation: u32) -> Vec<(u32, u32)> {
    let workers = status.generations.iter().filter(|one| one.generation == generation);
    let serving = workers.flat_map(|one| &one.workers).filter(|worker| worker.state == WorkerState::Serving);
    let mut seats: Vec<_> = serving.filter_map(|worker| Some((worker.seat, worker.pid?))).collect();
    seats.sort_unstable();
    seats
}
