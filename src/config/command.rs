//! The words of `app.command` and `upgrade.check`, with placeholders.
//!
//! `{generation}`, `{seat}`, `{address.NAME}`, `{host.NAME}`, `{port.NAME}` and `{path.NAME}` are filled in for each
//! worker (NAME is the name of a `[[listen]]`; unix sockets have a path, all others host and port), all but `{seat}` for
//! a check too. Anything else in braces that has the form of a
//! placeholder (lower-case words and dots: `{sead}`) is a slip and refused; any other brace, as in JSON or shell code,
//! stands for itself. To pass on the text `{seat}` itself, write `{{seat}}`.

use toml::Spanned;

use super::problems::Problems;
use super::suggest::did_you_mean;
use super::{Config, Entry, Listeners};

/// What a command looks like.
pub(super) const EXAMPLE: &str =
    "the program and its arguments, for example [\"/srv/web/bin/web\", \"-q\"]; there is no shell";

/// A piece of an argument.
#[derive(Debug, PartialEq, Eq)]
enum Piece<'a> {
    Literal(&'a str),
    Placeholder(&'a str),
}

impl Config {
    /// The worker's argv. The first word is the program as written, see [`super::find_executable`].
    pub(crate) fn expand_command(&self, generation: u32, seat: u16) -> Vec<String> {
        self.app.command.iter().map(|word| expand(word, self.listeners(), generation, Some(seat))).collect()
    }

    /// The argv of `upgrade.check` for a generation; empty without a check. The first word is the program as written,
    /// see [`super::find_check`].
    pub(crate) fn expand_check(&self, generation: u32) -> Vec<String> {
        self.upgrade.check.iter().map(|word| expand(word, self.listeners(), generation, None)).collect()
    }
}

/// Checks the words of a command; `seat` is some where there is one to fill in, `listen` what placeholders may name,
/// when that is known.
pub(super) fn check_words(
    key: &str,
    words: &[Spanned<String>],
    seat: Option<u16>,
    listen: Option<Listeners<'_>>,
    problems: &mut Problems,
) {
    for (index, word) in words.iter().enumerate() {
        let (key, place, word) = (format!("{key}[{index}]"), Some(word.span()), word.get_ref());
        if index == 0 && word.trim().is_empty() {
            problems.add(&key, place.clone(), "empty", EXAMPLE);
        }
        if index == 0 && has_placeholder(word) {
            let help = "one program is looked up for a whole generation: use placeholders in arguments only";
            problems.add(&key, place.clone(), "a placeholder in the program's name", help);
        }
        if word.contains('\0') {
            problems.add(&key, place.clone(), "contains a NUL character", "");
        }
        let slip = |listen| Some((listen, unknown_placeholder(word, listen, seat)?));
        if let Some((listen, slip)) = listen.and_then(slip) {
            let (message, help) = match of_the_other_kind(slip, listen) {
                Some((why, instead)) => (format!("{{{slip}}}: {why}"), instead),
                None => (format!("unknown placeholder {{{slip}}}"), placeholder_help(slip, listen, seat)),
            };
            problems.add(&key, place, message, help);
        }
    }
}

/// Why a listener that there is does not have what is asked for, and what it has.
fn of_the_other_kind(slip: &str, listen: Listeners<'_>) -> Option<(&'static str, String)> {
    let (what, of) = slip.split_once('.')?;
    let entry = listen.in_order().find(|entry| entry.name() == of)?;
    let said = match (what, entry) {
        ("host" | "port", Entry::Unix(_)) => {
            ("a unix socket has neither host nor port", format!("{{path.{of}}} is its path"))
        }
        ("path", Entry::Ip(_)) => {
            ("an IP address has no path", format!("there are {{address.{of}}}, {{host.{of}}}, {{port.{of}}}"))
        }
        _ => return None,
    };
    Some(said)
}

fn placeholder_help(slip: &str, listen: Listeners<'_>, seat: Option<u16>) -> String {
    let mut known = vec!["generation".to_owned()];
    known.extend(seat.map(|_| "seat".to_owned()));
    for entry in listen.in_order() {
        let own: &[&str] = match entry {
            Entry::Ip(_) => &["address", "host", "port"],
            Entry::Unix(_) => &["address", "path"],
        };
        known.extend(own.iter().map(|what| format!("{what}.{}", entry.name())));
    }
    let hint = match slip {
        // Known elsewhere: no slip of the pen.
        "seat" => "it is run for all seats together; ".to_owned(),
        slip => did_you_mean(slip, known.iter().map(String::as_str)),
    };
    let known = known.iter().map(|word| format!("{{{word}}}")).collect::<Vec<_>>().join(", ");
    format!("{hint}known: {known}; write {{{{{slip}}}}} to pass {{{slip}}} on as it is")
}

/// The first placeholder of an argument that means nothing here.
fn unknown_placeholder<'a>(argument: &'a str, listen: Listeners<'_>, seat: Option<u16>) -> Option<&'a str> {
    pieces(argument).into_iter().find_map(|piece| match piece {
        Piece::Placeholder(name) if value(name, listen, 0, seat).is_none() => Some(name),
        _ => None,
    })
}

/// The argument with what is known filled in.
fn expand(argument: &str, listen: Listeners<'_>, generation: u32, seat: Option<u16>) -> String {
    let fill = |name: &str| value(name, listen, generation, seat).unwrap_or_else(|| format!("{{{name}}}"));
    let pieces = pieces(argument).into_iter().map(|piece| match piece {
        Piece::Literal(text) => text.to_owned(),
        Piece::Placeholder(name) => fill(name),
    });
    pieces.collect()
}

/// Whether there is anything to fill in.
fn has_placeholder(argument: &str) -> bool {
    pieces(argument).iter().any(|piece| matches!(piece, Piece::Placeholder(_)))
}

fn value(name: &str, listen: Listeners<'_>, generation: u32, seat: Option<u16>) -> Option<String> {
    let (what, of) = name.split_once('.').unwrap_or((name, ""));
    let entry = || listen.in_order().find(|entry| entry.name() == of);
    let ip = || listen.ip.iter().find(|listen| listen.name == of).map(|listen| listen.address);
    let path = || listen.unix.iter().find(|listen| listen.name == of).map(|listen| &listen.path);
    match (what, of) {
        ("generation", "") => Some(generation.to_string()),
        ("seat", "") => seat.map(|seat| seat.to_string()),
        ("address", _) => entry().map(Entry::address),
        ("host", _) => ip().map(|address| address.ip().to_string()),
        ("port", _) => ip().map(|address| address.port().to_string()),
        ("path", _) => path().map(|path| path.display().to_string()),
        _ => None,
    }
}

fn pieces(argument: &str) -> Vec<Piece<'_>> {
    let mut pieces = Vec::new();
    let mut rest = argument;
    while let Some(open) = rest.find('{') {
        let (before, braced) = rest.split_at(open);
        pieces.push(Piece::Literal(before));
        let escaped = braced
            .strip_prefix("{{")
            .and_then(word)
            .filter(|word| braced[2 + word.len()..].starts_with("}}"));
        if let Some(word) = escaped {
            let inner = word.len() + 2;
            pieces.push(Piece::Literal(&braced[1..1 + inner]));
            rest = &braced[inner + 2..];
        } else if let Some(word) = word(&braced[1..]) {
            pieces.push(Piece::Placeholder(word));
            rest = &braced[word.len() + 2..];
        } else {
            pieces.push(Piece::Literal("{"));
            rest = &braced[1..];
        }
    }
    pieces.push(Piece::Literal(rest));
    pieces
}

/// What stands before the next `}`, if it has the form of a placeholder.
fn word(text: &str) -> Option<&str> {
    let word = text.split_once('}')?.0;
    let (what, of) = word.split_once('.').unwrap_or((word, "x"));
    let name = |byte: u8| matches!(byte, b'a'..=b'z' | b'0'..=b'9' | b'_' | b'-');
    let good = what.starts_with(|first: char| first.is_ascii_lowercase())
        && what.bytes().all(|byte| matches!(byte, b'a'..=b'z' | b'_'))
        && !of.is_empty()
        && of.bytes().all(name);
    good.then_some(word)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::config::{Bind, Listen, UnixListen};
    use reuseportd_wire::status::Protocol;

    fn with_listeners(test: impl Fn(Listeners<'_>)) {
        let ip = [Listen {
            name: "http".into(),
            protocol: Protocol::Tcp,
            address: "[::1]:80".parse().unwrap(),
            bind: Bind::Worker,
            v6only: false,
            backlog: 1,
            force_reuseport: false,
            flows: None,
        }];
        let unix = [UnixListen {
            name: "local".into(),
            path: "/run/web.sock".into(),
            mode: 0o660,
            backlog: 1,
            position: 1,
        }];
        test(Listeners { ip: &ip, unix: &unix });
    }

    #[test]
    fn placeholders_are_filled_in() {
        for (written, filled) in [
            ("", ""),
            ("-q", "-q"),
            ("g{generation}s{seat}", "g7s3"),
            ("{address.http}", "[::1]:80"),
            ("{host.http} {port.http}", "::1 80"),
            ("{address.local}: {path.local}", "unix:/run/web.sock: /run/web.sock"),
            ("{{seat}}", "{seat}"),
            ("${{home}}", "${home}"),
            ("{{{seat}}}", "{{seat}}"),
        ] {
            with_listeners(|listen| assert_eq!(expand(written, listen, 7, Some(3)), filled, "{written}"));
        }
    }

    #[test]
    fn other_braces_stand_for_themselves() {
        for text in [
            "{",
            "}",
            "{}",
            r#"{"a":{"b":1}}"#,
            "${HOME}",
            "f() { echo; }",
            "{a,b}",
            "{{.Name}}",
            "{ seat }",
            "é{ü}",
        ] {
            with_listeners(|listen| {
                assert_eq!(expand(text, listen, 7, Some(3)), text);
                assert_eq!(unknown_placeholder(text, listen, Some(0)), None, "{text}");
            });
        }
    }

    #[test]
    fn slips_are_found() {
        for (text, slip) in [
            ("{sead}", "sead"),
            ("x{port.https}y", "port.https"),
            ("{seat.http}", "seat.http"),
            ("{address}", "address"),
            ("{port.local}", "port.local"),
            ("{path.http}", "path.http"),
        ] {
            with_listeners(|listen| assert_eq!(unknown_placeholder(text, listen, Some(0)), Some(slip)));
        }
        with_listeners(|listen| assert_eq!(unknown_placeholder("{seat}", listen, None), Some("seat")));
    }

    #[test]
    fn what_the_other_kind_has_is_told() {
        with_listeners(|listen| {
            let said =
                |slip| of_the_other_kind(slip, listen).map(|(why, instead)| format!("{why}: {instead}"));
            assert!(said("port.local").unwrap().contains("{path.local}"));
            assert!(said("path.http").unwrap().contains("{port.http}"));
            assert_eq!(said("sead.http"), None);
        });
    }
}
