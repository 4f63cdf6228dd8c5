//! Taking over from a server that no master has started: what keeps it from being done, how its listeners come under
//! the steering program while it serves, and how they are left as they were found.

use std::collections::BTreeSet;
use std::net::SocketAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;
use std::time::{Duration, Instant};

use nix::libc;
use reuseportd_core::{Event, Generation, GroupId, ListenerId, Plan, Seat, Signal, WorkerId};
use reuseportd_sys::bpf::EbpfGroup;
use reuseportd_sys::diag::{Protocol, states};
use reuseportd_sys::{late, pidfd, procfs, socket};
use rustix::event::{Timespec, poll};

use super::carried::{Carried, Pidfd};
use super::foreign::{Claim, Server};
use super::groups::Groups;
use super::launch::{Launch, UNKNOWN_CONFIG};
use super::look::dump;
use super::process::{LastLines, Process};
use super::start::NoStart;
use super::{Shell, clock, reload};

/// The server as a worker.
const SERVER: WorkerId = WorkerId(1);
/// Its generation: none of ours.
const FOREIGN: Generation = Generation(0);
/// The pause before begun handshakes are looked at again.
const LOOK_PAUSE: Timespec = Timespec { tv_sec: 0, tv_nsec: 5_000_000 };

/// A listener of the server, under the program.
struct Enlisted {
    group: GroupId,
    claim: Claim,
    handle: OwnedFd,
    /// SO_REUSEPORT was set here.
    is_late: bool,
}

impl Shell {
    /// Makes the server with this process the generation before the first.
    pub(super) fn take_over(&mut self, pid: i32) -> Result<(), NoStart> {
        if self.has_orphans()? {
            let said =
                "workers of a former master of this app still serve: `reuseportd --config` takes them over";
            return Err(said.to_owned().into());
        }
        let launch =
            Launch::prepare(Rc::clone(&self.config), &self.runtime, &mut self.groups, &mut self.shared);
        let mut launch = launch.map_err(|error| error.to_string())?;
        launch.config_number = UNKNOWN_CONFIG;
        let said = |server: &Server, error: String| format!("cannot take over from {server}: {error}");
        let server = Server::find(pid)?;
        let refused = |error| NoStart::from(said(&server, error));
        let claims = server.claims(&launch, &self.groups.choice).map_err(refused)?;
        let process = server.process().map_err(refused)?;
        let mut enlisted = Vec::new();
        for claim in claims {
            match enlist(&mut self.groups, &launch, claim) {
                Ok(one) => enlisted.push(one),
                Err(error) => {
                    enlisted.iter().for_each(|one| leave(one.handle.as_fd(), one.is_late));
                    return Err(refused(error));
                }
            }
        }
        let plan = reload::plan(&launch, self.groups.choice.engine);
        settle_begun(&enlisted, plan.settle_timeout);
        self.processes.insert(SERVER, process);
        let mut listeners = Vec::new();
        for Enlisted { group, claim, handle, is_late } in enlisted {
            let owner = Some((claim.pid, claim.number));
            let listener = self.listeners.add(group, SERVER, owner, handle);
            let listener = listener.map_err(|error| said(&server, error.to_string()))?;
            if is_late {
                self.listeners.note_late(listener);
            }
            listeners.push((group, listener));
        }
        tracing::info!(
            event = "takeover",
            pid,
            program = server.name(),
            listeners = listeners.len(),
            "taking over from {server}: it serves as generation 0 until generation 1 does"
        );
        let plan = Plan { workers: 1, configured: 1, ..plan };
        self.prepared.push_front(launch);
        self.inbox.push_back(Event::Foreign { plan, server: SERVER, listeners });
        Ok(())
    }

    /// Leaves the listeners of a server as they were found; what becomes of the handles the core says.
    pub(super) fn let_go(&mut self, listeners: &[ListenerId]) {
        for id in listeners {
            // As long as another generation served, there may have been no need of one.
            if self.listeners.handle(*id).is_none() && self.listeners.anchor(*id).is_err() {
                continue;
            }
            let (Some(listener), Some(handle)) = (self.listeners.of(*id), self.listeners.handle(*id)) else {
                continue;
            };
            leave(handle, listener.is_late);
            if let Some(key) = listener.key {
                self.groups.evict(listener.group, key);
            }
        }
        // Unless it has ended itself.
        if let Some(pid) = self.processes.get(&SERVER).map(|process| process.pid) {
            tracing::warn!(event = "let_go", pid, "process {pid} serves on as before the takeover");
        }
    }
}

/// Handshakes that had begun when the helpers were there are finished, so that the program is not needed for them
/// any more; those of clients that never answer are not waited for longer than in an upgrade.
fn settle_begun(enlisted: &[Enlisted], timeout: Duration) {
    let late = enlisted.iter().filter(|one| one.is_late);
    let ports: BTreeSet<u16> = late.map(|one| one.claim.local.port()).collect();
    let half_open = || -> BTreeSet<u64> {
        let of = |port: &u16| dump(Protocol::Tcp, Some(*port), states::SYN_RECV).unwrap_or_default();
        ports.iter().flat_map(of).map(|socket| socket.cookie).collect()
    };
    let deadline = Instant::now() + timeout;
    let begun = half_open();
    while !begun.is_disjoint(&half_open()) && Instant::now() < deadline {
        let _ = poll(&mut [], Some(&LOOK_PAUSE));
    }
}

/// Puts a listener under the program.
fn enlist(groups: &mut Groups, launch: &Launch, claim: Claim) -> Result<Enlisted, String> {
    let (group, address) = launch
        .listeners()
        .find(|(group, _)| *group == claim.group)
        .map(|(group, listen)| (group, listen.address))
        .ok_or("its listener has no group")?;
    let handle = claim.handle()?;
    let failed = |error: &dyn std::fmt::Display| format!("its listener on {address}: {error}");
    let is_late = !socket::is_reuseport(handle.as_fd()).map_err(|error| failed(&error))?;
    groups.note_bound(group, claim.local);
    if claim.local != address {
        let bound = claim.local;
        tracing::warn!(
            event = "takeover_elsewhere",
            %bound,
            %address,
            "the server serves {address} from {bound}: the new workers have to bind that too; better set [[listen]] \
             address = \"{bound}\""
        );
    }
    if !is_late {
        let enlisted = groups.enlist(group, handle.as_fd(), false);
        enlisted.map_err(|error| match error.errno() {
            Some(libc::EBUSY) => failed(
                &"a steering program has it already, another's or that of a master that was killed while it took over: \
                  end that program, or restart the server",
            ),
            _ => failed(&error),
        })?;
    } else if let Err(error) = enlist_late(groups, group, handle.as_fd(), claim.backlog) {
        leave(handle.as_fd(), is_late);
        return Err(failed(&error));
    }
    Ok(Enlisted { group, claim, handle, is_late })
}

/// One that has not SO_REUSEPORT gets it, and with it a group: by a helper beside it, which is gone again when the
/// program is in force. What the helper was given in between the program moves to the listener.
fn enlist_late(
    groups: &Groups,
    group: GroupId,
    listener: BorrowedFd<'_>,
    backlog: i32,
) -> Result<(), String> {
    late::set_reuseport(listener, true).map_err(|error| format!("cannot set SO_REUSEPORT: {error}"))?;
    let helper = late::bind_beside(listener).map_err(|error| match error.raw_os_error() {
        Some(libc::EADDRINUSE) => {
            "nothing can be bound beside it, since it has connections and was not set SO_REUSEADDR: give the master \
             CAP_NET_ADMIN"
                .to_owned()
        }
        Some(libc::EPERM | libc::EACCES) => {
            format!("cannot bind beside it ({error}): give the master CAP_CHOWN and CAP_NET_BIND_SERVICE, or run it as root")
        }
        _ => format!("cannot bind beside it: {error}"),
    })?;
    socket::listen(helper.as_fd(), backlog).map_err(|error| format!("cannot listen beside it: {error}"))?;
    let enlisted = groups.enlist(group, listener, true).map_err(|error| error.to_string());
    // Else one that was just being given to the helper would be sent again by its client, a second later.
    if let Err(error) = late::packets_under_way_done() {
        tracing::debug!(%error, "cannot wait for packets under way");
    }
    drop(helper);
    groups.end_alone(group);
    enlisted
}

/// The contrary, as far as it was done.
fn leave(listener: BorrowedFd<'_>, is_late: bool) {
    // Without a program there is none to be taken away.
    let detached = EbpfGroup::detach(listener);
    if let Err(error) =
        detached.or_else(|error| if error.errno() == Some(libc::ENOENT) { Ok(()) } else { Err(error) })
    {
        tracing::warn!(%error, "cannot take the steering program from a foreign listener");
    }
    if !is_late {
        return;
    }
    if let Err(error) = late::set_reuseport(listener, false) {
        tracing::warn!(%error, "cannot unset SO_REUSEPORT of a foreign listener");
    }
    if let Err(error) = late::bind_beside_no_more(listener) {
        tracing::debug!(%error, "programs of its user can still be bound beside a foreign listener");
    }
}

/// The signal to the server and all that descends from it, one by one: their process group may be another's.
pub(super) fn signal_family(process: &Process, signal: Signal) {
    let number = if signal == Signal::KillGroup { libc::SIGKILL } else { libc::SIGTERM };
    // First: what is below it may end by itself then.
    let mut result = pidfd::send_signal(process.pidfd.as_fd(), number);
    let all = procfs::processes().unwrap_or_default();
    for pid in procfs::descendants_in(&all, process.pid, process.pid) {
        let started = all.iter().find(|one| one.pid == pid).map(|one| one.start_time);
        let is_same = || procfs::process(pid).ok().map(|one| one.start_time) == started;
        if let Ok(descendant) = pidfd::open(pid)
            && pid != process.pid
            && is_same()
        {
            result = result.and(pidfd::send_signal(descendant.as_fd(), number));
        }
    }
    if let Err(error) = result {
        tracing::warn!(pid = process.pid, ?signal, %error, "cannot signal a foreign server");
    }
}

impl Server {
    /// Its first process, as that of a worker.
    fn process(&self) -> Result<Process, String> {
        let gone = || "it has just ended".to_owned();
        let pidfd = pidfd::open(self.pid()).map_err(|_| gone())?;
        let present = procfs::process(self.pid()).map_err(|_| gone())?;
        if present.start_time != self.start_time() {
            return Err(gone());
        }
        Ok(Process {
            generation: FOREIGN,
            seat: Seat(0),
            pid: self.pid(),
            start_time: present.start_time,
            pidfd: Carried::new(Pidfd::from(pidfd)),
            is_child: false,
            shares_group: present.group != present.pid,
            is_ended: false,
            started: clock::now(),
            channel: None,
            output: None,
            status: None,
            detail: None,
            last_lines: LastLines::default(),
        })
    }
}

/// An address for people.
pub(super) fn addresses(places: impl IntoIterator<Item = SocketAddr>) -> String {
    let places: BTreeSet<SocketAddr> = places.into_iter().collect();
    places.iter().map(SocketAddr::to_string).collect::<Vec<_>>().join(", ")
}
