//! One thing that was looked at.

use serde::Serialize;

/// How bad it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "snake_case")]
pub(super) enum Level {
    /// As it should be.
    Ok,
    /// Worth knowing; nothing that is relied on here is lost.
    Note,
    /// Something is lost, and the promise holds all the same.
    Warning,
    /// The promise can't be kept.
    Problem,
}

impl Level {
    pub(super) fn word(self) -> &'static str {
        match self {
            Level::Ok => "ok",
            Level::Note => "note",
            Level::Warning => "warning",
            Level::Problem => "problem",
        }
    }
}

/// What was found, and unless all is well what that costs and what mends it.
#[derive(Debug, PartialEq, Eq, Serialize)]
pub(super) struct Finding {
    /// What was looked at, the same word in every version.
    pub(super) check: &'static str,
    pub(super) level: Level,
    pub(super) found: String,
    pub(super) lost: Option<String>,
    /// A command, where there is one.
    pub(super) remedy: Option<String>,
}

impl Finding {
    /// As it should be.
    pub(super) fn ok(check: &'static str, found: impl Into<String>) -> Finding {
        Finding { check, level: Level::Ok, found: found.into(), lost: None, remedy: None }
    }

    pub(super) fn bad(
        level: Level,
        check: &'static str,
        found: impl Into<String>,
        lost: impl Into<String>,
        remedy: impl Into<String>,
    ) -> Finding {
        let (lost, remedy) = (Some(lost.into()), Some(remedy.into()));
        Finding { check, level, found: found.into(), lost, remedy }
    }
}
