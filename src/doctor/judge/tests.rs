//! Every fault, made up.

use std::net::SocketAddr;

use reuseportd_core::Engine;
use rustix::thread::CapabilitySet;

use super::all;
use crate::config::{Bind, EngineChoice};
use crate::doctor::facts::{Facts, Needs, Port, Rights, Settings};
use crate::doctor::finding::{Finding, Level};
use crate::doctor::trials::{Obstacle, Orphan, Trial, Trials};
use crate::doctor::verdict::guarantees;

/// A machine on which nothing is amiss.
fn well() -> Facts {
    Facts {
        needs: Needs {
            config: None,
            engine: EngineChoice::Auto,
            workers: 4,
            other_user: false,
            user_binds_low_ports: false,
            listen: vec![port(8080, 4096), port(8443, 1024)],
        },
        kernel: "6.18.44-amd64".to_owned(),
        engine: Ok((Engine::Ebpf, "auto".to_owned())),
        rights: Rights {
            program: "/usr/bin/reuseportd".to_owned(),
            bpf: true,
            sys_ptrace: true,
            net_admin: true,
            net_bind_service: true,
            bounds: CapabilitySet::all(),
            getfd: Trial::Passed,
        },
        settings: Settings {
            are_read_only: false,
            somaxconn: Some(4096),
            tcp_max_syn_backlog: Some(4096),
            tcp_syncookies: Some(1),
            tcp_migrate_req: Some(1),
            tcp_abort_on_overflow: Some(0),
            first_free_port: Some(1024),
            unprivileged_bpf_disabled: Some(2),
            ptrace_scope: Some(1),
        },
        nofile: Some(1024),
        has_rcu_fix: Some(true),
        cgroup2: Some("/sys/fs/cgroup".to_owned()),
        force_reuseport: Ok(()),
        trials: Trials {
            steering: Trial::Passed,
            migration: Trial::Passed,
            wake_up: Trial::Passed,
            slot: Trial::Passed,
            order: Trial::Passed,
            orphan: Orphan::Moved,
        },
    }
}

fn port(port: u16, backlog: u32) -> Port {
    Port {
        address: SocketAddr::from(([0, 0, 0, 0], port)),
        backlog,
        bind: Bind::Worker,
        force_reuseport: false,
    }
}

fn cbpf(facts: &mut Facts) {
    facts.needs.engine = EngineChoice::Cbpf;
    facts.engine = Ok((Engine::Cbpf, "configured".to_owned()));
}

fn failed() -> Trial {
    Trial::Failed("it does something else".to_owned())
}

fn obstacle() -> Obstacle {
    Obstacle { why: "loopback is down".to_owned(), remedy: "ip link set lo up" }
}

/// What is not well after `break_it`, as check and level.
fn after(break_it: impl FnOnce(&mut Facts)) -> Vec<(&'static str, Level)> {
    let mut facts = well();
    break_it(&mut facts);
    let findings = all(&facts);
    let bad = findings.iter().filter(|finding| finding.level > Level::Ok);
    bad.inspect(|finding| assert!(is_complete(finding), "{finding:?}"))
        .map(|finding| (finding.check, finding.level))
        .collect()
}

fn is_complete(finding: &Finding) -> bool {
    let says = |text: &Option<String>| text.as_ref().is_some_and(|text| !text.is_empty());
    !finding.found.is_empty() && says(&finding.lost) && says(&finding.remedy)
}

#[test]
fn a_machine_without_faults_has_none_named() {
    assert_eq!(after(|_| {}), []);
    assert_eq!(after(cbpf), []);
    assert_eq!(after(|facts| facts.nofile = None), []);
}

#[test]
fn the_kernel() {
    let on = |release: &str| after(|facts| facts.kernel = release.to_owned());
    assert_eq!(on("5.14.0-427.el9.x86_64"), []);
    assert_eq!(on("5.13.19"), [("kernel", Level::Warning)]);
    assert_eq!(on("5.6"), [("kernel", Level::Warning)]);
    assert_eq!(on("5.4.0-150-generic"), [("kernel", Level::Problem)]);
    assert_eq!(on("4.19.0"), [("kernel", Level::Problem)]);
    assert_eq!(on(""), [("kernel", Level::Warning)]);
    let replace = "kernel.cbpf_replace";
    assert_eq!(after(|facts| facts.has_rcu_fix = Some(false)), [(replace, Level::Note)]);
    assert_eq!(after(|facts| facts.has_rcu_fix = None), [(replace, Level::Note)]);
    let unsafe_cbpf = after(|facts| {
        cbpf(facts);
        facts.has_rcu_fix = Some(false);
    });
    assert_eq!(unsafe_cbpf, [(replace, Level::Warning)]);
    assert_eq!(after(|facts| facts.cgroup2 = None), [("cgroup2", Level::Note)]);
    for (forced, level) in [(false, Level::Note), (true, Level::Problem)] {
        let without = after(|facts| {
            facts.needs.listen[1].force_reuseport = forced;
            facts.force_reuseport = Err("CAP_BPF is missing".to_owned());
        });
        assert_eq!(without, [("force_reuseport", level)]);
    }
    assert_eq!(after(|facts| facts.trials.wake_up = failed()), [("kernel.wake_up", Level::Warning)]);
}

#[test]
fn rights() {
    let without_bpf = |engine| {
        after(move |facts| {
            facts.rights.bpf = false;
            facts.needs.engine = engine;
        })
    };
    assert_eq!(without_bpf(EngineChoice::Auto), [("cap_bpf", Level::Warning)]);
    assert_eq!(without_bpf(EngineChoice::Cbpf), [("cap_bpf", Level::Note)]);
    assert_eq!(without_bpf(EngineChoice::Ebpf), [("cap_bpf", Level::Problem)]);
    assert_eq!(after(|facts| facts.rights.sys_ptrace = false), [("cap_sys_ptrace", Level::Note)]);
    assert_eq!(after(|facts| facts.rights.net_admin = false), [("cap_net_admin", Level::Note)]);
    let low = |may| {
        after(move |facts| {
            facts.needs.listen[0] = port(80, 128);
            facts.rights.net_bind_service = may;
        })
    };
    assert_eq!(low(false), [("cap_net_bind_service", Level::Problem)]);
    assert_eq!(low(true), []);
    let as_user = |bind, keeps| {
        after(move |facts| {
            facts.needs.listen[0] = Port { bind, ..port(80, 128) };
            (facts.needs.other_user, facts.needs.user_binds_low_ports) = (true, keeps);
        })
    };
    assert_eq!(as_user(Bind::Worker, false), [("cap_net_bind_service", Level::Problem)]);
    assert_eq!(as_user(Bind::Worker, true), []);
    assert_eq!(as_user(Bind::Master, false), []);
    let other_user = after(|facts| (facts.rights.sys_ptrace, facts.needs.other_user) = (false, true));
    assert_eq!(other_user, [("cap_sys_ptrace", Level::Warning)]);
    let open = after(|facts| facts.settings.unprivileged_bpf_disabled = Some(0));
    assert_eq!(open, [("kernel.unprivileged_bpf_disabled", Level::Note)]);
}

#[test]
fn reaching_unmodified_workers() {
    for (scope, remedy) in [(None, "seccomp"), (Some(1), "seccomp"), (Some(2), "=1"), (Some(3), "boot")] {
        let mut facts = well();
        facts.rights.getfd = Trial::Failed("EPERM".to_owned());
        facts.settings.ptrace_scope = scope;
        let findings = all(&facts);
        let bad: Vec<_> = findings.iter().filter(|finding| finding.level > Level::Ok).collect();
        assert_eq!((bad.len(), bad[0].check, bad[0].level), (1, "pidfd_getfd", Level::Problem));
        assert!(bad[0].remedy.as_ref().unwrap().contains(remedy), "{scope:?}: {:?}", bad[0].remedy);
        assert_eq!(guarantees(&facts)[1].upgrade, "can't be run here");
    }
    let by_master = after(|facts| {
        facts.rights.getfd = Trial::Failed("EPERM".to_owned());
        facts.needs.listen.iter_mut().for_each(|port| port.bind = Bind::Master);
    });
    assert_eq!(by_master, [("pidfd_getfd", Level::Note)]);
    let untested = after(|facts| facts.rights.getfd = Trial::Untested(obstacle()));
    assert_eq!(untested, [("pidfd_getfd", Level::Warning)]);
}

#[test]
fn settings_against_the_config() {
    assert_eq!(after(|f| f.settings.somaxconn = Some(4095)), [("net.core.somaxconn", Level::Warning)]);
    let syn = "net.ipv4.tcp_max_syn_backlog";
    assert_eq!(after(|f| f.settings.tcp_max_syn_backlog = Some(256)), [(syn, Level::Note)]);
    let without_cookies = after(|facts| {
        facts.settings.tcp_max_syn_backlog = Some(256);
        facts.settings.tcp_syncookies = Some(0);
    });
    assert_eq!(without_cookies, [(syn, Level::Warning)]);
    let overflow = "net.ipv4.tcp_abort_on_overflow";
    assert_eq!(after(|f| f.settings.tcp_abort_on_overflow = Some(1)), [(overflow, Level::Warning)]);
    // 64 + 2 generations * 4 workers * (4 + 2 listeners)
    assert_eq!(after(|f| f.nofile = Some(112)), []);
    assert_eq!(after(|f| f.nofile = Some(111)), [("nofile", Level::Problem)]);
    assert_eq!(after(|f| f.settings.somaxconn = None), [("net.core.somaxconn", Level::Note)]);
}

#[test]
fn tcp_migrate_req_counts_where_cbpf_steers() {
    let name = "net.ipv4.tcp_migrate_req";
    let off = |facts: &mut Facts| {
        facts.settings.tcp_migrate_req = Some(0);
        facts.trials.orphan = Orphan::Reset;
    };
    assert_eq!(after(off), [(name, Level::Note)]);
    let off_cbpf = |facts: &mut Facts| {
        off(facts);
        cbpf(facts);
    };
    assert_eq!(after(off_cbpf), [(name, Level::Warning)]);
    assert_eq!(after(|facts| facts.trials.orphan = Orphan::Reset), [(name, Level::Warning)], "it lies");
    assert_eq!(after(|facts| facts.trials.orphan = Orphan::Untested(obstacle())), [(name, Level::Note)]);
    assert_eq!(after(|facts| facts.settings.tcp_migrate_req = None), [(name, Level::Note)]);
}

#[test]
fn a_failing_self_test_counts_where_its_engine_steers() {
    type Break = fn(&mut Facts, Trial);
    let tests: [(&str, Break, Engine); 4] = [
        ("ebpf.steering", |facts, trial| facts.trials.steering = trial, Engine::Ebpf),
        ("ebpf.migration", |facts, trial| facts.trials.migration = trial, Engine::Ebpf),
        ("cbpf.slot", |facts, trial| facts.trials.slot = trial, Engine::Cbpf),
        ("cbpf.order", |facts, trial| facts.trials.order = trial, Engine::Cbpf),
    ];
    for (check, break_it, of) in tests {
        for engine in [Engine::Ebpf, Engine::Cbpf] {
            let with = |trial: Trial| {
                after(|facts| {
                    facts.needs.engine = EngineChoice::Cbpf;
                    facts.engine = Ok((engine, String::new()));
                    break_it(facts, trial);
                })
            };
            let is_in_force = engine == of;
            let level = if is_in_force { Level::Problem } else { Level::Note };
            assert_eq!(with(failed()), [(check, level)], "{engine:?}");
            let level = if is_in_force { Level::Warning } else { Level::Note };
            assert_eq!(with(Trial::Untested(obstacle())), [(check, level)], "{engine:?}");
        }
    }
}

#[test]
fn the_engine() {
    assert_eq!(after(|facts| facts.engine = Err("no".to_owned())), [("engine", Level::Problem)]);
    assert_eq!(after(|facts| facts.engine = Ok((Engine::None, String::new()))), [("engine", Level::Problem)]);
    // `auto` has CAP_BPF and yet takes cbpf: bpf(2) is blocked.
    assert_eq!(after(|facts| facts.engine = Ok((Engine::Cbpf, String::new()))), [("engine", Level::Warning)]);
}

#[test]
fn what_a_container_withholds_is_given_at_its_start() {
    let remedy = |facts: &Facts, check: &str| {
        let findings = all(facts);
        let finding = findings.iter().find(|finding| finding.check == check).unwrap();
        finding.remedy.clone().unwrap()
    };
    let mut facts = well();
    (facts.rights.bpf, facts.rights.sys_ptrace) = (false, false);
    facts.rights.bounds.remove(CapabilitySet::SYS_PTRACE);
    let ptrace = remedy(&facts, "cap_sys_ptrace");
    assert!(ptrace.starts_with("start the container with --cap-add SYS_PTRACE "), "{ptrace}");
    let bpf = remedy(&facts, "cap_bpf");
    assert!(bpf.starts_with("setcap cap_bpf+ep /usr/bin/reuseportd "), "{bpf}");

    facts.settings.somaxconn = Some(128);
    assert_eq!(remedy(&facts, "net.core.somaxconn"), "sysctl -w net.core.somaxconn=4096");
    facts.settings.are_read_only = true;
    let sysctl = remedy(&facts, "net.core.somaxconn");
    assert!(sysctl.starts_with("start the container with --sysctl net.core.somaxconn=4096 "), "{sysctl}");
}

#[test]
fn one_setcap_gives_all_that_is_lacking() {
    let mut facts = well();
    (facts.rights.bpf, facts.rights.sys_ptrace, facts.rights.net_bind_service) = (false, false, false);
    facts.needs.listen[0] = port(443, 128);
    let findings = all(&facts);
    let bpf = findings.iter().find(|finding| finding.check == "cap_bpf").unwrap();
    let command = "setcap cap_bpf,cap_net_bind_service,cap_sys_ptrace+ep /usr/bin/reuseportd ";
    assert!(bpf.remedy.as_ref().unwrap().starts_with(command), "{bpf:?}");
}

#[test]
fn guarantees_follow_engine_and_kernel() {
    let killed = |change: fn(&mut Facts)| {
        let mut facts = well();
        change(&mut facts);
        let all = guarantees(&facts);
        let [handover, unmodified, by_master] = &all[..] else { panic!("{all:?}") };
        assert_eq!((by_master.upgrade, by_master.worker_killed), (handover.upgrade, handover.worker_killed));
        assert_eq!((handover.workers, unmodified.workers), ("handover", "unmodified"));
        (unmodified.upgrade, handover.worker_killed, unmodified.worker_killed)
    };
    let held = "0 beyond what it held";
    assert_eq!(killed(|_| {}), ("0", held, held));
    assert_eq!(killed(cbpf), ("0", held, held), "tcp_migrate_req is on");
    let counted = "its queue, counted";
    let off = |facts: &mut Facts| {
        cbpf(facts);
        facts.trials.orphan = Orphan::Reset;
    };
    assert_eq!(killed(off), ("0", held, counted));
    assert_eq!(killed(|facts| facts.trials.migration = failed()).2, counted);
    assert_ne!(killed(|facts| facts.trials.steering = failed()).0, "0");
    let mut refused = well();
    refused.engine = Err("no".to_owned());
    assert!(guarantees(&refused).is_empty());
}
