//! The loop: wait, tell the core, carry out. The only place that blocks.

use std::os::fd::BorrowedFd;

use reuseportd_core::{Event, Number, StopMode, Trigger, WorkerId};
use reuseportd_sys::signals::Signal;
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use super::carried::Carried;
use super::turn::Turn;
use super::{Shell, clock};
use crate::keeper::Keeper;

/// How long nobody looks where descriptors can be looked at one by one only.
const ONE_BY_ONE: Timespec = Timespec { tv_sec: 0, tv_nsec: 10_000_000 };

/// Waits. The kernel refuses to watch more descriptors than the limit allows at present, which may be fewer than are open;
/// deaf to all of them the master could not even be stopped.
fn poll_all(fds: &mut [PollFd<'_>], timeout: Option<&Timespec>) -> rustix::io::Result<()> {
    match poll(fds, timeout) {
        Err(rustix::io::Errno::INVAL) => {}
        result => return result.map(drop),
    }
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    let mut ready = 0;
    for fd in fds {
        ready += poll(std::slice::from_mut(fd), Some(&now))?;
    }
    let pause = timeout.map_or(ONE_BY_ONE, |timeout| ONE_BY_ONE.min(*timeout));
    if ready == 0 { poll(&mut [], Some(&pause)).map(drop) } else { Ok(()) }
}

/// What a descriptor of the loop is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Token {
    Signals,
    Notifications,
    Knock,
    /// The keeper's channel.
    Keeper,
    /// The end of a check, and what it says.
    CheckEnd(u32),
    CheckOutput(u32),
    /// The end of the child that tries to read the state.
    Preflight,
    Client(u32),
    /// The worker's pidfd.
    End(WorkerId),
    Channel(WorkerId),
    Output(WorkerId),
    /// The answer to a request that proves the worker.
    Exchange(WorkerId),
}

impl Shell {
    /// Runs until the core says that it is over; the exit code.
    pub(super) fn run(&mut self) -> u8 {
        self.begin_reaping();
        self.settle();
        while self.exit.is_none() {
            let ready = self.wait();
            self.clients.hear_again();
            self.turn = Turn::default();
            for token in ready {
                self.ready(token);
            }
            if self.core.next_deadline().is_some_and(|deadline| deadline <= clock::now()) {
                // This turn may have been a long one: signs of life that came meanwhile came in time.
                self.read_notifications();
                self.inbox.push_back(Event::Deadline);
            }
            self.settle();
        }
        self.end_shared();
        // Nothing is left to be kept.
        self.keeper.take().map(Carried::into_inner).into_iter().for_each(Keeper::dismiss);
        self.exit.unwrap_or(0)
    }

    /// Does all that is to be done, until only waiting is left. At this point, and no other, the state is whole.
    fn settle(&mut self) {
        self.work();
        while std::mem::take(&mut self.saving.is_asked_for) {
            self.save_now();
            self.inbox.push_back(Event::Saved);
            self.work();
        }
        if std::mem::take(&mut self.is_reexec_due) {
            self.reexec();
            self.work();
        }
        self.save_if_due();
        self.work();
    }

    /// Tells the core everything that happened, and does what it answers.
    fn work(&mut self) {
        while let Some(event) = self.inbox.pop_front() {
            self.saving.is_due = true;
            self.core.handle(event, clock::now());
            while let Some(command) = self.core.next_command() {
                self.perform(command);
            }
            #[cfg(debug_assertions)]
            self.core.check();
        }
    }

    /// Waits for anything to happen. The list is made anew each time, so that nothing in it can be out of date.
    fn wait(&self) -> Vec<Token> {
        let watched = self.watched();
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().map(|(_, fd, flags)| PollFd::from_borrowed_fd(*fd, *flags)).collect();
        let deadlines = [self.core.next_deadline(), self.saving.deadline(), self.clients.deadline()];
        let timeout = deadlines.into_iter().flatten().min().map(|deadline| {
            let left = deadline.since(clock::now());
            Timespec {
                tv_sec: i64::try_from(left.as_secs()).unwrap_or(i64::MAX),
                tv_nsec: i64::from(left.subsec_nanos()),
            }
        });
        match poll_all(&mut fds, timeout.as_ref()) {
            Ok(()) | Err(rustix::io::Errno::INTR) => {}
            Err(error) => tracing::error!(%error, "cannot wait for events"),
        }
        let ready = |fd: &PollFd<'_>| !fd.revents().is_empty();
        watched.iter().zip(&fds).filter(|(_, fd)| ready(fd)).map(|((token, _, _), _)| *token).collect()
    }

    fn watched(&self) -> Vec<(Token, BorrowedFd<'_>, PollFlags)> {
        use std::os::fd::AsFd;
        let mut watched = vec![
            // Notifications before ends: a worker that said READY=1 and ended has said it.
            (Token::Notifications, self.notify.as_fd(), PollFlags::IN),
            (Token::Signals, self.signals.fd(), PollFlags::IN),
        ];
        for (worker, process) in &self.processes {
            if let Some(channel) = &process.channel {
                watched.push((Token::Channel(*worker), channel.as_fd(), PollFlags::IN));
            }
            if let Some(output) = &process.output {
                watched.push((Token::Output(*worker), output.fd(), PollFlags::IN));
            }
            if !process.is_ended {
                watched.push((Token::End(*worker), process.pidfd.as_fd(), PollFlags::IN));
            }
        }
        for (worker, exchange) in &self.exchanges {
            watched.push((Token::Exchange(*worker), exchange.fd(), PollFlags::IN));
        }
        if let Some(keeper) = &self.keeper {
            watched.push((Token::Keeper, keeper.fd(), PollFlags::IN));
        }
        for (run, check) in &self.checks {
            watched.push((Token::CheckOutput(*run), check.output(), PollFlags::IN));
            watched.push((Token::CheckEnd(*run), check.fd(), PollFlags::IN));
        }
        if let Some(preflight) = &self.preflight {
            watched.push((Token::Preflight, preflight.pidfd(), PollFlags::IN));
        }
        for (number, fd, has_unsent) in self.clients.fds() {
            let flags = if has_unsent { PollFlags::IN | PollFlags::OUT } else { PollFlags::IN };
            watched.push((Token::Client(number), fd, flags));
        }
        // After those let in before, who may have to make room.
        watched.extend(self.clients.listener().map(|listener| (Token::Knock, listener, PollFlags::IN)));
        watched
    }

    fn ready(&mut self, token: Token) {
        match token {
            Token::Signals => self.read_signals(),
            Token::Notifications => self.read_notifications(),
            Token::Knock => self.clients.accept(),
            Token::Keeper => self.keeper_ended(),
            Token::CheckEnd(run) => self.check_ended(run),
            Token::CheckOutput(run) => self.read_check(run),
            Token::Preflight => self.preflight_ended(),
            Token::Client(number) => {
                self.clients.send(number);
                self.read_client(number);
            }
            Token::End(worker) => self.worker_ended(worker),
            Token::Channel(worker) => self.read_channel(worker),
            Token::Output(worker) => self.read_output(worker),
            Token::Exchange(worker) => self.read_exchange(worker),
        }
    }

    fn read_signals(&mut self) {
        for signal in self.signals.read() {
            match signal {
                // A refusal is in the log, in STATUS and in `status`: nobody waits for an answer to a signal.
                Signal::Hangup => drop(self.trigger(Trigger::Signal, None)),
                Signal::Terminate | Signal::Interrupt => {
                    self.inbox.push_back(Event::Stop { mode: StopMode::Graceful, by: None });
                }
                Signal::Quit => self.inbox.push_back(Event::Stop { mode: StopMode::Fast, by: None }),
                Signal::User1 => {}
                Signal::Child => self.reap_orphans(),
                Signal::User2 => self.inbox.push_back(Event::Reexec { by: None }),
                Signal::TerminalInput => self.inbox.push_back(Event::Scale { to: Number::More, by: None }),
                Signal::TerminalOutput => self.inbox.push_back(Event::Scale { to: Number::Fewer, by: None }),
            }
        }
    }
}
