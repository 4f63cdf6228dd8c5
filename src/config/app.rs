//! `[app]`: what a worker is.

use std::collections::BTreeMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use nix::sys::resource::Resource;
use nix::sys::signal::Signal;
use toml::Spanned;

use super::command::{EXAMPLE, check_words};
use super::environment_file::check_variable;
use super::problems::{FILE_START, Problems};
use super::schema::{self, Scalar};
use super::socket_path::default_name;
use super::suggest::did_you_mean;
use super::values::{LIMITS, parse_mode, parse_name, parse_path, parse_stop_signal};
use super::{App, Listeners, Output, identity};

/// Seats per generation at most.
const WORKERS_MAX: u16 = 1024;

/// Checks the table; `path` is the config file, `listen` what placeholders may name, when that is known.
pub(super) fn resolve(
    path: &Path,
    raw: Option<&Spanned<schema::App>>,
    listen: Option<Listeners<'_>>,
    problems: &mut Problems,
) -> App {
    let header = raw.map_or(FILE_START, Spanned::span);
    let raw = raw.map(|app| app.get_ref().clone()).unwrap_or_default();
    let name = match &raw.name {
        Some(name) => problems.text("app.name", name, parse_name),
        None => default_name(path)
            .map_err(|said| problems.add("app.name", Some(header.clone()), said, "set app.name"))
            .ok(),
    };
    let (identity, login) = identity::resolve(&raw, problems);
    let mut environment = BTreeMap::new();
    for (name, value) in raw.environment {
        if let Err(said) = check_variable(&name, value.get_ref()) {
            problems.add(format!("app.environment.{name}"), Some(value.span()), said, "");
        }
        environment.insert(name, value.into_inner());
    }
    App {
        name: name.unwrap_or_default(),
        command: command(&raw.command, header, listen, problems),
        workers: workers(&raw.workers, problems),
        working_directory: path_of("app.working_directory", &raw.working_directory, problems),
        environment,
        environment_file: path_of("app.environment_file", &raw.environment_file, problems),
        umask: raw.umask.as_ref().and_then(|umask| problems.text("app.umask", umask, parse_mode)),
        limits: limits(&raw.limits, problems),
        identity,
        login,
        cpu_by_seat: problems.choice(
            "app.cpu_affinity",
            &raw.cpu_affinity,
            [("none", false), ("seat", true)],
        ),
        no_new_privileges: raw.no_new_privileges.unwrap_or(true),
        output: problems.choice(
            "app.output",
            &raw.output,
            [("tag", Output::Tag), ("inherit", Output::Inherit)],
        ),
        stop_signal: raw
            .stop_signal
            .as_ref()
            .and_then(|signal| problems.text("app.stop_signal", signal, parse_stop_signal))
            .unwrap_or(Signal::SIGTERM),
    }
}

fn command(
    raw: &Option<Spanned<Vec<Spanned<String>>>>,
    app: Range<usize>,
    listen: Option<Listeners<'_>>,
    problems: &mut Problems,
) -> Vec<String> {
    let Some(raw) = raw else {
        problems.add("app.command", Some(app), "missing", EXAMPLE);
        return Vec::new();
    };
    if raw.get_ref().is_empty() {
        problems.add("app.command", Some(raw.span()), "empty", EXAMPLE);
    }
    check_words("app.command", raw.get_ref(), Some(0), listen, problems);
    raw.get_ref().iter().map(|argument| argument.get_ref().clone()).collect()
}

/// One worker per CPU this process may use, unless said otherwise.
fn workers(raw: &Option<Spanned<Scalar>>, problems: &mut Problems) -> u16 {
    match raw {
        Some(value) if *value.get_ref() != Scalar::Word("cpus".to_owned()) => {
            let number = match value.get_ref() {
                Scalar::Number(number) => u16::try_from(*number).ok(),
                Scalar::Word(_) => None,
            };
            number.filter(|number| (1..=WORKERS_MAX).contains(number)).unwrap_or_else(|| {
                let help = format!("allowed: \"cpus\", or a number from 1 to {WORKERS_MAX}");
                problems.add(
                    "app.workers",
                    Some(value.span()),
                    format!("{} is not possible", value.get_ref()),
                    help,
                );
                1
            })
        }
        _ => std::thread::available_parallelism()
            .map_or(1, |cpus| u16::try_from(cpus.get()).unwrap_or(WORKERS_MAX).min(WORKERS_MAX)),
    }
}

fn path_of(key: &str, raw: &Option<Spanned<String>>, problems: &mut Problems) -> Option<PathBuf> {
    problems.text(key, raw.as_ref()?, parse_path)
}

fn limits(raw: &BTreeMap<String, Spanned<Scalar>>, problems: &mut Problems) -> Vec<(Resource, u64)> {
    let mut limits = Vec::new();
    for (name, value) in raw {
        let key = format!("app.limits.{name}");
        let known = LIMITS.iter().find(|(known, _)| known == name);
        let number = match value.get_ref() {
            Scalar::Number(number) => u64::try_from(*number).ok(),
            Scalar::Word(word) => (word == "unlimited").then_some(u64::MAX),
        };
        match (known, number) {
            (Some((_, resource)), Some(number)) => limits.push((*resource, number)),
            (Some(_), None) => {
                let message = format!("{} is not possible", value.get_ref());
                problems.add(key, Some(value.span()), message, "allowed: a number from 0, or \"unlimited\"");
            }
            (None, _) => {
                let names = LIMITS.iter().map(|(name, _)| *name);
                let hint = did_you_mean(name, names.clone());
                let help = format!("{hint}known here: {}", names.collect::<Vec<_>>().join(", "));
                problems.add(key, Some(value.span()), format!("unknown limit `{name}`"), help);
            }
        }
    }
    limits
}
