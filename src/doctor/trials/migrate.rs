//! What `net.ipv4.tcp_migrate_req` does, on scratch sockets.

use std::os::fd::AsFd;

use super::Trouble;
use super::scratch::{Waiter, connect, group, readable};

/// What became of a connection.
pub(super) enum Fate {
    /// It moved to the other listener of the group.
    Moved {
        /// Who waited there.
        is_woken: bool,
    },
    Reset,
}

/// Closes the listener whose queue holds a connection, with another one in the group and no program.
pub(super) fn orphan() -> Result<Fate, Trouble> {
    let mut listeners = group(2)?;
    let client = connect(&listeners)?;
    let Some(at) = readable(&listeners)? else {
        return Err(Trouble::Failed("a connection came to no listener".to_owned()));
    };
    let closing = listeners.remove(at);
    let waiter = Waiter::at(&[listeners[0].as_fd(), client.as_fd()])?;
    drop(closing);
    let woken = waiter.woken()?;
    match (woken, listeners[0].accept()) {
        (_, Ok(_)) => Ok(Fate::Moved { is_woken: woken == Some(0) }),
        (Some(_), Err(_)) => Ok(Fate::Reset),
        (None, Err(error)) => {
            Err(Trouble::Failed(format!("a connection was neither moved nor reset: {error}")))
        }
    }
}
