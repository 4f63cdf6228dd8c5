//! The environment a worker is started with: names of the variables, and the form of `REUSEPORTD_LISTEN`.

use alloc::borrow::ToOwned;
use alloc::string::String;
use alloc::vec::Vec;
use core::fmt;
use core::net::SocketAddr;

use crate::is_name;
pub use crate::status::Protocol;

/// Name of the application (`app.name`).
pub const APP: &str = "REUSEPORTD_APP";
/// Number of the worker's generation: 1, 2, 3, never reused.
pub const GENERATION: &str = "REUSEPORTD_GENERATION";
/// The worker's place in its generation, counted from 0; a respawned worker keeps it.
pub const SEAT: &str = "REUSEPORTD_SEAT";
/// Seats of the worker's generation.
pub const WORKERS: &str = "REUSEPORTD_WORKERS";
/// The listeners: [`parse_listen`] reads it.
pub const LISTEN: &str = "REUSEPORTD_LISTEN";
/// Descriptor number of the handover channel, see [`crate::channel`].
pub const CHANNEL: &str = "REUSEPORTD_CHANNEL";
/// Path of the socket `READY=1` goes to (`sd_notify`).
pub const NOTIFY_SOCKET: &str = "NOTIFY_SOCKET";
/// Watchdog period in microseconds; feed it at least twice as often.
pub const WATCHDOG_USEC: &str = "WATCHDOG_USEC";
/// Process the watchdog period is meant for.
pub const WATCHDOG_PID: &str = "WATCHDOG_PID";
/// Number of sockets passed from descriptor 3 on (`bind = "master"`).
pub const LISTEN_FDS: &str = "LISTEN_FDS";
/// Process the passed sockets are meant for.
pub const LISTEN_PID: &str = "LISTEN_PID";
/// Names of the passed sockets, separated by colons.
pub const LISTEN_FDNAMES: &str = "LISTEN_FDNAMES";
/// The passed sockets for programs written for Server::Starter.
pub const SERVER_STARTER_PORT: &str = "SERVER_STARTER_PORT";
/// The generation for programs written for Server::Starter.
pub const SERVER_STARTER_GENERATION: &str = "SERVER_STARTER_GENERATION";

/// For a check: processes of the generation's workers, separated by blanks.
pub const PIDS: &str = "REUSEPORTD_PIDS";
/// For a check: `canary` or `baking`.
pub const PHASE: &str = "REUSEPORTD_PHASE";
/// For a check: the generation's share of the new connections, 0 to 1.
pub const SHARE: &str = "REUSEPORTD_SHARE";
/// For a check: the receipt of the upgrade as far as it is known, JSON. Its outcome is null.
pub const RECEIPT: &str = "REUSEPORTD_RECEIPT";

/// Descriptor number of the snapshot a master finds after its re-exec; of no meaning to workers.
pub const RESUME: &str = "REUSEPORTD_RESUME";

/// Every variable the master owns: it removes what it inherited of these before it sets a worker's own.
pub const OWNED: [&str; 19] = [
    APP,
    GENERATION,
    SEAT,
    WORKERS,
    LISTEN,
    CHANNEL,
    NOTIFY_SOCKET,
    WATCHDOG_USEC,
    WATCHDOG_PID,
    LISTEN_FDS,
    LISTEN_PID,
    LISTEN_FDNAMES,
    SERVER_STARTER_PORT,
    SERVER_STARTER_GENERATION,
    PIDS,
    PHASE,
    SHARE,
    RECEIPT,
    RESUME,
];

/// One listener of `REUSEPORTD_LISTEN`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Listen {
    /// The listener's name, as [`is_name`] allows.
    pub name: String,
    /// `tcp` or `udp`.
    pub protocol: Protocol,
    /// The address to bind.
    pub address: SocketAddr,
}

impl fmt::Display for Listen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}:{}", self.name, self.protocol, self.address)
    }
}

/// One unix socket of `REUSEPORTD_LISTEN`: there is nothing to bind, it is among the passed ones ([`LISTEN_FDS`]).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnixListen {
    /// The listener's name, as [`is_name`] allows.
    pub name: String,
    /// Absolute path of the socket's file.
    pub path: String,
}

impl fmt::Display for UnixListen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=unix:{}", self.name, self.path)
    }
}

/// A part of `REUSEPORTD_LISTEN` that is not understood.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "{LISTEN} has the part '{part}': each part must read NAME=tcp:ADDRESS:PORT, NAME=udp:ADDRESS:PORT or \
     NAME=unix:PATH"
)]
pub struct ListenError {
    /// The part, as found.
    pub part: String,
}

/// The value of `REUSEPORTD_LISTEN`: `http=tcp:0.0.0.0:8080;admin=tcp:[::]:9000`. Parts are [`Listen`]s,
/// [`UnixListen`]s, or their text, where there are both.
#[must_use]
pub fn format_listen<T: fmt::Display>(listeners: &[T]) -> String {
    listeners.iter().map(alloc::string::ToString::to_string).collect::<Vec<_>>().join(";")
}

/// What can be bound of the listeners in a value of `REUSEPORTD_LISTEN`; the empty value has none. Unix sockets are
/// passed over: [`parse_unix_listen`] reads those.
///
/// # Errors
/// The first part that is none of the forms there are.
pub fn parse_listen(value: &str) -> Result<Vec<Listen>, ListenError> {
    Ok(parse(value)?.into_iter().filter_map(Part::inet).collect())
}

/// The unix sockets in a value of `REUSEPORTD_LISTEN`.
///
/// # Errors
/// The first part that is none of the forms there are.
pub fn parse_unix_listen(value: &str) -> Result<Vec<UnixListen>, ListenError> {
    Ok(parse(value)?.into_iter().filter_map(Part::unix).collect())
}

enum Part {
    Inet(Listen),
    Unix(UnixListen),
}

impl Part {
    fn inet(self) -> Option<Listen> {
        if let Part::Inet(listen) = self { Some(listen) } else { None }
    }

    fn unix(self) -> Option<UnixListen> {
        if let Part::Unix(listen) = self { Some(listen) } else { None }
    }
}

fn parse(value: &str) -> Result<Vec<Part>, ListenError> {
    let parts = value.split(';').filter(|part| !part.is_empty());
    parts.map(|part| parse_part(part).ok_or_else(|| ListenError { part: part.to_owned() })).collect()
}

fn parse_part(part: &str) -> Option<Part> {
    let (name, rest) = part.split_once('=')?;
    let (protocol, address) = rest.split_once(':')?;
    is_name(name).then_some(())?;
    let name = name.to_owned();
    let protocol = match protocol {
        "tcp" => Protocol::Tcp,
        "udp" => Protocol::Udp,
        "unix" => {
            address.starts_with('/').then_some(())?;
            return Some(Part::Unix(UnixListen { name, path: address.to_owned() }));
        }
        _ => return None,
    };
    Some(Part::Inet(Listen { name, protocol, address: address.parse().ok()? }))
}
