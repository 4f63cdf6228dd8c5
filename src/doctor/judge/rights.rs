//! What this process may do, against what the engine and the workers need.

use rustix::thread::CapabilitySet;

use super::settings::set;
use crate::config::{Bind, EngineChoice};
use crate::doctor::facts::{Facts, Port, Rights};
use crate::doctor::finding::{Finding, Level};
use crate::doctor::trials::Trial;

pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    let mut findings = vec![bpf(facts), sys_ptrace(facts), getfd(facts), net_admin(facts)];
    findings.extend(low_ports(facts));
    findings.push(unprivileged_bpf(facts));
    findings
}

/// What gives the program all it lacks: `setcap` replaces what a file had.
fn grant(facts: &Facts, needed: CapabilitySet) -> String {
    let Rights { program, bounds, bpf, sys_ptrace, net_bind_service, .. } = &facts.rights;
    let has_low_port = low_port(facts).is_some();
    let lacking = [
        ("bpf", CapabilitySet::BPF, !bpf),
        ("net_admin", CapabilitySet::NET_ADMIN, false),
        ("net_bind_service", CapabilitySet::NET_BIND_SERVICE, has_low_port && !net_bind_service),
        ("sys_ptrace", CapabilitySet::SYS_PTRACE, !sys_ptrace),
    ];
    let wanted = lacking.iter().find(|(_, capability, _)| *capability == needed);
    let name = wanted.map_or_else(String::new, |(name, ..)| name.to_uppercase());
    // A file with what is out of bounds could not even be executed.
    if !bounds.contains(needed) {
        return format!(
            "start the container with --cap-add {name} (podman, docker); under systemd: \
             CapabilityBoundingSet=CAP_{name} and AmbientCapabilities=CAP_{name} in the unit"
        );
    }
    let names: Vec<String> = lacking
        .iter()
        .filter(|(_, capability, lacks)| bounds.contains(*capability) && (*lacks || *capability == needed))
        .map(|(name, ..)| format!("cap_{name}"))
        .collect();
    format!(
        "setcap {}+ep {program}   # under systemd: AmbientCapabilities=CAP_{name} in the unit",
        names.join(",")
    )
}

fn bpf(facts: &Facts) -> Finding {
    const CHECK: &str = "cap_bpf";
    if facts.rights.bpf {
        return Finding::ok(CHECK, "CAP_BPF: steering programs may be loaded");
    }
    let (level, lost) = match facts.needs.engine {
        EngineChoice::Ebpf => (Level::Problem, "the configured engine: the master will not start"),
        EngineChoice::Auto => (
            Level::Warning,
            "the ebpf engine. With cbpf the queue of an unmodified worker that is killed is lost, and counted, \
             unless net.ipv4.tcp_migrate_req is 1",
        ),
        EngineChoice::Cbpf | EngineChoice::None => {
            (Level::Note, "nothing: the configured engine does without")
        }
    };
    Finding::bad(level, CHECK, "CAP_BPF is missing", lost, grant(facts, CapabilitySet::BPF))
}

fn sys_ptrace(facts: &Facts) -> Finding {
    const CHECK: &str = "cap_sys_ptrace";
    if facts.rights.sys_ptrace {
        return Finding::ok(CHECK, "CAP_SYS_PTRACE: listeners of any worker can be reached");
    }
    let needs = &facts.needs;
    let level = if needs.other_user && needs.reaches_for_listeners() { Level::Warning } else { Level::Note };
    Finding::bad(
        level,
        CHECK,
        "CAP_SYS_PTRACE is missing",
        "unmodified workers that run as another user, have more capabilities than the master, or whose executable it \
         can't read: their listeners can't be reached. Handover workers and bind = \"master\" need nothing",
        grant(facts, CapabilitySet::SYS_PTRACE),
    )
}

/// Unmodified workers stand and fall with this.
fn getfd(facts: &Facts) -> Finding {
    const CHECK: &str = "pidfd_getfd";
    const LOST: &str = "unmodified workers: the master can't reach their listeners. Handover workers and \
                        bind = \"master\" need nothing";
    let scope = facts.settings.ptrace_scope;
    let level = if facts.needs.reaches_for_listeners() { Level::Problem } else { Level::Note };
    match (&facts.rights.getfd, scope) {
        (Trial::Passed, None | Some(0 | 1)) => {
            Finding::ok(CHECK, "a descriptor of an own child was fetched, as from an unmodified worker")
        }
        (Trial::Passed, Some(scope)) => Finding::ok(
            CHECK,
            format!("a descriptor of an own child was fetched, although kernel.yama.ptrace_scope = {scope}"),
        ),
        (Trial::Failed(why), Some(2)) => Finding::bad(
            level,
            CHECK,
            format!("a descriptor of an own child can't be fetched ({why}): kernel.yama.ptrace_scope = 2"),
            LOST,
            "sysctl -w kernel.yama.ptrace_scope=1   # or give reuseportd CAP_SYS_PTRACE",
        ),
        (Trial::Failed(why), Some(3..)) => Finding::bad(
            level,
            CHECK,
            format!("a descriptor of an own child can't be fetched ({why}): kernel.yama.ptrace_scope = 3"),
            LOST,
            "set kernel.yama.ptrace_scope to 1 in /etc/sysctl.d and boot: 3 can't be undone at run time",
        ),
        (Trial::Failed(why), _) => Finding::bad(
            level,
            CHECK,
            format!("a descriptor of an own child can't be fetched ({why})"),
            LOST,
            "allow pidfd_open and pidfd_getfd: the seccomp profile of the container (docker's own does with \
             --cap-add SYS_PTRACE), SystemCallFilter= of the unit, or the security module in force",
        ),
        (Trial::Untested(obstacle), _) => Finding::bad(
            Level::Warning,
            CHECK,
            format!("not tested: {}", obstacle.why),
            "certainty that listeners of unmodified workers can be reached",
            obstacle.remedy,
        ),
    }
}

fn net_admin(facts: &Facts) -> Finding {
    const CHECK: &str = "cap_net_admin";
    if facts.rights.net_admin {
        return Finding::ok(CHECK, "CAP_NET_ADMIN");
    }
    let lost = "listen.force_reuseport; nothing else needs it";
    Finding::bad(Level::Note, CHECK, "CAP_NET_ADMIN is missing", lost, grant(facts, CapabilitySet::NET_ADMIN))
}

/// The lowest configured port an ordinary process may not bind.
fn low_port(facts: &Facts) -> Option<Port> {
    let first_free = facts.settings.first_free_port?;
    let low = |port: &&Port| u64::from(port.address.port()) < first_free;
    facts.needs.listen.iter().filter(low).min_by_key(|port| port.address.port()).copied()
}

fn low_ports(facts: &Facts) -> Option<Finding> {
    const CHECK: &str = "cap_net_bind_service";
    let Port { address, bind, .. } = low_port(facts)?;
    let port = address.port();
    if !facts.rights.net_bind_service {
        return Some(Finding::bad(
            Level::Problem,
            CHECK,
            format!("CAP_NET_BIND_SERVICE is missing, and port {port} is configured"),
            "the service: nobody can bind that port",
            set(facts, "net.ipv4.ip_unprivileged_port_start", u64::from(port)),
        ));
    }
    if bind == Bind::Worker && facts.needs.other_user && !facts.needs.user_binds_low_ports {
        return Some(Finding::bad(
            Level::Problem,
            CHECK,
            format!("workers run as app.user without CAP_NET_BIND_SERVICE, and bind port {port}"),
            "the service: no worker can bind that port",
            "app.capabilities = [\"CAP_NET_BIND_SERVICE\"] in the config",
        ));
    }
    Some(Finding::ok(CHECK, format!("CAP_NET_BIND_SERVICE: port {port} may be bound")))
}

/// The engine does not need it; whoever leaves it open should know.
fn unprivileged_bpf(facts: &Facts) -> Finding {
    const NAME: &str = "kernel.unprivileged_bpf_disabled";
    match facts.settings.unprivileged_bpf_disabled {
        Some(0) => Finding::bad(
            Level::Note,
            NAME,
            "0: any user may load some kinds of BPF program",
            "nothing of ours, which needs CAP_BPF either way; it widens what an attacker can reach",
            format!("sysctl -w {NAME}=2"),
        ),
        Some(value) => Finding::ok(NAME, format!("{value}: with CAP_BPF only, as the ebpf engine has it")),
        None => Finding::ok(NAME, "not shown here; the ebpf engine needs CAP_BPF either way"),
    }
}
