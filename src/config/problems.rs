//! What is wrong, collected: the checks go on after a finding, so that one run tells everything.

use std::ops::Range;

/// Collected at most; a file of garbage has hundreds of thousands.
const COLLECTED_MAX: usize = 1000;

/// The place of what is not in the file at all.
pub(super) const FILE_START: Range<usize> = 0..0;

/// One finding, with its place in the file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Problem {
    /// Bytes of the file; `None` when it concerns the file as a whole.
    pub(super) span: Option<Range<usize>>,
    /// `app.command`; empty when no key is concerned.
    pub(super) key: String,
    pub(super) message: String,
    /// What is allowed, why, or what to do.
    pub(super) help: Option<String>,
}

/// The list that grows while a config is checked.
#[derive(Debug, Default)]
pub(super) struct Problems(Vec<Problem>);

impl Problems {
    /// Adds a finding, unless this value has one already: the first names the root.
    pub(super) fn add(
        &mut self,
        key: impl Into<String>,
        span: Option<Range<usize>>,
        message: impl Into<String>,
        help: impl Into<String>,
    ) {
        let key = key.into();
        let told = self.0.iter().any(|problem| problem.span == span && problem.key == key && !key.is_empty());
        if told || self.0.len() == COLLECTED_MAX {
            return;
        }
        let help = Some(help.into()).filter(|text| !text.is_empty());
        self.0.push(Problem { span, key, message: message.into(), help });
    }

    pub(super) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// In the order of the file; what has no place comes first.
    pub(super) fn into_sorted(mut self) -> Vec<Problem> {
        self.0.sort_by_key(|p| p.span.as_ref().map(|s| s.start));
        self.0
    }
}
