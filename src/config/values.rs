//! One value at a time: text of the file to a plain type, or a finding that says what is allowed.

use std::fmt::Display;
use std::ops::RangeInclusive;
use std::path::PathBuf;
use std::time::Duration;

use nix::sys::resource::Resource;
use nix::sys::signal::Signal;
use toml::Spanned;

use super::problems::Problems;
use super::schema::Scalar;
use super::suggest::did_you_mean;

/// Longer waits are a slip, and would overflow the clock they are added to.
const DURATION_MAX: Duration = Duration::from_secs(366 * 24 * 3600);

/// What is allowed where a duration is asked for.
pub(super) const DURATION_HELP: &str = "a duration is a string like \"250ms\", \"30s\", \"5m\" or \"1h 30m\"";

/// What is allowed where a share is asked for.
pub(super) const SHARE_HELP: &str = "a share is a string from \"0.1%\" to \"100%\", in steps of 0.1%";

/// Every limit `setrlimit` knows, by the name systemd and ulimit users expect.
pub(super) const LIMITS: &[(&str, Resource)] = &[
    ("as", Resource::RLIMIT_AS),
    ("core", Resource::RLIMIT_CORE),
    ("cpu", Resource::RLIMIT_CPU),
    ("data", Resource::RLIMIT_DATA),
    ("fsize", Resource::RLIMIT_FSIZE),
    ("locks", Resource::RLIMIT_LOCKS),
    ("memlock", Resource::RLIMIT_MEMLOCK),
    ("msgqueue", Resource::RLIMIT_MSGQUEUE),
    ("nice", Resource::RLIMIT_NICE),
    ("nofile", Resource::RLIMIT_NOFILE),
    ("nproc", Resource::RLIMIT_NPROC),
    ("rss", Resource::RLIMIT_RSS),
    ("rtprio", Resource::RLIMIT_RTPRIO),
    ("rttime", Resource::RLIMIT_RTTIME),
    ("sigpending", Resource::RLIMIT_SIGPENDING),
    ("stack", Resource::RLIMIT_STACK),
];

/// Why a value is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{message}: {help}")]
pub(crate) struct Refused {
    message: String,
    /// What is allowed, or why not.
    help: String,
}

/// `"5x" is not a duration`, and what is allowed.
pub(super) fn refused(written: &str, is: &str, help: impl Into<String>) -> Refused {
    Refused { message: format!("{} {is}", quoted(written)), help: help.into() }
}

/// A value as messages show it: in quotes, and no longer than a line.
pub(super) fn quoted(text: &str) -> String {
    match text.char_indices().nth(60) {
        Some((end, _)) => format!("{:?}…", &text[..end]),
        None => format!("{text:?}"),
    }
}

/// Reads a duration such as `"250ms"`.
///
/// # Errors
/// It is none, is negative, or is longer than a year.
pub(crate) fn parse_duration(text: &str) -> Result<Duration, Refused> {
    let no_duration = || refused(text, "is not a duration", DURATION_HELP);
    let parsed = jiff::fmt::friendly::SpanParser::new().parse_duration(text).map_err(|_| no_duration())?;
    let duration = Duration::try_from(parsed).map_err(|_| refused(text, "is negative", DURATION_HELP))?;
    if duration > DURATION_MAX {
        return Err(refused(text, "is longer than a year", DURATION_HELP));
    }
    Ok(duration)
}

/// Reads `"5%"` or `"0.1%"` as thousandths, 1 to 1000.
pub(super) fn parse_share(text: &str) -> Result<u16, Refused> {
    let no_share = || refused(text, "is not a share", SHARE_HELP);
    let number = text.strip_suffix('%').ok_or_else(no_share)?;
    let (whole, tenth) = number.split_once('.').unwrap_or((number, "0"));
    let digits = |part: &str, most: usize| {
        (1..=most).contains(&part.len()) && part.bytes().all(|byte| byte.is_ascii_digit())
    };
    let share = format!("{whole}{tenth}").parse().ok().filter(|share| (1..=1000).contains(share));
    share.filter(|_| digits(whole, 3) && digits(tenth, 1)).ok_or_else(no_share)
}

/// Reads an octal mode such as `"0640"` or `"027"`.
pub(super) fn parse_mode(text: &str) -> Result<u32, Refused> {
    let octal = (1..=4).contains(&text.len()) && text.bytes().all(|byte| matches!(byte, b'0'..=b'7'));
    let mode = u32::from_str_radix(text, 8).ok().filter(|mode| octal && *mode <= 0o777);
    mode.ok_or_else(|| {
        refused(text, "is not a mode", "a mode is a string of octal digits, \"000\" to \"777\"")
    })
}

/// Reads `"SIGTERM"` or `"term"`. What a program cannot handle is refused: it could not stop gracefully.
pub(super) fn parse_stop_signal(text: &str) -> Result<Signal, Refused> {
    let upper = text.to_ascii_uppercase();
    let name = if upper.starts_with("SIG") { upper } else { format!("SIG{upper}") };
    match name.parse() {
        Ok(Signal::SIGKILL | Signal::SIGSTOP) => {
            let help =
                "a worker must be able to catch it; SIGKILL comes by itself after upgrade.drain_timeout";
            Err(refused(text, "leaves a worker no chance to finish its connections", help))
        }
        Ok(signal) => Ok(signal),
        Err(_) => {
            let hint = did_you_mean(&name, Signal::iterator().map(Signal::as_str));
            let help =
                format!("{hint}allowed are names like \"SIGTERM\", \"SIGINT\", \"SIGQUIT\", \"SIGUSR1\"");
            Err(refused(text, "is no signal", help))
        }
    }
}

/// Reads the name of an app or listener.
pub(super) fn parse_name(text: &str) -> Result<String, Refused> {
    let good = |byte| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    if (1..=64).contains(&text.len()) && text.bytes().all(good) {
        return Ok(text.to_owned());
    }
    Err(refused(text, "is not a name", "a name is 1 to 64 of the characters a-z 0-9 _ -"))
}

/// Reads a path, which comes out absolute.
pub(super) fn parse_path(text: &str) -> Result<PathBuf, Refused> {
    match std::path::absolute(text) {
        Ok(path) if !text.contains('\0') => Ok(path),
        _ => Err(refused(text, "is not a path", "for example \"/srv/web\"")),
    }
}

/// Readers of keys: on a finding they note it and go on with a value that lets the other checks run.
impl Problems {
    /// Any text through `parse`.
    pub(super) fn text<T>(
        &mut self,
        key: &str,
        value: &Spanned<String>,
        parse: impl Fn(&str) -> Result<T, Refused>,
    ) -> Option<T> {
        parse(value.get_ref())
            .map_err(|refused| self.add(key, Some(value.span()), refused.message, refused.help))
            .ok()
    }

    /// A duration, `default` when absent.
    pub(super) fn duration(
        &mut self,
        key: &str,
        value: &Option<Spanned<String>>,
        default: Duration,
    ) -> Duration {
        value.as_ref().and_then(|value| self.text(key, value, parse_duration)).unwrap_or(default)
    }

    /// A duration that can't be zero.
    pub(super) fn wait(&mut self, key: &str, value: &Option<Spanned<String>>, default: Duration) -> Duration {
        let parse = |text: &str| match parse_duration(text)? {
            Duration::ZERO => Err(refused(text, "is no time at all", "it must be longer than zero")),
            wait => Ok(wait),
        };
        value.as_ref().and_then(|value| self.text(key, value, parse)).unwrap_or(default)
    }

    /// A whole number of `range`, `default` when absent.
    pub(super) fn number<T: TryFrom<i64> + PartialOrd + Copy + Display>(
        &mut self,
        key: &str,
        value: &Option<Spanned<Scalar>>,
        range: RangeInclusive<T>,
        default: T,
    ) -> T {
        let Some(value) = value else { return default };
        if let Scalar::Number(number) = value.get_ref()
            && let Ok(number) = T::try_from(*number)
            && range.contains(&number)
        {
            return number;
        }
        let allowed = format!("allowed: a number from {} to {}", range.start(), range.end());
        self.add(key, Some(value.span()), format!("{} is not possible", value.get_ref()), allowed);
        default
    }

    /// One of a few words; the first of `choices` is the default.
    pub(super) fn choice<T: Copy, const N: usize>(
        &mut self,
        key: &str,
        value: &Option<Spanned<String>>,
        choices: [(&str, T); N],
    ) -> T {
        let Some(value) = value else { return choices[0].1 };
        let written = value.get_ref();
        if let Some((_, choice)) = choices.iter().find(|(word, _)| word == written) {
            return *choice;
        }
        let words = choices.map(|(word, _)| word);
        let hint = did_you_mean(written, words);
        let allowed = words.map(|word| format!("{word:?}")).join(", ");
        self.add(
            key,
            Some(value.span()),
            format!("{} is not known", quoted(written)),
            format!("{hint}allowed: {allowed}"),
        );
        choices[0].1
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn durations() {
        for (text, ms) in [
            ("250ms", 250),
            ("30s", 30_000),
            ("5m", 300_000),
            ("1h 30m", 5_400_000),
            ("1.5s", 1500),
            ("0s", 0),
        ] {
            assert_eq!(parse_duration(text), Ok(Duration::from_millis(ms)), "{text}");
        }
        for text in ["", "30", "-1s", "1s ago", "5M", "1d", "PT1M", "9000h", "99999999999999h", "1s;"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }

    #[test]
    fn shares() {
        for (text, thousandths) in [("5%", 50), ("0.1%", 1), ("100%", 1000), ("12.5%", 125), ("100.0%", 1000)]
        {
            assert_eq!(parse_share(text), Ok(thousandths), "{text}");
        }
        for text in ["5", "%", "0%", "0.0%", "100.1%", "0.05%", "-1%", "+1%", "1.%", ".5%", "5 %", "1e1%"] {
            assert!(parse_share(text).is_err(), "{text}");
        }
    }

    #[test]
    fn modes() {
        for (text, mode) in [("027", 0o27), ("0600", 0o600), ("7", 7), ("777", 0o777)] {
            assert_eq!(parse_mode(text), Ok(mode), "{text}");
        }
        for text in ["", "8", "0o27", "1777", "+27", "00027", "u=rw"] {
            assert!(parse_mode(text).is_err(), "{text}");
        }
    }

    #[test]
    fn stop_signals() {
        for text in ["SIGTERM", "TERM", "term", "sigterm"] {
            assert_eq!(parse_stop_signal(text), Ok(Signal::SIGTERM), "{text}");
        }
        for text in ["KILL", "SIGSTOP", "SIGTREM", "15", ""] {
            assert!(parse_stop_signal(text).is_err(), "{text}");
        }
        assert!(parse_stop_signal("SIGTREM").unwrap_err().to_string().contains("did you mean `SIGTERM`"));
    }

    #[test]
    fn long_values_are_cut_in_messages() {
        let said = parse_name(&"ü".repeat(1000)).unwrap_err().to_string();
        assert!(said.contains('…') && said.chars().count() < 200, "{said}");
    }
}
