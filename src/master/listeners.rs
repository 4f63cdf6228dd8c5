//! Listeners by the core's number: which socket each is, who holds it, and the master's handle.

use std::collections::BTreeMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use reuseportd_core::{GroupId, ListenerId, Seat, WorkerId};
use reuseportd_sys::{pidfd, procfs, socket};
use serde::{Deserialize, Serialize};

use super::carried::{Carried, if_held};

/// One socket.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Listener {
    pub(super) group: GroupId,
    /// The worker that made it; `None` for the socket of a seat, which the master made.
    pub(super) worker: Option<WorkerId>,
    /// The seat whose socket it is.
    seat: Option<Seat>,
    /// The kernel's name for the socket, the same in every process that holds it.
    pub(super) cookie: u64,
    pub(super) inode: u64,
    /// A process that holds it, and under which number; `None` if it came over the channel.
    pub(super) owner: Option<(i32, i32)>,
    #[serde(with = "if_held")]
    pub(super) handle: Option<Carried<OwnedFd>>,
    /// `ebpf`: the key it was last put under.
    pub(super) key: Option<u32>,
    /// It listened without SO_REUSEPORT, which a master has set.
    #[serde(default)]
    pub(super) is_late: bool,
}

/// All listeners the core knows, or will be told of.
#[derive(Debug, Default, Serialize, Deserialize)]
pub(super) struct Listeners {
    by_id: BTreeMap<ListenerId, Listener>,
    last: u32,
}

impl Listeners {
    /// Takes in a socket with the master's handle of it.
    pub(super) fn add(
        &mut self,
        group: GroupId,
        worker: WorkerId,
        owner: Option<(i32, i32)>,
        handle: OwnedFd,
    ) -> io::Result<ListenerId> {
        self.insert(group, Some(worker), None, owner, handle)
    }

    /// Takes in the socket of a seat.
    pub(super) fn add_seat(&mut self, group: GroupId, seat: Seat, socket: OwnedFd) -> io::Result<ListenerId> {
        self.insert(group, None, Some(seat), None, socket)
    }

    fn insert(
        &mut self,
        group: GroupId,
        worker: Option<WorkerId>,
        seat: Option<Seat>,
        owner: Option<(i32, i32)>,
        handle: OwnedFd,
    ) -> io::Result<ListenerId> {
        let (cookie, inode) = (socket::cookie(handle.as_fd())?, socket::inode(handle.as_fd())?);
        // A UDP socket is found before it is handed over, as often as not.
        let is_it = |known: &Listener| (known.group, known.worker, known.cookie) == (group, worker, cookie);
        if let Some((id, known)) = self.by_id.iter_mut().find(|(_, known)| is_it(known)) {
            known.handle.get_or_insert_with(|| Carried::new(handle));
            return Ok(*id);
        }
        // What a worker gives again and again would be remembered as long as it lives.
        let is_given = |known: &Listener| {
            known.owner.is_none() && (known.group, known.worker) == (group, worker) && worker.is_some()
        };
        if owner.is_none() && self.by_id.values().any(is_given) {
            socket::close_received(vec![handle]);
            return Err(io::Error::other("it has given one already"));
        }
        self.last += 1;
        let id = ListenerId(self.last);
        self.by_id.insert(
            id,
            Listener {
                group,
                worker,
                seat,
                cookie,
                inode,
                owner,
                handle: Some(Carried::new(handle)),
                key: None,
                is_late: false,
            },
        );
        Ok(id)
    }

    /// The socket of a seat: the latest, should an earlier one still be on its way out.
    pub(super) fn of_seat(&self, group: GroupId, seat: Seat) -> Option<ListenerId> {
        let is_it = |listener: &Listener| listener.group == group && listener.seat == Some(seat);
        self.by_id.iter().rev().find(|(_, listener)| is_it(listener)).map(|(id, _)| *id)
    }

    pub(super) fn of(&self, id: ListenerId) -> Option<&Listener> {
        self.by_id.get(&id)
    }

    /// SO_REUSEPORT was set while it listened.
    pub(super) fn note_late(&mut self, id: ListenerId) {
        if let Some(listener) = self.by_id.get_mut(&id) {
            listener.is_late = true;
        }
    }

    /// Every listener of a worker.
    pub(super) fn of_worker(&self, worker: WorkerId) -> impl Iterator<Item = ListenerId> {
        self.by_id.iter().filter(move |(_, listener)| listener.worker == Some(worker)).map(|(id, _)| *id)
    }

    /// The master's handle.
    pub(super) fn handle(&self, id: ListenerId) -> Option<BorrowedFd<'_>> {
        self.by_id.get(&id)?.handle.as_ref().map(|handle| handle.as_fd())
    }

    /// The names of the master's handle at the keeper.
    pub(super) fn handle_names(&self, id: ListenerId) -> Vec<String> {
        let handle = self.by_id.get(&id).and_then(|listener| listener.handle.as_ref());
        handle.into_iter().flat_map(Carried::names).collect()
    }

    /// Those of which the master holds no handle.
    pub(super) fn without_handle(&self) -> Vec<ListenerId> {
        self.by_id.iter().filter(|(_, listener)| listener.handle.is_none()).map(|(id, _)| *id).collect()
    }

    /// A listener was put under this key, in the place of whichever was there; or the key is empty now.
    pub(super) fn note_key(&mut self, group: GroupId, key: u32, listener: Option<ListenerId>) {
        for (id, record) in self.by_id.iter_mut().filter(|(_, record)| record.group == group) {
            if Some(*id) == listener {
                record.key = Some(key);
            } else {
                record.key = record.key.filter(|of| *of != key);
            }
        }
    }

    /// Any handle of a group: programs are attached to a group through one of its sockets.
    pub(super) fn member(&self, group: GroupId) -> Option<BorrowedFd<'_>> {
        let mut handles = self.by_id.values().filter(|l| l.group == group).filter_map(|l| l.handle.as_ref());
        // A UDP socket is in its group from `bind()` on.
        let is_in_group =
            |fd| socket::is_listening(fd).unwrap_or(false) || socket::is_datagram(fd).unwrap_or(false);
        handles.find(|handle| is_in_group(handle.as_fd())).map(|handle| handle.as_fd())
    }

    /// Whether there is any in this group.
    pub(super) fn is_used(&self, group: GroupId) -> bool {
        self.by_id.values().any(|listener| listener.group == group)
    }

    /// A group's listeners by the kernel's name for each socket.
    pub(super) fn by_cookie(&self, group: GroupId) -> BTreeMap<u64, ListenerId> {
        self.by_id.iter().filter(|(_, l)| l.group == group).map(|(id, l)| (l.cookie, *id)).collect()
    }

    /// Takes a handle of a worker's listener again.
    pub(super) fn anchor(&mut self, id: ListenerId) -> io::Result<()> {
        let listener = self.by_id.get_mut(&id).ok_or(io::ErrorKind::NotFound)?;
        let (pid, number) = listener.owner.ok_or(io::ErrorKind::NotFound)?;
        let process = pidfd::open(pid)?;
        let handle = pidfd::getfd(process.as_fd(), number)?;
        if socket::inode(handle.as_fd())? != listener.inode {
            return Err(io::ErrorKind::NotFound.into());
        }
        listener.handle = Some(Carried::new(handle));
        Ok(())
    }

    /// Drops the handle. Without it a listener is only remembered as long as its worker lives.
    pub(super) fn release(&mut self, id: ListenerId, shutdown: bool, worker_lives: bool) {
        let Some(listener) = self.by_id.get_mut(&id) else { return };
        if let Some(handle) = listener.handle.take()
            && shutdown
            && let Err(error) = socket::shutdown_read(handle.as_fd())
        {
            tracing::warn!(listener = id.0, %error, "cannot shut a retired listener down");
        }
        if !worker_lives {
            self.by_id.remove(&id);
        }
    }

    /// A worker is gone: what the master holds no handle of is gone with it.
    pub(super) fn forget_worker(&mut self, worker: WorkerId) {
        self.by_id.retain(|_, listener| listener.worker != Some(worker) || listener.handle.is_some());
    }

    /// Whether one of a worker's processes still holds the socket. Unknown counts as yes.
    pub(super) fn is_owned(&self, id: ListenerId, pids: impl FnOnce() -> io::Result<Vec<i32>>) -> bool {
        let Some(listener) = self.by_id.get(&id) else { return false };
        if listener.owner.is_some_and(|(pid, number)| procfs::owns_socket(pid, number, listener.inode)) {
            return true;
        }
        let holds = |pid: i32| {
            procfs::socket_inodes(pid).map_or_else(
                |error| error.kind() == std::io::ErrorKind::PermissionDenied,
                |held| held.iter().any(|(_, inode)| *inode == listener.inode),
            )
        };
        pids().map_or(true, |pids| pids.into_iter().any(holds))
    }
}
