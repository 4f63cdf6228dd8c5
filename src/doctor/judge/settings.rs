//! Sysctls and limits against what the service asks for.

use reuseportd_core::Engine;

use crate::check::descriptors_wanted;
use crate::doctor::facts::Facts;
use crate::doctor::finding::{Finding, Level};
use crate::doctor::trials::Orphan;

pub(super) fn all(facts: &Facts) -> Vec<Finding> {
    vec![
        somaxconn(facts),
        max_syn_backlog(facts),
        abort_on_overflow(facts),
        migrate_req(facts),
        nofile(facts),
    ]
}

/// The command that sets a sysctl of the network.
pub(super) fn set(facts: &Facts, name: &str, value: u64) -> String {
    match facts.settings.are_read_only {
        false => format!("sysctl -w {name}={value}"),
        true => format!(
            "start the container with --sysctl {name}={value} (podman, docker); where it shares the machine's \
             network: sysctl -w {name}={value} out there"
        ),
    }
}

fn largest_backlog(facts: &Facts) -> u64 {
    facts.needs.listen.iter().map(|port| u64::from(port.backlog)).max().unwrap_or(0)
}

fn unseen(name: &'static str) -> Finding {
    Finding::bad(
        Level::Note,
        name,
        format!("{name} is not shown here"),
        "certainty about this setting",
        format!("sysctl {name}   # in the network namespace the service runs in"),
    )
}

fn somaxconn(facts: &Facts) -> Finding {
    const NAME: &str = "net.core.somaxconn";
    let Some(value) = facts.settings.somaxconn else { return unseen(NAME) };
    let backlog = largest_backlog(facts);
    if value >= backlog {
        return Finding::ok(NAME, format!("{value}, room for a backlog of {backlog}"));
    }
    Finding::bad(
        Level::Warning,
        NAME,
        format!("{value}: the kernel cuts the backlog of {backlog} to that, without a word"),
        "connections beyond it in a burst: clients send their SYN again after a second or more, or give up",
        set(facts, NAME, backlog),
    )
}

fn max_syn_backlog(facts: &Facts) -> Finding {
    const NAME: &str = "net.ipv4.tcp_max_syn_backlog";
    let Some(value) = facts.settings.tcp_max_syn_backlog else { return unseen(NAME) };
    let backlog = largest_backlog(facts);
    if value >= backlog {
        return Finding::ok(NAME, format!("{value}, room for a backlog of {backlog}"));
    }
    let remedy = set(facts, NAME, backlog);
    let found = format!("{value}, below the backlog of {backlog}");
    if facts.settings.tcp_syncookies == Some(0) {
        let lost = "half-open handshakes beyond three quarters of it: net.ipv4.tcp_syncookies is 0, so their SYNs are dropped";
        return Finding::bad(Level::Warning, NAME, found, lost, remedy);
    }
    let lost =
        "nothing while net.ipv4.tcp_syncookies is on; handshakes in a burst if it is ever switched off";
    Finding::bad(Level::Note, NAME, found, lost, remedy)
}

fn abort_on_overflow(facts: &Facts) -> Finding {
    const NAME: &str = "net.ipv4.tcp_abort_on_overflow";
    match facts.settings.tcp_abort_on_overflow {
        None => unseen(NAME),
        Some(0) => Finding::ok(NAME, "0: with a full queue clients are let to try again"),
        Some(value) => Finding::bad(
            Level::Warning,
            NAME,
            format!("{value}: a full queue resets connections"),
            "in a burst, connections that would be served a moment later",
            set(facts, NAME, 0),
        ),
    }
}

/// A net below the rope with `ebpf`, and the rope itself for killed unmodified workers with `cbpf`.
fn migrate_req(facts: &Facts) -> Finding {
    const NAME: &str = "net.ipv4.tcp_migrate_req";
    let is_needed = matches!(facts.engine, Ok((Engine::Cbpf | Engine::None, _)));
    let (level, lost) = match is_needed {
        true => (
            Level::Warning,
            "the queue of an unmodified worker that is killed, and counted; handover workers lose nothing",
        ),
        false => {
            (Level::Note, "a second net: with ebpf the steering program moves queues whatever this says")
        }
    };
    let remedy = set(facts, NAME, 1);
    match (facts.settings.tcp_migrate_req, &facts.trials.orphan) {
        (None, _) => {
            let remedy = "boot Linux 5.14 or later";
            Finding::bad(level, NAME, format!("this kernel has no {NAME}"), lost, remedy)
        }
        (Some(0), Orphan::Reset | Orphan::Untested(_)) => {
            Finding::bad(level, NAME, "0: the queue of a closing listener is reset", lost, remedy)
        }
        (Some(value), Orphan::Moved) => {
            Finding::ok(NAME, format!("{value}: tried, the queue of a closing listener moved to its sibling"))
        }
        (Some(value), Orphan::Reset) => {
            let found = format!("{value}, and yet the queue of a closing listener was reset when tried");
            Finding::bad(
                Level::Warning,
                NAME,
                found,
                lost,
                "update the kernel: it does not do what this setting says",
            )
        }
        (Some(value), Orphan::Untested(obstacle)) => {
            let found = format!("{value}; could not be tried: {}", obstacle.why);
            Finding::bad(Level::Note, NAME, found, "certainty that it works", obstacle.remedy)
        }
    }
}

fn nofile(facts: &Facts) -> Finding {
    const CHECK: &str = "nofile";
    let (workers, listeners) = (facts.needs.workers, facts.needs.listen.len());
    let wanted = descriptors_wanted(workers, listeners);
    match facts.nofile {
        Some(limit) if limit < wanted => Finding::bad(
            Level::Problem,
            CHECK,
            format!("{limit} open files at most, and an upgrade of {workers} workers may need {wanted}"),
            "upgrades, and respawns during one: the master runs out of descriptors",
            format!("ulimit -n {wanted}   # as root; under systemd: LimitNOFILE={wanted} in the unit"),
        ),
        Some(limit) => {
            Finding::ok(CHECK, format!("{limit} open files at most; {wanted} may be needed in an upgrade"))
        }
        None => Finding::ok(CHECK, "no limit of open files"),
    }
}
