//! The master's own log: set up once, its level changeable at an upgrade.

use std::io::{self, IsTerminal, Write};
use std::os::fd::AsFd;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use tracing_subscriber::filter::LevelFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::SubscriberInitExt;
use tracing_subscriber::{Layer, Registry, fmt, reload};

use crate::config::LogFormat;

/// Changes the level of the running log.
pub(super) type Level = reload::Handle<LevelFilter, Registry>;

/// Starts logging to stderr.
pub(super) fn start(format: LogFormat, level: tracing::Level) -> Level {
    let (filter, handle) = reload::Layer::new(LevelFilter::from_level(level));
    let is_terminal = io::stderr().is_terminal();
    let is_json = match format {
        LogFormat::Json => true,
        LogFormat::Text => false,
        LogFormat::Auto => !is_terminal && std::env::var_os("JOURNAL_STREAM").is_none(),
    };
    let colours = is_terminal && std::env::var_os("NO_COLOR").is_none_or(|value| value.is_empty());
    let layer = if is_json {
        fmt::layer()
            .json()
            .flatten_event(true)
            .with_target(false)
            .with_writer(|| Patient(io::stderr()))
            .boxed()
    } else {
        let layer = fmt::layer().with_target(false).with_ansi(colours).with_writer(|| Patient(io::stderr()));
        // The journal notes the time itself.
        if is_terminal { layer.boxed() } else { layer.with_ansi(false).boxed() }
    };
    // A second start in one process can't happen; if it did, the first log goes on.
    let _ = tracing_subscriber::registry().with(filter).with(layer).try_init();
    handle
}

/// A writer that drops what does not fit instead of blocking the master behind a reader that has stopped.
pub(super) struct Patient<W>(pub(super) W);

/// A pipe that is writable takes so much at once without blocking (PIPE_BUF).
pub(super) const ATOMIC_BYTES: usize = 4096;

impl<W: AsFd> Write for Patient<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        for chunk in bytes.chunks(ATOMIC_BYTES) {
            let mut fds = [PollFd::new(&self.0, PollFlags::OUT)];
            let is_writable =
                poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0);
            if is_writable {
                rustix::io::write(&self.0, chunk)?;
            }
        }
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
