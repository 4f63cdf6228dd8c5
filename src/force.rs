//! `force_reuseport`: workers are started in a cgroup of the app's, in which `bind()` sets SO_REUSEPORT for the configured
//! addresses.
//!
//! The app's cgroup is below the master's own. In it there is one for each set of addresses, so that generations with
//! different configs don't meddle with each other. Nothing of it is remembered: each start of a worker makes what is
//! missing, and what nobody is in can be removed at any time.

use std::fs::{self, File};
use std::io::{self, ErrorKind};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use reuseportd_sys::bpf::BpfError;
use reuseportd_sys::bpf::bind::{self, Rule};
use reuseportd_sys::cgroup;
use reuseportd_sys::diag::Protocol;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sha2::{Digest, Sha256};

/// How long the last process that has ended may take to be out of its cgroup.
const PATIENCE: Duration = Duration::from_secs(1);

/// Why `force_reuseport` can't be had here.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ForceError {
    #[error("cannot find this process in cgroup v2: {}; {MOUNT}", source.as_ref().map_or("it is not mounted here".to_owned(), io::Error::to_string))]
    NoCgroup { source: Option<io::Error> },
    #[error("cannot make the cgroup {}: {source}; {}", path.display(), remedy(source))]
    Make { path: PathBuf, source: io::Error },
    #[error(transparent)]
    Program(#[from] BpfError),
    #[error("cannot bind a socket in the cgroup {}: {source}; {}", path.display(), remedy(source))]
    Try { path: PathBuf, source: io::Error },
    #[error("bind() does not set SO_REUSEPORT in the cgroup {}, though the kernel accepts the program; {KERNEL}", path.display())]
    NoEffect { path: PathBuf },
}

const MOUNT: &str =
    "mount it: mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified";
const KERNEL: &str = "boot Linux 6.1 or later";

/// What helps when cgroups can't be made.
fn remedy(error: &io::Error) -> &'static str {
    match error.kind() {
        ErrorKind::ReadOnlyFilesystem => {
            "let it be written to: ProtectControlGroups=no in a unit, --security-opt unmask=/sys/fs/cgroup or a mount of \
             it in a container"
        }
        ErrorKind::PermissionDenied => {
            "run the master as root, or in a cgroup of its user's own (systemd: Delegate=yes)"
        }
        _ => "see `reuseportd doctor`",
    }
}

/// Where the cgroup of this app belongs, whose control socket tells it from others of the name.
pub(crate) fn place(app: &str, socket: &Path) -> Result<PathBuf, ForceError> {
    below_own(&format!("reuseportd-{app}-{}", short_hash(&socket.display().to_string())))
}

fn below_own(name: &str) -> Result<PathBuf, ForceError> {
    match cgroup::own() {
        Ok(Some(own)) => Ok(own.join(name)),
        Ok(None) => Err(ForceError::NoCgroup { source: None }),
        Err(source) => Err(ForceError::NoCgroup { source: Some(source) }),
    }
}

fn short_hash(text: &str) -> String {
    let mut hash = format!("{:x}", Sha256::digest(text));
    hash.truncate(8);
    hash
}

/// Makes a cgroup unless there is one.
pub(crate) fn make(path: &Path) -> Result<(), ForceError> {
    match fs::create_dir(path) {
        Err(source) if source.kind() != ErrorKind::AlreadyExists => {
            Err(ForceError::Make { path: path.to_owned(), source })
        }
        Ok(()) | Err(_) => Ok(()),
    }
}

/// `cgroup.procs` of the cgroup for these addresses in the app's.
pub(crate) fn open(app: &Path, rules: &[Rule]) -> Result<File, ForceError> {
    let path = app.join(name(rules));
    let failed = |source| ForceError::Make { path: path.clone(), source };
    make(&path)?;
    let directory = File::open(&path).map_err(failed)?;
    bind::force_reuseport(directory.as_fd(), rules)?;
    File::options().write(true).open(path.join("cgroup.procs")).map_err(failed)
}

fn name(rules: &[Rule]) -> String {
    short_hash(&rules.iter().map(|rule| format!("{rule:?} ")).collect::<String>())
}

/// Tries in the app's cgroup what workers are going to do.
pub(crate) fn try_in(app: &Path) -> Result<(), ForceError> {
    // Which port it is does not matter to the program, and the kernel has always a free one.
    let any = SocketAddr::from((Ipv4Addr::UNSPECIFIED, 0));
    let rules = [(Protocol::Tcp, any)];
    let path = app.join(name(&rules));
    let tried = open(app, &rules).and_then(|procs| {
        let bound = cgroup::binds_with_reuseport(procs.as_fd(), any);
        match bound.map_err(|source| ForceError::Try { path: path.clone(), source })? {
            true => Ok(()),
            false => Err(ForceError::NoEffect { path: path.clone() }),
        }
    });
    tried.and_then(|()| remove_when_empty(&path).map_err(|source| ForceError::Try { path, source }))
}

/// The same in a cgroup that is made for it.
pub(crate) fn try_here() -> Result<(), ForceError> {
    let path = below_own(&format!("reuseportd-trial-{}", std::process::id()))?;
    make(&path)?;
    let tried = try_in(&path);
    let _ = remove(&path);
    tried
}

/// Removes the app's cgroup, and those in it that nobody is in.
///
/// # Errors
/// When processes are in it.
pub(crate) fn remove(app: &Path) -> io::Result<()> {
    let below = fs::read_dir(app).into_iter().flatten().flatten();
    for below in below.filter(|below| below.file_type().is_ok_and(|kind| kind.is_dir())) {
        let _ = fs::remove_dir(below.path());
    }
    match fs::remove_dir(app) {
        Err(error) if error.kind() != ErrorKind::NotFound => Err(error),
        Ok(()) | Err(_) => Ok(()),
    }
}

/// The same, once the last process that has ended is out of it.
pub(crate) fn remove_when_empty(path: &Path) -> io::Result<()> {
    let deadline = Instant::now() + PATIENCE;
    loop {
        // Before it is tried: whatever changes after that is seen.
        let Ok(events) = File::open(path.join("cgroup.events")) else { return remove(path) };
        let is_populated = io::read_to_string(&events)?.contains("populated 1");
        let left = deadline.saturating_duration_since(Instant::now());
        if !is_populated || left.is_zero() {
            return remove(path);
        }
        let left = Timespec::try_from(left).map_err(io::Error::other)?;
        let _ = poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&left));
    }
}
