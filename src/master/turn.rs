//! What the kernel is asked once in a turn of the loop, however many workers it is asked about. Nothing in it is older
//! than the events of the turn: those were read before.

use std::cell::OnceCell;
use std::io;

use reuseportd_sys::diag::{Protocol, Socket, states};
use reuseportd_sys::procfs::{self, Process};
use reuseportd_wire::status as wire;

use super::Shell;
use super::look::dump;

/// Begins anew with each turn.
#[derive(Debug, Default)]
pub(super) struct Turn {
    processes: OnceCell<Vec<Process>>,
    listening: OnceCell<Vec<Socket>>,
}

fn once<T>(cell: &OnceCell<Vec<T>>, ask: impl FnOnce() -> io::Result<Vec<T>>) -> io::Result<&[T]> {
    if cell.get().is_none() {
        let _ = cell.set(ask()?);
    }
    Ok(cell.get().map(Vec::as_slice).unwrap_or_default())
}

impl Shell {
    /// A worker's living processes: itself, its process group, and everything that descends from either.
    pub(super) fn processes_of(&self, pid: i32) -> io::Result<Vec<i32>> {
        let processes = once(&self.turn.processes, procfs::processes)?;
        Ok(procfs::descendants_in(processes, pid, pid))
    }

    /// Whether a process group has living members.
    pub(super) fn has_members(&self, group: i32) -> io::Result<bool> {
        let processes = once(&self.turn.processes, procfs::processes)?;
        Ok(processes.iter().any(|process| process.group == group && !process.is_zombie))
    }

    /// Every listening socket of this network namespace; where there are UDP listeners, every UDP socket that is not
    /// connected, too.
    pub(super) fn listening(&self) -> io::Result<&[Socket]> {
        once(&self.turn.listening, || {
            let mut sockets = dump(Protocol::Tcp, None, states::LISTEN)?;
            if self.groups.iter().any(|(_, group)| group.protocol == wire::Protocol::Udp) {
                sockets.extend(dump(Protocol::Udp, None, states::CLOSE)?);
            }
            Ok(sockets)
        })
    }
}
