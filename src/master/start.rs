//! The start of a master: everything that can fail does so here, before any worker exists.

use std::collections::{BTreeMap, VecDeque};
use std::path::Path;
use std::process::ExitCode;
use std::rc::Rc;

use reuseportd_core::{Event, Master, Trigger};
use reuseportd_sys::signals::{self, SignalPipe};
use reuseportd_sys::{capability, limits};

use super::control::Clients;
use super::groups::{self, Groups};
use super::launch::Launch;
use super::listeners::Listeners;
use super::runtime::Runtime;
use super::turn::Turn;
use super::upstream::Upstream;
use super::{Shell, clock, log, reload};
use crate::config::{self, Config, LogFormat};

/// Runs a master in the foreground until it ends.
pub(crate) fn run(path: &Path, format: Option<LogFormat>, level: Option<tracing::Level>) -> ExitCode {
    // First of all: until then a signal ends the process without a word.
    let signals = match signals::reset_inherited().and_then(|()| SignalPipe::new()) {
        Ok(signals) => signals,
        Err(error) => {
            eprintln!("cannot catch signals: {error}");
            return ExitCode::FAILURE;
        }
    };
    let config = match config::load(path) {
        Ok(config) => Rc::new(config),
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(2);
        }
    };
    let log_level = log::start(format.unwrap_or(config.log.format), level.unwrap_or(config.log.level));
    match prepare(&config, signals, log_level, level) {
        Ok(mut shell) => {
            let code = shell.run();
            tracing::info!(event = "ended", code, "the master ends");
            ExitCode::from(code)
        }
        Err(error) => {
            tracing::error!(event = "not_started", error, "cannot start: {error}");
            ExitCode::FAILURE
        }
    }
}

fn prepare(
    config: &Rc<Config>,
    signals: SignalPipe,
    log_level: log::Level,
    log_level_override: Option<tracing::Level>,
) -> Result<Shell, String> {
    let text = |error: &dyn std::fmt::Display| error.to_string();
    let nofile = limits::raise_nofile()
        .map_err(|error| tracing::warn!(%error, "cannot raise the limit of open files"));
    let runtime = Runtime::open(&config.control).map_err(|error| text(&error))?;
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
    let launch = Launch::prepare(Rc::clone(config), &runtime, &mut groups).map_err(|error| text(&error))?;
    let plan = reload::plan(&launch, engine);
    Ok(Shell {
        core: Master::new(engine),
        turn: Turn::default(),
        inbox: VecDeque::from([Event::Upgrade { plan, trigger: Trigger::Start, by: None }]),
        started: clock::now(),
        config_path: config.path.clone(),
        config: Rc::clone(config),
        prepared: VecDeque::from([launch]),
        launches: BTreeMap::new(),
        processes: BTreeMap::new(),
        listeners: Listeners::default(),
        groups,
        views: BTreeMap::new(),
        taking: BTreeMap::new(),
        proofs: BTreeMap::new(),
        exchanges: BTreeMap::new(),
        receipts: VecDeque::new(),
        failing: None,
        spawn_error: None,
        state_reason: None,
        clients: Clients::new(control, &config.control.allow_users),
        notify,
        notify_rejected: 0,
        upstream: Upstream::from_env(),
        signals,
        nofile: nofile.ok(),
        log_level,
        log_level_override,
        runtime,
        exit: None,
    })
}
