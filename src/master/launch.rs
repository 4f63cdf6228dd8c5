//! What a generation is started from, and the starting of one worker.

use std::cell::OnceCell;
use std::collections::BTreeMap;
use std::ffi::{CString, NulError, OsStr, OsString};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::rc::Rc;

use nix::sys::resource::Resource;
use reuseportd_core::{Engine, Generation, GroupId, Seat, WorkerId};
use reuseportd_sys::bpf::{BpfError, bind::Rule};
use reuseportd_sys::child::{self, Limit, SpawnSpec};
use reuseportd_sys::executable::PinnedExecutable;
use reuseportd_sys::{identity, procfs, socket};
use reuseportd_wire::env;
use rustix::fs::Access;
use rustix::thread::{CpuSet, sched_getaffinity};
use serde::{Deserialize, Serialize};

use super::carried::{Carried, Pidfd};
use super::groups::Groups;
use super::look::kernel_protocol;
use super::output::Output;
use super::process::{LastLines, Process};
use super::runtime::Runtime;
use super::seats::FIRST_NUMBER;
use super::shared::{PassedToWorkers, Shared, SharedId};
use super::{Shell, clock};
use crate::config::{self, Bind, Config, Entry, Listen, Output as OutputMode, ReadinessMethod, UnixListen};
use crate::force::{self, ForceError};
use crate::unix_file::UnixError;

/// The number of the config of workers that were found without a master.
pub(super) const UNKNOWN_CONFIG: u64 = u64::MAX;

/// What the workers of one generation are started from, however often: the config and the program as they were when
/// the generation was asked for.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Launch {
    pub(super) config: Rc<Config>,
    pub(super) executable: Carried<PinnedExecutable>,
    /// The groups of its listeners, in the config's order; those with a shared socket have none.
    pub(super) groups: Vec<GroupId>,
    /// Shared sockets by the names of their listeners.
    #[serde(default)]
    pub(super) shared: BTreeMap<String, SharedId>,
    /// Names the config: the same for equal ones.
    #[serde(default)]
    pub(super) config_number: u64,
    /// `environment` and `environment_file`, read once.
    pub(super) variables: BTreeMap<String, String>,
    /// Of the executable; worked out when somebody asks.
    #[serde(skip)]
    pub(super) sha256: OnceCell<Option<String>>,
}

/// Why a config that is valid still can't be launched.
#[derive(Debug, thiserror::Error)]
pub(super) enum LaunchError {
    #[error("app.environment_file: {0}")]
    Environment(String),
    #[error("app.command: {0}")]
    NotFound(String),
    #[error("app.command: cannot open {path}: {source}")]
    Open { path: String, source: io::Error },
    #[error("app.working_directory: {path} can't be entered by a worker: {source}")]
    Directory { path: String, source: io::Error },
    #[error(
        "a worker can't reach the notify socket {path}: {source}; open its directory to the workers' user (chmod o+x), \
         or choose another control.socket"
    )]
    Notify { path: String, source: io::Error },
    #[error(transparent)]
    Identity(#[from] config::IdentityError),
    #[error(
        "readiness.method = {method:?} needs the ebpf engine{with}: only that can send a request past all others to one \
         worker; give the master CAP_BPF, or use \"notify\""
    )]
    Readiness { method: &'static str, with: &'static str },
    #[error("upgrade.check: {0}")]
    Check(String),
    #[error(
        "upgrade.{key} needs an engine that steers, and there is none here (see `reuseportd doctor`); leave it out"
    )]
    NoEngine { key: &'static str },
    #[error(
        "listen {name:?}: affinity = \"flow\" needs the ebpf engine, which alone remembers flows, and there is none here \
         (see `reuseportd doctor`); give the master CAP_BPF, or leave it out"
    )]
    NoFlows { name: String },
    #[error(
        "readiness.method = {method:?} can't tell whether a worker is ready: the service manager passed all its sockets, \
         from which any other may accept; use \"notify\": the worker says READY=1"
    )]
    AllShared { method: &'static str },
    #[error(transparent)]
    Passed(#[from] PassedToWorkers),
    #[error(transparent)]
    Unix(#[from] UnixError),
    #[error("listen.force_reuseport: {0}")]
    Force(#[from] ForceError),
    #[error(
        "its program {path} was overwritten in place since, and can't be brought back: replace programs by renaming a \
         new file over them"
    )]
    Overwritten { path: String },
    #[error(
        "its program {path} is a script, which can't be held, and another file is there now: put the old one back, and \
         upgrade to it"
    )]
    NoScript { path: String },
    #[error("its workers were found without a master: from what they were started nobody knows")]
    Unknown,
    #[error("its program can't be held once more: {0}")]
    Descriptor(io::Error),
    #[error("no steering for a new listener: {0}")]
    Steering(#[from] BpfError),
}

impl Launch {
    /// Finds and pins the program.
    pub(super) fn prepare(
        config: Rc<Config>,
        runtime: &Runtime,
        groups: &mut Groups,
        shared: &mut Shared,
    ) -> Result<Launch, LaunchError> {
        let passed = shared.passed_for(&config)?;
        let is_steered = |listen: &&Listen| !passed.contains_key(&listen.name);
        check_readiness(&config, config.listen.iter().filter(is_steered), groups.choice.engine)?;
        check_steering(&config, groups.choice.engine)?;
        config.app.check_identity()?;
        let notify = runtime.notify_path();
        let failed = |source| LaunchError::Notify { path: notify.display().to_string(), source };
        config.app.access(&notify, Access::WRITE_OK).map_err(failed)?;
        // Their own directories may be closed to all others: to a master without CAP_DAC_READ_SEARCH as well.
        let uid = config.app.identity.uid;
        let variables = identity::or_as_user(uid, || config.app.variables())
            .map_err(|error| LaunchError::Environment(error.to_string()))?;
        if let Some(directory) = &config.app.working_directory {
            let failed = |source| LaunchError::Directory { path: directory.display().to_string(), source };
            config.app.access(&directory.join("."), Access::EXEC_OK).map_err(failed)?;
        }
        let path = identity::or_as_user(uid, || config::find_executable(&config.app, &variables))
            .map_err(|error| LaunchError::NotFound(error.to_string()))?;
        let executable = identity::or_as_user(uid, || PinnedExecutable::open(&path))
            .map(Carried::new)
            .map_err(|source| LaunchError::Open { path: path.display().to_string(), source })?;
        let mut launch = Launch {
            config,
            executable,
            groups: Vec::new(),
            shared: passed,
            config_number: 0,
            variables,
            sha256: OnceCell::new(),
        };
        // It is looked for again whenever it runs; that it is not there is better known before.
        launch.find_check()?;
        if launch.forced().next().is_some() {
            let cgroup = runtime.cgroup(&launch.config.app.name)?;
            force::try_in(&cgroup)?;
            // What only generations had that are gone.
            let _ = force::remove(&cgroup);
        }
        launch.open(runtime, groups, shared)?;
        Ok(launch)
    }

    /// The same config and environment and the very same program, for another generation.
    pub(super) fn again(
        &self,
        runtime: &Runtime,
        groups: &mut Groups,
        shared: &mut Shared,
    ) -> Result<Launch, LaunchError> {
        if self.config_number == UNKNOWN_CONFIG {
            return Err(LaunchError::Unknown);
        }
        let path = self.executable.path();
        let shown = || path.display().to_string();
        if self.executable.is_script() && !self.executable.is_same_at_path() {
            return Err(LaunchError::NoScript { path: shown() });
        }
        if !self.executable.is_intact() {
            return Err(LaunchError::Overwritten { path: shown() });
        }
        let mut launch = Launch {
            config: Rc::clone(&self.config),
            executable: Carried::new(self.executable.try_clone().map_err(LaunchError::Descriptor)?),
            groups: Vec::new(),
            shared: shared.passed_for(&self.config)?,
            config_number: self.config_number,
            variables: self.variables.clone(),
            sha256: self.sha256.clone(),
        };
        launch.open(runtime, groups, shared)?;
        Ok(launch)
    }

    /// Its groups and shared sockets: those there are, and new ones.
    fn open(
        &mut self,
        runtime: &Runtime,
        groups: &mut Groups,
        shared: &mut Shared,
    ) -> Result<(), LaunchError> {
        self.groups = groups.open(self.steered())?;
        let passed = std::mem::take(&mut self.shared);
        self.shared = shared.open(&self.config, &runtime.notify_path(), passed)?;
        Ok(())
    }

    /// What has a group; all others have a shared socket.
    fn steered(&self) -> impl Iterator<Item = &Listen> {
        self.config.listen.iter().filter(|listen| !self.shared.contains_key(&listen.name))
    }

    /// Its listeners with their groups.
    pub(super) fn listeners(&self) -> impl Iterator<Item = (GroupId, &Listen)> {
        self.groups.iter().copied().zip(self.steered())
    }

    /// The addresses at which `bind()` sets SO_REUSEPORT.
    fn forced(&self) -> impl Iterator<Item = Rule> {
        let forced = self.config.listen.iter().filter(|listen| listen.force_reuseport);
        forced.map(|listen| (kernel_protocol(listen.protocol), listen.address))
    }

    /// `cgroup.procs` of the cgroup its workers are started in, if it takes one.
    fn cgroup(&self, runtime: &Runtime) -> Result<Option<File>, ForceError> {
        let forced: Vec<_> = self.forced().collect();
        let app = &self.config.app.name;
        let open = || force::open(&runtime.cgroup(app)?, &forced);
        (!forced.is_empty()).then(open).transpose()
    }

    /// The number under which a worker finds its channel: behind its sockets, whose numbers are fixed.
    fn channel_number(&self) -> i32 {
        (FIRST_NUMBER..).nth(self.passed().count()).unwrap_or(FIRST_NUMBER)
    }

    /// What the master tells workers and checks alike.
    pub(super) fn own_variables(&self, generation: Generation) -> Vec<(&'static str, String)> {
        let listen = self.config.listeners().in_order().map(|entry| match entry {
            Entry::Ip(Listen { name, protocol, address, .. }) => {
                env::Listen { name: name.clone(), protocol: *protocol, address: *address }.to_string()
            }
            Entry::Unix(UnixListen { name, path, .. }) => {
                env::UnixListen { name: name.clone(), path: path.display().to_string() }.to_string()
            }
        });
        vec![
            (env::APP, self.config.app.name.clone()),
            (env::GENERATION, generation.0.to_string()),
            (env::LISTEN, env::format_listen(&listen.collect::<Vec<_>>())),
        ]
    }

    /// What the master tells a worker.
    fn worker_variables(
        &self,
        shell: &Shell,
        generation: Generation,
        seat: Seat,
    ) -> Vec<(&'static str, String)> {
        let mut own = self.own_variables(generation);
        own.extend([
            (env::SEAT, seat.0.to_string()),
            (env::WORKERS, shell.core.seats(generation).to_string()),
            (env::CHANNEL, self.channel_number().to_string()),
        ]);
        if let Some(timeout) = self.config.watchdog {
            own.push((env::WATCHDOG_USEC, timeout.as_micros().to_string()));
        }
        own.extend(self.passed_variables(generation));
        own
    }

    /// The whole environment, with these variables of the master's own.
    pub(super) fn environment(&self, own: Vec<(&'static str, String)>) -> Result<Vec<CString>, NulError> {
        let mut variables: BTreeMap<OsString, OsString> =
            std::env::vars_os().filter(|(name, _)| !env::OWNED.iter().any(|owned| name == owned)).collect();
        // Stderr is no longer what the service manager gave: a worker that believed so would log past the master.
        variables.remove(OsStr::new("JOURNAL_STREAM"));
        for (name, value) in &self.config.app.login {
            match value {
                Some(value) => variables.insert(name.into(), value.into()),
                None => variables.remove(OsStr::new(name)),
            };
        }
        variables.extend(self.variables.iter().map(|(name, value)| (name.into(), value.into())));
        variables.extend(own.into_iter().map(|(name, value)| (name.into(), value.into())));
        let entries = variables.into_iter().map(|(mut entry, value)| {
            entry.push("=");
            entry.push(value);
            CString::new(entry.as_bytes())
        });
        entries.collect()
    }

    /// Where its processes start.
    pub(super) fn directory(&self) -> Result<Option<CString>, NulError> {
        let directory = self.config.app.working_directory.as_ref();
        directory.map(|directory| CString::new(directory.as_os_str().as_bytes())).transpose()
    }

    /// Their resource limits: open files as the master found them, unless the config says otherwise.
    pub(super) fn limits(&self, found: Option<super::Limits>) -> Vec<Limit> {
        // The configured limits come last, and win.
        let inherited = found.map(|limits| Limit {
            resource: Resource::RLIMIT_NOFILE as u32,
            soft: limits.soft.unwrap_or(u64::MAX),
            hard: limits.hard.unwrap_or(u64::MAX),
        });
        let configured = self.config.app.limits.iter().map(|(resource, value)| Limit {
            resource: *resource as u32,
            soft: *value,
            hard: *value,
        });
        inherited.into_iter().chain(configured).collect()
    }
}

impl Shell {
    /// What a worker was started from.
    pub(super) fn launch_of(&self, worker: WorkerId) -> Option<&Launch> {
        self.processes.get(&worker).and_then(|process| self.launches.get(&process.generation))
    }

    /// Starts a worker; an errno if that fails. What failed in detail is logged here and kept for the receipt.
    pub(super) fn spawn(&mut self, worker: WorkerId, generation: Generation, seat: Seat) -> Result<(), i32> {
        match self.try_spawn(generation, seat) {
            Ok(process) => {
                self.processes.insert(worker, process);
                Ok(())
            }
            Err((error, errno)) => {
                let (generation, seat) = (generation.0, seat.0);
                tracing::error!(
                    event = "not_started",
                    generation,
                    seat,
                    error,
                    "cannot start a worker: {error}"
                );
                self.spawn_error = Some(error);
                Err(errno)
            }
        }
    }

    fn try_spawn(&self, generation: Generation, seat: Seat) -> Result<Process, (String, i32)> {
        let missing = || ("its generation is unknown".to_owned(), nix::libc::EINVAL);
        let launch = self.launches.get(&generation).ok_or_else(missing)?;
        let prepare = |error: io::Error| {
            let errno = super::groups::errno(&error);
            (format!("cannot prepare its surroundings: {error}"), errno)
        };
        let nul = |error: NulError| (format!("a NUL byte in its arguments: {error}"), nix::libc::EINVAL);
        let app = &launch.config.app;
        let argv = launch.config.expand_command(generation.0, seat.0);
        let argv = argv.into_iter().map(CString::new).collect::<Result<Vec<_>, _>>().map_err(nul)?;
        let mut own = launch.worker_variables(self, generation, seat);
        own.push((env::NOTIFY_SOCKET, self.runtime.notify_path().to_string_lossy().into_owned()));
        let envp = launch.environment(own).map_err(nul)?;
        let (channel, theirs) = socket::seqpacket_pair().map_err(prepare)?;
        rustix::io::ioctl_fionbio(&channel, true).map_err(|error| prepare(error.into()))?;
        let null = File::open("/dev/null").map_err(prepare)?;
        let pipe = match app.output {
            // Of the workers' user, so that it may open /dev/stderr, as many a program's log file is set to.
            OutputMode::Tag => Some(identity::as_user(app.identity.uid, Output::pipe).map_err(prepare)?),
            OutputMode::Inherit => None,
        };
        let writer = pipe.as_ref().map(|(_, writer)| writer.as_fd());
        let (stdout, stderr) = (rustix::stdio::stdout(), rustix::stdio::stderr());
        let mut fds: Vec<(BorrowedFd<'_>, i32)> = vec![
            (null.as_fd(), 0),
            (writer.unwrap_or(stdout), 1),
            (writer.unwrap_or(stderr), 2),
            (theirs.as_fd(), launch.channel_number()),
        ];
        fds.extend(self.passed_fds(launch, seat).map_err(prepare)?);
        let directory = launch.directory().map_err(nul)?;
        let listen_pid = launch.passed().next().map(|_| env::LISTEN_PID);
        let watchdog_pid = launch.config.watchdog.map(|_| env::WATCHDOG_PID);
        let pid_variables: Vec<_> = listen_pid.into_iter().chain(watchdog_pid).collect();
        let cgroup = launch.cgroup(&self.runtime).map_err(|error| prepare(io::Error::other(error)))?;
        let spec = SpawnSpec {
            executable: &launch.executable,
            argv: &argv,
            envp: &envp,
            pid_variables: &pid_variables,
            fds: &fds,
            umask: app.umask,
            identity: &app.identity,
            cpus: app.cpu_by_seat.then(|| cpu_of(seat)).transpose().map_err(prepare)?,
            directory: directory.as_deref(),
            limits: &launch.limits(self.limits),
            cgroup: cgroup.as_ref().map(AsFd::as_fd),
            no_new_privileges: app.no_new_privileges,
        };
        let spawned = child::spawn(&spec).map_err(|error| {
            let path = launch.executable.path();
            (format!("{}: {error}", path.display()), error.errno)
        })?;
        let output = pipe.map(|(reader, _)| Output::of_worker(reader, generation.0, seat.0, spawned.pid));
        Ok(process(generation, seat, spawned, channel, output))
    }
}

/// Whether workers can be proven the way the config wants, with this engine.
fn check_readiness<'a>(
    config: &Config,
    mut steered: impl Iterator<Item = &'a Listen> + Clone,
    engine: Engine,
) -> Result<(), LaunchError> {
    let has_none = steered.clone().next().is_none();
    let has_seats = steered.any(|listen| listen.bind == Bind::Master);
    match config.readiness.method {
        ReadinessMethod::Http if has_none => Err(LaunchError::AllShared { method: "http" }),
        ReadinessMethod::Listen if has_none => Err(LaunchError::AllShared { method: "listen" }),
        _ if engine == Engine::Ebpf => Ok(()),
        ReadinessMethod::Http => Err(LaunchError::Readiness { method: "http", with: "" }),
        // A socket that is passed listens before its worker has begun: that it does shows nothing.
        ReadinessMethod::Listen if has_seats => {
            Err(LaunchError::Readiness { method: "listen", with: " where bind = \"master\"" })
        }
        ReadinessMethod::Listen | ReadinessMethod::Notify => Ok(()),
    }
}

/// Whether new connections can be divided, where the config wants that.
fn check_steering(config: &Config, engine: Engine) -> Result<(), LaunchError> {
    let upgrade = &config.upgrade;
    let wanted = [
        ("canary", !upgrade.canary.is_empty()),
        ("bake", !upgrade.bake.is_zero()),
        ("batch", upgrade.batch.is_some()),
    ];
    if let Some((key, _)) = wanted.iter().find(|(_, wanted)| *wanted && engine == Engine::None) {
        return Err(LaunchError::NoEngine { key });
    }
    match config.listen.iter().find(|listen| listen.flows.is_some() && engine != Engine::Ebpf) {
        Some(listen) => Err(LaunchError::NoFlows { name: listen.name.clone() }),
        None => Ok(()),
    }
}

/// The seat's processor among those this process may use.
fn cpu_of(seat: Seat) -> io::Result<CpuSet> {
    let allowed = sched_getaffinity(None)?;
    let mut allowed = (0..CpuSet::MAX_CPU).filter(|cpu| allowed.is_set(*cpu)).cycle();
    let mut set = CpuSet::new();
    set.set(allowed.nth(seat.0.into()).ok_or(io::ErrorKind::NotFound)?);
    Ok(set)
}

fn process(
    generation: Generation,
    seat: Seat,
    spawned: child::Spawned,
    channel: OwnedFd,
    output: Option<Output>,
) -> Process {
    Process {
        generation,
        seat,
        pid: spawned.pid,
        // It is our child: it can't have been reaped, so it is there.
        start_time: procfs::start_time(spawned.pid).unwrap_or(0),
        pidfd: Carried::new(Pidfd::from(spawned.pidfd)),
        is_child: true,
        shares_group: false,
        is_ended: false,
        started: clock::now(),
        channel: Some(Carried::new(channel)),
        output,
        status: None,
        detail: None,
        last_lines: LastLines::default(),
    }
}
