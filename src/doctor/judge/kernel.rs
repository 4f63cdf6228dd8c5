//! The kernel: its version and its known faults.

use reuseportd_core::Engine;

use crate::doctor::facts::Facts;
use crate::doctor::finding::{Finding, Level};

/// Fetching descriptors of other processes.
const GETFD: (u32, u32) = (5, 6);
/// Programs that choose where a closing listener's queue goes.
const MIGRATION: (u32, u32) = (5, 14);

pub(super) fn version(facts: &Facts) -> Finding {
    const CHECK: &str = "kernel";
    let release = &facts.kernel;
    let Some(version) = parse(release) else {
        let found = format!("cannot tell the kernel's version from {release:?}");
        return Finding::bad(Level::Warning, CHECK, found, "nothing, if it is 5.14 or later", "uname -r");
    };
    if version < GETFD {
        let found = format!("Linux {release}; 5.6 is the least");
        let lost = "unmodified workers can't be run (no pidfd_getfd), and nobody has tried the rest";
        return Finding::bad(Level::Problem, CHECK, found, lost, "boot Linux 5.14 or later");
    }
    if version < MIGRATION {
        let found = format!("Linux {release}; the full promise needs 5.14");
        let lost = "the ebpf engine: no queue moves when a listener closes. With cbpf the queue of an unmodified \
                    worker that is killed is lost, and counted";
        return Finding::bad(Level::Warning, CHECK, found, lost, "boot Linux 5.14 or later");
    }
    Finding::ok(CHECK, format!("Linux {release} (5.14 or later)"))
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map(str::parse);
    Some((numbers.next()?.ok()?, numbers.next()?.ok()?))
}

/// The use-after-free when a classic program is replaced.
pub(super) fn classic_program(facts: &Facts) -> Finding {
    const CHECK: &str = "kernel.cbpf_replace";
    let level = match facts.engine {
        Ok((Engine::Cbpf, _)) => Level::Warning,
        _ => Level::Note,
    };
    match facts.has_rcu_fix {
        Some(true) => Finding::ok(CHECK, "a classic steering program can be replaced safely under traffic"),
        Some(false) => Finding::bad(
            level,
            CHECK,
            "this kernel frees a replaced classic steering program too early (fixed by upstream commit \
             18fc650ccd7f and in stable kernels since June 2026)",
            "with cbpf an upgrade under traffic can crash the machine; ebpf is not affected",
            "install a kernel with the fix, or give reuseportd CAP_BPF so that it takes ebpf",
        ),
        None => Finding::bad(
            Level::Note,
            CHECK,
            "the kernel's symbols are hidden here: cannot tell whether a classic steering program can be replaced safely",
            "certainty; ebpf is not affected",
            "grep -c sk_reuseport_prog_free_rcu /proc/kallsyms   # as root; 0: install a kernel of June 2026 or later",
        ),
    }
}

pub(super) fn cgroup2(facts: &Facts) -> Finding {
    const CHECK: &str = "cgroup2";
    match &facts.cgroup2 {
        Some(place) => Finding::ok(CHECK, format!("cgroup v2 is mounted on {place}")),
        None => Finding::bad(
            Level::Note,
            CHECK,
            "cgroup v2 is not mounted",
            "listen.force_reuseport, which needs it",
            "mkdir -p /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified",
        ),
    }
}

pub(super) fn force_reuseport(facts: &Facts) -> Finding {
    const CHECK: &str = "force_reuseport";
    let level = match facts.needs.listen.iter().any(|port| port.force_reuseport) {
        true => Level::Problem,
        false => Level::Note,
    };
    match &facts.force_reuseport {
        Ok(()) => Finding::ok(CHECK, "tried: bind() in a cgroup sets SO_REUSEPORT for programs that don't"),
        Err(why) => Finding::bad(
            level,
            CHECK,
            format!("tried and failed: {why}"),
            "listen.force_reuseport: a program that sets SO_REUSEPORT itself does not need it",
            "reuseportd doctor   # again, as root, with a cgroup v2 that can be written to, on Linux 6.1 or later",
        ),
    }
}
