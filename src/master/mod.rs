//! The master: owns descriptors, processes and the clock, and decides nothing. What happens becomes an event for the
//! core; what the core answers is carried out, one command after the other.

mod channel;
mod clock;
mod control;
mod exchange;
mod groups;
mod launch;
mod listeners;
mod log;
mod look;
mod notifications;
mod output;
mod perform;
mod place;
mod process;
mod prove;
mod reload;
mod report;
mod run;
mod runtime;
mod seats;
mod start;
mod status;
mod turn;
mod upstream;
mod words;

use std::collections::{BTreeMap, VecDeque};
use std::os::unix::net::UnixDatagram;
use std::path::PathBuf;
use std::rc::Rc;

use reuseportd_core::{Event, Generation, GroupId, GroupView, ListenerId, Master, Time, WorkerId};
use reuseportd_sys::limits::Nofile;
use reuseportd_sys::signals::SignalPipe;
use reuseportd_wire::status as wire;

use self::control::Clients;
use self::groups::Groups;
use self::launch::Launch;
use self::listeners::Listeners;
use self::process::Process;
use self::runtime::Runtime;
use self::upstream::Upstream;
use crate::config::Config;

pub(crate) use self::groups::choose;
pub(crate) use self::start::run;

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
    processes: BTreeMap<WorkerId, Process>,
    listeners: Listeners,
    groups: Groups,
    /// The last look at each group.
    views: BTreeMap<GroupId, GroupView>,
    /// Listeners whose leftovers a worker was asked to take, by the name it knows.
    taking: BTreeMap<(WorkerId, String), ListenerId>,
    /// Connections made to prove workers, as long as they have not been accepted.
    proofs: BTreeMap<WorkerId, Vec<prove::Proof>>,
    /// Requests to prove workers, until they are answered.
    exchanges: BTreeMap<WorkerId, exchange::Exchange>,
    receipts: VecDeque<(Option<u32>, wire::Receipt)>,
    /// Why the upgrade under way fails, in words: said while the worker's last words are still known.
    failing: Option<String>,
    /// Why the last start of a process failed, in words.
    spawn_error: Option<String>,
    /// Why the state is what it is.
    state_reason: Option<String>,
    clients: Clients,
    notify: UnixDatagram,
    /// Notifications from processes that are no worker's.
    notify_rejected: u64,
    upstream: Upstream,
    signals: SignalPipe,
    /// The limit of open files before the master raised its own: what workers get unless told otherwise.
    nofile: Option<Nofile>,
    log_level: log::Level,
    /// From the command line.
    log_level_override: Option<tracing::Level>,
    runtime: Runtime,
    exit: Option<u8>,
}
