//! The harness.

pub(crate) mod app;
pub(crate) mod client;
pub(crate) mod container;
pub(crate) mod flows;
pub(crate) mod gate;
pub(crate) mod load;
pub(crate) mod machine;
pub(crate) mod master;
pub(crate) mod process;
pub(crate) mod strace;
pub(crate) mod unix_load;
pub(crate) mod upstream;
pub(crate) mod watch;
pub(crate) mod world;

use std::time::Duration;

/// Bound of every wait whose end the test asserts: generous, because a loaded machine is no fault of the program.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// Repetitions: few in the normal suite, many with `REUSEPORTD_TEST_LONG=1`.
pub(crate) fn rounds(few: u32, many: u32) -> u32 {
    if std::env::var_os("REUSEPORTD_TEST_LONG").is_some() { many } else { few }
}
