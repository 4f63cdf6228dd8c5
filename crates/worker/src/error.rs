use std::io;
use std::net::SocketAddr;

use reuseportd_wire::channel::ChannelError;
use reuseportd_wire::env::{self, ListenError};

/// Why a worker can't become ready or can't go on.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A variable the master always sets beside the channel is missing.
    #[error(
        "environment variable {name} is missing beside {}: start the worker with the environment its master gave",
        env::CHANNEL
    )]
    Missing {
        /// Its name.
        name: &'static str,
    },
    /// A variable that is no number where one belongs, or not UTF-8.
    #[error("environment variable {name} has the value '{value}', which has not the right form")]
    Variable {
        /// Its name.
        name: &'static str,
        /// Its value.
        value: String,
    },
    /// `REUSEPORTD_LISTEN` is not understood.
    #[error(transparent)]
    Listen(#[from] ListenError),
    /// There is a UDP socket, whose datagrams nobody would read.
    #[error("listener {name} is UDP, and accept_each serves TCP only: call serve_each")]
    Datagrams {
        /// The listener's name.
        name: String,
    },
    /// A socket could not be made, set up, bound or listened on.
    #[error("{action} listener {name} on {address}: {source}{}", remedy(.source))]
    Socket {
        /// What was done.
        action: &'static str,
        /// The listener's name.
        name: String,
        /// Its address.
        address: SocketAddr,
        /// Why it failed.
        source: io::Error,
    },
    /// A system call on the channel, or while accepting or receiving, failed.
    #[error("{action}: {source}")]
    Io {
        /// What was done to what.
        action: &'static str,
        /// Why it failed.
        source: io::Error,
    },
    /// A name or a number of sockets the channel can't carry.
    #[error("tell the master: {0}")]
    Message(#[from] ChannelError),
    /// The master ended before it said `serve`, so no connection can ever arrive here.
    #[error("the master is gone before it said 'serve': nothing arrives here, exit")]
    MasterGone,
}

impl Error {
    /// For `map_err`: an I/O error while doing `action`.
    pub(crate) fn io<E: Into<io::Error>>(action: &'static str) -> impl FnOnce(E) -> Self {
        move |source| Self::Io { action, source: source.into() }
    }
}

fn remedy(source: &io::Error) -> &'static str {
    match source.kind() {
        io::ErrorKind::AddrInUse => {
            " (a socket without SO_REUSEPORT, or of another user, holds the address: `ss -tulnp` shows it)"
        }
        io::ErrorKind::PermissionDenied => " (a port below 1024 needs CAP_NET_BIND_SERVICE)",
        _ => "",
    }
}
