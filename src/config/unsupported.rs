//! What the contract has and this version does not yet. Refused, so that nobody relies on a key without effect;
//! a key set to its default asks for nothing and is accepted.

use std::ops::Range;

use toml::Spanned;

use super::problems::Problems;
use super::schema::Raw;

/// What is said of each.
pub(super) const NOT_YET: &str = "not supported yet";

/// The place of the value, when it asks for something.
type Asked = Option<Range<usize>>;

/// Adds a finding for every key in use whose feature is missing.
pub(super) fn refuse(raw: &Raw, problems: &mut Problems) {
    let table: [(&str, Asked, &str); 2] = [
        ("console.listen", set(&raw.console.listen), "leave [console] out"),
        (
            "log.format",
            only(&raw.log.format, "journal"),
            "use \"auto\": under systemd it reaches the journal",
        ),
    ];
    for (key, asked, help) in table {
        if asked.is_some() {
            problems.add(key, asked, NOT_YET, help);
        }
    }
}

fn set<T>(value: &Option<Spanned<T>>) -> Asked {
    value.as_ref().map(Spanned::span)
}

fn only(value: &Option<Spanned<String>>, word: &str) -> Asked {
    value.as_ref().filter(|value| value.get_ref() == word).map(Spanned::span)
}
