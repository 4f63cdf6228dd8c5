//! The config file: TOML in, a [`Config`] of checked, plain values out, or every reason why not.
//!
//! Three steps, each of which reports all it can before the next one starts: syntax (`toml`, recovering),
//! shape (`schema`, through serde: unknown keys and wrong types), meaning (`resolve`: values, and keys that
//! must agree with each other). A key whose feature is not built yet is refused (`unsupported`), never ignored.

mod app;
mod command;
mod diagnose;
mod environment_file;
mod executable;
mod identity;
mod listen;
mod problems;
mod resolve;
pub(crate) mod saved;
mod schema;
mod socket_path;
mod source;
mod suggest;
#[cfg(test)]
mod tests;
mod unix;
mod unsupported;
mod upgrade;
mod values;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use nix::sys::resource::Resource;
use nix::sys::signal::Signal;
use reuseportd_sys::identity::Identity;
use reuseportd_wire::status::Protocol;
use serde::{Deserialize, Serialize};

pub(crate) use self::diagnose::ConfigErrors;
pub(crate) use self::executable::{find_check, find_executable};
pub(crate) use self::identity::{IdentityError, capability_names};
pub(crate) use self::listen::{Endpoint, clash};
pub(crate) use self::socket_path::{own_directory_name, runtime_directory};
pub(crate) use self::unix::{Entry, Listeners, UnixListen};
pub(crate) use self::values::parse_duration;

/// A whole config file, checked. Relative paths have been made absolute against the current directory.
///
/// It is part of the master's snapshot, which a newer master reads: a field that is added needs `#[serde(default)]`, in
/// the tables too.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Config {
    /// The file this was read from, absolute; an upgrade reads it again.
    #[serde(with = "saved::path")]
    pub(crate) path: PathBuf,
    pub(crate) app: App,
    /// With [`Config::unix`] at least one; names are unique among both, and no two addresses overlap.
    pub(crate) listen: Vec<Listen>,
    /// Those with a path, in the file's order.
    #[serde(default)]
    pub(crate) unix: Vec<UnixListen>,
    pub(crate) steering: Steering,
    pub(crate) readiness: Readiness,
    pub(crate) upgrade: Upgrade,
    pub(crate) restart: Restart,
    /// `[watchdog] timeout`: how long a serving worker may say nothing. At least 100 ms; `None` lets it be silent.
    pub(crate) watchdog: Option<Duration>,
    pub(crate) control: Control,
    pub(crate) log: Log,
}

/// `[app]`: what a worker is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct App {
    pub(crate) name: String,
    /// argv as written, placeholders included; never empty. [`Config::expand_command`] fills them in.
    pub(crate) command: Vec<String>,
    /// Seats per generation, 1 to 1024; `"cpus"` has been resolved.
    pub(crate) workers: u16,
    #[serde(with = "saved::optional_path")]
    pub(crate) working_directory: Option<PathBuf>,
    pub(crate) environment: BTreeMap<String, String>,
    /// Read at each launch of a generation, with [`App::variables`].
    #[serde(with = "saved::optional_path")]
    pub(crate) environment_file: Option<PathBuf>,
    pub(crate) umask: Option<u32>,
    /// Soft and hard limit alike; `u64::MAX` is "unlimited".
    #[serde(with = "saved::limits")]
    pub(crate) limits: Vec<(Resource, u64)>,
    /// User, groups and capabilities, looked up.
    #[serde(with = "saved::identity")]
    pub(crate) identity: Identity,
    /// Variables of the user's login; empty without one.
    pub(crate) login: identity::Login,
    /// Seat i runs on the i-th processor this process may use, and begins again after the last.
    pub(crate) cpu_by_seat: bool,
    pub(crate) no_new_privileges: bool,
    pub(crate) output: Output,
    #[serde(with = "saved::signal")]
    pub(crate) stop_signal: Signal,
}

/// Where a worker's stdout and stderr go.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Output {
    /// Through the master, each line tagged with generation, seat and pid.
    Tag,
    /// Straight to the master's own stdout and stderr.
    Inherit,
}

/// One `[[listen]]`: an address every worker must own a listener on, or a UDP socket.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Listen {
    pub(crate) name: String,
    #[serde(default = "default_protocol")]
    pub(crate) protocol: Protocol,
    /// The port is never 0.
    pub(crate) address: SocketAddr,
    pub(crate) bind: Bind,
    /// `[::]` leaves IPv4 alone.
    pub(crate) v6only: bool,
    /// The limit of the accept queue as the worker asks for it in `listen()`; 1 to `i32::MAX`.
    pub(crate) backlog: u32,
    /// `bind()` sets SO_REUSEPORT for workers that don't; never with [`Bind::Master`] or [`EngineChoice::None`].
    #[serde(default)]
    pub(crate) force_reuseport: bool,
    /// Flows stay with the generation they began with; only with UDP, [`Bind::Worker`], and the ebpf engine.
    #[serde(default)]
    pub(crate) flows: Option<Flows>,
}

/// `affinity = "flow"`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Flows {
    /// A flow that is idle for longer is forgotten; above zero.
    pub(crate) timeout: Duration,
    /// So many are remembered.
    pub(crate) table: u32,
}

/// Of listeners that were written down before there was any other.
pub(crate) fn default_protocol() -> Protocol {
    Protocol::Tcp
}

/// Who makes the sockets of a `[[listen]]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Bind {
    /// Each worker its own.
    Worker,
    /// The master, one for each seat; workers get them by the LISTEN_FDS protocol.
    Master,
}

/// `[steering]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Steering {
    pub(crate) engine: EngineChoice,
    #[serde(default)]
    pub(crate) policy: Policy,
}

/// How a worker is chosen among those of a generation.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum Policy {
    /// By the connection's hash.
    #[default]
    Hash,
    /// The seat of the processor that the connection came in on.
    Cpu,
}

/// Which engine the user asked for; what is in force is decided at start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum EngineChoice {
    Auto,
    Ebpf,
    Cbpf,
    None,
}

/// `[readiness]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Readiness {
    pub(crate) method: ReadinessMethod,
    /// For `Http`; begins with `/` and holds no blank.
    pub(crate) path: String,
    /// For `Http`, at least 1.
    pub(crate) passes: u16,
    /// For `Http`.
    pub(crate) interval: Duration,
}

/// How a worker is known to be ready.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum ReadinessMethod {
    /// It sends `READY=1` (or says so over the handover channel).
    Notify,
    /// It owns its listeners and accepted an empty connection steered to it.
    Listen,
    /// It answers requests for `path`, `passes` times in a row, `interval` apart.
    Http,
}

/// `[upgrade]`.
///
/// A canary or a bake goes together neither with a batch, nor with [`Bind::Master`], nor with [`EngineChoice::None`]; a
/// batch neither with [`EngineChoice::None`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Upgrade {
    /// Seats that are replaced at a time, 1 to 1024; `None` is all, and so is a number of [`App::workers`] or more.
    #[serde(default)]
    pub(crate) batch: Option<u16>,
    /// Before the switch, one after the other; the shares grow. Empty: none.
    #[serde(default)]
    pub(crate) canary: Vec<CanaryStep>,
    /// How long after the switch the old generation stays ready; zero is none.
    #[serde(default)]
    pub(crate) bake: Duration,
    /// argv as written, placeholders included; [`Config::expand_check`] fills them in. Empty without a check; with one
    /// there is a canary or a bake.
    #[serde(default)]
    pub(crate) check: Vec<String>,
    /// From one check to the next, above zero.
    #[serde(default = "upgrade::default_check_interval")]
    pub(crate) check_interval: Duration,
    /// From spawn to ready, above zero.
    pub(crate) ready_timeout: Duration,
    /// How long begun handshakes may take; `None` leaves it to the engine. Never longer than `drain_timeout`.
    pub(crate) settle_timeout: Option<Duration>,
    pub(crate) stop_when: StopWhen,
    pub(crate) idle_timeout: Duration,
    /// From the switch to SIGKILL, above zero.
    pub(crate) drain_timeout: Duration,
    /// Old generations that may drain at the same time, at least 1.
    pub(crate) max_draining: u16,
}

/// One step of `upgrade.canary`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct CanaryStep {
    /// What the new generation gets of 1000 new connections, 1 to 1000.
    pub(crate) share: u16,
    /// For how long, above zero.
    pub(crate) hold: Duration,
}

/// When a retired worker gets its stop signal.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) enum StopWhen {
    /// When its accept queue is empty.
    Drained,
    /// When its open connections are gone too (bounded by `idle_timeout`).
    Idle,
    /// Idle for unmodified workers, drained for handover workers.
    Auto,
}

/// `[restart]`: respawns outside of upgrades.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Restart {
    /// The first delay, above zero; doubles up to `backoff_max`.
    pub(crate) backoff: Duration,
    pub(crate) backoff_max: Duration,
    pub(crate) stable_after: Duration,
    pub(crate) breaker: Breaker,
}

/// Too many exits within a window stop the respawns for a while.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Breaker {
    /// 1 to 1000.
    pub(crate) exits: u16,
    pub(crate) window: Duration,
    pub(crate) cooldown: Duration,
}

/// `[control]`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Control {
    /// Absolute, and short enough for `sockaddr_un`.
    #[serde(with = "saved::path")]
    pub(crate) socket: PathBuf,
    /// File mode of the socket.
    pub(crate) mode: u32,
    /// Uids allowed besides root and the master's own.
    pub(crate) allow_users: Vec<u32>,
}

/// `[log]`; the command line may override both.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Log {
    pub(crate) format: LogFormat,
    #[serde(with = "saved::level")]
    pub(crate) level: tracing::Level,
}

/// How the master writes its own log.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
pub(crate) enum LogFormat {
    /// Text on a terminal or under systemd, JSON elsewhere.
    Auto,
    /// One readable line per fact.
    Text,
    /// One JSON object per line.
    Json,
}

/// Reads, parses and checks the config file.
///
/// # Errors
/// Everything that is wrong with it, each with its place in the file.
pub(crate) fn load(path: &Path) -> Result<Config, ConfigErrors> {
    let text = source::read(path)?;
    let raw = schema::parse(path, &text)?;
    resolve::resolve(path, &text, &raw)
}

/// Where the master of this config file listens for control clients. Looks at nothing but `app.name` and
/// `control.socket`, so that a master can be reached while its config file is being edited or is broken.
///
/// # Errors
/// The file can't be read, or one of these two keys is unusable.
pub(crate) fn control_socket(path: &Path) -> Result<PathBuf, ConfigErrors> {
    let text = source::read(path)?;
    socket_path::from_text(path, &text)
}
