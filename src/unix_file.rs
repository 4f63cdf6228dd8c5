//! Files of unix sockets: made with the owner and mode they are to have, and removed only as what they are known to be.

use std::fs;
use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt, PermissionsExt};
use std::path::{Path, PathBuf};

use nix::unistd::setfsgid;
use reuseportd_sys::identity::{self, Identity};
use reuseportd_sys::unix;
use rustix::fs::{AtFlags, CWD, Mode, OFlags, RenameFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType};
use rustix::process::{Gid, Uid};
use serde::{Deserialize, Serialize};

use crate::config::UnixListen;

/// Which file: another one at the same path is not it. As long as the socket lives its number is not given out again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct FileId {
    dev: u64,
    inode: u64,
}

/// Why there can be no socket at a path.
#[derive(Debug, thiserror::Error)]
#[error("listen {name:?}: unix:{}: {cause}", path.display())]
pub(crate) struct UnixError {
    name: String,
    path: PathBuf,
    cause: Cause,
}

/// What is in the way.
#[derive(Debug, thiserror::Error)]
pub(crate) enum Cause {
    #[error("there is a {0}, which is no socket and stays as it is: remove it, or choose another path")]
    NoSocket(&'static str),
    #[error("a server listens there: stop it, or choose another path")]
    Live,
    #[error("whether a server listens there can't be found out ({0}): remove it if none does")]
    Unknown(io::Error),
    #[error("its directory {} does not exist: create it (RuntimeDirectory= in the unit, or `install -d`)", .0.display())]
    NoDirectory(PathBuf),
    #[error("the master may not write to {}: let it ({source}), or choose another directory", directory.display())]
    Closed { directory: PathBuf, source: io::Error },
    #[error(
        "its file can't be given to the workers' user and group ({0}): make its directory theirs (chown), or give the \
         master CAP_CHOWN"
    )]
    Owner(io::Error),
    #[error("cannot {action}: {source}")]
    Failed { action: &'static str, source: io::Error },
}

impl Cause {
    pub(crate) fn of(self, listen: &UnixListen) -> UnixError {
        UnixError { name: listen.name.clone(), path: listen.path.clone(), cause: self }
    }
}

fn failed(action: &'static str) -> impl Fn(io::Error) -> Cause {
    move |source| Cause::Failed { action, source }
}

fn user_of(identity: &Identity) -> (Option<Uid>, Option<Gid>) {
    (identity.uid, identity.groups.as_ref().map(|groups| groups.gid))
}

fn lstat(path: &Path) -> Result<Option<fs::Metadata>, Cause> {
    match fs::symlink_metadata(path) {
        Ok(metadata) => Ok(Some(metadata)),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
        Err(error) => Err(failed("look at it")(error)),
    }
}

impl FileId {
    fn of(metadata: &fs::Metadata) -> FileId {
        FileId { dev: metadata.dev(), inode: metadata.ino() }
    }

    /// Of the socket's file at a path.
    pub(crate) fn at(path: &Path) -> Option<FileId> {
        let metadata = fs::symlink_metadata(path).ok()?;
        metadata.file_type().is_socket().then(|| FileId::of(&metadata))
    }
}

/// What a path holds that is no socket.
pub(crate) fn obstacle(metadata: &fs::Metadata) -> Option<&'static str> {
    let kind = metadata.file_type();
    match () {
        () if kind.is_socket() => None,
        () if kind.is_dir() => Some("directory"),
        () if kind.is_symlink() => Some("symbolic link"),
        () if kind.is_fifo() => Some("named pipe"),
        () if kind.is_file() => Some("file"),
        () => Some("device"),
    }
}

/// Whether a socket can be made there, asked without touching what is there. `is_ours` says of a socket that is listened
/// on whether that is this very app's.
pub(crate) fn check(listen: &UnixListen, is_ours: impl FnOnce() -> bool) -> Result<(), UnixError> {
    let cause = match lstat(&listen.path).map_err(|cause| cause.of(listen))? {
        Some(metadata) => match obstacle(&metadata) {
            Some(kind) => Cause::NoSocket(kind),
            // The kernel's list tells without a connection, which a server would see.
            None if listening(&listen.path).is_empty() || is_ours() => return Ok(()),
            None => Cause::Live,
        },
        None => match listen.path.parent() {
            Some(directory) if !directory.exists() => Cause::NoDirectory(directory.to_owned()),
            Some(directory) => {
                let writable =
                    rustix::fs::accessat(CWD, directory, rustix::fs::Access::WRITE_OK, AtFlags::EACCESS);
                match writable {
                    Ok(()) => return Ok(()),
                    Err(error) => Cause::Closed { directory: directory.to_owned(), source: error.into() },
                }
            }
            None => return Ok(()),
        },
    };
    Err(cause.of(listen))
}

/// Inodes of the sockets that listen and were bound with this path.
pub(crate) fn listening(path: &Path) -> Vec<u64> {
    let all = unix::sockets().unwrap_or_default();
    all.into_iter().filter(|one| one.listens && one.path == path).map(|one| one.inode).collect()
}

/// Makes the socket, listening. What a server that has ended left at the path goes; all else stays, and is refused.
pub(crate) fn make(listen: &UnixListen, identity: &Identity) -> Result<(OwnedFd, FileId), UnixError> {
    let make = || {
        let socket = match bind(listen, identity) {
            Err(Errno::ADDRINUSE) => {
                remove_stale(&listen.path, identity)?;
                bind(listen, identity)
            }
            bound => bound,
        };
        let socket = socket.map_err(|error| not_bound(&listen.path, error))?;
        let file =
            FileId::at(&listen.path).ok_or_else(|| failed("find it")(io::ErrorKind::NotFound.into()))?;
        let ready = settle_file(listen, identity, file).and_then(|()| {
            rustix::net::listen(&socket, i32::try_from(listen.backlog).unwrap_or(i32::MAX))
                .map_err(|error| failed("listen")(error.into()))
        });
        if let Err(cause) = ready {
            remove(&listen.path, file, identity.uid);
            return Err(cause);
        }
        Ok((socket, file))
    };
    make().map_err(|cause| cause.of(listen))
}

fn stream() -> rustix::io::Result<OwnedFd> {
    rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)
}

/// With its mode, user and group from the first moment on. In a directory where the workers' user may not write, the
/// master's own is its user for now.
fn bind(listen: &UnixListen, identity: &Identity) -> rustix::io::Result<OwnedFd> {
    let (uid, gid) = user_of(identity);
    let socket = stream()?;
    let address = SocketAddrUnix::new(&listen.path)?;
    let bind = || rustix::net::bind(&socket, &address);
    let umask = rustix::process::umask(Mode::from_raw_mode(0o777 & !listen.mode));
    let before = gid.map(|gid| setfsgid(nix::unistd::Gid::from_raw(gid.as_raw())));
    let bound = match identity::as_user(uid, bind) {
        Err(Errno::ACCESS | Errno::PERM) if uid.is_some() => bind(),
        bound => bound,
    };
    before.map(setfsgid);
    rustix::process::umask(umask);
    bound.map(|()| socket)
}

fn not_bound(path: &Path, error: Errno) -> Cause {
    let directory = path.parent().unwrap_or(Path::new("/")).to_owned();
    match error {
        Errno::NOENT | Errno::NOTDIR => Cause::NoDirectory(directory),
        Errno::ACCESS | Errno::PERM | Errno::ROFS => Cause::Closed { directory, source: error.into() },
        Errno::ADDRINUSE => Cause::Live,
        error => failed("bind it")(error.into()),
    }
}

/// Gives the file the user, group and mode it is to have: what differs, in an order that opens it to nobody meanwhile.
pub(crate) fn settle(listen: &UnixListen, identity: &Identity, file: FileId) -> Result<(), UnixError> {
    settle_file(listen, identity, file).map_err(|cause| cause.of(listen))
}

fn settle_file(listen: &UnixListen, identity: &Identity, file: FileId) -> Result<(), Cause> {
    let (uid, gid) = user_of(identity);
    // The very file: another that came to its place meanwhile is left alone.
    let opened =
        rustix::fs::open(&listen.path, OFlags::PATH | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty());
    let opened = opened.map_err(|error| failed("open it")(error.into()))?;
    let stat = rustix::fs::fstat(&opened).map_err(|error| failed("look at it")(error.into()))?;
    if (FileId { dev: stat.st_dev, inode: stat.st_ino }) != file {
        return Err(failed("keep it")(io::Error::other("another file came to its place")));
    }
    let own = |uid, gid| {
        let change = || rustix::fs::chownat(&opened, "", uid, gid, AtFlags::EMPTY_PATH);
        identity::or_as_user(identity.uid, change).map_err(|error| Cause::Owner(error.into()))
    };
    if let Some(gid) = gid.filter(|gid| gid.as_raw() != stat.st_gid) {
        own(None, Some(gid))?;
    }
    if stat.st_mode & 0o777 != listen.mode {
        let link = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&opened));
        let change = || fs::set_permissions(&link, fs::Permissions::from_mode(listen.mode));
        identity::or_as_user(uid, change).map_err(failed("set its mode"))?;
    }
    match uid.filter(|uid| uid.as_raw() != stat.st_uid) {
        Some(uid) => own(Some(uid), None),
        None => Ok(()),
    }
}

/// Removes a socket that nobody listens on. Who begins to at the last moment keeps it.
fn remove_stale(path: &Path, identity: &Identity) -> Result<(), Cause> {
    let Some(metadata) = lstat(path)? else { return Ok(()) };
    if let Some(kind) = obstacle(&metadata) {
        return Err(Cause::NoSocket(kind));
    }
    is_stale(path, identity)?;
    // Aside, where nobody finds it any more, it is looked at once more.
    let mut aside = path.as_os_str().to_owned();
    aside.push(format!(".{}", std::process::id()));
    let rename = |from: &Path, to: &Path| {
        identity::or_as_user(identity.uid, || {
            rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE)
        })
    };
    let aside = PathBuf::from(aside);
    rename(path, &aside).map_err(|error| not_bound(path, error))?;
    let again = lstat(&aside)?;
    let is_same = again.as_ref().map(FileId::of) == Some(FileId::of(&metadata));
    let still_stale = if is_same { is_stale(&aside, identity) } else { Err(Cause::Live) };
    match still_stale {
        Ok(()) => identity::or_as_user(identity.uid, || fs::remove_file(&aside))
            .map_err(failed("remove what a former server left")),
        Err(cause) => {
            rename(&aside, path).map_err(|error| failed("put it back")(error.into()))?;
            Err(cause)
        }
    }
}

/// Whether nobody listens on the socket at a path: it is connected to.
fn is_stale(path: &Path, identity: &Identity) -> Result<(), Cause> {
    let unknown = |error: Errno| Cause::Unknown(error.into());
    // By its directory's descriptor, since the path may be too long.
    let directory = path.parent().unwrap_or(Path::new("/"));
    let opened =
        rustix::fs::open(directory, OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(unknown)?;
    let number = std::os::fd::AsRawFd::as_raw_fd(&opened);
    let short = Path::new("/proc/self/fd").join(number.to_string());
    let short = short.join(path.file_name().unwrap_or_default());
    let address = SocketAddrUnix::new(short.as_os_str().as_bytes()).map_err(unknown)?;
    let connect = || {
        let socket = stream()?;
        rustix::io::ioctl_fionbio(socket.as_fd(), true)?;
        rustix::net::connect(&socket, &address)
    };
    match identity::or_as_user(identity.uid, connect) {
        Err(Errno::CONNREFUSED | Errno::NOENT) => Ok(()),
        // Full, or of another kind.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Err(Cause::Live),
        Err(error) => Err(unknown(error)),
    }
}

/// Removes the file, if it still is this one.
pub(crate) fn remove(path: &Path, file: FileId, uid: Option<Uid>) {
    if FileId::at(path) == Some(file)
        && let Err(error) = identity::or_as_user(uid, || fs::remove_file(path))
    {
        tracing::warn!(path = %path.display(), %error, "cannot remove the file of a unix socket");
    }
}
