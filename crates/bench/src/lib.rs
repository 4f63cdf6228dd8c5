//! Load client that says what became of every connection.
//!
//! Arrivals are scheduled ahead of time and latency is measured from the scheduled instant, so a server that stalls
//! can't hide the stall by slowing the client down. Every connection that is issued ends in exactly one [`Fate`], and
//! the report is refused if the sums differ. Faults of the generator itself ([`Fate::LocalError`]) are kept apart from
//! losses: they make a run worthless instead of making the server look bad, or good.
//!
//! [`flows`] does the same for UDP services.
//!
//! ```no_run
//! use reuseportd_bench::{Spec, spawn};
//! use std::time::Duration;
//!
//! let spec = Spec::new("127.0.0.1:8080".parse()?).rate(2000.0).burst(150, Duration::from_millis(300));
//! let running = spawn(spec)?;
//! running.wait_answered(1000, Duration::from_secs(10))?;
//! // … upgrade the service here …
//! let report = running.stop_and_join()?;
//! assert_eq!(report.lost(), 0, "{report}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod connection;
mod error;
mod fate;
pub mod flows;
mod generator;
mod ledger;
mod live;
mod reply;
mod report;
mod schedule;
mod spec;
mod wait;

pub use error::Error;
pub use fate::{Fate, Fates, Kind};
pub use live::{Live, Running, run, spawn};
pub use report::{GenerationReport, KindReport, Latency, Loss, Report};
pub use spec::{Protocol, Spec};

/// Raises this process's soft limit of open files to its hard limit and returns it (`None`: unlimited).
///
/// Not done by [`spawn`], because the limit belongs to the whole process and is inherited by its children.
///
/// # Errors
/// The kernel's error if the limit can't be set.
pub fn raise_open_files_limit() -> std::io::Result<Option<u64>> {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let maximum = getrlimit(Resource::Nofile).maximum;
    setrlimit(Resource::Nofile, Rlimit { current: maximum, maximum })?;
    Ok(maximum)
}
