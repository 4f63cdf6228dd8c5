//! What the contract has and this version does not yet. Refused, so that nobody relies on a key without effect;
//! a key set to its default asks for nothing and is accepted.

use std::ops::Range;
use std::time::Duration;

use toml::Spanned;

use super::problems::Problems;
use super::schema::{Listen, Raw};
use super::values::parse_duration;

/// What is said of each.
pub(super) const NOT_YET: &str = "not supported yet";

/// The place of the value, when it asks for something.
type Asked = Option<Range<usize>>;

/// Adds a finding for every key in use whose feature is missing.
pub(super) fn refuse(raw: &Raw, problems: &mut Problems) {
    let table: [(&str, Asked, &str); 3] = [
        ("steering.policy", other_than(&raw.steering.policy, "hash"), "leave it out, or write \"hash\""),
        ("console.listen", set(&raw.console.listen), "leave [console] out"),
        (
            "log.format",
            only(&raw.log.format, "journal"),
            "use \"auto\": under systemd it reaches the journal",
        ),
    ];
    for (key, asked, help) in table {
        refuse_one(key, asked, help, problems);
    }
    for (index, listen) in raw.listen.iter().enumerate() {
        for (key, asked, help) in of_listen(listen.get_ref()) {
            refuse_one(&format!("listen[{index}].{key}"), asked, help, problems);
        }
    }
}

fn of_listen(listen: &Listen) -> [(&'static str, Asked, &'static str); 3] {
    [
        ("protocol", other_than(&listen.protocol, "tcp"), "leave it out, or write \"tcp\""),
        ("affinity", other_than(&listen.affinity, "none"), "leave it out, or write \"none\""),
        ("flow_timeout", other_time(&listen.flow_timeout, 120_000), "leave it out"),
    ]
}

fn refuse_one(key: &str, asked: Asked, help: &str, problems: &mut Problems) {
    if asked.is_some() {
        problems.add(key, asked, NOT_YET, help);
    }
}

fn set<T>(value: &Option<Spanned<T>>) -> Asked {
    value.as_ref().map(Spanned::span)
}

fn only(value: &Option<Spanned<String>>, word: &str) -> Asked {
    value.as_ref().filter(|value| value.get_ref() == word).map(Spanned::span)
}

fn other_than(value: &Option<Spanned<String>>, default: &str) -> Asked {
    value.as_ref().filter(|value| value.get_ref() != default).map(Spanned::span)
}

fn other_time(value: &Option<Spanned<String>>, default_ms: u64) -> Asked {
    let default = Ok(Duration::from_millis(default_ms));
    value.as_ref().filter(|value| parse_duration(value.get_ref()) != default).map(Spanned::span)
}
