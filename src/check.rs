//! `reuseportd check`: would this config run on this machine? Looks, and touches nothing in use.

use std::fmt::Write;
use std::io::ErrorKind;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use nix::sys::resource::{Resource, getrlimit};
use reuseportd_sys::procfs;
use reuseportd_wire::status::Protocol;
use rustix::fs::{Access, AtFlags, CWD, accessat};
use rustix::thread::CapabilitySet;
use socket2::{Domain, Socket, Type};

use crate::client::text::escape_lines;
use crate::config::{self, Config, Entry};
use crate::{client, force, unix_file};

/// What was found: errors stop a start, warnings cost something.
#[derive(Debug, Default)]
struct Findings {
    errors: Vec<String>,
    warnings: Vec<String>,
}

/// Prints findings on stderr and, when all is well, a summary on stdout. Exit code 2 for an invalid config, 1 when
/// this machine can't run it, else 0.
pub(crate) fn run(path: &Path) -> ExitCode {
    let config = match config::load(path) {
        Ok(config) => config,
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(2);
        }
    };
    let mut findings = Findings::default();
    let programs = check_programs(&config, &mut findings);
    check_listen(&config, &mut findings);
    check_unix(&config, &mut findings);
    if config.listen.iter().any(|listen| listen.force_reuseport)
        && let Err(error) = force::try_here()
    {
        findings.errors.push(format!("listen.force_reuseport: {error}"));
    }
    check_limits(&config, &mut findings);
    check_control(&config.control.socket, &mut findings);
    for warning in &findings.warnings {
        eprintln!("warning: {}", escape_lines(warning));
    }
    for error in &findings.errors {
        eprintln!("error: {}", escape_lines(error));
    }
    if !findings.errors.is_empty() {
        return ExitCode::FAILURE;
    }
    // A reader that has seen enough (`| head -1`) is no failure of the check.
    let _ = std::io::Write::write_all(&mut std::io::stdout(), summary(path, &config, &programs).as_bytes());
    ExitCode::SUCCESS
}

/// Where the programs are, for the summary.
#[derive(Debug, Default)]
struct Programs {
    command: PathBuf,
    check: Option<PathBuf>,
}

fn check_programs(config: &Config, findings: &mut Findings) -> Programs {
    if let Err(error) = config.app.check_identity() {
        findings.errors.push(error.to_string());
        return Programs::default();
    }
    if let Some(directory) = &config.app.working_directory {
        let searchable = config.app.access(directory, Access::EXEC_OK);
        if !directory.is_dir() {
            findings.errors.push(format!("app.working_directory: {} is no directory", directory.display()));
        } else if let Err(error) = searchable {
            findings
                .errors
                .push(format!("app.working_directory: cannot enter {}: {error}", directory.display()));
        }
    }
    let variables = config.app.variables().unwrap_or_else(|error| {
        findings.errors.push(format!("app.environment_file: {error}"));
        config.app.environment.clone()
    });
    let command = config::find_executable(&config.app, &variables).unwrap_or_else(|error| {
        findings.errors.push(format!("app.command: {error}"));
        PathBuf::new()
    });
    let check = config::find_check(config, &variables).unwrap_or_else(|error| {
        findings.errors.push(format!("upgrade.check: {error}"));
        None
    });
    Programs { command, check }
}

fn check_listen(config: &Config, findings: &mut Findings) {
    let first_free_port = sysctl("net/ipv4/ip_unprivileged_port_start");
    let identity = &config.app.identity;
    let bind_service = identity.capabilities.contains(CapabilitySet::NET_BIND_SERVICE)
        || identity.uid.is_none()
            && rustix::thread::capabilities(None)
                .is_ok_and(|sets| sets.effective.contains(CapabilitySet::NET_BIND_SERVICE));
    let queue_max = sysctl("net/core/somaxconn");
    for listen in &config.listen {
        let (name, address) = (&listen.name, listen.address);
        if let Err(error) = probe_address(address, listen.protocol) {
            let remedy = match error.kind() {
                ErrorKind::AddrNotAvailable => {
                    ": no interface here has it (ip address; or sysctl net.ipv4.ip_nonlocal_bind)"
                }
                _ => "",
            };
            findings.errors.push(format!("listen {name:?}: cannot bind {}: {error}{remedy}", address.ip()));
        }
        if first_free_port.is_some_and(|first| u64::from(address.port()) < first) && !bind_service {
            findings.warnings.push(format!(
                "listen {name:?}: port {} needs CAP_NET_BIND_SERVICE, which workers lack: set app.capabilities \
                 (or: sysctl -w net.ipv4.ip_unprivileged_port_start={})",
                address.port(),
                address.port(),
            ));
        }
        if listen.protocol == Protocol::Tcp {
            check_backlog(name, listen.backlog, queue_max, findings);
        }
    }
    for listen in &config.unix {
        check_backlog(&listen.name, listen.backlog, queue_max, findings);
    }
}

fn check_backlog(name: &str, backlog: u32, queue_max: Option<u64>, findings: &mut Findings) {
    if let Some(max) = queue_max.filter(|max| *max < u64::from(backlog)) {
        findings.warnings.push(format!(
            "listen {name:?}: the kernel cuts backlog {backlog} to {max} (sysctl -w net.core.somaxconn={backlog})"
        ));
    }
}

/// What a start would refuse; a socket of the running app's own is no obstacle, nor one that systemd holds for it.
fn check_unix(config: &Config, findings: &mut Findings) {
    for listen in &config.unix {
        let address = Entry::Unix(listen).address();
        let is_ours = || {
            let held = procfs::socket_inodes(1).unwrap_or_default();
            if unix_file::listening(&listen.path).iter().any(|inode| held.iter().any(|(_, of)| of == inode)) {
                return true;
            }
            let status = client::status_at(&config.control.socket);
            status.is_ok_and(|status| status.listeners.iter().any(|listener| listener.address == address))
        };
        if let Err(error) = unix_file::check(listen, is_ours) {
            findings.errors.push(error.to_string());
        }
    }
}

/// Binds the address with a port the kernel chooses, so that no socket in use is met.
fn probe_address(mut address: SocketAddr, protocol: Protocol) -> std::io::Result<()> {
    address.set_port(0);
    let kind = match protocol {
        Protocol::Tcp => Type::STREAM,
        Protocol::Udp => Type::DGRAM,
    };
    Socket::new(Domain::for_address(address), kind, None)?.bind(&address.into())
}

fn check_limits(config: &Config, findings: &mut Findings) {
    let may_raise = rustix::thread::capabilities(None)
        .is_ok_and(|sets| sets.effective.contains(CapabilitySet::SYS_RESOURCE));
    for (resource, wanted) in &config.app.limits {
        if let Ok((_, hard)) = getrlimit(*resource)
            && *wanted > hard
            && !may_raise
        {
            let name = format!("{resource:?}").replace("RLIMIT_", "").to_lowercase();
            findings.warnings.push(format!(
                "app.limits.{name}: {wanted} is above the hard limit {hard} of this process \
                 (ulimit -H; LimitNOFILE= and its like in the unit)"
            ));
        }
    }
    let wanted = descriptors_wanted(config.app.workers, config.listen.len() + config.unix.len());
    if let Ok((_, hard)) = getrlimit(Resource::RLIMIT_NOFILE)
        && hard < wanted
    {
        findings.warnings.push(format!(
            "the master may need {wanted} file descriptors in an upgrade, \
             and the hard limit is {hard} (ulimit -Hn, LimitNOFILE=)"
        ));
    }
}

/// Descriptors the master may need in an upgrade: two generations, each worker with a few of them and a handle of each
/// of its listeners.
pub(crate) fn descriptors_wanted(workers: u16, listeners: usize) -> u64 {
    64 + 2 * u64::from(workers) * (4 + listeners as u64)
}

/// The directory is there and writable, or the nearest one above it is, so that it can be made.
fn check_control(socket: &Path, findings: &mut Findings) {
    let Some(nearest) = socket.ancestors().skip(1).find(|directory| directory.exists()) else { return };
    let writable = accessat(CWD, nearest, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS);
    let cause = match writable {
        _ if !nearest.is_dir() => "not a directory".to_owned(),
        Ok(()) => return,
        Err(error) => error.to_string(),
    };
    findings.errors.push(format!(
        "control.socket: cannot create {}: {}: {cause} (set control.socket to a place this user may write)",
        socket.display(),
        nearest.display()
    ));
}

fn sysctl(name: &str) -> Option<u64> {
    std::fs::read_to_string(Path::new("/proc/sys").join(name)).ok()?.trim().parse().ok()
}

fn summary(path: &Path, config: &Config, programs: &Programs) -> String {
    let line = |program: &Path, argv: &[String]| {
        let arguments = argv.iter().skip(1).map(|word| format!(" {word:?}"));
        format!("{}{}", program.display(), arguments.collect::<String>())
    };
    let mut text = format!("{}: ok\n", path.display());
    // Writing to a String can't fail.
    let _ = writeln!(text, "  app      {}", config.app.name);
    let _ = writeln!(text, "  workers  {}", config.app.workers);
    let _ = writeln!(text, "  command  {}", line(&programs.command, &config.expand_command(1, 0)));
    if let Some(check) = &programs.check {
        let _ = writeln!(text, "  check    {}", line(check, &config.expand_check(1)));
    }
    for entry in config.listeners().in_order() {
        let how = match entry {
            Entry::Ip(listen) if listen.protocol == Protocol::Udp => "udp".to_owned(),
            Entry::Ip(listen) => format!("backlog {}", listen.backlog),
            Entry::Unix(listen) => format!("mode {:04o}, backlog {}", listen.mode, listen.backlog),
        };
        let _ = writeln!(text, "  listen   {} {} ({how})", entry.name(), entry.address());
    }
    let _ = writeln!(text, "  control  {}", config.control.socket.display());
    escape_lines(&text) + "\n"
}
