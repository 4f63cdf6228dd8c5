//! The master: owns descriptors, processes and the clock, and decides nothing. What happens becomes an event for the
//! core; what the core answers is carried out, one command after the other.

mod activation;
mod carried;
mod channel;
mod checks;
mod clock;
mod control;
mod exchange;
mod foreign;
#[cfg(fuzzing)]
#[path = "../../fuzz/src/master.rs"]
pub(crate) mod fuzz;
mod groups;
mod journal;
mod keeping;
mod launch;
mod left_behind;
mod listeners;
mod log;
mod look;
mod notifications;
mod orphans;
mod output;
mod perform;
mod place;
mod privileges;
mod process;
mod prove;
mod reaper;
mod reexec;
mod reload;
mod report;
mod restore;
mod run;
mod runtime;
mod seats;
mod seldom;
mod shared;
mod snapshot;
mod start;
mod status;
mod takeover;
mod turn;
mod upstream;
mod words;

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::rc::Rc;

use reuseportd_core::{Event, Generation, GroupId, GroupView, ListenerId, Master, Time, WorkerId};
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::signals::SignalPipe;
use reuseportd_wire::status as wire;
use rustix::thread::CapabilitySet;
use serde::{Deserialize, Serialize};

use self::carried::Carried;
use self::control::Clients;
use self::groups::Groups;
use self::keeping::Saving;
use self::launch::Launch;
use self::listeners::Listeners;
use self::process::Process;
use self::reexec::Preflight;
use self::runtime::Runtime;
use self::seldom::Seldom;
use self::shared::Shared;
use self::upstream::Upstream;
use crate::config::{Config, LogFormat};
use crate::keeper::Keeper;

pub(crate) use self::groups::choose;
pub(crate) use self::left_behind::end as end_left_behind;
pub(crate) use self::reexec::preflight;
pub(crate) use self::start::{run, take_over};

/// Limits of open files: soft and hard; `None` is unlimited.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
struct Limits {
    soft: Option<u64>,
    hard: Option<u64>,
}

/// How the log is written.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct LogSettings {
    format: LogFormat,
    /// From the command line.
    level: Option<String>,
}

impl LogSettings {
    /// The command line's level wins.
    fn level(&self, config: &Config) -> tracing::Level {
        self.level.as_ref().and_then(|level| level.parse().ok()).unwrap_or(config.log.level)
    }
}

/// Everything the master owns. What is to survive an exec is plain data in `core`, and descriptors in tables by the
/// core's numbers.
#[derive(Debug)]
struct Shell {
    core: Master,
    turn: turn::Turn,
    /// What happened and the core has not been told yet.
    inbox: VecDeque<Event>,
    started: Time,
    config_path: PathBuf,
    /// The config of the latest generation.
    config: Rc<Config>,
    /// What generations are started from, for those whose number is not known yet, in order.
    prepared: VecDeque<Launch>,
    launches: BTreeMap<Generation, Launch>,
    /// The last number a config was given.
    config_last: u64,
    processes: BTreeMap<WorkerId, Process>,
    listeners: Listeners,
    groups: Groups,
    shared: Shared,
    /// The last look at each group.
    views: BTreeMap<GroupId, GroupView>,
    /// Listeners whose leftovers a worker was asked to take, by the name it knows.
    taking: BTreeMap<(WorkerId, String), ListenerId>,
    /// Connections made to prove workers, as long as they have not been accepted.
    proofs: BTreeMap<WorkerId, Vec<prove::Proof>>,
    /// Requests to prove workers, until they are answered.
    exchanges: BTreeMap<WorkerId, exchange::Exchange>,
    /// Checks that run.
    checks: BTreeMap<u32, checks::Check>,
    /// What the last one said.
    check_words: Option<String>,
    receipts: VecDeque<(Option<u32>, wire::Receipt)>,
    /// Why the upgrade under way fails, in words: said while the worker's last words are still known.
    failing: Option<String>,
    /// Why the last start of a process failed, in words.
    spawn_error: Option<String>,
    /// Why the state is what it is.
    state_reason: Option<String>,
    clients: Clients,
    notify: Carried<UnixDatagram>,
    /// Notifications from processes that are no worker's.
    notify_rejected: u64,
    rejections: Seldom,
    upstream: Upstream,
    signals: SignalPipe,
    /// The limit of open files before the master raised its own: what workers get unless told otherwise.
    limits: Option<Limits>,
    log: LogSettings,
    log_level: log::Level,
    runtime: Runtime,
    /// How often the program was replaced in place.
    reexecs: u32,
    /// The workers, or some of them, were a killed master's.
    adopted: bool,
    /// What is executed by a re-exec.
    program: PathBuf,
    preflight: Option<Preflight>,
    /// The program that has read the state.
    proven: Option<PinnedExecutable>,
    /// At the end of the turn.
    is_reexec_due: bool,
    /// Why the last one failed, in words.
    reexec_error: Option<String>,
    keeper: Option<Carried<Keeper>>,
    /// Capabilities given up since this process began, but for those that a re-exec brought back.
    dropped: CapabilitySet,
    saving: Saving,
    /// What the journal says.
    journalled: Option<(Vec<journal::Entry>, Vec<journal::Slots>)>,
    exit: Option<u8>,
}
