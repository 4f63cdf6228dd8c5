//! The files of a running master: its directory, the lock that keeps a second one away, and their removal.

use std::fs::{self, DirBuilder, File, Metadata, OpenOptions};
use std::io::{self, Write};
use std::os::fd::AsFd;
use std::os::unix::fs::{DirBuilderExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt, symlink};
use std::os::unix::net::{UnixDatagram, UnixListener};
use std::path::{Path, PathBuf};

use rustix::fs::{FlockOperation, flock};
use serde::{Deserialize, Serialize};

use super::carried::Carried;
use crate::config::{Control, saved};
use crate::force::{self, ForceError};
use crate::unix_file::obstacle;

/// Why the runtime files can't be used.
#[derive(Debug, thiserror::Error)]
pub(super) enum RuntimeError {
    #[error("cannot create the runtime directory {}: {source}; {}", path.display(), place_for(source))]
    Create { path: PathBuf, source: io::Error },
    #[error(
        "the runtime directory {} is not used: {what}; remove it, or choose another control.socket",
        path.display()
    )]
    Unsafe { path: PathBuf, what: &'static str },
    #[error(
        "a {what} of user {uid} is in the place of the runtime file {}; remove it, or choose another control.socket",
        path.display()
    )]
    Planted { path: PathBuf, what: &'static str, uid: u32 },
    #[error("cannot lock {}: {source}; {}", path.display(), place_for(source))]
    Lock { path: PathBuf, source: io::Error },
    #[error(
        "another master runs this app: it holds {}; speak to it with `reuseportd status --socket {}`",
        lock.display(), socket.display()
    )]
    Running { lock: PathBuf, socket: PathBuf },
    #[error("cannot put a socket at {}: {source}; {}", path.display(), place_for(source))]
    Socket { path: PathBuf, source: io::Error },
}

/// What helps when a file can't be made.
fn place_for(error: &io::Error) -> &'static str {
    match error.kind() {
        io::ErrorKind::ReadOnlyFilesystem => {
            "mount a tmpfs there (podman, docker: --tmpfs), or set control.socket to a path that can be written to"
        }
        io::ErrorKind::PermissionDenied => "set control.socket to a path that this user may write to",
        _ => "choose another control.socket",
    }
}

/// The runtime files, held as long as the master lives, removed when it ends.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Runtime {
    #[serde(with = "saved::optional_path")]
    directory: Option<PathBuf>,
    #[serde(with = "saved::path")]
    socket: PathBuf,
    lock: Carried<File>,
    /// A master runs by them, and did not only look at them: they go with it.
    #[serde(skip)]
    is_ours: bool,
}

impl Runtime {
    /// Makes the directory and takes the lock.
    pub(super) fn open(socket: PathBuf) -> Result<Runtime, RuntimeError> {
        let directory = socket.parent().unwrap_or(Path::new("/")).to_owned();
        let is_new = make_directory(&directory)?;
        let path = beside(&socket, ".lock");
        let mut lock = OpenOptions::new()
            .create(true)
            .truncate(false)
            .write(true)
            .mode(0o600)
            // Of a pipe nobody reads it would wait.
            .custom_flags(nix::libc::O_NOFOLLOW | nix::libc::O_NONBLOCK)
            .open(&path)
            .map_err(|source| planted(&path, RuntimeError::Lock { path: path.clone(), source }))?;
        if !lock.metadata().is_ok_and(|metadata| metadata.is_file() && is_own(&metadata)) {
            let source = io::Error::other("another file came to its place");
            return Err(planted(&path, RuntimeError::Lock { path: path.clone(), source }));
        }
        match flock(&lock, FlockOperation::NonBlockingLockExclusive) {
            Ok(()) => {}
            Err(rustix::io::Errno::WOULDBLOCK) => return Err(RuntimeError::Running { lock: path, socket }),
            Err(source) => return Err(RuntimeError::Lock { path, source: source.into() }),
        }
        // The lock says whether a master has made the directory, to the next one too.
        let failed = |source| RuntimeError::Lock { path: path.clone(), source };
        if is_new {
            lock.write_all(b"this directory is removed with it\n").map_err(failed)?;
        }
        let is_made = lock.metadata().map_err(failed)?.len() > 0;
        let directory = is_made.then_some(directory);
        let mut runtime = Runtime { directory, socket, lock: Carried::new(lock), is_ours: true };
        let left = [runtime.keeper_path(), runtime.journal_path()];
        runtime.is_ours = !left.iter().any(|path| fs::symlink_metadata(path).is_ok());
        Ok(runtime)
    }

    /// What is here is this master's now: it came through a re-exec, lock included, or there is no need any more of what
    /// a former one has left. Until then a start that fails leaves it to the next.
    pub(super) fn own(&mut self) {
        self.is_ours = true;
    }

    /// The control socket, listening.
    pub(super) fn control_socket(&self, control: &Control) -> Result<UnixListener, RuntimeError> {
        // With other users allowed, credentials decide; otherwise the file mode is a second lock on the door.
        let mode = if control.allow_users.is_empty() { control.mode } else { 0o666 };
        let listener = bind(&self.socket, mode, |path| UnixListener::bind(path))?;
        let prepare = listener
            .set_nonblocking(true)
            .and_then(|()| reuseportd_sys::socket::refuse_descriptors(listener.as_fd()));
        prepare.map_err(|source| RuntimeError::Socket { path: self.socket.clone(), source })?;
        Ok(listener)
    }

    /// Where a next master finds the keeper.
    pub(super) fn keeper_path(&self) -> PathBuf {
        beside(&self.socket, ".keeper")
    }

    /// Where one is until it takes that place.
    pub(super) fn new_keeper_path(&self) -> PathBuf {
        beside(&self.socket, ".keep")
    }

    /// Where it finds the pids of workers.
    pub(super) fn journal_path(&self) -> PathBuf {
        beside(&self.socket, ".journal")
    }

    /// The app's cgroup, made if need be. Where it is, a link beside the socket says: the next master may be elsewhere.
    pub(super) fn cgroup(&self, app: &str) -> Result<PathBuf, ForceError> {
        let (link, place) = (self.cgroup_link(), force::place(app, &self.socket)?);
        match own_link(&link).filter(|left| *left != place) {
            // A former master's processes are in it.
            Some(left) if force::remove(&left).is_err() => return Ok(left),
            Some(_) => drop(fs::remove_file(&link)),
            None => {}
        }
        // The link first: nothing is made that the next master would not find.
        match symlink(&place, &link) {
            Err(source) if own_link(&link).as_ref() != Some(&place) => {
                return Err(ForceError::Make { path: link, source });
            }
            Ok(()) | Err(_) => {}
        }
        force::make(&place)?;
        Ok(place)
    }

    fn cgroup_link(&self) -> PathBuf {
        beside(&self.socket, ".cgroup")
    }

    fn remove_cgroup(&self) {
        let Some(path) = own_link(&self.cgroup_link()) else { return };
        if let Err(error) = force::remove_when_empty(&path) {
            let path = path.display();
            tracing::warn!(
                event = "cgroup_left",
                "cannot remove the cgroup {path}: {error}; processes are still in it"
            );
        }
    }

    /// Where workers send their notifications.
    pub(super) fn notify_path(&self) -> PathBuf {
        beside(&self.socket, ".notify")
    }

    /// The notify socket. Everyone may write to it: credentials decide.
    pub(super) fn notify_socket(&self) -> Result<UnixDatagram, RuntimeError> {
        let path = self.notify_path();
        let socket = bind(&path, 0o666, |path| UnixDatagram::bind(path))?;
        let prepare = socket
            .set_nonblocking(true)
            .and_then(|()| reuseportd_sys::socket::pass_credentials(socket.as_fd()))
            .and_then(|()| reuseportd_sys::socket::refuse_descriptors(socket.as_fd()));
        prepare.map_err(|source| RuntimeError::Socket { path, source })?;
        Ok(socket)
    }
}

impl Drop for Runtime {
    fn drop(&mut self) {
        if !self.is_ours {
            return;
        }
        self.remove_cgroup();
        for suffix in ["", ".cgroup", ".notify", ".keep", ".keeper", ".journal", ".lock"] {
            let _ = fs::remove_file(beside(&self.socket, suffix));
        }
        if let Some(directory) = &self.directory {
            let _ = fs::remove_dir(directory);
        }
    }
}

fn beside(socket: &Path, suffix: &str) -> PathBuf {
    let mut path = socket.as_os_str().to_owned();
    path.push(suffix);
    path.into()
}

/// Makes the directory if it isn't there; says whether it made it. Others may pass through it to the notify socket.
fn make_directory(path: &Path) -> Result<bool, RuntimeError> {
    let existed = fs::symlink_metadata(path).is_ok();
    if !existed {
        let failed = |source| RuntimeError::Create { path: path.to_owned(), source };
        // Whatever the umask, and those above it too.
        let before = rustix::process::umask(rustix::fs::Mode::empty());
        let made = DirBuilder::new().recursive(true).mode(0o711).create(path);
        rustix::process::umask(before);
        made.map_err(failed)?;
    }
    let is_link = fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_symlink());
    if is_link {
        return Err(RuntimeError::Unsafe { path: path.to_owned(), what: "it is a symbolic link" });
    }
    check_directory(path)?;
    // Where everybody may make directories, somebody else may have made ours; who owns it could put another in the place of
    // what is in it. (Elsewhere it was the user's choice.)
    let is_own = |above: &&Path| above.ends_with(crate::config::own_directory_name());
    path.parent().filter(is_own).map_or(Ok(()), check_directory)?;
    Ok(!existed)
}

/// Only this user and root may put something into it, or take away what is theirs.
fn check_directory(path: &Path) -> Result<(), RuntimeError> {
    let metadata =
        fs::metadata(path).map_err(|source| RuntimeError::Create { path: path.to_owned(), source })?;
    let unsafe_for = |what| Err(RuntimeError::Unsafe { path: path.to_owned(), what });
    let is_sticky = metadata.mode() & 0o1000 != 0;
    if !metadata.is_dir() {
        return unsafe_for("it is no directory");
    }
    if !is_own(&metadata) {
        return unsafe_for("it belongs to another user");
    }
    if metadata.mode() & 0o022 != 0 && !is_sticky {
        return unsafe_for("others may write to it");
    }
    Ok(())
}

/// Whether it belongs to this user or root.
fn is_own(metadata: &Metadata) -> bool {
    [0, rustix::process::geteuid().as_raw()].contains(&metadata.uid())
}

/// Where a link leads; one that somebody else has put there, to where he likes, is none.
fn own_link(path: &Path) -> Option<PathBuf> {
    let is_believed = fs::symlink_metadata(path).is_ok_and(|metadata| is_own(&metadata));
    fs::read_link(path).ok().filter(|_| is_believed)
}

/// Says what is in the place of a file that can't be made, if that is the cause.
fn planted(path: &Path, otherwise: RuntimeError) -> RuntimeError {
    let Ok(metadata) = fs::symlink_metadata(path) else { return otherwise };
    if metadata.is_file() && is_own(&metadata) && matches!(otherwise, RuntimeError::Lock { .. }) {
        return otherwise;
    }
    let what = obstacle(&metadata).unwrap_or("socket");
    RuntimeError::Planted { path: path.to_owned(), what, uid: metadata.uid() }
}

/// Binds a unix socket at a path where only a stale socket of ours may be in the way: the lock is held.
fn bind<T>(path: &Path, mode: u32, bind: impl Fn(&Path) -> io::Result<T>) -> Result<T, RuntimeError> {
    let failed = |source| RuntimeError::Socket { path: path.to_owned(), source };
    if fs::symlink_metadata(path).is_ok_and(|metadata| metadata.file_type().is_socket()) {
        fs::remove_file(path).map_err(|source| planted(path, failed(source)))?;
    }
    // Private from the first moment; opened up below.
    let before = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = bind(path);
    rustix::process::umask(before);
    let socket = bound.map_err(|source| planted(path, failed(source)))?;
    fs::set_permissions(path, fs::Permissions::from_mode(mode)).map_err(failed)?;
    Ok(socket)
}
