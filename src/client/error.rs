//! Why a subcommand did not do what it was asked, and the exit code that says so.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use reuseportd_wire::control::ControlError;
use reuseportd_wire::status::Receipt;

use super::live::time;
use super::receipt;
use super::text::escape_lines;
use crate::config::ConfigErrors;

/// Anything but success.
#[derive(Debug, thiserror::Error)]
pub(super) enum ClientError {
    #[error("{0}")]
    Config(#[from] ConfigErrors),
    #[error(
        "control socket {}: cannot connect: {source}: no master listens there (start one with reuseportd --config FILE, \
         or name the right one with --config or --socket)", path.display()
    )]
    NoMaster { path: PathBuf, source: io::Error },
    #[error(
        "control socket {}: cannot connect: {source}: only root, the master's user and control.allow_users may \
         (run this as one of them)", path.display()
    )]
    NotAllowed { path: PathBuf, source: io::Error },
    #[error("control socket {}: {source} (a socket path has 107 bytes at most)", path.display())]
    NoPath { path: PathBuf, source: io::Error },
    #[error("control socket {}: cannot {action}: {source} (the master's log may tell more)", path.display())]
    Socket { path: PathBuf, action: &'static str, source: io::Error },
    #[error(
        "control socket {}: no answer within {}: the master hangs or is stopped (look at its process and log)",
        path.display(), time(*waited)
    )]
    Silent { path: PathBuf, waited: Duration },
    #[error("--timeout of {} passed: what the master has taken on goes on (reuseportd status shows how)", time(*.0))]
    TimedOut(Duration),
    #[error(
        "control socket {}: closed before the answer came: the master ended, or does not let this user in \
         (its log tells which)", path.display()
    )]
    Closed { path: PathBuf },
    #[error(
        "control socket {}: the master ended before what it had taken on was done; the next one goes on with what it knows \
         of it (reuseportd status tells how far it is)", path.display()
    )]
    MasterEnded { path: PathBuf },
    #[error("control socket {}: {source} (use the reuseportd the master was started from)", path.display())]
    NotUnderstood { path: PathBuf, source: ControlError },
    #[error(
        "control socket {}: the answer is to another question: client and master are of different versions \
         (use the reuseportd the master was started from)", path.display()
    )]
    Unexpected { path: PathBuf },
    #[error("{}", escape_lines(message))]
    Refused { message: String, code: u8, receipt: Option<Box<Receipt>> },
    #[error("{}: {}", receipt::failure(receipt), escape_lines(receipt::reason(receipt)))]
    NotCompleted { receipt: Box<Receipt>, code: u8 },
    #[error("what was left behind is not ended: {0}")]
    LeftBehind(String),
    #[error("standard output: cannot write: {0}")]
    Output(io::Error),
}

impl ClientError {
    /// The exit code of the process.
    pub(super) fn exit_code(&self) -> u8 {
        match self {
            Self::Config(_) | Self::NoPath { .. } => 2,
            Self::NoMaster { .. } => 3,
            Self::TimedOut(_) => 4,
            // A master that refuses with 0 would turn a refusal into a success.
            Self::Refused { code, .. } | Self::NotCompleted { code, .. } => (*code).max(1),
            Self::NotAllowed { .. }
            | Self::Socket { .. }
            | Self::Silent { .. }
            | Self::Closed { .. }
            | Self::MasterEnded { .. }
            | Self::NotUnderstood { .. }
            | Self::Unexpected { .. }
            | Self::LeftBehind(_)
            | Self::Output(_) => 1,
        }
    }
}
