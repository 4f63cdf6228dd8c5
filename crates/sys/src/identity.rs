//! Who a worker is: its user, groups and capabilities.
//!
//! Names have been looked up by the time an [`Identity`] exists: what a child does to take it on are plain system
//! calls on memory it finds, as is demanded between fork and exec.

use std::ffi::CString;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use nix::unistd::setfsuid;
use rustix::fs::{Access, AtFlags, CWD};
use rustix::process::{self, DumpableBehavior, Gid, Signal, Uid};
use rustix::thread::{self, CapabilitySet, CapabilitySets};

use crate::child::{self, Step};

/// What a child becomes before it executes its program. By default it stays what its parent is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Identity {
    /// The user. With one, all capabilities but `capabilities` are gone for good, of its descendants too.
    pub uid: Option<Uid>,
    /// The groups.
    pub groups: Option<Groups>,
    /// What it can do besides (ambient capabilities), its descendants too. The parent must have them.
    pub capabilities: CapabilitySet,
}

/// A process's groups.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Groups {
    /// The primary one, of the files it makes.
    pub gid: Gid,
    /// All it is a member of.
    pub supplementary: Vec<Gid>,
}

impl Default for Identity {
    fn default() -> Self {
        Identity { uid: None, groups: None, capabilities: CapabilitySet::empty() }
    }
}

impl Identity {
    /// Whether it is another user or group than the parent's.
    #[must_use]
    pub fn is_another(&self) -> bool {
        self.uid.is_some() || self.groups.is_some()
    }

    /// In the child: takes on one part of the identity.
    pub(crate) fn assume(&self, step: Step) -> rustix::io::Result<()> {
        match (step, self.uid, &self.groups) {
            (Step::Bounds, Some(_), _) => self.bound(),
            (Step::Groups, _, Some(groups)) => {
                thread::set_thread_groups(&groups.supplementary)?;
                thread::set_thread_res_gid(groups.gid, groups.gid, groups.gid)
            }
            (Step::User, Some(uid), _) => {
                // Else giving up uid 0 would give up the capabilities that are to be kept.
                thread::set_keep_capabilities(true)?;
                thread::set_thread_res_uid(uid, uid, uid)
            }
            (Step::Capabilities, ..) => self.grant(),
            _ => Ok(()),
        }
    }

    /// Nothing the program executes, set-user-ID or not, can have more.
    fn bound(&self) -> rustix::io::Result<()> {
        for bit in 0..u64::BITS {
            let one = CapabilitySet::from_bits_retain(1 << bit);
            match thread::capability_is_in_bounding_set(one) {
                Ok(true) if !self.capabilities.contains(one) => {
                    thread::remove_capability_from_bounding_set(one)?
                }
                Ok(_) => {}
                // The kernel knows no more.
                Err(_) => break,
            }
        }
        Ok(())
    }

    fn grant(&self) -> rustix::io::Result<()> {
        let own = self.capabilities;
        if self.uid.is_some() {
            let sets = CapabilitySets { effective: own, permitted: own, inheritable: own };
            thread::set_capabilities(None, sets)?;
        } else if !own.is_empty() {
            let mut sets = thread::capabilities(None)?;
            sets.inheritable |= own;
            thread::set_capabilities(None, sets)?;
        }
        let ambient = (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit));
        ambient
            .filter(|one| own.contains(*one))
            .try_for_each(|one| thread::configure_capability_in_ambient_set(one, true))
    }
}

/// Makes or looks at files and sockets as this user (in /proc too): what comes into being is that user's, and what only
/// that user may open can be opened, without CAP_CHOWN and CAP_DAC_READ_SEARCH. Nothing changes for `None`, for its own
/// user, and without CAP_SETUID. Only for processes with one thread: meanwhile it is not dumpable.
pub fn as_user<T>(uid: Option<Uid>, run: impl FnOnce() -> T) -> T {
    let _back = uid.map(Former::leave);
    run()
}

/// Does it, and if that fails does it as this user; the error is that of the first attempt.
///
/// # Errors
/// When neither succeeds.
pub fn or_as_user<T, E>(uid: Option<Uid>, attempt: impl Fn() -> Result<T, E>) -> Result<T, E> {
    attempt().or_else(|error| uid.and_then(|_| as_user(uid, &attempt).ok()).ok_or(error))
}

/// What the kernel changes together with the user of files.
struct Former {
    uid: nix::unistd::Uid,
    capabilities: rustix::io::Result<CapabilitySets>,
    dumpable: rustix::io::Result<DumpableBehavior>,
    death_signal: rustix::io::Result<Option<Signal>>,
}

impl Former {
    fn leave(uid: Uid) -> Former {
        Former {
            capabilities: thread::capabilities(None),
            dumpable: process::dumpable_behavior(),
            death_signal: process::parent_process_death_signal(),
            uid: setfsuid(nix::unistd::Uid::from_raw(uid.as_raw())),
        }
    }
}

impl Drop for Former {
    fn drop(&mut self) {
        setfsuid(self.uid);
        // Nothing here is more than it had, so nothing is refused, but for a value of "dumpable" that only the kernel sets,
        // and has set itself.
        let _ = self.capabilities.and_then(|sets| thread::set_capabilities(None, sets));
        let _ = self.dumpable.and_then(process::set_dumpable_behavior);
        let _ = self.death_signal.and_then(process::set_parent_process_death_signal);
    }
}

/// Whether a process of this identity may use a file so, asked by such a process: nobody else knows what modes, ACLs,
/// mounts and security modules come to. Forks: only for processes with one thread.
///
/// # Errors
/// EACCES when it may not; EPERM when this process can't take on the identity.
pub fn access(identity: &Identity, path: &Path, access: Access) -> io::Result<()> {
    const STEPS: [Step; 3] = [Step::Groups, Step::User, Step::Capabilities];
    let path = CString::new(path.as_os_str().as_bytes())?;
    let pid = child::fork(|| {
        let assumed = STEPS.into_iter().try_for_each(|step| identity.assume(step));
        let result =
            assumed.and_then(|()| rustix::fs::accessat(CWD, path.as_c_str(), access, AtFlags::EACCESS));
        // The kernel's numbers for errors that occur here are far below 256.
        result.map_or_else(rustix::io::Errno::raw_os_error, |()| 0)
    })?;
    match child::wait(pid)? {
        0 => Ok(()),
        errno => Err(io::Error::from_raw_os_error(errno)),
    }
}
