//! What a keeper without a master hands to the next one.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, ErrorKind};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reuseportd_sys::socket::{self, Received};
use reuseportd_sys::{memfd, pidfd};
use rustix::event::PollFlags;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};

use super::client::{Keeper, SavedKeeper, kill};
use super::words::{DATAGRAM_BYTES_MAX, split};
use super::{VERSION, wait_for};

/// For everything but the end of a keeper that is killed.
const PATIENCE: Duration = Duration::from_secs(2);

/// What a former master has left.
#[derive(Debug)]
pub(crate) struct Inheritance {
    /// Its latest snapshot; empty if it saved none.
    pub(crate) state: Vec<u8>,
    /// Descriptors by name. Some may have come after the snapshot, and some that it names been released.
    pub(crate) fds: BTreeMap<String, OwnedFd>,
    /// The keeper that held them, and holds them still: it is ours now.
    pub(crate) keeper: Keeper,
}

/// Why there is an inheritance that can't be had.
#[derive(Debug, thiserror::Error)]
pub(crate) enum FetchError {
    #[error("the keeper at {} serves a master that still runs: stop that one first", .0.display())]
    Busy(PathBuf),
    #[error("the keeper's socket {} is not used: {what}; remove it if it is not needed", path.display())]
    Foreign { path: PathBuf, what: String },
    #[error("the keeper at {} runs in another pid namespace, and so do the workers that serve: start this master there, or end them there with `reuseportd stop --left-behind`", .0.display())]
    Elsewhere(PathBuf),
    #[error("the keeper at {} has ended or refuses to talk; its workers are looked for without it", .0.display())]
    CutOff(PathBuf),
    #[error("the keeper at {} does not answer (process {pid} {}); its workers are looked for without it",
        path.display(), ending(*is_ended))]
    Silent { path: PathBuf, pid: i32, is_ended: bool },
    #[error("the keeper at {} is not understood: {what} (process {pid} {}); its workers are looked for without it",
        path.display(), ending(*is_ended))]
    NotUnderstood { path: PathBuf, what: String, pid: i32, is_ended: bool },
    #[error("cannot speak to the keeper at {}: {source}", path.display())]
    Socket { path: PathBuf, source: io::Error },
}

fn ending(is_ended: bool) -> &'static str {
    if is_ended { "was killed" } else { "could not be killed" }
}

/// How a conversation fails.
enum Broken {
    Busy,
    CutOff,
    Silent,
    NotUnderstood(String),
}

/// What the keeper at this socket holds, if there is one whose master is gone. That of one that is about to go is waited
/// for. A keeper that is silent or talks nonsense is killed: it would hold listeners that nobody can release.
///
/// Takes two seconds at the most, and two more for the end of a keeper that is killed.
///
/// # Errors
/// When there is a keeper, or something in its place, that gives nothing.
pub(crate) fn fetch(path: &Path) -> Result<Option<Inheritance>, FetchError> {
    let deadline = Instant::now() + PATIENCE;
    let Some((channel, pid, process)) = connect(path)? else { return Ok(None) };
    match converse(&channel, deadline) {
        Ok((state, fds)) => {
            let saved = SavedKeeper { pid, held: fds.keys().cloned().collect() };
            let keeper = Keeper::join([channel, process], saved);
            Ok(Some(Inheritance { state, fds, keeper }))
        }
        Err(broken) => Err(give_up(path, pid, &process, broken)),
    }
}

fn give_up(path: &Path, pid: i32, process: &OwnedFd, broken: Broken) -> FetchError {
    let path = path.to_owned();
    let end = || {
        kill(process.as_fd());
        wait_for(process.as_fd(), PollFlags::IN, Instant::now()).unwrap_or(false)
    };
    match broken {
        Broken::Busy => FetchError::Busy(path),
        Broken::CutOff => FetchError::CutOff(path),
        Broken::Silent => FetchError::Silent { path, pid, is_ended: end() },
        Broken::NotUnderstood(what) => FetchError::NotUnderstood { path, what, pid, is_ended: end() },
    }
}

/// A connection to the keeper, its pid and pidfd; `None` if there is no keeper.
fn connect(path: &Path) -> Result<Option<(OwnedFd, i32, OwnedFd)>, FetchError> {
    let failed = |source: io::Error| FetchError::Socket { path: path.to_owned(), source };
    let foreign = |what: String| FetchError::Foreign { path: path.to_owned(), what };
    let trusted = [0, rustix::process::geteuid().as_raw()];
    match fs::symlink_metadata(path) {
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(failed(error)),
        Ok(metadata) if !metadata.file_type().is_socket() => return Err(foreign("it is no socket".into())),
        Ok(metadata) if !trusted.contains(&metadata.uid()) => {
            return Err(foreign(format!("it belongs to user {}", metadata.uid())));
        }
        Ok(_) => {}
    }
    let address = SocketAddrUnix::new(path).map_err(|error| failed(error.into()))?;
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let channel = rustix::net::socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None)
        .map_err(|error| failed(error.into()))?;
    match rustix::net::connect(&channel, &address).map_err(io::Error::from) {
        Err(error) if [ErrorKind::NotFound, ErrorKind::ConnectionRefused].contains(&error.kind()) => {
            return Ok(None);
        }
        result => result.map_err(failed)?,
    }
    let peer = socket::peer_credentials(channel.as_fd()).map_err(failed)?;
    if !trusted.contains(&peer.uid) {
        return Err(foreign(format!("process {} of user {} listens there", peer.pid, peer.uid)));
    }
    // It has none here.
    if peer.pid == 0 {
        return Err(FetchError::Elsewhere(path.to_owned()));
    }
    let cut_off = |_| FetchError::CutOff(path.to_owned());
    let process = pidfd::open(peer.pid).map_err(cut_off)?;
    // Not only by its number, which may be another's by now, and which we may have to kill.
    let command = fs::read(format!("/proc/{}/cmdline", peer.pid)).map_err(cut_off)?;
    let has_ended = wait_for(process.as_fd(), PollFlags::IN, Instant::now()).map_err(failed)?;
    if command.starts_with(b"reuseportd\0keeper\0") {
        Ok(Some((channel, peer.pid, process)))
    } else if has_ended {
        Err(FetchError::CutOff(path.to_owned()))
    } else {
        Err(foreign(format!("process {} listens there, which is no keeper", peer.pid)))
    }
}

/// Asks for everything, and hears it.
fn converse(channel: &OwnedFd, deadline: Instant) -> Result<(Vec<u8>, BTreeMap<String, OwnedFd>), Broken> {
    let cut_off = |_| Broken::CutOff;
    socket::send_with_fds(channel.as_fd(), b"fetch", &[]).map_err(cut_off)?;
    let mut buffer = [0; DATAGRAM_BYTES_MAX];
    let mut all = BTreeMap::new();
    let (mut state, mut is_busy) = (None, false);
    loop {
        match wait_for(channel.as_fd(), PollFlags::IN, deadline) {
            Ok(true) => {}
            Ok(false) if is_busy => return Err(Broken::Busy),
            Ok(false) => return Err(Broken::Silent),
            Err(error) => return Err(Broken::NotUnderstood(error.to_string())),
        }
        let Received { bytes, fds, .. } = match socket::recv_with_fds(channel.as_fd(), &mut buffer) {
            Err(error) if error.kind() == ErrorKind::InvalidData => {
                return Err(Broken::NotUnderstood(error.to_string()));
            }
            result => result.map_err(cut_off)?,
        };
        let said = buffer.get(..bytes).unwrap_or_default();
        match (split(said), &state) {
            _ if said.is_empty() => return Err(Broken::CutOff),
            (Some(("busy", _)), None) => is_busy = true,
            (Some(("state", words)), None) if words.first() == Some(&VERSION) => {
                let read = fds.first().map_or(Ok(Vec::new()), |snapshot| memfd::read(snapshot.as_fd()));
                state = Some(read.map_err(|error| Broken::NotUnderstood(format!("its snapshot: {error}")))?);
            }
            (Some(("held", names)), Some(_)) if names.len() == fds.len() => {
                all.extend(names.into_iter().map(str::to_owned).zip(fds));
            }
            (Some(("end", _)), Some(_)) => return Ok((state.unwrap_or_default(), all)),
            _ => return Err(Broken::NotUnderstood(format!("{:?}", String::from_utf8_lossy(said)))),
        }
    }
}
