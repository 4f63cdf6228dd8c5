//! The journal: a small file that tells a next master which processes are ours, should the keeper be gone as well.

use std::fs::{self, OpenOptions};
use std::io::{self, Read, Write};
use std::net::SocketAddr;
use std::os::unix::fs::{MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use reuseportd_core::Engine;
use reuseportd_sys::procfs;
use reuseportd_wire::status::Protocol;
use serde::{Deserialize, Serialize};

use super::Shell;
use super::snapshot::{Part, Place, SnapshotError};
use crate::config::{Endpoint, default_protocol};

/// Of the journal's form. A newer one is refused.
const VERSION: u32 = 1;
/// 65,535 workers and a head fit.
const BYTES_MAX: u64 = 16 << 20;

/// The file.
#[derive(Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Journal {
    journal: u32,
    /// The version of the master that wrote it.
    by: String,
    pub(super) place: Place,
    pub(super) workers: Vec<Entry>,
    /// `cbpf`: who sits where can't be found out anew.
    #[serde(default)]
    pub(super) slots: Vec<Slots>,
}

/// A group's sockets by the kernel's names for them, in the order of their slots.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Slots {
    #[serde(default = "default_protocol")]
    pub(super) protocol: Protocol,
    pub(super) address: SocketAddr,
    pub(super) v6only: bool,
    pub(super) cookies: Vec<u64>,
}

impl Slots {
    pub(super) fn endpoint(&self) -> Endpoint {
        Endpoint { protocol: self.protocol, address: self.address, v6only: self.v6only }
    }
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Entry {
    pub(super) pid: i32,
    /// With the pid this names one process for good.
    pub(super) start_time: u64,
    pub(super) generation: u32,
    pub(super) seat: u16,
}

/// Why a journal is not used. A newer one keeps the master from starting, anything else is as good as none.
#[derive(Debug, thiserror::Error)]
pub(super) enum JournalError {
    #[error(
        "the journal {} was written by version {by}, whose form {version} this version ({own}) does not know: its workers \
         serve on; start that version, or end them with its `stop --left-behind`", path.display(), own = env!("CARGO_PKG_VERSION")
    )]
    Newer { path: PathBuf, version: u32, by: String },
    #[error("{0}")]
    Useless(String),
}

impl Entry {
    /// No master has started it: one is, or was, to take over from it.
    pub(super) fn is_foreign(&self) -> bool {
        self.generation == 0
    }

    /// It is still the process that was written down.
    pub(super) fn lives(&self) -> bool {
        procfs::process(self.pid)
            .is_ok_and(|process| process.start_time == self.start_time && !process.is_zombie)
    }
}

/// Reads the journal; its workers may be in another network namespace. `None` if there is none.
pub(super) fn read(path: &Path) -> Result<Option<Journal>, JournalError> {
    match read_own(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(JournalError::Useless(error.to_string())),
        Ok(text) => parse(path, &text).map(Some),
    }
}

/// The journal that this text is.
pub(super) fn parse(path: &Path, text: &[u8]) -> Result<Journal, JournalError> {
    #[derive(Deserialize)]
    struct Form {
        journal: u32,
        by: String,
    }
    let useless = |what: String| JournalError::Useless(what);
    let form: Form = serde_json::from_slice(text)
        .map_err(|error| useless(format!("it is cut off or damaged: {error}")))?;
    if form.journal > VERSION {
        let (path, version, by) = (path.to_owned(), form.journal, form.by);
        return Err(JournalError::Newer { path, version, by });
    }
    let journal: Journal =
        serde_json::from_slice(text).map_err(|error| useless(format!("it is damaged: {error}")))?;
    match journal.place.check() {
        // Their pids mean something here.
        Ok(()) | Err(SnapshotError::Elsewhere(Part::Network)) => Ok(journal),
        Err(error) => Err(useless(error.to_string())),
    }
}

/// Only what this user, or root, wrote is believed.
fn read_own(path: &Path) -> io::Result<Vec<u8>> {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
        .open(path)?;
    let metadata = file.metadata()?;
    if !metadata.is_file() || ![0, rustix::process::geteuid().as_raw()].contains(&metadata.uid()) {
        return Err(io::Error::other("it is no plain file of this user"));
    }
    // Ours is made under another name, and has no second one: somebody has linked some other file of this user there.
    if metadata.nlink() > 1 {
        return Err(io::Error::other("it is a hard link to another file"));
    }
    if metadata.len() > BYTES_MAX {
        return Err(io::Error::other(format!("it is larger than {} MiB", BYTES_MAX >> 20)));
    }
    let mut text = Vec::new();
    file.take(BYTES_MAX).read_to_end(&mut text)?;
    Ok(text)
}

impl Shell {
    /// Writes the journal if it says anything else than what is.
    pub(super) fn write_journal(&mut self) -> io::Result<()> {
        let workers: Vec<Entry> = self
            .processes
            .values()
            .map(|process| Entry {
                pid: process.pid,
                start_time: process.start_time,
                generation: process.generation.0,
                seat: process.seat.0,
            })
            .collect();
        let slots = self.slots();
        if self.journalled.as_ref().is_some_and(|known| known.0 == workers && known.1 == slots) {
            return Ok(());
        }
        let by = env!("CARGO_PKG_VERSION").to_owned();
        let journal = Journal { journal: VERSION, by, place: Place::here()?, workers, slots };
        replace(&self.runtime.journal_path(), &serde_json::to_vec(&journal)?)?;
        self.journalled = Some((journal.workers, journal.slots));
        Ok(())
    }

    fn slots(&self) -> Vec<Slots> {
        if self.groups.choice.engine != Engine::Cbpf {
            return Vec::new();
        }
        let of_group = |(id, cookies)| {
            let group = self.groups.of(id)?;
            let Endpoint { protocol, address, v6only } = group.endpoint();
            Some(Slots { protocol, address, v6only, cookies })
        };
        self.core.slots().into_iter().filter_map(of_group).collect()
    }
}

/// Puts the whole file in the place of the old one, or changes nothing.
fn replace(path: &Path, text: &[u8]) -> io::Result<()> {
    let mut new = path.as_os_str().to_owned();
    new.push(".new");
    match fs::remove_file(&new) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(error),
        Ok(()) | Err(_) => {}
    }
    let flags = nix::libc::O_NOFOLLOW;
    let mut file =
        OpenOptions::new().write(true).create_new(true).mode(0o600).custom_flags(flags).open(&new)?;
    file.write_all(text).and_then(|()| fs::rename(&new, path)).inspect_err(|_| drop(fs::remove_file(&new)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn journal() -> Journal {
        let workers = vec![Entry { pid: 1, start_time: 2, generation: 3, seat: 4 }];
        Journal {
            journal: VERSION,
            by: "0.0.1".into(),
            place: Place::here().unwrap(),
            workers,
            slots: Vec::new(),
        }
    }

    #[test]
    fn only_a_whole_journal_of_this_place_is_used() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("journal");
        assert!(read(&path).unwrap().is_none());
        let text = serde_json::to_vec(&journal()).unwrap();
        replace(&path, &text).unwrap();
        assert_eq!(read(&path).unwrap(), Some(journal()));
        for length in 0..text.len() {
            replace(&path, &text[..length]).unwrap();
            assert!(matches!(read(&path), Err(JournalError::Useless(_))), "cut off after {length} bytes");
        }
        let text = String::from_utf8(text).unwrap();
        let boot = reuseportd_sys::namespace::boot_id().unwrap();
        let network = reuseportd_sys::namespace::network().unwrap().to_string();
        let processes = reuseportd_sys::namespace::processes().unwrap().to_string();
        for (from, to, why) in [
            (boot.as_str(), "another", "before the last boot"),
            (processes.as_str(), "1", "in another pid namespace"),
        ] {
            replace(&path, text.replace(from, to).as_bytes()).unwrap();
            let refused = read(&path).unwrap_err().to_string();
            assert!(refused.contains(why), "{refused}");
        }
        replace(&path, text.replace(&network, "1").as_bytes()).unwrap();
        let elsewhere = read(&path).unwrap().unwrap();
        assert_eq!(elsewhere.workers, journal().workers);
        let refused = elsewhere.place.check().unwrap_err().to_string();
        assert!(refused.contains("in another network namespace"), "{refused}");
        let newer = text.replace("\"journal\":1", "\"journal\":2").replace("\"workers\"", "\"unheard_of\"");
        replace(&path, newer.as_bytes()).unwrap();
        let refused = read(&path).unwrap_err();
        assert!(matches!(&refused, JournalError::Newer { version: 2, .. }), "{refused}");
    }

    #[test]
    fn what_others_may_have_put_there_is_not_read() {
        let directory = tempfile::tempdir().unwrap();
        let (path, other) = (directory.path().join("journal"), directory.path().join("other"));
        fs::write(&other, serde_json::to_vec(&journal()).unwrap()).unwrap();
        std::os::unix::fs::symlink(&other, &path).unwrap();
        assert!(matches!(read(&path), Err(JournalError::Useless(_))));
        replace(&path, b"{}").unwrap();
        assert!(fs::read(&other).unwrap().len() > 2, "the link was followed");
    }
}
