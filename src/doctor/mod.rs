//! `reuseportd doctor`: what this machine can do for the service, what is lost where it can't, and how to mend it.
//!
//! [`facts`] looks, [`trials`] try things on scratch sockets, [`judge`] turns both into findings without looking at
//! anything itself, [`verdict`] says what may be relied on.

mod facts;
mod finding;
mod judge;
mod text;
mod trials;
mod verdict;

use std::io::Write;
use std::path::Path;
use std::process::ExitCode;

use reuseportd_wire::control;
use serde::Serialize;

use self::facts::{Facts, Needs};
use self::finding::{Finding, Level};
use self::verdict::Guarantee;
use crate::{client, config};

/// Everything that is printed. Field names are for scripts.
#[derive(Debug, Serialize)]
struct Report {
    version: &'static str,
    kernel: String,
    config: Option<String>,
    /// What would steer; null when the configured engine can't be had.
    engine: Option<&'static str>,
    engine_reason: String,
    /// False exactly when there is a finding of level `problem`.
    promise_kept: bool,
    findings: Vec<Finding>,
    guarantees: Vec<Guarantee>,
}

/// Examines and prints. Exit code 0 when the promise can be kept, 1 when it can't, 2 for an invalid config.
pub(crate) fn run(path: Option<&Path>, json: bool) -> ExitCode {
    let needs = match path.map(config::load).transpose() {
        Ok(Some(config)) => Needs::of_config(&config),
        Ok(None) => Needs::default(),
        Err(errors) => {
            eprintln!("{errors}");
            return ExitCode::from(2);
        }
    };
    let report = report(&Facts::gather(needs));
    let text = match json {
        true => control::encode(&report).unwrap_or_default(),
        false => text::render(&report, client::paint()),
    };
    // A reader that has seen enough (`| head -1`) is no failure.
    let _ = std::io::stdout().write_all(text.as_bytes());
    if report.promise_kept { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn report(facts: &Facts) -> Report {
    let findings = judge::all(facts);
    let (engine, reason) = match &facts.engine {
        Ok((engine, reason)) => (Some(verdict::word(*engine)), reason.clone()),
        Err(why) => (None, why.clone()),
    };
    Report {
        version: env!("CARGO_PKG_VERSION"),
        kernel: facts.kernel.clone(),
        config: facts.needs.config.as_ref().map(|path| path.display().to_string()),
        engine,
        engine_reason: reason,
        promise_kept: findings.iter().all(|finding| finding.level < Level::Problem),
        guarantees: verdict::guarantees(facts),
        findings,
    }
}
