//! Limits on this process's resources.

use std::io;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};

/// The soft limit on open descriptors before and after [`raise_nofile`]; `None` is unlimited.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Nofile {
    /// What the process was started with: workers get this back.
    pub before: Option<u64>,
    /// What is in force now.
    pub now: Option<u64>,
    /// The hard limit.
    pub hard: Option<u64>,
}

/// Raises the soft limit on open descriptors to the hard one.
///
/// # Errors
/// When the kernel refuses.
pub fn raise_nofile() -> io::Result<Nofile> {
    let Rlimit { current: before, maximum: hard } = getrlimit(Resource::Nofile);
    setrlimit(Resource::Nofile, Rlimit { current: hard, maximum: hard })?;
    Ok(Nofile { before, now: hard, hard })
}
