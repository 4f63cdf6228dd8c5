//! What this process and this kernel can do.

use std::io;

use rustix::thread::{self, CapabilitySet, CapabilitySets};

fn has(capability: CapabilitySet) -> bool {
    thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
}

/// Whether BPF maps and programs may be made (CAP_BPF, or CAP_SYS_ADMIN which includes it).
#[must_use]
pub fn has_bpf() -> bool {
    has(CapabilitySet::BPF) || has(CapabilitySet::SYS_ADMIN)
}

/// Whether CAP_NET_ADMIN is effective.
#[must_use]
pub fn has_net_admin() -> bool {
    has(CapabilitySet::NET_ADMIN)
}

/// Whether CAP_SYS_PTRACE is effective: descriptors of workers of other users can be taken.
#[must_use]
pub fn has_sys_ptrace() -> bool {
    has(CapabilitySet::SYS_PTRACE)
}

/// The running kernel's release, as `uname -r` says it; empty without /proc.
#[must_use]
pub fn kernel_release() -> String {
    crate::procfs::sysctl("kernel.osrelease").unwrap_or_default()
}

/// Every capability, those of later kernels included.
pub const ALL: CapabilitySet = CapabilitySet::from_bits_retain(u64::MAX);

/// The capabilities that any program this process executes has as well, without being root: the ambient ones, and for
/// a program whose file says so the inheritable ones.
///
/// # Errors
/// When the kernel does not tell.
pub fn passed_on() -> io::Result<CapabilitySet> {
    let inheritable = thread::capabilities(None)?.inheritable;
    let each = (0..u64::BITS).map(|bit| CapabilitySet::from_bits_retain(1 << bit));
    // What the kernel does not know nobody has.
    let ambient = each.filter(|one| thread::capability_is_in_ambient_set(*one).unwrap_or(false));
    Ok(ambient.fold(inheritable, |all, one| all | one))
}

/// Gives up all capabilities but these, and of these uses only some (the others it can pass on). What was given up only
/// another program can bring back: root's from the bounding set, which is left as it is. For processes with one thread.
/// Says what was given up.
///
/// # Errors
/// When the kernel refuses, which none does but by a system call filter.
pub fn keep(kept: CapabilitySet, used: CapabilitySet) -> io::Result<CapabilitySet> {
    let own = thread::capabilities(None)?;
    let sets = CapabilitySets {
        permitted: own.permitted & kept,
        effective: own.effective & kept & used,
        // Ambient ones go with them.
        inheritable: own.inheritable & kept,
    };
    thread::set_capabilities(None, sets)?;
    Ok(own.permitted - sets.permitted)
}

/// Gives up all.
///
/// # Errors
/// The same.
pub fn keep_none() -> io::Result<()> {
    keep(CapabilitySet::empty(), CapabilitySet::empty()).map(drop)
}
