//! A receipt in words.

use std::fmt::Write;

use reuseportd_wire::status::{Outcome, Phase, Receipt, ReceiptListener};

use super::text::{Cell, Paint, Table, Tone, count, escape, milliseconds, wrap};

/// What the upgrade did: how it ended, its phases, its listeners, what was lost. Without the reason, see [`reason`].
pub(super) fn render(receipt: &Receipt, paint: Paint) -> String {
    let mut text = paint.tone(tone(receipt.outcome), &headline(receipt)) + "\n";
    let phases: Vec<_> =
        receipt.phases.iter().map(|time| format!("{} {}", time.phase, milliseconds(time.ms))).collect();
    if !phases.is_empty() {
        text += &wrap(&phases.join(", "), 2);
    }
    // Before new connections are turned to another generation nothing happens to a listener.
    if receipt.phases.iter().any(|time| matches!(time.phase, Phase::Canary | Phase::Switch)) {
        text += &listeners(&receipt.listeners).render(2, paint);
    }
    if receipt.outcome == Outcome::Completed || receipt.forced_kills > 0 {
        // Writing to a String can't fail.
        let _ = writeln!(
            text,
            "  {} killed, {} cut",
            count(Some(receipt.forced_kills), "worker"),
            count(receipt.connections_cut, "open connection")
        );
    }
    text
}

/// Why it ended so, with what to do about it when there is nothing in the receipt.
pub(super) fn reason(receipt: &Receipt) -> &str {
    receipt.reason.as_deref().unwrap_or("no reason given (the master's log may tell)")
}

fn headline(receipt: &Receipt) -> String {
    let what = match (receipt.from, receipt.to) {
        (Some(from), Some(to)) => format!("upgrade from generation {from} to {to}"),
        (None, Some(to)) => format!("launch of generation {to}"),
        (Some(from), None) => format!("upgrade from generation {from}"),
        (None, None) => "upgrade".to_owned(),
    };
    let ended = match (receipt.outcome, receipt.superseded_by) {
        (Outcome::Completed, _) => "completed".to_owned(),
        (Outcome::RolledBack, _) => "rolled back".to_owned(),
        (Outcome::Refused, _) => "refused".to_owned(),
        (Outcome::Superseded, Some(by)) => format!("superseded by generation {by}"),
        (Outcome::Superseded, None) => "superseded".to_owned(),
    };
    let took = milliseconds(receipt.duration_ms);
    format!("{what}: {ended} in {took} (by {}, {})", receipt.trigger, escape(&receipt.started_at))
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
