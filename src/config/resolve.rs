//! What was typed to what is meant: every value parsed, every default filled in, keys held against each other.

use std::path::Path;
use std::time::Duration;

use toml::Spanned;

use super::problems::Problems;
use super::schema::{self, Raw};
use super::values::{Refused, parse_mode, refused};
use super::*;
use super::{app, identity, listen, socket_path, unsupported, upgrade};

const SECOND: Duration = Duration::from_secs(1);

/// Checks the whole file.
pub(super) fn resolve(path: &Path, text: &str, raw: &Raw) -> Result<Config, ConfigErrors> {
    let mut problems = Problems::default();
    let listen = listen::resolve(&raw.listen, &mut problems);
    // A listener with a fault of its own would make its placeholders look unknown.
    let all = listen.all();
    let known = Some(all).filter(|known| known.in_order().count() == raw.listen.len());
    let app = app::resolve(path, raw.app.as_ref(), known, &mut problems);
    let steering = steering(&raw.steering, &mut problems);
    listen::check_engine(&raw.listen, steering.engine, &mut problems);
    let readiness = readiness(&raw.readiness, &mut problems);
    check_readiness(&raw.readiness, readiness.method, all, &mut problems);
    let upgrade = upgrade::resolve(&raw.upgrade, steering.engine, all, known, &mut problems);
    let restart = restart(&raw.restart, &mut problems);
    let control = control(&raw.control, &app.name, &mut problems);
    let log = log(&raw.log, &mut problems);
    let watchdog = raw.watchdog.timeout.as_ref();
    let watchdog =
        watchdog.and_then(|timeout| problems.text("watchdog.timeout", timeout, parse_watchdog_timeout));
    unsupported::refuse(raw, &mut problems);
    if problems.is_empty() {
        let path = std::path::absolute(path).unwrap_or_else(|_| path.to_owned());
        let listen::Resolved { ip: listen, unix } = listen;
        Ok(Config { path, app, listen, unix, steering, readiness, upgrade, restart, watchdog, control, log })
    } else {
        Err(ConfigErrors::new(path, text, problems))
    }
}

fn steering(raw: &schema::Steering, problems: &mut Problems) -> Steering {
    use EngineChoice::{Auto, Cbpf, Ebpf, None};
    let engines = [("auto", Auto), ("ebpf", Ebpf), ("cbpf", Cbpf), ("none", None)];
    let engine = problems.choice("steering.engine", &raw.engine, engines);
    let policies = [("hash", Policy::Hash), ("cpu", Policy::Cpu)];
    let policy = problems.choice("steering.policy", &raw.policy, policies);
    if let Some(asked) = raw.policy.as_ref().filter(|_| policy == Policy::Cpu && engine == None) {
        let help = "leave it out, or set steering.engine to \"auto\"";
        problems.add("steering.policy", Some(asked.span()), "needs an engine that steers", help);
    }
    Steering { engine, policy }
}

fn readiness(raw: &schema::Readiness, problems: &mut Problems) -> Readiness {
    use ReadinessMethod::{Http, Listen, Notify};
    let path = match &raw.path {
        Some(path) => problems.text("readiness.path", path, parse_path),
        None => None,
    };
    Readiness {
        method: problems.choice(
            "readiness.method",
            &raw.method,
            [("notify", Notify), ("listen", Listen), ("http", Http)],
        ),
        path: path.unwrap_or_else(|| "/healthz".to_owned()),
        passes: problems.number("readiness.passes", &raw.passes, 1..=1000_u16, 2),
        interval: problems.wait("readiness.interval", &raw.interval, SECOND / 5),
    }
}

/// Datagrams show nothing of whether their reader is ready, and a shared socket nothing of any single worker.
fn check_readiness(
    raw: &schema::Readiness,
    method: ReadinessMethod,
    listen: Listeners<'_>,
    problems: &mut Problems,
) {
    let is_shared = listen.ip.is_empty() && !listen.unix.is_empty();
    let listen = listen.ip;
    let has_tcp = listen.iter().any(|listen| listen.protocol == Protocol::Tcp);
    let is_passed = listen.iter().all(|listen| listen.bind == Bind::Master);
    let why = match method {
        ReadinessMethod::Notify => return,
        _ if is_shared => {
            "shows nothing where all sockets are shared: any worker may accept, the old ones too"
        }
        _ if has_tcp || listen.is_empty() => return,
        ReadinessMethod::Listen if !is_passed => return,
        ReadinessMethod::Listen => "shows nothing where all sockets are UDP and passed by the master",
        ReadinessMethod::Http => "needs a [[listen]] with protocol = \"tcp\" to send the request to",
    };
    let place = raw.method.as_ref().map(Spanned::span);
    problems.add("readiness.method", place, why, "use \"notify\": the worker says READY=1");
}

/// The path of a request: what would break its first line is refused.
fn parse_path(text: &str) -> Result<String, Refused> {
    if text.starts_with('/')
        && text.bytes().all(|byte| byte.is_ascii_graphic())
        && text.len() <= PATH_BYTES_MAX
    {
        return Ok(text.to_owned());
    }
    Err(refused(
        text,
        "is no path of a request",
        "for example \"/healthz\"; ASCII without blanks, up to 1024 characters",
    ))
}

/// Longest path of a request.
const PATH_BYTES_MAX: usize = 1024;

fn restart(raw: &schema::Restart, problems: &mut Problems) -> Restart {
    let backoff = problems.wait("restart.backoff", &raw.backoff, SECOND / 10);
    let backoff_max = problems.wait("restart.backoff_max", &raw.backoff_max, 10 * SECOND);
    if backoff > backoff_max {
        let place = raw.backoff.as_ref().or(raw.backoff_max.as_ref()).map(Spanned::span);
        let message = format!("{backoff:?} is longer than restart.backoff_max ({backoff_max:?})");
        problems.add(
            "restart.backoff",
            place,
            message,
            "the delay begins with backoff and doubles up to backoff_max",
        );
    }
    let breaker = &raw.breaker;
    Restart {
        backoff,
        backoff_max,
        stable_after: problems.duration("restart.stable_after", &raw.stable_after, 10 * SECOND),
        breaker: Breaker {
            exits: problems.number("restart.breaker.exits", &breaker.exits, 1..=1000, 10),
            window: problems.wait("restart.breaker.window", &breaker.window, 60 * SECOND),
            cooldown: problems.wait("restart.breaker.cooldown", &breaker.cooldown, 60 * SECOND),
        },
    }
}

/// Who beats every half of less is found dead for being scheduled late.
const WATCHDOG_MIN: Duration = Duration::from_millis(100);

fn parse_watchdog_timeout(text: &str) -> Result<Duration, Refused> {
    let timeout = parse_duration(text)?;
    let help = "it must be 100ms or more; leave [watchdog] out to have none";
    if timeout < WATCHDOG_MIN { Err(refused(text, "is too short", help)) } else { Ok(timeout) }
}

fn control(raw: &schema::Control, app: &str, problems: &mut Problems) -> Control {
    let socket = socket_path::resolve(&raw.socket, app, problems);
    let mut allow_users = Vec::new();
    for (index, user) in raw.allow_users.iter().enumerate() {
        match identity::user(user.get_ref()) {
            Ok(user) => allow_users.push(user.uid.as_raw()),
            Err(said) => problems.add(
                format!("control.allow_users[{index}]"),
                Some(user.span()),
                said,
                "allowed: user names and uids of this machine",
            ),
        }
    }
    // With guests the credentials decide, so that the mode must let everybody knock.
    let default = if allow_users.is_empty() { 0o600 } else { 0o666 };
    let mode = raw.mode.as_ref().and_then(|mode| problems.text("control.mode", mode, parse_mode));
    Control { socket, mode: mode.unwrap_or(default), allow_users }
}

fn log(raw: &schema::Log, problems: &mut Problems) -> Log {
    use tracing::Level;
    let formats = [
        ("auto", LogFormat::Auto),
        ("text", LogFormat::Text),
        ("json", LogFormat::Json),
        ("journal", LogFormat::Auto),
    ];
    let levels = [
        ("info", Level::INFO),
        ("error", Level::ERROR),
        ("warn", Level::WARN),
        ("debug", Level::DEBUG),
        ("trace", Level::TRACE),
    ];
    Log {
        format: problems.choice("log.format", &raw.format, formats),
        level: problems.choice("log.level", &raw.level, levels),
    }
}
