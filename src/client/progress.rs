//! How a wait gets on, on stderr: live on a terminal, else a line for each phase and whatever else it is about.

use std::io::{Write, stderr};
use std::path::Path;
use std::time::Instant;

use indicatif::{ProgressBar, ProgressStyle};
use reuseportd_wire::control::Reply;
use reuseportd_wire::status::{Phase, Status};

use super::connection::Connection;
use super::error::ClientError;
use super::live::{Moment, time};
use super::look::Look;
use super::text::escape;

/// Shows one phase after the other.
pub(super) struct Progress {
    /// None where nobody watches: then nothing is said twice, and no numbers that change all the time.
    live: Option<Live>,
    phase: Option<(Phase, Instant)>,
    text: String,
}

/// What is drawn on a terminal, and from what.
struct Live {
    bar: ProgressBar,
    look: Look,
    status: Option<Status>,
    ready: Option<(u32, u32)>,
    /// When the master said something new last.
    told: Instant,
}

impl Progress {
    /// Of a wait for the master at this socket.
    pub(super) fn new(socket: &Path) -> Self {
        let bar = ProgressBar::new_spinner();
        // Cut to the terminal's width. No spinner: the time that runs shows the same.
        if let Ok(style) = ProgressStyle::with_template("{wide_msg}") {
            bar.set_style(style);
        }
        // Hidden where stderr is no terminal, or one that can't go back in a line.
        let live = (!bar.is_hidden()).then(|| Live {
            bar,
            look: Look::new(socket),
            status: None,
            ready: None,
            told: Instant::now(),
        });
        Self { live, phase: None, text: String::new() }
    }

    /// The next reply that tells no progress. The time until it comes is spent on what is drawn.
    ///
    /// # Errors
    /// As of [`Connection::reply`].
    pub(super) fn reply(&mut self, connection: &mut Connection) -> Result<Reply, ClientError> {
        loop {
            let (fd, due) = self.live.as_ref().map(|live| (live.look.fd(), live.look.due())).unzip();
            match connection.reply_beside(fd.flatten(), due)? {
                Some(Reply::Progress { state, text, ready, of }) => self.show(state, &text, ready.zip(of)),
                Some(reply) => return Ok(reply),
                None => self.refresh(),
            }
        }
    }

    /// What the master says now.
    fn show(&mut self, phase: Phase, text: &str, ready: Option<(u32, u32)>) {
        let begins = self.phase.is_none_or(|(last, _)| last != phase);
        let is_new = begins || self.text != text;
        if begins {
            self.end_phase();
            self.phase = Some((phase, Instant::now()));
        }
        text.clone_into(&mut self.text);
        match &mut self.live {
            Some(live) => {
                if is_new {
                    live.told = Instant::now();
                }
                // What was asked in the last phase says nothing about this one, and what the master says now is newer.
                if begins {
                    live.look.restart();
                }
                live.status.take_if(|_| begins || ready.is_some());
                live.ready = ready;
                self.draw();
            }
            // A closed stderr must not stop the wait for the outcome.
            None if begins || is_new && ready.is_none() => {
                drop(writeln!(stderr(), "{phase}: {}", escape(text)));
            }
            None => {}
        }
    }

    fn refresh(&mut self) {
        if let Some(live) = &mut self.live {
            live.status = live.look.go_on().or(live.status.take());
            // Once for each answer, or for each that fails to come.
            if live.look.fd().is_none() {
                self.draw();
            }
        }
    }

    fn draw(&self) {
        let Some(live) = &self.live else { return };
        // A step of a canary has a time of its own; seats that get ready are no steps.
        let began = match self.phase {
            Some((Phase::Canary, _)) | None => live.told,
            Some((_, began)) => began,
        };
        let phase = self.phase.map(|(phase, _)| phase);
        let moment = Moment {
            phase,
            text: &self.text,
            ready: live.ready,
            status: live.status.as_ref(),
            lasts: began.elapsed(),
        };
        live.bar.set_message(moment.line());
    }

    fn end_phase(&mut self) {
        if let (Some(live), Some((phase, began))) = (&self.live, self.phase.take()) {
            live.bar.println(format!("{phase}: {}", time(began.elapsed())));
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        self.end_phase();
        if let Some(live) = &self.live {
            live.bar.finish_and_clear();
        }
    }
}
