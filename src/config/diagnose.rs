//! Findings as text: for a person with the lines of the file, for a log or receipt in one line.

use std::fmt;
use std::io::IsTerminal;
use std::ops::Range;
use std::path::{Path, PathBuf};

use annotate_snippets::{AnnotationKind, Group, Level, Origin, Renderer, Snippet};

use super::problems::{Problem, Problems};
use crate::client::text::escape;

/// Shown at most; garbage has an error in every line, and nobody reads the hundredth.
const SHOWN_MAX: usize = 20;

/// Why a config file was refused: at least one finding.
#[derive(Debug)]
pub(crate) struct ConfigErrors {
    path: PathBuf,
    text: String,
    problems: Vec<Problem>,
}

impl ConfigErrors {
    pub(super) fn new(path: &Path, text: &str, problems: Problems) -> Self {
        let problems = problems.into_sorted();
        Self { path: path.to_owned(), text: text.to_owned(), problems }
    }

    /// The first finding and how many more there are, in one line.
    pub(crate) fn summary(&self) -> String {
        let path = escape(&self.path.to_string_lossy());
        let Some(first) = self.problems.first() else { return format!("{path}: refused") };
        let place = first.span.as_ref().map(|span| {
            let (line, column) = line_column(&self.text, span.start);
            format!(":{line}:{column}")
        });
        let more = match self.problems.len() - 1 {
            0 => String::new(),
            more => format!(" (and {more} more)"),
        };
        format!("{path}{}: {}{more}", place.unwrap_or_default(), title(first).replace(char::is_control, " "))
    }

    fn render(&self, renderer: &Renderer) -> String {
        let (path, text) = (escape(&self.path.to_string_lossy()), harmless(&self.text));
        let reports = self.problems.iter().take(SHOWN_MAX).map(|problem| {
            let group = Level::ERROR.primary_title(harmless(&title(problem)));
            let mut group = match &problem.span {
                Some(span) => group.element(
                    Snippet::source(text.as_str())
                        .path(path.as_str())
                        .annotation(AnnotationKind::Primary.span(visible(&self.text, span))),
                ),
                None => Group::with_title(group).element(Origin::path(path.as_str())),
            };
            if let Some(help) = &problem.help {
                group = group.element(Level::HELP.message(harmless(help)));
            }
            renderer.render(&[group])
        });
        let mut text = reports.collect::<Vec<_>>().join("\n\n");
        if let Some(more @ 1..) = self.problems.len().checked_sub(SHOWN_MAX) {
            text.push_str(&format!("\n\n{more} more problems are not shown"));
        }
        text
    }
}

impl fmt::Display for ConfigErrors {
    /// Everything, with the lines concerned; in colour when stderr is a terminal and `NO_COLOR` is not set.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let plain = std::env::var_os("NO_COLOR").is_some_and(|value| !value.is_empty())
            || !std::io::stderr().is_terminal();
        f.write_str(&self.render(&if plain { Renderer::plain() } else { Renderer::styled() }))
    }
}

impl std::error::Error for ConfigErrors {}

fn title(problem: &Problem) -> String {
    if problem.key.is_empty() {
        problem.message.clone()
    } else {
        format!("{}: {}", problem.key, problem.message)
    }
}

/// The renderer makes the first 32 control characters visible, but not these, which terminals act on as well. Places
/// stay what they are: the substitute has as many bytes.
fn harmless(text: &str) -> String {
    text.chars().map(|c| if ('\u{80}'..='\u{9f}').contains(&c) { '\u{b7}' } else { c }).collect()
}

/// A table or string over many lines is shown by its first: the rest explains nothing.
fn visible(text: &str, span: &Range<usize>) -> Range<usize> {
    let inside = text.get(span.clone()).unwrap_or_default();
    span.start..span.start + inside.find('\n').unwrap_or(inside.len())
}

/// 1-based, the column in characters, as editors count them.
fn line_column(text: &str, byte: usize) -> (usize, usize) {
    let before = text.get(..byte).unwrap_or(text);
    let line_start = before.rfind('\n').map_or(0, |newline| newline + 1);
    (before.matches('\n').count() + 1, before[line_start..].chars().count() + 1)
}
