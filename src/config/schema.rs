//! What may be typed, as serde types: every key of the contract, each with its place in the file.
//!
//! Values stay as written here, so that `resolve` can tell everything that is wrong with them at once instead
//! of serde's first. `flatten` and untagged enums are out of bounds: `Spanned` does not survive them.

use std::collections::BTreeMap;
use std::fmt;
use std::path::Path;

use serde::Deserialize;
use serde::de::{Deserializer, Error, Visitor};
use toml::Spanned;

use super::diagnose::ConfigErrors;
use super::problems::Problems;
use super::suggest::did_you_mean;
use super::values::{DURATION_HELP, SHARE_HELP, quoted};

type Maybe<T> = Option<Spanned<T>>;
type Text = Maybe<String>;

/// The whole file.
#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub(super) struct Raw {
    pub(super) app: Maybe<App>,
    pub(super) listen: Vec<Spanned<Listen>>,
    pub(super) steering: Steering,
    pub(super) readiness: Readiness,
    pub(super) upgrade: Upgrade,
    pub(super) restart: Restart,
    pub(super) watchdog: Watchdog,
    pub(super) control: Control,
    pub(super) console: Console,
    pub(super) log: Log,
}

/// Defines the tables. All keys are optional to serde: what is missing is told with the rest in `resolve`.
macro_rules! tables {
    ($($name:ident { $($key:ident: $kind:ty),* $(,)? })*) => {$(
        #[derive(Debug, Default, Clone, Deserialize)]
        #[serde(deny_unknown_fields, default)]
        pub(super) struct $name { $(pub(super) $key: $kind),* }
    )*};
}

tables! {
    App {
        name: Text,
        command: Maybe<Vec<Spanned<String>>>,
        workers: Maybe<Scalar>,
        working_directory: Text,
        environment: BTreeMap<String, Spanned<String>>,
        environment_file: Text,
        user: Maybe<Scalar>,
        group: Maybe<Scalar>,
        umask: Text,
        limits: BTreeMap<String, Spanned<Scalar>>,
        capabilities: Vec<Spanned<String>>,
        no_new_privileges: Option<bool>,
        cpu_affinity: Text,
        output: Text,
        stop_signal: Text,
    }
    Listen {
        name: Text,
        address: Text,
        protocol: Text,
        bind: Text,
        backlog: Maybe<Scalar>,
        v6only: Maybe<bool>,
        force_reuseport: Maybe<bool>,
        affinity: Text,
        flow_timeout: Text,
        flow_table: Maybe<Scalar>,
        mode: Text,
    }
    Steering { engine: Text, policy: Text }
    Readiness { method: Text, path: Text, passes: Maybe<Scalar>, interval: Text }
    Upgrade {
        batch: Maybe<Scalar>,
        ready_timeout: Text,
        canary: Maybe<Vec<Spanned<CanaryStep>>>,
        bake: Text,
        check: Maybe<Vec<Spanned<String>>>,
        check_interval: Text,
        settle_timeout: Text,
        stop_when: Text,
        idle_timeout: Text,
        drain_timeout: Text,
        max_draining: Maybe<Scalar>,
    }
    CanaryStep { share: Text, hold: Text }
    Restart { backoff: Text, backoff_max: Text, stable_after: Text, breaker: Breaker }
    Breaker { exits: Maybe<Scalar>, window: Text, cooldown: Text }
    Watchdog { timeout: Text }
    Control { socket: Text, mode: Text, allow_users: Vec<Spanned<Scalar>> }
    Console { listen: Text }
    Log { format: Text, level: Text }
}

/// A number or a word, for keys that take both (and numbers whose range `resolve` tells).
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Scalar {
    Number(i64),
    Word(String),
}

impl fmt::Display for Scalar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Scalar::Number(number) => write!(f, "{number}"),
            Scalar::Word(word) => f.write_str(&quoted(word)),
        }
    }
}

impl<'de> Deserialize<'de> for Scalar {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct ScalarVisitor;
        impl Visitor<'_> for ScalarVisitor {
            type Value = Scalar;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a whole number or a string")
            }
            fn visit_i64<E: Error>(self, number: i64) -> Result<Scalar, E> {
                Ok(Scalar::Number(number))
            }
            fn visit_str<E: Error>(self, word: &str) -> Result<Scalar, E> {
                Ok(Scalar::Word(word.to_owned()))
            }
        }
        deserializer.deserialize_any(ScalarVisitor)
    }
}

/// Text to [`Raw`]: all syntax errors, or the first unknown key or wrong type.
pub(super) fn parse(path: &Path, text: &str) -> Result<Raw, ConfigErrors> {
    let mut problems = Problems::default();
    let (table, errors) = toml::de::DeTable::parse_recoverable(text);
    for error in &errors {
        problems.add("", error.span(), format!("not valid TOML: {}", error.message()), "");
    }
    if errors.is_empty() {
        match serde_path_to_error::deserialize(toml::de::Deserializer::from(table)) {
            Ok(raw) => return Ok(raw),
            Err(error) => shape_problem(&error, &mut problems),
        }
    }
    Err(ConfigErrors::new(path, text, problems))
}

/// Says serde's finding in words of the file: the key's path, what is known here, what is nearest.
fn shape_problem(error: &serde_path_to_error::Error<toml::de::Error>, problems: &mut Problems) {
    let key = key_path(error.path());
    let (message, span) = (error.inner().message(), error.inner().span());
    let mut words = message.split('`').skip(1).step_by(2);
    let Some(unknown) = words.next().filter(|_| message.starts_with("unknown field")) else {
        let help = type_help(key.rsplit('.').next().unwrap_or_default());
        return problems.add(key, span, in_toml_words(message), help);
    };
    let known: Vec<&str> = words.collect();
    let hint = did_you_mean(unknown, known.iter().copied());
    let help = format!("{hint}known here: {}", known.join(", "));
    problems.add(key, span, format!("unknown key `{unknown}`"), help);
}

/// serde speaks of its own data model, the reader of the file has TOML before the eyes.
fn in_toml_words(message: &str) -> String {
    let line = message.lines().next().unwrap_or_default();
    let line = line
        .split_once("expected struct ")
        .map_or(line.to_owned(), |(found, _)| format!("{found}expected a table"));
    line.replace("a sequence", "an array")
        .replace("invalid type: map", "invalid type: table")
        .replace(" as i128", "")
}

/// What belongs there, where the type alone does not tell.
fn type_help(key: &str) -> &'static str {
    match key {
        "listen" => "[[listen]] takes two brackets: there may be several",
        "command" | "check" => {
            "one string per word, for example [\"/srv/web/bin/web\", \"-q\"]; there is no shell"
        }
        "share" => SHARE_HELP,
        "umask" | "mode" => "a string of octal digits, for example \"027\"",
        "bake" | "hold" | "window" | "cooldown" | "interval" | "check_interval" | "backoff"
        | "backoff_max" | "stable_after" => DURATION_HELP,
        timeout if timeout.ends_with("timeout") => DURATION_HELP,
        _ => "",
    }
}

/// `listen[0].address`. `Spanned` wraps values in a pseudo key of its own, which no reader has written.
fn key_path(path: &serde_path_to_error::Path) -> String {
    use serde_path_to_error::Segment;
    let mut text = String::new();
    for segment in path.iter() {
        match segment {
            Segment::Seq { index } => text.push_str(&format!("[{index}]")),
            Segment::Map { key } if key.starts_with("$__serde_spanned") => {}
            Segment::Map { key } if text.is_empty() => text.push_str(key),
            Segment::Map { key } => text.push_str(&format!(".{key}")),
            Segment::Enum { .. } | Segment::Unknown => {}
        }
    }
    text
}
