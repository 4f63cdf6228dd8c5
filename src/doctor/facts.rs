//! What is looked at. Plain data, so that every fault can be made up in a test.

use std::net::SocketAddr;
use std::path::PathBuf;

use reuseportd_core::Engine;
use reuseportd_sys::{capability, cbpf, limits, procfs};
use rustix::fs::StatVfsMountFlags;
use rustix::process::{Resource, getrlimit};
use rustix::thread::{CapabilitySet, capability_is_in_bounding_set};

use super::trials::{Trial, Trials};
use crate::config::{Bind, Config, EngineChoice};
use crate::{force, master};

/// Everything the findings are made of.
#[derive(Debug, Clone)]
pub(super) struct Facts {
    pub(super) needs: Needs,
    /// As `uname -r` says it.
    pub(super) kernel: String,
    /// What a start with this config would take, and why; or why it can't.
    pub(super) engine: Result<(Engine, String), String>,
    pub(super) rights: Rights,
    pub(super) settings: Settings,
    /// Hard limit of open descriptors; none is unlimited.
    pub(super) nofile: Option<u64>,
    /// Whether replacing a classic program is safe; none when the kernel's symbols are hidden.
    pub(super) has_rcu_fix: Option<bool>,
    /// Where cgroup v2 is mounted.
    pub(super) cgroup2: Option<String>,
    /// `bind()` in a cgroup of ours sets SO_REUSEPORT; or why it doesn't.
    pub(super) force_reuseport: Result<(), String>,
    pub(super) trials: Trials,
}

/// What the service asks of the machine.
#[derive(Debug, Clone)]
pub(super) struct Needs {
    pub(super) config: Option<PathBuf>,
    pub(super) engine: EngineChoice,
    pub(super) workers: u16,
    /// Workers run as another user than the master.
    pub(super) other_user: bool,
    /// As that user they keep CAP_NET_BIND_SERVICE.
    pub(super) user_binds_low_ports: bool,
    pub(super) listen: Vec<Port>,
}

/// A `[[listen]]`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Port {
    pub(super) address: SocketAddr,
    pub(super) backlog: u32,
    pub(super) bind: Bind,
    pub(super) force_reuseport: bool,
}

/// What this process may do.
#[derive(Debug, Clone)]
pub(super) struct Rights {
    /// Path of this program, for commands that give it rights.
    pub(super) program: String,
    pub(super) bpf: bool,
    pub(super) sys_ptrace: bool,
    pub(super) net_admin: bool,
    pub(super) net_bind_service: bool,
    /// Capabilities that this process and what it executes can have at all.
    pub(super) bounds: CapabilitySet,
    /// A descriptor fetched from a child of our own.
    pub(super) getfd: Trial,
}

/// Sysctls; none where the kernel doesn't have it or doesn't show it.
#[derive(Debug, Clone, Default)]
pub(super) struct Settings {
    /// They can't be set from in here, as in a container.
    pub(super) are_read_only: bool,
    pub(super) somaxconn: Option<u64>,
    pub(super) tcp_max_syn_backlog: Option<u64>,
    pub(super) tcp_syncookies: Option<u64>,
    pub(super) tcp_migrate_req: Option<u64>,
    pub(super) tcp_abort_on_overflow: Option<u64>,
    pub(super) first_free_port: Option<u64>,
    pub(super) unprivileged_bpf_disabled: Option<u64>,
    /// `kernel.yama.ptrace_scope`.
    pub(super) ptrace_scope: Option<u64>,
}

impl Default for Needs {
    /// What a config says that says nothing about it.
    fn default() -> Self {
        let workers = std::thread::available_parallelism().map_or(1, usize::from);
        Needs {
            config: None,
            engine: EngineChoice::Auto,
            workers: u16::try_from(workers).unwrap_or(u16::MAX),
            other_user: false,
            user_binds_low_ports: false,
            listen: vec![Port {
                address: SocketAddr::from(([0, 0, 0, 0], 8080)),
                backlog: 4096,
                bind: Bind::Worker,
                force_reuseport: false,
            }],
        }
    }
}

impl Needs {
    pub(super) fn of_config(config: &Config) -> Needs {
        let listen = config.listen.iter().map(|listen| Port {
            address: listen.address,
            backlog: listen.backlog,
            bind: listen.bind,
            force_reuseport: listen.force_reuseport,
        });
        Needs {
            config: Some(config.path.clone()),
            engine: config.steering.engine,
            workers: config.app.workers,
            other_user: config.app.identity.uid.is_some(),
            user_binds_low_ports: config.app.identity.capabilities.contains(CapabilitySet::NET_BIND_SERVICE),
            listen: listen.collect(),
        }
    }

    /// Whether the master has to reach for listeners of workers that know nothing of it.
    pub(super) fn reaches_for_listeners(&self) -> bool {
        self.listen.iter().any(|port| port.bind == Bind::Worker)
    }
}

impl Facts {
    /// Looks and tries; nothing in use is touched.
    pub(super) fn gather(needs: Needs) -> Facts {
        // As a start does. Where it is refused the tests say that descriptors ran out.
        let _ = limits::raise_nofile();
        let engine = master::choose(needs.engine)
            .map(|choice| (choice.engine, choice.reason))
            .map_err(|error| error.to_string());
        Facts {
            needs,
            kernel: capability::kernel_release(),
            engine,
            rights: Rights::gather(),
            settings: Settings::gather(),
            nofile: getrlimit(Resource::Nofile).maximum,
            has_rcu_fix: cbpf::has_rcu_fix(),
            cgroup2: cgroup2(),
            force_reuseport: force::try_here().map_err(|error| error.to_string()),
            trials: Trials::run(),
        }
    }
}

impl Rights {
    fn gather() -> Rights {
        let effective = rustix::thread::capabilities(None).map(|sets| sets.effective);
        let effective = effective.unwrap_or(CapabilitySet::empty());
        let program = std::env::current_exe().map(|path| path.display().to_string());
        Rights {
            program: program.unwrap_or_else(|_| "reuseportd".to_owned()),
            bpf: capability::has_bpf(),
            sys_ptrace: capability::has_sys_ptrace(),
            net_admin: capability::has_net_admin(),
            net_bind_service: effective.contains(CapabilitySet::NET_BIND_SERVICE),
            bounds: bounds(),
            getfd: super::trials::getfd(),
        }
    }
}

impl Settings {
    fn gather() -> Settings {
        let number = |name: &str| procfs::sysctl(name)?.trim().parse().ok();
        let mount = rustix::fs::statvfs("/proc/sys");
        Settings {
            are_read_only: mount.is_ok_and(|mount| mount.f_flag.contains(StatVfsMountFlags::RDONLY)),
            somaxconn: number("net.core.somaxconn"),
            tcp_max_syn_backlog: number("net.ipv4.tcp_max_syn_backlog"),
            tcp_syncookies: number("net.ipv4.tcp_syncookies"),
            tcp_migrate_req: number("net.ipv4.tcp_migrate_req"),
            tcp_abort_on_overflow: number("net.ipv4.tcp_abort_on_overflow"),
            first_free_port: number("net.ipv4.ip_unprivileged_port_start"),
            unprivileged_bpf_disabled: number("kernel.unprivileged_bpf_disabled"),
            ptrace_scope: number("kernel.yama.ptrace_scope"),
        }
    }
}

/// Of those that matter here.
fn bounds() -> CapabilitySet {
    use CapabilitySet as Set;
    let all = [Set::BPF, Set::NET_ADMIN, Set::NET_BIND_SERVICE, Set::SYS_PTRACE];
    // A kernel that does not know a capability does not give it either.
    all.into_iter().filter(|one| capability_is_in_bounding_set(*one).unwrap_or(false)).collect()
}

fn cgroup2() -> Option<String> {
    let mounts = std::fs::read_to_string("/proc/self/mounts").ok()?;
    let mut mounts = mounts.lines().map(|line| line.split(' ').collect::<Vec<_>>());
    mounts.find(|fields| fields.get(2) == Some(&"cgroup2"))?.get(1).map(|place| (*place).to_owned())
}
