//! The command line: words to an [`Action`]. Wrong usage ends the process with exit code 2, help and version with 0.

use std::path::PathBuf;
use std::time::Duration;

use clap::builder::{PossibleValuesParser, TypedValueParser};
use clap::error::ErrorKind;
use clap::{Args, CommandFactory, Parser, Subcommand, ValueEnum, value_parser};
use tracing::Level;

use crate::config::{self, ConfigErrors, LogFormat};

const EXAMPLES: &str = "\
Examples:
  reuseportd --config app.toml                   run the service in the foreground
  reuseportd check --config app.toml             look for mistakes, change nothing
  kill -HUP PID                                  upgrade, without losing a connection
  reuseportd upgrade --wait --config app.toml    the same, and say how it ended
  reuseportd status --config app.toml            what runs now

Signals: HUP upgrade; USR2 replace the master's own program; TERM, INT graceful stop (twice: at once); QUIT stop at once.

Exit codes: 0 done; 1 failed, rolled back or refused; 2 wrong usage or invalid config;
            3 no master reachable; 4 --timeout passed.";

const UPGRADE_EXAMPLES: &str = "\
Examples:
  reuseportd upgrade --config app.toml                 trigger and return at once
  reuseportd upgrade --wait --config app.toml          stay until the old workers get nothing new
  reuseportd upgrade --wait=drained --timeout 5m --socket /run/reuseportd/web/control.sock
                                                       until they are gone, 5 minutes at most

Exit codes: 0 completed; 1 rolled back or refused; 2 wrong usage or invalid config;
            3 no master reachable; 4 --timeout passed (the upgrade goes on).";

const ROLLBACK_HELP: &str = "\
While a new generation starts, gets its share or is baked, it is taken back. Else the generation before the active one
comes back: its program, pinned, and its config, under a new number. To go forward again: upgrade.

Exit codes: 0 it serves again; 1 refused or failed; 2 wrong usage; 3 no master reachable;
            4 --timeout passed (the rollback goes on).";

const SCALE_HELP: &str = "\
Lasts until the config changes. The signals TTIN and TTOU do the same by one. While an upgrade runs it takes effect
afterwards.

Exit codes: 0 done; 1 refused; 2 wrong usage; 3 no master reachable; 4 --timeout passed (it goes on).";

const RESTART_WORKER_HELP: &str = "\
A new worker starts on the seat, from the program and config of its generation, and the old one leaves when the new one
serves. Refused while an upgrade runs.

Exit codes: 0 done; 1 refused or failed; 2 wrong usage; 3 no master reachable; 4 --timeout passed (it goes on).";

const TAKEOVER_HELP: &str = "\
The server serves on until the first generation is ready, and through its canary and bake. Then it gets no new
connections, finishes those it has, and is told to stop. If the first generation fails, or this program is stopped
before, the server serves on as if nothing had happened, and the exit code is 1. Needs the ebpf engine, and a [[listen]]
for each address the server listens on.

Example:
  reuseportd takeover --config app.toml --pid \"$(cat /run/nginx.pid)\"";

const REEXEC_HELP: &str = "\
After an update of reuseportd itself; the signal USR2 does the same. The new program first shows, as a child, that it
can read the state of the running one: if it can't, nothing happens. Whatever is under way goes on.

Exit codes: 0 done; 1 refused, nothing has changed; 3 no master reachable.";

const DOCTOR_HELP: &str = "\
Works without --config too, then for default settings. Self-tests use sockets of their own on loopback.
Rights and network are those of the caller: run it as the service runs (as its user, in its unit or container).

Exit codes: 0 the promise can be kept (notes and warnings included); 1 it can't; 2 wrong usage or invalid config.";

/// Keeps a SO_REUSEPORT service running and replaces its program without losing a connection.
///
/// Without a subcommand: run the service described by --config in the foreground.
#[derive(Debug, Parser)]
#[command(name = "reuseportd", version, after_help = EXAMPLES, disable_help_subcommand = true)]
struct Cli {
    /// The config file (TOML); subcommands find the master by it
    #[arg(long, global = true, value_name = "FILE", conflicts_with = "socket")]
    config: Option<PathBuf>,
    /// The control socket of the master, instead of --config
    #[arg(long, global = true, value_name = "PATH")]
    socket: Option<PathBuf>,
    /// How the master writes its log, whatever the config says
    #[arg(long, global = true, value_enum, value_name = "FORMAT")]
    log_format: Option<LogFormat>,
    /// How much the master logs, whatever the config says
    #[arg(long, global = true, value_name = "LEVEL", value_parser = levels())]
    log_level: Option<Level>,
    #[command(subcommand)]
    command: Option<Command>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Validate the config and this machine: program, addresses, limits. Touches nothing in use
    #[command(
        after_help = "Exit codes: 0 all well (warnings included); 1 this machine can't run it; 2 invalid config."
    )]
    Check,
    /// Show generations, workers, listeners, the engine and why, the last upgrade
    Status {
        /// The receipts of the last upgrades instead, 50 at most
        #[arg(long)]
        receipts: bool,
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Replace the running workers by new ones, from the config and program as they are now
    #[command(after_help = UPGRADE_EXAMPLES)]
    Upgrade {
        #[command(flatten)]
        stay: Stay,
        /// Do not wait for a place among the draining (upgrade.max_draining): end the oldest of them now
        #[arg(long)]
        force: bool,
    },
    /// Bring the previous generation back
    #[command(after_help = ROLLBACK_HELP)]
    Rollback {
        #[command(flatten)]
        stay: Stay,
    },
    /// Have so many workers from now on
    #[command(after_help = SCALE_HELP)]
    Scale {
        /// How many, 1 to 1024
        #[arg(value_name = "N", value_parser = value_parser!(u32).range(1..=1024))]
        workers: u32,
        /// Stay until they serve, or the removed ones get no connections any more
        #[arg(long)]
        wait: bool,
        /// Stop waiting after this time, for example 90s or 5m
        #[arg(long, value_name = "DURATION", requires = "wait", value_parser = config::parse_duration)]
        timeout: Option<Duration>,
    },
    /// Replace the worker of one seat by a new one
    #[command(after_help = RESTART_WORKER_HELP)]
    RestartWorker {
        /// Its place, from 0, as in `status`
        #[arg(value_name = "SEAT", value_parser = value_parser!(u32).range(0..1024))]
        seat: u32,
        /// Stay until the new one serves and the old one gets no connections any more
        #[arg(long)]
        wait: bool,
        /// Stop waiting after this time, for example 90s or 5m
        #[arg(long, value_name = "DURATION", requires = "wait", value_parser = config::parse_duration)]
        timeout: Option<Duration>,
    },
    /// Run the service in the foreground, and take over from a server that runs without this program
    #[command(after_help = TAKEOVER_HELP)]
    Takeover {
        /// The server's first process: of several the parent of the others
        #[arg(long, value_name = "PID", value_parser = value_parser!(i32).range(1..))]
        pid: i32,
    },
    /// Show every listening socket on the configured ports: whose it is, its queue, strangers, overlapping addresses
    Sockets {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Test what this machine can do: kernel, rights, settings, steering; say what is lost and how to mend it
    #[command(after_help = DOCTOR_HELP)]
    Doctor {
        /// As JSON
        #[arg(long)]
        json: bool,
    },
    /// Stop the service gracefully: finish what is open, then end
    Stop {
        /// Stay until it has ended
        #[arg(long)]
        wait: bool,
        /// End at once what a master that was killed has left: keeper and workers
        #[arg(long, conflicts_with = "wait")]
        left_behind: bool,
    },
    /// Replace the master's own program by the one at its path now: same pid, workers untouched
    #[command(after_help = REEXEC_HELP)]
    Reexec,
    /// Try whether the state of a running master is understood. Started by the master before a re-exec
    #[command(hide = true)]
    Preflight,
    /// Hold a master's descriptors, in case it is killed. Started by the master
    #[command(hide = true)]
    Keeper {
        /// Whose keeper it is, for those who read `ps`
        #[arg(long)]
        app: Option<String>,
    },
}

/// Whether and how the client of an upgrade or a rollback stays for the outcome.
#[derive(Debug, Clone, PartialEq, Eq, Args)]
pub(crate) struct Stay {
    /// Stay until the old workers get no connections any more, or until they are gone
    #[arg(long, value_enum, value_name = "FOR", num_args = 0..=1, require_equals = true,
          default_missing_value = "retired")]
    pub(crate) wait: Option<WaitFor>,
    /// The receipt as JSON
    #[arg(long)]
    pub(crate) json: bool,
    /// Stop waiting after this time, for example 90s or 5m
    #[arg(long, value_name = "DURATION", requires = "wait", value_parser = config::parse_duration)]
    pub(crate) timeout: Option<Duration>,
}

/// How long `upgrade --wait` stays.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum WaitFor {
    /// Until no new connection can reach the old workers
    Retired,
    /// Until the last old worker is gone
    Drained,
}

/// What the user wants.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Action {
    Run { config: PathBuf, log_format: Option<LogFormat>, log_level: Option<Level> },
    TakeOver { config: PathBuf, pid: i32, log_format: Option<LogFormat>, log_level: Option<Level> },
    Check { config: PathBuf },
    Status { master: Master, json: bool },
    Receipts { master: Master, json: bool },
    Upgrade { master: Master, force: bool, stay: Stay },
    Rollback { master: Master, stay: Stay },
    Scale { master: Master, workers: u32, wait: bool, timeout: Option<Duration> },
    RestartWorker { master: Master, seat: u32, wait: bool, timeout: Option<Duration> },
    Sockets { master: Master, json: bool },
    Doctor { config: Option<PathBuf>, json: bool },
    Stop { master: Master, wait: bool },
    StopLeftBehind { master: Master },
    Reexec { master: Master },
    Preflight,
    Keeper,
}

/// Which master a client speaks to.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Master {
    OfConfig(PathBuf),
    AtSocket(PathBuf),
}

impl Master {
    /// The path of its control socket.
    ///
    /// # Errors
    /// The config file does not tell.
    pub(crate) fn socket(&self) -> Result<PathBuf, ConfigErrors> {
        match self {
            Master::OfConfig(path) => config::control_socket(path),
            Master::AtSocket(path) => Ok(path.clone()),
        }
    }
}

/// Reads the command line; does not return when it is wrong or asks for help.
pub(crate) fn parse() -> Action {
    interpret(Cli::parse()).unwrap_or_else(|error| error.exit())
}

fn interpret(cli: Cli) -> Result<Action, clap::Error> {
    let wrong = |kind, text: &str| Err(Cli::command().error(kind, text));
    let Some(command) = cli.command else {
        return match (cli.config, cli.socket) {
            (Some(config), _) => {
                Ok(Action::Run { config, log_format: cli.log_format, log_level: cli.log_level })
            }
            (None, Some(_)) => {
                wrong(ErrorKind::MissingSubcommand, "--socket needs a subcommand: status, upgrade or stop")
            }
            (None, None) => {
                wrong(ErrorKind::MissingRequiredArgument, "say what to run: reuseportd --config FILE")
            }
        };
    };
    if let Command::Takeover { pid } = command {
        return match (cli.config, cli.log_format, cli.log_level) {
            (Some(config), log_format, log_level) => {
                Ok(Action::TakeOver { config, pid, log_format, log_level })
            }
            (None, ..) => wrong(
                ErrorKind::MissingRequiredArgument,
                "say what takes over: reuseportd takeover --config FILE --pid PID",
            ),
        };
    }
    if cli.log_format.is_some() || cli.log_level.is_some() {
        let text = "--log-format and --log-level are for running the master, not for subcommands";
        return wrong(ErrorKind::ArgumentConflict, text);
    }
    let missing = |text: &str| Cli::command().error(ErrorKind::MissingRequiredArgument, text);
    // systemd sets RUNTIME_DIRECTORY for ExecReload= too, so that a unit can say `reuseportd upgrade --wait`.
    let own_socket = || config::runtime_directory().map(|directory| directory.join("control.sock"));
    if matches!(command, Command::Doctor { .. }) && cli.socket.is_some() {
        let text = "doctor looks at the machine, not at a master: --config FILE says what the service needs";
        return wrong(ErrorKind::ArgumentConflict, text);
    }
    let (config, socket) = (cli.config, cli.socket);
    let master = |config: Option<PathBuf>| match (config, socket.or_else(own_socket)) {
        (Some(config), _) => Ok(Master::OfConfig(config)),
        (None, Some(socket)) => Ok(Master::AtSocket(socket)),
        (None, None) => Err(missing("which master? name it by --config FILE or --socket PATH")),
    };
    Ok(match command {
        Command::Check => Action::Check {
            config: config.ok_or_else(|| missing("say what to check: reuseportd check --config FILE"))?,
        },
        Command::Status { receipts: true, json } => Action::Receipts { master: master(config)?, json },
        Command::Status { receipts: false, json } => Action::Status { master: master(config)?, json },
        Command::Upgrade { stay, force } => Action::Upgrade { master: master(config)?, force, stay },
        Command::Rollback { stay } => Action::Rollback { master: master(config)?, stay },
        Command::Scale { workers, wait, timeout } => {
            Action::Scale { master: master(config)?, workers, wait, timeout }
        }
        Command::RestartWorker { seat, wait, timeout } => {
            Action::RestartWorker { master: master(config)?, seat, wait, timeout }
        }
        Command::Sockets { json } => Action::Sockets { master: master(config)?, json },
        Command::Doctor { json } => Action::Doctor { config, json },
        Command::Stop { left_behind: true, .. } => Action::StopLeftBehind { master: master(config)? },
        Command::Stop { wait, left_behind: false } => Action::Stop { master: master(config)?, wait },
        Command::Takeover { .. } => return Err(missing("say what takes over: --config FILE")),
        Command::Reexec => Action::Reexec { master: master(config)? },
        Command::Preflight => Action::Preflight,
        Command::Keeper { app: _app } => Action::Keeper,
    })
}

fn levels() -> impl TypedValueParser<Value = Level> {
    PossibleValuesParser::new(["error", "warn", "info", "debug", "trace"])
        .try_map(|word| word.parse::<Level>())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(words: &str) -> Result<Action, ErrorKind> {
        let words = std::iter::once("reuseportd").chain(words.split_whitespace());
        Cli::try_parse_from(words).and_then(interpret).map_err(|error| error.kind())
    }

    fn at_socket() -> Master {
        Master::AtSocket("/s".into())
    }

    #[test]
    fn clap_finds_the_definition_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_master_runs_without_a_subcommand() {
        let run = |log_format, log_level| Ok(Action::Run { config: "a.toml".into(), log_format, log_level });
        assert_eq!(parse("--config a.toml"), run(None, None));
        assert_eq!(
            parse("--config a.toml --log-format json --log-level debug"),
            run(Some(LogFormat::Json), Some(Level::DEBUG))
        );
    }

    #[test]
    fn clients_find_the_master_wherever_the_flag_stands() {
        let status = Ok(Action::Status { master: Master::OfConfig("a.toml".into()), json: true });
        assert_eq!(parse("status --json --config a.toml"), status);
        assert_eq!(parse("--config a.toml status --json"), status);
        assert_eq!(parse("stop --wait --socket /s"), Ok(Action::Stop { master: at_socket(), wait: true }));
    }

    #[test]
    fn looking_at_the_machine_needs_no_master() {
        assert_eq!(parse("doctor --json"), Ok(Action::Doctor { config: None, json: true }));
        let doctor = Ok(Action::Doctor { config: Some("a.toml".into()), json: false });
        assert_eq!(parse("doctor --config a.toml"), doctor);
        assert_eq!(parse("sockets --socket /s"), Ok(Action::Sockets { master: at_socket(), json: false }));
    }

    #[test]
    fn waiting_has_a_default_and_needs_an_equals_sign_for_more() {
        let stay = |wait, timeout| Stay { wait, json: false, timeout };
        let upgrade = |wait, timeout| {
            Ok(Action::Upgrade { master: at_socket(), force: false, stay: stay(wait, timeout) })
        };
        assert_eq!(parse("upgrade --socket /s"), upgrade(None, None));
        assert_eq!(parse("upgrade --wait --socket /s"), upgrade(Some(WaitFor::Retired), None));
        assert_eq!(
            parse("upgrade --wait=drained --timeout 90s --socket /s"),
            upgrade(Some(WaitFor::Drained), Some(Duration::from_secs(90)))
        );
        let drained = stay(Some(WaitFor::Drained), Some(Duration::from_secs(90)));
        assert_eq!(
            parse("rollback --wait=drained --timeout 90s --socket /s"),
            Ok(Action::Rollback { master: at_socket(), stay: drained })
        );
        assert_eq!(parse("upgrade --wait drained --socket /s"), Err(ErrorKind::UnknownArgument));
        assert_eq!(parse("upgrade --timeout 90s --socket /s"), Err(ErrorKind::MissingRequiredArgument));
        assert_eq!(parse("upgrade --wait --timeout 90 --socket /s"), Err(ErrorKind::ValueValidation));
    }

    #[test]
    fn workers_are_counted_and_named_by_seat() {
        let scale =
            |workers, wait, timeout| Ok(Action::Scale { master: at_socket(), workers, wait, timeout });
        assert_eq!(parse("scale 1024 --socket /s"), scale(1024, false, None));
        assert_eq!(
            parse("scale --wait --timeout 5s 1 --socket /s"),
            scale(1, true, Some(Duration::from_secs(5)))
        );
        assert_eq!(
            parse("restart-worker 0 --wait --socket /s"),
            Ok(Action::RestartWorker { master: at_socket(), seat: 0, wait: true, timeout: None })
        );
        let receipts = Ok(Action::Receipts { master: at_socket(), json: true });
        assert_eq!(parse("status --receipts --json --socket /s"), receipts);
    }

    #[test]
    fn a_takeover_runs_a_master() {
        let take_over = |log_format, log_level| {
            Ok(Action::TakeOver { config: "a.toml".into(), pid: 7, log_format, log_level })
        };
        assert_eq!(parse("takeover --config a.toml --pid 7"), take_over(None, None));
        assert_eq!(
            parse("--config a.toml takeover --log-format json --log-level warn --pid 7"),
            take_over(Some(LogFormat::Json), Some(Level::WARN))
        );
    }

    #[test]
    fn wrong_usage_is_told() {
        for (words, kind) in [
            ("", ErrorKind::MissingRequiredArgument),
            ("--socket /s", ErrorKind::MissingSubcommand),
            ("check", ErrorKind::MissingRequiredArgument),
            ("check --socket /s", ErrorKind::MissingRequiredArgument),
            ("status --config a --socket /s", ErrorKind::ArgumentConflict),
            ("--log-level info status --socket /s", ErrorKind::ArgumentConflict),
            ("doctor --socket /s", ErrorKind::ArgumentConflict),
            ("sockets", ErrorKind::MissingRequiredArgument),
            ("--config a --log-format journal", ErrorKind::InvalidValue),
            ("scale --socket /s", ErrorKind::MissingRequiredArgument),
            ("scale 0 --socket /s", ErrorKind::ValueValidation),
            ("scale 1025 --socket /s", ErrorKind::ValueValidation),
            ("scale many --socket /s", ErrorKind::ValueValidation),
            ("scale 2 --timeout 5s --socket /s", ErrorKind::MissingRequiredArgument),
            ("scale 2", ErrorKind::MissingRequiredArgument),
            ("restart-worker 1024 --socket /s", ErrorKind::ValueValidation),
            ("rollback --force --socket /s", ErrorKind::UnknownArgument),
            ("rollback --timeout 5s --socket /s", ErrorKind::MissingRequiredArgument),
            ("upgrade --receipts --socket /s", ErrorKind::UnknownArgument),
            ("takeover --pid 7", ErrorKind::MissingRequiredArgument),
            ("takeover --config a", ErrorKind::MissingRequiredArgument),
            ("takeover --config a --pid 0", ErrorKind::ValueValidation),
            ("takeover --config a --pid -7", ErrorKind::UnknownArgument),
            ("status --log-level info --socket /s", ErrorKind::ArgumentConflict),
            ("frobnicate", ErrorKind::InvalidSubcommand),
        ] {
            assert_eq!(parse(words), Err(kind), "{words}");
        }
    }
}
