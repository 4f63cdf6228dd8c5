//! Signals as a readable descriptor: the handler notes the signal and writes one byte, the loop reads.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use rustix::pipe::{PipeFlags, pipe_with};
use signal_hook::SigId;

/// The signals an operator speaks to the master with.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(i32)]
pub enum Signal {
    /// Upgrade.
    Hangup = libc::SIGHUP,
    /// Graceful stop (from a terminal).
    Interrupt = libc::SIGINT,
    /// Fast stop.
    Quit = libc::SIGQUIT,
    /// Reopen log files.
    User1 = libc::SIGUSR1,
    /// Re-exec.
    User2 = libc::SIGUSR2,
    /// Graceful stop.
    Terminate = libc::SIGTERM,
    /// One worker more.
    TerminalInput = libc::SIGTTIN,
    /// One worker fewer.
    TerminalOutput = libc::SIGTTOU,
}

impl Signal {
    /// All of them, in the order they are reported in: wishes before stops, so that a stop has the last word.
    pub const ALL: [Signal; 8] = [
        Signal::User1,
        Signal::TerminalInput,
        Signal::TerminalOutput,
        Signal::Hangup,
        Signal::User2,
        Signal::Terminate,
        Signal::Interrupt,
        Signal::Quit,
    ];

    fn bit(self) -> u32 {
        1 << self as i32
    }
}

/// Catches every [`Signal`] from its creation to its end. Several of one kind become one, as in the kernel.
#[derive(Debug)]
pub struct SignalPipe {
    reader: OwnedFd,
    pending: Arc<AtomicU32>,
    registrations: Vec<SigId>,
}

impl SignalPipe {
    /// Installs the handlers.
    ///
    /// # Errors
    /// When descriptors run out.
    pub fn new() -> io::Result<SignalPipe> {
        let (reader, writer) = pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK)?;
        let writer = Arc::new(writer);
        let mut pipe = SignalPipe { reader, pending: Arc::default(), registrations: Vec::new() };
        for signal in Signal::ALL {
            let (pending, writer) = (Arc::clone(&pipe.pending), Arc::clone(&writer));
            let note = move || {
                // The bit carries the signal, the byte only wakes: a full pipe loses nothing.
                pending.fetch_or(signal.bit(), Ordering::SeqCst);
                let _ = rustix::io::write(&*writer, &[0]);
            };
            // SAFETY: the action is async-signal-safe: one atomic operation and one write(2), no allocation.
            let id = unsafe { signal_hook::low_level::register(signal as i32, note) }?;
            pipe.registrations.push(id);
        }
        Ok(pipe)
    }

    /// The descriptor to poll for reading.
    #[must_use]
    pub fn fd(&self) -> BorrowedFd<'_> {
        self.reader.as_fd()
    }

    /// The signals that came since the last call; never blocks.
    #[must_use]
    pub fn read(&self) -> Vec<Signal> {
        let mut bytes = [0; 64];
        // Empty the pipe first: a signal that comes in between leaves a byte, so it wakes the loop again.
        while rustix::io::read(&self.reader, &mut bytes).is_ok_and(|count| count == bytes.len()) {}
        let pending = self.pending.swap(0, Ordering::SeqCst);
        Signal::ALL.into_iter().filter(|signal| pending & signal.bit() != 0).collect()
    }
}

impl Drop for SignalPipe {
    fn drop(&mut self) {
        for id in self.registrations.drain(..) {
            signal_hook::low_level::unregister(id);
        }
    }
}

/// Undoes what a careless parent may have left: an ignored SIGCHLD would make the kernel reap children itself,
/// a blocked signal would never arrive. SIGPIPE stays ignored, so that a closed reader is an error and not the end.
///
/// # Errors
/// Never in practice.
pub fn reset_inherited() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, SigSet, Signal, signal};
    // SAFETY: default and ignore are no handlers, so there is no code to be async-signal-safe.
    unsafe {
        signal(Signal::SIGCHLD, SigHandler::SigDfl)?;
        signal(Signal::SIGPIPE, SigHandler::SigIgn)?;
    }
    SigSet::empty().thread_set_mask()?;
    Ok(())
}
