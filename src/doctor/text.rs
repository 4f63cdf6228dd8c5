//! The report for people.

use super::Report;
use super::finding::{Finding, Level};
use crate::client::text::{Paint, Tone, escape, wrap};

/// Width of the column of levels.
const LEVEL: usize = 8;

/// Findings, then what follows from them.
pub(super) fn render(report: &Report, paint: Paint) -> String {
    let what = report.config.as_deref().map_or_else(|| "default settings".to_owned(), escape);
    let heading = format!("reuseportd {} on Linux {}, for {what}", report.version, escape(&report.kernel));
    let mut text = paint.tone(Tone::Heading, &heading) + "\n\n";
    for one in &report.findings {
        text += &finding(one, paint);
    }
    let engine = report.engine.unwrap_or("none can be had");
    text += &format!("\n{}\n", paint.tone(Tone::Heading, &format!("engine: {engine}")));
    text += &wrap(&report.engine_reason, 2);
    if !report.guarantees.is_empty() {
        text += &format!("\n{}\n", paint.tone(Tone::Heading, "connections lost"));
    }
    for one in &report.guarantees {
        text += &format!("  workers: {}\n", one.workers);
        text += &format!("    in an upgrade, failed or not    {}\n", one.upgrade);
        text += &format!("    when a worker is SIGKILLed      {}\n", one.worker_killed);
        text += &format!("    when the last one is SIGKILLed  {}\n", one.last_worker_killed);
    }
    text + "\n" + &conclusion(report, paint)
}

fn finding(one: &Finding, paint: Paint) -> String {
    let tone = match one.level {
        Level::Ok => Tone::Good,
        Level::Note => Tone::Plain,
        Level::Warning => Tone::Notable,
        Level::Problem => Tone::Bad,
    };
    let body = wrap(&format!("{}: {}", one.check, one.found), LEVEL);
    let level = format!("{:LEVEL$}", one.level.word());
    let mut text = paint.tone(tone, &level) + body.get(LEVEL..).unwrap_or_default();
    if let Some(lost) = &one.lost {
        text += &wrap(&format!("lost: {lost}"), LEVEL + 2);
    }
    if let Some(remedy) = &one.remedy {
        // A command is to be copied: in one line, whatever its length.
        text += &format!("{:1$}mend: {2}\n", "", LEVEL + 2, escape(remedy));
    }
    text
}

fn conclusion(report: &Report, paint: Paint) -> String {
    let count = |level| report.findings.iter().filter(|finding| finding.level == level).count();
    let (problems, warnings) = (count(Level::Problem), count(Level::Warning));
    let (tone, said) = match (problems, warnings) {
        (0, 0) => (Tone::Good, "all well: the promise can be kept here".to_owned()),
        (0, _) => (Tone::Notable, format!("the promise can be kept here; warnings: {warnings}")),
        _ => {
            (Tone::Bad, format!("the promise can't be kept here; problems: {problems}, warnings: {warnings}"))
        }
    };
    paint.tone(tone, &said) + "\n"
}
