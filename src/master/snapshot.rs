//! The master's state as text: written for the next image, the next master, or the journal; read by each of them.
//!
//! Two lines of JSON: a head that every version understands, and the state. A field that is added later needs
//! `#[serde(default)]`; a change that an older reader would misunderstand needs a new [`VERSION`].

use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::fmt;
use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::rc::Rc;

use reuseportd_core::{Generation, ListenerId, Master, Time, WorkerId};
use reuseportd_sys::namespace;
use reuseportd_wire::status as wire;
use serde::{Deserialize, Serialize};

use super::carried::{self, Carried, Written};
use super::checks::Check;
use super::control::Clients;
use super::groups::Groups;
use super::launch::Launch;
use super::listeners::Listeners;
use super::process::Process;
use super::runtime::Runtime;
use super::shared::Shared;
use super::{Limits, LogSettings, Shell, clock};
use crate::config::{Config, saved};
use crate::keeper::Keeper;

/// Of the state's form. A newer one is refused: what it means is not known here.
const VERSION: u32 = 1;

/// Where a state means something: pids, sockets and addresses are of one boot and one set of namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    boot: String,
    network: u64,
    processes: u64,
}

impl Place {
    pub(super) fn here() -> io::Result<Place> {
        let (network, processes) = (namespace::network()?, namespace::processes()?);
        Ok(Place { boot: namespace::boot_id()?, network, processes })
    }

    /// Why numbers from another place mean nothing here.
    pub(super) fn check(&self) -> Result<(), SnapshotError> {
        let here = Place::here().map_err(SnapshotError::Place)?;
        match () {
            () if self.boot != here.boot => Err(SnapshotError::Elsewhere(Part::Boot)),
            () if self.processes != here.processes => Err(SnapshotError::Elsewhere(Part::Processes)),
            () if self.network != here.network => Err(SnapshotError::Elsewhere(Part::Network)),
            () => Ok(()),
        }
    }
}

/// Where a place differs from here; by all but `Network` the pids mean nothing either.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    Boot,
    Processes,
    Network,
}

impl fmt::Display for Part {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Part::Boot => "before the last boot",
            Part::Processes => "in another pid namespace",
            Part::Network => "in another network namespace",
        })
    }
}

/// Why a state is of no use.
#[derive(Debug, thiserror::Error)]
pub(super) enum SnapshotError {
    #[error("it was written by version {by}, whose form {version} this version ({own}) does not know; start that one, or a newer one", own = env!("CARGO_PKG_VERSION"))]
    Newer { version: u32, by: String },
    #[error("it is of a master that ran {0}")]
    Elsewhere(Part),
    #[error("where it was written can't be compared with here: {0}")]
    Place(io::Error),
    #[error("it is not understood: {0}")]
    Malformed(#[from] serde_json::Error),
}

/// What every version understands of every other's state.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Head {
    /// Of the form.
    snapshot: u32,
    /// Of the master that wrote it.
    by: String,
    pub(super) place: Place,
    /// Under which number the next image finds each descriptor.
    #[serde(default)]
    pub(super) fds: BTreeMap<String, i32>,
}

/// One list for both directions, so that nothing can be written that is not read.
macro_rules! state {
    ($($(#[$attribute:meta])* $field:ident: $type:ty,)*) => {
        /// The state on its way out.
        #[derive(Serialize)]
        struct Outgoing<'a> {
            $($(#[$attribute])* $field: &'a $type,)*
        }

        /// The state of a master, with its descriptors.
        #[derive(Debug, Deserialize)]
        pub(super) struct Snapshot {
            $($(#[$attribute])* pub(super) $field: $type,)*
        }
    };
}

state! {
    saved: Time,
    core: Master,
    started: Time,
    reexecs: u32,
    adopted: bool,
    #[serde(with = "saved::path")]
    config_path: PathBuf,
    config: Rc<Config>,
    log: LogSettings,
    prepared: VecDeque<Launch>,
    launches: BTreeMap<Generation, Launch>,
    #[serde(default)]
    config_last: u64,
    #[serde(default)]
    checks: BTreeMap<u32, Check>,
    #[serde(default)]
    check_words: Option<String>,
    processes: BTreeMap<WorkerId, Process>,
    listeners: Listeners,
    groups: Groups,
    #[serde(default)]
    shared: Shared,
    taking: Vec<(WorkerId, String, ListenerId)>,
    exchanging: Vec<WorkerId>,
    receipts: VecDeque<(Option<u32>, wire::Receipt)>,
    failing: Option<String>,
    spawn_error: Option<String>,
    state_reason: Option<String>,
    notify: Carried<UnixDatagram>,
    notify_rejected: u64,
    limits: Option<Limits>,
}

/// What only the next image of the same process goes on with.
#[derive(Debug, Deserialize)]
pub(super) struct Belongings {
    pub(super) clients: Clients,
    pub(super) runtime: Runtime,
    pub(super) keeper: Option<Carried<Keeper>>,
    /// Capabilities, as their bits.
    #[serde(default)]
    pub(super) dropped: u64,
}

/// The same on their way out.
#[derive(Serialize)]
struct OutgoingBelongings<'a> {
    clients: &'a Clients,
    runtime: &'a Runtime,
    keeper: &'a Option<Carried<Keeper>>,
    dropped: u64,
}

/// A state that has been split into its lines.
#[derive(Debug)]
pub(super) struct Lines<'a> {
    pub(super) head: Head,
    state: &'a [u8],
    belongings: &'a [u8],
}

impl<'a> Lines<'a> {
    /// Reads the head, and refuses what a newer version wrote.
    pub(super) fn of(text: &'a [u8]) -> Result<Lines<'a>, SnapshotError> {
        #[derive(Deserialize)]
        struct Form {
            snapshot: u32,
            by: String,
        }
        let mut lines = text.split(|byte| *byte == b'\n');
        let head = lines.next().unwrap_or_default();
        let Form { snapshot: version, by } = serde_json::from_slice(head)?;
        if version > VERSION {
            return Err(SnapshotError::Newer { version, by });
        }
        let (state, belongings) = (lines.next().unwrap_or_default(), lines.next().unwrap_or_default());
        Ok(Lines { head: serde_json::from_slice(head)?, state, belongings })
    }

    /// Takes the state's descriptors out of these.
    pub(super) fn state(&self, fds: &mut BTreeMap<String, OwnedFd>) -> Result<Snapshot, SnapshotError> {
        Ok(carried::read(self.state, Some(fds))?)
    }

    /// Takes those of the belongings out of these.
    pub(super) fn belongings(
        &self,
        fds: &mut BTreeMap<String, OwnedFd>,
    ) -> Result<Belongings, SnapshotError> {
        Ok(carried::read(self.belongings, Some(fds))?)
    }

    /// Whether all of it is understood.
    pub(super) fn try_all(&self) -> Result<(), SnapshotError> {
        carried::read::<Snapshot>(self.state, None)?;
        carried::read::<Belongings>(self.belongings, None)?;
        Ok(())
    }
}

fn head(fds: BTreeMap<String, i32>) -> Result<Vec<u8>, SnapshotError> {
    let place = Place::here().map_err(SnapshotError::Place)?;
    let by = env!("CARGO_PKG_VERSION").to_owned();
    let mut line = serde_json::to_vec(&Head { snapshot: VERSION, by, place, fds })?;
    line.push(b'\n');
    Ok(line)
}

impl Shell {
    /// Writes the state, for a keeper that has the descriptors of these names already. Never is all of it in memory.
    pub(super) fn state_for_keeper(
        &self,
        to: &mut impl io::Write,
        there: BTreeSet<String>,
    ) -> Result<Written, SnapshotError> {
        to.write_all(&head(BTreeMap::new())?).map_err(serde_json::Error::io)?;
        self.write_state(to, there)
    }

    /// The state for the next image, and duplicates of all descriptors in it, which it finds under their numbers.
    pub(super) fn state_for_exec(&self) -> Result<(Vec<u8>, Vec<OwnedFd>), SnapshotError> {
        let (mut text, mut own) = (Vec::new(), Vec::new());
        let state = self.write_state(&mut text, BTreeSet::new())?;
        let (clients, runtime, keeper) = (&self.clients, &self.runtime, &self.keeper);
        let belongings = OutgoingBelongings { clients, runtime, keeper, dropped: self.dropped.bits() };
        let belongings = carried::write(&mut own, &belongings, BTreeSet::new())?;
        let fds: BTreeMap<String, OwnedFd> = state.fds.into_iter().chain(belongings.fds).collect();
        let numbers = fds.iter().map(|(name, fd)| (name.clone(), fd.as_raw_fd())).collect();
        let text = [head(numbers)?, text, b"\n".into(), own].concat();
        Ok((text, fds.into_values().collect()))
    }

    fn write_state(
        &self,
        to: &mut impl io::Write,
        there: BTreeSet<String>,
    ) -> Result<Written, SnapshotError> {
        let taking = self.taking.iter().map(|((worker, name), listener)| (*worker, name.clone(), *listener));
        let state = Outgoing {
            saved: &clock::now(),
            core: &self.core,
            started: &self.started,
            reexecs: &self.reexecs,
            adopted: &self.adopted,
            config_path: &self.config_path,
            config: &self.config,
            log: &self.log,
            prepared: &self.prepared,
            launches: &self.launches,
            config_last: &self.config_last,
            checks: &self.checks,
            check_words: &self.check_words,
            processes: &self.processes,
            listeners: &self.listeners,
            groups: &self.groups,
            shared: &self.shared,
            taking: &taking.collect(),
            exchanging: &self.exchanges.keys().copied().collect(),
            receipts: &self.receipts,
            failing: &self.failing,
            spawn_error: &self.spawn_error,
            state_reason: &self.state_reason,
            notify: &self.notify,
            notify_rejected: &self.notify_rejected,
            limits: &self.limits,
        };
        Ok(carried::write(to, &state, there)?)
    }
}
