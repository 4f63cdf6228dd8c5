//! A receipt in words.

use std::fmt::Write;

use reuseportd_wire::status::{Outcome, Phase, Receipt, ReceiptListener, Trigger};

use super::text::{Cell, Paint, Table, Tone, count, escape, microseconds, milliseconds, wrap};

/// What the upgrade did: how it ended, its phases, its listeners, what was lost. Without the reason, see [`reason`].
pub(super) fn render(receipt: &Receipt, paint: Paint) -> String {
    let mut text = String::new();
    // Writing to a String can't fail.
    if let Some(by) = receipt.superseded_by {
        let _ = writeln!(text, "superseded by generation {by}, whose receipt this is:");
    }
    let _ = writeln!(text, "{}", paint.tone(tone(receipt.outcome), &headline(receipt)));
    let phases: Vec<_> =
        receipt.phases.iter().map(|time| format!("{} {}", time.phase, milliseconds(time.ms))).collect();
    if !phases.is_empty() {
        text += &wrap(&phases.join(", "), 2);
    }
    // Before new connections are turned to another generation nothing happens to a listener.
    let is_steered = receipt.phases.iter().any(|time| matches!(time.phase, Phase::Canary | Phase::Switch));
    if is_steered && !receipt.listeners.is_empty() {
        text += &listeners(&receipt.listeners).render(2, paint);
    }
    let steered_back = receipt.steer_back_us.map(|us| format!("steered back in {}", microseconds(us)));
    let passed = (receipt.checks_passed > 0).then(|| count(Some(receipt.checks_passed), "check") + " passed");
    let trial: Vec<_> = passed.into_iter().chain(steered_back).collect();
    if !trial.is_empty() {
        text += &wrap(&trial.join(", "), 2);
    }
    if receipt.outcome == Outcome::Completed || receipt.forced_kills > 0 {
        let _ = writeln!(
            text,
            "  {} killed, {} cut",
            count(Some(receipt.forced_kills), "worker"),
            count(receipt.connections_cut, "open connection")
        );
    }
    text
}

/// The same, with the reason unless it completed.
pub(super) fn render_with_reason(receipt: &Receipt, paint: Paint) -> String {
    let mut text = render(receipt, paint);
    if receipt.outcome != Outcome::Completed {
        text += &wrap(reason(receipt), 2);
    }
    text
}

/// A line for each receipt, and the reasons below.
pub(super) fn render_all(receipts: &[Receipt], paint: Paint) -> String {
    if receipts.is_empty() {
        return "no upgrade yet\n".to_owned();
    }
    let mut table = Table::new(["STARTED", "FROM", "TO", "BY", "OUTCOME", "TOOK"].map(str::to_owned));
    for receipt in receipts {
        let generation =
            |number: Option<u32>| Cell::number(Some(number.map_or("-".to_owned(), |n| n.to_string())));
        table.row(vec![
            Cell::text(&receipt.started_at),
            generation(receipt.from),
            generation(receipt.to),
            Cell::text(receipt.trigger.as_str()),
            Cell::text(&ended(receipt.outcome)).tone(tone(receipt.outcome)),
            Cell::number(Some(milliseconds(receipt.duration_ms))),
        ]);
    }
    let table = table.render(0, paint);
    let reasons = receipts.iter().map(|receipt| receipt.reason.as_deref());
    let reasons = std::iter::once(None).chain(reasons).map(|reason| reason.map(|text| wrap(text, 2)));
    table.lines().zip(reasons).map(|(row, reason)| format!("{row}\n{}", reason.unwrap_or_default())).collect()
}

/// Why it ended so, with what to do about it when there is nothing in the receipt.
pub(super) fn reason(receipt: &Receipt) -> &str {
    receipt.reason.as_deref().unwrap_or("no reason given (the master's log may tell)")
}

fn headline(receipt: &Receipt) -> String {
    let noun = noun(receipt);
    let what = match (receipt.from, receipt.to) {
        (Some(from), Some(to)) => format!("{noun} from generation {from} to {to}"),
        (None, Some(to)) => format!("launch of generation {to}"),
        (Some(from), None) => format!("{noun} from generation {from}"),
        (None, None) => noun.to_owned(),
    };
    let ended = ended(receipt.outcome);
    let took = milliseconds(receipt.duration_ms);
    format!("{what}: {ended} in {took} (by {}, {})", receipt.trigger, escape(&receipt.started_at))
}

/// `upgrade refused` and so on.
pub(super) fn failure(receipt: &Receipt) -> String {
    match (receipt.trigger, receipt.outcome) {
        // "Rollback rolled back" would not tell much.
        (Trigger::Rollback, Outcome::RolledBack) => "rollback failed".to_owned(),
        (_, outcome) => format!("{} {}", noun(receipt), ended(outcome)),
    }
}

fn noun(receipt: &Receipt) -> &'static str {
    match receipt.trigger {
        Trigger::Rollback => "rollback",
        Trigger::Takeover => "takeover",
        Trigger::Signal | Trigger::Command | Trigger::Systemd | Trigger::Start | Trigger::Orphans => {
            "upgrade"
        }
    }
}

/// How, in words.
fn ended(outcome: Outcome) -> String {
    outcome.as_str().replace('_', " ")
}

fn tone(outcome: Outcome) -> Tone {
    match outcome {
        Outcome::Completed => Tone::Good,
        Outcome::Superseded => Tone::Notable,
        Outcome::RolledBack | Outcome::Refused => Tone::Bad,
    }
}

type Column = (&'static str, fn(&ReceiptListener) -> Option<u32>, bool);

/// Heading, value, and whether a count above 0 is a loss.
const COLUMNS: [Column; 8] = [
    ("QUEUED", |listener| listener.queued_at_switch, false),
    ("HALF-OPEN", |listener| listener.half_open_at_switch, false),
    ("ABANDONED", |listener| listener.half_open_abandoned, true),
    ("MIGRATED", |listener| listener.migrated, false),
    ("FAILED", |listener| listener.migrate_failures, true),
    ("DROPPED", |listener| listener.listen_drops, true),
    ("TAKEN", |listener| listener.leftovers_taken, false),
    ("LOST", |listener| listener.leftovers_lost, true),
];

fn listeners(listeners: &[ReceiptListener]) -> Table {
    let headings = COLUMNS.iter().map(|(heading, ..)| (*heading).to_owned());
    let mut table = Table::new(std::iter::once("LISTENER".to_owned()).chain(headings));
    for listener in listeners {
        let counts = COLUMNS.iter().map(|(_, value, is_loss)| {
            let value = value(listener);
            let lost = *is_loss && value.is_some_and(|value| value > 0);
            Cell::number(value).tone(if lost { Tone::Bad } else { Tone::Plain })
        });
        table.row(std::iter::once(Cell::text(&listener.name)).chain(counts).collect());
    }
    table
}
