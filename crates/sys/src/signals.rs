//! Signals as a readable descriptor: the handler notes the signal and writes one byte, the loop reads.
//!
//! No signal is lost over a re-exec: the old image puts back what it has not read ([`SignalPipe::hold`]) and execs
//! with all signals blocked; the new one installs its handlers first and then lets them in ([`reset_inherited`]).

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use nix::sys::signal::SigSet;
use rustix::pipe::{PipeFlags, pipe_with};
use signal_hook::SigId;

use crate::check;

/// The signals an operator speaks to the master with, and one that the kernel does.
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
    /// Some child has ended; only for who asked with [`SignalPipe::watch_children`].
    Child = libc::SIGCHLD,
}

impl Signal {
    /// All of them, in the order they are reported in: wishes before stops, so that a stop has the last word.
    pub const ALL: [Signal; 9] = [
        Signal::Child,
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

/// Catches every [`Signal`] from its creation to its end ([`Signal::Child`] when asked to). Several of one kind become one, as in the kernel.
#[derive(Debug)]
pub struct SignalPipe {
    reader: OwnedFd,
    writer: Arc<OwnedFd>,
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
        let (writer, pending) = (Arc::new(writer), Arc::default());
        let mut pipe = SignalPipe { reader, writer, pending, registrations: Vec::new() };
        for signal in Signal::ALL.into_iter().filter(|signal| *signal != Signal::Child) {
            pipe.catch(signal)?;
        }
        Ok(pipe)
    }

    /// Reports the ends of children too. Who is PID 1 wants it, for it is given the orphans of others: those that
    /// ended before this are to be looked for once.
    ///
    /// # Errors
    /// Never in practice.
    pub fn watch_children(&mut self) -> io::Result<()> {
        self.catch(Signal::Child)
    }

    fn catch(&mut self, signal: Signal) -> io::Result<()> {
        let (pending, writer) = (Arc::clone(&self.pending), Arc::clone(&self.writer));
        let note = move || {
            // The bit carries the signal, the byte only wakes: a full pipe loses nothing.
            pending.fetch_or(signal.bit(), Ordering::SeqCst);
            let _ = rustix::io::write(&*writer, &[0]);
        };
        // SAFETY: the action is async-signal-safe and does not unwind: one atomic operation and one write(2), which rustix
        // makes without touching errno; no allocation, no lock. What it uses it owns a share of, so that it is there as
        // long as the action is registered. None of the signals is one that must not be caught.
        self.registrations.push(unsafe { signal_hook::low_level::register(signal as i32, note) }?);
        Ok(())
    }

    /// Before an exec in place: blocks all signals of the thread, and sends those that have come but were not read to
    /// this process once more, so that they wait in the kernel for the next image. Only for processes with one
    /// thread: another one would catch them.
    ///
    /// # Errors
    /// Never in practice.
    pub fn hold(&self) -> io::Result<()> {
        SigSet::all().thread_set_mask()?;
        for signal in self.read() {
            // SAFETY: a plain system call; the signal is blocked, and caught when it no longer is.
            check(unsafe { libc::kill(libc::getpid(), signal as i32) })?;
        }
        Ok(())
    }

    /// When the exec has failed: lets signals in again, those held among them.
    ///
    /// # Errors
    /// Never in practice.
    pub fn release(&self) -> io::Result<()> {
        Ok(SigSet::empty().thread_set_mask()?)
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

/// Undoes what a careless parent may have left: an ignored SIGCHLD would make the kernel reap children itself, a
/// blocked signal would never arrive. SIGPIPE stays ignored, so that a closed reader is an error and not the end.
///
/// To be called when the handlers are there ([`SignalPipe::new`], [`SignalPipe::watch_children`]): what waited over an
/// exec, because the image before held it, arrives here.
///
/// # Errors
/// Never in practice.
pub fn reset_inherited() -> io::Result<()> {
    use nix::sys::signal::{SigHandler, Signal, signal};
    // SAFETY: all-zero is a valid sigaction; the kernel fills it in and changes nothing.
    let of_children = unsafe {
        let mut action: libc::sigaction = std::mem::zeroed();
        check(libc::sigaction(libc::SIGCHLD, std::ptr::null(), &raw mut action))?;
        action.sa_sigaction
    };
    // SAFETY: default and ignore are no handlers, so there is no code to be async-signal-safe.
    unsafe {
        // A handler of ours stays; and the default action would make the kernel drop a SIGCHLD that waits.
        if of_children == libc::SIG_IGN {
            signal(Signal::SIGCHLD, SigHandler::SigDfl)?;
        }
        signal(Signal::SIGPIPE, SigHandler::SigIgn)?;
    }
    Ok(SigSet::empty().thread_set_mask()?)
}
