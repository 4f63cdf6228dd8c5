//! `status` for people: a whole [`Status`] as text.

use std::collections::BTreeSet;
use std::fmt::Write;

use jiff::Timestamp;
use reuseportd_wire::status::{
    ExecutableInfo, GenerationState, GenerationStatus, ListenerStatus, MasterState, Protocol, Status,
    WorkerState, WorkerStatus,
};

use super::receipt;
use super::text::{Cell, Paint, Table, Tone, count, escape, known, milliseconds, share, since, wrap};

/// Writing to a String can't fail, which is why the results of `write!` are dropped in this file.
pub(super) fn render(status: &Status, now: Timestamp, paint: Paint) -> String {
    let mut text = master(status, now, paint);
    for generation in &status.generations {
        text.push('\n');
        text += &self::generation(generation, now, paint);
    }
    if !status.listeners.is_empty() {
        text.push('\n');
        text += &listeners(&status.listeners, paint);
    }
    if let Some(last) = &status.last_upgrade {
        text.push('\n');
        text += &receipt::render_with_reason(last, paint);
    }
    text
}

fn master(status: &Status, now: Timestamp, paint: Paint) -> String {
    let tone = match status.state {
        MasterState::Steady => Tone::Good,
        MasterState::Degraded | MasterState::RollingBack => Tone::Bad,
        MasterState::Starting
        | MasterState::Launching
        | MasterState::Canary
        | MasterState::Baking
        | MasterState::Retiring
        | MasterState::Stopping => Tone::Notable,
    };
    let serves = match status.active_generation {
        Some(number) => format!("generation {number} serves"),
        None => "no generation serves yet".to_owned(),
    };
    let app = paint.tone(Tone::Heading, &escape(&status.app));
    let mut text = format!("{app}: {}, {serves}\n", paint.tone(tone, status.state.as_str()));
    if let Some(reason) = &status.state_reason {
        text += &wrap(reason, 2);
    }
    let scaled = status.scaled.map(|to| format!("scaled to {} (config: {})", to.workers, to.configured));
    let waits = status.upgrade_waits.then(|| "an upgrade waits".to_owned());
    let notes: Vec<_> = scaled.into_iter().chain(waits).collect();
    if !notes.is_empty() {
        text += &wrap(&notes.join(", "), 2);
    }
    let master = &status.master;
    let _ = write!(text, "  master {}, version {}", master.pid, escape(&master.version));
    if let Some(up) = since(&master.started_at, now) {
        let _ = write!(text, ", up {up}");
    }
    if master.reexecs > 0 {
        let _ = write!(text, ", {}", count(Some(master.reexecs), "re-exec"));
    }
    if master.adopted {
        text += ", workers adopted after a crash";
    }
    text.push('\n');
    text
}

fn generation(generation: &GenerationStatus, now: Timestamp, paint: Paint) -> String {
    let tone = match generation.state {
        GenerationState::Active => Tone::Good,
        GenerationState::Launching
        | GenerationState::Canary
        | GenerationState::Standby
        | GenerationState::Retiring
        | GenerationState::Draining => Tone::Notable,
    };
    let heading = paint.tone(Tone::Heading, &format!("generation {}", generation.generation));
    let mut text = format!(
        "{heading}: {}, {}, {} open\n",
        paint.tone(tone, generation.state.as_str()),
        share(generation.share),
        count(generation.connections, "connection")
    );
    text += &wrap(&executable(&generation.executable), 2);
    if let Some(ms) = generation.deadline_ms {
        text += &wrap(&format!("deadline in {}: what is left by then is killed", milliseconds(ms)), 2);
    }
    if generation.workers.is_empty() {
        text += "  no workers\n";
    } else {
        text += &workers(&generation.workers, now).render(2, paint);
    }
    text
}

fn executable(executable: &ExecutableInfo) -> String {
    let pinned =
        if executable.pinned { "pinned" } else { "not pinned: a respawn runs what is there by then" };
    // Twelve digits tell two builds apart; `--json` has them all.
    let digest = executable.sha256.as_deref().and_then(|digest| digest.get(..12));
    let digest = digest.map(|digest| format!(", sha256 {digest}")).unwrap_or_default();
    format!("{} ({pinned}{digest})", executable.path)
}

fn workers(workers: &[WorkerStatus], now: Timestamp) -> Table {
    let names: BTreeSet<&str> =
        workers.iter().flat_map(|worker| &worker.listeners).map(|listener| listener.name.as_str()).collect();
    let queues = names.iter().map(|name| match names.len() {
        1 => "QUEUE".to_owned(),
        _ => format!("QUEUE {name}"),
    });
    let says = workers.iter().any(|worker| worker.status.is_some());
    let fixed = ["SEAT", "PID", "STATE", "UP", "RESTARTS"].map(str::to_owned);
    let heading = fixed.into_iter().chain(queues).chain(says.then(|| "STATUS".to_owned()));
    let mut table = Table::new(heading);
    for worker in workers {
        table.row(row(worker, &names, now));
    }
    table
}

fn row(worker: &WorkerStatus, names: &BTreeSet<&str>, now: Timestamp) -> Vec<Cell> {
    let tone = match worker.state {
        WorkerState::Serving => Tone::Good,
        WorkerState::Backoff => Tone::Bad,
        WorkerState::Starting | WorkerState::Ready | WorkerState::Retiring | WorkerState::Draining => {
            Tone::Notable
        }
    };
    let up = worker.started_at.as_deref().and_then(|started_at| since(started_at, now));
    let restarts = if worker.restarts > 0 { Tone::Notable } else { Tone::Plain };
    let mut cells = vec![
        Cell::number(Some(worker.seat)),
        Cell::number(Some(worker.pid.map_or_else(|| "-".to_owned(), |pid| pid.to_string()))),
        Cell::text(worker.state.as_str()).tone(tone),
        Cell::text(up.as_deref().unwrap_or("-")),
        Cell::number(Some(worker.restarts)).tone(restarts),
    ];
    cells.extend(names.iter().map(|name| queue(worker, name)));
    cells.extend(worker.status.as_deref().map(Cell::text));
    cells
}

/// Waiting connections of their limit, over all sockets the worker has under this name; the fullest counts.
fn queue(worker: &WorkerStatus, name: &str) -> Cell {
    let fullest = worker
        .listeners
        .iter()
        .filter(|listener| listener.name == name)
        .max_by_key(|listener| (listener.accept_queue, listener.receive_queue));
    let Some(listener) = fullest else { return Cell::number(Some("-")) };
    let half_full = match (listener.accept_queue, listener.backlog) {
        (Some(depth), Some(limit)) => depth > limit / 2,
        _ => false,
    };
    let text = match listener.receive_queue {
        Some(bytes) => format!("{bytes} B"),
        None => format!("{}/{}", known(listener.accept_queue), known(listener.backlog)),
    };
    Cell::number(Some(text)).tone(if half_full { Tone::Bad } else { Tone::Plain })
}

fn listeners(listeners: &[ListenerStatus], paint: Paint) -> String {
    let heading = ["LISTENER", "ADDRESS", "BOUND BY", "ENGINE", "STRANGERS"].map(str::to_owned);
    let mut table = Table::new(heading);
    for listener in listeners {
        let strangers = match listener.strangers {
            Some(1..) => Tone::Bad,
            Some(0) | None => Tone::Plain,
        };
        table.row(vec![
            Cell::text(&listener.name),
            Cell::text(&match listener.address.starts_with("unix:") {
                true => listener.address.clone(),
                false => format!("{} {}", listener.protocol, listener.address),
            }),
            Cell::text(listener.bind.as_str()),
            Cell::text(listener.engine.as_str()),
            Cell::number(listener.strangers).tone(strangers),
        ]);
    }
    let mut text = table.render(0, paint);
    // Listeners mostly share engine and reason: said once then.
    let reasons: BTreeSet<_> =
        listeners.iter().map(|listener| (listener.engine, listener.engine_reason.as_str())).collect();
    for (engine, reason) in reasons {
        text += &wrap(&format!("{engine}: {reason}"), 2);
    }
    for listener in listeners.iter().filter(|listener| listener.leftovers_lost > 0) {
        let (name, lost) = (&listener.name, listener.leftovers_lost);
        let what = if listener.protocol == Protocol::Udp { "datagram" } else { "connection" };
        let said =
            format!("{name}: lost with ended workers that had not taken them: {}", count(Some(lost), what));
        text += &wrap(&said, 2);
    }
    for listener in listeners {
        if let Some(forgotten @ 1..) = listener.flows_forgotten {
            let name = &listener.name;
            let said =
                format!("{name}: {forgotten} flows that were not idle were forgotten: raise flow_table");
            text += &wrap(&said, 2);
        }
    }
    text
}
