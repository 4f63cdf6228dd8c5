//! Starting, watching and stopping a run.

use crate::fate::Fates;
use crate::generator::Generator;
use crate::{Error, Report, Spec};
use rustix::event::{EventfdFlags, eventfd};
use std::collections::BTreeMap;
use std::fmt;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// The counters of a run that goes on.
#[derive(Clone, Debug, Default)]
pub struct Live {
    /// Connections begun; of a load of flows: datagrams sent.
    pub issued: u64,
    /// Right answers so far.
    pub answers: u64,
    /// Connections that have ended, by fate. Flows have none.
    pub fates: Fates,
    /// Right answers by the generation that gave them.
    pub generations: BTreeMap<u32, u64>,
    /// See [`Report::strays`].
    pub strays: u64,
    /// The latest loss or local error.
    pub last_error: Option<String>,
    /// The run is over.
    pub ended: bool,
}

impl fmt::Display for Live {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { issued, answers, generations, .. } = self;
        write!(f, "{issued} issued, {answers} answers {generations:?}, {} lost", self.fates.lost())?;
        self.last_error.as_ref().map_or(Ok(()), |error| write!(f, ", last: {error}"))
    }
}

/// What the generator and its watchers share.
#[derive(Debug)]
pub(crate) struct Shared {
    live: Mutex<Live>,
    changed: Condvar,
    floor: AtomicU32,
    stop: OwnedFd,
}

impl Shared {
    pub(crate) fn new() -> Result<Arc<Self>, Error> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC).map_err(|errno| Error::generator("eventfd", errno))?;
        let (live, changed) = (Mutex::default(), Condvar::new());
        Ok(Arc::new(Self { live, changed, floor: AtomicU32::new(0), stop }))
    }

    fn lock(&self) -> MutexGuard<'_, Live> {
        self.live.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn update(&self, change: impl FnOnce(&mut Live)) {
        change(&mut self.lock());
        self.changed.notify_all();
    }

    pub(crate) fn floor(&self) -> u32 {
        self.floor.load(Ordering::SeqCst)
    }

    /// Becomes readable when the run is to stop.
    pub(crate) fn stop_wish(&self) -> BorrowedFd<'_> {
        self.stop.as_fd()
    }
}

/// Runs on this thread until the duration or the limit of `spec` is reached and every connection has its fate.
///
/// # Errors
/// [`Error::Spec`] for a load that is none, contradicts itself or has no end; [`Error::Generator`] if the loop can't
/// be set up; [`Error::Unbalanced`] if the books don't balance.
pub fn run(spec: Spec) -> Result<Report, Error> {
    if spec.duration.is_none() && spec.limit.is_none() {
        return Err(Error::Spec("no end: give a duration or a limit".into()));
    }
    Generator::new(spec, Shared::new()?)?.run()
}

/// Starts a run in a thread of its own, in the network namespace of the calling thread.
///
/// # Errors
/// As [`run`]; a run without end is allowed here.
pub fn spawn(spec: Spec) -> Result<Running, Error> {
    let shared = Shared::new()?;
    let generator = Generator::new(spec, Arc::clone(&shared))?;
    Running::start(shared, generator.started(), move || generator.run())
}

/// Tells the watchers that nothing more comes, however the thread ends.
struct AtEnd(Arc<Shared>);

impl Drop for AtEnd {
    fn drop(&mut self) {
        self.0.update(|live| live.ended = true);
    }
}

/// A run in its own thread. Dropping it asks the run to stop and does not wait.
#[derive(Debug)]
pub struct Running<R = Report> {
    shared: Arc<Shared>,
    started: Instant,
    thread: Option<JoinHandle<Result<R, Error>>>,
}

impl<R: Send + 'static> Running<R> {
    pub(crate) fn start(
        shared: Arc<Shared>,
        started: Instant,
        run: impl FnOnce() -> Result<R, Error> + Send + 'static,
    ) -> Result<Self, Error> {
        let at_end = AtEnd(Arc::clone(&shared));
        let body = move || {
            let _at_end = at_end;
            run()
        };
        let thread = std::thread::Builder::new()
            .name("load".into())
            .spawn(body)
            .map_err(|source| Error::generator("thread", source))?;
        Ok(Self { shared, started, thread: Some(thread) })
    }
}

impl<R> Running<R> {
    /// The instant from which the report counts its times.
    #[must_use]
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The counters now.
    #[must_use]
    pub fn live(&self) -> Live {
        self.shared.lock().clone()
    }

    /// Declares that from now on only `generation` and later ones should answer new connections; an older answer to a
    /// connection begun after this is a stray.
    pub fn mark(&self, generation: u32) {
        self.shared.floor.store(generation, Ordering::SeqCst);
    }

    /// Waits until the counters fulfil `reached`, and gives them.
    ///
    /// # Errors
    /// [`Error::Deadline`] after `timeout`, [`Error::Ended`] if the run ends before; both carry the counters.
    pub fn wait_until(&self, timeout: Duration, reached: impl Fn(&Live) -> bool) -> Result<Live, Error> {
        let waiting = |live: &mut Live| !reached(live) && !live.ended;
        let (live, _) = self
            .shared
            .changed
            .wait_timeout_while(self.shared.lock(), timeout, waiting)
            .unwrap_or_else(PoisonError::into_inner);
        let live = live.clone();
        if reached(&live) {
            Ok(live)
        } else if live.ended {
            Err(Error::Ended(Box::new(live)))
        } else {
            Err(Error::Deadline { waited: timeout, so_far: Box::new(live) })
        }
    }

    /// Waits until `answers` more right answers have come than at the time of the call.
    ///
    /// # Errors
    /// As [`Running::wait_until`].
    pub fn wait_answered(&self, answers: u64, timeout: Duration) -> Result<Live, Error> {
        let goal = self.shared.lock().answers + answers;
        self.wait_until(timeout, |live| live.answers >= goal)
    }

    /// Waits until `generation` has given `answers` right answers in all.
    ///
    /// # Errors
    /// As [`Running::wait_until`].
    pub fn wait_generation(&self, generation: u32, answers: u64, timeout: Duration) -> Result<Live, Error> {
        self.wait_until(timeout, |live| {
            live.generations.get(&generation).is_some_and(|given| *given >= answers)
        })
    }

    /// Issues no more connections, lets the open ones come to their fate (bounded by silences and timeouts) and gives
    /// the report.
    ///
    /// # Errors
    /// What ended the run early: see [`run`].
    pub fn stop_and_join(mut self) -> Result<R, Error> {
        self.stop();
        self.join()
    }

    /// Waits for the end that `spec` sets, and gives the report.
    ///
    /// # Errors
    /// What ended the run early: see [`run`].
    pub fn join(&mut self) -> Result<R, Error> {
        let thread = self.thread.take().ok_or(Error::Panicked)?;
        thread.join().map_err(|_| Error::Panicked)?
    }

    /// Asks the run to issue no more connections. Does not wait.
    pub fn stop(&self) {
        // Can't fail: the counter is far from its limit and the descriptor is ours.
        let _ = rustix::io::write(&self.shared.stop, &1_u64.to_ne_bytes());
    }
}

impl<R> Drop for Running<R> {
    fn drop(&mut self) {
        self.stop();
    }
}
