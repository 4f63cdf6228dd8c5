//! The master's side of its keeper. Nothing here waits for longer than a fraction of a second but for the end of a
//! process that was killed.

use std::collections::{BTreeMap, BTreeSet};
use std::ffi::CString;
use std::fs::{self, OpenOptions};
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::time::{Duration, Instant};

use reuseportd_sys::child::{self, SpawnSpec};
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::identity::Identity;
use reuseportd_sys::pidfd;
use reuseportd_sys::socket::{self, FDS_MAX};
use rustix::event::PollFlags;
use rustix::fs::Mode;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use serde::{Deserialize, Serialize};

use super::words::{DATAGRAM_BYTES_MAX, check_name, join, split};
use super::{CHANNEL_NUMBER, LISTENER_NUMBER, READY, wait_for};

/// How long a keeper may take to make room for a message, or to answer one: it has nothing else to do.
const PATIENCE: Duration = Duration::from_millis(200);
/// How long it may take to begin.
const START_PATIENCE: Duration = Duration::from_secs(2);
/// How long the end of a process is waited for that was sent SIGKILL.
const END_PATIENCE: Duration = Duration::from_secs(2);

/// A running keeper. If it is dropped the keeper goes on, as when the master is killed.
#[derive(Debug)]
pub(crate) struct Keeper {
    channel: OwnedFd,
    pidfd: OwnedFd,
    pid: i32,
    /// Names of what it holds, as far as it was told.
    held: BTreeSet<String>,
    /// Those among them that are dropped with the next snapshot.
    gone: Vec<String>,
}

/// What is to be known of a keeper over the master's own re-exec. Its two descriptors go beside it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct SavedKeeper {
    pub(super) pid: i32,
    pub(super) held: BTreeSet<String>,
}

impl Keeper {
    /// Starts one and waits until it has begun (a few milliseconds, two seconds at the most), from the very program that runs now, also when its file was replaced or removed. The next master
    /// will find it at `socket`; what is there is unlinked. The app's name is for those who read `ps`.
    ///
    /// # Errors
    /// When the socket can't be made or the process not started; then nothing is left running.
    pub(crate) fn start(socket: &Path, app: &str) -> io::Result<Keeper> {
        Keeper::start_from(Path::new("/proc/self/exe"), socket, app)
    }

    /// The same from any program that has a keeper in it.
    pub(crate) fn start_from(program: &Path, socket: &Path, app: &str) -> io::Result<Keeper> {
        let failed = |error: io::Error| {
            let text = format!("cannot start a keeper at {}: {error}", socket.display());
            io::Error::new(error.kind(), text)
        };
        let listener = bind(socket).map_err(failed)?;
        let (channel, theirs) = socket::seqpacket_pair().map_err(failed)?;
        let null = OpenOptions::new().read(true).write(true).open("/dev/null").map_err(failed)?;
        let executable = PinnedExecutable::open(program).map_err(failed)?;
        let argv = ["reuseportd", "keeper", "--app", app].map(CString::new);
        let argv = argv.into_iter().collect::<Result<Vec<_>, _>>()?;
        let spec = SpawnSpec {
            executable: &executable,
            argv: &argv,
            envp: &[],
            pid_variables: &[],
            fds: &[
                (null.as_fd(), 0),
                (null.as_fd(), 1),
                (null.as_fd(), 2),
                (theirs.as_fd(), CHANNEL_NUMBER),
                (listener.as_fd(), LISTENER_NUMBER),
            ],
            umask: None,
            identity: &Identity::default(),
            cpus: None,
            directory: Some(c"/"),
            limits: &[],
            cgroup: None,
            no_new_privileges: true,
        };
        let spawned = child::spawn(&spec).map_err(|error| failed(io::Error::other(error)))?;
        // So that its end is seen.
        drop(theirs);
        let saved = SavedKeeper { pid: spawned.pid, held: BTreeSet::new() };
        let keeper = Keeper::join([channel, spawned.pidfd], saved);
        match keeper.hear(Instant::now() + START_PATIENCE) {
            Ok(word) if word == READY => Ok(keeper),
            result => {
                keeper.end();
                Err(failed(result.map_or_else(|error| error, |word| unexpected(&word))))
            }
        }
    }

    /// Its process.
    pub(crate) fn pid(&self) -> i32 {
        self.pid
    }

    /// To be polled for reading: it is about to say something, which it does unasked only when something is wrong, or
    /// it has ended. Ask [`Keeper::is_alive`] then.
    pub(crate) fn fd(&self) -> BorrowedFd<'_> {
        self.channel.as_fd()
    }

    /// Whether it is there and does what it is told; if not, [`Keeper::end`] it and start another.
    pub(crate) fn is_alive(&mut self) -> bool {
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        loop {
            match socket::recv_with_fds(self.channel.as_fd(), &mut buffer) {
                Ok(received) if received.bytes > 0 => {
                    let said = buffer.get(..received.bytes).unwrap_or_default();
                    tracing::warn!(said = %String::from_utf8_lossy(said), "the keeper cannot do as it was told");
                    // A word it does not know is no reason to lose what it holds.
                    if !matches!(split(said), Some(("unknown", _))) {
                        return false;
                    }
                }
                Err(error) if error.kind() == ErrorKind::WouldBlock => return true,
                Ok(_) | Err(_) => return false,
            }
        }
    }

    /// Names of what it holds, as far as it was told.
    pub(crate) fn held(&self) -> &BTreeSet<String> {
        &self.held
    }

    /// Makes what it holds exactly what has these names. `new` are the descriptors of those it does not hold yet, which
    /// it gets now; what has none of the names is dropped by the next [`Keeper::save`], for until then the snapshot
    /// there may need it. A name stands for one thing for good: of what is held already nothing is sent.
    ///
    /// # Errors
    /// `InvalidInput` for what is no name, or has no descriptor, and nothing has changed; `TimedOut` when it does not
    /// take the messages for 200 ms, or whatever the kernel says: what it holds is unknown then, and it is to be ended.
    pub(crate) fn update(
        &mut self,
        names: &BTreeSet<String>,
        new: &[(String, BorrowedFd<'_>)],
    ) -> io::Result<()> {
        let new = new.iter().map(|(name, fd)| (name.as_str(), *fd));
        let new: BTreeMap<_, _> = new.filter(|(name, _)| !self.held.contains(*name)).collect();
        new.keys().try_for_each(|name| check_name(name))?;
        if let Some(name) = names.difference(&self.held).find(|name| !new.contains_key(name.as_str())) {
            let text = format!("{name} is to be held by the keeper, but its descriptor is not there");
            return Err(io::Error::new(ErrorKind::InvalidInput, text));
        }
        let deadline = Instant::now() + PATIENCE;
        let (new, fds): (Vec<_>, Vec<_>) = new.into_iter().unzip();
        for (some, fds) in new.chunks(FDS_MAX).zip(fds.chunks(FDS_MAX)) {
            match self.send("hold", some, fds, deadline) {
                // More of this user's descriptors are under way than it may have open: they arrive first.
                Err(error) if error.raw_os_error() == Some(nix::libc::ETOOMANYREFS) => {
                    some.first().map_or(Ok(()), |name| self.ask_release(name, deadline))?;
                    self.send("hold", some, fds, deadline)?;
                }
                result => result?,
            }
            self.held.extend(some.iter().map(|name| (*name).to_owned()));
        }
        self.gone = self.held.difference(names).cloned().collect();
        Ok(())
    }

    /// Has it close one descriptor, and returns when that is done; at once if it isn't held.
    ///
    /// # Errors
    /// `TimedOut` when it does not answer for 200 ms, or whatever the kernel says: it is to be ended, which closes the
    /// descriptor too.
    pub(crate) fn release(&mut self, name: &str) -> io::Result<()> {
        if !self.held.contains(name) {
            return Ok(());
        }
        self.ask_release(name, Instant::now() + PATIENCE)?;
        self.held.remove(name);
        Ok(())
    }

    /// Returns when it has done this and all it was told before.
    fn ask_release(&self, name: &str, deadline: Instant) -> io::Result<()> {
        self.send("release", &[name], &[], deadline)?;
        loop {
            let said = self.hear(deadline)?;
            match split(said.as_bytes()) {
                Some(("released", words)) if words.first() == Some(&name) => return Ok(()),
                // Said before, of something else.
                Some(("unknown" | "released", _)) => {}
                _ => return Err(unexpected(&said)),
            }
        }
    }

    /// The next thing it says.
    fn hear(&self, deadline: Instant) -> io::Result<String> {
        if !wait_for(self.channel.as_fd(), PollFlags::IN, deadline)? {
            return Err(silent());
        }
        let mut buffer = [0; DATAGRAM_BYTES_MAX];
        let received = socket::recv_with_fds(self.channel.as_fd(), &mut buffer)?;
        match buffer.get(..received.bytes) {
            Some(said) if !said.is_empty() => Ok(String::from_utf8_lossy(said).into_owned()),
            _ => Err(io::Error::new(ErrorKind::UnexpectedEof, "the keeper has ended")),
        }
    }

    /// Gives it the latest snapshot, in place of the one before, and drops what the last [`Keeper::update`] did not name.
    ///
    /// # Errors
    /// `TimedOut` when it does not take the messages for 200 ms, or whatever the kernel says: it is to be ended.
    pub(crate) fn save(&mut self, snapshot: BorrowedFd<'_>) -> io::Result<()> {
        let deadline = Instant::now() + PATIENCE;
        self.send("state", &[], &[snapshot], deadline)?;
        let gone: Vec<&str> = self.gone.iter().map(String::as_str).collect();
        for some in gone.chunks(FDS_MAX) {
            self.send("drop", some, &[], deadline)?;
        }
        for name in std::mem::take(&mut self.gone) {
            self.held.remove(&name);
        }
        Ok(())
    }

    fn send(&self, verb: &str, names: &[&str], fds: &[BorrowedFd<'_>], deadline: Instant) -> io::Result<()> {
        let datagram = join(verb, names);
        loop {
            match socket::send_with_fds(self.channel.as_fd(), datagram.as_bytes(), fds) {
                Err(error) if error.kind() == ErrorKind::WouldBlock => {
                    if !wait_for(self.channel.as_fd(), PollFlags::OUT, deadline)? {
                        return Err(silent());
                    }
                }
                result => return result,
            }
        }
    }

    /// Ends it at once. When this returns it has closed everything, unless the kernel takes more than two seconds.
    pub(crate) fn end(self) {
        kill(self.pidfd.as_fd());
    }

    /// Has it leave, or ends it when it does not within 200 ms. When this returns it has closed everything.
    pub(crate) fn dismiss(self) {
        let deadline = Instant::now() + PATIENCE;
        let told = self.send("leave", &[], &[], deadline);
        let is_gone = told.and_then(|()| wait_for(self.pidfd.as_fd(), PollFlags::IN, deadline));
        if !is_gone.unwrap_or(false) {
            return self.end();
        }
        let _ = pidfd::reap(self.pidfd.as_fd());
    }

    /// Its descriptors, and what else is to be known of it after a re-exec.
    pub(crate) fn parts(&self) -> ([BorrowedFd<'_>; 2], SavedKeeper) {
        let saved = SavedKeeper { pid: self.pid, held: self.held.clone() };
        ([self.channel.as_fd(), self.pidfd.as_fd()], saved)
    }

    /// The keeper as it was before the re-exec.
    pub(crate) fn join([channel, pidfd]: [OwnedFd; 2], saved: SavedKeeper) -> Keeper {
        Keeper { channel, pidfd, pid: saved.pid, held: saved.held, gone: Vec::new() }
    }
}

fn unexpected(said: &str) -> io::Error {
    io::Error::other(format!("the keeper says {said:?}"))
}

fn silent() -> io::Error {
    io::Error::new(ErrorKind::TimedOut, "the keeper is silent")
}

/// Ends a keeper and waits until it has ended; reaps it if it is our child.
pub(super) fn kill(pidfd: BorrowedFd<'_>) {
    // It has ended already, or it never will by us: nothing to be done about either.
    let _ = pidfd::send_signal(pidfd, nix::libc::SIGKILL);
    let _ = wait_for(pidfd, PollFlags::IN, Instant::now() + END_PATIENCE);
    let _ = pidfd::reap(pidfd);
}

/// The socket on which the next master knocks, at a path where only a former keeper's may be in the way.
fn bind(path: &Path) -> io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let listener =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)?;
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        fs::remove_file(path)?;
    }
    // The mode of the socket becomes that of the file: nobody else can open it at any moment.
    rustix::fs::fchmod(&listener, Mode::RUSR | Mode::WUSR)?;
    rustix::net::bind(&listener, &address)?;
    Ok(listener)
}
