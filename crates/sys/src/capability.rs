//! What this process and this kernel can do.

use rustix::thread::CapabilitySet;

fn has(capability: CapabilitySet) -> bool {
    rustix::thread::capabilities(None).is_ok_and(|sets| sets.effective.contains(capability))
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
