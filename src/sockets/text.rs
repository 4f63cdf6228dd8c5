//! The picture for people.

use reuseportd_wire::status::Protocol;

use super::facts::Owner;
use super::picture::{Path, Picture, Port, Relation, Seen};
use crate::client::text::{Cell, Paint, Table, Tone, escape, wrap};

/// A table for each port, warnings below it.
pub(super) fn render(picture: &Picture, paint: Paint) -> String {
    let mut text = String::new();
    if let Some(why) = &picture.no_master {
        text += &wrap(&format!("no master to ask, so nobody's worker is known: {why}"), 0);
        text.push('\n');
    }
    let ports = picture.ports.iter().map(|port| render_port(port, paint));
    let places: Vec<String> = ports.chain(picture.unix.iter().map(|path| render_path(path, paint))).collect();
    text += &places.join("\n");
    let of_ports = picture.ports.iter().flat_map(|port| &port.sockets).map(|socket| &socket.owners);
    let of_paths = picture.unix.iter().flat_map(|path| &path.sockets).map(|socket| &socket.owners);
    if of_ports.chain(of_paths).any(Option::is_none) {
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
    let of_udp = if port.protocol == Protocol::Udp { "udp " } else { "" };
    let heading = format!("{of_udp}port {}: {}", port.port, names.collect::<Vec<_>>().join("; "));
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

fn render_path(path: &Path, paint: Paint) -> String {
    let heading = format!("unix:{}: {}, {} waiting", path.path.display(), path.name, path.accept_queue);
    let mut text = paint.tone(Tone::Heading, &escape(&heading)) + "\n";
    if !path.sockets.is_empty() {
        let mut table = Table::new(["WHOSE", "INODE", "OWNER"].map(str::to_owned));
        for socket in &path.sockets {
            let (whose, tone) = whose(socket.relation, None, socket.workers);
            let owners = owners(socket.owners.as_deref());
            table.row(vec![
                Cell::text(&whose).tone(tone),
                Cell::number(Some(socket.inode)),
                Cell::text(&owners),
            ]);
        }
        text += &table.render(2, paint);
    }
    for warning in &path.warnings {
        text += &wrap(&format!("warning: {warning}"), 2);
    }
    text
}

fn whose(relation: Relation, place: Option<(u32, u32)>, workers: usize) -> (String, Tone) {
    match (relation, place) {
        (Relation::Worker, Some((generation, seat))) => {
            (format!("generation {generation} seat {seat}"), Tone::Good)
        }
        (Relation::Worker, None) if workers == 1 => ("worker".to_owned(), Tone::Good),
        (Relation::Worker, None) => (format!("{workers} workers"), Tone::Good),
        (Relation::Master, _) => ("master".to_owned(), Tone::Notable),
        (Relation::Stranger, _) => ("STRANGER".to_owned(), Tone::Bad),
        (Relation::Unknown, _) => ("?".to_owned(), Tone::Notable),
    }
}

fn owners(owners: Option<&[Owner]>) -> String {
    let Some(owners) = owners else { return "?".to_owned() };
    let each = owners.iter().map(|owner| format!("{} {}", owner.pid, short(&owner.command)));
    each.collect::<Vec<_>>().join(", ")
}

fn row(socket: &Seen) -> Vec<Cell> {
    let place = socket.generation.zip(socket.seat);
    let (whose, tone) = whose(socket.relation, place, socket.workers);
    let new = match socket.steered {
        Some(true) => Cell::text("yes"),
        Some(false) => Cell::text("no"),
        None if !socket.takes_from.is_empty() => Cell::text("takes").tone(Tone::Bad),
        None => Cell::text("?"),
    };
    let accept_queue =
        socket.accept_queue.zip(socket.backlog).map(|(queued, backlog)| format!("{queued}/{backlog}"));
    let queue = accept_queue.or(socket.receive_queue.map(|bytes| format!("{bytes} B")));
    vec![
        Cell::text(&socket.address.to_string()),
        Cell::text(&whose).tone(tone),
        new,
        Cell::number(queue),
        Cell::number(socket.drops),
        Cell::number(Some(socket.uid)),
        Cell::number(Some(socket.inode)),
        Cell::text(&owners(socket.owners.as_deref())),
    ]
}

/// A command line without the directories of its program.
fn short(command: &str) -> &str {
    let program = command.split(' ').next().unwrap_or_default();
    command.get(program.rfind('/').map_or(0, |slash| slash + 1)..).unwrap_or(command)
}
