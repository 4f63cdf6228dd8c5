//! The start of a master: everything that can fail does so here, before any worker exists. It goes on where an earlier
//! image was, takes over from a master that was killed, or begins with nothing.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use reuseportd_core::{Event, Master, Trigger};
use reuseportd_sys::signals::{self, SignalPipe};
use reuseportd_sys::{capability, limits};
use reuseportd_wire::env;
use rustix::thread::CapabilitySet;

use super::carried::Carried;
use super::control::Clients;
use super::groups::{self, Groups};
use super::keeping::Saving;
use super::launch::Launch;
use super::listeners::Listeners;
use super::runtime::Runtime;
use super::seldom::Seldom;
use super::shared::Shared;
use super::turn::Turn;
use super::upstream::Upstream;
use super::{Limits, LogSettings, Shell, activation, clock, foreign, log, reexec, reload, restore};
use crate::config::{self, Config, LogFormat};

/// Why there is no master: what is said, and the exit code.
pub(super) struct NoStart(pub(super) String, pub(super) u8);

impl From<String> for NoStart {
    fn from(said: String) -> NoStart {
        NoStart(said, 1)
    }
}

/// Runs a master in the foreground until it ends.
pub(crate) fn run(path: &Path, format: Option<LogFormat>, level: Option<tracing::Level>) -> ExitCode {
    serve(path, format, level, None)
}

/// The same for one whose first generation takes over from this process and its children.
pub(crate) fn take_over(
    path: &Path,
    pid: i32,
    format: Option<LogFormat>,
    level: Option<tracing::Level>,
) -> ExitCode {
    serve(path, format, level, Some(pid))
}

fn serve(
    path: &Path,
    format: Option<LogFormat>,
    level: Option<tracing::Level>,
    server: Option<i32>,
) -> ExitCode {
    // First of all: until then a signal ends the process without a word. Handlers before the mask is opened: a signal
    // that came during a re-exec waits behind it.
    let signals = match SignalPipe::new().and_then(|pipe| signals::reset_inherited().map(|()| pipe)) {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("cannot catch signals: {error}");
            return ExitCode::FAILURE;
        }
    };
    let shell = match std::env::var(env::RESUME) {
        Ok(number) => restore::resume(&number, signals).map_err(NoStart::from),
        Err(_) => begin(path, format, level, signals, server),
    };
    match shell {
        Ok(mut shell) => {
            shell.give_up_privileges();
            let code = shell.run();
            tracing::info!(event = "ended", code, "the master ends");
            ExitCode::from(code)
        }
        Err(NoStart(said, code)) => {
            if tracing::dispatcher::has_been_set() {
                tracing::error!(event = "not_started", error = said, "cannot start: {said}");
            } else {
                eprintln!("{said}");
            }
            ExitCode::from(code)
        }
    }
}

fn begin(
    path: &Path,
    format: Option<LogFormat>,
    level: Option<tracing::Level>,
    signals: SignalPipe,
    server: Option<i32>,
) -> Result<Shell, NoStart> {
    let invalid = |errors: config::ConfigErrors| NoStart(errors.to_string(), 2);
    let mut passed = activation::passed();
    // What a former master has left is taken over even if the file has become invalid since.
    let runtime =
        Runtime::open(config::control_socket(path).map_err(invalid)?).map_err(|error| error.to_string());
    let (signals, runtime) = match runtime {
        Ok(runtime) => match restore::adopt(signals, runtime, &mut passed)? {
            restore::Adoption::Done(shell) => return Ok(*shell),
            restore::Adoption::Nothing(signals, runtime) => (signals, Ok(runtime)),
        },
        Err(error) => (signals, Err(error)),
    };
    let config = Rc::new(config::load(path).map_err(invalid)?);
    let settings = LogSettings {
        format: format.unwrap_or(config.log.format),
        level: level.map(|level| level.to_string()),
    };
    let level = log::start(settings.format, settings.level(&config));
    if server.is_some() {
        foreign::check_config(&config)?;
    }
    let mut shared = Shared::default();
    shared.receive(passed);
    let mut shell = prepare(&config, signals, settings, level, (runtime?, shared))?;
    let trigger = match server {
        Some(pid) => {
            shell.take_over(pid)?;
            Trigger::Takeover
        }
        None if shell.find_orphans()? => Trigger::Orphans,
        None => Trigger::Start,
    };
    shell.runtime.own();
    if let Some(launch) = shell.prepared.back() {
        let plan = reload::plan(launch, shell.groups.choice.engine);
        shell.inbox.push_back(Event::Upgrade { plan, trigger, by: None });
    }
    Ok(shell)
}

fn prepare(
    config: &Rc<Config>,
    signals: SignalPipe,
    log: LogSettings,
    log_level: log::Level,
    (runtime, mut shared): (Runtime, Shared),
) -> Result<Shell, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let nofile = limits::raise_nofile()
        .map_err(|error| tracing::warn!(%error, "cannot raise the limit of open files"));
    let notify = runtime.notify_socket().map_err(|error| text(&error))?;
    let control = runtime.control_socket(&config.control).map_err(|error| text(&error))?;
    let choice = groups::choose(config.steering.engine).map_err(|error| text(&error))?;
    tracing::info!(
        event = "starting",
        app = config.app.name,
        version = env!("CARGO_PKG_VERSION"),
        kernel = capability::kernel_release(),
        engine = %groups::engine_word(choice.engine),
        reason = choice.reason,
        "starting {} with engine {} ({})", config.app.name, groups::engine_word(choice.engine), choice.reason
    );
    let engine = choice.engine;
    let mut groups = Groups::new(choice);
    let launch = Launch::prepare(Rc::clone(config), &runtime, &mut groups, &mut shared)
        .map_err(|error| text(&error))?;
    shared.warn_of_unused(&launch.shared);
    let upstream = Upstream::from_env();
    let mut inbox = VecDeque::from([Event::Supervised { every: upstream.beat() }]);
    inbox.extend(restore::needs_keeper());
    Ok(Shell {
        core: Master::new(engine),
        turn: Turn::default(),
        inbox,
        started: clock::now(),
        config_path: config.path.clone(),
        config: Rc::clone(config),
        prepared: VecDeque::from([launch]),
        launches: BTreeMap::new(),
        config_last: 0,
        checks: BTreeMap::new(),
        check_words: None,
        processes: BTreeMap::new(),
        listeners: Listeners::default(),
        groups,
        shared,
        views: BTreeMap::new(),
        taking: BTreeMap::new(),
        proofs: BTreeMap::new(),
        exchanges: BTreeMap::new(),
        receipts: VecDeque::new(),
        failing: None,
        spawn_error: None,
        state_reason: None,
        clients: Clients::new(control, &config.control.allow_users),
        notify: Carried::new(notify),
        notify_rejected: 0,
        rejections: Seldom::default(),
        upstream,
        signals,
        limits: nofile.ok().map(|nofile| Limits { soft: nofile.before, hard: nofile.hard }),
        log,
        log_level,
        runtime,
        exit: None,
        reexecs: 0,
        adopted: false,
        program: reexec::own_program(),
        preflight: None,
        proven: None,
        is_reexec_due: false,
        reexec_error: None,
        keeper: None,
        dropped: CapabilitySet::empty(),
        saving: Saving::default(),
        journalled: None,
    })
}
