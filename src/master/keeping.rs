//! What the next master will need is put where it outlives this one: state and descriptors with the keeper, the
//! workers' pids in the journal.

use std::fs;
use std::io::{self, BufWriter};
use std::os::fd::AsFd;
use std::time::Duration;

use reuseportd_core::{Event, ListenerId, Time};
use reuseportd_sys::memfd;

use super::carried::Carried;
use super::{Shell, clock};
use crate::keeper::Keeper;

/// Saving takes at most one part in so many of the time.
const SHARE: u32 = 20;

/// The pause after saving has failed.
const RETRY: Duration = Duration::from_secs(1);

/// When the state was, and will be, saved.
#[derive(Debug, Default)]
pub(super) struct Saving {
    /// Something happened since the last time.
    pub(super) is_due: bool,
    /// The core waits for it.
    pub(super) is_asked_for: bool,
    /// Not before.
    after: Time,
    has_failed: bool,
}

impl Saving {
    /// When the loop has to wake up for it.
    pub(super) fn deadline(&self) -> Option<Time> {
        self.is_due.then_some(self.after)
    }
}

impl Shell {
    /// Saves the state if anything happened since it was saved last.
    pub(super) fn save_if_due(&mut self) {
        if self.saving.is_due && clock::now() >= self.saving.after {
            self.save_now();
        }
    }

    /// Saves it whatever it costs.
    pub(super) fn save_now(&mut self) {
        let began = clock::now();
        self.saving.is_due = false;
        let saved = self.save();
        let ended = clock::now();
        self.saving.after = ended.after(ended.since(began) * SHARE);
        match saved {
            Ok(()) => self.saving.has_failed = false,
            Err(error) => {
                if !self.saving.has_failed {
                    tracing::error!(event = "not_saved", %error, "cannot save the state for a next master: {error}");
                }
                self.saving.has_failed = true;
                self.saving.is_due = true;
                self.saving.after = ended.after(RETRY);
            }
        }
    }

    fn save(&mut self) -> io::Result<()> {
        // As the first process of its namespace the master takes everything with it.
        if is_first_process() {
            return Ok(());
        }
        // A full disk is no reason to keep the keeper from it.
        let written = self.write_journal();
        let Some(mut keeper) = self.keeper.take() else { return written };
        let filled = self.fill(&mut keeper);
        self.keeper = Some(keeper);
        if let Err(error) = filled {
            // The next one gets all of it.
            self.lose_keeper(&error.to_string());
        }
        written
    }

    /// Gives a keeper all that it does not hold yet.
    fn fill(&self, keeper: &mut Keeper) -> io::Result<()> {
        let mut state = BufWriter::new(memfd::open("reuseportd-state")?);
        let written = self.state_for_keeper(&mut state, keeper.held().clone()).map_err(io::Error::other)?;
        let state = memfd::seal(state.into_inner()?)?;
        let new: Vec<_> = written.fds.iter().map(|(name, fd)| (name.clone(), fd.as_fd())).collect();
        keeper.update(&written.names, &new)?;
        keeper.save(state.as_fd())
    }

    /// Starts a keeper. One of an earlier image, or of a master before this one, stays until the new one has everything
    /// and is found in its place.
    pub(super) fn start_keeper(&mut self) {
        let (place, beside) = (self.runtime.keeper_path(), self.runtime.new_keeper_path());
        let started = Keeper::start(&beside, &self.config.app.name).and_then(|mut keeper| {
            let filled = self.fill(&mut keeper).and_then(|()| fs::rename(&beside, &place));
            match filled {
                Ok(()) => Ok(keeper),
                Err(error) => {
                    keeper.end();
                    Err(error)
                }
            }
        });
        match started {
            Ok(keeper) => {
                tracing::debug!(
                    event = "keeper_started",
                    pid = keeper.pid(),
                    "a keeper holds the descriptors"
                );
                if let Some(earlier) = self.keeper.replace(Carried::new(keeper)) {
                    earlier.into_inner().dismiss();
                }
            }
            Err(error) => {
                tracing::error!(event = "no_keeper", %error, "cannot start a keeper: {error}; if the master is killed now, its workers are replaced");
                self.inbox.push_back(Event::KeeperMissing);
            }
        }
    }

    /// Something came from the keeper: that is its end.
    pub(super) fn keeper_ended(&mut self) {
        if self.keeper.as_mut().is_some_and(|keeper| !keeper.is_alive()) {
            self.lose_keeper("it has ended");
        }
    }

    fn lose_keeper(&mut self, why: &str) {
        tracing::warn!(event = "keeper_ended", why, "the keeper is replaced: {why}");
        if let Some(keeper) = self.keeper.take().map(Carried::into_inner) {
            keeper.end();
            self.inbox.push_back(Event::KeeperMissing);
        }
    }

    /// Before the master lets go of a listener its duplicates are closed: as long as anybody holds it, it stays in its
    /// group.
    pub(super) fn release_kept(&mut self, listener: ListenerId) {
        let names: Vec<String> = self.listeners.handle_names(listener);
        for name in names {
            if let Some(Err(error)) = self.keeper.as_mut().map(|keeper| keeper.release(&name)) {
                self.lose_keeper(&error.to_string());
            }
        }
    }
}

/// PID 1 of a container: nothing outlives it.
pub(super) fn is_first_process() -> bool {
    std::process::id() == 1
}
