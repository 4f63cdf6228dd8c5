//! The keeper's own process.

use std::collections::BTreeMap;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::ExitCode;
use std::time::Duration;

use nix::sys::signal::SigSet;
use reuseportd_sys::capability;
use reuseportd_sys::image::take_carried;
use reuseportd_sys::socket::{self, FDS_MAX, Received};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::ioctl_fionread;
use rustix::net::SocketFlags;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::pipe::fcntl_getpipe_size;
use rustix::process::{Resource, getrlimit};

use super::words::{DATAGRAM_BYTES_MAX, is_name, join, split};
use super::{BACKLOG, CHANNEL_NUMBER, LISTENER_NUMBER, LOG_PREFIX, PIDFD_PREFIX, READY, VERSION};

/// How long a master may leave an answer unread while its buffer is full.
const PATIENCE: Duration = Duration::from_secs(1);
/// How long nobody is let in after that has failed (memory or descriptors have run out), and how often it is looked
/// whether workers have room to print.
const LOOK_AGAIN: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };
/// Connections that have not become the channel; the oldest leaves first.
const KNOCKING_MAX: usize = 8;
/// Descriptors that are left for everything but holding: those of one message, connections, the standard ones.
const SPARE: usize = FDS_MAX + KNOCKING_MAX + 16;

/// Is the keeper, until it is told to leave or there is nothing left to keep.
pub(crate) fn run() -> ExitCode {
    match Keeping::new().and_then(|mut keeping| keeping.run()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("keeper: {error} (a master starts it by itself; it can't be started by hand)");
            ExitCode::from(2)
        }
    }
}

/// Everything the keeper has.
#[derive(Debug)]
struct Keeping {
    /// To the master, as long as there is one.
    channel: Option<OwnedFd>,
    listener: OwnedFd,
    /// The last accept has failed.
    is_deaf: bool,
    knocking: Vec<Knocking>,
    held: BTreeMap<String, Held>,
    /// Names it has room for.
    room: usize,
    state: Option<OwnedFd>,
    is_dismissed: bool,
}

/// Somebody who may become the next master.
#[derive(Debug)]
struct Knocking {
    connection: OwnedFd,
    /// It was told that the former one is still there.
    is_waiting: bool,
}

#[derive(Debug)]
struct Held {
    fd: OwnedFd,
    /// Of a pidfd: the process has ended.
    is_ended: bool,
}

/// What the keeper wakes up for.
#[derive(Debug, Clone, Copy)]
enum Wake {
    Channel,
    Knocking(usize),
    Listener,
    /// The n-th of what is held.
    Ended(usize),
}

impl Keeping {
    fn new() -> io::Result<Keeping> {
        // Holding and handing over takes none. Where a filter forbids to give them up it is done with them.
        let _ = capability::keep_none();
        let channel = take_carried(CHANNEL_NUMBER)?;
        let listener = take_carried(LISTENER_NUMBER)?;
        // Not done by the master: whoever calls listen() is the process that those who connect see.
        socket::listen(listener.as_fd(), BACKLOG)?;
        set_socket_timeout(&channel, Timeout::Send, Some(PATIENCE))?;
        // What is meant for the master must not end the keeper. Blocked signals do nothing, without a handler.
        SigSet::all().thread_set_mask()?;
        // Executed as /proc/self/exe it would be called `exe`.
        rustix::thread::set_name(c"reuseportd-keep")?;
        socket::send_with_fds(channel.as_fd(), READY.as_bytes(), &[])?;
        let limit = getrlimit(Resource::Nofile).current.and_then(|limit| usize::try_from(limit).ok());
        Ok(Keeping {
            channel: Some(channel),
            listener,
            is_deaf: false,
            knocking: Vec::new(),
            held: BTreeMap::new(),
            room: limit.unwrap_or(usize::MAX).saturating_sub(SPARE),
            state: None,
            is_dismissed: false,
        })
    }

    fn run(&mut self) -> io::Result<()> {
        while !self.is_dismissed && (self.channel.is_some() || self.living().next().is_some()) {
            self.make_room();
            match self.wait()? {
                Some(Wake::Channel) => self.hear(),
                Some(Wake::Knocking(nth)) => self.hear_knocking(nth),
                Some(Wake::Listener) => self.accept(),
                Some(Wake::Ended(nth)) => {
                    self.held.values_mut().skip(nth).take(1).for_each(|held| held.is_ended = true)
                }
                None => {}
            }
        }
        Ok(())
    }

    /// Without a master nobody reads what workers print, and a worker that can't print stops: of a pipe that is nearly
    /// full the older part goes.
    fn make_room(&self) {
        for log in self.logs() {
            let size = fcntl_getpipe_size(log).unwrap_or(usize::MAX);
            let waiting = ioctl_fionread(log).map_or(0, |bytes| usize::try_from(bytes).unwrap_or(0));
            let mut surplus = if waiting > size / 4 * 3 { waiting - size / 2 } else { 0 };
            let mut buffer = [0; 4096];
            while surplus > 0 {
                match rustix::io::read(log, &mut buffer) {
                    Ok(bytes @ 1..) => surplus = surplus.saturating_sub(bytes),
                    Ok(_) | Err(_) => break,
                }
            }
        }
    }

    /// The pipes that workers print into, as long as nobody else reads them.
    fn logs(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        let held =
            self.held.iter().filter(|(name, _)| self.channel.is_none() && name.starts_with(LOG_PREFIX));
        held.map(|(_, held)| held.fd.as_fd())
    }

    /// Processes that have not been seen to end: place among what is held, and pidfd.
    fn living(&self) -> impl Iterator<Item = (usize, BorrowedFd<'_>)> {
        let held = self.held.iter().enumerate();
        held.filter(|(_, (name, held))| name.starts_with(PIDFD_PREFIX) && !held.is_ended)
            .map(|(nth, (_, held))| (nth, held.fd.as_fd()))
    }

    /// The first thing that has happened. The channel comes before those who knock, so that all a dead master has said
    /// is heard before the next one is told; and they come before the end of the last process.
    fn wait(&mut self) -> io::Result<Option<Wake>> {
        let is_deaf = std::mem::take(&mut self.is_deaf);
        let mut watched = Vec::with_capacity(2 + self.knocking.len());
        watched.extend(self.channel.iter().map(|channel| (Wake::Channel, channel.as_fd())));
        let knocking = self.knocking.iter().enumerate();
        watched.extend(knocking.map(|(nth, one)| (Wake::Knocking(nth), one.connection.as_fd())));
        watched.extend((!is_deaf).then_some((Wake::Listener, self.listener.as_fd())));
        if self.channel.is_none() {
            watched.extend(self.living().map(|(nth, pidfd)| (Wake::Ended(nth), pidfd)));
        }
        let mut fds: Vec<PollFd<'_>> =
            watched.iter().map(|(_, fd)| PollFd::from_borrowed_fd(*fd, PollFlags::IN)).collect();
        let must_look = is_deaf || self.logs().next().is_some();
        match poll(&mut fds, must_look.then_some(&LOOK_AGAIN)) {
            // A stop and a continuation.
            Err(rustix::io::Errno::INTR) => return Ok(None),
            result => result?,
        };
        let first = fds.iter().position(|fd| !fd.revents().is_empty());
        Ok(first.and_then(|first| watched.get(first)).map(|(wake, _)| *wake))
    }

    /// One message of the master, or its end.
    fn hear(&mut self) {
        let Some(channel) = &self.channel else { return };
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        match socket::recv_with_fds(channel.as_fd(), &mut buffer) {
            Ok(Received { bytes: 0, .. }) => self.master_is_gone(),
            Ok(Received { bytes, fds, .. }) => {
                let answer = self.obey(buffer.get(..bytes).unwrap_or_default(), fds);
                if let (Some(answer), Some(channel)) = (answer, &self.channel) {
                    // If that is not possible, its end is seen next, or it notices by itself.
                    let _ = socket::send_with_fds(channel.as_fd(), answer.as_bytes(), &[]);
                }
            }
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                let _ = socket::send_with_fds(channel.as_fd(), format!("failed ? {error}").as_bytes(), &[]);
            }
            // It left with answers unread: what it said before still waits behind this.
            Err(error) if [ErrorKind::ConnectionReset, ErrorKind::Interrupted].contains(&error.kind()) => {}
            Err(_) => self.master_is_gone(),
        }
    }

    /// Does what the master says; the answer, if there is one.
    fn obey(&mut self, datagram: &[u8], fds: Vec<OwnedFd>) -> Option<String> {
        let Some((verb, words)) = split(datagram) else { return Some("unknown ?".to_owned()) };
        match (verb, words.as_slice()) {
            ("hold", names) => self.hold(names, fds).err().map(|what| format!("failed hold {what}")),
            ("drop", names) => {
                names.iter().for_each(|name| drop(self.held.remove(*name)));
                None
            }
            ("release", [name, ..]) => {
                self.held.remove(*name);
                Some(join("released", &[name]))
            }
            ("state", _) => {
                let state = fds.into_iter().next();
                let is_missing = state.is_none();
                self.state = state.or(self.state.take());
                is_missing.then(|| "failed state without a descriptor".to_owned())
            }
            ("leave", _) => {
                self.is_dismissed = true;
                None
            }
            (verb, _) => Some(unknown(verb)),
        }
    }

    fn hold(&mut self, names: &[&str], fds: Vec<OwnedFd>) -> Result<(), String> {
        if names.len() != fds.len() || !names.iter().all(|name| is_name(name)) {
            return Err(format!("{} names for {} descriptors", names.len(), fds.len()));
        }
        if self.held.len() + names.len() > self.room {
            return Err(format!("more than {} descriptors: raise the limit of open files", self.room));
        }
        let held = fds.into_iter().map(|fd| Held { fd, is_ended: false });
        self.held.extend(names.iter().map(|name| (*name).to_owned()).zip(held));
        Ok(())
    }

    fn accept(&mut self) {
        let accepted = rustix::net::accept_with(&self.listener, SocketFlags::CLOEXEC);
        self.is_deaf = accepted.is_err();
        let Ok(connection) = accepted else { return };
        let allowed = [0, rustix::process::geteuid().as_raw()];
        let peer = socket::peer_credentials(connection.as_fd());
        if !peer.is_ok_and(|peer| allowed.contains(&peer.uid))
            || set_socket_timeout(&connection, Timeout::Send, Some(PATIENCE)).is_err()
        {
            return;
        }
        if self.knocking.len() == KNOCKING_MAX {
            self.knocking.remove(0);
        }
        self.knocking.push(Knocking { connection, is_waiting: false });
    }

    /// Somebody who knocks says something: nothing but `fetch` is of interest, once.
    fn hear_knocking(&mut self, nth: usize) {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        let Some(knocking) = self.knocking.get_mut(nth) else { return };
        let connection = knocking.connection.as_fd();
        let received = socket::recv_with_fds(connection, &mut buffer);
        let bytes = received.map_or(0, |received| received.bytes);
        let words = buffer.get(..bytes).filter(|datagram| !datagram.is_empty()).and_then(split);
        match words {
            Some(("fetch", _)) if !knocking.is_waiting && self.channel.is_none() => self.serve(nth),
            Some(("fetch", _)) if !knocking.is_waiting => {
                knocking.is_waiting = socket::send_with_fds(connection, b"busy", &[]).is_ok();
                if !knocking.is_waiting {
                    self.knocking.remove(nth);
                }
            }
            Some((verb, _)) if !knocking.is_waiting => {
                let _ = socket::send_with_fds(connection, unknown(verb).as_bytes(), &[]);
            }
            _ => drop(self.knocking.remove(nth)),
        }
    }

    fn master_is_gone(&mut self) {
        self.channel = None;
        while self.channel.is_none() {
            let Some(nth) = self.knocking.iter().position(|one| one.is_waiting) else { return };
            self.serve(nth);
        }
    }

    /// Tells the next master everything; it is the master then.
    fn serve(&mut self, nth: usize) {
        let connection = self.knocking.remove(nth).connection;
        self.channel = self.tell(connection.as_fd()).is_ok().then_some(connection);
    }

    fn tell(&self, to: BorrowedFd<'_>) -> io::Result<()> {
        let state: Vec<_> = self.state.iter().map(AsFd::as_fd).collect();
        socket::send_with_fds(to, join("state", &[VERSION]).as_bytes(), &state)?;
        let held: Vec<_> = self.held.iter().map(|(name, held)| (name.as_str(), held.fd.as_fd())).collect();
        for some in held.chunks(FDS_MAX) {
            let (names, fds): (Vec<_>, Vec<_>) = some.iter().copied().unzip();
            socket::send_with_fds(to, join("held", &names).as_bytes(), &fds)?;
        }
        socket::send_with_fds(to, b"end", &[])
    }
}

fn unknown(verb: &str) -> String {
    join("unknown", &[&verb.chars().take(32).collect::<String>()])
}
