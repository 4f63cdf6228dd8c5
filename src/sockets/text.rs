//! The picture for people.

use super::picture::{Picture, Port, Relation, Seen};
use crate::client::text::{Cell, Paint, Table, Tone, escape, wrap};

/// A table for each port, warnings below it.
pub(super) fn render(picture: &Picture, paint: Paint) -> String {
    let mut text = String::new();
    if let Some(why) = &picture.no_master {
        text += &wrap(&format!("no master to ask, so nobody's worker is known: {why}"), 0);
        text.push('\n');
    }
    let ports: Vec<String> = picture.ports.iter().map(|port| render_port(port, paint)).collect();
    text += &ports.join("\n");
    if picture.ports.iter().flat_map(|port| &port.sockets).any(|socket| socket.owners.is_none()) {
        let hidden = picture.unreadable_processes;
        text.push('\n');
        text += &wrap(
            &format!(
                "owner unknown: this user may not look into {hidden} of the processes here (run as root, or with CAP_SYS_PTRACE)"
            ),
            0,
        );
    }
    text
}

fn render_port(port: &Port, paint: Paint) -> String {
    let names = port.listeners.iter().map(|listener| {
        let engine = listener.engine.map(|engine| format!(", {engine}")).unwrap_or_default();
        format!("{} {}{engine}", listener.name, listener.address)
    });
    let heading = format!("port {}: {}", port.port, names.collect::<Vec<_>>().join("; "));
    let mut text = paint.tone(Tone::Heading, &escape(&heading)) + "\n";
    if !port.sockets.is_empty() {
        let columns = ["ADDRESS", "WHOSE", "NEW", "QUEUE", "DROPS", "UID", "INODE", "OWNER"];
        let mut table = Table::new(columns.map(str::to_owned));
        port.sockets.iter().for_each(|socket| table.row(row(socket)));
        text += &table.render(2, paint);
    }
    for warning in &port.warnings {
        text += &wrap(&format!("warning: {warning}"), 2);
    }
    text
}

fn row(socket: &Seen) -> Vec<Cell> {
    let (whose, tone) = match (socket.relation, socket.generation, socket.seat) {
        (Relation::Worker, Some(generation), Some(seat)) => {
            (format!("generation {generation} seat {seat}"), Tone::Good)
        }
        (Relation::Worker, ..) => ("worker".to_owned(), Tone::Good),
        (Relation::Master, ..) => ("master".to_owned(), Tone::Notable),
        (Relation::Stranger, ..) => ("STRANGER".to_owned(), Tone::Bad),
        (Relation::Unknown, ..) => ("?".to_owned(), Tone::Notable),
    };
    let new = match socket.steered {
        Some(true) => Cell::text("yes"),
        Some(false) => Cell::text("no"),
        None if !socket.takes_from.is_empty() => Cell::text("takes").tone(Tone::Bad),
        None => Cell::text("?"),
    };
    let owners = socket.owners.as_ref().map_or_else(
        || "?".to_owned(),
        |owners| {
            let each = owners.iter().map(|owner| format!("{} {}", owner.pid, short(&owner.command)));
            each.collect::<Vec<_>>().join(", ")
        },
    );
    vec![
        Cell::text(&socket.address.to_string()),
        Cell::text(&whose).tone(tone),
        new,
        Cell::number(Some(format!("{}/{}", socket.accept_queue, socket.backlog))),
        Cell::number(socket.drops),
        Cell::number(Some(socket.uid)),
        Cell::number(Some(socket.inode)),
        Cell::text(&owners),
    ]
}

/// A command line without the directories of its program.
fn short(command: &str) -> &str {
    let program = command.split(' ').next().unwrap_or_default();
    command.get(program.rfind('/').map_or(0, |slash| slash + 1)..).unwrap_or(command)
}
