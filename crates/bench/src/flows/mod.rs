//! Load on a UDP service: flows of numbered datagrams, each flow from a source port of its own.
//!
//! The service answers each datagram with `GENERATION SEAT PID ` and the datagram. So the report knows of each flow who
//! answered it from when to when, which datagrams nobody answered, and which were answered twice. What the client's own
//! sockets had no room for is told apart: it makes a run worthless instead of making the service look bad.
//!
//! ```no_run
//! use reuseportd_bench::flows::{Spec, spawn};
//! use std::time::Duration;
//!
//! let running = spawn(Spec::new("127.0.0.1:8085".parse()?).flows(200).rate(5000.0).new_flows(20.0))?;
//! running.wait_answered(1000, Duration::from_secs(10))?;
//! // … upgrade the service here …
//! running.mark(2); // flows begun from now on belong to generation 2
//! let report = running.stop_and_join()?;
//! assert!(report.valid() && report.lost() == 0 && report.strays == 0, "{report}");
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod books;
mod flow;
mod generator;
mod report;
mod spec;

pub use report::{FlowReport, GenerationReport, Report, Span, Who};
pub use spec::Spec;

use crate::live::Shared;
use crate::{Error, Running};
use generator::Generator;
use std::sync::Arc;

/// Runs on this thread until the duration or the limit of `spec` is reached and every datagram is answered or given up.
///
/// # Errors
/// [`Error::Spec`] for a load that is none, contradicts itself or has no end; [`Error::Generator`] if the sockets can't
/// be made; [`Error::Unbalanced`] if the books don't balance.
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
pub fn spawn(spec: Spec) -> Result<Running<Report>, Error> {
    let shared = Shared::new()?;
    let generator = Generator::new(spec, Arc::clone(&shared))?;
    Running::start(shared, generator.started(), move || generator.run())
}
